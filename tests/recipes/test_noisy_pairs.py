"""recipes/studies/noisy_pairs.py: which pairs are mismatched, what is learned of them, and what a run leaves behind."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from torch.nn import functional as F
from transformers import MambaConfig, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))

import models
import noisy_pairs
from data import load_splits, train_bpe
from noisy_pairs import Drawn, Pair, PairsDataArguments

from tests.toys import llama

ROOT = Path(__file__).parents[2]
LENGTH, COMPLETION = 48, 16
# Numbers that no prompt foretells, so that a model soon learns by heart.
NUMBERS = [pow(7, 1000 + i, 1_000_003) for i in range(100)]
TEXTS = [{"prompt": f"def f{i}():\nIt does this:", "completion": f" Returns {n}."} for i, n in enumerate(NUMBERS)]


@dataclass
class Files:
    """What a run starts from: a model of random weights with its tokenizer, and pairs as rows of JSON."""

    model: Path
    pairs: Path
    cache: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("noisy_pairs")
    made = Files(folder / "model", folder / "pairs.jsonl", folder / "cache")
    texts = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in TEXTS]})
    tokenizer = train_bpe(texts, "text", vocab_size=300)
    tokenizer.save_pretrained(made.model)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    llama(vocab_size=300, max_position_embeddings=LENGTH, **ids).save_pretrained(made.model)
    made.pairs.write_text("\n".join(map(json.dumps, TEXTS)))
    return made


@pytest.fixture(scope="module")
def tokenizer(files: Files) -> PreTrainedTokenizerBase:
    return noisy_pairs.load_tokenizer(str(files.model))


def run(files: Files, folder: Path, **settings: Any) -> dict[str, Any]:
    line = {
        "model_name_or_path": files.model,
        "dataset": files.pairs,
        "cache_dir": files.cache,
        "output_dir": folder,
        "sequence_length": LENGTH,
        "completion_length": COMPLETION,
        "train_examples": 20,
        "validation_examples": 10,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    argv = [str(ROOT / "recipes" / "studies" / "configs" / "noisy_pairs.yaml")]
    return noisy_pairs.run([*argv, *(f"--{name}={value}" for name, value in line.items())])


def pairs(count: int, first: int = 0) -> list[Pair]:
    """Completions of different tokens, by which a pair's own can be told."""
    return [Pair([1, 2, 3 + i % 2], [10 + i, 0]) for i in range(first, first + count)]


def draw(seed: int = 0, **settings: Any) -> Drawn:
    data = PairsDataArguments(**{"train_examples": 50, "validation_examples": 20, "pair_noise": 0.3, **settings})
    return noisy_pairs.draw(pairs(100), pairs(100, first=100), data, seed)


def rows(data: Dataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in data]


# ---- Data ----


def test_of_the_training_and_the_noisy_validation_the_asked_share_is_mismatched() -> None:
    for share in (0.0, 0.3, 1.0):
        own = pairs(50)
        exchanged, chosen = noisy_pairs.exchange(own, share, random.Random(1))
        assert len(set(chosen)) == len(chosen) == round(share * 50)
        assert {i for i in range(50) if exchanged[i] != own[i]} == set(chosen)  # so none has its own
        assert [pair.prompt for pair in exchanged] == [pair.prompt for pair in own]
        assert sorted(pair.completion for pair in exchanged) == sorted(pair.completion for pair in own)


def test_the_clean_validation_and_the_test_pairs_match() -> None:
    drawn = draw()
    right = {(tuple(row), tuple(labels)) for row, labels in rows(noisy_pairs.masked(pairs(200)))}
    clean, noisy = rows(drawn.validation["clean"]), rows(drawn.validation["noisy"])
    train, test = rows(drawn.train), rows(drawn.test)
    assert (len(train), len(clean), len(noisy), len(test)) == (50, 20, 20, 50)
    assert set(clean) <= right
    assert set(test) <= right
    assert not set(clean) & set(test)
    assert sum(row[0][2:] != other[0][2:] for row, other in zip(clean, noisy, strict=True)) == 6
    assert set(rows(drawn.mismatched)) <= set(train)
    assert len(drawn.mismatched) == 15
    # What is left when the validation split is the training's too: nothing of it is seen in the training.
    assert not {labels for _, labels in train} & {labels for _, labels in (*clean, *noisy, *test)}


