"""A language model's head whose logits are deferred, and its calls in either pass.

In the backward pass a cross entropy leaves its share of the gradient with the call of the head, and sends the logits a
zero that takes no memory. What was done with their values sends their cotangent, as in any graph. The node that stands
for the head (:mod:`~hf_fsam.heads.deferred_logits`) hands on the sum of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from hf_fsam.graph import autograd_nodes, parents
from hf_fsam.heads.deferred_logits import (
    DeferredLogits,
    HeadCall,
    HeadNode,
    LogitsNeeded,
    call_head,
    refuse_create_graph,
)
from hf_fsam.heads.fused_loss import (
    FusedLoss,
    Gradients,
    cross_entropy_sum,
    dense_vjp,
    dot,
    log_sum_exp,
    replay,
    vjp,
)
from hf_fsam.passes import SAME_FUNCTION, CleanPass, Crossing, Pass, SecondPass

logger = logging.get_logger(__name__)


class FusedHead:
    """The head of a language model, a linear layer, for as long as its logits are deferred
    (a :class:`~hf_fsam.passes.Fused`).

    Attributes:
        off: a loss needed the logits, and the head makes them from the next step on.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.off = False

    def plain(self, hidden: Tensor) -> Tensor:
        return type(self.module).forward(self.module, hidden)

    def record(self, clean: CleanPass, crossing: Crossing, hidden: Tensor) -> Tensor:
        hidden = clean.from_here(hidden)
        call = CleanCall(self, hidden, crossing, clean)
        if clean.stops_at_boundary:
            return call_head(call, hidden, None, None)
        z = call_head(call, hidden, self.module.weight, self.module.bias)
        clean.nodes.add(z.grad_fn)
        return z

    def replay(self, second: SecondPass, crossing: Crossing, hidden: Tensor) -> Tensor:
        call = SecondCall(self, hidden, crossing, second)
        return call_head(call, hidden, self.module.weight, self.module.bias)

    def turn_off(self, why: str) -> None:
        if not self.off:
            self.off = True
            logger.warning(
                f"The fused head is off from the next step on, and the logits are in memory: {why}. Nothing is wrong; "
                "fsam_fused_head=False leaves this line out."
            )


