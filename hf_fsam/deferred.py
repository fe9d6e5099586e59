"""Logits that are not made until the loss says what it needs of them, which most often is nothing that takes them all.

A model's own forward pass and its own loss run as they are. Only its head's output is a :class:`DeferredLogits`, which
goes through scaling, capping, slicing and flattening, and meets a cross entropy or a log-sum-exp: those are computed
from the final hidden states (`hf_fsam.head`). Where a clean pass does anything else with it, that pass is made again,
and all later ones are made, with the logits in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from hf_fsam.head import CrossEntropySum, Edge, LogSumExp, Replayed, Squash, Statistic, compute_dtype, room

logger = logging.get_logger(__name__)


@dataclass
class Use:
    """What a loss took of one call of the head: a statistic of some of its tokens.

    Attributes:
        index: of the crossing of the boundary.
        rows: of which tokens, (n,).
    """

    index: int
    rows: Tensor
    statistic: Statistic


@dataclass
class HeadCall:
    """One call of the head in a clean pass."""

    uses: list[Use] = field(default_factory=list)


@dataclass
class KeptHead:
    """The head's weights as they are in the passes of a window, for later."""

    weight: Any
    bias: Tensor | None
    cotangents: "Shelf | None" = None


def weights_for_later(weight: Tensor, bias: Tensor | None, keeps: bool) -> tuple[Any, Tensor | None]:
    """W and b as they are now.

    keeps: a weight that is detached now stays as it is while the weights are at θ+ε. Where it does not, because weights
    are moved in place or gathered for a moment only, they are copied.
    """
    detached = (weight.detach(), None if bias is None else bias.detach())
    return detached if keeps else tuple(None if each is None else each.clone() for each in detached)  # type: ignore


class Shelf:
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


class FusedHead:
    """The head of a language model while its logits are deferred.

    Args:
        module: the head.
        keeps: see :func:`weights_for_later`.
        as_output: what to do to a tensor that takes the place of the module's output, (module, tensor).
    """

    def __init__(
        self,
        module: nn.Linear,
        keeps: bool = True,
        as_output: Callable[[nn.Module, Tensor], Tensor] = lambda module, tensor: tensor,
    ) -> None:
        self.module, self._keeps, self._as_output = module, keeps, as_output
        self._shelf = Shelf()
        self.off = False
        self.proven = False  # a loss has taken them deferred: what it raises later is not for that

    @contextmanager
    def deferring(self, call: Callable[[Tensor], Any]) -> Iterator[None]:
        """Inside, `call` of the final hidden states (..., d) is what the head returns."""
        plain = self.module.forward

        def forward(hidden: Tensor) -> Any:
            needed = hidden.requires_grad or self.module.weight.requires_grad
            return call(hidden) if needed and torch.is_grad_enabled() else plain(hidden)

        self.module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del self.module.__dict__["forward"]

    def as_output(self, tensor: Tensor) -> Tensor:
        return self._as_output(self.module, tensor)

    def keep(self) -> KeptHead:
        """A window begins."""
        self._shelf.clear()
        return KeptHead(*weights_for_later(self.module.weight, self.module.bias, self._keeps), self._shelf)

    def turn_off(self, why: str) -> None:
        if not self.off:
            self.off = True
            logger.warning(f"The fused head is off, and the logits are in memory: {why}.")


def fused_head(trainer: Any, module: nn.Module) -> FusedHead | None:
    """The fused head for the boundary `module` of the trainer's model. None, with a line in the log, where it has to be
    off; without one where `module` is not what makes a language model's logits."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    get = getattr(model, "get_output_embeddings", None)
    if get is None or get() is not module:
        return None
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    why = {
        f"the head is {type(module).__name__}, not a plain nn.Linear": not plain,
        "the head's forward is replaced": "forward" in module.__dict__,
        "compiled models can't defer them": bool(trainer.args.torch_compile)
        or any(getattr(trainer.model, name, None) is not None for name in ("_orig_mod", "_compiled_call_impl")),
    }
    for reason, holds in why.items():
        if holds:
            logger.warning(f"The fused head is off, and the logits are in memory: {reason}.")
            return None
    engine = trainer._fsam_engine
    return FusedHead(module, engine.keeps, engine.as_output)  # type: ignore[arg-type]


def edge(weight: Tensor | None, cut: bool = False) -> Tensor | None:
    """Where the gradient of `weight` goes in; nowhere if the graph is cut."""
    return None if weight is None else weight.detach() if cut else Edge.apply(weight)


class Source(Protocol):
    """Where deferred logits come from: one call of the head in one pass."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    crossed: tuple[Tensor, ...]

    def cross_entropy_sum(self, rows: Tensor, squash: Squash, targets: Tensor, smoothing: float) -> Tensor: ...

    def log_sum_exp(self, rows: Tensor, squash: Squash) -> Tensor: ...

    def logits(self, why: str) -> Tensor: ...


