"""A language model's head whose logits are deferred (`hf_fsam.heads.deferred_logits`), and its calls in either pass.

In the backward pass a cross entropy leaves its share of the gradient with the call of the head, and sends the logits
what says nothing; what was done with their values sends their cotangent, as in any graph. :class:`_Head`, the node
that stands for the head, hands on the sum of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from hf_fsam.engines.deepspeed_internals import give_shape_of_gradient
from hf_fsam.heads.deferred_logits import Call, DeferredLogits, LogitsNeeded, refuse_create_graph
from hf_fsam.heads.fused_loss import (
    FusedLoss,
    Gradients,
    compute_dtype,
    cross_entropy_sum,
    dense_vjp,
    dot,
    log_sum_exp,
    room,
    vjp,
)

if TYPE_CHECKING:
    from hf_fsam.passes import CleanPass, Crossing, SecondPass

logger = logging.get_logger(__name__)

SAME_FUNCTION = (
    "both must compute the same function. Let forward and loss depend on the batch, the weights and random numbers of "
    "torch, NumPy and Python alone, or set fsam_variant='sam'."
)


# ---- The head ----


class CotangentCache:
    """Memory for some cotangents of a window. It stays from window to window: new memory costs a CPU more than what is
    written there."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._taken = 0

    def clear(self) -> None:
        self._taken = 0

    def take(self, tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """For some of the tokens, (some, v), where `like` is (v, d)."""
        vocabulary, most = like.shape[0], room(like.device)
        some = min(tokens, (most - self._taken) // vocabulary)
        if some <= 0:
            return None
        start, self._taken = self._taken, self._taken + some * vocabulary
        memory = self._memory
        if memory.numel() < self._taken or memory.dtype != dtype or memory.device != like.device:
            # What was handed out before stays where it is.
            self._memory = memory = like.new_empty(
                min(most, max(self._taken, start + tokens * vocabulary)), dtype=dtype
            )
        return memory[start : self._taken].view(some, vocabulary)


@dataclass
class KeptHead:
    """The head's weights as they are in the clean passes of a window, for the second passes."""

    weight: Tensor
    bias: Tensor | None
    cotangents: CotangentCache | None = None


def kept_head(
    weight: Tensor, bias: Tensor | None, detached_weights_stay: bool, cotangents: CotangentCache | None = None
) -> KeptHead:
    """W and b as they are now.

    detached_weights_stay: a weight that is detached now stays as it is while the weights are at θ+ε. Where it does not,
    because weights are moved in place or gathered for a moment only, they are copied.
    """

    def now(each: Tensor) -> Tensor:
        return each.detach() if detached_weights_stay else each.detach().clone()

    return KeptHead(now(weight), None if bias is None else now(bias), cotangents)


class _DeferringForward:
    """Stands in the place of a head's `forward`."""

    def __init__(self, module: nn.Linear, call: Callable[[Tensor], Tensor]) -> None:
        self.module, self.call = module, call

    def __call__(self, hidden: Tensor) -> Tensor:
        module = self.module
        needed = hidden.requires_grad or module.weight.requires_grad
        return self.call(hidden) if needed and torch.is_grad_enabled() else type(module).forward(module, hidden)


class FusedHead:
    """The head of a language model while its logits are deferred.

    Args:
        module: the head.
        detached_weights_stay: see :func:`kept_head`.
    """

    def __init__(self, module: nn.Linear, detached_weights_stay: bool = True) -> None:
        self.module, self._detached_weights_stay = module, detached_weights_stay
        self._cache = CotangentCache()
        self.off = False

    def defer(self, call: Callable[[Tensor], Tensor]) -> None:
        """From now on, `call` of the final hidden states (..., d) is what the head returns."""
        self.module.__dict__["forward"] = _DeferringForward(self.module, call)

    def undefer(self) -> None:
        if is_deferring(self.module):
            del self.module.__dict__["forward"]

    def keep(self) -> KeptHead:
        """A window begins."""
        self._cache.clear()
        return kept_head(self.module.weight, self.module.bias, self._detached_weights_stay, self._cache)

    def turn_off(self, why: str) -> None:
        if not self.off:
            self.off = True
            logger.warning(
                f"The fused head is off from the next step on, and the logits are in memory: {why}. Nothing is wrong; "
                "fsam_fused_head=False leaves this line out."
            )


def is_deferring(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), _DeferringForward)


def fused_head(model: nn.Module, module: nn.Module, detached_weights_stay: bool, compiled: bool) -> FusedHead | None:
    """The fused head for the boundary `module` of `model`. None, with a line in the log, where it has to be off;
    without one where `module` is not what makes a language model's logits."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    get = getattr(base, "get_output_embeddings", None)
    if get is None or get() is not module:
        return None
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    compiled = compiled or any(getattr(model, name, None) is not None for name in ("_orig_mod", "_compiled_call_impl"))
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    why = {
        f"the head is a {kind}, and not a plain torch.nn.Linear": not plain,
        "the head's forward is replaced": "forward" in module.__dict__ and not is_deferring(module),
        "compiled models can't defer them": compiled,
    }
    for reason, holds in why.items():
        if holds:
            logger.warning(
                f"The fused head is off, and the logits are in memory: {reason}. Nothing is wrong; "
                "fsam_fused_head=False leaves this line out."
            )
            return None
    assert isinstance(module, nn.Linear)
    return FusedHead(module, detached_weights_stay)


class Edge(torch.autograd.Function):
    """Where the gradient of a weight goes in, in the weight's shape and without its memory: an engine that shards the
    weights has it gathered now, and may not have when the gradient comes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.new_zeros(1).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        give_shape_of_gradient(ctx.weight, upstream)
        return upstream


def edge(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else Edge.apply(weight)


# ---- One call of the head in one pass ----


class _Head(torch.autograd.Function):
    """The node of the autograd graph that stands for the head: `call.gradients` is its backward pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shapes = call, [None if each is None else each.shape for each in (hidden, weight, bias)]
        return DeferredLogits.of(call)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        gradients = ctx.call.gradients(None if ctx.call.says_nothing(cotangent) else cotangent)
        given = zip(gradients, ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return (None, *(g.view(shape) if needed and g is not None else None for g, shape, needed in given))


def call_head(call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The deferred logits of `call`, (..., v), which depend on `hidden`, `weight` and `bias`."""
    return _Head.apply(call, hidden, edge(weight), edge(bias))


class _Call:
    """
    Args:
        head: whose call it is.
        hidden: the final hidden states, (..., d).
    """

    def __init__(self, head: FusedHead, hidden: Tensor) -> None:
        self._head = head
        self._hidden = hidden.detach().flatten(0, -2)  # (n, d)
        self.shape = torch.Size((*hidden.shape[:-1], head.module.weight.shape[0]))
        self.dtype, self.device = compute_dtype(hidden), hidden.device
        self.given: list[Tensor] = []
        self._values: Tensor | None = None
        self._nothing: dict[torch.dtype, Tensor] = {}
        self._said = False

    def nothing(self, like: Tensor) -> Tensor:
        zero = self._nothing.setdefault(like.dtype, torch.zeros((), dtype=like.dtype, device=like.device))
        return zero.expand(like.shape)

    def nothing_once(self, like: Tensor) -> Tensor | None:
        if self._said:
            return None
        self._said = True
        return self.nothing(like)

    def says_nothing(self, cotangent: Tensor | None) -> bool:
        if cotangent is None:
            return True
        memory = cotangent.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == memory for each in self._nothing.values())

    def _refuse_late(self, ended: bool) -> None:
        if ended:
            raise RuntimeError(
                "logits are read after their pass has ended, when the weights that make them are others: read them in "
                "compute_loss, or set fsam_fused_head=False."
            )

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # a metric may read them in inference mode first
            return F.linear(self._hidden, weight, bias).view(self.shape)


class CleanCall(_Call):
    """A call of the head at θ, whose cotangents are recorded in `crossing`."""

    def __init__(
        self, head: FusedHead, hidden: Tensor, kept: KeptHead, crossing: "Crossing", clean: "CleanPass"
    ) -> None:
        super().__init__(head, hidden)
        self._kept, self._crossing, self._pass = kept, crossing, clean
        weight, bias = head.module.weight, head.module.bias
        self._needs = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        self._arrived = Gradients()

    def cross_entropy(
        self, z: "DeferredLogits", targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        statistic = self._statistic(z, rows)
        statistic.targets, statistic.counted, statistic.smoothing = targets, counted, smoothing
        differentiated = torch.is_grad_enabled() and z.requires_grad and not self._pass.cut
        if differentiated and self._pass.keep and self._kept.cotangents is not None:
            statistic.kept = self._kept.cotangents.take(len(statistic.hidden), self._kept.weight, self.dtype)
        # Handed on, not held: autograd takes the memory of a gradient that is nobody else's.
        gradients = [cross_entropy_sum(statistic, self._needs if differentiated else (False, False, False))]

        def came_back(upstream: Tensor) -> None:
            upstream = statistic.weighed(upstream)
            self._note(statistic, upstream)
            computed = gradients.pop()
            if computed is not None and statistic.grad_dot_logits is not None:
                statistic.grad_dot_logits = statistic.grad_dot_logits * upstream
                self._add(computed.times_(upstream), statistic)

        return _Taken.apply(z, statistic, came_back)

    def log_sum_exp(self, z: "DeferredLogits") -> Tensor:
        statistic = self._statistic(z, None if z.whole else z.rows.flatten())
        log_sum_exp(statistic)

        def came_back(upstream: Tensor) -> None:
            self._note(statistic, upstream)
            if not self._pass.cut:
                gradients, statistic.grad_dot_logits = vjp(
                    statistic, upstream, statistic.hidden, statistic.weight, statistic.bias, self._needs[1:]
                )
                self._add(gradients, statistic)

        return _Taken.apply(z, statistic, came_back)

    def _statistic(self, z: "DeferredLogits", rows: Tensor | None) -> FusedLoss:
        hidden = self._hidden if rows is None else self._hidden.index_select(0, rows)
        statistic = FusedLoss(hidden, self._kept.weight, self._kept.bias, self.dtype, z.transform, rows=rows)
        self._crossing.statistics.append(statistic)
        return statistic

    def _note(self, statistic: FusedLoss, upstream: Tensor) -> None:
        others = [other for other in self._crossing.statistics if other.upstream is not None]
        early = self._pass.in_compute_loss
        if statistic in others or (others and early != bool(self._crossing.early)):
            raise LogitsNeeded("is differentiated more than once in one pass")
        statistic.upstream = upstream
        self._crossing.early += early

    def _add(self, gradients: Gradients, statistic: FusedLoss) -> None:
        self._arrived = self._arrived.plus(_scattered(gradients, statistic, self._hidden))

    def values(self, why: str) -> Tensor:
        self._crossing.read = True
        self._head.turn_off(why)
        if self._values is None:
            self._refuse_late(self._pass.ended)
            self._values = self._linear(self._kept.weight, self._kept.bias)
        return self._values

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        total, self._arrived = self._arrived, Gradients()
        if any(values._version for values in self.given):
            raise LogitsNeeded("changes the logits in place, under another name")
        if cotangent is not None:
            self._pass.came_back(self._crossing, cotangent)
            if not self._pass.cut:
                u = cotangent.flatten(0, -2)
                total = total.plus(dense_vjp(u, self._hidden, self._kept.weight, self._needs[1:]))
        return total


class SecondCall(_Call):
    """The same call of the head in the second pass: the loss is given what it took in the first, and its gradient is
    Jᵀu with the recorded u. All of it is computed now, in the head's forward pass, where its weights are at hand."""

    def __init__(self, head: FusedHead, hidden: Tensor, crossing: "Crossing", second: "SecondPass") -> None:
        super().__init__(head, hidden)
        self._crossing, self._pass = crossing, second
        self._left = list(crossing.statistics)
        self._depends_on_values = bool(crossing.cotangents)
        weight, bias = head.module.weight, head.module.bias
        if crossing.read:
            self._values = self._linear(weight, bias)
        needs = weight.requires_grad, bias is not None and bias.requires_grad
        self._gradients = _replayed(crossing, self._hidden, weight, bias, needs, second)

    def cross_entropy(
        self, z: "DeferredLogits", targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        return self._given(z, len(targets), "a cross entropy")

    def log_sum_exp(self, z: "DeferredLogits") -> Tensor:
        return self._given(z, z.rows.numel(), "a log-sum-exp")

    def _given(self, z: "DeferredLogits", count: int, what: str) -> Tensor:
        statistic = self._left.pop(0) if self._left else None
        before = 0 if statistic is None else len(statistic.hidden)
        if statistic is None or count != before:
            raise RuntimeError(
                f"the second pass took {what} of {count} tokens' logits where the first had {before}: {SAME_FUNCTION}"
            )
        return _Taken.apply(z, statistic, lambda upstream: None)

    def values(self, why: str) -> Tensor:
        self._head.turn_off(why)
        if self._values is None:  # a metric that the first pass had no part in
            self._refuse_late(self._pass.ended)
            weight = self._head.module.weight
            if type(weight.detach()) is not Tensor or weight.shape[0] != self.shape[-1]:  # sharded, no longer gathered
                raise RuntimeError(
                    f"the second pass read the logits ({why}), the first did not, and the head's weights are no longer "
                    "here: read them in both, or set fsam_fused_head=False."
                )
            self._values = self._linear(weight, self._head.module.bias)
        return self._values

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        """`cotangent`, the second pass's own, is dropped."""
        if cotangent is not None and not self._depends_on_values:
            raise RuntimeError(
                f"the loss of the second pass depends on the logits' values, that of the first did not: {SAME_FUNCTION}"
            )
        gradients, self._gradients = self._gradients, Gradients()
        return gradients.times_(self._pass.ratio(self._crossing.early))


class _Taken(torch.autograd.Function):
    """A statistic of deferred logits, as the loss is given it. Its backward pass tells `came_back` of ∂loss/∂value, and
    sends on to the logits what says nothing."""

    @staticmethod
    def forward(ctx: Any, z: "DeferredLogits", statistic: FusedLoss, came_back: Callable[[Tensor], None]) -> Tensor:
        ctx.z, ctx.came_back = z, came_back
        return statistic.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_create_graph()
        ctx.came_back(upstream)
        return ctx.z.call.nothing_once(ctx.z), None, None


def _scattered(gradients: Gradients, statistic: FusedLoss, hidden: Tensor) -> Gradients:
    """The gradient of a statistic's hidden states as that of all of them, `hidden` (n, d)."""
    if statistic.rows is None or gradients.hidden is None:
        return gradients
    total = torch.zeros_like(hidden, dtype=gradients.hidden.dtype).index_add_(0, statistic.rows, gradients.hidden)
    return Gradients(total, gradients.weight, gradients.bias)


def _replayed(
    crossing: "Crossing",
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
    second: "SecondPass",
) -> Gradients:
    """Jᵀu with all that came back to `crossing`, whose cotangents are used up, and the Jacobian of a head at these
    weights (v, d) and hidden states (n, d). In the loss scale of the pass that recorded u."""
    total = Gradients()
    for statistic in crossing.statistics:
        if statistic.upstream is not None:
            now = hidden if statistic.rows is None else hidden.index_select(0, statistic.rows)
            gradients = replayed_statistic(statistic, now, weight, bias, needs, second.see_products)
            total = total.plus(_scattered(gradients, statistic, hidden))
    while crossing.cotangents:
        u = crossing.cotangents.pop().flatten(0, -2)
        gradients = dense_vjp(u, hidden, weight.detach(), needs)
        assert gradients.hidden is not None
        second.see_products(None, dot(gradients.hidden, hidden))
        total = total.plus(gradients)
    return total


def replayed_statistic(
    statistic: FusedLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
    see_products: Callable[[Tensor | None, Tensor], None],
) -> Gradients:
    """The same with what came back to one statistic. hidden: its own tokens', (n, d). see_products: is told of ⟨u, a⟩
    and ⟨u, a'⟩, see :meth:`hf_fsam.passes.SecondPass.see_products`."""
    upstream = statistic.upstream
    assert upstream is not None
    statistic.hidden = statistic.hidden.to(hidden.device, non_blocking=True)  # it may have waited on the host
    if upstream.ndim:
        gradients, after = vjp(statistic, upstream, hidden, weight, bias, needs)
    else:  # one number for all tokens
        gradients, after = vjp(statistic, None, hidden, weight, bias, needs)
        gradients, after = gradients.times_(upstream), after * upstream
    if gradients.bias is not None and bias is not None and statistic.bias is not None:  # ⟨u, b' − b⟩
        after = after + dot(gradients.bias.to(after.dtype), bias.detach() - statistic.bias)
    see_products(statistic.grad_dot_logits, after)
    return gradients
