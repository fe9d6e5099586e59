"""The boundary between function and loss: record its cotangents in one pass, replay them in another.

Notation of the paper (arXiv 2502.02407): logits z = F_θ(x), loss ℓ(z, y), cotangent u(θ) = ∂ℓ/∂z at z = F_θ(x). The
boundary is the module whose output is z. Replacing u on its way back is all that turns a step of SAM into one of
Functional-SAM; nobody downstream of it has to know.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsam.deferred import (
    DeferredLogits,
    FusedHead,
    HeadCall,
    KeptHead,
    RecordedPass,
    ReplayedPass,
    weights_for_later,
)
from hf_fsam.head import Statistic
from hf_fsam.trl import fused_head_of_trl, log_probabilities, replayed_log_probabilities


@dataclass
class Recording:
    """What one forward and backward pass leaves behind.

    Attributes:
        cotangents: ∂(scale · loss)/∂z for every tensor z that crossed the boundary, by the order of the forward pass;
            each in the shape and dtype of its z, e.g. (batch, length, vocabulary). Where a fused head made no logits, z
            is what the loss took of them, e.g. their cross entropy.
        calls: of the fused head; None where it is off.
        statistics: of TRL's fused head, by crossing.
        fused: this pass, a replay, computed no loss of its own.
        rise: ⟨u, a'⟩ − ⟨u, a⟩ for the cotangent u and the head's output a in the clean pass and a' in this one, a
            replay, in the units of u; None where that is not known.
        crossings: how many tensors crossed the boundary in the forward pass.
        nodes: the autograd nodes of those tensors, while the pass lasts.
        leaves: what takes the place of those tensors where the graph is cut at the boundary, by crossing.
    """

    cotangents: dict[int, Tensor] = field(default_factory=dict)
    calls: list[HeadCall] | None = None
    statistics: dict[int, Statistic] = field(default_factory=dict)
    fused: bool = False
    rise: Tensor | None = None
    crossings: int = 0
    nodes: set[Any] = field(default_factory=set)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    _loss: Tensor | None = None
    _scale: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The value that `compute_loss` returned, shape ()."""
        return self._seen(self._loss)

    @property
    def scale(self) -> Tensor:
        """∂(what was back-propagated)/∂loss, shape (): the factor that loss scaling and the division by the number of
        accumulated micro-batches put on the gradient."""
        return self._seen(self._scale)

    def keep(self, index: int, cotangent: Tensor) -> None:
        # Two crossings can be handed one and the same tensor (z₁ + z₂), and replaying scales in place.
        shared = any(cotangent.data_ptr() == other.data_ptr() for other in self.cotangents.values())
        self.cotangents[index] = cotangent.clone() if shared else cotangent

    def differentiate(self, loss: Tensor) -> None:
        """The backward pass where the graph is cut: to the boundary, past which no weight is touched."""
        gradients = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        for index, gradient in zip(self.leaves, gradients, strict=True):
            if gradient is not None:
                self.keep(index, gradient)
        self.leaves.clear()

    def offload(self) -> None:
        """Final hidden states to the host, until they are replayed."""
        uses = [use.statistic for call in self.calls or () for use in call.uses]
        for statistic in (*uses, *self.statistics.values()):
            if statistic is not None:
                statistic.hidden = statistic.hidden.cpu()

    def see_loss(self, loss: Tensor) -> None:
        if self._loss is not None:
            raise RuntimeError(
                "compute_loss was called twice in one training_step: hf_fsam splits one forward and backward pass a "
                "step. Join the batches, or set fsam_variant='none'."
            )
        self._loss = loss.detach().clone()
        if loss.requires_grad:
            loss.register_hook(self._see_scale)

    def _see_scale(self, gradient: Tensor) -> None:
        self._scale = gradient

    def _seen(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(
                "the training_step below FSAMMixin did not back-propagate the loss of compute_loss, so the gradient "
                "could not be split. Let it call self.compute_loss, or set fsam_variant='none'."
            )
        return tensor


@dataclass
class _Replay:
    """A pass that takes over the cotangents of another one."""

    replayed: Recording
    recorded: Recording

    @property
    def ratio(self) -> Tensor:
        """Of what the pass puts on its loss to what the other did; known when its backward pass begins."""
        return self.replayed.scale / self.recorded.scale

    def rises(self, rise: Tensor | None) -> None:
        before, self.replayed.fused = (self.replayed.rise, True) if self.replayed.fused else (0, True)
        self.replayed.rise = None if rise is None or before is None else before + rise


class Tape:
    """A forward hook on the boundary that does nothing except inside :meth:`record` and :meth:`replay`."""

    def __init__(self) -> None:
        self.name = ""
        self._head: FusedHead | None = None
        self._keeps = True
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._on_output: Callable[[Tensor], Tensor] | None = None
        self._on_loss: Callable[[Tensor], Tensor] | None = None

    @property
    def attached(self) -> bool:
        return self._handle is not None

    @property
    def head(self) -> FusedHead | None:
        """The boundary while its logits are deferred."""
        return None if self._head is None or self._head.off else self._head

    def attach(self, name: str, module: nn.Module, head: FusedHead | None = None, keeps: bool = True) -> None:
        """Put the hook on the boundary `module`. It stays between steps: a hook that comes and goes would make
        torch.compile compile anew each time. `head`: the same module, where its logits can be deferred. `keeps`: see
        :func:`weights_for_later`."""
        self.name, self._head, self._keeps = name, head, keeps
        self._handle = module.register_forward_hook(_BoundaryHook(self._see_output))

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def see_loss(self, loss: Tensor) -> Tensor:
        """Pass the loss that `compute_loss` returns through here; hands back the loss to go on with."""
        return loss if self._on_loss is None else self._on_loss(loss)

    @contextmanager
    def record(self, *, keep: bool, cut: bool = False, kept: list | None = None) -> Iterator[Recording]:
        """Record the pass inside. `keep`: its cotangents too. `cut`: the graph ends at the boundary, and the backward
        pass is :meth:`Recording.differentiate`. `kept`: one list for all passes at the same weights, in which a fused
        head keeps its own."""
        recording = Recording()
        kept = [] if kept is None else kept

        def cross(z: Tensor) -> tuple[int, Tensor]:
            index = recording.crossings
            recording.crossings += 1
            if not torch.is_grad_enabled():  # a metric's
                return index, z
            recording.nodes.add(z.grad_fn)
            if cut:
                recording.leaves[index] = z.detach().requires_grad_()
                z = _Through.apply(recording.leaves[index])
            elif keep:
                z.register_hook(partial(recording.keep, index))
            return index, z

        def defer(head: FusedHead, hidden: Tensor) -> DeferredLogits:
            if not kept:
                kept.append(head.keep())
            call = HeadCall() if keep else None
            if call is not None and recording.calls is not None:
                recording.calls.append(call)
            return DeferredLogits.of(RecordedPass(head, hidden, kept[0], call, cross, cut))

        def of_trl(apply: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple:
            if not kept:
                kept.append(KeptHead(*weights_for_later(weight, bias, self._keeps)))
            statistic, (log_p, *others) = log_probabilities(
                apply, (kept[0].weight, kept[0].bias), hidden, weight, bias, *rest
            )
            index, log_p = cross(log_p)
            if keep:
                recording.statistics[index] = statistic
            return (log_p, *others)

        def on_loss(loss: Tensor) -> Tensor:
            recording.see_loss(loss)
            return loss

        head = self.head
        recording.calls = None if head is None else []
        with self._session(lambda z: cross(z)[1], on_loss, None if head is None else partial(defer, head), of_trl):
            yield recording
        recording.nodes.clear()
        if keep and not recording.cotangents:
            raise ValueError(
                f"in this batch the boundary {self.name!r} was never crossed on the way from the loss to the weights, "
                "so there is no cotangent to keep: name the module that makes the logits with fsam_boundary. (A model "
                "with other heads for some batches needs one module that all go through, or fsam_variant='sam'.)"
            )

    @contextmanager
    def replay(self, clean: Recording, cotangents: Recording | None) -> Iterator[Recording]:
        """In the pass inside, the loss has the value of `clean`, and the backward pass meets `cotangents` at the
        boundary in place of its own (its own where `cotangents` is None: that is SAM).

        The cotangents are scaled to what the pass itself puts on its loss, so loss scalers and gradient accumulation
        need not be known here, and are used up.

        Raises:
            RuntimeError: the two passes crossed the boundary differently.
        """
        replayed = Recording()
        waiting = {} if cotangents is None else cotangents.cotangents
        replay = _Replay(replayed, clean if cotangents is None else cotangents)

        def swap(index: int, own: Tensor) -> Tensor:
            recorded = waiting.pop(index, None)
            if recorded is None or recorded.shape != own.shape:
                raise RuntimeError(
                    f"the second pass crossed the boundary with a tensor {tuple(own.shape)} where the first had "
                    f"{'none' if recorded is None else tuple(recorded.shape)}: both must compute the same function."
                )
            ratio = replay.ratio
            return recorded.mul_(ratio) if recorded.is_contiguous() else recorded * ratio

        def on_output(z: Tensor) -> Tensor:
            if cotangents is not None:
                z.register_hook(partial(swap, replayed.crossings))
            replayed.crossings += 1
            return z

        def defer(head: FusedHead, calls: Iterator[HeadCall], hidden: Tensor) -> DeferredLogits:
            return DeferredLogits.of(ReplayedPass(head, hidden, next(calls, HeadCall()), waiting, replay))

        def on_loss(loss: Tensor) -> Tensor:
            replayed.see_loss(loss)
            return _WithValue.apply(loss, clean.loss)

        def of_trl(apply: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple:
            if cotangents is None:
                return apply(hidden, weight, bias, *rest)
            index, upstream = replayed.crossings, waiting.pop(replayed.crossings, None)
            replayed.crossings += 1
            statistic = cotangents.statistics.get(index)
            if statistic is None or upstream is None:
                raise RuntimeError("the second pass called TRL's fused head where the first did not, or for nothing.")
            statistic.hidden = statistic.hidden.to(hidden.device)  # it may have waited on the host
            return replayed_log_probabilities(statistic, upstream, replay, hidden, weight, bias)

        deferring = None
        if self._head is not None and cotangents is not None and cotangents.calls is not None:
            deferring = partial(defer, self._head, iter(cotangents.calls))
        with self._session(on_output, on_loss, deferring, of_trl):
            yield replayed
        if waiting:
            raise RuntimeError(
                f"{len(waiting)} recorded cotangents met no tensor in the second pass: both passes must "
                "compute the same function."
            )

    @contextmanager
    def _session(
        self, on_output: Callable, on_loss: Callable, defer: Callable | None, of_trl: Callable
    ) -> Iterator[None]:
        self._on_output, self._on_loss = on_output, on_loss
        deferring = nullcontext() if defer is None or self._head is None else self._head.deferring(defer)
        try:
            with deferring, fused_head_of_trl(of_trl) if self.attached else nullcontext():
                yield
        finally:
            self._on_output = self._on_loss = None

    def _see_output(self, output: Any) -> Tensor | None:
        if self._on_output is None or not torch.is_grad_enabled() or isinstance(output, DeferredLogits):
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"fsam_boundary: module {self.name!r} returns {type(output).__name__}, but the boundary must return "
                "one tensor, the logits. Name the module that makes them."
            )
        return self._on_output(output) if output.requires_grad else None


class _BoundaryHook:
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


class _Through(torch.autograd.Function):
    """A leaf as what may be changed in place, as the outputs of a head may."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _WithValue(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, differentiated: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def weights_past_boundary(loss: Tensor, recording: Recording, names: dict[Tensor, str]) -> list[str]:
    """Names of the weights that reach `loss` on a way that does not cross the boundary.

    Their gradient on that way (a router's balancing loss, say) is not split: both factors are taken at θ+ε.
    """
    found: set[str] = set()
    seen, stack = set(recording.nodes), [loss.grad_fn]
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