class _Pass:
    def __init__(self, head: FusedHead, hidden: Tensor) -> None:
        self._head, self._hidden = head, hidden
        self.shape = torch.Size((*hidden.shape[:-1], head.module.weight.shape[0]))
        self.dtype, self.device = compute_dtype(hidden), hidden.device
        self.crossed: tuple[Tensor, ...] = ()

    def _rows(self, rows: Tensor) -> Tensor:
        return self._hidden.flatten(0, -2).index_select(0, rows)


class RecordedPass(_Pass):
    """A call of the head whose cotangents are recorded.

    Args:
        kept: the head's weights as they are now.
        call: takes down what the loss uses; None where the cotangents are not for keeping.
        cross: tells the tape that a tensor crosses the boundary; returns the one to go on with.
        cut: the graph ends at the boundary.
    """

    def __init__(
        self,
        head: FusedHead,
        hidden: Tensor,
        kept: KeptHead,
        call: HeadCall | None,
        cross: Callable[[Tensor], tuple[int, Tensor]],
        cut: bool,
    ) -> None:
        super().__init__(head, hidden.detach() if cut else hidden)
        self._kept, self._call, self._cross, self._cut = kept, call, cross, cut
        self._edges = [edge(each, cut) for each in (head.module.weight, head.module.bias)]
        self.crossed = tuple(each for each in (self._hidden, *self._edges) if each is not None and each.requires_grad)

    def cross_entropy_sum(self, rows: Tensor, squash: Squash, targets: Tensor, smoothing: float) -> Tensor:
        return self._take(CrossEntropySum, rows, squash, targets, smoothing)

    def log_sum_exp(self, rows: Tensor, squash: Squash) -> Tensor:
        return self._take(LogSumExp, rows, squash)

    def _take(self, function: Any, rows: Tensor, *settings: Any) -> Tensor:
        if not torch.is_grad_enabled():
            # A metric, or a checkpoint that comes back for the gradient when it is too late to defer.
            self._head.turn_off("they are read where no gradient is recorded")
        hidden = self._rows(rows)
        statistic = Statistic(hidden.detach(), self._kept.weight, self._kept.bias, self.dtype, *settings)
        later = self._call is not None and not self._cut and torch.is_grad_enabled()
        if function is CrossEntropySum and later and self._kept.cotangents:
            statistic.kept = self._kept.cotangents.take(len(rows), self._kept.weight, self.dtype)
        taken = function.apply(hidden, *self._edges, statistic)
        index, taken = self._cross(taken if self._cut else self._head.as_output(taken))
        if self._call is not None:
            self._call.uses.append(Use(index, rows, statistic))
        return taken

    def logits(self, why: str) -> Tensor:
        """For the rest of this pass, which will be made again."""
        self._head.turn_off(why)
        with torch.enable_grad():
            return F.linear(self._hidden, self._kept.weight, self._kept.bias)


