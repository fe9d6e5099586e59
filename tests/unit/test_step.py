"""The split step inside a training: what it computes, what it leaves as it was, and what it refuses."""

import copy
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_fsam import FSAMMixin, FSAMTrainer
from hf_fsam.perturbation import WeightSwap
from hf_fsam.step import SplitStep
from tests import reference
from tests.toys import DEVICE, LENGTH, distance, gpt2, llama, make_trainer, same_bits, sentences, train, weights_of

ACTIVE = ["sam", "functional", "logit"]
SCOPES = ["micro_batch", "optimizer_step", "rank"]


def test_variant_none_and_rho_zero_train_bit_for_bit_as_the_plain_trainer(tmp_path: Path) -> None:
    plain = train(tmp_path, model=gpt2(0.2), trainer_class=Trainer, arguments_class=TrainingArguments)
    assert same_bits(train(tmp_path, model=gpt2(0.2), fsam_variant="none"), plain)
    assert same_bits(train(tmp_path, model=gpt2(0.2), fsam_variant="functional", fsam_rho=0.0), plain)
    assert not same_bits(train(tmp_path, model=gpt2(0.2), fsam_variant="functional", fsam_rho=0.02), plain)


def test_plain_training_arguments_train_with_the_default_settings(tmp_path: Path) -> None:
    swapped = train(tmp_path, arguments_class=TrainingArguments)
    named = train(
        tmp_path,
        fsam_variant="functional",
        fsam_rho=0.03,
        fsam_precondition=False,
        fsam_ascent_scope="micro_batch",
    )
    assert same_bits(swapped, named)


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("scope", SCOPES)
def test_both_passes_draw_the_same_dropout_masks_and_the_random_stream_ends_where_one_pass_leaves_it(
    tmp_path: Path, variant: str, scope: str
) -> None:
    """With a tiny ρ and dropout of 0.2, six steps end on the plain Trainer's weights. Masks that the second pass draws
    anew would show in the first step, and a random stream that is left elsewhere in the second."""
    plain = train(tmp_path, model=gpt2(0.2), fsam_variant="none", gradient_accumulation_steps=2)
    split = train(
        tmp_path,
        model=gpt2(0.2),
        fsam_variant=variant,
        fsam_rho=1e-9,
        fsam_precondition=False,
        fsam_ascent_scope=scope,
        gradient_accumulation_steps=2,
    )
    assert distance(split, plain) < 1e-6


def test_both_passes_draw_the_same_numbers_from_python_and_numpy(tmp_path: Path) -> None:
    import random

    import numpy as np

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.classifier = nn.Linear(4, 3)
            self.drawn: list[tuple[float, float]] = []

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.drawn.append((random.random(), float(np.random.rand())))
            logits = self.classifier(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Drawing()
    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(12)]
    make_trainer(tmp_path, model, trainer={"train_dataset": data}, max_steps=3).train()
    first, second = model.drawn[0::2], model.drawn[1::2]
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ACTIVE)
def test_a_step_with_learning_rate_zero_restores_the_weights_bit_for_bit(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    model = llama().to(dtype)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, fsam_variant=variant, fsam_rho=0.5, learning_rate=0.0)
    trainer.train()
    assert same_bits(weights_of(model), before)
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.5, rel=0.1)  # they were perturbed


class _Failing(nn.Module):
    """Raises `error` in the forward or the backward pass number `at`, counted from 0. A step has two passes."""

    def __init__(self, error: BaseException, where: str, at: int) -> None:
        super().__init__()
        self.model, self.error, self.where, self.at, self.passes = llama(), error, where, at, 0
        self.config = self.model.config
        self.seen: list[Tensor] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        index, self.passes = self.passes, self.passes + 1
        self.seen.append(self.model.lm_head.weight.detach().clone())
        if index == self.at and self.where == "forward":
            raise self.error
        loss = self.model(input_ids=input_ids, labels=labels).loss
        if index == self.at and self.where == "backward":
            loss.register_hook(self._raise)
        return {"loss": loss}

    def _raise(self, gradient: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), torch.OutOfMemoryError("mine")], ids=lambda e: type(e).__name__
)
def test_an_exception_in_either_pass_leaves_nothing_behind(
    tmp_path: Path, error: BaseException, where: str, at: int, scope: str
) -> None:
    """Passes 2 and 3 are the clean and the second pass of the second micro-batch, while the gradient of the first waits
    in `.grad`. With `optimizer_step` they are the second passes of the first and of the second micro-batch."""
    model = _Failing(error, where, at)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        model,
        fsam_rho=0.5,
        fsam_precondition=False,
        fsam_ascent_scope=scope,
        gradient_accumulation_steps=2,
    )
    gradients: list[dict[str, Tensor]] = []
    recording = TrainerCallback()
    recording.on_substep_end = lambda *_, **__: gradients.append(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    )
    trainer.add_callback(recording)
    with pytest.raises(type(error)):
        trainer.train()
    assert model.passes == at + 1
    assert not torch.equal(model.seen[-1], before["model.lm_head.weight"]) or (scope, at) == ("micro_batch", 2)
    assert same_bits(weights_of(model), before)
    assert not any(module._forward_hooks for module in model.modules())
    if gradients:  # the gradient of the first micro-batch was there
        now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        untouched = where == "forward" or (at == 2 and scope == "micro_batch")
        assert gradients[0].keys() == now.keys()
        assert not untouched or same_bits(now, gradients[0])
    # The trainer can be used again.
    model.at = -1
    trainer.train()
    assert not same_bits(weights_of(model), before)


