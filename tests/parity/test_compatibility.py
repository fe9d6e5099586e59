"""What the Trainer and torch offer works under the split step: checkpointing, compilation, mixed precision and more."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CPTConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_fsam import FSAMTrainer
from tests.toys import DEVICE, distance, gpt2, llama, make_trainer, same_bits, sentences, train, weights_of

ACTIVE = ["sam", "functional", "logit"]


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_does_not_change_the_training(tmp_path: Path, variant: str, reentrant: bool) -> None:
    settings = {"fsam_variant": variant, "fsam_rho": 0.3, "fsam_precondition": False}
    whole = train(tmp_path, model=gpt2(0.2), **settings)
    recomputed = make_trainer(
        tmp_path,
        gpt2(0.2),
        gradient_checkpointing=True,  # the name in all versions of transformers 5
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **settings,
    )
    recomputed.train()
    assert recomputed.model.is_gradient_checkpointing
    assert distance(weights_of(recomputed.model), whole) < 1e-6


@pytest.mark.parametrize("variant", ACTIVE)
def test_neftune_noise_is_the_same_in_both_passes(tmp_path: Path, variant: str) -> None:
    settings = {"neftune_noise_alpha": 5.0, "fsam_precondition": False}
    plain = train(tmp_path, fsam_variant="none", **settings)
    assert distance(train(tmp_path, fsam_variant=variant, fsam_rho=1e-9, **settings), plain) < 1e-6
    assert distance(train(tmp_path, fsam_variant=variant, fsam_rho=0.3, **settings), plain) > 1e-4


def graphs_compiled(trainer: Trainer) -> list[int]:
    """How many graphs torch has compiled by the end of each step, from none on."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    count = TrainerCallback()
    count.on_step_end = lambda *_, **__: graphs.append(counters["stats"]["unique_graphs"])
    trainer.add_callback(count)
    return graphs


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_train_as_eager_ones_and_compile_once(tmp_path: Path, variant: str, backend: str) -> None:
    settings = {"fsam_variant": variant, "fsam_rho": 0.3}
    eager = train(tmp_path, **settings)
    compiled = make_trainer(tmp_path, torch_compile=True, torch_compile_backend=backend, **settings)
    graphs = graphs_compiled(compiled)
    compiled.train()
    assert distance(weights_of(compiled.model), eager) < 1e-5
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled anew: {graphs}"


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("aot_eager", None),
        pytest.param("inductor", "default", marks=pytest.mark.slow),
        pytest.param("inductor", "max-autotune-no-cudagraphs", marks=pytest.mark.slow),
    ],
)
def test_plain_steps_and_evaluations_between_split_steps_compile_nothing_anew(
    tmp_path: Path, backend: str, mode: str | None
) -> None:
    settings: dict[str, Any] = {"fsam_rho": 0.3, "fsam_every_steps": 2, "max_steps": 5}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    settings |= {"trainer": {"train_dataset": sentences(), "eval_dataset": sentences(4)}}
    eager = train(tmp_path, **settings)
    compiled = make_trainer(
        tmp_path, torch_compile=True, torch_compile_backend=backend, torch_compile_mode=mode, **settings
    )
    graphs = graphs_compiled(compiled)
    compiled.train()
    assert distance(weights_of(compiled.model), eager) < 1e-5
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled anew: {graphs}"


