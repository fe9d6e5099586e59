"""`FSAMTrainer`: the Trainer whose step is split between function and loss."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_fsam import batches
from hf_fsam.arguments import FSAMArguments, check
from hf_fsam.cleanup import Cleanup
from hf_fsam.diagnostics.callback import FSAMDiagnosticsCallback
from hf_fsam.diagnostics.probe import Probe
from hf_fsam.engines import Ascent, Engine, select_engine, unwrapped
from hf_fsam.forward_state import RandomState, running_statistics
from hf_fsam.heads.deferred_logits import DeferringLabelSmoother, LogitsNeeded
from hf_fsam.heads.find import IDENTITY, find_boundary
from hf_fsam.heads.fused_head import FusedHead, KeptHead, fused_head
from hf_fsam.heads.trl import Counters
from hf_fsam.logs import FSAMSettings, LoggedMeans, settings_of
from hf_fsam.optimizer_state import check_keeps_second_moment
from hf_fsam.passes import CALLED_TWICE, Boundary, CleanPass, SecondPass, weights_past_boundary
from hf_fsam.perturbation import Perturbation

logger = logging.get_logger(__name__)

# The mixin stands before any Trainer class, whatever that may hold.
_AnyTrainer: Any = object


@dataclass(eq=False)
class _MicroBatch:
    """One micro-batch between its clean pass and its step.

    Attributes:
        fetched: as the Trainer fetched it.
        inputs: as `compute_loss` is to get it.
        versions: of the tensors in `inputs`.
        random: where the random stream stood before the clean pass.
    """

    fetched: dict[str, Any]
    inputs: dict[str, Any]
    versions: list[int | None] = field(init=False)
    random: RandomState = field(init=False)
    clean: CleanPass = field(init=False)

    def __post_init__(self) -> None:
        self.versions = [batches.version(part) for _, part in batches.parts(self.inputs)]

    def changed(self, inputs: dict[str, Any]) -> str | None:
        """The name of a part in which `inputs` are not what the clean pass got; None where there is none."""
        ours, given = dict(batches.parts(self.inputs)), dict(batches.parts(inputs))
        for (name, part), version in zip(ours.items(), self.versions, strict=True):
            other = given.get(name, _MISSING)
            untouched = batches.version(part) == version
            if not (untouched and (other is part or batches.alike(part, other))):
                return name
        return next((name for name in given if name not in ours), None)


_MISSING = object()


@dataclass
class _Window:
    """The micro-batches that share one ascent, and the perturbation that it gave."""

    waiting: list[_MicroBatch]
    perturbation: Perturbation
    of_gradient: bool = True
    reported: bool = False


@dataclass
class _Split:
    """A split step while the parent's runs.

    Attributes:
        fetched: the micro-batch that the step was given.
        num_items: that share a loss, as the Trainer counts them.
        contexts: what the second pass is inside of.
        raised: an exception came out of `compute_loss`.
        window, batch: to which this step belongs; None until `compute_loss` is called.
        moved: the pass at θ+ε.
        second: the one that the parent's step goes on with.
    """

    fetched: dict[str, Any]
    num_items: Tensor | int | None
    contexts: ExitStack
    raised: bool = False
    window: _Window | None = None
    batch: _MicroBatch | None = None
    moved: CleanPass | SecondPass | None = None
    second: SecondPass | None = None

    @property
    def in_second_pass(self) -> bool:
        """Between its loss and the end of its backward pass."""
        return self.second is not None and not self.second.backward_ended

    def end(self) -> None:
        """The weights are at θ after this, if the second pass is over."""
        if self.second is not None:
            self.contexts.close()


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
            is not on the way from the weights to the loss; where a step below changes a batch that has had its ascent
            (`fsam_ascent_scope="optimizer_step"`).
        TypeError: at the first step, for a boundary that does not return a tensor, or a batch that holds what cannot be
            copied; for a class that has a Trainer before the mixin.
        RuntimeError: where a step below computes no loss with `compute_loss`, or two, or where its second pass does not
            compute the function of the first; at the second step, where a step above does not come here.
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
        for name, value in settings_of(FSAMArguments()).items():
            if not hasattr(self.args, name):
                setattr(self.args, name, value)
        self.add_callback(FSAMSettings(**settings_of(self.args)))
        if self.args.fsam_diagnostics_steps:
            self.add_callback(FSAMDiagnosticsCallback(every=self.args.fsam_diagnostics_steps))
        self._fsam_cleanup = Cleanup()
        self._fsam_boundary = Boundary(self._fsam_cleanup)
        self._fsam_means = LoggedMeans(self.args.device)
        self._fsam_batches: list | None = None  # what the Trainer fetched for this optimizer step
        self._fsam_probes: list[Probe] = []
        self._fsam_window: _Window | None = None
        self._fsam_micro_step = 0
        self._fsam_pass: Literal["clean", "second"] | None = None
        self._fsam_training = self._fsam_entered = False
        self._fsam_checked_model: nn.Module | None = None
        self._fsam_attached_to: nn.Module | None = None
        self._fsam_fused: tuple[nn.Module, FusedHead | None] | None = None
        if self._fsam_active:
            _ = self._fsam_engine
            if self._fsam_splits:
                find_boundary(self.model, self.args.fsam_boundary)
            if self.args.torch_compile:
                self._fsam_attach()
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

    @property
    def fsam_pass(self) -> Literal["clean", "second"] | None:
        """Which pass of a split step `compute_loss` is called in; None outside of one, where the step is the plain
        Trainer's. A loss that keeps something from step to step (a memory, an average, terms for a log of its own)
        keeps it where this is not "second".

        Where the fused head turns out to be none for a loss, the first clean pass is made again (see
        `fsam_fused_head`)."""
        return self._fsam_pass

    # ---- The step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step with its gradient split: its `compute_loss` runs twice, at θ and at θ+ε. Returns the clean
        loss ℓ(θ), shape (), in the parent's scale."""
        self._fsam_entered = True
        if not (self._fsam_active and self._fsam_due):
            return super().training_step(model, inputs, num_items_in_batch)
        self._fsam_begin()
        try:
            with ExitStack() as contexts:
                split = _Split(inputs, num_items_in_batch, contexts)
                contexts.enter_context(self._fsam_splitting(split))
                loss = super().training_step(model, inputs, num_items_in_batch)
                whole = self._fsam_is_whole(split)
        except BaseException:
            self._fsam_drop()
            raise
        finally:
            self._fsam_pass = None
        if whole:
            self._fsam_report(split)
        self._fsam_micro_step += 1
        if not self._fsam_training:
            self._fsam_detach()
        return loss

    @contextmanager
    def _fsam_splitting(self, split: _Split) -> Iterator[None]:
        """Whatever `compute_loss` is, the parent's, a subclass's or one set on the instance: inside, each call of it is
        split. An exception comes out where the parent's step calls it, and can be caught there."""
        compute_loss = self.compute_loss

        @functools.wraps(compute_loss)
        def split_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and not split.in_second_pass:  # an evaluation in the parent's step
                split.end()
                return compute_loss(model, inputs, *args, **kwargs)
            try:
                return self._fsam_compute_loss(split, compute_loss, model, inputs, *args, **kwargs)
            except BaseException:
                split.raised = True
                raise

        with self._fsam_cleanup.replaced(self, "compute_loss", split_loss):
            yield

    def _fsam_compute_loss(
        self,
        split: _Split,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The clean passes, where they are due; the perturbation; and the second pass's loss, which the parent's step
        back-propagates. Weights return to θ when `split.contexts` end."""
        if split.second is not None:
            raise RuntimeError(CALLED_TWICE)
        loss_of = functools.partial(self._fsam_call, compute_loss, args, kwargs)
        self._fsam_pass = "clean"
        split.window = window = self._fsam_window or self._fsam_ascend(split, loss_of, model, inputs)
        self._fsam_pass = "second"
        split.batch = batch = self._fsam_take(window, split.fetched, inputs)
        weights: AbstractContextManager = self._fsam_engine.perturbed(window.perturbation)
        cotangents = batch.clean if self._fsam_splits else None
        if self.args.fsam_variant == "logit":
            batch.random.restore()
            with weights, self._fsam_uncounted(model):
                inner = unwrapped(self.accelerator, model)
                cotangents = split.moved = self._fsam_clean_pass(loss_of, inner, batch)
            weights = nullcontext()
        batch.random.restore()
        split.second = second = SecondPass(batch.clean, cotangents)
        split.moved = split.moved or second
        for context in (weights, self._fsam_uncounted(model), self._fsam_boundary.running(second)):
            split.contexts.enter_context(context)
        result = compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return (second.see_loss(result[0]), *result[1:])
        return second.see_loss(result)

    @contextmanager
    def _fsam_uncounted(self, model: nn.Module) -> Iterator[None]:
        """What a pass over a batch counts beside its loss, the clean one has counted."""
        cleanup = self._fsam_cleanup
        with cleanup.after(running_statistics(model)), cleanup.after(Counters(self).restore):
            yield

    def _fsam_ascend(
        self, split: _Split, loss_of: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any]
    ) -> _Window:
        """Clean passes over the micro-batches of the ascent scope, and the perturbation that they give. Where they turn
        out to need the logits that the fused head defers, all are made again with them."""
        fetched = (self.args.fsam_ascent_scope == "optimizer_step" and self._fsam_batches) or [split.fetched]
        waiting = [
            _MicroBatch(each, inputs if each is split.fetched else self._prepare_inputs(each)) for each in fetched
        ]
        along = None
        if self.args.fsam_ascent_direction == "momentum":
            along = self._fsam_engine.momentum(model, self._fsam_weights(), self.optimizer)
            if along is None and self.state.global_step > 1:
                logger.warning_once(
                    "fsam_ascent_direction='momentum': the optimizer has none yet. SGD without momentum never has; a "
                    "loss scaler may have skipped its first steps. The ascent is along the gradient, and a step takes "
                    "two passes: choose an optimizer with one (SGD with momentum=0.9, Adam), or "
                    "fsam_ascent_direction='gradient'."
                )
        divisor, before, fused = self._fsam_divisor(split.num_items), Counters(self), self._fsam_boundary.head
        try:
            ascent = self._fsam_clean_passes(loss_of, model, waiting, along, divisor)
        except LogitsNeeded as error:
            if fused is None or not self._fsam_engine.forward_can_be_retried:
                raise
            fused.turn_off(str(error))
            before.restore()
            waiting[0].random.restore()
            ascent = self._fsam_clean_passes(loss_of, model, waiting, along, divisor)
        perturbation = self._fsam_engine.perturb(
            ascent,
            optimizer=self.optimizer if self.args.fsam_precondition else None,
            rho=self.args.fsam_rho,
            # From where the run stands, so that a resumed one rounds alike.
            seed=((self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + self._fsam_micro_step) % 2**63,
            cotangents=[u for batch in waiting for crossing in batch.clean.crossings for u in crossing.cotangents],
            direction=None,
        )
        self._fsam_window = _Window(waiting, perturbation, of_gradient=along is None)
        return self._fsam_window

    def _fsam_weights(self) -> list[Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _fsam_clean_passes(
        self,
        loss_of: Callable[..., Tensor],
        model: nn.Module,
        waiting: list[_MicroBatch],
        along: Ascent | None,
        divisor: int,
    ) -> Ascent:
        """Over all micro-batches of a window; back to the boundary only where the ascent is `along` something else than
        their gradient."""
        average = self.args.fsam_ascent_scope != "rank"
        passes: AbstractContextManager[Ascent] = (
            self._fsam_engine.ascent(model, self._fsam_weights(), average=average, passes=len(waiting))
            if along is None
            else nullcontext(along)
        )
        kept: list[KeptHead] = []
        with passes as ascent:
            backward = ascent.backward if along is None else None
            for batch in waiting:
                batch.random = RandomState.capture(self.args.device)
                batch.clean = self._fsam_clean_pass(loss_of, ascent.model, batch, divisor, backward, kept)
                if self.args.fsam_offload_hidden_states:
                    batch.clean.offload()
        return ascent

    def _fsam_clean_pass(
        self,
        loss_of: Callable[..., Tensor],
        model: nn.Module,
        batch: _MicroBatch,
        divisor: int = 1,
        backward: Callable[[Tensor], None] | None = None,
        kept: list[KeptHead] | None = None,
    ) -> CleanPass:
        """A recorded forward and backward pass; without `backward`, back to the boundary only."""
        keep = backward is None or self.args.fsam_variant == "functional"
        clean = CleanPass(keep=keep, cut=backward is None, kept=kept)
        with self._fsam_boundary.running(clean):
            loss = clean.see_loss(loss_of(model, batches.copied(batch.inputs)))
            if self._fsam_splits and self._fsam_checked_model is not self.model:
                self._fsam_check_boundary(loss, clean)
            loss = loss / divisor
            # Around the call of compute_loss there may be an autocast region, in which no backward pass belongs.
            with torch.autocast(self.args.device.type, enabled=False):
                if backward is None:
                    clean.differentiate(self._fsam_engine.scale(loss))
                else:
                    backward(loss)
        return clean

    def _fsam_call(
        self, compute_loss: Callable[..., Any], args: tuple, kwargs: dict, model: nn.Module, inputs: dict[str, Any]
    ) -> Tensor:
        result = compute_loss(model, inputs, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def _fsam_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What the parent's step divides the loss by (read in transformers 5.23), so that a loss scale that suits one
        pass suits the other."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = scaled or self.compute_loss_func is not None
        return 1 if scaled else getattr(self, "current_gradient_accumulation_steps", 1)

    def _fsam_take(self, window: _Window, fetched: dict[str, Any], inputs: dict[str, Any]) -> _MicroBatch:
        index = next((i for i, batch in enumerate(window.waiting) if batch.fetched is fetched), None)
        batch = None if index is None else window.waiting.pop(index)
        if not window.waiting:
            self._fsam_window = None
        changed = "batch" if batch is None else None if batch.inputs is inputs else batch.changed(inputs)
        if batch is None or changed is not None:
            raise ValueError(
                "fsam_ascent_scope='optimizer_step' ascended on the micro-batches that get_batch_samples returned, but "
                f"compute_loss was given another {changed}: change it in the data collator and not in training_step, "
                "or set fsam_ascent_scope='micro_batch'."
            )
        return batch

    def _fsam_is_whole(self, split: _Split) -> bool:
        """Whether both passes came to their end; not so where the parent's step has caught an exception.

        Raises:
            RuntimeError: the parent's step never called `compute_loss`, or did not back-propagate its loss.
        """
        if split.raised or (split.second is not None and split.second.interrupted):
            return False
        second = split.second or SecondPass(CleanPass(), None)
        return second.loss is not None and second.scale is not None

    def _fsam_check_boundary(self, loss: Tensor, clean: CleanPass) -> None:
        """Once a training: say what goes past the boundary."""
        self._fsam_checked_model = self.model
        names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        past = weights_past_boundary(loss, clean.nodes, names)
        if clean.crossed and past:
            logger.warning(
                f"The loss depends on {len(past)} weights ({', '.join(past[:3])}{', ...' * (len(past) > 3)}) on a way "
                f"past the boundary {self._fsam_boundary.name!r}. Along that way the step is plain SAM. For a term of "
                "the loss by itself (a balancing loss, an L2 penalty) or a bias behind the head nothing is to be done. "
                f"{IDENTITY}."
            )

    def _fsam_begin(self) -> None:
        self._fsam_cleanup.run()  # what Ctrl-C on the way out of the last step has left
        self._fsam_engine.restore()
        self._fsam_attach()
        if self._fsam_micro_step == 0 or self._fsam_batches is None:  # driven by hand, each call is a step
            self._fsam_means.count_step()

    def _fsam_attach(self) -> None:
        boundary = self._fsam_boundary
        if not self._fsam_splits or (boundary.attached and self._fsam_attached_to is self.model):
            return
        boundary.detach()
        name, module = find_boundary(self.model, self.args.fsam_boundary)
        head = self._fsam_head(module)
        boundary.attach(
            name, module, head, self._fsam_engine.detached_weights_stay, compiled=bool(self.args.torch_compile)
        )
        self._fsam_attached_to = self.model

    def _fsam_detach(self) -> None:
        # A compiled model keeps it: code that was compiled without the hook would pass it by (torch 2.13).
        if not self.args.torch_compile:
            self._fsam_boundary.detach()

    def _fsam_head(self, module: nn.Module) -> FusedHead | None:
        if not self.args.fsam_fused_head:
            return None
        if self._fsam_fused is None or self._fsam_fused[0] is not module:
            fused = fused_head(
                self.model, module, self._fsam_engine.detached_weights_stay, compiled=bool(self.args.torch_compile)
            )
            self._fsam_fused = module, fused
        return self._fsam_fused[1]

    def _fsam_drop(self) -> None:
        self._fsam_cleanup.run()
        if "_fsam_engine" in self.__dict__:  # whatever the arguments say by now
            self._fsam_engine.restore()
        self._fsam_detach()
        self._fsam_window = self._fsam_batches = None
        self._fsam_means.clear()

    def _fsam_report(self, split: _Split) -> None:
        assert split.window is not None
        assert split.batch is not None
        assert split.second is not None
        assert split.moved is not None
        window, clean, moved = split.window, split.batch.clean, split.moved
        # Of the micro-batch's loss in the one that is logged.
        share = split.second.scale / (clean.scale * self._fsam_divisor(split.num_items))
        skipped = window.perturbation.skipped
        if not window.reported:
            window.reported = True
            unit = clean.scale / share if window.of_gradient else torch.ones_like(clean.scale)
            self._fsam_means.add_ascent(window.perturbation, unit=unit)
        self._fsam_means.add_second(clean.loss.isfinite() & ~moved.finite)
        if moved.computes_its_loss:
            self._fsam_means.add_change("sharpness", (moved.loss - clean.loss) * share, skipped)
        elif isinstance(moved, SecondPass) and moved.linear_loss_change is not None:
            self._fsam_means.add_change("functional_sharpness", moved.linear_loss_change / clean.scale * share, skipped)

    # ---- Around the step ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.__dict__.pop("_fsam_engine", None)  # a hyperparameter search makes a new accelerator for each trial

    def train(self, *args: Any, **kwargs: Any) -> Any:
        dataset = self.train_dataset
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise ValueError("train_dataset is empty: there is nothing to train on.")
        self._fsam_drop()  # what Ctrl-C may have left of the last training
        self._fsam_training, self._fsam_entered = True, False
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
            settings = "\n".join(f"- {name}: {value}" for name, value in settings_of(self.args).items())
            card.text += (
                f"\n\n### Functional-SAM\n\n[arXiv 2502.02407](https://arxiv.org/abs/2502.02407)\n\n{settings}\n"
            )
            card.save(path)


class FSAMTrainer(FSAMMixin, Trainer):
    """`transformers.Trainer` with the split step of :class:`FSAMMixin`; takes the same arguments."""
