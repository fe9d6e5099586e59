"""Trainings on the second device end where plain torch on the CPU does.

Run by tests/second_device/test_second_device.py, or by hand: python -m pytest tests/second_device/check_training.py
"""

from tests.second_device import device  # noqa: F401  before transformers

# isort: split

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tests import reference
from tests.reference import IGNORED, Batch, Logits, Problem, Tensors, Window
from tests.tools.test_diagnostics import Formulas, expected_paths, one_measurement, tiny
from tests.toys import adapted, distance, gpt2, llama, make_trainer, same_bits, sentences

SAME = 1e-5  # relative; measured distances are about 1e-7
BASE: dict[str, Any] = {"fsam_rho": 0.3, "max_steps": 4, "train_sampling_strategy": "sequential", "use_cpu": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"fsam_variant": "none"},
    "sam": {"fsam_variant": "sam"},
    "functional": {"fsam_variant": "functional"},
    "logit": {"fsam_variant": "logit"},
    "preconditioned": {"fsam_variant": "functional", "fsam_precondition": True},
    "momentum": {"fsam_variant": "functional", "fsam_precondition": True, "fsam_ascent_direction": "momentum"},
}
LOGITS = {"fsam_fused_head": False}
SMOOTHED = {"label_smoothing_factor": 0.1}
WINDOW = {"fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    **{f"{name}-window": VARIANTS[name] | WINDOW for name in ("sam", "functional", "logit", "preconditioned")},
    **{f"{name}-logits": VARIANTS[name] | LOGITS for name in ("functional", "logit", "momentum")},
    "smoothed": VARIANTS["functional"] | SMOOTHED,
    "smoothed-logits": VARIANTS["functional"] | SMOOTHED | LOGITS,
    "accumulating": VARIANTS["momentum"] | {"gradient_accumulation_steps": 2},
    "offloaded": VARIANTS["functional"] | WINDOW | {"fsam_offload_hidden_states": True},
    **{f"{name}-masked": VARIANTS[name] | {"masked": True} for name in ("functional", "logit", "momentum")},
    "smoothed-masked": VARIANTS["functional"] | SMOOTHED | WINDOW | {"masked": True},
    **{f"{name}-silent": VARIANTS[name] | {"silent": True} for name in ("functional", "logit", "momentum")},
    "smoothed-silent": VARIANTS["functional"] | SMOOTHED | {"silent": True},
    "checkpointed": VARIANTS["functional"] | {"gradient_checkpointing": True},
    "tied": VARIANTS["preconditioned"] | {"tied": True},
    "adapted": VARIANTS["functional"] | {"tied": True, "adapted": True},
}