class ReplayedPass(_Pass):
    """The same call of the head in the second pass: the loss is given what it took in the first, and its gradient is
    Jᵀu with the recorded u. All of it is made here, in the head's forward pass, where its weights are at hand.

    Args:
        call: of the clean pass.
        cotangents: of the clean pass, by crossing; used up.
        replay: see :class:`Replayed`.
    """

    def __init__(
        self,
        head: FusedHead,
        hidden: Tensor,
        call: HeadCall,
        cotangents: dict[int, Tensor],
        replay: Any,
    ) -> None:
        super().__init__(head, hidden)
        self._left: list[tuple[int, Tensor]] = []
        weight, bias = head.module.weight, head.module.bias
        edges = edge(weight), edge(bias)
        for use in call.uses:
            upstream = cotangents.pop(use.index, None)
            value = use.statistic.value
            if upstream is not None:
                use.statistic.hidden = use.statistic.hidden.to(hidden.device)  # it may have waited on the host
                now = weight.detach(), None if bias is None else bias.detach()
                value = Replayed.apply(self._rows(use.rows), *edges, use.statistic, upstream, replay, now)
                value = head.as_output(value)
            self._left.append((len(use.rows), value))
        self.crossed = tuple(value for _, value in self._left)

    def cross_entropy_sum(self, rows: Tensor, squash: Squash, targets: Tensor, smoothing: float) -> Tensor:
        return self._given(rows, "a cross entropy")

    def log_sum_exp(self, rows: Tensor, squash: Squash) -> Tensor:
        return self._given(rows, "a log-sum-exp")

    def _given(self, rows: Tensor, what: str) -> Tensor:
        count, value = self._left.pop(0) if self._left else (0, rows)
        if count != len(rows):
            raise RuntimeError(
                f"the second pass took {what} of {len(rows)} tokens' logits where the first had {count}: both must "
                "compute the same function."
            )
        return value

    def logits(self, why: str) -> Tensor:
        """Their values, for a metric that the first pass had no part in."""
        self._head.turn_off(why)
        message = f"the second pass read the logits ({why}), the first did not: both must compute the same function"

        def refuse(gradient: Tensor) -> None:
            raise RuntimeError(f"{message}.")

        module, hidden = self._head.module, self._hidden.detach().requires_grad_()
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if type(weight) is not Tensor or weight.shape[0] != self.shape[-1]:  # sharded, and no longer gathered
            raise RuntimeError(f"{message}, or set fsam_fused_head=False.")
        with torch.enable_grad():
            z = F.linear(hidden, weight, bias)
        z.register_hook(refuse)
        return z


