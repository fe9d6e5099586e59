"""`FSAMTrainer`: the Trainer whose step is split between function and loss."""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DummyOptim  # accelerate.utils has it only where deepspeed is installed
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from hf_fsam import model_card
from hf_fsam.accelerate_settings import compiles
from hf_fsam.arguments import FSAMArguments
from hf_fsam.diagnostics.callback import FSAMDiagnosticsCallback
from hf_fsam.functional_sam import FunctionalSAM
from hf_fsam.heads.find import find_boundary
from hf_fsam.heads.liger import losses_left_out
from hf_fsam.logs import FSAMSettings, settings_of
from hf_fsam.optimizer_state import check_keeps_momentum, check_keeps_second_moment
from hf_fsam.seam import Seam
from hf_fsam.step import SplitStep


class FSAMMixin(Seam):
    """Put it before any `Trainer` class: `class MyFSAMTrainer(FSAMMixin, MyTrainer)`.

    The gradient that the optimizer gets is, by `fsam_variant` (J the Jacobian of the logits, u the loss derivative at
    them, ε the perturbation of arXiv 2502.02407):

        none        J(θ)ᵀ u(θ)          the parent's own step, bit for bit
        sam         J(θ+ε)ᵀ u(θ+ε)
        functional  J(θ+ε)ᵀ u(θ)
        logit       J(θ)ᵀ u(θ+ε)

    Everything else is the parent's: its `compute_loss`, its `training_step`, loss scaling, gradient accumulation,
    clipping, the optimizer. `args` without `fsam_*` fields are completed with the defaults of `FSAMArguments`.
    What a subclass may change of the step is in `Seam`.

    Raises:
        ValueError: before training, for a model without a boundary, an optimizer without the moment that is needed, an
            empty data set, or a way of running that is not supported; at the first step, for a boundary that
            is not on the way from the weights to the loss, or one of whose tensors is computed from another;
            where `fsam_ascent_inputs`, or with `fsam_ascent_scope="optimizer_step"` the parent's step, changes a batch
            that has yet to take its second pass.
        TypeError: at the first step, for a boundary that returns the loss, or what is neither a tensor nor a mapping, a
            list or a tuple; for a batch that holds what cannot be copied; for a loss that is no tensor;
            for a class that has a Trainer before the mixin.
        RuntimeError: where the parent's step calls `compute_loss` twice; where its first one calls it never, or does
            not back-propagate what that returns; where `compute_loss` back-propagates by itself, or generates text in
            the second pass; where that pass does not compute the function of the first; at the first step, where a
            subclass's step does not call this one, or with `fsam_ascent_scope="optimizer_step"` its
            `get_batch_samples`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FSAMMixin)]
        for base in before:
            if issubclass(base, Trainer) and not issubclass(base, FSAMMixin):
                raise TypeError(
                    f"{cls.__name__}: {base.__name__} stands before FSAMMixin, whose step it would never reach: put "
                    f"FSAMMixin first, class {cls.__name__}(FSAMMixin, {base.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args_given = [each for each in (*args, *kwargs.values()) if isinstance(each, TrainingArguments)]
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument 'fsam_" not in str(error):
                raise
            raise TypeError(
                f"{type(self).__name__} makes arguments of its own out of the {type(self._args_given[0]).__name__} "
                f"that it got, and these take no fsam_* fields ({error}). Give it its own class with the fields, "
                "class FSAMSFTConfig(FSAMArguments, SFTConfig) for TRL's SFTTrainer."
            ) from error
        fsam = self.fsam
        self.add_callback(FSAMSettings(**settings_of(self.args)))
        if self.args.fsam_diagnostics_steps:
            self.add_callback(FSAMDiagnosticsCallback(every=self.args.fsam_diagnostics_steps))
        self.add_callback(_PlainTrainingRefused(self))
        if fsam.active:
            _ = fsam.engine  # what is not supported is refused now
            if fsam.splits:
                find_boundary(self.model, self.args.fsam_boundary)
            if compiles(self.args, self.accelerator):
                fsam.attach()

    @functools.cached_property
    def fsam(self) -> FunctionalSAM:
        """All that the mixin keeps. It is made where it is first asked for, as the parent's `__init__` may do."""
        for name, value in settings_of(FSAMArguments()).items():
            for given in self._args_given:  # TRL may have made others of them, without what was set on them
                value = getattr(given, name, value)
            if not hasattr(self.args, name):
                setattr(self.args, name, value)
        return FunctionalSAM(self)

    @property
    def fsam_pass(self) -> Literal["clean", "second"] | None:
        """Which pass of a split step `compute_loss` is called in; None outside of one, where the step is the plain
        Trainer's. A loss that keeps something from step to step (a memory, an average, terms for a log of its own)
        keeps it where this is not "second".

        Where a loss turns out to need the logits that the fused head defers, its first clean pass is made again (see
        `fsam_fused_head`)."""
        return self.fsam.current_pass

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step with its gradient split: its `compute_loss` runs twice, at θ and at θ+ε. Returns the clean
        loss ℓ(θ), shape (), in the parent's scale."""
        fsam = self.fsam
        if not fsam.enter():
            loss = super().training_step(model, inputs, num_items_in_batch)
            fsam.micro_step += 1
            return loss
        step = SplitStep(fsam, inputs, num_items_in_batch)
        try:
            with step:
                loss = super().training_step(model, inputs, num_items_in_batch)
                complete = step.complete()
        except BaseException:
            fsam.drop()
            raise
        finally:
            fsam.current_pass = None
        if complete:
            step.report()
        fsam.micro_step += 1
        if not fsam.training:
            fsam.detach()
        return loss

    # ---- Around the step ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if "fsam" in vars(self):  # a hyperparameter search makes a new accelerator for each trial
            self.fsam.forget_engine()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        dataset = self.train_dataset
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise ValueError("train_dataset is empty: there is nothing to train on.")
        self.fsam.drop()  # what Ctrl-C may have left of the last training
        self.fsam.training = True
        self.fsam.fetches = self.fsam.entered = self.fsam.has_split = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FSAMDiagnosticsCallback):
                callback.fsam = self.fsam
        liger = self.args.use_liger_kernel and self.fsam.active and self.fsam.splits
        try:
            with losses_left_out(self) if liger else nullcontext():
                return super().train(*args, **kwargs)
        finally:
            self.fsam.training, self.fsam.probes = False, []
            self.fsam.drop()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # The Trainer's own (5.23), which begins again after running out of memory in a step. It makes its engine anew
        # out of the weights, so they have to be at θ.
        self.fsam.settle()
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's look ahead: it fetches all micro-batches of an optimizer step before it trains on the first."""
        fsam = self.fsam
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        for probe in fsam.probes:
            probe.see(batches)
        fsam.fetches = True
        fsam.batches, fsam.window, fsam.micro_step = batches, None, 0
        return batches, num_items_in_batch

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.fsam.settle()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.fsam.settle()
        super().save_model(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        made = self.optimizer  # also where an override returns nothing
        # One that is prepared was looked at before; one that DeepSpeed is to make has been by its engine.
        if self.fsam.active and not isinstance(made, AcceleratedOptimizer | DummyOptim):
            if self.args.fsam_precondition:
                check_keeps_second_moment(made)
            if self.args.fsam_ascent_direction == "momentum":
                check_keeps_momentum(made)
            self.fsam.check_weights_are_trained(made)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # The Trainer's own line, which it writes on all processes together: the means are reduced over them.
        # This step may be a plain one, and others since the last line were not.
        if {"loss", "learning_rate"} <= logs.keys():
            logs = {**logs, **self.fsam.means.drain(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir or ".") / "README.md"
            tagged = self.fsam.active and self.args.fsam_variant == "functional"
            model_card.complete(path, self.model, settings_of(self.args), tagged)


class _PlainTrainingRefused(TrainerCallback):
    """Refuses a class whose `training_step` trains and never calls the mixin's. One that skips its first batches leaves
    no gradient, except under DeepSpeed, which keeps gradients elsewhere."""

    def __init__(self, trainer: FSAMMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.fsam.entered or not trainer.fsam.active:
            return
        if trainer.is_deepspeed_enabled or any(weight.grad is not None for weight in trainer.model.parameters()):
            raise RuntimeError(
                f"the training_step of {type(trainer).__name__} does not call FSAMMixin's, so that it trains plainly. "
                "Put FSAMMixin before the class that has it: class MyFSAMTrainer(FSAMMixin, MyTrainer)."
            )


class FSAMTrainer(FSAMMixin, Trainer):
    """`transformers.Trainer` with the split step of `FSAMMixin`; takes the same arguments."""
