"""The split step: clean passes at θ, the perturbation ε that their gradient gives, and a second pass at θ+ε."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from hf_fsam import batches
from hf_fsam.counters import Counters
from hf_fsam.engines import Ascent, gradients_set_aside
from hf_fsam.forward_state import RandomState, running_statistics
from hf_fsam.functional_sam import FunctionalSAM, MicroBatch, Window
from hf_fsam.graph import node_count, node_number
from hf_fsam.heads import trl
from hf_fsam.heads.deferred_logits import DeferringLabelSmoother, LogitsNeeded
from hf_fsam.heads.unperturbed import UnperturbedHead
from hf_fsam.passes import CALLED_TWICE, NOT_BACK_PROPAGATED, CleanPass, SecondPass
from hf_fsam.perturbation import Perturbation
from hf_fsam.seam import Seam

logger = logging.get_logger(__name__)

BACK_PROPAGATES = (
    "compute_loss back-propagates by itself, with accelerator.backward, so the gradient could not be split. Let it "
    "return the loss, which training_step back-propagates, or set fsam_variant='none'."
)

GENERATES = (
    "compute_loss generates text in the second pass, with the weights at θ+ε, and another text than in the first. "
    "Generate it in _prepare_inputs; or where fsam_pass is not 'second', and keep it for the second pass; or set "
    "fsam_variant='none'."
)


class SplitStep:
    """The step of one micro-batch. It is a context manager: inside, each call of the trainer's `compute_loss` is split,
    and afterwards the weights are at θ.

    Args:
        fetched: the micro-batch, as `training_step` got it.
        num_items: how many items the loss is averaged over, as the Trainer counts them.
    """

    def __init__(self, fsam: FunctionalSAM, fetched: dict[str, Any], num_items: Tensor | int | None) -> None:
        self.fsam, self.trainer = fsam, fsam.trainer
        self.fetched = fetched
        self.divisor = _loss_divisor(self.trainer, num_items)
        self.window = fsam.window
        self.ascended = self._waiting(fsam.window) if fsam.window else None  # in an earlier step of the window
        self.batch: MicroBatch | None = None
        self.second: SecondPass | None = None
        self.moved: CleanPass | SecondPass | None = None  # the pass at θ+ε
        self._raised = self._in_compute_loss = False
        self._contexts = ExitStack()
        self._second_contexts = ExitStack()  # those of the second pass: the weights are at θ+ε
        self._ended_at: int | None = None  # when in the order of autograd's nodes they ended

    def __enter__(self) -> "SplitStep":
        replaced = functools.partial(self.fsam.cleanup.replaced, self.trainer)
        self._contexts.enter_context(replaced("compute_loss", self._splitting(self.trainer.compute_loss)))
        smoother: Any = getattr(self.trainer, "label_smoother", None)
        if type(smoother) is LabelSmoother:
            deferring = DeferringLabelSmoother(**vars(smoother))
            self._contexts.enter_context(replaced("label_smoother", deferring))
        if self.ascended is not None:
            prepare = self._prepared_once(self.ascended, self.trainer._prepare_inputs)
            self._contexts.enter_context(replaced("_prepare_inputs", prepare))
        accelerator = self.trainer.accelerator
        backward = self._of_this_loss(accelerator.backward)
        self._contexts.enter_context(self.fsam.cleanup.replaced(accelerator, "backward", backward))
        if not self.trainer.is_deepspeed_enabled:  # which takes its step inside of `backward`, and is at θ by then
            # For a step that back-propagates by itself and steps an optimizer: it has to step from θ.
            handle = register_optimizer_step_pre_hook(lambda *_: self._end_second_pass())
            self._contexts.enter_context(self.fsam.cleanup.after(handle.remove))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._contexts.__exit__(kind, error, traceback)

    def _prepared_once(self, batch: MicroBatch, prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`prepare`, which makes nothing anew of what the ascent has had prepared. It may draw random numbers."""

        @functools.wraps(prepare)
        def once(fetched: Any) -> Any:
            return batch.inputs if batch.was_fetched_as(fetched) else prepare(fetched)

        return once

    def _of_this_loss(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Accelerate's `backward`, for after `compute_loss`: DeepSpeed would take its step inside of it. When it has
        ended, the weights are at θ for what the parent's step does next. Another loss that it back-propagates is
        differentiated where it was computed: at θ+ε, as a term of `sam` is, if that was in the second pass."""

        @functools.wraps(backward)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if self.fsam.current_pass == "clean":
                raise RuntimeError(f"{type(self.trainer).__name__}: {BACK_PROPAGATES}")
            if self.second is None:
                raise RuntimeError(self._not_back_propagated())
            loss = args[0] if args else kwargs.get("loss")
            with self._perturbed_again() if self._is_of_the_ended_pass(loss) else nullcontext():
                result = backward(*args, **kwargs)
            self._end_second_pass()
            return result

        return checked

    def _end_second_pass(self) -> None:
        """The weights are at θ after it, once the backward pass of the loss has ended. Until then nothing happens."""
        if self.second is not None and self.second.backward_ended and self._ended_at is None:
            self._ended_at = node_count()
            self._second_contexts.close()

    def _is_of_the_ended_pass(self, loss: Any) -> bool:
        node = getattr(loss, "grad_fn", None)
        return self._ended_at is not None and node is not None and node_number(node) < self._ended_at

    def _perturbed_again(self) -> AbstractContextManager[None]:
        assert self.window is not None
        return self._perturbed(self.window.perturbation) if self.moved is self.second else nullcontext()

    def return_to_theta(self) -> None:
        """The weights are the clean ones for the rest of the step.

        Raises:
            RuntimeError: the second pass is not over.
        """
        if self.second is None or not self.second.backward_ended:
            raise RuntimeError(f"{type(self.trainer).__name__}: {GENERATES}")
        self._end_second_pass()

    def _not_back_propagated(self) -> str:
        classes = type(self.trainer).__mro__
        below = classes[classes.index(Seam) + 1 :]
        owner = next(each for each in below if "training_step" in vars(each))
        return f"{owner.__name__}: {NOT_BACK_PROPAGATED}"

    def _splitting(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """`compute_loss` with its gradient split, whether it is the parent's, a subclass's or one set on the instance.
        An exception comes out where the parent's step calls it, and can be caught there."""

        @functools.wraps(compute_loss)
        def split(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
                return compute_loss(model, inputs, *args, **kwargs)

            if self._in_compute_loss:  # it calls itself, for another try or on another batch
                return call(model, inputs)
            second_pass_runs = self.second is not None and not self.second.backward_ended
            if not torch.is_grad_enabled() and not second_pass_runs:  # an evaluation in the parent's step
                self._end_second_pass()
                if self.second is not None:
                    self.fsam.current_pass = None
                return call(model, inputs)
            self._in_compute_loss = True
            try:
                return self._compute_loss(call, model, inputs)
            except BaseException:
                self._raised = True
                raise
            finally:
                self._in_compute_loss = False

        return split

    def _compute_loss(self, call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Make the clean passes, if they are due, and the perturbation, and return the result of the second pass, with
        which the parent's step goes on. The weights stay at θ+ε until its backward pass ends."""
        if self.second is not None:
            raise RuntimeError(CALLED_TWICE)
        fsam, engine = self.fsam, self.fsam.engine
        fsam.current_pass = "clean"
        self.window = self.window or self._ascend(call, model, inputs)
        fsam.current_pass = "second"
        self.batch = batch = self._take(self.window, inputs)
        perturbed: AbstractContextManager = self._perturbed(self.window.perturbation)
        cotangents = batch.clean if fsam.splits else None
        if self.trainer.args.fsam_variant == "logit":
            batch.random.restore()
            with perturbed, fsam.uncounted(model), fsam.unlogged(), engine.without_sync(model) as inner:
                cotangents = CleanPass(UnperturbedHead(engine.detached_weights_stay), stops_at_boundary=True)
                self._run(cotangents, call, inner, batch.inputs)
            self.moved, perturbed = cotangents, nullcontext()
        batch.random.restore()
        self.second = second = SecondPass(batch.clean, cotangents)
        self.moved = self.moved or second
        self._contexts.enter_context(self._second_contexts)
        offloading = trl.offloading_anew(self.trainer)
        for context in (perturbed, fsam.uncounted(model), fsam.boundary.running(second), offloading):
            self._second_contexts.enter_context(context)
        with fsam.unlogged():  # no longer: what calls compute_loss counts, too
            result = call(model, inputs)
        if isinstance(result, tuple):
            return (second.take_loss(result[0]), *result[1:])
        return second.take_loss(result)

    @contextmanager
    def _perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        """The weights are at θ+ε inside, and generate no text."""
        try:
            with self.fsam.engine.perturbed(perturbation), ExitStack() as replaced:
                for module in self.trainer.model.modules():
                    if hasattr(type(module), "generate"):
                        generate: Any = module.generate
                        refusing = _AtThetaAlone(self, generate)
                        replaced.enter_context(self.fsam.cleanup.replaced(module, "generate", refusing))
                # A caller's autocast region would give this pass the casts of the weights that it made at θ.
                torch.clear_autocast_cache()
                trl.note_storages(self.trainer)
                yield
        finally:
            torch.clear_autocast_cache()
            trl.note_storages(self.trainer)

    # ---- Ascent ----

    def _ascend(self, call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> Window:
        """Make the clean passes over the micro-batches of the ascent scope, and the perturbation that they give."""
        fsam, trainer, args, engine = self.fsam, self.trainer, self.trainer.args, self.fsam.engine
        fetched = [self.fetched]
        if args.fsam_ascent_scope == "optimizer_step":
            if fsam.training and not fsam.fetches and args.gradient_accumulation_steps > 1:
                raise RuntimeError(
                    f"fsam_ascent_scope='optimizer_step': the get_batch_samples of {type(trainer).__name__} does not "
                    "call FSAMMixin's, which sees there what the ascent is to go over. Let it call "
                    "super().get_batch_samples, or set fsam_ascent_scope='micro_batch'."
                )
            fetched = fsam.batches or fetched
        waiting = [
            MicroBatch(each, inputs if each is self.fetched else trainer._prepare_inputs(each)) for each in fetched
        ]
        momentum = self._momentum(model) if args.fsam_ascent_direction == "momentum" else None
        head = fsam.boundary.head
        deferring = head is not None and not head.off
        again = (Counters(trainer).restore, running_statistics(model)) if deferring else ()
        try:
            ascent = self._clean_passes(call, model, waiting, momentum)
        except LogitsNeeded as error:
            if head is None or not deferring or not engine.forward_can_be_retried:
                raise
            head.turn_off(str(error))
            for put_back in again:
                put_back()
            waiting[0].random.restore()
            ascent = self._clean_passes(call, model, waiting, momentum)
        turns = getattr(trainer.fsam_direction, "__func__", None) is not Seam.fsam_direction
        perturbation = engine.perturb(
            ascent,
            optimizer=trainer.optimizer if args.fsam_precondition else None,
            rho=args.fsam_rho,
            # From where the run stands, so that a resumed one rounds alike.
            seed=((args.seed * 1_000_003 + trainer.state.global_step) * 1_009 + fsam.micro_step) % 2**63,
            cotangents=[u for batch in waiting for crossing in batch.clean.crossings for u in crossing.cotangents],
            direction=trainer.fsam_direction if turns else None,  # without one, ‖d‖ is ‖g‖
        )
        if not perturbation.weights:
            logger.warning_once(
                "The ascent has no gradient, so the step is a plain one: none of the weights that fsam_perturbs names "
                "is on the way to the loss. Let it be true for one that is. For a batch to skip there is nothing to do."
            )
        fsam.window = Window(waiting, perturbation, of_gradient=momentum is None)
        return fsam.window

    def _momentum(self, model: nn.Module) -> Ascent | None:
        """To ascend along; None where the optimizer has none yet, as in the first step."""
        trainer = self.trainer
        momentum = self.fsam.engine.momentum(model, self.fsam.perturbed_weights(), trainer.optimizer)
        if momentum is None and trainer.state.global_step > 1:
            logger.warning_once(
                "fsam_ascent_direction='momentum': the optimizer has none yet. SGD without momentum never has one, and "
                "a loss scaler may have skipped its first steps. The ascent is along the gradient, and a step takes "
                "two passes: choose an optimizer with a momentum (SGD with momentum=0.9, Adam), or "
                "fsam_ascent_direction='gradient'."
            )
        return momentum

    def _clean_passes(
        self, call: Callable[..., Any], model: nn.Module, waiting: list[MicroBatch], momentum: Ascent | None
    ) -> Ascent:
        """Make a clean pass for each micro-batch of a window. If there is a `momentum` to ascend along, the backward
        passes stop at the boundary."""
        fsam, engine, args = self.fsam, self.fsam.engine, self.trainer.args
        unperturbed = UnperturbedHead(engine.detached_weights_stay, fsam.cotangent_cache)
        ascents: AbstractContextManager[Ascent] = nullcontext(momentum)  # type: ignore[arg-type]
        if momentum is None:
            average = args.fsam_ascent_scope != "rank"
            weights = fsam.perturbed_weights()
            ascents = engine.ascent(model, weights, average=average, passes=len(waiting))
        with (
            gradients_set_aside(fsam.weights_outside_model(), fsam.cleanup),
            engine.without_sync(model) as inner,
            ascents as ascent,
        ):
            for batch in waiting:
                batch.random = RandomState.capture(args.device)
                ascended = batch.inputs if momentum is not None else fsam.ascent_inputs(batch)
                elsewhere = ascended is not batch.inputs
                backward = None if momentum is not None or elsewhere else ascent.backward
                # The cotangents of `logit` are those at θ+ε.
                records = backward is None or args.fsam_variant != "logit"
                batch.clean = CleanPass(unperturbed, stops_at_boundary=backward is None, records=records)
                self._run(batch.clean, call, inner, batch.inputs, backward)
                if elsewhere:  # second, because DDP broadcasts buffers in the first pass, which so has to count
                    batch.random.restore()
                    with fsam.uncounted(model), fsam.unlogged():
                        self._run(CleanPass(unperturbed, records=False), call, inner, ascended, ascent.backward)
                if args.fsam_offload_hidden_states:
                    batch.clean.offload()
        return ascent

    def _run(
        self,
        clean: CleanPass,
        call: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Run the forward and the backward pass of `clean`; without `backward`, the latter stops at the boundary."""
        offloading = trl.offloading_anew(self.trainer)
        clean.offloads = not isinstance(offloading, nullcontext)
        with self.fsam.boundary.running(clean), offloading:
            result = call(model, batches.copied(inputs))
            loss = result[0] if isinstance(result, tuple) else result
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"compute_loss of {type(self.trainer).__name__} returned a {type(loss).__name__} for the loss: let "
                    "it return a tensor, or a tuple that begins with it, or set fsam_variant='none'."
                )
            loss = clean.take_loss(loss)
            self.fsam.check_boundary(loss, clean)
            loss = loss / self.divisor  # as the parent's step will, so that one loss scale suits both passes
            # Around the call of compute_loss there may be an autocast region, in which no backward pass belongs.
            with torch.autocast(self.trainer.args.device.type, enabled=False):
                if backward is None:
                    clean.differentiate(self.fsam.engine.scale(loss))
                    return
                with gradients_set_aside(self.fsam.leaves_outside_model(loss), self.fsam.cleanup):
                    backward(loss)

    def _take(self, window: Window, inputs: dict[str, Any]) -> MicroBatch:
        """Take the micro-batch of this step out of those that have had their clean pass."""
        batch = self._waiting(window)
        if batch is not None:
            window.waiting.remove(batch)
        if not window.waiting:
            self.fsam.window = None
        changed = "batch" if batch is None else batch.change(inputs)
        if batch is None or changed is not None:
            raise ValueError(
                "fsam_ascent_scope='optimizer_step' ascended on the micro-batches that get_batch_samples returned, but "
                f"compute_loss was given another {changed}: change it in the data collator and not in training_step, "
                "or set fsam_ascent_scope='micro_batch'."
            )
        return batch

    def _waiting(self, window: Window) -> MicroBatch | None:
        """The micro-batch of this step, where it waits for its second pass."""
        return next((each for each in window.waiting if each.fetched is self.fetched), None)

    # ---- The end ----

    def complete(self) -> bool:
        """Whether both passes came to their end; not so where the parent's step has caught an exception, or skips the
        batch.

        Raises:
            RuntimeError: the parent's step did not call `compute_loss`, or did not back-propagate its loss, and has not
                done so in any step yet.
        """
        if self._raised or (self.second is not None and self.second.interrupted):
            return False
        if self.second is not None and self.second.was_differentiated:
            self.fsam.has_split = True
            return True
        if not self.fsam.has_split:
            raise RuntimeError(self._not_back_propagated())
        logger.warning_once(
            "The training_step below FSAMMixin has not back-propagated the loss of a batch as it did before, so the "
            "batch counts as skipped. If it trains on a loss of its own there, that one is not split."
        )
        return False

    def report(self) -> None:
        """Add what a complete step found to the log."""
        window, batch, second, moved, means = self.window, self.batch, self.second, self.moved, self.fsam.means
        assert window is not None
        assert batch is not None
        assert second is not None
        assert moved is not None
        clean, skipped = batch.clean, window.perturbation.skipped
        # The factor from this micro-batch's loss to its part of the logged loss.
        share = second.scale / (clean.scale * self.divisor)
        if not window.reported:
            window.reported = True
            unit = clean.scale / share if window.of_gradient else torch.ones_like(clean.scale)
            means.add_ascent(window.perturbation, unit=unit)
        means.add_second(clean.loss.isfinite() & ~moved.finite)
        if moved is not second or second.knows_its_loss:
            means.add_change("sharpness", (moved.loss - clean.loss) * share, skipped)
        elif second.linear_loss_change is not None:
            means.add_change("functional_sharpness", second.linear_loss_change / clean.scale * share, skipped)


class _AtThetaAlone:
    """A model's `generate`, for after the second pass. A copy of the model, or a pickled one, has the model's own."""

    def __init__(self, step: SplitStep, generate: Callable[..., Any]) -> None:
        functools.update_wrapper(self, generate)
        self._step, self._generate = step, generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._step.return_to_theta()
        return self._generate(*args, **kwargs)

    def __reduce__(self) -> tuple:
        # Of `_generate`, which is bound to the copy then; and loads where this package is not installed.
        return getattr, (nullcontext(self._generate), "enter_result")


def _loss_divisor(trainer: Seam, num_items: Tensor | int | None) -> int:
    """What the parent's step divides the loss by (read in transformers 5.23)."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = trainer.model_accepts_loss_kwargs and num_items is not None
        scaled = scaled or trainer.compute_loss_func is not None
    return 1 if scaled else getattr(trainer, "current_gradient_accumulation_steps", 1)
