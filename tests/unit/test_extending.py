"""docs/extending.md: a variant and an engine of one's own, each in a few lines and without a private name."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from hf_fsam import FSAMTrainer, perturbation
from hf_fsam.engines import LocalEngine
from hf_fsam.perturbation import Perturbation
from tests import reference
from tests.reference import Tensors
from tests.toys import distance, gpt2, llama, make_trainer, same_bits, sentences, weights_of

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
STEPS, RHO = 6, 0.1


# A variant ------------------------------------------------------------------------------------------------------------


class AdaptiveTrainer(FSAMTrainer):
    """Ascends along θ² g, which ASAM does (Kwon et al. 2021), in the matrices alone and in the last half of the
    training."""

    def fsam_is_due(self) -> bool:
        return super().fsam_is_due() and 2 * self.state.global_step >= self.state.max_steps

    def fsam_perturbs(self, name: str, weight: nn.Parameter) -> bool:
        return weight.ndim >= 2

    def fsam_direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.mul_(weight.square())


class HalfBatchTrainer(FSAMTrainer):
    """Ascends on the first half of each micro-batch."""

    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value[: max(1, len(value) // 2)] for name, value in inputs.items() if isinstance(value, Tensor)}


class BalancedTrainer(FSAMTrainer):
    """Divides a batch's loss by the running mean of the losses, and logs that mean."""

    mean = 1.0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:  # an evaluation, which may want the outputs, too
            return loss
        if self.fsam_pass != "second":
            self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "loss_mean": self.mean}, *args, **kwargs)


# An engine ------------------------------------------------------------------------------------------------------------


class HostBackupEngine(LocalEngine):
    """Writes θ+ε into the weights, while θ waits on the host: one copy of the weights less on the device."""

    detached_weights_stay = False  # their memory is written to

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.backup: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        self.backup = [(weight.data, weight.detach().to("cpu", copy=True)) for weight in perturbation.weights]
        try:
            for (weight, _), value in zip(self.backup, perturbation.values, strict=True):
                weight.copy_(value)
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        super().restore()
        for weight, theta in self.backup:
            weight.copy_(theta)
        self.backup = []


class HostBackupTrainer(FSAMTrainer):
    def fsam_engine(self) -> HostBackupEngine:
        return HostBackupEngine(self.accelerator)


# Both are what they say -----------------------------------------------------------------------------------------------

SETTINGS = {
    "fsam_rho": RHO,
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
    "gradient_accumulation_steps": 2,
}


def trained(folder: Path, trainer_class: type, **settings: Any) -> Tensors:
    trainer = make_trainer(folder, trainer_class=trainer_class, **SETTINGS, **settings)
    trainer.train()
    names = reference.trainable(trainer.model)
    return {name: weight for name, weight in weights_of(trainer.model).items() if name in names}


CAUSAL = reference.Problem(reference.causal_lm_loss, count=reference.count_shifted_labels)


def expected(
    problem: reference.Problem = CAUSAL,
    variant: reference.Variant = "functional",
    accumulation: int = 2,
    **settings: Any,
) -> Tensors:
    rows = sentences()
    batches = [
        {key: torch.stack([row[key] for row in rows[start : start + 2]]) for key in rows[0]}
        for start in range(0, 2 * accumulation * STEPS, 2)
    ]
    return reference.train(
        llama(),
        problem,
        batches,
        variant=variant,
        rho=RHO,
        optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0),
        accumulation=accumulation,
        **settings,
    )


def adaptive(theta: Tensors, direction: Tensors) -> Tensors:
    return {name: d * theta[name].detach().square() for name, d in direction.items() if d.ndim >= 2}


def test_a_variant_is_the_formula_that_it_writes_down(tmp_path: Path) -> None:
    found = trained(tmp_path, AdaptiveTrainer)
    settings = {"perturbs": lambda step: 2 * step >= STEPS, "turned": adaptive}
    assert distance(found, expected(**settings)) < 1e-5
    for other in (settings | {"turned": lambda theta, d: d}, settings | {"perturbs": lambda step: True}):
        assert distance(found, expected(**other)) > 1e-4


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["functional", "sam", "logit"])
def test_an_ascent_on_other_inputs_keeps_the_cotangents_of_all(
    tmp_path: Path, variant: str, scope: str, fused: bool
) -> None:
    """One micro-batch of two rows, of which the first gives ε: the step by hand, from the formulas."""
    settings = {
        "fsam_variant": variant,
        "fsam_ascent_scope": scope,
        "fsam_fused_head": fused,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
    }
    trainer = make_trainer(
        tmp_path, trainer_class=HalfBatchTrainer, **(SETTINGS | settings | {"optim": "sgd", "learning_rate": 0.5})
    )
    trainer.train()
    model = llama()
    batch = {key: torch.stack([row[key] for row in sentences()[:2]]) for key in ("input_ids", "labels")}

    def loss_and_logits(rows: int, of: nn.Module) -> tuple[Tensor, Tensor]:
        logits = of(input_ids=batch["input_ids"][:rows]).logits
        targets = batch["labels"][:rows, 1:].reshape(-1)
        return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets), logits

    parameters = list(model.parameters())
    ascent = torch.autograd.grad(loss_and_logits(1, model)[0], parameters)
    loss, logits = loss_and_logits(2, model)
    (cotangent,) = torch.autograd.grad(loss, logits)
    moved = copy.deepcopy(model)
    size = torch.stack([g.norm() for g in ascent]).norm()
    with torch.no_grad():
        for weight, g in zip(moved.parameters(), ascent, strict=True):
            weight.add_(RHO * g / size)
    moved_loss, moved_logits = loss_and_logits(2, moved)
    (moved_cotangent,) = torch.autograd.grad(moved_loss, moved_logits, retain_graph=True)
    jacobian_of = model if variant == "logit" else moved
    gradients = torch.autograd.grad(
        loss_and_logits(2, jacobian_of)[1],
        list(jacobian_of.parameters()),
        cotangent if variant == "functional" else moved_cotangent,
    )
    with torch.no_grad():
        for weight, g in zip(parameters, gradients, strict=True):
            weight.sub_(0.5 * g)
    assert distance(weights_of(trainer.model), weights_of(model)) < 1e-6