def weights_of(model: nn.Module) -> Tensors:
    """Copies on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def rows_for(settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    """silent: the second batch has no target."""
    rows = sentences(masked=settings.get("masked", False))
    if settings.get("silent"):
        for row in rows[2:4]:
            row["labels"] = torch.full_like(row["labels"], IGNORED)
    return rows


def model_for(settings: dict[str, Any]) -> nn.Module:
    model: nn.Module = gpt2() if settings.get("tied") else llama()
    return adapted(model) if settings.get("adapted") else model


def trained(folder: Path, settings: dict[str, Any], prepare: Callable[[Any], None] = lambda trainer: None) -> Any:
    """The trainer after its training on the device."""
    arguments = {key: value for key, value in settings.items() if key not in ("tied", "adapted", "masked", "silent")}
    data = {"train_dataset": rows_for(settings)}
    trainer = make_trainer(folder, model_for(settings), trainer=data, **(BASE | arguments))
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"npu"}
    prepare(trainer)
    trainer.train()
    return trainer


def from_formulas(settings: dict[str, Any], skipped: int = 0) -> tuple[Tensors, Tensors]:
    """The weights with which plain torch begins and ends on the CPU. skipped: how many of the first optimizer steps to
    leave out."""
    model = model_for(settings)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    rows = rows_for(settings)
    batches = [
        {key: torch.stack([row[key] for row in rows[start : start + 2]]) for key in rows[0]}
        for start in range(2 * accumulation * skipped, 2 * accumulation * settings.get("max_steps", 4), 2)
    ]
    loss = reference.causal_lm_loss
    if "label_smoothing_factor" in settings:
        loss = reference.label_smoothing(shift=True, factor=settings["label_smoothing_factor"])

    def of_targets(logits: Logits, batch: Batch, window: Window) -> Tensor:
        return loss(logits, batch, window) if window.num_items else 0.0 * logits[0].sum()

    # The Trainer knows that Llama's loss shifts the labels, and does not know that GPT-2's does.
    count = reference.count_labels if settings.get("tied") else reference.count_shifted_labels
    ended = reference.train(
        model,
        Problem(of_targets, count=count),
        batches,
        variant=settings["fsam_variant"],
        rho=BASE["fsam_rho"],
        precondition=settings.get("fsam_precondition", False),
        momentum="fsam_ascent_direction" in settings,
        scope=settings.get("fsam_ascent_scope", "micro_batch"),
        accumulation=accumulation,
        max_grad_norm=1.0,
        optimizer_factory=lambda model: torch.optim.AdamW(
            reference.trainable(model).values(), lr=1e-2, eps=1e-3, weight_decay=0.0
        ),
    )
    return {name: weight.detach() for name, weight in reference.trainable(model).items()}, ended


@pytest.mark.parametrize("case", CASES)
def test_a_training_ends_where_plain_torch_does(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    start, wanted = from_formulas(settings)
    trainer = trained(tmp_path, settings)
    found = weights_of(trainer.model)
    assert distance(wanted, start) > 1e-3
    assert distance({name: found[name] for name in wanted}, wanted) < SAME
    if settings["fsam_variant"] != "none":
        assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(BASE["fsam_rho"], rel=1e-4)
    if settings["fsam_variant"] in ("functional", "logit"):
        head = trainer.fsam.boundary.head
        assert bool(head and not head.off) == settings.get("fsam_fused_head", True)


# Mixed precision ------------------------------------------------------------------------------------------------------

# Relative distances from where plain torch ends in single precision; the measured ones are half of that. Any two
# variants end at least 2.7e-2 apart.
NEAR = {"bf16": 8e-3, "fp16": 1e-3}


@pytest.mark.parametrize("case", [*VARIANTS, "functional-logits"])
@pytest.mark.parametrize("precision", NEAR)
def test_mixed_precision_ends_near_plain_torch(precision: str, case: str, tmp_path: Path) -> None:
    _, wanted = from_formulas(CASES[case])
    trainer = trained(tmp_path, CASES[case] | {precision: True})
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    assert distance(weights_of(trainer.model), wanted) < NEAR[precision]


@pytest.mark.parametrize("case", ["functional", "preconditioned", "momentum"])
def test_after_steps_that_the_loss_scaler_skips_training_goes_on_as_from_the_start(case: str, tmp_path: Path) -> None:
    """The fused AdamW makes its state in the steps that are skipped: moments of 0, and a count of 0 steps, which only
    the device knows."""
    steps: list[tuple[float, float]] = []

    def overflowing(trainer: Any) -> None:
        # Far too high for two steps, then 2¹⁰.
        trainer.accelerator.scaler = torch.amp.GradScaler("npu", init_scale=2.0**50, backoff_factor=2.0**-20)
        trainer.add_callback(
            Watching(lambda: steps.append((trainer.accelerator.scaler.get_scale(), state_of(trainer))))
        )

    settings = CASES[case] | {"fp16": True, "optim": "adamw_torch_fused", "max_steps": 6, "logging_steps": 1}
    trainer = trained(tmp_path, settings, overflowing)
    assert steps == [(2.0**30, 0), (2.0**10, 0), (2.0**10, 1), (2.0**10, 2), (2.0**10, 3), (2.0**10, 4)]
    _, wanted = from_formulas(settings, skipped=2)
    assert distance(weights_of(trainer.model), wanted) < NEAR["fp16"]
    for entry in trainer.state.log_history[2:6]:
        assert entry["fsam/radius"] == pytest.approx(BASE["fsam_rho"], rel=1e-3)
        assert entry["fsam/skipped"] == 0


class Watching(TrainerCallback):
    def __init__(self, see: Callable[[], None]) -> None:
        self.see = see

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.see()


def state_of(trainer: Any) -> float:
    """How many steps the optimizer has taken."""
    return float(next(iter(trainer.optimizer.state.values()))["step"])


# Weights and checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, "single") for case in ("sam", "functional", "logit", "momentum", "functional-window")]
    + [("preconditioned", precision) for precision in ("single", "bf16", "fp16", "weights")],
)
def test_a_step_with_learning_rate_zero_restores_the_weights_bit_for_bit(
    case: str, precision: str, tmp_path: Path
) -> None:
    more = {precision: True} if precision in ("bf16", "fp16") else {}
    model = llama().bfloat16() if precision == "weights" else llama()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, **(BASE | CASES[case] | more | {"learning_rate": 0.0, "max_steps": 2}))
    trainer.train()
    assert same_bits(weights_of(trainer.model), before)
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(BASE["fsam_rho"], rel=0.1)


@pytest.mark.parametrize("precision", ["single", "fp16"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(precision: str, tmp_path: Path) -> None:
    """With dropout, whose masks come from the device's own stream."""
    settings = BASE | CASES["preconditioned-window"] | {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    settings |= {"train_sampling_strategy": "random"} | ({"fp16": True} if precision == "fp16" else {})
    whole = make_trainer(tmp_path, gpt2(0.2), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, gpt2(0.2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.state.log_history[1]["fsam/radius"] == whole.state.log_history[1]["fsam/radius"]


def test_both_passes_draw_the_same_dropout_masks(tmp_path: Path) -> None:
    """They come from the device's random stream, which a step leaves where a plain step does."""
    settings = BASE | {"learning_rate": 0.0, "max_steps": 2}
    make_trainer(tmp_path, gpt2(0.5), **settings, fsam_variant="none").train()
    after_plain = torch.npu.get_rng_state()
    trainer = make_trainer(tmp_path, gpt2(0.5), **settings)
    passes: list[Tensor] = []
    trainer.model.transformer.drop.register_forward_hook(lambda module, args, output: passes.append(output == 0))
    trainer.train()
    assert torch.equal(torch.npu.get_rng_state(), after_plain)
    first, second, third, fourth = (dropped.cpu() for dropped in passes)
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


# Diagnostics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["none", "functional"])
def test_the_diagnostics_agree_with_the_formulas(variant: str, tmp_path: Path) -> None:
    trainer, found = one_measurement(tmp_path, tiny(), fsam_variant=variant, use_cpu=False)
    formulas = Formulas(copy.deepcopy(trainer.model).cpu())
    for name, value in expected_paths(formulas).items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    z = formulas.logits(formulas.theta)[:, :-1]  # the last position predicts nothing
    p = z.softmax(-1)
    assert found["logit_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
    assert math.isfinite(found["top_curvature"])
    assert abs(found["rise_random"]) < 0.5 * found["rise_ascent"]


def test_diagnostics_do_not_change_the_training_by_a_bit(tmp_path: Path) -> None:
    settings = BASE | {"fsam_precondition": True, "gradient_accumulation_steps": 2}
    plain = make_trainer(tmp_path, gpt2(0.2), **settings)
    plain.train()
    watched = make_trainer(tmp_path, gpt2(0.2), **settings, fsam_diagnostics_steps=2)
    watched.train()
    assert same_bits(weights_of(watched.model), weights_of(plain.model))
