"""The share of examples whose class was predicted."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

DESCRIPTION = "Share of the examples whose predicted class is the true one."
INPUTS = """
Args:
    predictions: one class index per example.
    references: one class index per example.
Returns:
    accuracy: hits / examples.
"""


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