def test_a_model_that_accelerates_own_configuration_compiles_trains_as_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --dynamo_backend` sets this; the Trainer's arguments know nothing of it."""
    eager = train(tmp_path, fsam_rho=0.3)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    compiled = make_trainer(tmp_path, fsam_rho=0.3)
    graphs = graphs_compiled(compiled)
    compiled.train()
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled anew: {graphs}"
    assert compiled.fsam.boundary.head is None  # as with torch_compile=True
    assert distance(weights_of(compiled.model), eager) < 1e-5


def test_a_model_compiled_in_an_earlier_plain_training_trains_as_an_eager_one(tmp_path: Path) -> None:
    """torch does not check whether a hook was added since it compiled. What it compiled without one never calls it."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "fsam_rho": 0.3}
    torch._dynamo.reset()
    train(tmp_path, fsam_variant="none", **settings)
    assert distance(train(tmp_path, **settings), train(tmp_path, fsam_rho=0.3)) < 1e-5


def compiled_by_a_method(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_by_a_method, partial(torch.compile, backend="eager")])
def test_a_model_that_its_user_has_compiled_and_run_trains_as_an_eager_one(
    tmp_path: Path, compiled: Callable[[nn.Module], nn.Module]
) -> None:
    """The first step is a plain one, and compiles the model without the hook."""

    class Late(FSAMTrainer):
        def fsam_is_due(self) -> bool:
            return self.state.global_step > 0

    settings = {"trainer_class": Late, "fsam_rho": 0.3, "max_steps": 2, "remove_unused_columns": False}
    torch._dynamo.reset()
    trained = train(tmp_path, model=compiled(llama()), **settings)
    assert distance(dict(zip(llama().state_dict(), trained.values(), strict=True)), train(tmp_path, **settings)) < 1e-5


def test_a_model_that_is_compiled_between_two_trainings_makes_its_logits(tmp_path: Path) -> None:
    def twice(between: Callable[[nn.Module], Any]) -> Trainer:
        trainer = make_trainer(tmp_path, fsam_rho=0.3, max_steps=1)
        trainer.train()
        between(trainer.model)
        trainer.train()
        return trainer

    compiled, eager = twice(compiled_by_a_method), twice(lambda model: None)
    assert compiled.fsam.boundary.head is None
    assert distance(weights_of(compiled.model), weights_of(eager.model)) < 1e-5


def test_a_callback_may_copy_and_pickle_the_model(tmp_path: Path) -> None:
    """A callback that keeps a moving average does so. The copy has nothing of this package in it."""
    taken: list[nn.Module] = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
            file = io.BytesIO()
            torch.save(model, file)
            assert b"hf_fsam" not in file.getvalue()
            file.seek(0)
            taken[:] = [copy.deepcopy(model), torch.load(file, weights_only=False)]

    trainer = make_trainer(tmp_path, fsam_rho=0.3, trainer={"callbacks": [Copies()]})
    trainer.train()
    tokens = torch.arange(1, 9, device=DEVICE)[None]
    for model in taken:
        assert torch.equal(model(tokens).logits, trainer.model(tokens).logits)


@pytest.mark.parametrize("variant", ACTIVE)
def test_bfloat16_autocast_trains_like_float32_within_its_precision(tmp_path: Path, variant: str) -> None:
    """What tells the variants apart is not lost to rounding: a run in bfloat16 ends nearer to the same variant in
    float32 than to any other."""
    settings = {"fsam_rho": 1.0, "fsam_precondition": False, "learning_rate": 3e-2, "optim": "sgd"}
    mixed = make_trainer(tmp_path, bf16=True, fsam_variant=variant, **settings)
    dtypes: set[torch.dtype] = set()
    mixed.model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    mixed.train()
    assert dtypes == {torch.bfloat16}
    own = distance(weights_of(mixed.model), train(tmp_path, fsam_variant=variant, **settings))
    others = [
        distance(weights_of(mixed.model), train(tmp_path, fsam_variant=other, **settings))
        for other in ("none", *ACTIVE)
        if other != variant
    ]
    assert own < 0.25 * min(others), (own, others)


@pytest.mark.parametrize("variant", ACTIVE)
def test_weights_in_bfloat16_train_and_are_perturbed_by_rho(tmp_path: Path, variant: str) -> None:
    model = llama(hidden_size=64, intermediate_size=256).to(torch.bfloat16)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, fsam_variant=variant, fsam_rho=0.05)
    trainer.train()
    assert not same_bits(weights_of(model), before)
    assert model.dtype == torch.bfloat16
    for entry in trainer.state.log_history[:3]:
        assert entry["fsam/radius"] == pytest.approx(0.05, rel=0.2)  # a mean of two draws over 90 thousand weights


class _Scaled(FSAMTrainer):
    """Loss scaling as fp16 training has it, on the CPU and in float32, where it must change nothing."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("precondition", [False, True])
def test_loss_scaling_does_not_change_the_training(tmp_path: Path, variant: str, precondition: bool) -> None:
    settings = {
        "fsam_variant": variant,
        "fsam_rho": 0.3,
        "fsam_precondition": precondition,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
    }
    plain = make_trainer(tmp_path, **settings)
    plain.train()
    scaled = make_trainer(tmp_path, trainer_class=_Scaled, **settings)
    scaled.train()
    assert scaled.accelerator.scaler.get_scale() > 2.0**10  # it has grown, so it was in use
    assert distance(weights_of(scaled.model), weights_of(plain.model)) < 1e-6
    for one, other in zip(scaled.state.log_history[:3], plain.state.log_history[:3], strict=True):
        rise = "fsam/functional_sharpness" if variant == "functional" else "fsam/sharpness"
        for key in ("loss", rise, "fsam/ascent_grad_norm", "fsam/radius"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.mark.skipif(DEVICE.type == "cpu", reason="fp16 with GradScaler needs a GPU: HF_FSAM_TEST_DEVICE=cuda")
@pytest.mark.parametrize("variant", ACTIVE)
def test_fp16_with_grad_scaler_trains_like_float32_within_its_precision(tmp_path: Path, variant: str) -> None:
    settings = {"fsam_rho": 1.0, "fsam_precondition": False, "learning_rate": 3e-2, "optim": "sgd"}
    half = make_trainer(tmp_path, fp16=True, fsam_variant=variant, **settings)
    half.train()
    assert half.accelerator.scaler is not None
    own = distance(weights_of(half.model), train(tmp_path, fsam_variant=variant, **settings))
    others = [
        distance(weights_of(half.model), train(tmp_path, fsam_variant=other, **settings))
        for other in ("none", *ACTIVE)
        if other != variant
    ]
    assert own < 0.25 * min(others), (own, others)
    assert half.state.log_history[0]["fsam/radius"] == pytest.approx(1.0, rel=1e-2)


def test_weights_whose_gradients_share_memory_are_each_perturbed_by_their_own(tmp_path: Path) -> None:
    """Autograd puts the gradients of p and q into the same memory here. If θ+ε of p were written into it, q would get
    the values of p."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(-torch.ones(3, 2))
            self.classifier = nn.Identity()
            self.seen: list[tuple[Tensor, Tensor]] = []

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.seen.append((self.p.detach().clone(), self.q.detach().clone()))
            logits = self.classifier((self.p.view(-1) + self.q.view(-1)) * x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Twins()
    rows = [{"x": torch.arange(6.0), "labels": torch.tensor(i % 6)} for i in range(4)]
    make_trainer(
        tmp_path, model, trainer={"train_dataset": rows}, fsam_rho=0.1, fsam_precondition=False, max_steps=1
    ).train()
    (clean_p, clean_q), (p, q) = model.seen
    torch.testing.assert_close((p - clean_p).flatten(), (q - clean_q).flatten())
    assert torch.cat([p - clean_p, (q - clean_q).view(2, 3)]).norm().item() == pytest.approx(0.1, rel=1e-4)


class _Normed(nn.Module):
    """A model with a batch norm, whose running statistics change with every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.classifier = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.norm(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("variant", ACTIVE)
@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_running_statistics_are_those_of_the_clean_passes_alone(tmp_path: Path, variant: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)} for i in range(24)]
    settings = {"trainer": {"train_dataset": rows}, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    plain = train(tmp_path, model=_Normed(), fsam_variant="none", **settings)
    split = train(tmp_path, model=_Normed(), fsam_variant=variant, fsam_ascent_scope=scope, fsam_rho=1.0, **settings)
    assert plain["norm.num_batches_tracked"] == 12
    assert same_bits(split, plain)


@pytest.mark.parametrize("variant", ACTIVE)
def test_an_adapter_may_write_into_its_batch(tmp_path: Path, variant: str) -> None:
    """PEFT's context-aware prompt tuning writes into `input_type_mask` in its forward pass."""

    def model() -> nn.Module:
        ids = [5, 6, 7, 8]
        config = CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_mask=[1] * len(ids),
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.9,
        )
        return get_peft_model(llama(), config)

    rows = [
        row | {"input_type_mask": torch.tensor([1, 2, 3, 4, 4, 4, 4, 4, 4, 4]), "attention_mask": torch.ones(10).long()}
        for row in sentences()
    ]
    settings = {"trainer": {"train_dataset": rows}, "remove_unused_columns": False, "optim": "sgd"}
    plain = train(tmp_path, model=model(), fsam_variant="none", **settings)
    assert distance(train(tmp_path, model=model(), fsam_variant=variant, fsam_rho=1e-9, **settings), plain) < 1e-6
    assert not same_bits(train(tmp_path, model=model(), fsam_variant=variant, fsam_rho=3.0, **settings), plain)


def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.classifier = nn.Embedding(4, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.classifier(self.embedding(x))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.tensor(i % 4), "labels": torch.tensor(i % 3)} for i in range(4)]
    trainer = make_trainer(tmp_path, Sparse(), trainer={"train_dataset": rows}, optim="sgd", fsam_precondition=False)
    with pytest.raises(ValueError, match="sparse gradients"):
        trainer.train()