@dataclass
class DeferringForward:
    """Stands in the place of the module's `forward` while a pass runs."""

    head: FusedHead
    one_pass: CleanPass | SecondPass

    def __call__(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (hidden.requires_grad or self.head.module.weight.requires_grad):
            return self.one_pass.take_fused(self.head, hidden)
        return self.head.plain(hidden)


def find_fused_head(model: nn.Module, module: nn.Module, compiled: bool) -> FusedHead | None:
    """The fused head for the boundary `module` of `model`. None where `module` does not make a language model's logits;
    None with a line in the log where it does, and its logits can't be deferred."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    get = getattr(base, "get_output_embeddings", None)
    if get is None or get() is not module:
        return None
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    obstacles = {
        f"the head is a {kind}, and not a plain torch.nn.Linear": not plain,
        "the head's forward is replaced": not isinstance(module.__dict__.get("forward"), DeferringForward | None),
        "compiled models can't defer them": compiled,
    }
    for obstacle, holds in obstacles.items():
        if holds:
            logger.warning(
                f"The fused head is off, and the logits are in memory: {obstacle}. Nothing is wrong; "
                "fsam_fused_head=False leaves this line out."
            )
            return None
    assert isinstance(module, nn.Linear)
    return FusedHead(module)


class CleanCall(HeadCall):
    """A call of the head at θ: what comes back to it is recorded in `crossing`."""

    def __init__(self, head: FusedHead, hidden: Tensor, crossing: Crossing, clean: CleanPass) -> None:
        module = head.module
        super().__init__(hidden, len(module.weight))
        self._head, self._crossing, self._clean = head, crossing, clean
        self._weight, self._bias = clean.unperturbed.take(module.weight, module.bias)
        self._needs = (
            hidden.requires_grad,
            module.weight.requires_grad,
            module.bias is not None and module.bias.requires_grad,
        )
        self._arrived = Gradients()
        self._values: Tensor | None = None

    def cross_entropy(
        self, z: DeferredLogits, targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        fused = self._take(z, rows)
        fused.targets, fused.counted, fused.smoothing = targets, counted, smoothing
        differentiated = torch.is_grad_enabled() and z.requires_grad and not self._clean.stops_at_boundary
        cache = self._clean.unperturbed.cotangents if self._clean.records else None
        if differentiated and cache is not None:
            fused.cached = cache.take(len(fused.hidden), self._weight, self.dtype)
        # The list gives them up when they are handed on: autograd takes over the memory of a gradient with one owner.
        gradients = [cross_entropy_sum(fused, self._needs if differentiated else (False, False, False))]

        def came_back(upstream: Tensor) -> None:
            upstream = fused.weighed(upstream)
            self._record(fused, upstream)
            computed = gradients.pop()
            if computed is not None and fused.grad_dot_logits is not None:
                fused.grad_dot_logits = fused.grad_dot_logits * upstream
                self._add(computed.times_(upstream), fused)

        return _Taken.apply(z, fused, came_back)

    def log_sum_exp(self, z: DeferredLogits) -> Tensor:
        fused = self._take(z, None if z.all_rows else z.rows.flatten())
        log_sum_exp(fused)

        def came_back(upstream: Tensor) -> None:
            self._record(fused, upstream)
            if not self._clean.stops_at_boundary:
                gradients, fused.grad_dot_logits = vjp(
                    fused, upstream, fused.hidden, fused.weight, fused.bias, self._needs[1:]
                )
                self._add(gradients, fused)

        return _Taken.apply(z, fused, came_back)

    def values(self, why: str) -> Tensor:
        self._crossing.values_read = True
        self._head.turn_off(why)
        if self._values is None:
            self._values = _linear(self, self._weight, self._bias, self._clean)
        return self._values

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        total, self._arrived = self._arrived, Gradients()
        if any(values._version for values in self.given):
            raise LogitsNeeded("changes the logits in place, under another name")
        if cotangent is not None:
            self._clean.record(self._crossing, cotangent)
            if not self._clean.stops_at_boundary:
                u = cotangent.flatten(0, -2)  # (n, v)
                total = total.plus(dense_vjp(u, self.hidden, self._weight, self._needs[1:]))
        return total

    def _take(self, z: DeferredLogits, rows: Tensor | None) -> FusedLoss:
        hidden = self.hidden if rows is None else self.hidden.index_select(0, rows)
        fused = FusedLoss(hidden, self._weight, self._bias, self.dtype, z.transform, rows=rows)
        self._crossing.fused.append(fused)
        return fused

    def _record(self, fused: FusedLoss, upstream: Tensor) -> None:
        reached = [other for other in self._crossing.fused if other.upstream is not None]
        early = self._clean.in_compute_loss
        if fused in reached or (reached and early != bool(self._crossing.early)):
            raise LogitsNeeded("is differentiated more than once in one pass")
        fused.upstream = upstream
        self._crossing.early += early

    def _add(self, gradients: Gradients, fused: FusedLoss) -> None:
        self._arrived = self._arrived.plus(fused.of_all_tokens(gradients, self.hidden))


class SecondCall(HeadCall):
    """The same call in the second pass. The loss is given what it took in the clean pass, and the gradient is Jᵀu with
    the recorded u. All of it is computed now, in the head's forward pass, where an engine has its weights gathered."""

    def __init__(self, head: FusedHead, hidden: Tensor, crossing: Crossing, second: SecondPass) -> None:
        super().__init__(hidden, len(head.module.weight))
        self._head, self._crossing, self._second = head, crossing, second
        self._left = list(crossing.fused)
        self._depends_on_values = bool(crossing.cotangents)
        weight, bias = head.module.weight, head.module.bias
        self._values = _linear(self, weight, bias, second) if crossing.values_read else None
        self._gradients = self._replayed(weight, bias)

    def _replayed(self, weight: Tensor, bias: Tensor | None) -> Gradients:
        """Jᵀu for all that came back to the crossing, whose cotangents are used up, in the loss scale of the pass that
        recorded them."""
        total, needs = Gradients(), (weight.requires_grad, bias is not None and bias.requires_grad)
        for fused in self._crossing.fused:
            if fused.upstream is not None:
                hidden = self.hidden if fused.rows is None else self.hidden.index_select(0, fused.rows)
                gradients, after = replay(fused, hidden, weight, bias, needs)
                self._second.take_products(fused.grad_dot_logits, after)
                total = total.plus(fused.of_all_tokens(gradients, self.hidden))
        while self._crossing.cotangents:
            u = self._crossing.cotangents.pop().flatten(0, -2)  # (n, v)
            gradients = dense_vjp(u, self.hidden, weight.detach(), needs)
            assert gradients.hidden is not None
            self._second.take_products(None, dot(gradients.hidden, self.hidden))
            total = total.plus(gradients)
        return total

    def cross_entropy(
        self, z: DeferredLogits, targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        return self._recorded(z, len(targets), "a cross entropy", of_targets=True)

    def log_sum_exp(self, z: DeferredLogits) -> Tensor:
        return self._recorded(z, z.rows.numel(), "a log-sum-exp", of_targets=False)

    def _recorded(self, z: DeferredLogits, count: int, what: str, of_targets: bool) -> Tensor:
        """What the loss took at this place of the clean pass. What nothing came back to, as a value for the log, may
        have been taken in that pass alone."""
        before = 0
        while self._left:
            fused = self._left.pop(0)
            same = of_targets == (fused.targets is not None)
            before = len(fused.hidden) if same else 0
            if same and before == count:
                return _Taken.apply(z, fused, None)
            if fused.upstream is not None:
                break
        raise RuntimeError(
            f"the second pass took {what} of {count} tokens' logits where the first had {before}: {SAME_FUNCTION}"
        )

    def values(self, why: str) -> Tensor:
        self._head.turn_off(why)
        if self._values is None:  # a metric reads them that the clean pass had no part in
            weight = self._head.module.weight
            if type(weight.detach()) is not Tensor or weight.shape[0] != self.shape[-1]:  # sharded, no longer gathered
                raise RuntimeError(
                    f"the second pass read the logits ({why}), the first did not, and the head's weights are no longer "
                    "here: read them in both, or set fsam_fused_head=False."
                )
            self._values = _linear(self, weight, self._head.module.bias, self._second)
        return self._values

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        """`cotangent`, the second pass's own, is dropped."""
        if cotangent is not None and not self._depends_on_values:
            raise RuntimeError(
                f"the loss of the second pass depends on the logits' values, that of the first did not: {SAME_FUNCTION}"
            )
        gradients, self._gradients = self._gradients, Gradients()
        return gradients.times_(self._second.ratio(self._crossing))


def _linear(call: HeadCall, weight: Tensor, bias: Tensor | None, one_pass: Pass) -> Tensor:
    """The head's output in memory, (..., v), without a gradient."""
    if one_pass.ended:
        raise RuntimeError(
            "logits are read after their pass has ended, and by then the weights have changed: read them in "
            "compute_loss, or set fsam_fused_head=False."
        )
    with torch.inference_mode(False), torch.no_grad():  # a metric may be the first to read them, in inference mode
        return F.linear(call.hidden, weight, bias).view(call.shape)


# The nodes of an autograd graph that add what comes to them, as a balancing loss to the cross entropy.
_SUMS = ("AddBackward0", "SubBackward0", "StackBackward0", "CatBackward0")


def is_weighed(loss: Tensor) -> bool:
    """Whether `loss` multiplies what it took of a fused head with something of another origin that is differentiated,
    as a loss weight that is learned. That one's gradient depends on the loss's value, and a second pass hands on the
    clean one."""
    nodes = list(autograd_nodes(loss.grad_fn))
    known = {None, *_from(HeadNode, nodes)}
    return any(node.name() not in _SUMS and not known.issuperset(parents(node)) for node in _from(_Taken, nodes))


def _from(function: type, nodes: list[Any]) -> set[Any]:
    """Those of `nodes` that are `function`'s, or were computed from what it returned."""
    found = {node for node in nodes if getattr(node, "_forward_cls", None) is function}
    while fresh := {node for node in nodes if not found.isdisjoint(parents(node))} - found:
        found |= fresh
    return found


class _Taken(torch.autograd.Function):
    """What the loss takes of deferred logits, `fused.value`. Its backward pass tells `came_back` of ∂loss/∂value, and
    sends the logits a zero."""

    @staticmethod
    def forward(ctx: Any, z: DeferredLogits, fused: FusedLoss, came_back: Callable[[Tensor], None] | None) -> Tensor:
        ctx.z, ctx.came_back = z, came_back
        return fused.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_create_graph()
        if ctx.came_back is not None:
            ctx.came_back(upstream)
        return ctx.z.call.zero_once(ctx.z), None, None
