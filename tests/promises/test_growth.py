"""A training does not grow, and leaves other people's memory, attributes and compiled functions alone."""

import copy
import gc
import sys
import threading
import weakref
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import trl.trainer.utils
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_fsam import FSAMTrainer, passes, perturbation
from hf_fsam.heads import fused_head
from tests.toys import llama, make_trainer
from tests.unit.test_find_boundary import ROWS, _Headless

VARIANTS = ["sam", "functional", "logit"]
NOT_OURS = (type, ModuleType, FunctionType, nn.Module, Tensor, Trainer, TrainingArguments, Accelerator, Optimizer)


def bytes_of(roots: list[Any]) -> int:
    """Of all objects that `roots` lead to, except for the trainer, the model and others that are not the package's."""
    seen: dict[int, Any] = {}
    while roots:
        each = roots.pop()
        if id(each) not in seen and not issubclass(type(each), NOT_OURS):
            seen[id(each)] = each
            roots += gc.get_referents(each)
    return sum(map(sys.getsizeof, seen.values()))


class _Sizes(TrainerCallback):
    """Records the bytes that the mixin holds, and the objects and tensors in the process, at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.bytes, self.objects, self.tensors = steps, [], [], []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            self.bytes.append(bytes_of([self.trainer.fsam]))
            objects = gc.get_objects()
            self.objects.append(len(objects))
            self.tensors.append(sum(issubclass(type(each), Tensor) for each in objects))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_that_logs_nothing_does_not_grow(tmp_path: Path, variant: str) -> None:
    sizes = _Sizes(100, 300)
    trainer = sizes.trainer = make_trainer(
        tmp_path,
        llama(num_hidden_layers=1),
        trainer={"callbacks": [sizes]},
        fsam_variant=variant,
        logging_strategy="no",
        max_steps=300,
    )
    trainer.train()
    assert sizes.bytes[0] > 1000  # there is something to measure
    assert sizes.bytes[1] - sizes.bytes[0] < 100  # a counter may take a few more
    assert sizes.objects[1] - sizes.objects[0] < 100
    assert sizes.tensors[1] <= sizes.tensors[0]


@pytest.mark.parametrize("variant", ["sam", "functional", "logit"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_a_step_holds_is_freed_with_it(
    tmp_path: Path, variant: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, cotangents and θ+ε are freed without the garbage collector, which would run steps later. So they
    are where TRL is imported and its fused head is replaced."""
    assert trl.trainer.utils is not None
    alive: list[weakref.ref] = []
    left: list[int] = []

    def noted(made: Any) -> None:
        init = made.__init__

        def init_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            alive.append(weakref.ref(self))

        monkeypatch.setattr(made, "__init__", init_and_note)

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert alive
            left.append(sum(each() is not None for each in alive))
            alive.clear()

    for made in (passes.CleanPass, passes.SecondPass, passes.Crossing, fused_head.CleanCall, perturbation.Perturbation):
        noted(made)
    trainer = make_trainer(
        tmp_path, fsam_variant=variant, fsam_fused_head=fused, max_steps=3, trainer={"callbacks": [Counts()]}
    )
    gc.collect()
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_metrics_of_trl_are_not_copied_for_every_micro_batch(tmp_path: Path) -> None:
    """However many of them have accumulated since the last log."""
    from tests.parity import test_trl

    class Entry(float):
        copies = 0

        def __deepcopy__(self, memo: dict[int, Any]) -> "Entry":
            Entry.copies += 1
            return self

    trainer = test_trl.make_trainer(
        tmp_path, test_trl.FSAMSFTTrainer, test_trl.FSAMSFTConfig, llama(), test_trl.conversations()
    )
    trainer.args.logging_steps = 100
    metrics = trainer._metrics["train"]
    metrics["gathered"] = [Entry(1.0)] * 8000
    trainer.train()
    assert len(metrics["gathered"]) in (0, 8000)  # a log at the end empties it
    assert Entry.copies == 0


def test_attributes_of_other_trainers_are_left_alone(tmp_path: Path) -> None:
    """Whatever their names are, and even where TRL has its counts under them."""

    class Mine(FSAMTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._metrics: list[float] = []
            self._mine: list[float] = []
            self._stored_metrics = self.lock = threading.Lock()  # which cannot be copied

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self._metrics.append(loss.item())
            self._mine.append(loss.item())
            return loss

    trainer = make_trainer(tmp_path, trainer_class=Mine)
    metrics = trainer._metrics
    trainer.train()
    assert trainer._metrics is metrics
    assert trainer._metrics == trainer._mine
    assert trainer._stored_metrics is trainer.lock


def test_what_was_compiled_before_a_training_is_not_compiled_anew(tmp_path: Path) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def mine(x: Tensor) -> Tensor:
        return x.sin() + 1

    mine(torch.ones(3))
    make_trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2).train()
    mine(torch.ones(3))
    assert len(compiled) == 1


def test_an_engine_that_is_replaced_is_freed(tmp_path: Path) -> None:
    """As after each trial of a hyperparameter search, which makes a new accelerator."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    engine = weakref.ref(trainer.fsam.engine)
    trainer.create_accelerator_and_postprocess()
    gc.collect()
    assert engine() is None
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()


def test_a_resumed_run_with_a_momentum_ascent_warns_of_weights_past_the_boundary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    settings = {
        "fsam_boundary": "top",
        "fsam_ascent_direction": "momentum",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "trainer": {"train_dataset": ROWS},
    }
    make_trainer(tmp_path, _Headless(past=True), **settings).train()
    caplog.clear()
    resumed = make_trainer(tmp_path, _Headless(past=True), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    told = [record.message for record in caplog.records if "past the boundary" in record.message]
    assert len(told) == 1
    assert "2 weights (body.bias, body.weight" in told[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradients_of_both_backward_passes_have_one_magnitude(tmp_path: Path, variant: str) -> None:
    """The clean pass, too, divides by the number of accumulated micro-batches, or fp16 would overflow in it first."""
    model = _Headless()
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(model),
        trainer={"train_dataset": ROWS},
        fsam_boundary="top",
        fsam_variant=variant,
        fsam_rho=1e-6,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=1,
        max_steps=1,
    )
    norms: list[float] = []
    trainer.model.body.weight.register_hook(lambda gradient: norms.append(gradient.norm().item()))
    trainer.train()
    assert norms[0::2] == pytest.approx(norms[1::2], rel=1e-3)
    assert len(norms) == 8
