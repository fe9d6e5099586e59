"""Logits that are not computed until the loss asks for them, which most losses never do.

A model's own forward pass and its own loss run as they are. Only its head's output is a :class:`DeferredLogits`, a
tensor without values, which goes through scaling, capping, slicing and flattening, and meets a cross entropy or a
log-sum-exp: those are computed from the final hidden states (`hf_fsam.head`). Whatever else is done with it is done
with its values, which are computed then; the log says so once, and from the next pass on the head makes its logits
itself.

In the backward pass a cross entropy leaves its share of the gradient with the call of the head, and sends the logits
what says nothing; what was done with their values sends their cotangent, as in any graph. :class:`_Head`, the node
that stands for the head, hands on the sum of both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from hf_fsam.head import (
    Gradients,
    Squash,
    Statistic,
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


class LogitsNeeded(RuntimeError):
    """The loss does with deferred logits what only logits in memory allow."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the loss {what}, which takes logits in memory: set fsam_fused_head=False")


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
        if ctx.weight.shape != upstream.shape:
            # ZeRO-3 has emptied it, and autograd wants the shape of a gradient where it leaves one. The next gathering
            # puts its own memory there.
            ctx.weight.data = upstream.new_zeros(1).expand(upstream.shape)
        return upstream


def edge(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else Edge.apply(weight)


# ---- One call of the head in one pass ----


class Call(Protocol):
    """What deferred logits come from."""

    shape: torch.Size  # (..., v)
    dtype: torch.dtype
    device: torch.device

    def cross_entropy(
        self, z: "DeferredLogits", targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        """Σ of the tokens' cross entropies, shape (). rows: of the head's tokens, (n,); None for all. targets: (n,).
        counted: (n,), whether a target counts; None where all do."""

    def log_sum_exp(self, z: "DeferredLogits") -> Tensor:
        """log Σ exp z of each token, (n,)."""

    def values(self, why: str) -> Tensor:
        """a = h Wᵀ + b, (..., v), without a gradient; the same memory at each call."""

    def nothing(self, like: Tensor) -> Tensor:
        """A gradient for deferred logits that says nothing: zeros in the memory of one. In its place, some functions of
        others would make zeros in memory of None."""

    def nothing_once(self, like: Tensor) -> Tensor | None:
        """The same, and None from the second time on: the sum of two would be in memory, too."""

    def says_nothing(self, cotangent: Tensor | None) -> bool: ...

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        """Jᵀu of this call, when a backward pass comes here. u: `cotangent` (..., v), and what came to statistics."""


class _Head(torch.autograd.Function):
    """The node of the autograd graph that stands for the head: `call.gradients` is its backward pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shapes = call, [None if each is None else each.shape for each in (hidden, weight, bias)]
        return DeferredLogits.of(call)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        gradients = ctx.call.gradients(None if ctx.call.says_nothing(cotangent) else cotangent)
        given = zip(gradients, ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return (None, *(g.view(shape) if needed and g is not None else None for g, shape, needed in given))


def call_head(call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The deferred logits of `call`, (..., v), which depend on `hidden`, `weight` and `bias`."""
    return _Head.apply(call, hidden, edge(weight), edge(bias))


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise LogitsNeeded("depends on a gradient that it has taken with create_graph=True, as a gradient penalty does")


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

    def _statistic(self, z: "DeferredLogits", rows: Tensor | None) -> Statistic:
        hidden = self._hidden if rows is None else self._hidden.index_select(0, rows)
        statistic = Statistic(hidden, self._kept.weight, self._kept.bias, self.dtype, z.squash, rows=rows)
        self._crossing.statistics.append(statistic)
        return statistic

    def _note(self, statistic: Statistic, upstream: Tensor) -> None:
        others = [other for other in self._crossing.statistics if other.upstream is not None]
        early = self._pass.in_compute_loss
        if statistic in others or (others and early != bool(self._crossing.early)):
            raise LogitsNeeded("is differentiated more than once in one pass")
        statistic.upstream = upstream
        self._crossing.early += early

    def _add(self, gradients: Gradients, statistic: Statistic) -> None:
        self._arrived = self._arrived.plus(_scattered(gradients, statistic, self._hidden))

    def values(self, why: str) -> Tensor:
        self._crossing.read = True
        self._head.turn_off(why)
        if self._values is None:
            self._values = self._linear(self._kept.weight, self._kept.bias)
        return self._values

    def gradients(self, cotangent: Tensor | None) -> Gradients:
        total, self._arrived = self._arrived, Gradients()
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
    def forward(ctx: Any, z: "DeferredLogits", statistic: Statistic, came_back: Callable[[Tensor], None]) -> Tensor:
        ctx.z, ctx.came_back = z, came_back
        return statistic.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        _refuse_create_graph()
        ctx.came_back(upstream)
        return ctx.z.call.nothing_once(ctx.z), None, None


def _scattered(gradients: Gradients, statistic: Statistic, hidden: Tensor) -> Gradients:
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
    statistic: Statistic,
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


# ---- What stands for the logits ----


class DeferredLogits(Tensor):
    """Logits (..., v) without values: a tensor of the right shape, dtype, device and autograd node, whose memory is one
    NaN, for whoever looks past what is below.

    Attributes:
        call: of the head, in one pass.
        rows: of which of its tokens, (...).
        squash: on the way from the head.
        whole: `rows` are all tokens in their order and shape.
    """

    call: Call
    rows: Tensor
    squash: Squash
    whole: bool

    @classmethod
    def of(cls, call: Call) -> "DeferredLogits":
        leading = call.shape[:-1]
        rows = torch.arange(leading.numel(), device=call.device).view(leading)
        return cls._new(call, rows, Squash(), call.dtype, True)

    @classmethod
    def _new(cls, call: Call, rows: Tensor, squash: Squash, dtype: torch.dtype, whole: bool) -> "DeferredLogits":
        memory = torch.full((), math.nan, dtype=dtype, device=call.device)
        z = memory.expand(*rows.shape, call.shape[-1]).as_subclass(cls)
        z.call, z.rows, z.squash, z.whole = call, rows, squash, whole
        return z

    def _derived(self, how: Callable[[Tensor], Tensor], **changes: Any) -> "DeferredLogits":
        """What `how` would make of the values."""
        made: dict[str, Any] = {"rows": self.rows, "squash": self.squash, "dtype": self.dtype, "whole": self.whole}
        made |= changes
        return _Derived.apply(self, how, lambda: DeferredLogits._new(self.call, **made))

    def in_memory(self, why: str) -> Tensor:
        """z, without a gradient. why: it is asked for, for the log."""
        with torch.inference_mode(False), torch.no_grad():
            z = self.call.values(why)
            z = z if self.squash.before == 1.0 else z * self.squash.before
            if self.squash.tanh:
                z = z.tanh() * self.squash.after
            z = z if self.whole else z.flatten(0, -2)[self.rows]
            return z.to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            return _past_torch_function(function, *args, **kwargs)
        deferred = _DEFERRED.get(function)
        if deferred is not None and isinstance(args[0], cls):
            result = deferred(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if function in _TIMES and len(args) == 2 and _number(args[0]) and not kwargs:
            return args[1] * args[0]

        given: list[tuple[Tensor, int]] = []

        def value(z: DeferredLogits) -> Tensor:
            tensor = _Values.apply(z, z.in_memory(f"{name} needs them"))
            if not tensor.is_inference():
                given.append((tensor, tensor._version))
            return tensor

        name = _name(function)
        args, kwargs = tree_map_only(cls, value, (args, kwargs))
        result = function(*args, **kwargs)
        if any(tensor._version != version for tensor, version in given):
            raise LogitsNeeded(f"changes the logits in place ({name})")
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """For code below Python: autograd's own, TorchScript's."""
        z = args[0] if args else None
        if isinstance(z, cls) and function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls._new(z.call, z.rows, z.squash, z.dtype, z.whole)
        name = str(function)
        args, kwargs = tree_map_only(cls, lambda z: z.in_memory(f"{name} needs them"), (args, kwargs or {}))
        return function(*args, **kwargs)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    return getattr(function.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _past_torch_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


class _Derived(torch.autograd.Function):
    """Deferred logits made of others. A gradient comes here where code that takes no notice of deferred logits, an
    autograd.Function of somebody else's, has computed one for them."""

    @staticmethod
    def forward(
        ctx: Any, z: DeferredLogits, how: Callable[[Tensor], Tensor], make: Callable[[], DeferredLogits]
    ) -> DeferredLogits:
        ctx.set_materialize_grads(False)
        ctx.z, ctx.how = z, how
        return make()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, None, None]:
        if cotangent is None:
            return None, None, None
        if ctx.z.call.says_nothing(cotangent):
            return ctx.z.call.nothing(ctx.z), None, None
        _refuse_create_graph()
        values = ctx.z.in_memory("a gradient came back to them").detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.how(values)
        return *torch.autograd.grad(made, values, cotangent), None, None


class _Values(torch.autograd.Function):
    """Logits in memory in the place of deferred ones."""

    @staticmethod
    def forward(ctx: Any, z: DeferredLogits, values: Tensor) -> Tensor:
        return values.detach()  # shares the version by which a change in place is seen

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


# ---- What keeps them deferred ----


def _same(z: DeferredLogits) -> DeferredLogits:
    return z


def _detach(z: DeferredLogits) -> DeferredLogits:
    return _past_torch_function(Tensor.detach, z)


def _clone(z: DeferredLogits, **kwargs: Any) -> DeferredLogits:
    return z._derived(torch.clone)


def _to(z: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    (target,) = args if len(args) == 1 and not kwargs else (None,)
    if isinstance(target, torch.dtype) and target.is_floating_point:
        return z if target == z.dtype else z._derived(lambda values: values.to(target), dtype=target)
    if isinstance(target, torch.device | str) and torch.device(target) == z.device:
        return z
    return NotImplemented


def _view(z: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    rest = z.rows.numel() if all(size >= 0 for size in sizes[:-1]) else None
    whole_vocabulary = sizes[-1:] == z.shape[-1:] or (sizes[-1:] == (-1,) and rest == torch.Size(sizes[:-1]).numel())
    if len(sizes) < 2 or not whole_vocabulary:
        return NotImplemented
    return z._derived(lambda values: values.reshape(sizes), rows=z.rows.reshape(sizes[:-1]), whole=False)


def _flatten(z: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % z.ndim, end_dim % z.ndim
    if end == z.ndim - 1:
        return NotImplemented
    return z._derived(lambda values: values.flatten(start, end), rows=z.rows.flatten(start, end), whole=False)


def _getitem(z: DeferredLogits, index: Any) -> Any:
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or index.ndim >= z.ndim:
            return NotImplemented
        rows = z.rows[index]
    elif any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,))):
        return NotImplemented
    else:
        # The vocabulary stays as it is if its dimension, which alone has no stride, is there in its length.
        taken = z.rows.contiguous().unsqueeze(-1).expand(z.shape)[index]
        if taken.ndim < 2 or taken.shape[-1] != z.shape[-1] or taken.stride(-1) != 0:
            return NotImplemented
        rows = taken[..., 0]
    return z._derived(lambda values: values[index], rows=rows, whole=False)


def _times(z: DeferredLogits, factor: Any) -> Any:
    if not _number(factor):
        return NotImplemented
    return z._derived(lambda values: values * factor, squash=z.squash.scaled(factor))


def _divided(z: DeferredLogits, divisor: Any) -> Any:
    return _times(z, 1 / divisor) if _number(divisor) else NotImplemented


def _tanh(z: DeferredLogits) -> Any:
    if z.squash.tanh:
        return NotImplemented
    return z._derived(torch.tanh, squash=Squash(z.squash.before, 1.0, tanh=True))


def _hook(z: DeferredLogits, hook: Callable) -> Any:
    """Engines put hooks on what a module returns, to be told when its backward pass begins, whatever comes back."""
    if (getattr(hook, "__module__", None) or "").partition(".")[0] in ("torch", "deepspeed"):
        return _past_torch_function(Tensor.register_hook, z, hook)
    raise LogitsNeeded("puts a hook on the logits' gradient")


def _retain_grad(z: DeferredLogits) -> Any:
    raise LogitsNeeded("keeps the logits' gradient")


# ---- Where they end ----


def _log_sum_exp(z: DeferredLogits, dim: Any, keepdim: bool = False) -> Any:
    if dim not in (-1, z.ndim - 1):
        return NotImplemented
    result = z.call.log_sum_exp(z).view(z.rows.shape)
    return result.unsqueeze(-1) if keepdim else result


def leaving_out_is_free(device: torch.device) -> bool:
    """Whether tokens that do not count may be left out. On a device, the host would wait to know how many are left."""
    return device.type == "cpu"


def _cross_entropy(
    z: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Any:
    legacy = weight is not None or size_average is not None or reduce is not None
    if legacy or reduction == "none" or z.ndim != 2 or not isinstance(target, Tensor) or target.ndim != 1:
        return NotImplemented
    counts = target != ignore_index
    if leaving_out_is_free(z.device):
        total = z.call.cross_entropy(z, target[counts], None, z.rows[counts], label_smoothing)
    else:
        rows = None if z.whole else z.rows
        total = z.call.cross_entropy(z, target.masked_fill(~counts, 0), counts, rows, label_smoothing)
    return total / counts.sum() if reduction == "mean" else total


class DeferringLabelSmoother(LabelSmoother):
    """The Trainer's label smoother, which asks of deferred logits for what it computes, a cross entropy."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, DeferredLogits):
            return super().__call__(model_output, labels, shift_labels, num_items_in_batch)
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        logits, labels = logits.view(-1, logits.shape[-1]), labels.reshape(-1)
        total = F.cross_entropy(
            logits, labels, reduction="sum", ignore_index=self.ignore_index, label_smoothing=self.epsilon
        )
        if num_items_in_batch is None:
            return total / (labels != self.ignore_index).sum()
        return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_TIMES = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
_DEFERRED: dict[Any, Callable] = {
    **dict.fromkeys(_TIMES, _times),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _divided),
    **dict.fromkeys((Tensor.tanh, torch.tanh, F.tanh), _tanh),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    **dict.fromkeys((Tensor.detach, torch.detach), _detach),
    **dict.fromkeys((Tensor.clone, torch.clone), _clone),
    **dict.fromkeys((Tensor.logsumexp, torch.logsumexp), _log_sum_exp),
    Tensor.contiguous: _same,
    **dict.fromkeys(_getters("_base"), lambda z, *_: None),  # FSDP2 warns of views
    Tensor.float: lambda z: _to(z, torch.float32),
    Tensor.to: _to,
    Tensor.__getitem__: _getitem,
    Tensor.register_hook: _hook,
    Tensor.retain_grad: _retain_grad,
    F.cross_entropy: _cross_entropy,
}
# What is asked of the tensor and not of its values.
_METADATA = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse"),
    *_getters("requires_grad", "grad", "grad_fn", "is_leaf", "is_nested", "_backward_hooks", "_version"),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.get_device),
    *(Tensor.requires_grad_, Tensor.is_inference, torch.numel, Tensor.__hash__),
}