def test_an_ascent_on_other_inputs_leaves_the_dropout_masks_to_the_cotangents(tmp_path: Path) -> None:
    """With an ε of next to nothing the step is the plain Trainer's, whose masks are the first that are drawn."""
    settings = SETTINGS | {"fsam_rho": 1e-9, "max_steps": 1}
    masked = {"fsam_variant": "functional"}, {"fsam_variant": "none"}
    found = []
    for each in masked:
        trainer = make_trainer(tmp_path, gpt2(dropout=0.3), HalfBatchTrainer, **settings, **each)
        trainer.train()
        found.append(weights_of(trainer.model))
    assert distance(*found) < 1e-6


@pytest.mark.parametrize("variant", ["functional", "sam"])
def test_a_loss_that_remembers_is_the_formula_that_it_writes_down(tmp_path: Path, variant: str) -> None:
    settings = SETTINGS | {"fsam_variant": variant, "gradient_accumulation_steps": 1, "logging_steps": 1}
    data = {"eval_dataset": sentences()}
    trainer = make_trainer(
        tmp_path, trainer_class=BalancedTrainer, trainer=data, eval_strategy="steps", eval_steps=2, **settings
    )
    trainer.train()
    means: list[float] = []  # after each batch
    seen: list[Any] = []

    def loss(logits: reference.Logits, batch: reference.Batch, window: reference.Window) -> Tensor:
        found = reference.causal_lm_loss(logits, batch, window)
        if not any(batch is each for each in seen):  # the clean pass comes first
            seen.append(batch)
            means.append(0.9 * (means[-1] if means else 1.0) + 0.1 * found.item())
        return found / means[-1]

    wanted = expected(reference.Problem(loss, count=reference.count_shifted_labels), variant, accumulation=1)
    found = {name: weight for name, weight in weights_of(trainer.model).items() if name in wanted}
    assert distance(found, wanted) < 1e-5
    assert [entry["loss_mean"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
        means, rel=1e-5
    )


def test_an_engine_trains_as_the_formulas_do(tmp_path: Path) -> None:
    found = trained(tmp_path, HostBackupTrainer)
    assert distance(found, expected()) < 1e-5
    assert same_bits(found, trained(tmp_path, FSAMTrainer))


def test_an_engine_may_write_into_the_weights_inside_a_caller_s_autocast_region(tmp_path: Path) -> None:
    """Which keeps the casts that it has made of them."""

    def in_bfloat16(trainer_class: type[FSAMTrainer]) -> Tensors:
        class Narrow(trainer_class):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return super().training_step(*args, **kwargs)

        return trained(tmp_path, Narrow, fsam_variant="sam")

    assert same_bits(in_bfloat16(HostBackupTrainer), in_bfloat16(FSAMTrainer))


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("fsam_ascent_inputs", None, "fsam_ascent_inputs of Answers returned NoneType of no inputs"),
        ("fsam_ascent_inputs", {}, "fsam_ascent_inputs of Answers returned dict of no inputs"),
        ("fsam_direction", [], "fsam_direction returned something: change the gradients in place"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, name: str, answer: Any, message: str) -> None:
    Answers = type("Answers", (FSAMTrainer,), {name: lambda self, *args: answer})
    with pytest.raises(TypeError, match=message):
        trained(tmp_path, Answers)


def test_whether_a_step_perturbs_is_asked_once_for_all_of_its_micro_batches(tmp_path: Path) -> None:
    class Asked(FSAMTrainer):
        def fsam_is_due(self) -> bool:
            asked.append(self.state.global_step)
            return len(asked) % 2 == 1

    asked: list[int] = []
    found = trained(tmp_path, Asked)
    assert asked == list(range(STEPS))
    assert distance(found, expected(perturbs=lambda step: step % 2 == 0)) < 1e-5


def test_weights_that_are_not_on_the_way_to_the_loss_are_perturbed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unused(FSAMTrainer):
        def fsam_perturbs(self, name: str, weight: nn.Parameter) -> bool:
            return name == "unused"

    logging.enable_propagation()
    model = llama()
    model.unused = nn.Parameter(torch.ones(2))
    make_trainer(tmp_path, model, Unused, **SETTINGS).train()
    assert "The ascent has no gradient, so the step is a plain one" in caplog.text


def test_without_a_direction_of_its_own_a_norm_is_taken_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an engine that shards, it is a reduction over the processes."""
    taken: list[int] = []
    norm = perturbation.norm
    monkeypatch.setattr(perturbation, "norm", lambda tensors: taken.append(1) or norm(tensors))
    trained(tmp_path, FSAMTrainer, fsam_ascent_scope="optimizer_step")
    assert len(taken) == STEPS


def test_an_engine_leaves_nothing_behind_an_exception(tmp_path: Path) -> None:
    class Raises(HostBackupTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.fsam_pass == "second":
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(tmp_path, trainer_class=Raises, **SETTINGS)
    before = weights_of(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(weights_of(trainer.model), before)


def test_the_page_shows_this_code() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    _imports, *blocks = [block.removeprefix("python\n") for block in page.split("```")[1::2]]
    assert len(blocks) == 4
    for block in blocks:
        for part in block.strip().split("\n\n\n"):
            assert part.strip() in here
