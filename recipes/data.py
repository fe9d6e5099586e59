"""Prepares a data set for the Trainer, from its name or path: load, split, train a tokenizer, tokenize, pack."""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import tokenizers
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from datasets.data_files import FILES_TO_IGNORE
from datasets.table import CastError
from huggingface_hub.constants import HF_HOME
from models import is_path, model_folder, not_there
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_fsam.mistakes import did_you_mean, first_line

Batched = Callable[[dict[str, list]], dict[str, list]]

# Those without rows of their own are rows {text}.
ROWS = {
    "stdlib-packages": corpus.snippets,
    "stdlib-instructions": corpus.instructions,
    "stdlib-preferences": corpus.preferences,
    "debian-packages": corpus.labelled,
}
EMBEDDED = ("stdlib", "stdlib-topics", *ROWS)
OF_STDLIB = ("stdlib", "stdlib-instructions", "stdlib-preferences")  # what `corpus_max_bytes` and the like limit
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
END, PAD = "<|endoftext|>", "<|pad|>"
PACKED_TOGETHER = 1000  # documents that are joined and cut into blocks; only the rest after the last block is lost
TOKENIZER_DOCUMENTS = 200_000  # documents to train a tokenizer on, enough for 32k merges
PART_TO_VALIDATE = 0.05
STREAM_VALIDATION_DOCUMENTS = 1000  # instead of a fraction, since the length of a stream is not known
STREAM_SHUFFLE_BUFFER = 10_000


