"""The diagnostics agree with plain PyTorch, and measuring does not change the training."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_fsam import FSAMDiagnosticsCallback, FSAMTrainer
from hf_fsam.diagnostics.probe import Probe
from hf_fsam.engines.fsdp import FSDPEngine
from tests.engines.distributed import train_distributed
from tests.reference import Window, causal_lm_loss, without_targets
from tests.toys import adapted, gpt2, llama, make_trainer, same_bits, sentences, train, weights_of

PATHS = ("logit_path", "functional_path", "logit_to_functional", "path_cosine", "rise_ascent")
NAMES = (*PATHS, "rise_random", "logit_entropy", "logit_norm", "top_curvature")
RHO = 0.3
BATCH = 24  # all rows: whatever their order, one batch


def tiny() -> GPT2LMHeadModel:
    """A model of 400 weights, so that its whole Hessian can be computed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_positions": 10, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_inner": 4}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, initializer_range=0.4, bos_token_id=1, eos_token_id=2))


def measured(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged, as one dict for each measurement."""
    return [
        {name: entry[f"fsam/{name}"] for name in NAMES}
        for entry in trainer.state.log_history
        if "fsam/logit_path" in entry
    ]


class Formulas:
    """z, u and J of section 2 of the paper for one model and one batch, in double precision."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.double()
        self.theta = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        rows = sentences()
        self.batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.window = Window([self.batch], int((self.batch["labels"][:, 1:] != -100).sum()))

    def logits(self, theta: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, theta, kwargs=without_targets(self.batch)).logits

    def of_logits(self, z: Tensor) -> Tensor:
        return causal_lm_loss((z,), self.batch, self.window)

    def loss(self, theta: dict[str, Tensor]) -> Tensor:
        return self.of_logits(self.logits(theta))

    def cotangent(self, theta: dict[str, Tensor]) -> Tensor:
        return torch.func.grad(self.of_logits)(self.logits(theta).detach())

    def pulled_back(self, theta: dict[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        """J(θ)ᵀu"""
        leaves = {name: weight.clone().requires_grad_() for name, weight in theta.items()}
        (self.logits(leaves) * u).sum().backward()
        return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def expected_paths(formulas: Formulas, direction: Any = lambda g: g) -> dict[str, float]:
    theta = formulas.theta
    u = formulas.cotangent(theta)
    g = formulas.pulled_back(theta, u)
    d = direction(g)
    away = {name: theta[name] + RHO * d[name] / flat(d).norm() for name in theta}
    logit = flat(formulas.pulled_back(theta, formulas.cotangent(away) - u))
    functional = flat(formulas.pulled_back(away, u)) - flat(g)
    return {
        "logit_path": float(logit.norm()),
        "functional_path": float(functional.norm()),
        "logit_to_functional": float(logit.norm() / functional.norm()),
        "path_cosine": float(torch.cosine_similarity(logit, functional, dim=0)),
        "rise_ascent": float(formulas.loss(away) - formulas.loss(theta)),
    }


def one_measurement(folder: Path, model: nn.Module, **arguments: Any) -> tuple[Trainer, dict[str, float]]:
    trainer = make_trainer(
        folder,
        model=model,
        fsam_rho=RHO,
        fsam_diagnostics_steps=1,
        max_steps=1,
        per_device_train_batch_size=BATCH,
        trainer={"train_dataset": sentences(BATCH)},
        **arguments,
    )
    trainer.train()
    (found,) = measured(trainer)
    return trainer, found


@pytest.mark.parametrize("variant", ["none", "functional"])
def test_numbers_are_those_of_the_formulas(tmp_path: Path, variant: str) -> None:
    trainer, found = one_measurement(tmp_path, tiny(), fsam_variant=variant, fsam_precondition=False)
    formulas = Formulas(trainer.model)
    for name, value in expected_paths(formulas).items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    z = formulas.logits(formulas.theta)[:, :-1]  # the last position predicts nothing
    p = z.softmax(-1)
    assert found["logit_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
    assert found["logit_norm"] == pytest.approx(float((z - z.mean(-1, keepdim=True)).norm(dim=-1).mean()), rel=1e-4)
    # The eigenvalues of the whole Hessian.
    names, sizes = list(formulas.theta), [weight.numel() for weight in formulas.theta.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        return formulas.loss(
            {name: part.view_as(formulas.theta[name]) for name, part in zip(names, parts, strict=True)}
        )

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat(formulas.theta)))
    largest = eigenvalues[eigenvalues.abs().argmax()]
    assert found["top_curvature"] == pytest.approx(float(largest), rel=0.05)
    # Along a random ε the loss rises by ρ²/2 times the Hessian's mean eigenvalue, far less than along the ascent.
    assert abs(found["rise_random"]) < 0.5 * found["rise_ascent"]


def test_the_preconditioned_direction_uses_the_second_moment_of_the_optimizer(tmp_path: Path) -> None:
    trainer, found = one_measurement(tmp_path, tiny(), fsam_variant="none", fsam_precondition=True)
    group, state = trainer.optimizer.param_groups[0], trainer.optimizer.state

    def direction(g: dict[str, Tensor]) -> dict[str, Tensor]:
        of = {name: state[weight] for name, weight in trainer.model.named_parameters()}
        correction = {name: 1 - group["betas"][1] ** float(each["step"]) for name, each in of.items()}
        return {
            name: g[name] / ((of[name]["exp_avg_sq"] / correction[name]).sqrt() + group["eps"]).double() for name in g
        }

    moments = {weight: dict(state[weight]) for weight in trainer.model.parameters()}
    formulas = Formulas(trainer.model)  # makes the weights double, in place
    state.update(moments)
    for name, value in expected_paths(formulas, direction).items():
        assert found[name] == pytest.approx(value, rel=2e-3), name


class SignOfTheBlocks(FSAMTrainer):
    """Perturbs the blocks alone, along the signs of their gradients."""

    def fsam_perturbs(self, name: str, weight: nn.Parameter) -> bool:
        return ".h." in name

    def fsam_direction(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        torch._foreach_sign_(gradients)


def test_a_trainer_that_changes_the_perturbation_is_measured_with_its_own(tmp_path: Path) -> None:
    settings = {"fsam_variant": "none", "trainer_class": SignOfTheBlocks, "fsam_precondition": False}
    trainer, found = one_measurement(tmp_path, tiny(), **settings)

    def direction(g: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g[name].sign() if ".h." in name else torch.zeros_like(g[name]) for name in g}

    for name, value in expected_paths(Formulas(trainer.model), direction).items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("variant", ["none", "sam", "functional"])
def test_measuring_does_not_change_the_training_by_a_bit(tmp_path: Path, variant: str) -> None:
    """With dropout, accumulation and shuffled batches, weights and logged losses are those without diagnostics."""
    settings: dict[str, Any] = {"fsam_variant": variant, "gradient_accumulation_steps": 2}
    without = make_trainer(tmp_path, model=gpt2(0.2), **settings)
    without.train()
    with_them = make_trainer(tmp_path, model=gpt2(0.2), fsam_diagnostics_steps=2, **settings)
    with_them.train()
    assert len(measured(with_them)) == 3
    assert same_bits(weights_of(with_them.model), weights_of(without.model))
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (without, with_them)
    ]
    assert losses[0] == losses[1]


def test_measuring_draws_nothing_from_data_and_collators_with_a_state(tmp_path: Path) -> None:
    """The data is a stream that can be read once, and the collator draws from a generator of its own."""

    def stream() -> Any:
        yield from sentences(24)

    class Masking:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            hidden = torch.rand(batch["labels"].shape, generator=self.generator) < 0.3
            return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}

    def trained(**arguments: Any) -> dict[str, Tensor]:
        given = {"train_dataset": Once(stream()), "data_collator": Masking()}
        return train(tmp_path, trainer=given, accelerator_config={"dispatch_batches": False}, **arguments)

    class Once(torch.utils.data.IterableDataset):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return self.rows

    assert same_bits(trained(fsam_diagnostics_steps=3), trained())


def test_only_positions_whose_next_label_counts_are_measured(tmp_path: Path) -> None:
    rows = sentences(BATCH)
    for row in rows:
        row["labels"][:6] = -100  # a prompt: position 5 is the first that predicts a target
    trainer = make_trainer(
        tmp_path,
        model=tiny(),
        max_steps=1,
        per_device_train_batch_size=BATCH,
        fsam_diagnostics_steps=1,
        trainer={"train_dataset": rows},
    )
    trainer.train()
    (found,) = measured(trainer)
    z = trainer.model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits[:, 5:-1]
    p = z.softmax(-1)
    assert found["logit_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)


def test_no_statistics_are_logged_where_logits_have_no_label_each(tmp_path: Path) -> None:
    """A decoder that classifies scores every position, but only one score is its answer and has a label."""
    model = LlamaForSequenceClassification(llama(num_labels=3).config)
    rows = [{**row, "labels": torch.tensor(index % 3)} for index, row in enumerate(sentences(BATCH))]
    settings = {"max_steps": 1, "fsam_diagnostics_steps": 1}
    trainer = make_trainer(tmp_path, model=model, trainer={"train_dataset": rows}, **settings)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "fsam/logit_path" in entry]
    assert "fsam/logit_entropy" not in entry
    assert "fsam/logit_norm" not in entry


def test_training_goes_on_after_a_batch_without_a_gradient_or_a_radius_of_zero(tmp_path: Path) -> None:
    def flat(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 0.0 * outputs.logits.sum()

    given = {"compute_loss_func": flat}
    trainer = make_trainer(tmp_path, fsam_diagnostics_steps=2, fsam_fused_head=False, trainer=given)
    trainer.train()
    assert trainer.state.global_step == 6

    class Fading(TrainerCallback):
        def on_step_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
            args.fsam_rho = 0.0

    trainer = make_trainer(tmp_path, fsam_diagnostics_steps=2, trainer={"callbacks": [Fading()]})
    trainer.train()
    assert trainer.state.global_step == 6


def full(*args: Any) -> None:
    raise torch.OutOfMemoryError("no")


def test_training_goes_on_where_memory_does_not_suffice_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Probe, "paths", full)
    weights = train(tmp_path, fsam_diagnostics_steps=2)
    assert "The diagnostics are not logged" in caplog.text
    assert same_bits(weights, train(tmp_path))


def test_the_paths_are_logged_where_memory_suffices_for_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grad = torch.autograd.grad

    def too_much(*args: Any, **kwargs: Any) -> Any:
        return full() if kwargs.get("create_graph") else grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", too_much)
    trainer = make_trainer(tmp_path, fsam_diagnostics_steps=2)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert "fsam/logit_to_functional" in logged
    assert "fsam/top_curvature" not in logged
    assert "fsam/top_curvature is not logged" in caplog.text
    assert "No Hessian" not in caplog.text


@pytest.mark.parametrize("make", [lambda: adapted(gpt2()), lambda: llama().to(torch.bfloat16)], ids=["LoRA", "bf16"])
def test_measures_adapters_and_low_precision(tmp_path: Path, make: Any) -> None:
    trainer = make_trainer(tmp_path, model=make(), fsam_diagnostics_steps=3)
    trainer.train()
    first, second = measured(trainer)
    for found in (first, second):
        assert all(torch.tensor(list(found.values())).isfinite())
        assert found["logit_path"] > 0
        assert found["functional_path"] > 0
    assert first != second


def flash(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """An operation that raises when it is differentiated a second time."""
    heads = output[:, None]  # (B, 1, T, C)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)[0][:, 0]


class Kernel(torch.autograd.Function):
    """x³ with a backward pass like that of a fused kernel: it has no derivative, but autograd does not raise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.x**2


@pytest.mark.parametrize("hook", [flash, lambda module, args, output: Kernel.apply(output)], ids=["raises", "silent"])
def test_a_model_without_a_second_derivative_is_measured_without_curvature(
    hook: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    model.model.norm.register_forward_hook(hook)
    trainer = make_trainer(tmp_path, model=model, fsam_diagnostics_steps=6)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "fsam/logit_path" in entry]
    assert "fsam/top_curvature" not in entry
    if hook is not flash:  # transformers says a line once a process
        assert "may have no derivative" in caplog.text


def test_measuring_under_ddp_does_not_change_the_training(tmp_path: Path) -> None:
    case = {"fsam_precondition": False, "fsam_rho": RHO, "max_steps": 2, "logging_steps": 1}
    without, with_them = train_distributed(tmp_path / "two", 2, case, case | {"fsam_diagnostics_steps": 1})
    assert same_bits(with_them.weights, without.weights)
    first, second = [entry for entry in with_them.logs if "fsam/logit_path" in entry]
    assert all(first[f"fsam/{name}"] == first[f"fsam/{name}"] for name in NAMES)
    assert first["fsam/logit_path"] != second["fsam/logit_path"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every=0 is not a count"):
        FSAMDiagnosticsCallback(every=0)
    with pytest.raises(ValueError, match="fsam_diagnostics_steps=-1"):
        make_trainer(tmp_path, fsam_diagnostics_steps=-1)
    plain = make_trainer(
        tmp_path,
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        trainer={"callbacks": [FSAMDiagnosticsCallback(every=1)]},
    )
    with pytest.raises(ValueError, match="give it to an FSAMTrainer"):
        plain.train()
    with pytest.raises(ValueError, match="needs a radius"):
        train(tmp_path, fsam_diagnostics_steps=1, fsam_rho=0.0)
    with pytest.raises(ValueError, match="SGD keeps none"):
        train(tmp_path, fsam_diagnostics_steps=1, fsam_variant="none", fsam_precondition=True, optim="sgd")
    sharded = make_trainer(tmp_path, fsam_diagnostics_steps=1)
    sharded.fsam_engine = lambda: Mock(spec=FSDPEngine, gradients_whole=False)
    sharded.fsam.forget_engine()
    with pytest.raises(ValueError, match="one process or under DDP only"):
        sharded.train()
