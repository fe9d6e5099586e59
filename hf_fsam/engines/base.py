"""What the Trainer's step asks of an engine."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fsam.perturbation import Perturbation, perturb

RANK_SET_LATE = "fsam_ascent_scope='rank' was set after the start, and gradients are sharded: choose another scope."


@dataclass
class Ascent:
    """Clean passes and the gradients that they leave.

    Attributes:
        model: what to call in these passes.
        backward: back-propagates a loss, in the loss scaler's units, and accumulates.
        weights: what is perturbed, where this process holds it; filled when the ascent has ended.
        gradients: one for each of them, or what else ε is to go along.
        owned: each number of `weights` and `gradients` is at its owner alone.
    """

    model: nn.Module
    backward: Callable[[Tensor], None]
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    owned: bool = False


class Engine(Protocol):
    """How one way of holding the weights is ascended, perturbed and restored.

    Attributes:
        keeps: a weight that was detached in a clean pass stays at θ while the weights are at θ+ε.
        forward_can_be_retried: a forward pass of the ascent that raised leaves nothing half done and has exchanged
            nothing with another process, so that it can be made again. Not where weights are gathered on the way.
        gradients_whole: a plain backward pass leaves this process's whole gradients in `.grad`, and nobody else sees
            them.
    """

    keeps: bool
    forward_can_be_retried: bool
    gradients_whole: bool

    def ascent(self, model: nn.Module, *, average: bool, passes: int) -> AbstractContextManager[Ascent]:
        """The passes inside accumulate into the ascent, and leave the gradients of the training as they were.

        average: over all processes; else this process's own. passes: how many there will be.
        """

    def momentum(self, model: nn.Module, optimizer: Optimizer) -> Ascent | None:
        """A copy of the optimizer's momentum in the place of an ascent's gradients; None before its first step.

        Raises:
            ValueError: the optimizer keeps none.
        """

    def as_output(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """`tensor` as if `module` had put it out, for an engine that follows modules through a backward pass."""

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` in the loss scaler's units."""

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        """θ+ε from the ascent, whose gradients it uses up.

        optimizer: preconditions with its second moments; None does not. seed: of the stochastic rounding, the same on
        every process that holds the same weights. cotangents: memory to leave alone.
        """

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """The weights are at θ+ε inside, and at θ again, bit for bit, before the optimizer steps."""

    def restore(self) -> None:
        """The weights that this process owns are at θ after this, whether they were before or not, and whatever else a
        step changes for its duration is as it was.

        No communication: an exception may have struck this process alone.
        """

    def settle(self) -> None:
        """All weights are at θ after this. All processes call it together, before the weights are used again."""


def perturb_shards(
    accelerator: Accelerator,
    shards: list[Tensor],
    gradients: list[Tensor],
    precondition: Callable[[Sequence[Tensor]], None] | None,
    rho: float,
    seed: int,
) -> Perturbation:
    """:func:`perturb` of weights of which every process holds other numbers: the radius is that of all together."""

    def over_processes(norm: Tensor) -> Tensor:
        return accelerator.reduce(norm.to(accelerator.device).square(), "sum").sqrt()

    # Each process rounds numbers of its own.
    generator = torch.Generator(accelerator.device).manual_seed(seed + accelerator.process_index)
    result = perturb(shards, gradients, precondition, rho, generator, total=over_processes)
    result.radius = accelerator.reduce(result.radius, "sum")
    return result


class Bucket:
    """Gradients on their way to their owners: enough of them together to be worth a reduction.

    Args:
        most: numbers in it, unless one gradient alone has more.
        reduce: takes the weights and their gradients, (weights, gradients).
    """

    def __init__(self, most: int, reduce: Callable[[list[Any], list[Tensor]], None]) -> None:
        self._most, self._reduce = most, reduce
        self._parameters: list[Any] = []
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def add(self, parameter: Any, gradient: Tensor) -> None:
        if sum(each.numel() for each in self._gradients) + gradient.numel() > self._most:
            self.flush()
        self._parameters.append(parameter)
        self._gradients.append(gradient)

    @torch.no_grad()
    def flush(self) -> None:
        if self._gradients:
            self._reduce(self._parameters, self._gradients)
        self._parameters, self._gradients = [], []
