"""The boundary inside of TRL's fused head, which goes from hidden states to log-probabilities and makes no logits.

Read in TRL 1.16: `trl.trainer.utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature,
chunk_size, final_logit_softcapping, logit_scale, outputs)` returns the log-probability of each token's target, its
entropy and three statistics without a gradient; it saves log Σ exp z as its fifth tensor.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_fsam.head import Edge, Replayed, Squash, Statistic, compute_dtype

_NAME = "_ChunkedLogProbFunction"
_checked: list[bool] = []


@contextmanager
def fused_head_of_trl(call: Callable[..., tuple]) -> Iterator[None]:
    """Inside, a fused head of TRL's that has a gradient to compute goes through `call(apply, *arguments)`."""
    utils: Any = sys.modules.get("trl.trainer.utils")
    function: Any = getattr(utils, _NAME, None)
    if function is None:
        yield
        return

    class Intercepted:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple:
            needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
            return call(function.apply, hidden, weight, *rest) if needed else function.apply(hidden, weight, *rest)

    setattr(utils, _NAME, Intercepted)
    try:
        yield
    finally:
        setattr(utils, _NAME, function)


def log_probabilities(
    apply: Callable[..., tuple],
    weights: tuple[Tensor, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    cap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> tuple[Statistic, tuple]:
    """TRL's own result, and what it takes to have the cotangents of its log-probabilities again.

    weights: W and b as they are now, for later.
    """
    result = apply(hidden, weight, bias, targets, temperature, chunk_size, cap, scale, outputs)
    squash = Squash(scale / temperature) if cap is None else Squash(scale / cap, cap / temperature, tanh=True)
    statistic = Statistic(hidden.detach(), *weights, compute_dtype(hidden), squash, targets)
    statistic.value, statistic.others = result[0].detach(), tuple(None if x is None else x.detach() for x in result[1:])
    statistic.log_sum = result[0].grad_fn.saved_tensors[4]
    _check_log_sum(statistic)
    if hidden.requires_grad:
        hidden.register_hook(statistic.see_gradient)
    if result[1] is not None:
        result[1].register_hook(_refuse_entropy)
    return statistic, result


def replayed_log_probabilities(
    statistic: Statistic, upstream: Tensor, replay: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple:
    """The result of the clean pass, differentiated at these weights with the cotangent of that pass."""
    if hidden.shape != statistic.hidden.shape:
        raise RuntimeError(
            f"the second pass took log-probabilities of {len(hidden)} tokens where the first had "
            f"{len(statistic.hidden)}: both must compute the same function."
        )
    # Of log p = z[target] − log Σ exp z the gradient is minus the cross entropy's.
    now = weight.detach(), None if bias is None else bias.detach()
    edges = Edge.apply(weight), None if bias is None else Edge.apply(bias)
    return (Replayed.apply(hidden, *edges, statistic, -upstream, replay, now), *statistic.others)


@torch.no_grad()
def _check_log_sum(statistic: Statistic) -> None:
    """Once a process: what was read in one version of TRL may stand elsewhere in another, and gradients be wrong."""
    if _checked or not len(statistic.hidden):
        return
    logits = statistic.squash.apply_(statistic.product(statistic.hidden[:1]))
    found = statistic.log_sum.flatten()[:1]
    if statistic.log_sum.shape != statistic.hidden.shape[:1] or not torch.allclose(
        logits.logsumexp(-1), found.to(logits.dtype), rtol=1e-2, atol=1e-2
    ):
        raise ValueError(
            "TRL's fused head keeps something else than log Σ exp z where that of TRL 1.16 does: install trl==1.16.*, "
            "or set fsam_variant='none'."
        )
    _checked.append(True)


def _refuse_entropy(gradient: Tensor | None) -> None:
    if gradient is None:
        return
    raise ValueError(
        "the loss depends on the entropy of TRL's fused head, whose cotangent hf_fsam does not keep: leave the entropy "
        "out of the loss, or set fsam_variant='none'."
    )
