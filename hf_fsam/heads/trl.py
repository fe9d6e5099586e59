"""The boundary inside of TRL's fused head, which goes from hidden states to log-probabilities and makes no logits.

Read in TRL 1.16: `trl.trainer.utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature,
chunk_size, final_logit_softcapping, logit_scale, outputs)` returns the log-probability of each token's target, its
entropy and three statistics without a gradient; it saves log Σ exp z as its fifth tensor.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fsam.cleanup import Cleanup
from hf_fsam.heads.fused_head import SAME_FUNCTION, edge, replayed_statistic
from hf_fsam.heads.fused_loss import FusedLoss, LogitTransform, compute_dtype

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_checked: list[bool] = []


def has_unknown_fused_head(trainer_class: type) -> bool:
    """A trainer of TRL's that makes its loss in a fused head, which is not the one known here."""
    modules = [sys.modules.get(each.__module__) for each in trainer_class.__mro__ if each.__module__.startswith("trl.")]
    fused = any(hasattr(module, "add_fused_lm_head") for module in modules)
    return fused and not hasattr(sys.modules.get(_MODULE), _NAME)


@dataclass
class LogProbabilities:
    """One call of TRL's fused head.

    Attributes:
        apply: TRL's own function, of hidden (n, d), weight (v, d), bias (v,) or None, and `rest`.
        rest: targets (n,), temperature, chunk_size, final_logit_softcapping, logit_scale, outputs.
    """

    apply: Callable[..., tuple]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: tuple

    def made(self) -> tuple:
        return self.apply(self.hidden, self.weight, self.bias, *self.rest)

    def statistic(self, weight: Tensor, bias: Tensor | None) -> tuple[FusedLoss, tuple]:
        """What it takes to have the cotangents of the log-probabilities again, and TRL's own result.

        weight, bias: as they are now, for later.
        """
        targets, temperature, _, cap, scale, _ = self.rest
        result = self.made()
        transform = (
            LogitTransform(scale / temperature)
            if cap is None
            else LogitTransform(scale / cap, cap / temperature, tanh=True)
        )
        statistic = FusedLoss(
            self.hidden.detach(), weight, bias, compute_dtype(self.hidden), transform, targets=targets
        )
        statistic.value = result[0].detach()
        statistic.others = tuple(None if each is None else each.detach() for each in result[1:])
        statistic.log_sum = result[0].grad_fn.saved_tensors[4]
        _check_log_sum(statistic)
        if self.hidden.requires_grad:

            def see_gradient(to_hidden: Tensor) -> None:
                wide = to_hidden.to(statistic.wide).flatten()
                statistic.grad_dot_logits = torch.dot(wide, statistic.hidden.flatten().to(statistic.wide))

            self.hidden.register_hook(see_gradient)
        if result[1] is not None:
            result[1].register_hook(_refuse_entropy)
        return statistic, result

    def replayed(
        self,
        statistic: FusedLoss,
        see_products: Callable[[Tensor | None, Tensor], None],
        ratio: Callable[[], Tensor | float],
    ) -> tuple:
        """The result of the clean pass, differentiated at these weights with what came back to it."""
        if self.hidden.shape != statistic.hidden.shape:
            raise RuntimeError(
                f"the second pass took log-probabilities of {len(self.hidden)} tokens where the first had "
                f"{len(statistic.hidden)}: {SAME_FUNCTION}"
            )
        values = self.weight.detach(), None if self.bias is None else self.bias.detach()
        edges = edge(self.weight), edge(self.bias)
        return _Replayed.apply(self.hidden, *edges, statistic, values, see_products, ratio), *statistic.others


class _Replayed(torch.autograd.Function):
    """Log-probabilities of the clean pass, with the Jacobian of this one. What comes back to them is dropped.

    All is computed in the forward pass, where an engine that shards the weights has the head gathered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        statistic: FusedLoss,
        values: tuple[Tensor, Tensor | None],
        see_products: Callable[[Tensor | None, Tensor], None],
        ratio: Callable[[], Tensor | float],
    ) -> Tensor:
        ctx.ratio = ratio
        # Of log p = z[target] − log Σ exp z the gradient is minus the cross entropy's.
        assert statistic.upstream is not None
        statistic.upstream = -statistic.upstream
        ctx.gradients = replayed_statistic(statistic, hidden, *values, ctx.needs_input_grad[1:3], see_products)
        return statistic.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.times_(ctx.ratio()), None, None, None, None)


class Counters:
    """What TRL's trainers count and collect of a batch in `compute_loss`, as it stands when this is made: numbers, and
    lists in dictionaries, which only grow there (TRL 1.16)."""

    _NAMES = ("_metrics", "_stored_metrics", "_total_train_tokens")

    def __init__(self, trainer: Any) -> None:
        of_trl = any(base.__module__.partition(".")[0] == "trl" for base in type(trainer).__mro__)
        self._attributes = trainer.__dict__
        self._stood = {
            name: _mark(self._attributes[name]) for name in self._NAMES if of_trl and name in trainer.__dict__
        }

    def restore(self) -> None:
        self._attributes.update({name: _back_to(mark) for name, mark in self._stood.items()})


def _mark(counted: Any) -> tuple[Any, Any]:
    """What it is, and how it stands. Lists are long: their length is enough."""
    if isinstance(counted, dict):
        return counted, {key: _mark(value) for key, value in counted.items()}
    if isinstance(counted, list):
        return counted, len(counted)
    return counted.clone() if isinstance(counted, Tensor) else counted, None


def _back_to(mark: tuple[Any, Any]) -> Any:
    counted, stood = mark
    if isinstance(counted, dict):
        for key in counted.keys() - stood.keys():
            del counted[key]
        counted.update({key: _back_to(value) for key, value in stood.items()})
    elif isinstance(counted, list):
        del counted[stood:]
    return counted


@dataclass
class _Intercepted:
    """Stands in the place of TRL's function."""

    function: Any
    call: Callable[[LogProbabilities], tuple]

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple:
        if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
            return self.function.apply(hidden, weight, bias, *rest)
        return self.call(LogProbabilities(self.function.apply, hidden, weight, bias, rest))


@contextmanager
def intercepted(call: Callable[[LogProbabilities], tuple], cleanup: Cleanup) -> Iterator[None]:
    """Inside, a fused head of TRL's that has a gradient to compute goes through `call`."""
    utils: Any = sys.modules.get(_MODULE)
    function: Any = getattr(utils, _NAME, None)
    if function is None:
        yield
        return

    with cleanup.replaced(utils, _NAME, _Intercepted(function, call)):
        yield


@torch.no_grad()
def _check_log_sum(statistic: FusedLoss) -> None:
    """Once a process: what was read in one version of TRL may stand elsewhere in another, and gradients be wrong."""
    if _checked or not len(statistic.hidden):
        return
    logits = statistic.transform.apply_(statistic.product(statistic.hidden[:1]))
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