@dataclass(repr=False, eq=False)
class DeferredLogits:
    """Stands for logits (..., v), and answers to what torch functions ask of a tensor.

    All of it is in fields, since those who wrap a model look through its output for tensors: DDP, to know which weights
    a backward pass will not reach, and FSDP, to be told when it begins. They find `crossed`.

    Attributes:
        source: one call of the head.
        rows: of which of its tokens, (...).
        squash: on the way from the head.
        dtype: in which the logits were asked for.
        whole: `rows` are all tokens in their order and shape.
        crossed: tensors that the backward pass will come through.
    """

    source: Source
    rows: Tensor
    squash: Squash
    dtype: torch.dtype
    whole: bool
    crossed: tuple[Tensor, ...]

    @classmethod
    def of(cls, source: Source) -> "DeferredLogits":
        leading = source.shape[:-1]
        rows = torch.arange(leading.numel(), device=source.device).view(leading)
        return cls(source, rows, Squash(), source.dtype, True, source.crossed)

    def _with(self, **changes: Any) -> "DeferredLogits":
        return replace(self, whole=self.whole and "rows" not in changes, **changes)

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.source.shape[-1]))

    @property
    def ndim(self) -> int:
        return self.rows.ndim + 1

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    # ---- What keeps them deferred ----

    def contiguous(self) -> "DeferredLogits":
        return self

    def float(self) -> "DeferredLogits":
        return self._with(dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        (target,) = args if len(args) == 1 and not kwargs else (None,)
        if isinstance(target, torch.dtype) and target.is_floating_point:
            return self._with(dtype=target)
        if isinstance(target, torch.device | str) and torch.device(target) == self.device:
            return self
        return self._tensor("to").to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        rest = self.rows.numel() if all(size >= 0 for size in sizes[:-1]) else None
        if len(sizes) > 1 and (sizes[-1] == self.shape[-1] or (sizes[-1] == -1 and rest == _product(sizes[:-1]))):
            return self._with(rows=self.rows.reshape(sizes[:-1]))
        return self._tensor("view").view(*shape)

    reshape = view

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor):
            if index.dtype == torch.bool and index.ndim < self.ndim:
                return self._with(rows=self.rows[index])
        elif not any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,))):
            # The vocabulary stays whole if its dimension, which alone has no stride, is there as it was.
            taken = self.rows.contiguous().unsqueeze(-1).expand(self.shape)[index]
            if taken.ndim > 1 and taken.shape[-1] == self.shape[-1] and taken.stride(-1) == 0:
                return self._with(rows=taken[..., 0])
        return self._tensor("indexing")[index]

    def __mul__(self, factor: Any) -> Any:
        if _number(factor):
            return self._with(squash=self.squash.scaled(factor))
        return self._tensor("a product with a tensor") * factor

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if _number(divisor):
            return self._with(squash=self.squash.scaled(1 / divisor))
        return self._tensor("a quotient with a tensor") / divisor

    div = __truediv__

    def tanh(self) -> Any:
        if self.squash.tanh:
            return self._tensor("a second tanh").tanh()
        return self._with(squash=Squash(self.squash.before, 1.0, tanh=True))

    # ---- Where they end ----

    def logsumexp(self, dim: Any, keepdim: bool = False) -> Tensor:
        if dim not in (-1, self.ndim - 1):
            return self._tensor("logsumexp over another dimension").logsumexp(dim, keepdim)
        result = self.source.log_sum_exp(self.rows.flatten(), self.squash).view(self.rows.shape)
        return result.unsqueeze(-1) if keepdim else result

    def _cross_entropy(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: Any = 0.0,
    ) -> Tensor:
        legacy = weight is not None or size_average is not None or reduce is not None
        if legacy or reduction == "none" or self.ndim != 2 or not isinstance(target, Tensor) or target.ndim != 1:
            return F.cross_entropy(
                self._tensor("a cross entropy with weights, without a sum, or of other targets than class numbers"),
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        counted = target != ignore_index
        result = self.source.cross_entropy_sum(self.rows[counted], self.squash, target[counted], label_smoothing)
        return result / counted.sum() if reduction == "mean" else result

    def _tensor(self, why: str) -> Tensor:
        """The logits after all."""
        z = self.source.logits(f"{why} needs them")
        z = z if self.squash.before == 1.0 else z * self.squash.before
        if self.squash.tanh:
            z = z.tanh() * self.squash.after
        z = z if self.whole else z.flatten(0, -2)[self.rows]
        return z.to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"DeferredLogits has no attribute {name!r}")
        return getattr(self._tensor(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        known = _KNOWN.get(function)
        if known is not None and args and isinstance(args[0], cls):
            return known(*args, **kwargs)
        if function in (Tensor.mul, Tensor.__mul__, torch.mul) and len(args) == 2 and not kwargs:
            return args[1] * args[0]
        name = getattr(function, "__name__", str(function))
        args, kwargs = tree_map_only(cls, lambda z: z._tensor(name), (args, kwargs))
        return function(*args, **kwargs)


_KNOWN: dict[Any, Callable] = {
    F.cross_entropy: DeferredLogits._cross_entropy,
    torch.logsumexp: DeferredLogits.logsumexp,
    torch.tanh: DeferredLogits.tanh,
    F.tanh: DeferredLogits.tanh,
    torch.mul: DeferredLogits.__mul__,
    torch.div: DeferredLogits.__truediv__,
    torch.reshape: DeferredLogits.reshape,
}


def _as_tensor(name: str) -> Callable:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self._tensor(name), name)(*args)

    return method


# Python looks operators up on the class, past __getattr__.
for _name in [
    "add",
    "radd",
    "iadd",
    "sub",
    "rsub",
    "isub",
    "imul",
    "itruediv",
    "ipow",
    "rtruediv",
    "pow",
    "rpow",
    "neg",
    "abs",
    "matmul",
    "rmatmul",
    "len",
    "iter",
    "setitem",
    "array",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]:
    setattr(DeferredLogits, f"__{_name}__", _as_tensor(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


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


def _product(sizes: tuple[int, ...]) -> int:
    return torch.Size(sizes).numel()