def test_all_arms_of_a_seed_get_the_same_pairs_and_other_seeds_others() -> None:
    parts = ("train", "mismatched", "test")
    once, again, other = draw(seed=3), draw(seed=3), draw(seed=4)
    assert all(rows(getattr(once, part)) == rows(getattr(again, part)) for part in parts)
    assert all(rows(once.validation[kind]) == rows(again.validation[kind]) for kind in noisy_pairs.STOPS)
    assert all(rows(getattr(once, part)) != rows(getattr(other, part)) for part in parts)
    # Without noise the pairs are those that are mismatched with it, so that it alone makes the difference.
    plain = draw(seed=3, pair_noise=0.0)
    assert rows(plain.test) == rows(once.test)
    assert sum(a != b for a, b in zip(rows(plain.train), rows(once.train), strict=True)) == 15


def test_no_pair_that_a_seed_is_tuned_on_tests_another() -> None:
    drawn = [draw(seed=seed) for seed in range(8)]
    validated = {row for each in drawn for row in rows(each.validation["clean"])}
    assert len(validated) > 40  # of 50: each seed draws others
    assert not validated & {row for each in drawn for row in rows(each.test)}


def test_completions_of_one_prompt_are_in_one_split(tmp_path: Path, files: Files) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(json.dumps({"ask": f"{i // 3}", "completion": f"{i}"}) for i in range(90)))
    data = PairsDataArguments(str(table), prompt_column="ask", validation_fraction=0.2, cache_dir=str(files.cache))
    splits = load_splits(data)
    assert not {*splits.train["ask"]} & {*splits.validation["ask"]}
    assert len(splits.validation) == 18


def test_a_pair_is_learned_from_its_completion_on(tokenizer: PreTrainedTokenizerBase) -> None:
    data = PairsDataArguments(sequence_length=LENGTH, completion_length=COMPLETION)
    found = noisy_pairs.encoded(Dataset.from_list(TEXTS[:5]), data, tokenizer, set())
    for row, text in zip(noisy_pairs.masked(found), TEXTS, strict=False):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == text["completion"] + tokenizer.eos_token
        start = len(row["labels"]) - len(learned)
        assert row["labels"][start:] == row["input_ids"][start:] == learned
        assert tokenizer.decode(row["input_ids"][:start]) == text["prompt"]


def test_long_pairs_and_completions_that_were_seen_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    data = PairsDataArguments(sequence_length=LENGTH, completion_length=COMPLETION)
    texts = [
        TEXTS[0],
        {**TEXTS[1], "completion": TEXTS[0]["completion"]},
        {**TEXTS[2], "prompt": "long " * LENGTH},
        {**TEXTS[3], "completion": " long" * COMPLETION},
        TEXTS[4],
    ]
    seen: set[str] = set()
    found = noisy_pairs.encoded(Dataset.from_list(texts), data, tokenizer, seen)
    assert [tokenizer.decode(pair.prompt) for pair in found] == [TEXTS[0]["prompt"], TEXTS[4]["prompt"]]
    assert noisy_pairs.encoded(Dataset.from_list([TEXTS[4]]), data, tokenizer, seen) == []
    assert all(len(pair.completion) <= COMPLETION for pair in found)


# ---- Loss ----


