"""F1 over classes, macro-averaged: a rare class weighs as much as a frequent one."""

import datasets
import evaluate
from sklearn.metrics import f1_score

DESCRIPTION = "Mean over the classes of the harmonic mean of precision and recall."
INPUTS = """
Args:
    predictions: one class index per example.
    references: one class index per example.
    average: how scikit-learn's f1_score averages the classes, `macro` unless told; `binary` is GLUE's for mrpc and qqp.
Returns:
    f1: a class that is neither predicted nor true is left out, one with no hit counts 0.
"""


class F1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int], average: str = "macro") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
