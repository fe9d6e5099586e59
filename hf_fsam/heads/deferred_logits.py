"""Logits that are not computed until the loss asks for them, which most losses never do.

A model's own forward pass and its own loss run as they are. Only its head's output is a :class:`DeferredLogits`, a
tensor without values. It goes through scaling, capping, slicing and flattening, and meets a cross entropy or a
log-sum-exp: those are computed from the final hidden states (:mod:`~hf_fsam.heads.fused_head`). Whatever else is done
with it is done with its values, which are computed then; the log says so once, and from the next step on the head makes
its logits itself.
"""

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers.trainer_pt_utils import LabelSmoother

from hf_fsam.heads.fused_loss import Gradients, LogitTransform, compute_dtype


class LogitsNeeded(RuntimeError):
    """The loss does with deferred logits what can be done with logits in memory only."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the loss {what}, which takes logits in memory: set fsam_fused_head=False")


def refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise LogitsNeeded("depends on a gradient that it has taken with create_graph=True, as a gradient penalty does")


class HeadCall(ABC):
    """One call of the head in one pass. Its deferred logits point to it, and their gradients arrive here.

    Args:
        hidden: the final hidden states, (..., d).

    Attributes:
        hidden: the same without a gradient, (n, d).
        shape: of the logits, (..., v).
        dtype: that the head computes in.
        given: logits in memory that somebody was handed.
    """

    def __init__(self, hidden: Tensor, vocabulary: int) -> None:
        self.hidden = hidden.detach().flatten(0, -2)
        self.shape = torch.Size((*hidden.shape[:-1], vocabulary))
        self.dtype, self.device = compute_dtype(hidden), hidden.device
        self.given: list[Tensor] = []
        self._zeros: dict[torch.dtype, Tensor] = {}
        self._sent_zero = False

    @abstractmethod
    def cross_entropy(
        self, z: "DeferredLogits", targets: Tensor, counted: Tensor | None, rows: Tensor | None, smoothing: float
    ) -> Tensor:
        """Σ of the tokens' cross entropies, shape (). rows: which of the head's tokens, (n,); None for all. targets:
        (n,). counted: (n,), whether a target counts; None where all do. smoothing: of the labels."""

    @abstractmethod
    def log_sum_exp(self, z: "DeferredLogits") -> Tensor:
        """log Σ exp z of each token, (n,)."""

    @abstractmethod
    def values(self, why: str) -> Tensor:
        """The head's output a = h Wᵀ + b, (..., v), without a gradient; the same memory at each call."""

    @abstractmethod
    def gradients(self, cotangent: Tensor | None) -> Gradients:
        """Jᵀu of this call, once a backward pass has come here. u: `cotangent` (..., v), and what came back to cross
        entropies and log-sum-exps on their own way."""

    # A gradient for deferred logits that stands for none: zeros in the memory of one number. None in its place would
    # make some functions of others allocate zeros, as large as the logits.

    def zero(self, like: Tensor) -> Tensor:
        """A gradient of zeros, in the shape and dtype of `like`."""
        zero = self._zeros.setdefault(like.dtype, torch.zeros((), dtype=like.dtype, device=like.device))
        return zero.expand(like.shape)

    def zero_once(self, like: Tensor) -> Tensor | None:
        """The same, and None from the second time on: autograd would allocate memory for the sum of two."""
        if self._sent_zero:
            return None
        self._sent_zero = True
        return self.zero(like)

    def is_zero(self, cotangent: Tensor | None) -> bool:
        """Whether `cotangent` is one of these."""
        if cotangent is None:
            return True
        memory = cotangent.untyped_storage().data_ptr()
        return any(zero.untyped_storage().data_ptr() == memory for zero in self._zeros.values())


