"""The share of tokens that the most probable prediction hits; masked positions do not count."""

import datasets
import evaluate
import numpy as np

MASKED = -100  # what the losses of torch and transformers ignore

DESCRIPTION = "Share of the unmasked tokens that were predicted exactly."
INPUTS = """
Args:
    predictions: one list of token ids per row, already aligned: predictions[i] is the guess for references[i].
    references: one list of token ids per row, of the same length; -100 marks a position that does not count.
Returns:
    next_token_accuracy: hits / unmasked positions, over all rows together.
"""


class NextTokenAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        hits = counted = 0
        for row, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
            if len(guess) != len(truth):
                raise ValueError(f"Row {row} has {len(guess)} predictions for {len(truth)} references: align them.")
            masked = np.equal(truth, MASKED)
            counted += int(np.sum(~masked))
            hits += int(np.sum(np.equal(guess, truth) & ~masked))
        if counted == 0:
            raise ValueError(f"Every reference is {MASKED}: next_token_accuracy needs at least one unmasked token.")
        return {"next_token_accuracy": hits / counted}
