"""TRL's GRPO and RLOO under the mixin, against their losses written out in plain torch.

The text is the trainer's own, recorded as its `compute_loss` gets it. `tests.reference` computes everything after that.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback

from hf_fsam import FSAMMixin
from tests import reference
from tests.parity.test_parity import assert_same_weights
from tests.parity.test_trl_trainers import CASES, Case, make
from tests.reference import Batch, Logits, Problem, Window
from tests.toys import same_bits, weights_of

RHO, STEPS, ACCUMULATION = 0.3, 3, 2
EPSILON, BETA, ENTROPY = 0.05, 0.3, 0.2
SETTINGS = {
    "none": {"fsam_variant": "none"},
    "sam": {"fsam_variant": "sam", "fsam_precondition": False},
    "functional": {"fsam_variant": "functional", "fsam_precondition": False},
    "momentum": {"fsam_variant": "functional", "fsam_precondition": True, "fsam_ascent_direction": "momentum"},
    "logit": {"fsam_variant": "logit", "fsam_precondition": False},
}
# How often text is generated, and how old it may be when it is trained on.
RHYTHMS: dict[str, dict[str, Any]] = {
    "a text a step": {},
    "a text a micro-batch": {"steps_per_generation": 1},
    "twice on each text": {"num_iterations": 2},
    "a text in two steps": {"steps_per_generation": 2 * ACCUMULATION},
}


class Recorded:
    """Over a trainer: what its `compute_loss` gets, and how its text came about.

    Attributes:
        batches: one for each micro-batch.
        texts: how often text was generated.
        theta: the weights between two steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[Batch] = []
        self.texts: list[Tensor] = []
        self.theta: dict[str, Tensor] = {}
        self.add_callback(_Begins(self))  # type: ignore[attr-defined]

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        self.batches.append({name: x.cpu().clone() for name, x in prepared.items() if isinstance(x, Tensor)})
        return prepared

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        assert same_bits(weights_of(self.model), self.theta)  # type: ignore[attr-defined]
        generated = super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        self.texts.append(generated[1])
        return generated


class _Begins(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.theta = weights_of(self.trainer.model)


def trained(case: Case, folder: Path, over: tuple[type, ...], **arguments: Any) -> tuple[nn.Module, Any]:
    """The model before, and the trainer after."""
    trainer = make(case, folder, over, max_steps=STEPS, **arguments)
    weights = reference.trainable(trainer.model).values()
    trainer.optimizer = torch.optim.AdamW(weights, lr=5e-3, eps=1e-3)
    start = LlamaForCausalLM.from_pretrained(folder / "model")
    trainer.train()
    return start, trainer


def seen_by_the_model(batch: Batch) -> Batch:
    whole = {"input_ids": "ids", "attention_mask": "mask"}
    return {
        name: torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], 1) for name, part in whole.items()
    } | {"use_cache": False}


def log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """Of each token of the completion, (b, length)."""
    chosen = batch["completion_ids"]
    scores = logits[:, -chosen.shape[1] - 1 : -1].log_softmax(-1)
    return scores.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """PPO's: −min(r A, clip(r) A)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)


def grpo(start: nn.Module, beta: float, generation_steps: int, entropy: float = 0.0) -> Problem:
    """DAPO's loss, the trainer's default: a mean over the tokens of a step, with KL to the model as it began."""

    def loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
        log_p = log_probabilities(logits[0], batch)
        old = batch.get("old_per_token_logps", log_p.detach())
        ratio = (log_p - old).exp()
        losses = clipped(ratio, batch["advantages"].unsqueeze(1))
        if beta:
            with torch.no_grad():
                log_q = log_probabilities(start(**seen_by_the_model(batch)).logits, batch)
            losses = losses + beta * ratio * ((log_q - log_p).exp() - (log_q - log_p) - 1)
        tokens = batch["num_items_in_batch"] * len(window.batches) / generation_steps
        found = (losses * batch["completion_mask"]).sum() / tokens
        if entropy:
            log_all = logits[0][:, -log_p.shape[1] - 1 : -1].log_softmax(-1)
            spread = -(log_all.exp() * log_all).sum(-1)[batch["completion_mask"].bool()]
            found = found - entropy * spread.mean() / len(window.batches)
        return found

    return Problem(loss, inputs=seen_by_the_model)


def rloo(start: nn.Module, beta: float, generation_steps: int, entropy: float) -> Problem:
    """PPO's loss on whole sequences. The KL to the model as it began is in the advantages."""

    def loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
        log_p = (log_probabilities(logits[0], batch) * batch["completion_mask"]).sum(1)
        return clipped((log_p - batch["old_logps"]).exp(), batch["advantages"]).mean() / len(window.batches)

    return Problem(loss, inputs=seen_by_the_model)


