"""What the Trainer's step asks of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fsam.accelerate_settings import passes_dtype
from hf_fsam.cleanup import Cleanup
from hf_fsam.optimizer_state import SecondMoment, precondition
from hf_fsam.perturbation import Direction, Perturbation, own_storage, perturb

RANK_SET_LATE = "fsam_ascent_scope='rank' was set after the start, and gradients are sharded: choose another scope."


@dataclass
class Ascent:
    """The clean passes of a window, and the gradients that they leave.

    Attributes:
        backward: back-propagates a loss, in the loss scaler's units, and adds to the gradients.
        weights: what is perturbed, in the form in which this process holds it: weights or shards. Filled when the
            passes have ended.
        gradients: one for each of them; or the momentum, where ε is to go along that.
    """

    backward: Callable[[Tensor], None]
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


class Engine(ABC):
    """How one way of holding the weights is ascended, perturbed and restored.

    Attributes:
        detached_weights_stay: a weight that was detached in a clean pass stays at θ while the weights are at θ+ε.
        forward_can_be_retried: a forward pass of the ascent that raised has exchanged nothing with another process that
            its repetition would, and leaves nothing half done, so that it can be made again. An engine that gathers
            weights on the way can't.
        gradients_whole: a plain backward pass leaves the whole gradients of this process in `.grad`, and nothing else
            takes notice of it.
        perturbs_shards: every process perturbs other numbers than the others. The radius is that of all together.
    """

    detached_weights_stay: bool
    forward_can_be_retried: bool
    gradients_whole: bool
    perturbs_shards = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._cleanup = Cleanup()

    @abstractmethod
    def ascent(
        self, model: nn.Module, weights: Sequence[Tensor], *, average: bool, passes: int
    ) -> AbstractContextManager[Ascent]:
        """The passes inside add to the ascent's gradients, and are made :meth:`without_sync`. The training's gradients,
        those of weights that are not perturbed too, are afterwards what they were before.

        Args:
            weights: the trainable weights of `model` that are perturbed. ε is 0 elsewhere.
            average: the gradients are averaged over all processes; else each process has its own.
            passes: how many passes there will be.
        """

    def without_sync(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """What to call in passes that no backward pass of the training follows, so that nothing waits for one.

        Not the bare module: where it is wrapped and then compiled, that would run uncompiled, and Inductor draws other
        dropout masks than PyTorch.
        """
        return nullcontext(model)

    @abstractmethod
    def momentum(self, model: nn.Module, weights: Sequence[Tensor], optimizer: Optimizer) -> Ascent | None:
        """A copy of the optimizer's momentum in the place of an ascent's gradients; None before its first step.

        Raises:
            ValueError: the optimizer has none.
        """

    @abstractmethod
    def second_moments(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> Iterable[SecondMoment | None] | None:
        """The optimizer's, one for each of an ascent's weights or shards; None where there are none yet."""

    @abstractmethod
    def scale(self, loss: Tensor) -> Tensor:
        """`loss` in the loss scaler's units."""

    @abstractmethod
    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """The weights are at θ+ε inside, and at θ again, bit for bit, before the optimizer steps."""

    def perturb(
        self,
        ascent: Ascent,
        optimizer: Optimizer | None,
        rho: float,
        seed: int,
        cotangents: list[Tensor],
        direction: Direction | None,
    ) -> Perturbation:
        """θ+ε, written over the gradients of the ascent.

        Args:
            optimizer: preconditions with its second moments. None: no preconditioning.
            seed: of the stochastic rounding, the same on all processes.
            cotangents: gradients that lie in their memory are copied first.
            direction: is given the ascent's weights and its gradients, which are preconditioned by then, and changes
                the gradients in place before they are scaled to rho. None: they are scaled as they are.
        """
        accelerator = self.accelerator

        def over_processes(norm: Tensor) -> Tensor:
            if not self.perturbs_shards:
                return norm
            return accelerator.reduce(norm.to(accelerator.device).square(), "sum").sqrt()

        moments = None if optimizer is None else self.second_moments(optimizer, ascent.weights)
        directions: list[Direction] = []
        if moments is not None:
            directions.append(lambda weights, gradients: precondition(gradients, moments))
        if direction is not None:
            directions.append(direction)
        # Processes that hold the same weights have to round them alike; each shard gets noise of its own.
        process = accelerator.process_index if self.perturbs_shards else 0
        generator = torch.Generator(accelerator.device).manual_seed(seed + process)
        gradients = own_storage(ascent.gradients, cotangents)
        result = perturb(
            ascent.weights, gradients, rho, generator, directions, over_processes, passes_dtype(accelerator)
        )
        if self.perturbs_shards:
            result.radius = accelerator.reduce(result.radius, "sum")
        return result

    def restore(self) -> None:
        """After this the weights that this process owns are at θ, whether they were before or not, and everything else
        that a step changes for its duration is as it was. Nothing is communicated, because an exception may have struck
        this process alone."""
        self._cleanup.run()

    def settle(self) -> None:  # noqa: B027
        """After this all weights are at θ. All processes call it together, before the weights are used again. Nothing
        is left to do where :meth:`restore` has done all of it."""


class Bucket:
    """Gradients that wait until there are enough of them to be worth one reduction.

    Args:
        most: how many numbers wait at most, unless one gradient alone has more.
        reduce: is given the weights and their gradients.
    """

    def __init__(self, most: int, reduce: Callable[[list[Any], list[Tensor]], None]) -> None:
        self._most, self._reduce = most, reduce
        self._weights: list[Any] = []
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def add(self, weight: Any, gradient: Tensor) -> None:
        if sum(each.numel() for each in self._gradients) + gradient.numel() > self._most:
            self.flush()
        self._weights.append(weight)
        self._gradients.append(gradient)

    @torch.no_grad()
    def flush(self) -> None:
        if self._gradients:
            self._reduce(self._weights, self._gradients)
        self._weights, self._gradients = [], []
