"""The two passes of a split step, and what crosses the boundary between function and loss in each of them.

Notation of the paper (arXiv 2502.02407): logits z = F_θ(x), loss ℓ(z, y), cotangent u(θ) = ∂ℓ/∂z at z = F_θ(x). The
boundary is the module whose output is z. A :class:`CleanPass` records the cotangent that arrives at the boundary. A
:class:`SecondPass` sends the recorded one on in place of its own. Nothing else distinguishes Functional-SAM from SAM,
and neither the network nor the loss has to know of it.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_fsam.heads.find import IDENTITY
from hf_fsam.heads.fused_loss import FusedLoss
from hf_fsam.heads.unperturbed import UnperturbedHead

SAME_FUNCTION = (
    "both passes must compute the same function. Let forward and loss depend on the batch, the weights and random "
    "numbers of torch, NumPy and Python alone, or set fsam_variant='sam'."
)

CALLED_TWICE = (
    "compute_loss was called twice in one training_step: hf_fsam splits one forward and backward pass a step. Join the "
    "batches, or set fsam_variant='none'."
)

NOT_BACK_PROPAGATED = (
    "the training_step below FSAMMixin did not back-propagate the loss of compute_loss, so the gradient could not be "
    "split. Let it call self.compute_loss and back-propagate what that returns, or set fsam_variant='none'."
)


@dataclass
class Crossing:
    """One tensor on its way from the function to the loss, and all that came back to it.

    Attributes:
        cotangents: ∂(scaled loss)/∂z in the shape and dtype of z, e.g. (batch, length, vocabulary): one for each
            backward pass that came through, none where the loss did not depend on the values of z.
        fused: what the loss took of a fused head in place of z, in the order of the forward pass.
        values_read: the loss, or a metric, asked for the values of deferred logits.
        early: how many backward passes came through before `compute_loss` had returned, as those of a loss that
            differentiates by itself do. What they brought does not have the loss scale on it.
    """

    cotangents: list[Tensor] = field(default_factory=list)
    fused: list[FusedLoss] = field(default_factory=list)
    values_read: bool = False
    early: int = 0

    @property
    def reached(self) -> bool:
        """Whether a backward pass came here."""
        return bool(self.cotangents) or any(each.upstream is not None for each in self.fused)


class Fused(Protocol):
    """A head that goes from hidden states to the loss, or a part of it, without the logits in between. `args` are those
    of one call of the head."""

    def plain(self, *args: Any) -> Any:
        """The result, with a gradient of its own."""

    def record(self, clean: "CleanPass", crossing: Crossing, *args: Any) -> Any:
        """The result; what comes back to it is recorded in `crossing`."""

    def replay(self, second: "SecondPass", crossing: Crossing, *args: Any) -> Any:
        """The result that was recorded, with the Jacobian of this call and the recorded cotangent."""


class Pass:
    """A forward and a backward pass. Its doors, through which all goes that one pass has to tell the other:
    `take_logits`, `take_fused` and `take_loss`.

    Attributes:
        defers_logits: the head makes no logits in this pass. None: the boundary has yet to decide.
        backward_ended: the backward pass of the loss came to its end.
        ended: everything that belongs to the pass did.
    """

    def __init__(self) -> None:
        self.defers_logits: bool | None = None
        self.backward_ended = False
        self.ended = False
        self._loss: Tensor | None = None
        self._scale: Tensor | None = None

    def take_loss(self, loss: Tensor) -> Tensor:
        """The door for what `compute_loss` returned; returns the loss to go on with.

        Raises:
            RuntimeError: it is the second in this pass.
        """
        if self._loss is not None:
            raise RuntimeError(CALLED_TWICE)
        self._loss = loss.detach().clone()
        return _Loss.apply(loss, self)

    def shown_loss(self, loss: Tensor) -> Tensor:
        """The value that whoever called `compute_loss` gets to see."""
        return loss.clone()

    def take_scale(self, scale: Tensor) -> None:
        """The backward pass begins, with ∂(what is back-propagated)/∂loss."""
        self._scale = scale

        def ended() -> None:
            self.backward_ended = True

        # Called where the backward pass ends, and not where it raises (torch 2.13; FSDP2 relies on it, too).
        torch.autograd.Variable._execution_engine.queue_callback(ended)

    @property
    def loss(self) -> Tensor:
        """The value of `compute_loss` at the weights of this pass, shape ()."""
        return self._known(self._loss)

    @property
    def scale(self) -> Tensor:
        """∂(what was back-propagated)/∂loss, shape (): what the loss scaler and the division by the number of
        accumulated micro-batches put on the gradient."""
        return self._known(self._scale)

    @property
    def in_compute_loss(self) -> bool:
        return self._loss is None

    @property
    def was_differentiated(self) -> bool:
        """Whether it has a loss and a backward pass came from there."""
        return self._loss is not None and self._scale is not None

    @property
    def interrupted(self) -> bool:
        """Whether its backward pass began, and raised."""
        return self._scale is not None and not self.backward_ended

    @property
    def finite(self) -> Tensor:
        """Whether all that the pass computed is a number, shape (), bool."""
        return self.loss.isfinite()

    def _known(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(NOT_BACK_PROPAGATED)
        return tensor


class _Loss(torch.autograd.Function):
    """The loss on its way to the caller: its backward pass runs before every hook on the loss itself."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, one_pass: Pass) -> Tensor:
        ctx.one_pass = one_pass
        return one_pass.shown_loss(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.one_pass.take_scale(upstream)
        return upstream, None


class CleanPass(Pass):
    """Records what comes back to the boundary.

    Args:
        unperturbed: the head at the weights of this pass, shared by all passes at the same weights.
        stops_at_boundary: the graph begins at the boundary, and :meth:`differentiate` is the backward pass.
        records: False for a pass that gives an ascent gradient and nothing else.

    Attributes:
        crossings: in the order of the forward pass; none where the pass does not record.
        nodes: the autograd nodes of what crossed, while the pass lasts.
        offloads: what autograd saves goes to the host, and may be read in the backward pass alone.
    """

    offloads = False

    def __init__(
        self, unperturbed: UnperturbedHead | None = None, *, stops_at_boundary: bool = False, records: bool = True
    ) -> None:
        super().__init__()
        self.unperturbed = unperturbed or UnperturbedHead()
        self.stops_at_boundary, self.records = stops_at_boundary, records
        self.crossings: list[Crossing] = []
        self.nodes: set[Any] = set()
        self._leaves: list[Tensor] = []

    # ---- Doors ----

    def take_loss(self, loss: Tensor) -> Tensor:
        # Where nothing has crossed, as in SAM, which has no boundary, the loss itself is where the graph begins.
        return super().take_loss(loss if self._leaves else self.from_here(loss))

    def take_logits(self, z: Tensor) -> Tensor:
        crossing = self._next()
        self.nodes.add(z.grad_fn)
        at_boundary = self.from_here(z)
        at_boundary.register_hook(partial(self.record, crossing))
        return Through.apply(at_boundary) if self.stops_at_boundary else at_boundary

    def take_fused(self, head: Fused, *args: Any) -> Any:
        return head.record(self, self._next(), *args)

    # ---- What comes back ----

    def from_here(self, tensor: Tensor) -> Tensor:
        """`tensor`, or, where the graph begins at the boundary, a leaf in its place. A loss that is one already, and
        whose backward pass is a hook on it (GradCache), stays itself."""
        if not self.stops_at_boundary:
            return tensor
        itself = tensor.is_leaf and tensor.requires_grad
        self._leaves.append(tensor if itself else tensor.detach().requires_grad_())
        return self._leaves[-1]

    def record(self, crossing: Crossing, cotangent: Tensor | None) -> None:
        """∂(scaled loss)/∂z has arrived at `crossing`. None: DDP says so of an output that the loss ignored."""
        if not self.records or cotangent is None:
            return
        crossing.early += self.in_compute_loss
        # Two crossings can be handed one and the same tensor (z₁ + z₂), and a second pass scales in place.
        others = [other.data_ptr() for each in self.crossings for other in each.cotangents]
        cotangent = cotangent.detach()
        crossing.cotangents.append(cotangent.clone() if cotangent.data_ptr() in others else cotangent)

    def differentiate(self, loss: Tensor) -> None:
        """The backward pass where the graph begins at the boundary: no weight is touched."""
        torch.autograd.grad(loss, self._leaves, allow_unused=True)

    def finish(self, name: str) -> None:
        """
        Raises:
            ValueError: nothing came back to the boundary `name`, and the loss is not the 0 of a batch to skip.
        """
        self.nodes.clear()
        self._leaves.clear()
        if self.records and not any(crossing.reached for crossing in self.crossings) and self.loss != 0:
            raise ValueError(
                f"in this batch nothing crossed the boundary {name!r} on the way from the weights to the loss, so "
                "there is no cotangent to record: name the module that makes the logits with fsam_boundary. (A model "
                "with other heads for some batches needs one module that all of them go through, or "
                f"fsam_variant='sam'. The loss of a batch to skip may be 0.) {IDENTITY}."
            )

    def offload(self) -> None:
        """Move the final hidden states to the host until a second pass needs them."""
        for crossing in self.crossings:
            for fused in crossing.fused:
                fused.hidden = _on_host(fused.hidden)

    def _next(self) -> Crossing:
        crossing = Crossing()
        if self.records:
            self.crossings.append(crossing)
        return crossing


class SecondPass(Pass):
    """A pass in which the loss shows the value that it had in `clean`, and whose backward pass goes on from the
    boundary with what came back to it in `cotangents`. None: with its own, which is SAM.

    The recorded cotangents are used up. They are scaled by the ratio of the two passes' loss scales, so that loss
    scalers and gradient accumulation need not be known here.
    """

    def __init__(self, clean: CleanPass, cotangents: CleanPass | None) -> None:
        super().__init__()
        self.clean = clean
        self.defers_logits = cotangents is not None and bool(cotangents.defers_logits)
        self._cotangents = cotangents
        self._left = [] if cotangents is None else list(cotangents.crossings)
        self._hooked: list[Crossing] = []
        self._products: list[tuple[Tensor | None, Tensor]] = []

    # ---- Doors ----

    def take_logits(self, z: Tensor) -> Tensor:
        if self._cotangents is not None:
            crossing = self._next()
            self._hooked.append(crossing)
            z.register_hook(partial(self._swap, crossing))
        return z

    def take_fused(self, head: Fused, *args: Any) -> Any:
        return head.plain(*args) if self._cotangents is None else head.replay(self, self._next(), *args)

    def shown_loss(self, loss: Tensor) -> Tensor:
        return self.clean.loss.clone()

    # ---- What is sent back ----

    def ratio(self, crossing: Crossing) -> Tensor | float:
        """The loss scale of this pass over that of the pass which recorded, shape (). Known in the backward pass."""
        if crossing.early or self._cotangents is None:
            return 1.0
        return self.scale / self._cotangents.scale

    def _next(self) -> Crossing:
        return self._left.pop(0) if self._left else Crossing()  # an empty one is refused where it is used

    def _swap(self, crossing: Crossing, own: Tensor | None) -> Tensor | None:
        if own is None:  # see `record`; what is left of the crossing's is refused in the end
            return None
        recorded = crossing.cotangents.pop(0) if crossing.cotangents else None
        if recorded is None or recorded.shape != own.shape:
            raise RuntimeError(
                f"the second pass crossed the boundary with a tensor {tuple(own.shape)} where the first had "
                f"{'none' if recorded is None else tuple(recorded.shape)}: {SAME_FUNCTION}"
            )
        ratio = self.ratio(crossing)
        crossing.early = max(0, crossing.early - 1)
        return recorded.mul_(ratio) if recorded.is_contiguous() else recorded * ratio

    def finish(self, name: str) -> None:
        """
        Raises:
            RuntimeError: the two passes crossed the boundary differently.
        """
        if not self.backward_ended:  # `loss` or `scale` tell the caller, or the backward pass has raised
            return
        left = sum(crossing.reached for crossing in self._left) + sum(len(each.cotangents) for each in self._hooked)
        if left:
            raise RuntimeError(f"{left} recorded cotangents met no tensor in the second pass: {SAME_FUNCTION}")

    # ---- What it tells of the loss ----

    def take_products(self, before: Tensor | None, after: Tensor) -> None:
        """⟨u, a⟩ and ⟨u, a'⟩ of one crossing, shape (), with the recorded cotangent u and a fused head's output: a in
        the clean pass, a' in this one. before: None where it was not computed."""
        self._products.append((before, after))

    @property
    def knows_its_loss(self) -> bool:
        """False where fused heads hand the loss what they had in the clean pass."""
        return not self._products

    @property
    def linear_loss_change(self) -> Tensor | None:
        """⟨u, a'⟩ − ⟨u, a⟩ summed over the crossings, shape (), in the loss scale of u; None where it is not known."""
        changes = [None if before is None else after - before for before, after in self._products]
        known = [change for change in changes if change is not None]
        return torch.stack(known).sum() if known and len(known) == len(changes) else None

    @property
    def finite(self) -> Tensor:
        if self.knows_its_loss:
            return super().finite
        return torch.stack([after for _, after in self._products]).isfinite().all()


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, for which the host need not wait."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Through(torch.autograd.Function):
    """The same values as another tensor, with a gradient of its own, that may be changed in place, as the output of a
    head may."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient
