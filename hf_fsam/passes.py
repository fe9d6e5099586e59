"""The two passes of a split step, and the boundary between function and loss that both cross.

Notation of the paper (arXiv 2502.02407): logits z = F_θ(x), loss ℓ(z, y), cotangent u(θ) = ∂ℓ/∂z at z = F_θ(x). The
boundary is the module whose output is z. A :class:`CleanPass` records what comes back there, a :class:`SecondPass` has
it come back again in place of its own. That is all that turns a step of SAM into one of Functional-SAM; nobody
downstream of the boundary has to know.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsam.cleanup import Cleanup
from hf_fsam.heads.deferred_logits import DeferredLogits
from hf_fsam.heads.find import IDENTITY
from hf_fsam.heads.fused_head import SAME_FUNCTION, CleanCall, FusedHead, KeptHead, SecondCall, call_head, kept_head
from hf_fsam.heads.fused_loss import FusedLoss
from hf_fsam.heads.trl import LogProbabilities, intercepted

CALLED_TWICE = (
    "compute_loss was called twice in one training_step: hf_fsam splits one forward and backward pass a step. Join the "
    "batches, or set fsam_variant='none'."
)


@dataclass
class Crossing:
    """What crossed the boundary at one place of the forward pass, and what came back there.

    Attributes:
        cotangents: ∂(scaled loss)/∂z in the shape and dtype of z, e.g. (batch, length, vocabulary): one for each time
            that a backward pass came through, none where the loss did not depend on the values of z.
        statistics: what the loss took of a fused head in place of z, in order, each with what came back to it.
        read: the values of deferred logits were asked for.
        early: how many backward passes came through before `compute_loss` had returned, as those of a loss that
            differentiates by itself do. The loss scale is not on what they brought.
    """

    cotangents: list[Tensor] = field(default_factory=list)
    statistics: list[FusedLoss] = field(default_factory=list)
    read: bool = False
    early: int = 0

    @property
    def reached(self) -> bool:
        return bool(self.cotangents) or any(statistic.upstream is not None for statistic in self.statistics)


class _Pass:
    """One forward and backward pass. Its doors: `logits`, `head`, `log_probabilities`, `see_loss`.

    Attributes:
        fused: whether the head's logits are deferred.
        backward_ended: the backward pass of the loss came to its end.
        ended: so did all that belongs to the pass.
    """

    def __init__(self) -> None:
        self.fused = False
        self.backward_ended = False
        self.ended = False
        self._loss: Tensor | None = None
        self._scale: Tensor | None = None

    @property
    def in_compute_loss(self) -> bool:
        return self._loss is None

    @property
    def loss(self) -> Tensor:
        """The value that `compute_loss` returned, shape ()."""
        return self._seen(self._loss)

    @property
    def scale(self) -> Tensor:
        """∂(what was back-propagated)/∂loss, shape (): the factor that loss scaling and the division by the number of
        accumulated micro-batches put on the gradient."""
        return self._seen(self._scale)

    def see_loss(self, loss: Tensor) -> Tensor:
        """Pass what `compute_loss` returned through here; returns the loss to go on with.

        Raises:
            RuntimeError: it is the pass's second.
        """
        if self._loss is not None:
            raise RuntimeError(CALLED_TWICE)
        self._loss = loss.detach().clone()
        return _Loss.apply(loss, self)

    def value_of(self, loss: Tensor) -> Tensor:
        """What the caller is told the loss is."""
        return loss.clone()

    def see_scale(self, scale: Tensor) -> None:
        self._scale = scale

        def ended() -> None:
            self.backward_ended = True

        # Called where the backward pass ends, and not where it raises (torch 2.13; FSDP2 relies on it, too).
        torch.autograd.Variable._execution_engine.queue_callback(ended)

    @property
    def computes_its_loss(self) -> bool:
        """Whether `loss` is that at the weights of this pass, and not put together from the clean one's."""
        return True

    @property
    def finite(self) -> Tensor:
        """Whether what the pass computed is a number, shape (), bool."""
        return self.loss.isfinite()

    @property
    def interrupted(self) -> bool:
        """Its backward pass began, and raised."""
        return self._scale is not None and not self.backward_ended

    def _seen(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(
                "the training_step below FSAMMixin did not back-propagate the loss of compute_loss, so the gradient "
                "could not be split. Let it call self.compute_loss, or set fsam_variant='none'."
            )
        return tensor


class _Loss(torch.autograd.Function):
    """The loss on its way to the caller. Its backward pass comes before every hook on the loss itself."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, one_pass: _Pass) -> Tensor:
        ctx.one_pass = one_pass
        return one_pass.value_of(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.one_pass.see_scale(upstream)
        return upstream, None


class CleanPass(_Pass):
    """Records what comes back to the boundary.

    Args:
        keep: what comes back is kept for a second pass.
        cut: the graph ends at the boundary, and the backward pass is :meth:`differentiate`.
        kept: one list for all passes at the same weights, in which a fused head keeps its own.

    Attributes:
        crossings: in the order of the forward pass; none without `keep`.
        crossed: how many there were.
        nodes: the autograd nodes of what crossed, while the pass lasts.
    """

    def __init__(self, *, keep: bool = True, cut: bool = False, kept: list[KeptHead] | None = None) -> None:
        super().__init__()
        self.keep, self.cut = keep, cut
        self.crossings: list[Crossing] = []
        self.crossed = 0
        self.nodes: set[Any] = set()
        self._kept = [] if kept is None else kept
        self._leaves: list[Tensor] = []

    # ---- Doors ----

    def logits(self, z: Tensor) -> Tensor:
        crossing = self._cross()
        self.nodes.add(z.grad_fn)
        if self.cut:
            leaf = self._leaf(z)
            leaf.register_hook(partial(self.came_back, crossing))
            return _Through.apply(leaf)
        if self.keep:
            z.register_hook(partial(self.came_back, crossing))
        return z

    def head(self, head: FusedHead, hidden: Tensor) -> Tensor:
        if not self._kept:
            self._kept.append(head.keep())
        call = CleanCall(head, hidden, self._kept[0], self._cross(), self)
        if self.cut:
            return call_head(call, self._leaf(hidden), None, None)
        z = call_head(call, hidden, head.module.weight, head.module.bias)
        self.nodes.add(z.grad_fn)
        return z

    def log_probabilities(self, call: LogProbabilities, detached_weights_stay: bool) -> tuple:
        """See :mod:`hf_fsam.heads.trl`."""
        if not self._kept:
            self._kept.append(kept_head(call.weight, call.bias, detached_weights_stay))
        crossing = self._cross()
        statistic, (log_p, *others) = call.statistic(self._kept[0].weight, self._kept[0].bias)
        crossing.statistics.append(statistic)
        self.nodes.add(log_p.grad_fn)

        def came_back(upstream: Tensor) -> None:
            statistic.upstream = upstream.detach().clone()
            crossing.early += self.in_compute_loss

        if self.cut:
            leaf = self._leaf(log_p)
            leaf.register_hook(came_back)
            return _Through.apply(leaf), *others
        if self.keep:
            log_p.register_hook(came_back)
        return log_p, *others

    # ---- What comes back ----

    def came_back(self, crossing: Crossing, cotangent: Tensor) -> None:
        """∂(scaled loss)/∂z has arrived."""
        crossing.early += self.in_compute_loss
        if self.keep:
            # Two crossings can be handed one and the same tensor (z₁ + z₂), and a second pass scales in place.
            others = [other.data_ptr() for each in self.crossings for other in each.cotangents]
            cotangent = cotangent.detach()
            crossing.cotangents.append(cotangent.clone() if cotangent.data_ptr() in others else cotangent)

    def differentiate(self, loss: Tensor) -> None:
        """The backward pass where the graph is cut: to the boundary, past which no weight is touched."""
        if self._leaves:  # else `finish` says what is wrong
            torch.autograd.grad(loss, self._leaves, allow_unused=True)

    def finish(self, name: str) -> None:
        """
        Raises:
            ValueError: nothing came back to the boundary `name`.
        """
        self.nodes.clear()
        self._leaves.clear()
        if self.keep and not any(crossing.reached for crossing in self.crossings):
            raise ValueError(
                f"in this batch the boundary {name!r} was never crossed on the way from the loss to the weights, "
                "so there is no cotangent to keep: name the module that makes the logits with fsam_boundary. (A model "
                "with other heads for some batches needs one module that all go through, or fsam_variant='sam'.) "
                f"{IDENTITY}."
            )

    def offload(self) -> None:
        """Final hidden states to the host, until a second pass takes them."""
        for crossing in self.crossings:
            for statistic in crossing.statistics:
                statistic.hidden = _on_host(statistic.hidden)

    def _cross(self) -> Crossing:
        crossing = Crossing()
        self.crossed += 1
        if self.keep:
            self.crossings.append(crossing)
        return crossing

    def _leaf(self, tensor: Tensor) -> Tensor:
        self._leaves.append(tensor.detach().requires_grad_())
        return self._leaves[-1]


class SecondPass(_Pass):
    """In this pass the loss has the value that it had in `clean`, and the backward pass meets what came back in
    `cotangents` at the boundary in place of its own (its own where `cotangents` is None: that is SAM).

    What came back is scaled to what this pass puts on its loss, so loss scalers and gradient accumulation need not be
    known here; and it is used up.
    """

    def __init__(self, clean: CleanPass, cotangents: CleanPass | None) -> None:
        super().__init__()
        self.clean = clean
        self.fused = cotangents is not None and cotangents.fused
        self._cotangents = cotangents
        self._crossings = [] if cotangents is None else list(cotangents.crossings)
        self._hooked: list[Crossing] = []
        self._products: list[tuple[Tensor | None, Tensor]] = []

    def value_of(self, loss: Tensor) -> Tensor:
        return self.clean.loss.clone()

    def ratio(self, early: int) -> Tensor | float:
        """Of the loss scale in this pass to that in the one which recorded; known when the backward pass begins.
        early: see :class:`Crossing`."""
        if early or self._cotangents is None:
            return 1.0
        return self.scale / self._cotangents.scale

    # ---- Doors ----

    def logits(self, z: Tensor) -> Tensor:
        if self._cotangents is not None:
            crossing = self._next()
            self._hooked.append(crossing)
            z.register_hook(partial(self._swap, crossing))
        return z

    def head(self, head: FusedHead, hidden: Tensor) -> Tensor:
        call = SecondCall(head, hidden, self._next(), self)
        return call_head(call, hidden, head.module.weight, head.module.bias)

    def log_probabilities(self, call: LogProbabilities, detached_weights_stay: bool) -> tuple:
        if self._cotangents is None:
            return call.made()
        crossing = self._next()
        if not crossing.reached:
            raise RuntimeError(
                f"the second pass called TRL's fused head where the first did not, or for nothing: {SAME_FUNCTION}"
            )
        return call.replayed(crossing.statistics[0], self.see_products, partial(self.ratio, crossing.early))

    def see_products(self, before: Tensor | None, after: Tensor) -> None:
        """⟨u, a⟩, None where it was not computed, and ⟨u, a'⟩ of one crossing, shape ()."""
        self._products.append((before, after))

    @property
    def linear_loss_change(self) -> Tensor | None:
        """⟨u, a'⟩ − ⟨u, a⟩ for the cotangent u and the head's output a in the clean pass and a' in this one, shape (),
        in the units of u; None where that is not known."""
        changes = [None if before is None else after - before for before, after in self._products]
        known = [change for change in changes if change is not None]
        return torch.stack(known).sum() if known and len(known) == len(changes) else None

    @property
    def computes_its_loss(self) -> bool:
        return not self._products

    @property
    def finite(self) -> Tensor:
        if self.computes_its_loss:
            return super().finite
        return torch.stack([after for _, after in self._products]).isfinite().all()

    # ---- What comes back ----

    def _next(self) -> Crossing:
        if not self._crossings:
            return Crossing()  # whoever comes back to it is told that there was none
        return self._crossings.pop(0)

    def _swap(self, crossing: Crossing, own: Tensor) -> Tensor:
        recorded = crossing.cotangents.pop(0) if crossing.cotangents else None
        if recorded is None or recorded.shape != own.shape:
            raise RuntimeError(
                f"the second pass crossed the boundary with a tensor {tuple(own.shape)} where the first had "
                f"{'none' if recorded is None else tuple(recorded.shape)}: {SAME_FUNCTION}"
            )
        ratio = self.ratio(crossing.early)
        crossing.early = max(0, crossing.early - 1)
        return recorded.mul_(ratio) if recorded.is_contiguous() else recorded * ratio

    def finish(self, name: str) -> None:
        """
        Raises:
            RuntimeError: the two passes crossed the boundary differently.
        """
        if not self.backward_ended:  # whoever called is told by `loss` or `scale`, or has seen it raise
            return
        left = sum(crossing.reached for crossing in self._crossings) + sum(len(c.cotangents) for c in self._hooked)
        if left:
            raise RuntimeError(f"{left} recorded cotangents met no tensor in the second pass: {SAME_FUNCTION}")


class Boundary:
    """A forward hook on the boundary that does nothing except inside :meth:`running`."""

    def __init__(self, cleanup: Cleanup) -> None:
        self._cleanup = cleanup
        self.name = ""
        self.module: nn.Module | None = None
        self._head: FusedHead | None = None
        self._detached_weights_stay, self._own_forward = True, False
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._pass: CleanPass | SecondPass | None = None

    @property
    def head(self) -> FusedHead | None:
        """The boundary while its logits are deferred."""
        return None if self._head is None or self._head.off else self._head

    def attach(
        self,
        name: str,
        module: nn.Module,
        head: FusedHead | None = None,
        detached_weights_stay: bool = True,
        compiled: bool = False,
    ) -> None:
        """Put the hook on the boundary `module`. It stays between steps: a hook that comes and goes would make
        torch.compile compile anew each time.

        Args:
            head: the same module, where its logits can be deferred.
            detached_weights_stay: see :func:`hf_fsam.heads.fused_head.kept_head`.
            compiled: torch.compile runs the model. What it has compiled for a model of the class without the hook would
                pass the hook by: it does not look at hooks (torch 2.13), but whether `forward` is the class's it does.
        """
        self.name, self.module, self._head = name, module, head
        self._detached_weights_stay = detached_weights_stay
        self._own_forward = compiled and "forward" not in module.__dict__
        if self._own_forward:
            module.__dict__["forward"] = MethodType(type(module).forward, module)
        self._handle = module.register_forward_hook(_Hook(self._see_output))

    @property
    def attached(self) -> bool:
        return self._handle is not None

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self.module is not None and self._own_forward:
            self.module.__dict__.pop("forward", None)
        self._handle = self.module = None

    @contextmanager
    def running(self, one_pass: CleanPass | SecondPass) -> Iterator[None]:
        """The pass inside crosses the boundary through the doors of `one_pass`."""
        if isinstance(one_pass, CleanPass):
            one_pass.fused = self.head is not None
        head = self._head if one_pass.fused else None
        log_probabilities = partial(one_pass.log_probabilities, detached_weights_stay=self._detached_weights_stay)

        def undo() -> None:
            self._pass, one_pass.ended = None, True
            if head is not None:
                head.undefer()

        of_trl = nullcontext() if self.module is None else intercepted(log_probabilities, self._cleanup)
        with self._cleanup.after(undo), of_trl:
            self._pass = one_pass
            if head is not None:
                head.defer(partial(one_pass.head, head))
            yield
        one_pass.finish(self.name)

    def _see_output(self, output: Any) -> Tensor | None:
        if self._pass is None or not torch.is_grad_enabled() or isinstance(output, DeferredLogits):
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"fsam_boundary: module {self.name!r} returns {type(output).__name__}, but the boundary must return "
                f"one tensor, the logits. Name the module that makes them. {IDENTITY}."
            )
        return self._pass.logits(output) if output.requires_grad else None


class _Hook:
    """A forward hook that a callback may copy or pickle with the model: the copy's does nothing."""

    def __init__(self, see: Callable[[Any], Tensor | None]) -> None:
        self.see = see

    # Back-propagation hooks with side effects are not to be traced: the compiled graph breaks here, once.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        return self.see(output)

    def __reduce__(self) -> tuple:
        # Takes three arguments, returns None, and loads where this package is not installed.
        return getattr, (nullcontext(), "__exit__")


def _on_host(tensor: Tensor) -> Tensor:
    """Into pinned memory, for which the host need not wait."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Through(torch.autograd.Function):
    """A leaf as what may be changed in place, as the outputs of a head may."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def weights_past_boundary(loss: Tensor, nodes: set[Any], names: dict[Tensor, str]) -> list[str]:
    """Names of the weights that reach `loss` on a way that does not cross the boundary, at `nodes`.

    Their gradient on that way (a router's balancing loss, say) is not split: both factors are taken at θ+ε.
    """
    found: set[str] = set()
    seen, stack = set(nodes), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable in names:
            found.add(names[variable])
        stack.extend(parent for parent, _ in node.next_functions)
    return sorted(found)
