"""The metrics of the recipes agree with plain formulas, and none of them needs the network."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import evaluation
import metrics

ROOT = Path(__file__).parents[2]


def test_perplexity_is_a_mean_over_tokens_and_not_over_rows() -> None:
    metric = metrics.load("perplexity")
    metric.add_batch(nll=[3.0, 1.0], tokens=[1, 9])
    metric.add_batch(nll=[6.0], tokens=[10])
    assert metric.compute() == {"perplexity": pytest.approx(math.exp(10 / 20))}


def test_perplexity_beyond_a_float_is_infinite_and_without_tokens_refused() -> None:
    assert metrics.load("perplexity").compute(nll=[1e6], tokens=[1]) == {"perplexity": math.inf}
    with pytest.raises(ValueError, match="tokens sums to 0"):
        metrics.load("perplexity").compute(nll=[0.0], tokens=[0])


def test_next_token_accuracy_ignores_masked_positions() -> None:
    metric = metrics.load("next_token_accuracy")
    metric.add_batch(predictions=[[1, 2, 3], [4, -100, 6]], references=[[1, -100, 9], [4, -100, -100]])
    metric.add_batch(predictions=[[7, 7]], references=[[7, 8]])  # another length: batches need not agree
    assert metric.compute() == {"next_token_accuracy": 3 / 5}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [([[1, 2]], [[1]], "align them"), ([[1]], [[-100]], "at least one unmasked token")],
)
def test_next_token_accuracy_refuses_rows_it_cannot_count(predictions: list, references: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.load("next_token_accuracy").compute(predictions=predictions, references=references)


def macro_f1(predictions: list[int], references: list[int]) -> float:
    scores = []
    for label in sorted({*predictions, *references}):
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(guess == truth == label for guess, truth in pairs)
        wrong = sum((guess == label) != (truth == label) for guess, truth in pairs)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores)


def test_accuracy_and_macro_f1() -> None:
    predictions, references = [0, 0, 1, 2, 2, 2, 0], [0, 1, 1, 2, 0, 2, 3]  # class 3 is never predicted
    assert metrics.load("accuracy").compute(predictions=predictions, references=references) == {"accuracy": 4 / 7}
    assert metrics.load("f1").compute(predictions=predictions, references=references) == {
        "f1": pytest.approx(macro_f1(predictions, references))
    }
    # binary, GLUE's for mrpc: 1 hit, 1 false alarm, 1 miss
    assert metrics.load("f1").compute(predictions=[1, 1, 0], references=[1, 0, 1], average="binary") == {"f1": 0.5}


def test_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'acuracy' is none.*accuracy, f1, next_token_accuracy, perplexity"):
        metrics.load("acuracy")


def by_hand(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Perplexity and accuracy, one position after the other."""
    losses, hits = [], []
    for row, truth in zip(logits.double(), labels, strict=True):
        for position in range(len(truth) - 1):
            target = truth[position + 1].item()
            if target != -100:
                losses.append(-math.log(row[position].softmax(0)[target].item()))
                hits.append(row[position].argmax().item() == target)
    return math.exp(sum(losses) / len(losses)), sum(hits) / len(hits)


def test_language_model_metrics_over_uneven_batches_agree_with_a_loop() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 7, 11)  # (B, T, V)
    labels = torch.where(torch.rand(5, 7) < 0.4, logits.argmax(-1).roll(1, dims=1), torch.randint(11, (5, 7)))
    labels[0, 3:], labels[2, :4] = -100, -100
    running = evaluation.LanguageModelMetrics()
    for start, stop, last in ((0, 3, False), (3, 5, True)):
        reduced = evaluation.reduce_language_model(logits[start:stop], labels[start:stop])
        found = running(EvalPrediction(reduced, labels[start:stop]), compute_result=last)
        assert bool(found) == last
    perplexity, accuracy = by_hand(logits, labels)
    assert found["perplexity"] == pytest.approx(perplexity)
    assert found["next_token_accuracy"] == pytest.approx(accuracy)
    assert 0.2 < accuracy < 0.8  # or the shift would not be seen


def test_a_second_evaluation_starts_afresh() -> None:
    running = evaluation.ClassificationMetrics()
    for guess, accuracy in ((1, 1.0), (0, 0.0)):
        logits = torch.nn.functional.one_hot(torch.tensor([guess, guess]), 3).float()  # (B, classes)
        reduced = evaluation.reduce_classification(logits, torch.ones(2))
        found = running(EvalPrediction(reduced, torch.tensor([1, 1])), compute_result=True)
        assert found == {"accuracy": accuracy, "f1": accuracy}


OFFLINE = """
import socket, sys
sys.path.insert(0, "recipes")
def refuse(*args, **kwargs): raise SystemExit("the metric asked the network")
socket.getaddrinfo = socket.socket.connect = refuse
import metrics
metric = metrics.load("accuracy")
metric.add_batch(predictions=[0, 1], references=[1, 1])
assert metric.compute() == {"accuracy": 0.5}
"""


def test_processes_load_side_by_side_into_an_empty_cache_without_a_network(tmp_path: Path) -> None:
    import os

    # The libraries are not told that they are offline, and must not try the network all the same.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    processes = [
        subprocess.Popen([sys.executable, "-c", OFFLINE], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
