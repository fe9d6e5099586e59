"""What of the split step a subclass may change: when it perturbs, along what, over which weights, and on which engine.

Override a method beside your trainer's `compute_loss`; docs/extending.md has worked examples. Everything else of the
step calls these and nothing private.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from hf_fsam.arguments import FSAMTrainingArguments
from hf_fsam.engines import Engine, select_engine

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin stands before any Trainer class, whatever that may hold


class Seam(_AnyTrainer):
    """The methods, with what they do by default."""

    args: FSAMTrainingArguments
    model: nn.Module
    optimizer: Optimizer

    def fsam_is_due(self) -> bool:
        """Whether this optimizer step perturbs; otherwise it is the plain Trainer's. Asked once for each step, and to
        be answered alike on all processes. Default: every `fsam_every_steps`."""
        return self.state.global_step % self.args.fsam_every_steps == 0

    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `compute_loss` whose gradient the ascent goes along. Default: `inputs` themselves, the
        micro-batch.

        Where this returns others, the step takes a forward pass more, because the cotangents are those of all of
        `inputs`, which has to be left as it is. Not asked where the ascent goes along the momentum."""
        return inputs

    def fsam_perturbs(self, name: str, weight: nn.Parameter) -> bool:
        """Whether ε moves this trainable weight, `name` in `model.named_parameters()`; to be answered alike on all
        processes. ρ is the norm over those that it moves; the others get their gradient J(θ+ε)ᵀu(θ) as well. Default:
        all of them."""
        return True

    def fsam_direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Turn the ascent gradients into the direction d of ε = ρ d / ‖d‖, in place. Default: leave them.

        Args:
            weights: θ of what is perturbed, or, where the engine shards it, this process's part. It may be offloaded
                from the device of its gradient, and at ZeRO-3 it may end in padding, where θ and g are 0 and d has to
                stay 0.
            gradients: g of each in its shape and dtype, already preconditioned where `fsam_precondition` is set, or the
                optimizer's momentum.
        """

    def fsam_engine(self) -> Engine:
        """How the weights are held, ascended, perturbed and restored. Default: what fits the Accelerator's state.

        Raises:
            ValueError: the way of running is not supported; the message names it.
        """
        return select_engine(self)
