"""Perplexity from negative log-likelihoods that the caller has summed: no logits are kept, no model is loaded."""

import math

import datasets
import evaluate

DESCRIPTION = "exp of the mean negative log-likelihood of a token, in nats; the mean is over all tokens, not over rows."
INPUTS = """
Args:
    nll: one number per row (sequence or batch): the sum of the negative log-likelihoods of its tokens, in nats.
    tokens: one number per row: how many tokens that sum runs over.
Returns:
    perplexity: exp(sum of nll / sum of tokens), inf where that is beyond a float.
"""


class Perplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        total = sum(tokens)
        if total == 0:
            raise ValueError("tokens sums to 0: perplexity needs at least one token that is not masked.")
        try:
            return {"perplexity": math.exp(math.fsum(nll) / total)}
        except OverflowError:
            return {"perplexity": math.inf}