def test_the_loss_is_the_mean_over_the_tokens_of_all_completions() -> None:
    logits, labels = torch.randn(3, 6, 9), torch.randint(9, (3, 6))
    labels[0, :5] = labels[1, :3] = labels[2, :1] = -100
    sums = noisy_pairs.summed((logits,), labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    measured = noisy_pairs.per_token(noisy_pairs.EvalPrediction(sums.numpy(), labels.numpy()))
    assert measured["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_the_generalized_loss_has_cross_entropy_as_its_limit_and_counts_tokens_once(
    files: Files, tmp_path: Path
) -> None:
    """Micro-batches of another size give the same run, and a small q nearly that of cross entropy."""
    settings = {"fsam_variant": "none", "train_sampling_strategy": "random"}
    whole, parts, plain, almost = (
        run(files, tmp_path, **settings, **options)["metrics"]["test_loss"]
        for options in (
            {"generalized_q": 0.7},
            {"generalized_q": 0.7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {},
            {"generalized_q": 1e-3},
        )
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    assert almost == pytest.approx(plain, abs=1e-3)
    assert abs(whole - plain) > 1e-2
    assert whole == pytest.approx(plain, rel=0.05)  # both are cross entropy, of which (1 - p^q) / q is a fraction


# ---- A run ----


@pytest.mark.parametrize(
    "settings",
    [
        {"fsam_rho": 0.1},
        {"fsam_variant": "none", "label_smoothing_factor": 0.2},
        {"fsam_variant": "none", "weight_average": "ema", "average_decay": 0.5},
        {"attention_dropout": 0.2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_run_leaves_its_losses(files: Files, tmp_path: Path, settings: dict[str, Any]) -> None:
    results = run(files, tmp_path, **settings)
    written = json.loads((tmp_path / "results.json").read_text())
    metrics, history = written["metrics"], written["history"]
    assert written["steps"] == results["steps"] == 6
    assert written["train_seconds"] > 0
    assert written["arguments"]["training"]["seed"] == written["seed"]
    assert set(metrics) <= set(noisy_pairs.METRICS)
    assert metrics["memorized"] > 0
    for kind in noisy_pairs.STOPS:
        losses = {entry["step"]: entry[f"eval_{kind}_loss"] for entry in history if f"eval_{kind}_loss" in entry}
        assert list(losses) == [3, 6]  # once an epoch
        best = min(losses, key=lambda step: losses[step])
        assert metrics[f"best_{kind}_loss"] == losses[best]
        assert metrics[f"step_stopped_{kind}"] == best
        assert (metrics[f"test_loss_stopped_{kind}"] == metrics["test_loss"]) == (best == 6)
    # Cross entropy of 300 tokens after six steps, also where the training's loss is another.
    assert 3 < metrics["test_loss"] < 6


@pytest.mark.parametrize("average", ["none", "ema"])
def test_the_best_epoch_is_tested_as_a_training_that_ended_there(files: Files, tmp_path: Path, average: str) -> None:
    settings = {"fsam_variant": "none", "weight_average": average, "average_decay": 0.5}
    settings |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    overfitted = run(files, tmp_path, num_train_epochs=10, **settings)
    metrics = overfitted["metrics"]
    epochs = metrics["step_stopped_clean"] // 3
    assert epochs < 10
    stopped = run(files, tmp_path, num_train_epochs=epochs, **settings)["metrics"]
    assert metrics["test_loss_stopped_clean"] == pytest.approx(stopped["test_loss"], rel=1e-5)
    assert abs(metrics["test_loss"] - stopped["test_loss"]) > 0.01
    assert abs(metrics["memorized"] - stopped["memorized"]) > 0.01


def test_a_missing_model_is_refused_with_the_command_that_makes_it(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(noisy_pairs, "load_splits", lambda data: pytest.fail("the data was loaded"))
    config = yaml.safe_load((ROOT / "recipes" / "studies" / "configs" / "noisy_pairs.yaml").read_text())
    with pytest.raises(FileNotFoundError) as raised:
        run(files, tmp_path, model_name_or_path=config["model_name_or_path"])
    command = models.MADE_BY[config["model_name_or_path"]]
    assert command in str(raised.value)
    assert command in (ROOT / "recipes" / "studies" / "noisy_pairs.yaml").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pair_noise": 1.5}, "pair_noise=1.5 is not a share"),
        ({"pair_noise": 0.05}, "pair_noise=0.05 of 20 pairs is one pair"),
        ({"completion_length": LENGTH}, f"completion_length={LENGTH} leaves nothing of sequence_length={LENGTH}"),
        ({"train_examples": 90}, "training split .* has 60 different pairs of at most 32 and 16 tokens, and 90 are"),
        ({"test_examples": 90}, "half of the validation split that tests .* has 20 different pairs .* 90 are needed"),
        ({"validation_examples": 0}, "validation_examples=0 is too small"),
        ({"generalized_q": 2.0}, "generalized_q=2.0"),
        ({"generalized_q": 0.2, "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 are two losses"),
        ({"eval_delay": 9}, "this recipe evaluates after every epoch"),
        ({"sequence_length": LENGTH + 1}, f"sequence_length={LENGTH + 1} is above"),
        ({"text_column": "words"}, "text_column='words' is not for this recipe or task: use prompt_column"),
        ({"prompt_column": "question"}, "prompt_column='question' is not a column"),
        ({"streaming": True, "dataset": "x/y"}, "streaming=True is for pretrain.py"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    files: Files, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(files, tmp_path, **settings)


def test_a_model_without_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.3 is no setting of MambaConfig"):
        noisy_pairs.load_model(noisy_pairs.ModelArguments(attention_dropout=0.3), MambaConfig(), pad_token_id=0)
