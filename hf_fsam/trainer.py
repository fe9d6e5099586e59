"""`FSAMTrainer`: the Trainer whose step is split between function and loss."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_fsam.arguments import FSAMArguments, check
from hf_fsam.boundary import find_boundary
from hf_fsam.deferred import DeferringLabelSmoother, FusedHead, fused_head
from hf_fsam.diagnostics import FSAMDiagnosticsCallback, LoggedMeans
from hf_fsam.engines import Ascent, Engine, LocalEngine, select_engine
from hf_fsam.forward_state import RandomState, running_statistics_kept
from hf_fsam.geometry import Probe
from hf_fsam.perturbation import Perturbation
from hf_fsam.second_moment import check_keeps_second_moment
from hf_fsam.tape import Recording, Tape, weights_past_boundary

logger = logging.get_logger(__name__)

# The mixin stands before any Trainer class, whatever that may hold.
_AnyTrainer: Any = object

_COUNTED = ("_metrics", "_stored_metrics", "_total_train_tokens")  # TRL 1.16


class _LogitsNeeded(Exception):
    """A clean pass with deferred logits has to be made again with them."""


@dataclass
class _MicroBatch:
    """One micro-batch between its clean pass and its step: where the random stream stood, and what the pass left."""

    inputs: dict[str, Any]
    random: RandomState = field(init=False)
    clean: Recording = field(init=False)
    seen: dict[str, Tensor] = field(default_factory=dict)  # copies of what the clean pass got, while that is checked


@dataclass
class _Window:
    """The micro-batches that share one ascent, and the perturbation that it gave."""

    waiting: list[_MicroBatch]
    perturbation: Perturbation
    of_gradient: bool = True
    reported: bool = False


class FSAMMixin(_AnyTrainer):
    """Put it before any `Trainer` class: `class MyFSAMTrainer(FSAMMixin, MyTrainer)`.

    The gradient that the optimizer gets is, by `fsam_variant` (J the Jacobian of the logits, u the loss derivative at
    them, ε the perturbation of arXiv 2502.02407):

        none        J(θ)ᵀ u(θ)          the parent's own step, bit for bit
        sam         J(θ+ε)ᵀ u(θ+ε)
        functional  J(θ+ε)ᵀ u(θ)
        logit       J(θ)ᵀ u(θ+ε)

    Everything else is the parent's: its `compute_loss`, its `training_step`, loss scaling, gradient accumulation,
    clipping, the optimizer. `args` without `fsam_*` fields are completed with the defaults of :class:`FSAMArguments`.

    Raises:
        ValueError: before training, for a model without a boundary, an optimizer without a second moment where one is
            needed, an empty data set, or a way of running that is not supported; at the first step, for a boundary that
            is not on the way from the weights to the loss.
        TypeError: at the first step, for a boundary that does not return a tensor; for a class that has a Trainer
            before the mixin.
        RuntimeError: where a step below computes no loss with `compute_loss`, or two, or changes the batch, or where
            its second pass does not compute the function of the first; at the second step, where a step above does not
            come here.
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
        super().__init__(*args, **kwargs)
        for name, value in _settings(FSAMArguments()).items():
            if not hasattr(self.args, name):
                setattr(self.args, name, value)
        self.add_callback(FSAMSettings(**_settings(self.args)))
        if self.args.fsam_diagnostics_steps:
            self.add_callback(FSAMDiagnosticsCallback(every=self.args.fsam_diagnostics_steps))
        self._fsam_tape = Tape()
        self._fsam_means = LoggedMeans(self.args.device)
        self._fsam_batches: list | None = None  # what the Trainer fetched for this optimizer step
        self._fsam_probes: list[Probe] = []
        self._fsam_window: _Window | None = None
        self._fsam_micro_step = 0
        self._fsam_training = self._fsam_entered = self._fsam_checked_inputs = False
        self._fsam_checked_model: nn.Module | None = None
        self._fsam_fused: tuple[nn.Module, FusedHead | None] | None = None
        if self._fsam_active:
            _ = self._fsam_engine
            if self._fsam_splits:
                find_boundary(self.model, self.args.fsam_boundary)
        smoother: Any = getattr(self, "label_smoother", None)
        if type(smoother) is LabelSmoother:
            self.label_smoother: Any = DeferringLabelSmoother(**vars(smoother))

    @property
    def _fsam_active(self) -> bool:
        check(self.args)  # a search or a callback may have changed them
        return self.args.fsam_variant != "none" and self.args.fsam_rho > 0

    @property
    def _fsam_due(self) -> bool:
        """Whether this optimizer step is one that perturbs."""
        return self.state.global_step % self.args.fsam_every_steps == 0

    @functools.cached_property
    def _fsam_engine(self) -> Engine:
        return select_engine(self)

    @property
    def _fsam_splits(self) -> bool:
        return self.args.fsam_variant in ("functional", "logit")

    # ---- The step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step with its gradient split. Returns the clean loss ℓ(θ), shape (), in the parent's scale."""
        self._fsam_entered = True
        if not (self._fsam_active and self._fsam_due):
            return super().training_step(model, inputs, num_items_in_batch)
        with self._fsam_tidied():
            window = self._fsam_window or self._fsam_ascend(model, inputs, num_items_in_batch)
            batch = self._fsam_take(window, inputs)
            weights: AbstractContextManager = self._fsam_engine.perturbed(window.perturbation)
            cotangents, moved = batch.clean if self._fsam_splits else None, None
            if self.args.fsam_variant == "logit":
                batch.random.restore()
                with weights, running_statistics_kept(model), self._fsam_uncounted():
                    # Past the wrappers, which would wait for a backward pass of the training.
                    inner = self.accelerator.unwrap_model(model)
                    cotangents = moved = self._fsam_pass(inner, batch, num_items_in_batch)
                weights = nullcontext()
            batch.random.restore()
            with (
                weights,
                running_statistics_kept(model),
                self._fsam_uncounted(),
                self._fsam_tape.replay(batch.clean, cotangents) as replayed,
                self._fsam_loss_seen(batch),
            ):
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._fsam_checked_inputs = True
            self._fsam_report(window, batch.clean, replayed, moved or replayed)
            return loss

    def _fsam_ascend(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> _Window:
        """Clean passes over the micro-batches of the ascent scope, and the perturbation that they give."""
        scope = self.args.fsam_ascent_scope
        fetched = (scope == "optimizer_step" and self._fsam_batches) or [inputs]
        batches = [_MicroBatch(micro_batch) for micro_batch in fetched]
        along = None
        if self.args.fsam_ascent_direction == "momentum":
            along = self._fsam_engine.momentum(model, self.optimizer)
            if along is None and self.state.global_step > 1:
                logger.warning_once(
                    "fsam_ascent_direction='momentum': the optimizer has stepped and has none, as SGD without momentum "
                    "never has. The ascent is along the gradient, and a step takes two passes."
                )
        passes: AbstractContextManager[Ascent]
        if along is None:
            passes = self._fsam_engine.ascent(model, average=scope != "rank", passes=len(batches))
        else:
            passes = nullcontext(along)
        kept: list = []
        with passes as ascent:
            for batch in batches:
                batch.random = RandomState.capture(self.args.device)
                backward = ascent.backward if along is None else None
                batch.clean = self._fsam_pass(ascent.model, batch, num_items_in_batch, backward, kept)
                if self.args.fsam_offload_hidden_states:
                    batch.clean.offload()
        perturbation = self._fsam_engine.perturb(
            ascent,
            optimizer=self.optimizer if self.args.fsam_precondition else None,
            rho=self.args.fsam_rho,
            # From where the run stands, so that a resumed one rounds alike.
            seed=((self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + self._fsam_micro_step) % 2**63,
            cotangents=[cotangent for batch in batches for cotangent in batch.clean.cotangents.values()],
        )
        self._fsam_window = _Window(batches, perturbation, of_gradient=along is None)
        return self._fsam_window

    def _fsam_pass(
        self,
        model: nn.Module,
        batch: _MicroBatch,
        num_items_in_batch: Tensor | int | None,
        backward: Callable[[Tensor], None] | None = None,
        kept: list | None = None,
    ) -> Recording:
        """A forward and backward pass as the parent's step makes it, recorded; without `backward`, back to the boundary
        only. Where it turns out to need the logits that the fused head defers, it is made again with them."""
        try:
            return self._fsam_record(model, batch, num_items_in_batch, backward, kept)
        except _LogitsNeeded:
            batch.random.restore()
        with self._fsam_uncounted(), running_statistics_kept(model):
            return self._fsam_record(model, batch, num_items_in_batch, backward, kept)

    def _fsam_record(
        self,
        model: nn.Module,
        batch: _MicroBatch,
        num_items_in_batch: Tensor | int | None,
        backward: Callable[[Tensor], None] | None,
        kept: list | None,
    ) -> Recording:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers train at other weights
            self.optimizer.train()
        inputs = self._prepare_inputs(batch.inputs)
        if not self._fsam_checked_inputs:
            batch.seen = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        keep = backward is None or self.args.fsam_variant == "functional"
        # TRL 1.16 enters this in its own training_step, which the clean pass does not go through.
        offloading = getattr(self, "maybe_activation_offload_context", nullcontext())
        with offloading, self._fsam_tape.record(keep=keep, cut=backward is None, kept=kept) as recording:
            with self.compute_loss_context_manager(), self._fsam_deferring():
                loss = self._fsam_tape.see_loss(self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch))
            if self._fsam_splits and self._fsam_checked_model is not self.model and backward is not None:
                self._fsam_check_boundary(loss, recording)
            if backward is None:
                recording.differentiate(self._fsam_engine.scale(loss))
            else:
                backward(loss)
        return recording

    @contextmanager
    def _fsam_deferring(self) -> Iterator[None]:
        """Around a clean pass's loss: turns the fused head off where it is not for this loss.

        Raises:
            _LogitsNeeded: no gradient has been taken yet, so that the pass can be made again.
        """
        head = self._fsam_tape.head
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if head is None or head.proven:
                raise
            if not isinstance(self._fsam_engine, LocalEngine):  # what an engine does in a forward pass may be half done
                error.add_note("hf_fsam: if the loss cannot take deferred logits, set fsam_fused_head=False.")
                raise
            head.turn_off(f"with them deferred, compute_loss raised {type(error).__name__}: {error}")
            raise _LogitsNeeded from error
        if head is not None:
            if head.off:
                raise _LogitsNeeded
            head.proven = True

    def _fsam_take(self, window: _Window, inputs: dict[str, Any]) -> _MicroBatch:
        batch = window.waiting.pop(0)
        if batch.inputs is not inputs:
            raise ValueError(
                "fsam_ascent_scope='optimizer_step' ascended on the micro-batches that get_batch_samples returned, but "
                "training_step was given another one: change batches in the data collator, or use 'micro_batch'."
            )
        if not window.waiting:
            self._fsam_window = None
        return batch

    def _fsam_check_boundary(self, loss: Tensor, recording: Recording) -> None:
        """Once a training: make sure that the boundary is crossed, and say what goes past it."""
        self._fsam_checked_model = self.model
        names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        past = weights_past_boundary(loss, recording, names)
        if recording.crossings and past:
            logger.warning(
                f"The loss depends on {len(past)} weights ({', '.join(past[:3])}, ...) on a way past the boundary "
                f"{self._fsam_tape.name!r}, as a balancing loss of a mixture of experts does. Along that way the step "
                "is plain SAM."
            )

    @contextmanager
    def _fsam_uncounted(self) -> Iterator[None]:
        """What TRL's trainers count and collect of a batch in `compute_loss`, they have done in the clean pass."""
        counted = {name: copy.deepcopy(self.__dict__[name]) for name in _COUNTED if name in self.__dict__}
        try:
            yield
        finally:
            self.__dict__.update(counted)

    @contextmanager
    def _fsam_loss_seen(self, batch: _MicroBatch) -> Iterator[None]:
        """Whatever `compute_loss` is, the parent's, a subclass's or one set on the instance: its loss goes past the
        tape while the parent's step runs, and it is given what it was given in the clean pass."""
        compute_loss, attributes = self.compute_loss, self.__dict__
        own = attributes.get("compute_loss")

        @functools.wraps(compute_loss)
        def seen(*args: Any, **kwargs: Any) -> Any:
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            for name, value in batch.seen.items():
                if name not in inputs or not _alike(inputs[name], value):
                    raise RuntimeError(
                        f"the second pass got another {name!r} than the first: either the training_step below "
                        "FSAMMixin changes the batch, or compute_loss changes it in place. Do it in the data collator, "
                        "or in compute_loss on a copy, or set fsam_variant='none'."
                    )
            result = compute_loss(*args, **kwargs)
            if isinstance(result, tuple):
                return (self._fsam_tape.see_loss(result[0]), *result[1:])
            return self._fsam_tape.see_loss(result)

        attributes["compute_loss"] = seen
        try:
            yield
        finally:
            del attributes["compute_loss"]
            if own is not None:
                attributes["compute_loss"] = own

    @contextmanager
    def _fsam_tidied(self) -> Iterator[None]:
        """The boundary's hook is on inside; nothing of the step outlives an exception."""
        if self._fsam_splits and not self._fsam_tape.attached:
            name, boundary = find_boundary(self.model, self.args.fsam_boundary)
            if self.args.torch_compile:  # code that was compiled without the hook would pass it by (torch 2.13)
                torch.compiler.reset()
            self._fsam_tape.attach(name, boundary, self._fsam_head(boundary), self._fsam_engine.keeps)
        if self._fsam_micro_step == 0 or self._fsam_batches is None:  # driven by hand, each call is a step
            self._fsam_means.count_step()
        try:
            yield
        except BaseException:
            self._fsam_drop()
            raise
        self._fsam_micro_step += 1
        if not self._fsam_training:
            self._fsam_tape.detach()

    def _fsam_head(self, boundary: nn.Module) -> FusedHead | None:
        if not self.args.fsam_fused_head:
            return None
        if self._fsam_fused is None or self._fsam_fused[0] is not boundary:
            self._fsam_fused = boundary, fused_head(self, boundary)
        return self._fsam_fused[1]

    def _fsam_drop(self) -> None:
        if "_fsam_engine" in self.__dict__:  # whatever the arguments say by now
            self._fsam_engine.restore()
        self._fsam_tape.detach()
        self._fsam_window = self._fsam_batches = None
        self._fsam_means.clear()

    def _fsam_report(self, window: _Window, clean: Recording, replayed: Recording, moved: Recording) -> None:
        share = replayed.scale / clean.scale  # of the micro-batch's loss in the one that is logged
        skipped = window.perturbation.skipped
        if not window.reported:
            window.reported = True
            unit = clean.scale / share if window.of_gradient else torch.ones_like(clean.scale)
            self._fsam_means.add_ascent(window.perturbation, unit=unit)
        if not moved.fused:
            self._fsam_means.add_rise("sharpness", (moved.loss - clean.loss) * share, skipped)
        elif moved.rise is not None:
            self._fsam_means.add_rise("functional_sharpness", moved.rise / clean.scale * share, skipped)

    # ---- Around the step ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.__dict__.pop("_fsam_engine", None)  # a hyperparameter search makes a new accelerator for each trial

    def train(self, *args: Any, **kwargs: Any) -> Any:
        dataset = self.train_dataset
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise ValueError("train_dataset is empty: there is nothing to train on.")
        self._fsam_training = True
        self._fsam_entered = self._fsam_checked_inputs = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FSAMDiagnosticsCallback):
                callback.trainer = self
        try:
            return super().train(*args, **kwargs)
        finally:
            self._fsam_training = False
            self._fsam_probes = []
            self._fsam_drop()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's look ahead: it fetches all micro-batches of an optimizer step before it trains on the first."""
        if self._fsam_batches and self._fsam_active and not self._fsam_entered:
            raise RuntimeError(
                f"the training_step of {type(self).__name__} does not call FSAMMixin's, so that it trains plainly. Put "
                "FSAMMixin before the class that has it: class MyFSAMTrainer(FSAMMixin, MyTrainer)."
            )
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        for probe in self._fsam_probes:
            probe.see(batches)
        self._fsam_batches, self._fsam_window, self._fsam_micro_step = batches, None, 0
        return batches, num_items_in_batch

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._fsam_settle()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._fsam_settle()
        super().save_model(*args, **kwargs)

    def _fsam_settle(self) -> None:
        """An exception in the step may have left the weights of other processes' shards to be brought back."""
        if "_fsam_engine" in self.__dict__:
            self._fsam_engine.settle()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        made = self.optimizer  # also where an override returns nothing
        if self._fsam_active and self.args.fsam_precondition and not isinstance(made, AcceleratedOptimizer):
            check_keeps_second_moment(made)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # The Trainer's own line, which it writes on all processes together: the means are reduced over them.
        if self._fsam_active and {"loss", "learning_rate"} <= logs.keys():
            logs = {**logs, **self._fsam_means.drain(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            settings = "\n".join(f"- {name}: {value}" for name, value in _settings(self.args).items())
            card.text += (
                f"\n\n### Functional-SAM\n\n[arXiv 2502.02407](https://arxiv.org/abs/2502.02407)\n\n{settings}\n"
            )
            card.save(path)


class FSAMTrainer(FSAMMixin, Trainer):
    """`transformers.Trainer` with the split step of :class:`FSAMMixin`; takes the same arguments."""


class FSAMSettings(TrainerCallback, ExportableState):
    """Writes the `fsam_*` fields into `trainer_state.json`, and says so where a resumed run changes them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def state(self) -> dict[str, Any]:
        return {"args": self.settings, "attributes": {}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = _settings(args)  # a schedule of ρ, say, changes them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settings = _settings(args)
        # A plain Trainer's checkpoint has no place for these settings, which the Trainer needs to save them to.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["args"].items():
            if state.global_step and self.settings.get(name, value) != value:
                logger.warning(
                    f"The checkpoint was trained with {name}={value!r}, this run goes on with {self.settings[name]!r}."
                )


def _alike(a: Tensor, b: Tensor) -> bool:
    """With NaN where NaN is."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _settings(args: FSAMArguments) -> dict[str, Any]:
    return {each.name: getattr(args, each.name) for each in fields(FSAMArguments)}
