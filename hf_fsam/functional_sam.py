"""What the split step keeps of a training, from one micro-batch to the next."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from hf_fsam import batches
from hf_fsam.accelerate_settings import compiles
from hf_fsam.arguments import check
from hf_fsam.boundary import (
    Boundary,
    crosses_twice,
    is_in_compiled,
    weights_behind_boundary,
    weights_past_boundary,
)
from hf_fsam.cleanup import Cleanup
from hf_fsam.counters import Counters
from hf_fsam.engines import Engine
from hf_fsam.forward_state import RandomState, running_statistics
from hf_fsam.graph import autograd_nodes
from hf_fsam.heads.deferred_logits import LogitsNeeded
from hf_fsam.heads.find import IDENTITY, find_boundary
from hf_fsam.heads.fused_head import FusedHead, find_fused_head, is_weighed
from hf_fsam.heads.unperturbed import CotangentCache
from hf_fsam.logs import LoggedMeans
from hf_fsam.optimizer_state import innermost
from hf_fsam.passes import CleanPass
from hf_fsam.perturbation import Perturbation
from hf_fsam.seam import Seam

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class MicroBatch:
    """A micro-batch between its clean pass and its second pass.

    Attributes:
        fetched: as the Trainer fetched it.
        inputs: as `compute_loss` gets it.
        random: the random state in which both passes begin.
    """

    fetched: dict[str, Any]
    inputs: dict[str, Any]
    random: RandomState = field(init=False)
    clean: CleanPass = field(init=False)

    def __post_init__(self) -> None:
        self._fetched, self._inputs = batches.Snapshot(self.fetched), batches.Snapshot(self.inputs)

    def was_fetched_as(self, fetched: dict[str, Any]) -> bool:
        """Whether `inputs` were made of what `fetched` holds."""
        return self._fetched.change(fetched) is None

    def change(self, inputs: dict[str, Any]) -> str | None:
        """The name of a part in which `inputs` are not what the clean pass got; None where there is none."""
        return self._inputs.change(inputs)


@dataclass
class Window:
    """The micro-batches that share one ascent and wait for their second passes, and the perturbation that it gave.

    Attributes:
        of_gradient: the ascent went along their gradient, not along the momentum.
        reported: the log has the perturbation.
    """

    waiting: list[MicroBatch]
    perturbation: Perturbation
    of_gradient: bool
    reported: bool = False


class BatchObserver(Protocol):
    """Diagnostics, which measure on batches of the training."""

    def see(self, batches: list[dict[str, Any]]) -> None: ...


class FunctionalSAM:
    """What the split step keeps from one micro-batch to the next: the trainer's one attribute `fsam`.

    Attributes:
        cleanup: what a step has put in place and has to take back.
        boundary: the hook between function and loss.
        means: what the next line of the log gets.
        probes: what wants to see the batches of the training.
        current_pass: the pass that `compute_loss` is called in; None outside of a split step.
        batches: what the Trainer fetched for this optimizer step; None where `training_step` is called by hand.
        window: whose micro-batches have yet to take their second passes; None where there is none.
        due: this optimizer step perturbs.
        micro_step: how many micro-batches of this optimizer step have ended.
        training: inside of `train`.
        fetches: `get_batch_samples` was called in it.
        entered: `training_step` was called in it.
        has_split: both passes of a step came to their end in it.
    """

    def __init__(self, trainer: Seam) -> None:
        self.trainer = trainer
        self.cleanup = Cleanup()
        self.boundary = Boundary(self.cleanup)
        self.means = LoggedMeans(trainer.args.device)
        self.probes: list[BatchObserver] = []
        self.current_pass: Literal["clean", "second"] | None = None
        self.batches: list[dict[str, Any]] | None = None
        self.window: Window | None = None
        self.micro_step = 0
        self.training = self.fetches = self.entered = self.has_split = self.due = False
        self.cotangent_cache = CotangentCache()
        self._engine: Engine | None = None
        self._attached_to: nn.Module | None = None
        self._checked_model: nn.Module | None = None
        self._agreed_on: nn.Module | None = None
        self._fused_head: tuple[list[nn.Module], bool, FusedHead | None] | None = None
        self._leaves: tuple[nn.Module, list[Tensor]] | None = None
        self._compiled = False

    # ---- What the settings say ----

    @property
    def active(self) -> bool:
        check(self.trainer.args)  # a hyperparameter search or a callback may have changed them
        return self.trainer.args.fsam_variant != "none" and self.trainer.args.fsam_rho > 0

    @property
    def splits(self) -> bool:
        """Whether Jacobian and cotangent are taken at different weights."""
        return self.trainer.args.fsam_variant in ("functional", "logit")

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self.trainer.fsam_engine()
        return self._engine

    def forget_engine(self) -> None:
        """There is a new accelerator."""
        self._engine = None

    def perturbed_weights(self) -> list[nn.Parameter]:
        """The trainable weights that ε moves.

        Raises:
            ValueError: there is none, or processes do not agree.
        """
        trainer, model = self.trainer, self.trainer.model
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        weights = [weight for name, weight in named if trainer.fsam_perturbs(name, weight)]
        if self._agreed_on is not model:  # once, because it makes the host wait
            count = torch.tensor([len(weights)], device=trainer.args.device)
            if len(counts := set(trainer.accelerator.gather(count).tolist())) > 1:
                raise ValueError(
                    f"fsam_perturbs of {type(trainer).__name__} is true for {sorted(counts)} weights on different "
                    "processes: let it answer alike on all of them."
                )
            self._agreed_on = model
        if not weights:
            raise ValueError(
                f"fsam_perturbs of {type(trainer).__name__} names no trainable weight to perturb: let it be true for "
                "one, or set fsam_variant='none'."
            )
        return weights

    def weights_outside_model(self) -> list[Tensor]:
        """Those that the optimizer has and the model has not, as a loss's own. Nothing perturbs them. Not to be asked
        in a pass, for which FSDP2 puts others in the place of the model's."""
        trainer = self.trainer
        if trainer.optimizer is None or trainer.is_deepspeed_enabled:  # DeepSpeed's has partitions of the model's
            return []
        inside = set(trainer.model.parameters())
        return [
            weight for group in trainer.optimizer.param_groups for weight in group["params"] if weight not in inside
        ]

    def leaves_outside_model(self, loss: Tensor) -> list[Tensor]:
        """Weights that the first `loss` depends on and the model has not, as a loss's own with an optimizer of its own.
        They are not looked for where the passes have other tensors in the place of the model's."""
        model = self.trainer.model
        if loss.grad_fn is None or not self.engine.gradients_whole:  # the first: of a batch to skip
            return []
        if self._leaves is None or self._leaves[0] is not model:
            inside = set(model.parameters())
            leaves = (getattr(node, "variable", None) for node in autograd_nodes(loss.grad_fn))
            self._leaves = model, [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and leaf not in inside]
        return self._leaves[1]

    def check_weights_are_trained(self, optimizer: Optimizer) -> None:
        """Warn of weights that ε would move and the optimizer does not."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:  # whose optimizer may have other tensors
            return
        trained = {weight for group in innermost(optimizer).param_groups for weight in group["params"]}
        left_out = [
            name
            for name, weight in trainer.model.named_parameters()
            if weight.requires_grad and weight not in trained and trainer.fsam_perturbs(name, weight)
        ]
        if left_out:
            logger.warning(
                f"{len(left_out)} trainable weights ({_few(left_out)}) are in no parameter group of the optimizer, and "
                "take their part of fsam_rho all the same. Freeze them with requires_grad_(False), or let "
                "fsam_perturbs be false for them."
            )

    def ascent_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """
        Raises:
            TypeError: they are none.
            ValueError: the batch was changed for them.
        """
        chosen = self.trainer.fsam_ascent_inputs(batch.inputs)
        if (changed := batch.change(batch.inputs)) is not None:
            raise ValueError(
                f"fsam_ascent_inputs of {type(self.trainer).__name__} changed {changed} of `inputs`, which the second "
                "pass has yet to take: leave them as they are, and return a mapping of its own."
            )
        if not isinstance(chosen, Mapping) or not chosen:
            raise TypeError(
                f"fsam_ascent_inputs of {type(self.trainer).__name__} returned {type(chosen).__name__} of no inputs: "
                "return a mapping with the arguments of the model's forward pass, or `inputs` itself."
            )
        return chosen

    # ---- From step to step ----

    def enter(self) -> bool:
        """A micro-batch's step begins. Returns whether it is to be split."""
        self.entered = True
        begins = self.micro_step == 0 or self.batches is None  # driven by hand, each call is an optimizer step
        active = self.active  # checks the settings that the next line may use
        if begins:
            self.due = active and self.trainer.fsam_is_due()
        if self._engine is not None:  # what Ctrl-C on the way out of the last split step has left
            self.cleanup.run()
            self._engine.restore()
        if not (active and self.due):
            self.settle()
            return False
        self.attach()
        if begins:
            self.means.count_step()
        return True

    def drop(self) -> None:
        """Forget a step that was broken off. All that belongs to the user is as it was before it."""
        self.cleanup.run()
        if self._engine is not None:
            self._engine.restore()
        self.detach()
        self.window = self.batches = self.current_pass = None
        self.means.clear()

    def settle(self) -> None:
        """Call it before the weights are used outside of a step, on all processes together. An exception may have left
        other processes' shards at θ+ε."""
        if self._engine is not None:
            self._engine.settle()

    def attach(self) -> None:
        trainer, boundary = self.trainer, self.boundary
        if not self.splits or (boundary.attached and self._attached_to is trainer.model):
            return
        boundary.detach()
        modules = find_boundary(trainer.model, trainer.args.fsam_boundary)
        found = list(modules.values())
        self._compiled = compiled = compiles(trainer.args, trainer.accelerator) or is_in_compiled(found, trainer.model)
        head = None
        if trainer.args.fsam_fused_head:
            if self._fused_head is None or self._fused_head[:2] != (found, compiled):
                heads = [find_fused_head(trainer.model, module, compiled) for module in found]
                self._fused_head = found, compiled, next(filter(None, heads), None)
            head = self._fused_head[2]
        boundary.attach(modules, head, compiled=compiled)
        self._attached_to = trainer.model

    def detach(self) -> None:
        # A compiled model keeps the hook: code that was compiled without it would pass it by (torch 2.13).
        if not self._compiled:
            self.boundary.detach()

    @contextmanager
    def uncounted(self, model: nn.Module) -> Iterator[None]:
        """Inside, a pass leaves running statistics as they were: each batch counts once, in another of its passes."""
        with self.cleanup.after(running_statistics(model)):
            yield

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Inside, `compute_loss` leaves the trainer's counters as they were."""
        with self.cleanup.after(Counters(self.trainer).restore):
            yield

    def check_boundary(self, loss: Tensor, clean: CleanPass) -> None:
        """Once for each model, warn of weights whose way to the loss does not cross the boundary.

        Raises:
            ValueError: a way crosses it twice, or most weights have none that crosses it.
            LogitsNeeded: the loss learns a weight of its own.
        """
        model = self.trainer.model
        if not self.splits or self._checked_model is model:
            return
        if crosses_twice(clean):
            raise ValueError(
                f"fsam_boundary: of what crosses the boundary {self.boundary.name!r}, one tensor is computed from "
                f"another, so that no cotangent belongs to the loss alone. Name modules whose outputs go to the loss "
                f"and not back into the network. {IDENTITY}."
            )
        if is_weighed(loss):
            raise LogitsNeeded("is multiplied with weights that are trained")
        self._checked_model = model
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        past = weights_past_boundary(loss, clean, names)
        behind = weights_behind_boundary(clean, names)
        around = sorted(set(past) - set(behind))
        if behind and len(around) > len(behind):
            raise ValueError(
                f"fsam_boundary: {len(around)} weights ({_few(around)}) reach the loss on ways past the boundary "
                f"{self.boundary.name!r} alone, and only {len(behind)} through it, so that most of the model would "
                f"train with plain SAM. Name the module that makes the logits, or leave fsam_boundary out to have it "
                f"found. {IDENTITY}."
            )
        if past and (clean.crossings or not clean.records):
            logger.warning(
                f"The loss depends on {len(past)} weights ({_few(past)}) on a way past the boundary "
                f"{self.boundary.name!r}. Along that way the step is plain SAM. For a term of the loss by itself (a "
                "balancing loss, an L2 penalty) or a bias behind the head there is nothing to do. "
                f"{IDENTITY}."
            )


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