def call_head(call: HeadCall, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The deferred logits of `call`, (..., v), which depend on `hidden` (..., d), `weight` (v, d) and `bias` (v,)."""
    return HeadNode.apply(call, hidden, gradient_edge(weight), gradient_edge(bias))


class HeadNode(torch.autograd.Function):
    """The node of the autograd graph that stands for the head; its backward pass is `call.gradients`."""

    @staticmethod
    def forward(ctx: Any, call: HeadCall, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shapes = call, [None if each is None else each.shape for each in (hidden, weight, bias)]
        return DeferredLogits.of(call)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        gradients = ctx.call.gradients(None if ctx.call.is_zero(cotangent) else cotangent)
        given = zip(gradients, ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return (None, *(_in_shape(g, shape) if needed and g is not None else None for g, shape, needed in given))


def _in_shape(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A view only where it is needed: autograd adds other gradients of the same weight, as of tied embeddings, in place
    to a tensor that is none (torch 2.13)."""
    return gradient if gradient.shape == shape else gradient.view(shape)


class _GradientEdge(torch.autograd.Function):
    """A weight's place in the graph, in its shape but without its memory."""

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


def gradient_edge(weight: Tensor | None) -> Tensor | None:
    """Where the gradient of `weight` enters the graph. An engine that shards the weights has this one gathered now, and
    may not have when its gradient comes: the graph must not hold on to its memory."""
    return None if weight is None else _GradientEdge.apply(weight)


# ---- What stands for the logits ----


class DeferredLogits(Tensor):
    """Logits (..., v) without values: a tensor of the right shape, dtype, device and autograd node, whose memory is one
    NaN, for whoever reads it past the two methods below.

    Attributes:
        call: of the head that they come from.
        rows: which of its tokens they belong to, (...), integers.
        all_rows: these are all of its tokens, in their order and shape.
        transform: what the model did to the head's output.
    """

    call: HeadCall
    rows: Tensor
    all_rows: bool
    transform: LogitTransform

    @classmethod
    def of(cls, call: HeadCall) -> "DeferredLogits":
        """The head's output itself."""
        leading = call.shape[:-1]
        rows = torch.arange(leading.numel(), device=call.device).view(leading)
        return cls._new(call, rows, True, LogitTransform(), call.dtype)

    @classmethod
    def _new(
        cls, call: HeadCall, rows: Tensor, all_rows: bool, transform: LogitTransform, dtype: torch.dtype
    ) -> "DeferredLogits":
        memory = torch.full((), math.nan, dtype=dtype, device=call.device)
        z = memory.expand(*rows.shape, call.shape[-1]).as_subclass(cls)
        z.call, z.rows, z.all_rows, z.transform = call, rows, all_rows, transform
        return z

    def derived(self, function: Callable[[Tensor], Tensor], **changes: Any) -> "DeferredLogits":
        """`function` of these logits, deferred as well. changes: in the attributes, and in `dtype`."""
        fields = {name: getattr(self, name) for name in ("call", "rows", "all_rows", "transform", "dtype")}
        return _Derived.apply(self, function, lambda: DeferredLogits._new(**(fields | changes)))

    def in_memory(self, why: str) -> Tensor:
        """Their values (..., v), without a gradient. why: somebody needs them, for the log."""
        with torch.inference_mode(False), torch.no_grad():
            z = self.call.values(why)
            z = z if self.transform.before == 1.0 else z * self.transform.before
            if self.transform.tanh:
                z = z.tanh() * self.transform.after
            z = z if self.all_rows else z.flatten(0, -2)[self.rows]
            z = z.to(self.dtype)
        self.call.given.append(z)
        return z

    def _is_behind_known_nodes(self) -> bool:
        """Whether a gradient of these logits comes to their call as it is: not so where a function of somebody else's
        stands between, whose backward pass may do anything."""
        node = _past_torch_function(_GRAD_FN, self)
        function = getattr(node, "_forward_cls", None)
        return node is None or (function is not None and _leaves_gradients_alone(function.__module__))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            return _past_torch_function(function, *args, **kwargs)
        if function == _GRAD_FN and _leaves_gradients_alone(sys._getframe(1).f_globals.get("__name__")):
            return _past_torch_function(function, *args, **kwargs)
        if function == _GRAD_FN or function in _MEMORY:
            raise LogitsNeeded(f"asks for the logits' {_name(function)}")
        return cls._answered(function, args, kwargs)

    # Not to be traced: a function that torch.compile makes of this would leave the logits' gradient out (torch 2.13).
    @classmethod
    @torch.compiler.disable
    def _answered(cls, function: Any, args: tuple, kwargs: dict) -> Any:
        deferred = _DEFERRED.get(function)
        if deferred is not None and args and isinstance(args[0], cls) and args[0]._is_behind_known_nodes():
            result = deferred(*args, **kwargs) if _takes(deferred, args, kwargs) else NotImplemented
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
        """For code that calls torch from below Python, as autograd and TorchScript do."""
        z = args[0] if args else None
        if isinstance(z, cls) and function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls._new(z.call, z.rows, z.all_rows, z.transform, z.dtype)
        name = str(function)
        args, kwargs = tree_map_only(cls, lambda z: z.in_memory(f"{name} needs them"), (args, kwargs or {}))
        return function(*args, **kwargs)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    return getattr(function.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _leaves_gradients_alone(module: str | None) -> bool:
    """Whether code of `module` may stand between the logits and the loss: this package's, and that of engines, which
    follow the logits through the backward pass and change nothing."""
    return (module or "").partition(".")[0] in ("hf_fsam", "torch", "deepspeed", "accelerate")


def _takes(deferred: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function below knows all of these arguments."""
    try:
        inspect.signature(deferred).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _past_torch_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


class _Derived(torch.autograd.Function):
    """Deferred logits that are a function of others. A gradient with values comes here from an autograd.Function of
    somebody else's, which has read the logits in memory and knows nothing of deferring."""

    @staticmethod
    def forward(
        ctx: Any, z: DeferredLogits, function: Callable[[Tensor], Tensor], make: Callable[[], DeferredLogits]
    ) -> DeferredLogits:
        ctx.set_materialize_grads(False)
        ctx.z, ctx.function = z, function
        return make()  # here, where autograd gives it this node

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, None, None]:
        if cotangent is None:
            return None, None, None
        if ctx.z.call.is_zero(cotangent):
            return ctx.z.call.zero(ctx.z), None, None
        refuse_create_graph()
        values = ctx.z.in_memory("a gradient came back to them").detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.function(values)
        return *torch.autograd.grad(result, values, cotangent), None, None


class _Values(torch.autograd.Function):
    """Deferred logits → the same in memory."""

    @staticmethod
    def forward(ctx: Any, z: DeferredLogits, values: Tensor) -> Tensor:
        return values.detach()  # shares the version by which a change in place is seen

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


# ---- Functions whose result is deferred, too ----
#
# Each takes the arguments of torch's own, and returns NotImplemented where the result has to be in memory.


def _same(z: DeferredLogits) -> DeferredLogits:
    return z


def _detach(z: DeferredLogits) -> DeferredLogits:
    return _past_torch_function(Tensor.detach, z)


def _clone(z: DeferredLogits, **kwargs: Any) -> DeferredLogits:
    return z.derived(torch.clone)


def _to(z: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    (target,) = args if len(args) == 1 and not kwargs else (None,)
    if isinstance(target, torch.dtype) and target.is_floating_point:
        return z if target == z.dtype else z.derived(lambda values: values.to(target), dtype=target)
    if isinstance(target, torch.device | str) and torch.device(target) == z.device:
        return z
    return NotImplemented


def _view(z: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    rest = z.rows.numel() if all(size >= 0 for size in sizes[:-1]) else None
    keeps_vocabulary = sizes[-1:] == z.shape[-1:] or (sizes[-1:] == (-1,) and rest == torch.Size(sizes[:-1]).numel())
    if len(sizes) < 2 or not keeps_vocabulary:
        return NotImplemented
    return z.derived(lambda values: values.reshape(sizes), rows=z.rows.reshape(sizes[:-1]), all_rows=False)


def _flatten(z: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % z.ndim, end_dim % z.ndim
    if end == z.ndim - 1:
        return NotImplemented
    return z.derived(lambda values: values.flatten(start, end), rows=z.rows.flatten(start, end), all_rows=False)


def _getitem(z: DeferredLogits, index: Any) -> Any:
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or index.ndim >= z.ndim:
            return NotImplemented
        rows = z.rows[index]
    elif any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,))):
        return NotImplemented
    else:
        # The index is tried on the rows, repeated along a last dimension without a stride: where that dimension is
        # still there, still the last and still of its length, the index leaves the vocabulary alone.
        taken = z.rows.contiguous().unsqueeze(-1).expand(z.shape)[index]
        if taken.ndim < 2 or taken.shape[-1] != z.shape[-1] or taken.stride(-1) != 0:
            return NotImplemented
        rows = taken[..., 0]
    return z.derived(lambda values: values[index], rows=rows, all_rows=False)


def _times(z: DeferredLogits, factor: Any) -> Any:
    if not _number(factor):
        return NotImplemented
    return z.derived(lambda values: values * factor, transform=z.transform.scaled(factor))


def _divided(z: DeferredLogits, divisor: Any) -> Any:
    return _times(z, 1 / divisor) if _number(divisor) else NotImplemented


def _tanh(z: DeferredLogits) -> Any:
    if z.transform.tanh:
        return NotImplemented
    return z.derived(torch.tanh, transform=LogitTransform(z.transform.before, 1.0, tanh=True))


def _hook(z: DeferredLogits, hook: Callable) -> Any:
    """An engine's hook only wants to know when the backward pass comes here."""
    if _leaves_gradients_alone(getattr(hook, "__module__", None)):
        return _past_torch_function(Tensor.register_hook, z, hook)
    raise LogitsNeeded("puts a hook on the logits' gradient")


def _retain_grad(z: DeferredLogits) -> Any:
    raise LogitsNeeded("keeps the logits' gradient")


# ---- Functions that a fused head computes ----


def _log_sum_exp(z: DeferredLogits, dim: Any, keepdim: bool = False) -> Any:
    if dim not in (-1, z.ndim - 1):
        return NotImplemented
    result = z.call.log_sum_exp(z).view(z.rows.shape)
    return result.unsqueeze(-1) if keepdim else result


def leaving_out_is_free(device: torch.device) -> bool:
    """Whether tokens that do not count may be left out. On an accelerator the host would have to wait for it, to know
    how many tokens are left."""
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
        rows = None if z.all_rows else z.rows
        total = z.call.cross_entropy(z, target.masked_fill(~counts, 0), counts, rows, label_smoothing)
    return total / counts.sum() if reduction == "mean" else total


class DeferringLabelSmoother(LabelSmoother):
    """The Trainer's label smoother, written as the cross entropy with smoothed labels that it is, which a fused head
    knows how to compute."""

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
_GRAD_FN = next(iter(_getters("grad_fn")))
# What asks for the tensor's memory.
_MEMORY = {
    *_getters("data", "__cuda_array_interface__"),
    *(Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor.__dlpack__),
}
# What can be answered without values.
_METADATA = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse"),
    *_getters("requires_grad", "grad", "is_leaf", "is_nested", "_backward_hooks", "_version"),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.get_device),
    *(Tensor.requires_grad_, Tensor.is_inference, torch.numel, Tensor.__hash__),
}
