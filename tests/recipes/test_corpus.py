"""The embedded corpus, and how documents become blocks of tokens."""

import importlib.util
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import corpus
import data
from corpus import Document
from data import DatasetArguments

SMALL = 400_000


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return corpus.standard_library(SMALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(library: list[Document]) -> PreTrainedTokenizerFast:
    return data.train_bpe(Dataset.from_list([{"text": each.text} for each in library]), "text", 600)


# ---- The corpus ----


def test_another_process_reads_and_splits_the_same_corpus(library: list[Document]) -> None:
    code = f"import corpus; print(*map(corpus.fingerprint, corpus.split(corpus.standard_library({SMALL}), 0.3)))"
    folder = Path(corpus.__file__).parent
    other = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [corpus.fingerprint(side) for side in corpus.split(library, 0.3)]


def test_the_corpus_is_source_code_without_tests_and_without_the_other_domain(library: list[Document]) -> None:
    names = [document.name for document in corpus.standard_library()]
    assert len(names) > 400
    assert len(set(names)) == len(names)
    assert all(name.endswith(".py") for name in names)
    folders = set(chain.from_iterable(name.split("/")[:-1] for name in names))
    assert {"asyncio", "email"} <= folders
    assert not folders & {"test", "tests", "site-packages", "pydoc_data", "__pycache__", "lib-dynload"}


def test_the_size_of_the_corpus_is_limited_and_a_larger_limit_only_adds(library: list[Document]) -> None:
    sizes = [len(document.text.encode()) for document in library]
    assert SMALL / 2 < sum(sizes) <= SMALL
    assert corpus.standard_library(2 * SMALL)[: len(library)] == library


def test_installed_packages_are_added_to_the_corpus(library: list[Document]) -> None:
    wide = corpus.standard_library(40 * SMALL, installed=True)
    origins = {document.name.startswith("site-packages/") for document in wide}
    assert origins == {True, False}


def test_split_is_by_file_disjoint_complete_and_independent_of_the_cap(library: list[Document]) -> None:
    train, validation = corpus.split(library, 0.3)
    assert {*train, *validation} == set(library)
    assert not {each.name for each in train} & {each.name for each in validation}
    larger_train, larger_validation = corpus.split(corpus.standard_library(2 * SMALL), 0.3)
    assert set(train) <= set(larger_train)
    assert set(validation) <= set(larger_validation)
    shares = [len(corpus.split(corpus.standard_library(), fraction)[1]) / 600 for fraction in (0.1, 0.3)]
    assert shares == [pytest.approx(0.1, abs=0.05), pytest.approx(0.3, abs=0.07)]


def test_fingerprint_depends_on_names_texts_and_their_borders_but_not_on_the_order() -> None:
    first = [Document("a", "bc"), Document("d", "e")]
    assert corpus.fingerprint(first) == corpus.fingerprint(first[::-1])
    others = [[Document("ab", "c"), first[1]], [Document("a", "bx"), first[1]], first[:1]]
    assert len({corpus.fingerprint(each) for each in [first, *others]}) == 4


def test_snippets_have_every_label_on_both_sides_and_no_file_on_two() -> None:
    train, validation = corpus.split_by_package(corpus.package_files(), 0.2)
    assert not {each.name for each in train} & {each.name for each in validation}
    for side in (train, validation):
        rows = list(corpus.snippets(side))
        assert {row["label"] for row in rows} == set(corpus.PACKAGES)
        assert all(row["text"].count("\n") == corpus.SNIPPET_LINES - 1 for row in rows)


def test_topics_are_english_text() -> None:
    topics = corpus.documentation_topics()
    assert len(topics) > 50
    assert sum(len(topic.text) for topic in topics) > 200_000


# ---- Tokenizer ----


def test_tokenizer_is_lossless_and_survives_saving(
    tokenizer: PreTrainedTokenizerFast, library: list[Document], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    strange = "tab\there  two  blanks ,comma 'quote' n't\r\n\x00 é 中文 🙂\n\n"
    for text in [strange, *(document.text for document in library[:10])]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    assert len(tokenizer) == 600
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
    assert max(map(len, (tokenizer(document.text, verbose=False)["input_ids"] for document in library))) > 0


def test_tokenizer_is_trained_once_for_each_text_and_size(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = DatasetArguments(corpus_max_bytes=SMALL, validation_fraction=0.2, cache_dir=cache)
    splits = data.load_splits(arguments)
    first = data.trained_tokenizer(splits, arguments, 400)
    folders = sorted(path.name for path in Path(cache).glob("tokenizer-*"))
    trained: list[int] = []
    train_bpe = data.train_bpe
    monkeypatch.setattr(data, "train_bpe", lambda *args: trained.append(1) or train_bpe(*args))
    again = data.trained_tokenizer(splits, arguments, 400)
    assert (again.get_vocab(), trained) == (first.get_vocab(), [])
    assert sorted(path.name for path in Path(cache).glob("tokenizer-*")) == folders
    data.trained_tokenizer(splits, arguments, 401)
    assert trained == [1]
    # Training from scratch gives the same merges, so the cache hides no randomness.
    assert train_bpe(splits.train, "text", 400).get_vocab() == first.get_vocab()


# ---- Packing ----


def test_packing_joins_documents_with_the_end_token_and_loses_only_the_tail(
    tokenizer: PreTrainedTokenizerFast, library: list[Document]
) -> None:
    texts = [document.text for document in library[:20]]
    joined = list(chain.from_iterable([*tokenizer(text, verbose=False)["input_ids"], 0] for text in texts))
    assert tokenizer.eos_token_id == 0
    arguments = DatasetArguments(sequence_length=64)
    blocks = data.packed(Dataset.from_list([{"text": text} for text in texts]), tokenizer, arguments, "training")
    assert set(map(len, blocks["input_ids"])) == {64}
    assert list(chain.from_iterable(blocks["input_ids"])) == joined[: len(joined) // 64 * 64]
    assert list(blocks["labels"]) == list(blocks["input_ids"])


def test_an_edit_of_the_packing_misses_the_cache(tmp_path: Path) -> None:
    hashes = set()
    for edit in ("", "blocks = blocks[:-1]"):
        source = Path(data.__file__).read_text().replace("# The model shifts the labels itself.", edit)
        (tmp_path / "edited.py").write_text(source)
        spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
        sys.modules["edited"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        hashes.add(Hasher.hash(module.packing(4)))
    assert len(hashes) == 2


@pytest.mark.parametrize(("tokens", "blocks"), [(7, 1), (8, 2), (9, 2), (3, 0)])
def test_packing_at_the_edges(tokens: int, blocks: int) -> None:
    found = data.packing(sequence_length=4)({"input_ids": [list(range(tokens))]})["input_ids"]
    assert found == [list(range(4 * block, 4 * block + 4)) for block in range(blocks)]


def test_processes_do_not_change_the_blocks(tokenizer: PreTrainedTokenizerFast, library: list[Document]) -> None:
    documents = Dataset.from_list([{"text": each.text} for each in library[:30]])
    one, two = (
        data.packed(documents, tokenizer, DatasetArguments(num_proc=processes), "training") for processes in (None, 2)
    )
    assert list(one["input_ids"]) == list(two["input_ids"])


def test_streamed_blocks_are_the_same(tokenizer: PreTrainedTokenizerFast, library: list[Document]) -> None:
    documents = Dataset.from_list([{"text": each.text, "url": "x"} for each in library[:30]])
    arguments = DatasetArguments()
    stored = data.packed(documents, tokenizer, arguments, "training")
    streamed = data.packed(documents.to_iterable_dataset(), tokenizer, arguments, "training")
    assert list(streamed) == list(stored)


# ---- Files ----


def paragraphs(count: int) -> list[str]:
    return [f"paragraph number {index} of the text" for index in range(count)]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in texts))
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_local_files_are_split_deterministically(kind: str, tmp_path: Path, cache: str) -> None:
    path = write(tmp_path, kind, paragraphs(50))
    splits = [
        data.load_splits(DatasetArguments(dataset=str(path), validation_fraction=0.2, cache_dir=cache))
        for _ in range(2)
    ]
    assert [list(each.train["text"]) for each in splits[:1]] == [list(each.train["text"]) for each in splits[1:]]
    assert len(splits[0].validation) == 10
    assert sorted([*splits[0].train["text"], *splits[0].validation["text"]]) == sorted(paragraphs(50))


def test_a_folder_of_text_files_is_one_document_a_file(tmp_path: Path, cache: str) -> None:
    for index, text in enumerate(["a\n\nb", "c", "d"]):
        (tmp_path / f"{index}.txt").write_text(text)
    splits = data.load_splits(DatasetArguments(dataset=str(tmp_path), validation_fraction=0.3, cache_dir=cache))
    assert {*splits.train["text"], *splits.validation["text"]} == {"a\n\nb", "c", "d"}


def test_an_existing_validation_split_is_used(tmp_path: Path, cache: str) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    splits = data.load_splits(DatasetArguments(dataset=str(tmp_path), cache_dir=cache))
    assert (splits.train["text"][0], splits.validation["text"][0]) == ("train", "validation")


def test_other_splits_than_validation_are_told(tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {i}"}) for i in range(10)))
    settings = {"dataset": str(tmp_path), "cache_dir": cache}
    assert all("train" in text for text in data.load_splits(DatasetArguments(**settings)).validation["text"])
    assert "has the splits train, test, and none is called 'validation'" in caplog.text
    caplog.clear()
    splits = data.load_splits(DatasetArguments(**settings, validation_split="test"))
    assert (len(splits.validation), caplog.text) == (10, "")


def test_a_folder_may_have_a_readme_beside_its_tables(tmp_path: Path, cache: str) -> None:
    (tmp_path / "README.md").write_text("What this is.")
    (tmp_path / "train.csv").write_text("text\na\n07\nc\n")
    splits = data.load_splits(DatasetArguments(dataset=str(tmp_path), validation_fraction=0.3, cache_dir=cache))
    assert {*splits.train["text"], *splits.validation["text"]} == {"a", "07", "c"}


def test_a_folder_of_texts_may_have_other_files_beside_them(tmp_path: Path, cache: str) -> None:
    for index, text in enumerate(["a\n\nb", "c", "d"]):
        (tmp_path / f"{index}.txt").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "meta.csv").write_text("a,b\n")
    splits = data.load_splits(DatasetArguments(dataset=str(tmp_path), validation_fraction=0.3, cache_dir=cache))
    assert {*splits.train["text"], *splits.validation["text"]} == {"a\n\nb", "c", "d"}


def test_other_columns_of_a_long_table_are_read_as_before(tmp_path: Path, cache: str) -> None:
    """pandas reads 10,000 rows at a time, and the column has to be of numbers in each."""
    table = tmp_path / "long.csv"
    table.write_text("text,score\n" + "".join(f"text {i},{0.5 if i < 10_000 else 'NA'}\n" for i in range(10_010)))
    splits = data.load_splits(DatasetArguments(dataset=str(table), cache_dir=cache))
    assert splits.train.features["score"].dtype == "float64"


def test_the_validation_blocks_are_drawn_from_all_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [letter * 400 for letter in "abcdefghij"]
    arguments = DatasetArguments(sequence_length=8, validation_blocks=20)
    documents = Dataset.from_list([{"text": text} for text in texts])
    for rows in (documents, documents.to_iterable_dataset()):
        blocks = list(data.for_validation(rows, tokenizer, arguments))
        seen = {letter for block in blocks for letter in tokenizer.decode(block["input_ids"]) if letter in "abcdefghij"}
        assert len(blocks) == 20
        assert len(seen) >= 6 if rows is documents else len(seen) <= 3  # of a stream the first are taken


def test_a_stream_gives_its_first_documents_to_validation(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "STREAM_VALIDATION_DOCUMENTS", 3)
    path = write(tmp_path, "jsonl", paragraphs(10))
    splits = data.load_splits(DatasetArguments(dataset=str(path), streaming=True, cache_dir=cache))
    assert isinstance(splits.train, IterableDataset)
    texts = [[row["text"] for row in part] for part in (splits.validation, splits.train)]
    assert texts == [paragraphs(10)[:3], paragraphs(10)[3:]]
    path.write_text(path.read_text() + '{"text": "another"}\n')
    changed = data.load_splits(DatasetArguments(dataset=str(path), streaming=True, cache_dir=cache))
    assert changed.key != splits.key  # so that it gets a tokenizer of its own


def test_the_configurations_of_a_data_set_are_listed_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"dataset_config names none.*available configs: \['en', 'de'\]\."):
        data.load_parts(DatasetArguments(dataset="some/set"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dataset": "./absent.jsonl"}, FileNotFoundError, "dataset='./absent.jsonl' does not exist"),
        ({"dataset": "absent.txt"}, FileNotFoundError, "dataset='absent.txt' does not exist"),
        ({"dataset": "texts.jsn"}, ValueError, r"is no data set of the recipes. Did you mean 'texts.jsonl'"),
        ({"dataset": "stdlib-topicks"}, ValueError, "is no data set of the recipes. Did you mean 'stdlib-topics' or"),
        ({"dataset": "nobody/nothing"}, ValueError, "dataset='nobody/nothing'.*cannot be loaded.*Without a network"),
        ({"dataset": "outputs/nothing"}, FileNotFoundError, "dataset='outputs/nothing' does not exist"),
        ({"dataset": "{folder}/empty.jsonl"}, ValueError, "empty.jsonl' is an empty file"),
        ({"dataset": "{folder}/empty.txt"}, ValueError, "empty.txt' is an empty file"),
        ({"dataset": "{folder}/broken.jsonl"}, ValueError, r"line 2 of broken\.jsonl is no JSON .* Correct that line"),
        ({"dataset": "{folder}/broken.csv"}, ValueError, "Expected 2 fields in line 3, saw 4. Correct the file"),
        ({"dataset": "{folder}/columns"}, ValueError, "not all of its rows have 'extra'. Give all the same columns"),
        ({"dataset": "{folder}/gap.jsonl"}, ValueError, "gap.jsonl', row 2: there is no 'text'. Give every row one"),
        ({"dataset": "{folder}/numbers.jsonl"}, ValueError, "the column 'text' holds int64, not text"),
        ({"dataset": "{folder}/one.jsonl"}, ValueError, r"1 document\(s\), of which .* leaves none to train on"),
        ({"dataset": "{folder}/texts.jsonl", "validation_fraction": 0.9}, ValueError, r"5 doc.*n=0\.9 leaves none"),
        ({"dataset": "{folder}/odd.bin"}, ValueError, "ends in '.bin': give one of .txt"),
        ({"dataset": "{folder}/texts.jsonl", "text_column": "txt"}, ValueError, "text_column='txt'.*has text, other"),
        ({"dataset": "{folder}/texts.jsonl", "train_split": "tain"}, ValueError, "train_split='tain'.*has train"),
        (
            {"dataset": "{folder}/texts.jsonl", "streaming": True},
            ValueError,
            "empty training split. Of a stream .* 1000",
        ),
        ({"dataset": "{folder}/texts.jsonl", "validation_split": "x"}, ValueError, "validation_split='x'.*has train"),
        ({"corpus_max_bytes": 1}, ValueError, "empty (training|validation) split.*corpus_max_bytes=1"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(
    settings: dict,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "jsonl", paragraphs(5))
    files = {
        "empty.jsonl": "",
        "empty.txt": "",
        "one.jsonl": '{"text": "a"}',
        "odd.bin": "a",
        "broken.jsonl": '{"text": "a"}\n{"text": \n{"text": "b"}\n',
        "broken.csv": "text,label\na,b\na,b,c,d\n",
        "columns/train.csv": "text\na\n",
        "columns/validation.csv": "text,extra\na,b\n",
        "gap.jsonl": '{"text": "a"}\n{"other": 1}\n{"text": "b"}\n',
        "numbers.jsonl": '{"text": 1}\n{"text": 2}\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    settings = {
        name: str(value).format(folder=tmp_path) if name == "dataset" else value for name, value in settings.items()
    }
    with pytest.raises(error, match=message):
        data.load_splits(DatasetArguments(**settings, cache_dir=cache))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"sequence_length": 1}, "sequence_length=1 is too small"),
        ({"num_proc": 0}, "num_proc=0 is too small"),
        ({"dataset": "stdlib-topics", "corpus_max_bytes": 10}, "corpus_max_bytes and corpus_installed are for"),
        ({"streaming": True}, "streaming=True is of no use with dataset='stdlib'"),
    ],
)
def test_unusable_data_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetArguments(**settings)


def test_text_shorter_than_one_sequence_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"training text.*shorter than one sequence: lower sequence_length=128"):
        data.packed(Dataset.from_list([{"text": "a b"}]), tokenizer, DatasetArguments(), "training")


def test_instructions_and_preferences_use_the_docstring_of_each_function() -> None:
    source = '''
def one(x):
    """Return one.

    More of it.
    """
    return 1

class C:
    def two(self):
        "Return two, over
    two lines."
        return 2

def three():
    """Nothing but this."""

def four(y):
    return y
'''.replace('"Return two, over\n    two lines."', '"""Return two, over\n        two lines."""')
    files = [corpus.Document("a.py", source), corpus.Document("b.py", "no python (")]
    rows = list(corpus.instructions(files))
    assert [row["completion"] for row in rows] == [" Return one.", " Return two, over two lines."]
    assert "def one(x):\n    return 1" in rows[0]["prompt"]
    assert "Return one" not in rows[0]["prompt"]
    assert list(corpus.preferences(files)) == [
        {"prompt": rows[1]["prompt"], "chosen": " Return two, over two lines.", "rejected": " Return one."}
    ]