def test_ctrl_c_at_any_moment_restores_the_weights(tmp_path: Path) -> None:
    """Thirty interrupts are spread over the step. With a learning rate of zero, each of them must leave the weights as
    they were at the start."""

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    model = llama()
    before = weights_of(model)
    settings = {"optim": "sgd", "learning_rate": 0.0, "max_steps": 1}  # it has no state to be left half written
    trainer = make_trainer(tmp_path, model, fsam_rho=1.0, fsam_precondition=False, **settings)
    struck = 0
    previous = signal.signal(signal.SIGALRM, strike)

    class Arm(TrainerCallback):
        delay = 0.0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            signal.setitimer(signal.ITIMER_REAL, self.delay)

    arm = Arm()
    trainer.add_callback(arm)
    try:
        for arm.delay in torch.linspace(1e-4, 8e-3, 30).tolist():
            torch.set_grad_enabled(True)  # torch's own no_grad may have been interrupted as it ended
            try:
                trainer.train()
            except KeyboardInterrupt:
                struck += 1
                assert same_bits(weights_of(model), before)
                assert not any(module._forward_hooks for module in model.modules())
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert struck > 10


def test_ctrl_c_just_before_the_weights_are_restored_still_restores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, calls = WeightSwap.restore, []

    def struck(self: WeightSwap) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(WeightSwap, "restore", struck)
    trainer = make_trainer(tmp_path, fsam_rho=1.0, learning_rate=0.0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(weights_of(trainer.model), weights_of(llama()))


def test_the_weights_are_restored_even_where_the_arguments_have_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, calls = WeightSwap.restore, []
    trainer = make_trainer(tmp_path, fsam_rho=1.0, learning_rate=0.0)

    def struck(self: WeightSwap) -> None:
        calls.append(1)
        if len(calls) == 3:
            trainer.args.fsam_variant = "none"
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(WeightSwap, "restore", struck)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(weights_of(trainer.model), weights_of(llama()))


def test_after_running_out_of_memory_auto_find_batch_size_goes_on_from_clean_weights(tmp_path: Path) -> None:
    model = _Failing(RuntimeError("CUDA out of memory."), "backward", 1)
    trainer = make_trainer(tmp_path, model, auto_find_batch_size=True, fsam_rho=0.5, max_steps=2)
    trainer.train()
    reference = _Failing(RuntimeError(), "backward", -1)
    make_trainer(tmp_path, reference, per_device_train_batch_size=1, fsam_rho=0.5, max_steps=2).train()
    assert trainer._train_batch_size == 1
    assert distance(weights_of(model), weights_of(reference)) < 1e-6


def test_training_step_called_by_hand_leaves_no_hook(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as the Trainer's loop does
    batch = trainer.data_collator(sentences()[:2])
    loss = trainer.training_step(trainer.model, batch)
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_training_step_called_by_hand_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    model = _Failing(ValueError("mine"), "backward", 1)
    trainer = make_trainer(tmp_path, model, fsam_rho=1.0, fsam_precondition=False)
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match="mine"):
        trainer.training_step(model, trainer.data_collator(sentences()[:2]))
    assert model.passes == 2
    assert same_bits(weights_of(model), weights_of(_Failing(ValueError(), "", 0)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_plain_step_after_one_whose_weights_were_not_put_back_begins_at_theta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C struck as they were to be put back, each time that this was tried."""
    restore = WeightSwap.restore

    def struck(self: WeightSwap) -> None:
        if not same_bits(weights_of(trainer.model), theta):
            raise KeyboardInterrupt
        restore(self)

    def gradients(trainer: FSAMTrainer) -> dict[str, Tensor]:
        trainer.args.fsam_variant = "none"
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, batch)
        return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    trainer, plain = make_trainer(tmp_path, fsam_rho=1.0), make_trainer(tmp_path)
    batch = trainer.data_collator(sentences()[:2])
    trainer.current_gradient_accumulation_steps = plain.current_gradient_accumulation_steps = 1
    theta = weights_of(trainer.model)
    monkeypatch.setattr(WeightSwap, "restore", struck)
    with pytest.raises(KeyboardInterrupt):
        trainer.training_step(trainer.model, batch)
    assert not same_bits(weights_of(trainer.model), theta)
    monkeypatch.undo()
    assert same_bits(gradients(trainer), gradients(plain))
    assert same_bits(weights_of(trainer.model), theta)


class _Watch(TrainerCallback):
    """Checks at every event that the weights are those after the last optimizer step."""

    def __init__(self) -> None:
        self.events: set[str] = set()
        self.current: dict[str, Tensor] | None = None

    def on_event(self, event: str, model: nn.Module) -> None:
        self.events.add(event)
        weights = weights_of(model)
        if self.current is None or event == "on_optimizer_step":
            self.current = weights
        assert same_bits(weights, self.current), event

    def __getattribute__(self, name: str):
        if name.startswith("on_") and name != "on_event":
            return lambda args, state, control, model=None, **kwargs: (
                self.on_event(name, model) if name != "on_init_end" else None
            )
        return super().__getattribute__(name)


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_a_callback_never_sees_perturbed_weights(tmp_path: Path, variant: str, scope: str) -> None:
    watch = _Watch()
    trainer = make_trainer(
        tmp_path,
        fsam_variant=variant,
        fsam_rho=1.0,
        fsam_ascent_scope=scope,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        trainer={"callbacks": [watch], "eval_dataset": sentences(4)},
    )
    trainer.train()
    assert {
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_step_end",
        "on_save",
        "on_evaluate",
        "on_log",
    } <= watch.events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, dtype: torch.dtype, scope: str) -> None:
    settings = {
        "fsam_rho": 0.1,
        "fsam_precondition": True,
        "fsam_ascent_scope": scope,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
    }
    whole = make_trainer(tmp_path, gpt2(0.2).to(dtype), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, gpt2(0.2).to(dtype), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(weights_of(resumed.model), weights_of(whole.model))
    logged = [
        {key: value for key, value in entry.items() if key.startswith(("loss", "fsam/"))}
        for run in (whole, resumed)
        for entry in run.state.log_history
        if "fsam/radius" in entry
    ]
    assert len(logged) == 6
    assert logged[:3] == logged[3:]


def test_a_checkpoint_holds_clean_weights_and_the_fsam_settings(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    recording = TrainerCallback()
    recording.on_step_end = lambda *_, model, **__: seen.append(weights_of(model))
    settings = {"fsam_variant": "sam", "fsam_rho": 0.25, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer = make_trainer(tmp_path, trainer={"callbacks": [recording]}, **settings)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert same_bits(weights_of(type(trainer.model).from_pretrained(checkpoint)), seen[-1])
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FSAMSettings"]["args"] == {
        "fsam_variant": "sam",
        "fsam_rho": 0.25,
        "fsam_precondition": False,
        "fsam_ascent_scope": "micro_batch",
        "fsam_ascent_direction": "gradient",
        "fsam_every_steps": 1,
        "fsam_boundary": None,
        "fsam_fused_head": True,
        "fsam_offload_hidden_states": False,
        "fsam_diagnostics_steps": 0,
    }
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (saved.fsam_variant, saved.fsam_rho) == ("sam", 0.25)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "fsam_variant: sam" in card
    assert "fsam_rho: 0.25" in card


def test_resuming_with_another_rho_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    make_trainer(tmp_path, fsam_rho=0.1, save_strategy="steps", save_steps=3).train()
    caplog.clear()
    make_trainer(tmp_path, fsam_rho=0.2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "trained with fsam_rho=0.1 at its start, this run starts with 0.2. Set it to 0.1" in caplog.text


def test_resuming_under_a_schedule_of_rho_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Falls(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.fsam_rho = 0.1 * (1 - state.global_step / state.max_steps)

    def scheduled(rho: float = 0.1) -> FSAMTrainer:
        settings = {"fsam_rho": rho, "save_strategy": "steps", "save_steps": 3}
        return make_trainer(tmp_path, trainer={"callbacks": [Falls()]}, **settings)

    logging.enable_propagation()
    scheduled().train()
    scheduled().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "The checkpoint was trained with" not in caplog.text
    scheduled(0.4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "trained with fsam_rho=0.1 at its start, this run starts with 0.4" in caplog.text


@pytest.mark.parametrize("fused", [True, False])
def test_the_log_has_the_clean_loss_the_radius_and_the_sharpness(tmp_path: Path, fused: bool) -> None:
    plain = make_trainer(tmp_path, fsam_variant="none", learning_rate=0.0)
    plain.train()
    for scope in SCOPES:
        trainer = make_trainer(
            tmp_path,
            fsam_rho=0.3,
            fsam_precondition=False,
            fsam_ascent_scope=scope,
            fsam_fused_head=fused,
            learning_rate=0.0,
        )
        trainer.train()
        for entry, other in zip(trainer.state.log_history[:3], plain.state.log_history[:3], strict=True):
            assert entry["loss"] == pytest.approx(other["loss"], rel=1e-6 if fused else 0)
            assert entry["fsam/radius"] == pytest.approx(0.3, rel=1e-3)
            assert entry["fsam/skipped"] == 0
            # To first order, the loss rises by ρ ‖g‖ along the gradient.
            rise = entry["fsam/functional_sharpness" if fused else "fsam/sharpness"]
            assert 0.3 < rise / (0.3 * entry["fsam/ascent_grad_norm"]) < 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_logged_norm_and_sharpness_are_in_the_units_of_grad_norm_and_loss(
    tmp_path: Path, scope: str, fused: bool
) -> None:
    """They do not depend on accumulation: four rows are logged alike as one micro-batch and as four."""
    logs = []
    for accumulation in (1, 4):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            fsam_ascent_scope=scope,
            fsam_precondition=False,
            fsam_fused_head=fused,
            fsam_rho=1e-3,
            learning_rate=0.0,
            max_steps=1,
            logging_steps=1,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    whole, parts = logs
    assert whole["fsam/ascent_grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)
    if scope == "optimizer_step":
        rise = "fsam/functional_sharpness" if fused else "fsam/sharpness"
        assert whole[rise] == pytest.approx(1e-3 * whole["grad_norm"], rel=2e-2)
        for key in ("loss", "fsam/ascent_grad_norm", rise):
            assert parts[key] == pytest.approx(whole[key], rel=1e-2), key


class _Overflowing(FSAMTrainer):
    """The gradient of the second step's clean pass is not finite."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.calls == 2:
            self.model.lm_head.weight.register_hook(_once(lambda gradient: gradient * float("inf")))
        self.calls += 1
        return loss


def _once(change):
    done: list[bool] = []

    def hook(gradient: Tensor) -> Tensor | None:
        if done:
            return None
        done.append(True)
        return change(gradient)

    return hook


def test_an_ascent_gradient_that_is_not_finite_skips_the_perturbation_and_is_counted(tmp_path: Path) -> None:
    settings = {"fsam_rho": 0.2, "fsam_precondition": False, "max_steps": 3, "logging_steps": 1}
    trainer = make_trainer(tmp_path, trainer_class=_Overflowing, **settings)
    trainer.train()
    logs = trainer.state.log_history[:3]
    assert [entry["fsam/skipped"] for entry in logs] == [0, 1, 0]
    assert [entry["fsam/radius"] for entry in logs] == pytest.approx([0.2, 0.0, 0.2], rel=1e-3)
    assert all(torch.isfinite(torch.tensor(value)) for entry in logs for value in entry.values())
    # That step went on unperturbed, as if ρ were 0 in this step alone.
    reference = make_trainer(tmp_path, **settings)
    toggle = TrainerCallback()
    toggle.on_step_begin = lambda args, state, control, **_: setattr(
        args, "fsam_rho", 0.0 if state.global_step == 1 else 0.2
    )
    reference.add_callback(toggle)
    reference.train()
    assert distance(weights_of(trainer.model), weights_of(reference.model)) < 1e-6


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="a later attribute than transformers 5.17's")
@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_both_backward_passes_have_the_same_loss_scale(
    tmp_path: Path, scope: str, means: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean loss is divided by the number of micro-batches in the window. If that of the clean pass were not, it would
    overflow in float16 at a loss scale that suits the second pass."""

    class Scaled(FSAMTrainer):
        loss_is_scaled_for_ga = not means

    def report(step: SplitStep) -> None:
        scales.append((float(step.batch.clean.scale), float(step.second.scale)))
        own(step)

    own = SplitStep.report
    monkeypatch.setattr(SplitStep, "report", report)
    scales: list[tuple[float, float]] = []
    settings = {"gradient_accumulation_steps": 3, "fsam_ascent_scope": scope, "max_steps": 2}
    make_trainer(tmp_path, trainer_class=Scaled, **settings).train()
    assert len(scales) == 6
    for scale in scales:
        assert scale == pytest.approx((1 / 3, 1 / 3) if means else (1.0, 1.0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fsam_fused_head": False},
        {"fsam_variant": "sam"},
        {"fsam_variant": "logit"},
        {"fsam_ascent_direction": "momentum"},
        {"fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_second_pass_whose_gradient_is_not_finite_is_logged(tmp_path: Path, settings: dict) -> None:
    """The gradient still goes to the optimizer, as it does under the plain Trainer."""

    class Breaks(FSAMTrainer):
        at = 2

        def compute_loss(self, model, *args, **kwargs):
            struck = self.fsam_pass == "second" and self.state.global_step == self.at
            norm = self.model.model.norm
            handle = norm.register_forward_hook(lambda module, args, output: output * float("nan")) if struck else None
            try:
                return super().compute_loss(model, *args, **kwargs)
            finally:
                if handle is not None:
                    handle.remove()

    trainer = make_trainer(tmp_path, trainer_class=Breaks, logging_steps=1, max_steps=4, **settings)
    trainer.train()
    logs = trainer.state.log_history[:4]
    assert [entry["fsam/not_finite"] > 0 for entry in logs[:3]] == [False, False, True]
    assert [entry["fsam/skipped"] for entry in logs[:3]] == [0, 0, 0]
    assert not all(torch.isfinite(tensor).all() for tensor in weights_of(trainer.model).values())


def test_a_micro_batch_without_labels_brings_no_nan_and_counts_as_no_skipped_step(tmp_path: Path) -> None:
    rows = sentences(8)
    for row in rows[2:4]:
        row["labels"].fill_(-100)
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_steps": 2}
    trainer = make_trainer(tmp_path, trainer={"train_dataset": rows}, fsam_rho=0.1, logging_steps=1, **settings)
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(trainer.model).values())
    assert [entry["fsam/skipped"] for entry in trainer.state.log_history[:2]] == [0, 0]


class _Own(Trainer):
    """Somebody else's Trainer, with its own loss and with code around the step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.losses = 0, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.losses += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, *args, **kwargs):
        self.steps += 1
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_trainer_below_the_mixin_and_a_subclass_above_it_train_alike(tmp_path: Path) -> None:
    class Over(FSAMMixin, _Own):
        pass

    class Under(FSAMTrainer):
        """A script's own Trainer once its base class is swapped: its `compute_loss` never calls super."""

        compute_loss = _Own.compute_loss
        losses = 0

    over = make_trainer(tmp_path, trainer_class=Over, fsam_rho=0.3)
    over.train()
    assert (over.steps, over.losses) == (6, 12)
    under = make_trainer(tmp_path, trainer_class=Under, fsam_rho=0.3)
    under.train()
    plain = make_trainer(tmp_path, trainer_class=Over, fsam_variant="none")
    plain.train()
    assert (plain.steps, plain.losses) == (6, 6)
    assert same_bits(weights_of(over.model), weights_of(under.model))
    assert distance(weights_of(over.model), weights_of(plain.model)) > 1e-3


def test_a_training_step_that_does_not_use_compute_loss_is_an_error_not_a_silent_sam(tmp_path: Path) -> None:
    class Deaf(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            loss.backward()
            return loss.detach()

    class Over(FSAMMixin, Deaf):
        pass

    before = weights_of(llama())
    trainer = make_trainer(tmp_path, trainer_class=Over)
    with pytest.raises(RuntimeError, match="did not back-propagate the loss of compute_loss"):
        trainer.train()
    assert same_bits(weights_of(trainer.model), before)


class _Draws(Trainer):
    """Hides tokens at random where it prepares a batch."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prepared = []

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        hidden = torch.rand(inputs["input_ids"].shape, device=inputs["input_ids"].device) < 0.3
        self.prepared.append({**inputs, "input_ids": inputs["input_ids"].masked_fill(hidden, 3)})
        return dict(self.prepared[-1])


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_what_is_prepared_at_random_is_prepared_once_and_for_both_passes(tmp_path: Path, scope: str) -> None:
    trainer = make_trainer(
        tmp_path,
        trainer_class=type("Over", (FSAMMixin, _Draws), {}),
        fsam_ascent_scope=scope,
        fsam_precondition=False,
        fsam_rho=0.3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
    )
    trainer.train()
    assert len(trainer.prepared) == 12
    wanted = reference.train(
        llama(),
        reference.Problem(reference.causal_lm_loss, count=reference.count_shifted_labels),
        [{name: value.cpu() for name, value in batch.items()} for batch in trainer.prepared],
        variant="functional",
        rho=0.3,
        scope=scope,
        accumulation=2,
        optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0),
    )
    found = {name: weight for name, weight in weights_of(trainer.model).items() if name in wanted}
    assert distance(found, wanted) < 1e-5


class _ChangesWhatItGot(Trainer):
    """Writes into a batch that has had its ascent, before the batch is prepared or after."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.fsam.micro_step and not self.after:
            inputs["input_ids"] = inputs["input_ids"].roll(1, 1)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss_context_manager(self):  # called between the two
        if self.fsam.micro_step and self.after:
            self.fsam.window.waiting[0].inputs["input_ids"].add_(0)
        return super().compute_loss_context_manager()


@pytest.mark.parametrize("after", [False, True])
def test_a_batch_that_is_changed_in_place_after_its_ascent_is_an_error(tmp_path: Path, after: bool) -> None:
    trainer_class = type("Over", (FSAMMixin, _ChangesWhatItGot), {"after": after})
    settings = {"fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, trainer_class=trainer_class, **settings)
    with pytest.raises(ValueError, match=r"compute_loss was given another \['input_ids'\]"):
        trainer.train()
    assert same_bits(weights_of(trainer.model), weights_of(llama()))


class _Generates(Trainer):
    """Generates a text after each step, to look at it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        before = weights_of(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.model.generate(inputs["input_ids"][:1], max_new_tokens=1, logits_processor=[self._look(before)])
        return loss

    def _look(self, before):
        def look(ids, scores):
            assert same_bits(weights_of(self.model), before)
            return scores

        return look


@pytest.mark.parametrize("variant", ACTIVE)
def test_a_text_that_is_generated_after_the_second_pass_is_of_the_clean_weights(tmp_path: Path, variant: str) -> None:
    over = type("Over", (FSAMMixin, _Generates), {})
    looked = train(tmp_path, trainer_class=over, fsam_variant=variant, fsam_rho=0.3)
    assert same_bits(looked, train(tmp_path, fsam_variant=variant, fsam_rho=0.3))


def test_a_loss_that_generates_at_the_moved_weights_is_refused_before_an_update(tmp_path: Path) -> None:
    class Generates(FSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.model.generate(inputs["input_ids"][:1], max_new_tokens=1)
            return super().compute_loss(model, inputs, *args, **kwargs)

    for variant in ACTIVE:
        trainer = make_trainer(tmp_path, trainer_class=Generates, fsam_variant=variant, fsam_rho=0.3)
        with pytest.raises(RuntimeError, match="Generates: compute_loss generates text in the second pass"):
            trainer.train()
        assert same_bits(weights_of(trainer.model), weights_of(llama()))
        assert "generate" not in vars(trainer.model)


def test_a_model_that_is_copied_or_saved_in_the_second_pass_generates_by_itself(tmp_path: Path) -> None:
    class Copies(FSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.fsam_pass == "second":
                torch.save(self.model, tmp_path / "model.pt")
                loaded = torch.load(tmp_path / "model.pt", map_location=DEVICE, weights_only=False)
                copies.extend([copy.deepcopy(self.model), loaded])
            return super().compute_loss(model, inputs, *args, **kwargs)

    copies: list[nn.Module] = []
    trainer = make_trainer(tmp_path, trainer_class=Copies, fsam_rho=0.3, max_steps=1)
    trainer.train()
    for model in copies:
        assert model.generate.__self__ is model
        assert model.generate.__func__ is type(trainer.model).generate
        assert model.generate(sentences(1)[0]["input_ids"][None].to(DEVICE), max_new_tokens=1).shape == (1, LENGTH + 1)


class _Augments(Trainer):
    """Changes the batch in its `training_step`, from the second step on."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step:
            inputs = {**inputs, "input_ids": inputs["input_ids"].roll(self.state.global_step, 1)}
        return super().training_step(model, inputs, num_items_in_batch)


class _WritesInPlace(Trainer):
    """Changes the batch in `compute_loss`: a tensor from the second step on, and the keys in every step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step:
            inputs["input_ids"].copy_(inputs["input_ids"].roll(self.state.global_step, 1))
        inputs["labels"] = inputs.pop("labels").clone()
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Remembers(Trainer):
    """Trains on what those two make of a batch, and leaves the batch itself alone."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        rolled = inputs["input_ids"].roll(self.state.global_step, 1)
        return super().compute_loss(model, {**inputs, "input_ids": rolled}, *args, **kwargs)


@pytest.mark.parametrize("parent", [_Augments, _WritesInPlace])
@pytest.mark.parametrize("variant", ACTIVE)
def test_both_passes_get_the_same_batch_where_the_step_or_the_loss_changes_it(
    tmp_path: Path, parent: type[Trainer], variant: str
) -> None:
    settings = {"fsam_variant": variant, "fsam_rho": 0.3}
    over = type("Over", (FSAMMixin, parent), {})
    wanted = train(tmp_path, trainer_class=type("Wanted", (FSAMMixin, _Remembers), {}), **settings)
    assert same_bits(train(tmp_path, trainer_class=over, **settings), wanted)
    assert not same_bits(train(tmp_path, **settings), wanted)


def test_a_batch_that_changes_after_its_ascent_is_an_error(tmp_path: Path) -> None:
    """With `optimizer_step`, the ascent sees all batches of the window before their own training steps do."""
    settings = {"fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, trainer_class=type("Over", (FSAMMixin, _Augments), {}), **settings)
    with pytest.raises(ValueError, match=r"compute_loss was given another \['input_ids'\].*'micro_batch'"):
        trainer.train()
    wanted = train(tmp_path, trainer_class=type("Wanted", (FSAMMixin, _Remembers), {}), **settings)
    changed = train(tmp_path, trainer_class=type("Over", (FSAMMixin, _WritesInPlace), {}), **settings)
    assert same_bits(changed, wanted)


class _Cached(nn.Module):
    """A model whose batch holds a list, nested tensors and an object, all of which its forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)
        self.seen: list[tuple[int, float, int]] = []

    def forward(self, x: Tensor, labels: Tensor, memory: dict, cache: transformers.DynamicCache) -> dict[str, Tensor]:
        self.seen.append((len(memory["list"]), float(memory["tensor"]), cache.get_seq_length()))
        memory["list"].append(1)
        memory["tensor"].add_(1)
        states = self.body(x)[:, None, None]
        keys, _ = cache.update(states, states, 0)
        logits = self.classifier(keys.sum((1, 2)).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_each_pass_gets_the_lists_and_objects_of_the_batch_as_they_were_fetched(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Tensor]]) -> dict:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        cache = transformers.DynamicCache()
        cache.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0)
        return batch | {"memory": {"list": [0], "tensor": torch.zeros(())}, "cache": cache}

    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(12)]
    for settings in ({}, {"fsam_ascent_scope": "optimizer_step"}, {"fsam_variant": "logit"}):
        model = _Cached()
        given = {"train_dataset": data, "data_collator": collate}
        make_trainer(tmp_path, model, trainer=given, max_steps=3, **settings).train()
        assert set(model.seen) == {(1, 0.0, 1)}
        assert len(model.seen) == (9 if settings.get("fsam_variant") == "logit" else 6)


def test_a_batch_with_an_object_that_cannot_be_copied_is_refused_by_its_key(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Tensor]]) -> dict:
        return {"features": torch.ones(2, 4), "labels": torch.zeros(2).long(), "lock": threading.Lock()}

    with pytest.raises(TypeError, match=r"the batch's \['lock'\] is a lock that cannot be copied"):
        train(tmp_path, trainer={"data_collator": collate})


def test_a_loss_can_ask_which_pass_it_is_in(tmp_path: Path) -> None:
    """What a loss remembers of the clean passes alone is what it would remember under the plain Trainer."""

    class Remembering(FSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            passes.append(self.fsam_pass)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.fsam_pass != "second":
                memory.append(float(loss))
            return loss

    passes: list[str | None] = []
    memory: list[float] = []
    seen = {}
    for variant in ("none", *ACTIVE):
        passes.clear()
        memory.clear()
        trainer = make_trainer(tmp_path, trainer_class=Remembering, fsam_variant=variant, learning_rate=0.0)
        trainer.train()
        assert trainer.fsam_pass is None
        seen[variant] = (passes[:], memory[:])
    assert seen["none"][0] == [None] * 6
    assert seen["sam"][0] == seen["functional"][0] == ["clean", "second"] * 6
    assert seen["logit"][0] == ["clean", "second", "second"] * 6
    for variant in ACTIVE:
        assert seen[variant][1] == pytest.approx(seen["none"][1], rel=1e-6)


class _Skips(Trainer):
    """Goes on to the next batch where one raises a ValueError."""

    skipped = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except ValueError:
            self.skipped += 1
            return torch.zeros(())


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [4, 5])
def test_a_trainer_below_the_mixin_may_skip_a_batch_that_fails(tmp_path: Path, at: int, where: str, scope: str) -> None:
    """The batch may fail in either pass: the weights are restored, it gives no gradient, and training goes on."""
    model = _Failing(ValueError("mine"), where, at)
    over = type("Over", (FSAMMixin, _Skips), {})
    settings = {"fsam_rho": 0.5, "max_steps": 4, "fsam_ascent_scope": scope, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, model, trainer_class=over, **settings)
    trainer.train()
    assert trainer.skipped == 1
    assert trainer.state.global_step == 4
    assert same_bits(weights_of(model), weights_of(_Failing(ValueError(), "", -1)))
    assert trainer.state.log_history[-2]["fsam/radius"] == pytest.approx(0.5, rel=1e-3)
    plain = make_trainer(
        tmp_path,
        _Failing(ValueError("mine"), where, 2),
        trainer_class=type("Plain", (FSAMMixin, _Skips), {}),
        fsam_variant="none",
    )
    plain.train()
    assert plain.skipped == 1


class SkipsNotFinite(Trainer):
    """Leaves a batch out whose loss is NaN, as that of the second step is."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        if not loss.isfinite():
            return torch.zeros(())
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
@pytest.mark.parametrize("variant", ACTIVE)
def test_a_training_step_below_the_mixin_may_skip_a_batch_whose_loss_is_not_finite(
    tmp_path: Path, variant: str, scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    over = type("Over", (FSAMMixin, SkipsNotFinite), {})
    settings = {"fsam_variant": variant, "fsam_ascent_scope": scope, "fsam_rho": 0.5, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, trainer_class=over, max_steps=4, **settings)
    before = weights_of(trainer.model)
    logging.enable_propagation()
    trainer.train()
    assert same_bits(weights_of(trainer.model), before)
    assert trainer.state.log_history[1]["fsam/radius"] == pytest.approx(0.5, rel=1e-3)
    assert caplog.text.count("the batch counts as skipped") == 1


@pytest.mark.parametrize("of", ["nothing", "weights"])
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_batch_to_skip_may_have_the_loss_zero(tmp_path: Path, of: str, direction: str) -> None:
    class Skips(FSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step != 1:
                return super().compute_loss(model, inputs, *args, **kwargs)
            if of == "nothing":
                return torch.zeros((), device=DEVICE, requires_grad=True)
            return 0.0 * sum(weight.sum() for weight in model.parameters())

    norms: list[float] = []
    recording = TrainerCallback()
    recording.on_pre_optimizer_step = lambda *_, model, **__: norms.append(
        sum(float(weight.grad.norm()) for weight in model.parameters() if weight.grad is not None)
    )
    settings = {"max_steps": 3, "optim": "sgd", "optim_args": "momentum=0.9", "fsam_ascent_direction": direction}
    train(tmp_path, trainer_class=Skips, trainer={"callbacks": [recording]}, **settings)
    assert [norm > 0 for norm in norms] == [True, False, True]


@pytest.mark.parametrize("variant", ACTIVE)
def test_compute_loss_may_call_itself(tmp_path: Path, variant: str) -> None:
    class Tries(FSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if "again" not in inputs:
                return self.compute_loss(model, {**inputs, "again": True}, *args, **kwargs)
            return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "again"}, *args, **kwargs)

    settings = {"fsam_variant": variant, "fsam_rho": 0.3, "max_steps": 3}
    assert same_bits(train(tmp_path, trainer_class=Tries, **settings), train(tmp_path, **settings))


class _OwnNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that is none of torch's classes for so many dimensions."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


@pytest.mark.parametrize("variant", ACTIVE)
def test_a_batch_counts_once_in_the_running_statistics_of_any_norm(tmp_path: Path, variant: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.classifier = _OwnNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.classifier(self.norm(x))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(12)]
    trained = train(tmp_path, model=Normed(), trainer={"train_dataset": rows}, max_steps=3, fsam_variant=variant)
    assert trained["norm.num_batches_tracked"] == 3


def test_a_batch_may_hold_nan(tmp_path: Path) -> None:
    class Ignores(_Failing):
        def forward(self, input_ids: Tensor, labels: Tensor, gaps: Tensor) -> dict[str, Tensor]:
            return super().forward(input_ids, labels)

    rows = [{**row, "gaps": torch.tensor([0.0, float("nan")])} for row in sentences()]
    trainer = make_trainer(tmp_path, Ignores(ValueError(), "", 0), trainer={"train_dataset": rows})
    trainer.train()
    assert trainer.state.global_step == 6


class _Evaluates(Trainer):
    """Evaluates in its `training_step`, before or after it calls super."""

    when = "before"

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.when == "before":
            self.losses.append(self.evaluate(sentences(4))["eval_loss"])
            model.train()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.when == "after":
            self.losses.append(self.evaluate(sentences(4))["eval_loss"])
        return loss

    def prediction_step(self, *args, **kwargs):
        outputs = super().prediction_step(*args, **kwargs)
        self.passes.append(self.fsam_pass)
        return outputs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("variant", ACTIVE)
def test_an_evaluation_inside_training_step_sees_the_clean_weights(tmp_path: Path, variant: str, when: str) -> None:
    def losses(variant: str) -> list[float]:
        over = type("Over", (FSAMMixin, _Evaluates), {"when": when, "losses": [], "passes": []})
        settings = {"fsam_variant": variant, "fsam_rho": 1.0, "learning_rate": 0.0, "max_steps": 2}
        make_trainer(tmp_path, trainer_class=over, **settings).train()
        assert set(over.passes) == {None}
        return over.losses

    assert losses(variant) == losses("none")


def test_with_a_momentum_ascent_a_boundary_that_is_not_crossed_is_an_error(tmp_path: Path) -> None:
    settings = {"fsam_ascent_direction": "momentum", "optim": "sgd", "optim_args": "momentum=0.9"}

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused, self.steps = nn.Linear(4, 3), nn.Linear(4, 3), 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.steps += 1
            head = self.unused if self.steps < 3 else self.body
            return {"loss": nn.functional.cross_entropy(head(x), labels)}

    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(12)]
    with pytest.raises(ValueError, match="nothing crossed the boundary"):
        make_trainer(tmp_path, Later(), trainer={"train_dataset": data}, fsam_boundary="unused", **settings).train()


def test_a_training_step_that_never_calls_the_mixins_is_an_error_not_a_plain_training(tmp_path: Path) -> None:
    class Own(FSAMTrainer):
        """A script's own Trainer once its base class is swapped: its `training_step` never calls super."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(RuntimeError, match="the training_step of Own does not call FSAMMixin's"):
        train(tmp_path, trainer_class=Own)
    train(tmp_path, trainer_class=Own, fsam_variant="none")
    with pytest.raises(TypeError, match=r"put FSAMMixin first, class Wrong\(FSAMMixin, Trainer\)"):
        type("Wrong", (Trainer, FSAMMixin), {})


class _SkipsFirst(FSAMTrainer):
    """Skips batches that it has seen before, in a `training_step` above the mixin."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return torch.zeros(()) if self.seen <= 3 else super().training_step(*args, **kwargs)


def test_a_training_step_above_the_mixin_may_skip_the_first_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=_SkipsFirst, logging_steps=1)
    trainer.train()
    assert ["fsam/radius" in entry for entry in trainer.state.log_history[:-1]] == [False] * 3 + [True] * 3


def test_weights_in_float64_end_where_weights_in_float32_do(tmp_path: Path) -> None:
    settings = {"fsam_rho": 0.3, "optim": "sgd"}
    double = train(tmp_path, model=llama().double(), **settings)
    assert {weight.dtype for weight in double.values()} == {torch.float64}
    single = train(tmp_path, **settings)
    assert distance(double, single) < 1e-5
    assert distance(train(tmp_path, **(settings | {"fsam_rho": 0.0})), single) > 1e-3


def test_a_momentum_ascent_without_a_momentum_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, optim="sgd", optim_args="momentum=0.9", fsam_ascent_direction="momentum")
    assert "two passes" not in caplog.text
    train(tmp_path, optim="sgd", fsam_ascent_direction="momentum")
    assert caplog.text.count("the optimizer has none yet") == 1


def test_an_optimizer_that_create_optimizer_sets_but_does_not_return_is_found(tmp_path: Path) -> None:
    class Forgets(Trainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    over = type("Over", (FSAMMixin, Forgets), {})
    trainer = make_trainer(tmp_path, trainer_class=over, fsam_rho=0.1, fsam_precondition=True)
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.1, rel=1e-3)


def test_an_outer_autocast_region_does_not_hide_the_perturbation(tmp_path: Path) -> None:
    """Autocast caches its casts of the weights until the outermost region ends. If they stayed, the second pass would
    run on the casts of the first."""

    class Autocast(Trainer):
        def train(self, *args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().train(*args, **kwargs)

    class Over(FSAMMixin, Autocast):
        pass

    settings = {"fsam_rho": 1.0, "fsam_precondition": False, "learning_rate": 0.0}
    outer, inner = make_trainer(tmp_path, trainer_class=Over, **settings), make_trainer(tmp_path, bf16=True, **settings)
    for trainer in (outer, inner):
        trainer.train()
    outer_rise, inner_rise = (trainer.state.log_history[0]["fsam/functional_sharpness"] for trainer in (outer, inner))
    assert outer_rise == pytest.approx(inner_rise, rel=1e-2)


def test_a_plain_trainers_checkpoint_can_be_resumed_and_saved_again(tmp_path: Path) -> None:
    """The Trainer is swapped in the middle of a run, whose trainer_state.json has no FSAMSettings."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, trainer_class=Trainer, arguments_class=TrainingArguments, **settings).train()
    swapped = make_trainer(tmp_path, fsam_rho=0.1, **settings)
    swapped.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FSAMSettings"]["args"]["fsam_rho"] == 0.1


def test_fsam_fields_set_on_plain_training_arguments_are_used(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.fsam_rho = 0.5
    trainer = FSAMTrainer(model=llama(), args=args)
    assert (trainer.args.fsam_rho, trainer.args.fsam_variant) == (0.5, "functional")


@pytest.mark.parametrize("variant", ["none", "functional"])
def test_a_trainer_may_evaluate_and_make_its_optimizer_as_it_is_made(tmp_path: Path, variant: str) -> None:
    class Begins(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.create_optimizer()
            self.evaluate(self.train_dataset)
            self.save_model()

    over = type("Over", (FSAMMixin, Begins), {})
    settings = {"fsam_variant": variant, "fsam_precondition": True}
    assert same_bits(train(tmp_path, trainer_class=over, **settings), train(tmp_path, **settings))
    begun = make_trainer(tmp_path, trainer_class=over, arguments_class=TrainingArguments)
    assert begun.args.fsam_variant == "functional"


@pytest.mark.parametrize("plainly", [{"fsam_variant": "none"}, {"fsam_rho": 0.0}])
def test_the_log_of_a_plain_step_has_the_means_of_the_others(tmp_path: Path, plainly: dict[str, Any]) -> None:
    """A callback has every second step perturbed, and it is the others that log."""
    trainer = make_trainer(tmp_path, fsam_rho=0.1)
    settings = {name: getattr(trainer.args, name) for name in plainly}
    alternating = TrainerCallback()
    alternating.on_step_begin = lambda args, state, *_, **__: vars(args).update(
        plainly if state.global_step % 2 else settings
    )
    trainer.add_callback(alternating)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["fsam/radius"] for entry in logged] == pytest.approx([0.1] * 3, rel=1e-3)


def test_the_logged_means_of_one_training_are_not_carried_into_the_next(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fsam_rho=0.1, max_steps=3, logging_steps=2)
    trainer.train()  # the third step is never logged
    trainer.args.fsam_rho = 0.5
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.5, rel=1e-3)


def test_a_call_of_log_inside_the_step_does_not_take_the_means(tmp_path: Path) -> None:
    class Talking(FSAMTrainer):
        def training_step(self, *args, **kwargs):
            self.log({"loss": 1.0})
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(tmp_path, trainer_class=Talking, fsam_rho=0.1, max_steps=2, logging_steps=2)
    trainer.train()
    assert [("fsam/radius" in entry) for entry in trainer.state.log_history[:3]] == [False, False, True]


def test_a_new_accelerator_gets_a_new_engine(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.create_accelerator_and_postprocess()  # as a hyperparameter search does for each trial
    assert trainer.fsam.engine.accelerator is trainer.accelerator


class _Steps(Trainer):
    """Steps its optimizer itself, behind the Trainer's step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class _BackPropagatesAndSteps(Trainer):
    """The same without Accelerate's `backward`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("below", [_Steps, _BackPropagatesAndSteps])
def test_a_step_that_steps_the_optimizer_itself_does_it_from_theta(
    tmp_path: Path, below: type[Trainer], variant: str
) -> None:
    class Over(FSAMMixin, below):
        pass

    settings = {"fsam_variant": variant, "fsam_rho": 0.3, "max_grad_norm": 0.0}
    assert distance(train(tmp_path, trainer_class=Over, **settings), train(tmp_path, **settings)) < 1e-6


@pytest.mark.parametrize("variant", ACTIVE)
def test_after_its_backward_pass_the_parents_step_finds_the_weights_at_theta(tmp_path: Path, variant: str) -> None:
    """It may restore what it has changed for the pass, average the weights or save them."""

    class Looks(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            before = weights_of(model)
            loss = super().training_step(model, inputs, num_items_in_batch)
            assert same_bits(weights_of(model), before)
            for name, weight in model.named_parameters():
                weight.data.copy_(before[name])
            return loss

    class Over(FSAMMixin, Looks):
        pass

    before = weights_of(llama())
    trainer = make_trainer(tmp_path, trainer_class=Over, fsam_variant=variant, fsam_rho=0.3, learning_rate=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.3, rel=1e-3)
    assert same_bits(weights_of(trainer.model), before)


def _cubes(model: nn.Module) -> Tensor:
    return sum(weight.pow(3).sum() for weight in model.parameters())  # its gradient is 3 w²


class _Gradients(Trainer):
    """Keeps the gradients of its first step, and the weights of the second pass."""

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        self.cubes, self.seen = _cubes(model), weights_of(model)
        return loss

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.also(model)
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return loss

    def also(self, model: nn.Module) -> None:
        """Nothing else is back-propagated."""


class _OfTheSecondPass(_Gradients):
    def also(self, model: nn.Module) -> None:
        self.accelerator.backward(self.cubes)


class _OfTheirOwn(_Gradients):
    def also(self, model: nn.Module) -> None:
        self.accelerator.backward(_cubes(model))


def test_another_loss_is_differentiated_where_it_was_computed(tmp_path: Path) -> None:
    """At θ+ε, if that was in the second pass, although it is back-propagated behind it; else at θ."""
    theta = weights_of(llama())
    trainers = []
    for below in (_Gradients, _OfTheSecondPass, _OfTheirOwn):
        over = type("Over", (FSAMMixin, below), {})
        trainers.append(make_trainer(tmp_path, trainer_class=over, fsam_variant="sam", fsam_rho=3.0, max_steps=1))
        trainers[-1].train()
    alone, of_the_pass, of_their_own = trainers
    assert distance(alone.seen, theta) > 0.1
    for trainer, at in ((of_the_pass, alone.seen), (of_their_own, theta)):
        added = {name: gradient - alone.gradients[name] for name, gradient in trainer.gradients.items()}
        assert distance(added, {name: 3 * weight.square() for name, weight in at.items()}) < 1e-4


@pytest.mark.parametrize("variant", ACTIVE)
def test_a_weight_with_an_optimizer_of_its_own_gets_the_gradient_of_one_pass(tmp_path: Path, variant: str) -> None:
    """A learned loss weight, a center loss: neither the model nor the Trainer's optimizer has it."""

    class Weighed(Trainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.factor, self.gradients = nn.Parameter(torch.ones((), device=DEVICE)), []

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * self.factor

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.gradients.append(float(self.factor.grad))
            self.factor.grad = None
            return loss

    class Over(FSAMMixin, Weighed):
        pass

    settings = {"trainer_class": Over, "fsam_rho": 1e-6, "max_steps": 2}
    ours = make_trainer(tmp_path, fsam_variant=variant, **settings)
    plain = make_trainer(tmp_path, fsam_variant="none", **settings)
    ours.train()
    plain.train()
    assert ours.gradients == pytest.approx(plain.gradients, rel=1e-3)