LOSSES: dict[str, Callable[..., Problem]] = {"grpo": grpo, "rloo": rloo}


def check(name: str, folder: Path, setting: str, beta: float = 0.0, **arguments: Any) -> Any:
    chosen, accumulation = SETTINGS[setting], arguments.get("gradient_accumulation_steps", ACCUMULATION)
    given = {"fsam_rho": RHO, "epsilon": EPSILON, "beta": beta, "gradient_accumulation_steps": accumulation}
    start, trainer = trained(CASES[name], folder, (FSAMMixin, Recorded), **(given | chosen | arguments))
    wanted = reference.train(
        start,
        LOSSES[name](start, beta, trainer.args.steps_per_generation, arguments.get("entropy_coef", 0.0)),
        trainer.batches,
        variant=chosen["fsam_variant"],
        rho=RHO,
        precondition=chosen.get("fsam_precondition", False),
        momentum="fsam_ascent_direction" in chosen,
        scope=arguments.get("fsam_ascent_scope", "micro_batch"),
        accumulation=accumulation,
        optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-3),
    )
    assert_same_weights(trainer.model, start, wanted)
    per_text = trainer.args.steps_per_generation * trainer.num_iterations
    assert len(trainer.batches) == STEPS * accumulation
    assert len(trainer.texts) == -(-STEPS * accumulation // per_text)
    return trainer


def slow_but(*often: str, of: Iterable[str]) -> list[Any]:
    return [pytest.param(each, marks=[pytest.mark.slow] * (each not in often)) for each in of]


@pytest.mark.parametrize("setting", slow_but("none", "functional", of=SETTINGS))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_on_generated_text_agrees_with_the_formulas(name: str, setting: str, tmp_path: Path) -> None:
    trainer = check(name, tmp_path, setting, BETA)
    assert any(batch["advantages"].abs().max() > 0 for batch in trainer.batches)


@pytest.mark.parametrize("setting", slow_but("functional", of=["sam", "functional"]))
@pytest.mark.parametrize("rhythm", list(RHYTHMS)[1:])
@pytest.mark.parametrize("name", slow_but("grpo", of=LOSSES))
def test_text_that_is_used_more_than_once_agrees_with_the_formulas(
    name: str, rhythm: str, setting: str, tmp_path: Path
) -> None:
    """Off the policy, so that ratios are clipped."""
    trainer = check(name, tmp_path, setting, BETA, **RHYTHMS[rhythm])
    if trainer.args.steps_per_generation * trainer.num_iterations > ACCUMULATION:
        kept = "old_per_token_logps" if name == "grpo" else "old_logps"
        assert all(kept in batch for batch in trainer.batches)
        assert any(entry.get("clip_ratio/region_mean", 0) > 0 for entry in trainer.state.log_history)


@pytest.mark.parametrize("setting", slow_but("functional", "momentum", of=["sam", "functional", "momentum", "logit"]))
def test_a_loss_with_an_entropy_bonus_agrees_with_the_formulas(setting: str, tmp_path: Path) -> None:
    check("grpo", tmp_path, setting, entropy_coef=ENTROPY)


def test_an_ascent_on_a_step_of_one_micro_batch_agrees_with_the_formulas(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    check("grpo", tmp_path, "functional", fsam_ascent_scope="optimizer_step", **settings)


@pytest.mark.parametrize("name", slow_but("grpo", of=LOSSES))
def test_text_is_that_of_the_plain_trainer_until_the_weights_are_others(name: str, tmp_path: Path) -> None:
    """What is drawn for it, too: the random stream ends where one pass leaves it."""
    _, plain = trained(CASES[name], tmp_path, (Recorded,))
    same = "num_tokens", "reward", "reward_std", "entropy", "completions/mean_length"
    for setting in ("sam", "functional"):
        arguments = SETTINGS[setting] | {"fsam_rho": 1e-9}
        _, found = trained(CASES[name], tmp_path, (FSAMMixin, Recorded), **arguments)
        assert found.texts == plain.texts
        for entry, wanted in zip(found.state.log_history[:STEPS], plain.state.log_history[:STEPS], strict=True):
            assert [entry[key] for key in same] == pytest.approx([wanted[key] for key in same], rel=1e-4)