@dataclass
class DatasetArguments:
    dataset: str = field(
        default="stdlib",
        metadata={
            "help": f"{', '.join(EMBEDDED)} (text of every Python, or of Debian, with nothing to download); or the "
            "name of a data set on the hub; or a path: one .txt (with a document per paragraph), .jsonl, .json, "
            ".parquet or .csv file, or a folder of such files (.txt files with a document per file)."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub, such as en for C4."}
    )
    train_split: str = field(default="train", metadata={"help": "Name of the training split."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Name of the validation split. By default it is `validation`, or a part of the training split."
        },
    )
    validation_fraction: float = field(
        default=PART_TO_VALIDATE,
        metadata={"help": "Share of the documents to validate on where there is no validation split."},
    )
    text_column: str = field(default="text", metadata={"help": "Name of the column that has the text."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data during the training instead of downloading it first. Needs max_steps."},
    )
    sequence_length: int = field(default=128, metadata={"help": "Tokens per training sequence."})
    validation_blocks: int | None = field(
        default=None, metadata={"help": "Number of validation sequences to evaluate on. All by default."}
    )
    corpus_max_bytes: int | None = field(default=None, metadata={"help": "Limit for the size of the stdlib corpus."})
    corpus_installed: bool = field(
        default=False,
        metadata={"help": "Add the packages that are installed in this environment to the stdlib corpus."},
    )
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenize."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared data and tokenizers. Below HF_HOME by default."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} is not between 0 and 1.")
        for name, least in (("sequence_length", 2), ("validation_blocks", 1), ("corpus_max_bytes", 1), ("num_proc", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small: give {least} or more.")
        if self.dataset not in OF_STDLIB and (self.corpus_max_bytes is not None or self.corpus_installed):
            raise ValueError(
                "corpus_max_bytes and corpus_installed are for dataset='stdlib' and the data sets that are made of it, "
                f"not for {self.dataset!r}: leave them out."
            )
        if self.streaming and self.dataset in EMBEDDED:
            raise ValueError(
                f"streaming=True is of no use with dataset={self.dataset!r}, which is on this machine already: leave "
                "it out."
            )

    def columns(self) -> dict[str, str]:
        """The columns that the data set must have, each by the argument that names it."""
        return {"text_column": self.text_column}

    def text_columns(self) -> list[str]:
        """Those of them that hold text."""
        return [column for argument, column in self.columns().items() if argument != "label_column"]

    def questions(self, rows: Dataset) -> Iterable[Any] | None:
        """What each row gives the model to answer. Rows that ask the same stay together where a part is split off to
        validate on. None where each row is a text by itself."""
        return None

    def check_rows(self, rows: Dataset) -> None:
        """
        Raises:
            ValueError: a row of a stored data set cannot be used.
        """
        check_rows(rows, self.dataset, self.text_columns())
        labels = [column for argument, column in self.columns().items() if argument == "label_column"]
        check_rows(rows, self.dataset, labels, text=False)


def refuse_unused(arguments: Any, **cures: str) -> None:
    """
    Raises:
        ValueError: an argument is set of which this recipe takes no notice; its cure is given by its name.
    """
    for name, cure in cures.items():
        if getattr(arguments, name) != type(arguments).__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(arguments, name)!r} is not for this recipe or task: {cure}.")


@dataclass
class Splits:
    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset
    sha256: str | None  # of the whole embedded corpus; None for another data set
    key: str  # identifies the training text in the tokenizer cache


def on_hub(dataset: str) -> bool:
    """Whether the data set is one of the hub's, as far as its name tells."""
    return dataset not in EMBEDDED and not is_path(dataset)


# ---- Load and split ----


def load_splits(data: DatasetArguments) -> Splits:
    """Loads the documents for training and validation, and checks them.

    Raises:
        FileNotFoundError: `dataset` is a path that does not exist.
        ValueError: the data set cannot be loaded, a split or column is missing, or a split is empty.
    """
    splits = load_embedded(data) if data.dataset in EMBEDDED else load_stored(data)
    for name, documents in (("training", splits.train), ("validation", splits.validation)):
        first = next(iter(documents), None)
        if first is None and data.streaming:
            raise ValueError(
                f"dataset={data.dataset!r} has an empty {name} split. Of a stream without a validation split the first "
                f"{STREAM_VALIDATION_DOCUMENTS} documents validate. Give more, name a validation_split, or set "
                "streaming=False."
            )
        if first is None:
            raise ValueError(
                f"dataset={data.dataset!r} has an empty {name} split. Give more documents, or change "
                f"validation_fraction={data.validation_fraction} or corpus_max_bytes={data.corpus_max_bytes}."
            )
        for argument, column in data.columns().items():
            if column not in first:
                raise ValueError(
                    f"{argument}={column!r} is not a column of {data.dataset!r}, which has {', '.join(first)}."
                    f"{did_you_mean(column, first)}"
                )
    return splits


def load_embedded(data: DatasetArguments) -> Splits:
    documents = load_documents(data)
    split = corpus.split_by_package if data.dataset == "stdlib-packages" else corpus.split
    rows_of = ROWS.get(data.dataset, lambda side: ({"text": document.text} for document in side))
    sides = [list(rows_of(side)) for side in split(documents, data.validation_fraction)]
    # `datasets` caches a data set on disk, and what `map` makes of it, only if it comes from a generator.
    train, validation = (
        Dataset.from_generator(generate, gen_kwargs={"rows": tuple(rows)}, cache_dir=data.cache_dir)
        if rows
        else Dataset.from_list([])
        for rows in sides
    )
    sha256 = corpus.fingerprint(documents)
    return Splits(train, validation, sha256, key=f"{sha256}-{data.validation_fraction}")


def load_documents(data: DatasetArguments) -> list[corpus.Document]:
    if data.dataset in OF_STDLIB:
        return corpus.standard_library(data.corpus_max_bytes, data.corpus_installed)
    return {
        "stdlib-topics": corpus.documentation_topics,
        "stdlib-packages": corpus.package_files,
        "debian-packages": corpus.debian_packages,
    }[data.dataset]()


def generate(rows: tuple[dict[str, str], ...]) -> Iterator[dict[str, str]]:
    yield from rows


def load_stored(data: DatasetArguments) -> Splits:
    parts = load_parts(data)
    for argument in ("train_split", "validation_split"):
        name = getattr(data, argument)
        if name is not None and name not in parts:
            raise ValueError(
                f"{argument}={name!r} is not in {data.dataset!r}, which has {', '.join(parts)}."
                f"{did_you_mean(name, parts)}"
            )
    train, validation = parts[data.train_split], parts.get(data.validation_split or "validation")
    if validation is None and len(parts) > 1 and PartialState().is_main_process:
        logging.getLogger(__name__).warning(
            "dataset=%r has the splits %s, and none is called 'validation': a part of %r is taken to validate on, "
            "unless validation_split names another.",
            *(data.dataset, ", ".join(parts), data.train_split),
        )
    for documents in (train, validation):
        if isinstance(documents, Dataset):  # where a stream has rows without text, they are left out
            data.check_rows(documents)
    key = "-".join(map(str, (data.dataset, data.dataset_config, data.train_split, data.text_column)))
    if data.streaming:
        key += "-".join(map(str, stamps(Path(data.dataset).expanduser())))
        if validation is None:
            validation, train = train.take(STREAM_VALIDATION_DOCUMENTS), train.skip(STREAM_VALIDATION_DOCUMENTS)
        return Splits(train, validation, sha256=None, key=key)
    if validation is None:
        if math.ceil(len(train) * data.validation_fraction) == len(train):
            raise ValueError(
                f"dataset={data.dataset!r} has {len(train)} document(s), of which validation_fraction="
                f"{data.validation_fraction} leaves none to train on: give more, lower it, or name a validation_split."
            )
        # Shuffled with a fixed seed, so that the split does not change with the seed of the training.
        by_question = split_by_question(train, data)
        if by_question is None:
            both = train.train_test_split(test_size=data.validation_fraction, seed=0)
            by_question = both["test"], both["train"]
        validation, train = by_question
    elif PartialState().is_main_process:
        learned = set(map(digest, data.questions(train) or ()))
        twice = sum(digest(question) in learned for question in data.questions(validation) or ())
        if twice:
            logging.getLogger(__name__).warning(
                "dataset=%r: %d of the %d validation rows have the text or the prompt of a training row, so that the "
                "figures will be too good.",
                *(data.dataset, twice, len(validation)),
            )
    return Splits(train, validation, sha256=None, key=f"{key}-{train._fingerprint}")


def split_by_question(rows: Dataset, data: DatasetArguments) -> tuple[Dataset, Dataset] | None:
    """A part to validate on, and the others; None where rows have no questions, or all too many have the same."""
    questions = data.questions(rows)
    if questions is None:
        return None
    count = math.ceil(len(rows) * data.validation_fraction)
    validation, train = cut(rows, count, questions, seed=0)
    if len(validation) <= 2 * count and len(train):
        return validation, train
    if PartialState().is_main_process:
        logging.getLogger(__name__).warning(
            "dataset=%r has so many rows with the same text or prompt that it is trained on and validated on: name a "
            "validation_split with others.",
            data.dataset,
        )
    return None


def cut(rows: Dataset, count: int, questions: Iterable[Any], seed: int) -> tuple[Dataset, Dataset]:
    """Shuffles, and cuts off `count` rows or a few more. Returns them and the others.

    Rows with the same question, such as a text that several people labelled or a prompt with several answers, are all
    on one side: else a model would be tested on what it has learned. Where none is there twice, the order is that of
    `rows.shuffle`.

    Args:
        questions: one for each row.
    """
    same: dict[Any, list[int]] = {}
    for index, question in zip(range(len(rows)), questions, strict=True):
        same.setdefault(digest(question) if question else index, []).append(index)  # nothing is no question
    groups = list(same.values())
    order: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(order) < count <= len(order) + len(groups[group]):
            count = len(order) + len(groups[group])
        order += groups[group]
    return rows.select(order[:count]), rows.select(order[count:])


def digest(question: Any) -> bytes:
    """It may be a list of messages, which has no hash."""
    return hashlib.sha256(repr(question).encode()).digest()


def in_turn(rows: Dataset, column: str) -> Iterator[Any]:
    """The values of a column. `datasets` reads slices many times faster than rows."""
    for start in range(0, len(rows), 1000):
        yield from rows[column][start : start + 1000]


def stamps(path: Path) -> list[Any]:
    """By which changed files are known from what they were; nothing where there is no such path."""
    files = [file for file in [path, *sorted(path.rglob("*"))] if file.is_file() and file.suffix in (*BUILDERS, ".tsv")]
    return [part for file in files for part in (file.resolve(), file.stat().st_size, file.stat().st_mtime_ns)]


def load_parts(data: DatasetArguments) -> dict[str, Dataset | IterableDataset]:
    """All splits of a local path or of a data set on the hub."""
    path = Path(data.dataset).expanduser()
    options: dict[str, Any] = {"streaming": data.streaming, "cache_dir": data.cache_dir}
    kind, part = None, ""
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"dataset={data.dataset!r} ends in {path.suffix!r}: give one of {', '.join(BUILDERS)}.")
        if path.stat().st_size == 0:
            raise ValueError(f"dataset={data.dataset!r} is an empty file: give one with rows.")
        source, options["data_files"] = BUILDERS[path.suffix], str(path)
        kind, part = source, "paragraph"
    elif path.is_dir():
        source, kind, part = str(path), kind_of(path), "document"  # `datasets` finds the splits by the files' names
    elif path.suffix in BUILDERS or is_path(data.dataset):
        raise FileNotFoundError(f"{not_there('dataset', data.dataset)} Give a file or folder that does.")
    else:
        source = data.dataset
        here = [each.name for each in Path().iterdir()] if path.suffix else []
        meant = did_you_mean(source, [*EMBEDDED, *here]) if "/" not in source else ""
        if meant:
            raise ValueError(
                f"dataset={source!r} is no data set of the recipes.{meant} For one of the hub give owner/name."
            )
    if kind == "text":
        options["sample_by"] = part
    elif kind == "csv":  # else pandas takes 01 for 1
        options["converters"] = dict.fromkeys(data.columns().values(), str)
    try:
        return dict(load_dataset(source, data.dataset_config, **options))
    except Exception as error:  # no network, an unknown name, a malformed file, and more
        if path.exists():
            raise ValueError(f"dataset={data.dataset!r} can't be read: {what_is_broken(path, error)}.") from error
        if "Config name is missing" in str(error):
            raise ValueError(
                f"dataset={data.dataset!r} has several configurations, and dataset_config names none. "
                f"{str(error).splitlines()[1]}."
            ) from error
        raise ValueError(
            f"dataset={data.dataset!r} (dataset_config={data.dataset_config!r}) cannot be loaded from the hub "
            f"({first_line(error)}). Without a network use one of {', '.join(EMBEDDED)}, or a path."
        ) from error


def kind_of(folder: Path) -> str | None:
    """What most of the folder's files are, by which `datasets` reads it."""
    kinds = {**BUILDERS, ".tsv": "csv"}
    files = [file for file in folder.rglob("*") if file.suffix in kinds and file.name not in FILES_TO_IGNORE]
    return Counter(kinds[file.suffix] for file in files).most_common(1)[0][0] if files else None


def what_is_broken(path: Path, error: BaseException) -> str:
    """The line of the file, as far as it can be told, and what is wrong there."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.jsonl")):
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        json.loads(line.strip() or "{}")
                    except ValueError as mistake:
                        return f"line {number} of {file.name} is no JSON ({first_line(mistake)}). Correct that line"
    while error.__cause__ is not None:  # `datasets` wraps it in errors that say less
        error = error.__cause__
    if isinstance(error, CastError):
        only = {*error.table_column_names} ^ {*error.requested_column_names}
        return f"not all of its rows have {', '.join(map(repr, sorted(only)))}. Give all the same columns"
    return f"{first_line(error)}. Correct the file"


def check_rows(documents: Dataset, name: str, columns: list[str], text: bool = True) -> None:
    """
    text: the columns have to hold text.

    Raises:
        ValueError: a row lacks one of the columns, or a column holds something else.
    """
    for column in columns:
        if column not in documents.column_names:
            continue  # which load_splits tells
        row = None
        if documents.data.column(column).null_count:  # in a part of a table it counts those of the whole
            row = next((index for index, value in enumerate(documents[column], start=1) if value is None), None)
        if row is not None:
            raise ValueError(
                f"dataset={name!r}, row {row}: there is no {column!r}. Give every row one (in a CSV file NA, None and "
                "null count as none), or take that row out."
            )
        dtype = getattr(documents.features[column], "dtype", "list")
        if text and dtype not in ("string", "large_string"):
            raise ValueError(f"dataset={name!r}: the column {column!r} holds {dtype}, not text. Name another column.")


# ---- Tokenizer ----


def load_tokenizer(name_or_path: str, argument: str = "model_name_or_path") -> PreTrainedTokenizerBase:
    folder = model_folder(name_or_path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}={name_or_path!r} holds no tokenizer ({first_line(error)}). Give the folder of one; or its "
            "name on the hub, and see that there is a network."
        ) from error
    if tokenizer.pad_token is None:  # as in GPT-2; any token serves, since padding is masked wherever it is used
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trained_tokenizer(splits: Splits, data: DatasetArguments, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training documents, or the one from the cache."""
    settings = json.dumps([splits.key, vocab_size, TOKENIZER_DOCUMENTS, tokenizers.__version__])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = Path(data.cache_dir or Path(HF_HOME) / "hf_fsam").expanduser() / f"tokenizer-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            finished = Path(temporary) / "tokenizer"
            train_bpe(splits.train, data.text_column, vocab_size).save_pretrained(finished)
            try:
                os.rename(finished, folder)  # complete or not at all, even if another run writes it at the same time
            except OSError:
                if not folder.is_dir():
                    raise
    return AutoTokenizer.from_pretrained(folder)


def train_bpe(documents: Dataset | IterableDataset, text_column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that every text can be encoded
    )
    length = min(len(documents), TOKENIZER_DOCUMENTS) if isinstance(documents, Dataset) else None
    texts = (row[text_column] or "" for row in islice(documents, TOKENIZER_DOCUMENTS))
    bpe.train_from_iterator(texts, trainer, length=length)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


# ---- Tokenize and pack ----


def packed(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, data: DatasetArguments, name: str
) -> Dataset | IterableDataset:
    """Makes blocks of exactly `sequence_length` tokens out of documents that are joined by the end-of-text token.

    A block can span documents, and attention goes across them, as in the pretraining of GPT-2 and of the paper.
    """
    streamed = isinstance(documents, IterableDataset)
    columns = list(next(iter(documents)))
    described = {} if streamed else {"desc": f"Tokenizing the {name} text", "num_proc": data.num_proc}
    tokens = documents.map(
        tokenizing(tokenizer, data.text_column),
        batched=True,
        remove_columns=columns,
        **described,
    )
    blocks = tokens.map(
        packing(data.sequence_length),
        batched=True,
        batch_size=PACKED_TOGETHER,
        remove_columns=["input_ids"] if streamed else None,
        # In one process, so that the groups, and with them the blocks, do not depend on num_proc.
        **({} if streamed else {"desc": f"Packing the {name} text"}),
    )
    if next(iter(blocks), None) is None:
        raise ValueError(
            f"The {name} text of dataset={data.dataset!r} is shorter than one sequence: lower "
            f"sequence_length={data.sequence_length} or give more text."
        )
    return blocks


# `datasets` finds its cached result by a hash of the function. For a function of a module this is a hash of its name,
# so that an edit of the function would go unnoticed. For a function that another function made it is a hash of the
# code, which is why the next two functions make functions.


def tokenizing(tokenizer: PreTrainedTokenizerBase, text_column: str) -> Batched:
    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [text for text in batch[text_column] if text]
        if not texts:
            return {"input_ids": []}
        # verbose=False: a document longer than the model is no mistake here, it will be cut into blocks.
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    return tokenize


def packing(sequence_length: int) -> Batched:
    def pack(batch: dict[str, list]) -> dict[str, list]:
        """Joins the batch's documents and cuts full blocks; what is left behind the last one is dropped."""
        joined = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(joined) - sequence_length + 1, sequence_length)
        blocks = [joined[start : start + sequence_length] for start in starts]
        # The model shifts the labels itself.
        return {"input_ids": blocks, "labels": [block.copy() for block in blocks]}

    return pack


def for_validation(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, data: DatasetArguments
) -> Dataset | IterableDataset:
    return limited(packed(documents, tokenizer, data, "validation"), data)


def limited(rows: Dataset | IterableDataset, data: DatasetArguments) -> Dataset | IterableDataset:
    """`validation_blocks` of the rows: of a stream the first, else drawn from all documents with a fixed seed."""
    if data.validation_blocks is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(data.validation_blocks)
    return rows.shuffle(seed=0).select(range(min(data.validation_blocks, len(rows))))


def check_sequence_length(data: DatasetArguments, config: PretrainedConfig) -> None:
    longest = getattr(config, "max_position_embeddings", None)  # GPT-2's n_positions answers to this name too
    if longest is not None and data.sequence_length > longest:
        raise ValueError(
            f"sequence_length={data.sequence_length} is above this model's maximum of {longest} positions: lower it."
        )


def check_streaming(data: DatasetArguments, max_steps: int) -> None:
    if data.streaming and max_steps <= 0:
        raise ValueError(
            "streaming=True needs max_steps, since the length of a stream is not known and epochs cannot be counted."
        )
