"""A loss that wrong labels pull at less than at cross entropy."""

import torch.nn.functional as F
from torch import Tensor


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q of each example, p the probability of the label: arXiv 1805.07836, equation 6.

    Args:
        logits: (B, classes).
        labels: (B,).
    """
    log_p = F.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None])
    return (1 - (q * log_p[:, 0]).exp()) / q
