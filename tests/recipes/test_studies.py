"""The scripts of recipes/studies: which steps perturb, along what, and what is measured after training."""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))

import after_training
import late
import momentum_sign

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from tests import reference
from tests.toys import LENGTH, VOCABULARY, distance, llama, make_trainer, same_bits, sentences, weights_of

ROOT = Path(__file__).parents[2]


def test_late_perturbs_in_the_last_part_of_the_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, trainer_class=late.LateTrainer, arguments_class=late.LateArguments, perturb_last=0.5, logging_steps=1
    )
    trainer.train()
    perturbed = [entry["step"] for entry in trainer.state.log_history if entry.get("fsam/radius", 0) > 0]
    assert perturbed == [4, 5, 6]
    with pytest.raises(ValueError, match="perturb_last=0"):
        late.LateArguments(output_dir=str(tmp_path), perturb_last=0)


@dataclass
class SignedArguments(momentum_sign.MomentumSignArguments, FSAMTrainingArguments):
    pass


class SignedTrainer(momentum_sign.MomentumSignMixin, FSAMTrainer):
    pass


@pytest.mark.parametrize("rho", [0.1, 3.0])
@pytest.mark.parametrize("sign", ["plus", "minus"])
def test_the_jacobian_is_taken_along_or_against_the_momentum(tmp_path: Path, sign: str, rho: float) -> None:
    """J(θ ± ρ m/‖m‖)ᵀ u(θ), held against plain torch, as the first step with the gradient in place of m."""
    trainer = make_trainer(
        tmp_path,
        trainer_class=SignedTrainer,
        arguments_class=SignedArguments,
        momentum_sign=sign,
        fsam_ascent_direction="momentum",
        fsam_rho=rho,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    trainer.train()
    found = {name: weights_of(trainer.model)[name] for name in reference.trainable(trainer.model)}
    rows = sentences()
    batches = [{key: torch.stack([row[key] for row in rows[at : at + 2]]) for key in rows[0]} for at in range(0, 12, 2)]

    def expected(factor: float) -> reference.Tensors:
        return reference.train(
            llama(),
            reference.Problem(reference.causal_lm_loss, count=reference.count_shifted_labels),
            batches,
            variant="functional",
            rho=rho,
            optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0),
            momentum=True,
            turned=lambda theta, direction: {name: factor * d for name, d in direction.items()},
        )

    factor = 1.0 if sign == "plus" else -1.0
    assert distance(found, expected(factor)) < 1e-5
    assert distance(found, expected(-factor)) > 1e-3


def test_a_sign_of_the_momentum_needs_an_ascent_along_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="momentum_sign='-' is unknown"):
        SignedArguments(output_dir=str(tmp_path), momentum_sign="-", fsam_ascent_direction="momentum")
    with pytest.raises(ValueError, match="fsam_ascent_direction='gradient' into a descent"):
        SignedArguments(output_dir=str(tmp_path), momentum_sign="minus")


def test_the_average_of_the_weights_is_what_is_saved_and_measured(tmp_path: Path) -> None:
    class RecordingTrainer(after_training.AfterTrainer):
        def update_average(self) -> None:
            seen.append(weights_of(self.model))
            super().update_average()

    seen: list[dict[str, torch.Tensor]] = []
    trainer = make_trainer(
        tmp_path,
        trainer_class=RecordingTrainer,
        arguments_class=after_training.AfterArguments,
        trainer={"eval_dataset": sentences(4, seed=2)},
        weight_average="swa",
        average_from=0.5,
        perturb_last=0.5,
    )
    trainer.train()
    mean = {name: torch.stack([each[name] for each in seen[3:]]).mean(dim=0) for name in seen[0]}
    trainer.save_model()
    saved = type(trainer.model).from_pretrained(tmp_path)
    assert distance(weights_of(saved), mean) < 1e-6
    assert distance(weights_of(saved), seen[-1]) > 1e-3
    rows = [row["input_ids"] for row in sentences(4, seed=2)]
    blocks = Dataset.from_dict({"input_ids": torch.stack(rows).tolist()})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after_training.loss_of(saved, blocks), rel=1e-5)
    assert same_bits(weights_of(trainer.model), seen[-1])  # the training would go on from them


def test_an_average_of_bfloat16_weights_moves(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        llama().bfloat16(),
        trainer_class=after_training.AfterTrainer,
        arguments_class=after_training.AfterArguments,
        weight_average="ema",
        average_decay=0.999,
    )
    with torch.no_grad():
        trainer.update_average()
        start = [weight.clone() for weight in trainer.average]
        torch._foreach_mul_(trainer.trained_weights(), 1.1)
        trainer.averaged_steps = 1000
        for _ in range(500):
            trainer.update_average()
    moved = (trainer.average[0] - start[0]).norm() / (trainer.trained_weights()[0].float() - start[0]).norm()
    assert moved == pytest.approx(1 - 0.999**500, rel=1e-2)


