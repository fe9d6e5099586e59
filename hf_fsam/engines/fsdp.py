"""FSDP2 (`fully_shard`): weights, gradients and optimizer state are sharded DTensors between the passes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fsam.accelerate_settings import compiles
from hf_fsam.engines.base import RANK_SET_LATE, Ascent, Engine
from hf_fsam.engines.local import LocalEngine, gradients_set_aside, trainable
from hf_fsam.optimizer_state import SecondMoment
from hf_fsam.perturbation import Perturbation


def select_fsdp_engine(args: Any, accelerator: Accelerator) -> Engine:
    """The engine for the run's FSDP settings.

    Raises:
        ValueError: something in them would be ignored or wrong; the message names it.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    parallelism = getattr(accelerator, "parallelism_config", None)
    refused = {
        "FSDP1 (set fsdp_config version: 2)": plugin.fsdp_version == 1,
        "fsam_ascent_scope='rank', where no process holds its own gradient whole,": args.fsam_ascent_scope == "rank",
        "offload to the CPU": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "hybrid sharding (dp_replicate)": parallelism is not None
        and bool(getattr(parallelism, "dp_replicate_enabled", False)),
        "torch_compile=True": compiles(args, accelerator),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"hf_fsam does not support {what} under FSDP. Change that setting, or set fsam_variant='none'."
            )
    return FSDPEngine(accelerator)


class FSDPEngine(LocalEngine):
    """Every process holds a shard of every weight, and perturbs and restores that."""

    detached_weights_stay = False  # whole weights are gathered, and may be gathered again into the same memory
    forward_can_be_retried = gradients_whole = False
    perturbs_shards = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._model: Any = None
        self._weights: list[Any] = []  # DTensors, for which the ascent has a gradient or a momentum
        self._reduce_at_once = True
        self._broken_off = False  # a pass ended early
        self._away: list[list[Tensor]] = []  # [shard, where its θ is]

    @contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[nn.Module]:
        self._model = model
        at_theta = not self._away
        if at_theta:
            self.settle()
        self._broken_off = True  # until the end
        yield model
        self._broken_off = not at_theta

    @contextmanager
    def ascent(self, model: nn.Module, weights: Sequence[Tensor], *, average: bool, passes: int) -> Iterator[Ascent]:
        if not average:
            raise ValueError(RANK_SET_LATE)
        self._weights = []
        # In an accumulation window the Trainer has FSDP reduce the gradients at its end alone. Until then they would
        # wait unsharded, and be reduced with the ascent of the next micro-batch.
        self._reduce_at_once = passes == 1
        remaining = passes

        def backward(loss: Tensor) -> None:
            nonlocal remaining
            remaining -= 1
            self._model.set_requires_gradient_sync(remaining == 0)
            self._backward(loss)

        with gradients_set_aside(trainable(model), self._cleanup):
            ascent = Ascent(backward)
            with self._cleanup.after(lambda: self._model.set_requires_gradient_sync(self.accelerator.sync_gradients)):
                yield ascent
            self._weights = [weight for weight in weights if weight.grad is not None]
            ascent.weights = [_local(weight) for weight in self._weights]
            ascent.gradients = [_local(weight.grad) for weight in self._weights]

    def momentum(self, model: nn.Module, weights: Sequence[Tensor], optimizer: Optimizer) -> Ascent | None:
        self._reduce_at_once = True
        self._weights, averages = self._momenta(weights, optimizer)
        if not averages:
            return None
        return Ascent(self._backward, [_local(each) for each in self._weights], [_local(m) for m in averages])

    def second_moments(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> Iterable[SecondMoment | None] | None:
        moments = super().second_moments(optimizer, self._weights) or ()
        return [moment and replace(moment, average=_local(moment.average)) for moment in moments]

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with self._cleanup.after(self._put_back):
            if self._reduce_at_once:
                self._model.set_requires_gradient_sync(True)
            self._swap_numbers(perturbation)
            self._broken_off = True
            yield
            self._broken_off = False

    @torch.no_grad()
    def _swap_numbers(self, perturbation: Perturbation) -> None:
        """FSDP gathers from the memory that the shards lie in: the numbers have to change places, not the tensors. Its
        streams wait for the current one at the beginning of each forward pass (read in torch 2.13)."""
        for shard, value in zip(perturbation.weights, perturbation.values, strict=True):
            theta = shard.clone()
            self._away.append([shard, theta])
            shard.copy_(value)
            value.copy_(theta)
            self._away[-1][1] = value
        self._forget_gathered()

    def restore(self) -> None:
        self._cleanup.run()
        if self._broken_off:
            self._forget_gathered()

    def settle(self) -> None:
        """FSDP goes on where a pass was broken off, unless its root is told to begin anew (read in torch 2.13)."""
        if self._broken_off and hasattr(self._model, "reset_iter_state"):
            with suppress(AttributeError):  # before its first pass, what is reset does not exist
                self._model.reset_iter_state()
        self._broken_off = False

    @torch.no_grad()
    def _put_back(self) -> None:
        if self._away:
            self._forget_gathered()
        while self._away:
            shard, theta = self._away[-1]
            value = shard.clone()
            shard.copy_(theta)
            self._away.pop()
            theta.copy_(value)  # for the next micro-batch of the window

    def _forget_gathered(self) -> None:
        """A pass that raised before its backward pass leaves some weights gathered at θ+ε. After this they are gathered
        from the shards when they are next used."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(tensor: Any) -> Tensor:
    """This process's shard, in the memory of the DTensor."""
    return tensor.detach().to_local()
