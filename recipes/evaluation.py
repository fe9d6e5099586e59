"""The metrics of an evaluation, computed batch by batch, so that no logits are kept longer than their batch."""

from typing import Any

import metrics
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction, TrainingArguments


def evaluate_by_batch(args: TrainingArguments) -> TrainingArguments:
    """Makes the Trainer hand over the predictions of each batch instead of collecting those of the whole data set."""
    args.batch_eval_metrics = True
    return args


def reduce_language_model(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The Trainer's `preprocess_logits_for_metrics`: turns logits (B, T, V) into guesses (B, T-1) and losses (B,)."""
    logits = logits[0] if isinstance(logits, tuple) else logits  # (B, T, V)
    guesses = logits[:, :-1].argmax(dim=-1)
    # Row by row, so that no more than one sequence of logits, (T, V), is copied to fp32 at a time.
    nll = [
        F.cross_entropy(row[:-1].float(), truth[1:], ignore_index=-100, reduction="sum")
        for row, truth in zip(logits, labels, strict=True)
    ]
    return guesses, torch.stack(nll)


class LanguageModelMetrics:
    """The Trainer's `compute_metrics`: perplexity and next-token accuracy."""

    def __init__(self) -> None:
        self.perplexity = metrics.load("perplexity")
        self.accuracy = metrics.load("next_token_accuracy")

    def __call__(self, batch: EvalPrediction, compute_result: bool) -> dict[str, Any]:
        guesses, nll = batch.predictions  # (B, T-1), (B,)
        truth = batch.label_ids[:, 1:]  # (B, T-1)
        self.perplexity.add_batch(nll=nll.tolist(), tokens=(truth != -100).sum(dim=1).tolist())
        self.accuracy.add_batch(predictions=guesses.tolist(), references=truth.tolist())
        return {**self.perplexity.compute(), **self.accuracy.compute()} if compute_result else {}


def reduce_classification(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits  # (B, classes)
    return logits.argmax(dim=-1)


class ClassificationMetrics:
    """The Trainer's `compute_metrics`: accuracy and macro F1."""

    def __init__(self) -> None:
        self.metrics = [metrics.load("accuracy"), metrics.load("f1")]

    def __call__(self, batch: EvalPrediction, compute_result: bool) -> dict[str, Any]:
        for metric in self.metrics:
            metric.add_batch(predictions=batch.predictions.tolist(), references=batch.label_ids.tolist())
        return (
            {name: value for metric in self.metrics for name, value in metric.compute().items()}
            if compute_result
            else {}
        )