def test_forgetting_is_read_off_where_the_frontier_reaches_a_loss() -> None:
    frontier = [(5.5, 0.0), (5.0, 0.1), (4.6, 0.3), (4.2, 0.9), (4.8, 2.0)]
    found = {loss: after_training.forgotten_at(loss, frontier) for loss in (6.0, 5.5, 5.25, 5.0, 4.7, 4.2, 4.1)}
    wanted = {6.0: 0.0, 5.5: 0.0, 5.25: 0.05, 5.0: 0.1, 4.7: 0.25, 4.2: 0.9, 4.1: math.nan}
    assert found == pytest.approx(wanted, nan_ok=True)
    diverged = [(5.5, 0.0), (5.0, 0.1), (math.nan, math.nan), (4.5, 0.5)]
    assert math.isnan(after_training.forgotten_at(4.6, diverged))


def test_each_later_rate_has_its_pair_of_metrics() -> None:
    def domains(new: float, change: float) -> after_training.Domains:
        return {
            "new": {"loss_before": 5.5, "loss_after": new, "change": new - 5.5},
            "old": {"loss_before": 4.0, "loss_after": 4.0 + change, "change": change},
        }

    assert after_training.forgetting({1e-3: domains(5.0, 0.2)}) == {"forgotten": 0.2, "new_loss": 5.0}
    later = {3e-3: domains(4.0, 0.9), 1.5e-4: domains(5.0, 0.1)}  # the frontier goes by the rate, not by the order
    assert after_training.forgetting(later, equal_new_loss=4.5) == pytest.approx(
        {
            "forgotten_3e-3": 0.9,
            "new_loss_3e-3": 4.0,
            "forgotten_1.5e-4": 0.1,
            "new_loss_1.5e-4": 5.0,
            "forgotten_at_equal": 0.5,
            "old_loss_at_equal": 4.5,
        }
    )
    with pytest.raises(ValueError, match=r"later_learning_rates=\[0.0\]"):
        after_training.AfterArguments(output_dir="unused", later_learning_rates=[0.0])


def test_the_loss_after_training_is_the_mean_over_all_tokens() -> None:
    model = llama().eval()
    ids = torch.randint(3, VOCABULARY, (21, LENGTH))  # not a whole number of batches
    found = after_training.loss_of(model, Dataset.from_dict({"input_ids": ids.tolist()}), batch=4)
    with torch.no_grad():
        z = model(input_ids=ids).logits[:, :-1]
    assert found == pytest.approx(float(F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten())), rel=1e-5)


def test_noise_is_a_share_of_each_matrix_and_does_not_change_the_model() -> None:
    model = llama()
    before = weights_of(model)
    noisy = after_training.changed(model, after_training.noisy(0.1, draw=0))
    assert same_bits(weights_of(model), before)
    assert same_bits(weights_of(noisy), weights_of(after_training.changed(model, after_training.noisy(0.1, draw=0))))
    for name, weight in noisy.named_parameters():
        away = (weight - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert float(away) == pytest.approx(0.1 if weight.ndim > 1 else 0.0, rel=0.2), name


def test_quantized_weights_are_close_to_the_weights() -> None:
    """Runs only where torchao is installed (the extra `quantization`). The other tests do not need it."""
    pytest.importorskip("torchao")
    model = llama(hidden_size=64)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        away = {
            name: float((after_training.changed(model, change)(input_ids=ids).logits - before).norm() / before.norm())
            for name, change in after_training.quantizations().items()
        }
    assert 0 < 4 * away["int8"] < away["int4"] < 0.5


@pytest.mark.slow
def test_after_training_adds_its_metrics_to_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(model: Any) -> None:
        for weight in model.parameters():
            weight.data = weight.data.round(decimals=2)

    monkeypatch.setattr(after_training, "quantizations", lambda: {"int8": copy.copy, "int4": coarse})
    short = {"max_steps": 4, "warmup_steps": 0, "eval_steps": 4, "validation_blocks": 16, "later_epochs": 1}
    short |= {"weight_average": "ema", "equal_new_loss": 100}
    argv = [str(ROOT / "recipes" / "configs" / "study.yaml"), "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    results = after_training.run([*argv, *(str(part) for name in short for part in (f"--{name}", short[name]))])
    metrics = results["metrics"]
    assert {"int8_rise", "noise_rise", "forgotten", "new_loss", "old_loss_at_equal"} <= set(after_training.METRICS)
    assert metrics["int8_rise"] == pytest.approx(0, abs=1e-6)  # nothing was changed
    assert metrics["int4_rise"] != 0
    assert metrics["noise_rise"] != 0
    assert metrics["forgotten"] != 0  # four steps leave nothing to forget
    assert metrics["new_loss"] > 0
    assert metrics["forgotten_at_equal"] == 0
    assert metrics["old_loss_at_equal"] == pytest.approx(metrics["eval_loss"], rel=1e-2)  # of more blocks
