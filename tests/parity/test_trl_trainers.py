"""Every trainer of TRL's under the mixin: with `none` it is the plain one to the bit, and otherwise it ends where the
same trainer does whose gradient is made by hand, in plain torch, around TRL's own `compute_loss`.

Losses that are written out from their formulas, too, are in test_trl.py (SFT, DPO, rewards) and test_trl_generated.py
(GRPO, RLOO).
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_fsam import FSAMArguments, FSAMMixin
from hf_fsam.heads.trl import unknown_heads
from tests.parity.test_trl import ids, lengths, tokenizer
from tests.toys import ON_DEVICE, distance, llama, same_bits, weights_of

RHO, STEPS, ACCUMULATION = 0.3, 2, 2

# Data -----------------------------------------------------------------------------------------------------------------


def rows(**columns: Callable[[torch.Generator], Any]) -> Dataset:
    g = torch.Generator().manual_seed(0)
    return Dataset.from_list([{name: column(g) for name, column in columns.items()} for _ in range(16)])


def prompt(g: torch.Generator) -> str:
    return "".join(f" t{i}" for i in ids(3, g))


def answer(g: torch.Generator) -> str:
    return "".join(f" t{i}" for i in ids(lengths(g), g))


def chat(g: torch.Generator) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt(g)}, {"role": "assistant", "content": answer(g)}]


def likes(g: torch.Generator) -> bool:
    return bool(torch.rand((), generator=g) < 0.5)


def prompts() -> Dataset:
    return rows(prompt=prompt, privileged_context=prompt)


def preferences() -> Dataset:
    return rows(prompt=prompt, chosen=answer, rejected=answer, reference=answer)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def left_padding() -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.padding_side = "left"
    words.chat_template = "{% for message in messages %} {{ message['content'] }}{% endfor %}"
    return words


def of_bytes() -> PreTrainedTokenizerFast:
    """GOLD takes no other."""
    pieces = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(["<0>", "<1>", "<2>", "Ġ", "t", *"0123456789"])}, [])
    )
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<0>", bos_token="<1>", eos_token="<2>")
    words.chat_template = left_padding().chat_template
    words.padding_side = "left"
    return words


# Trainers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: of the trainer, in the module of the configuration, too.
        module: where it is.
        config: what its configuration is given.
        given: what it is given beside the model; a function makes it.
        refused: with which words `fsam_ascent_scope="optimizer_step"` is refused; empty where it is not.
    """

    name: str
    module: str
    data: Callable[[], Dataset]
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    words: Callable[[], PreTrainedTokenizerFast] = left_padding
    config_module: str = ""

    def classes(self) -> tuple[type, type]:
        config_module = importlib.import_module(self.config_module or self.module)
        trainer = getattr(importlib.import_module(self.module), f"{self.name}Trainer")
        return trainer, getattr(config_module, f"{self.name}Config")


def other_llama() -> nn.Module:
    """A teacher."""
    model = llama()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
    return model


PAIRS, SIX_TOKENS = {"num_generations": 2}, {"max_completion_length": 6}
SHORT, LONGER = {"max_length": 32}, {"max_length": 64}
GENERATED = "whose _prepare_inputs may go by how often its training_step was called"
REWARDED, TAUGHT = {"reward_funcs": lambda: reward}, {"teacher_model": other_llama}
E = "trl.experimental."
CASES = {
    "sft": Case("SFT", "trl", lambda: rows(prompt=prompt, completion=answer)),
    "dpo": Case("DPO", "trl", preferences, given={"ref_model": llama}),
    "kto": Case("KTO", "trl", lambda: rows(prompt=prompt, completion=answer, label=likes), given={"ref_model": llama}),
    "grpo": Case("GRPO", "trl", prompts, PAIRS | SIX_TOKENS, REWARDED, GENERATED),
    "rloo": Case("RLOO", "trl", prompts, PAIRS | SIX_TOKENS, REWARDED, GENERATED),
    "distillation": Case("Distillation", "trl", prompts, SIX_TOKENS | {"beta": 0.5}, TAUGHT, GENERATED),
    "reverse_kl": Case("Distillation", "trl", prompts, SIX_TOKENS | {"beta": 1.0}, TAUGHT, GENERATED),
    "forward_kl": Case("Distillation", "trl", prompts, SIX_TOKENS | {"beta": 0.0}, TAUGHT, GENERATED),
    "orpo": Case("ORPO", E + "orpo", preferences, SHORT),
    "cpo": Case("CPO", E + "cpo", preferences, SHORT),
    "tpo": Case("TPO", E + "tpo", preferences, SHORT),
    "bema": Case("DPO", E + "bema_for_ref_model", preferences, given={"ref_model": llama}, config_module="trl"),
    "gmpo": Case("GMPO", E + "gmpo", prompts, PAIRS | SIX_TOKENS, REWARDED, GENERATED),
    "a2po": Case("A2PO", E + "a2po", prompts, SIX_TOKENS | {"num_value_samples": 2, "beta2": 0.1}, REWARDED),
    "gkd": Case("GKD", E + "gkd", lambda: rows(messages=chat), SHORT | {"max_new_tokens": 6}, TAUGHT, "given another"),
    "gold": Case(
        *("GOLD", E + "gold", lambda: rows(messages=chat), LONGER | SIX_TOKENS | {"use_uld_loss": False}, TAUGHT),
        *(GENERATED, of_bytes),
    ),
    "iw_opd": Case("IWOPD", E + "iw_opd", lambda: rows(messages=chat), SHORT | SIX_TOKENS, TAUGHT, GENERATED),
    "sdft": Case("SDFT", E + "sdft", prompts, PAIRS | SIX_TOKENS | {"distillation_topk": 8}, {}, GENERATED),
    "sdpo": Case("SDPO", E + "sdpo", prompts, PAIRS | SIX_TOKENS | {"distillation_topk": 8}, REWARDED, GENERATED),
}
SLOW = (
    "sft",
    "dpo",
    "rloo",
    "reverse_kl",
    "forward_kl",
    *(name for name, case in CASES.items() if case.module.startswith(E)),
)
cases = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)


def make(case: Case, folder: Path, over: tuple[type, ...] = (), **arguments: Any) -> Any:
    """The trainer of a case, with the classes `over` before its own."""
    trainer_class, config_class = case.classes()
    if over:
        trainer_class = type(f"Over{trainer_class.__name__}", (*over, trainer_class), {})
    if FSAMMixin in over:
        config_class = dataclass(type(f"Over{config_class.__name__}", (FSAMArguments, config_class), {}))
    home, words = folder / "model", case.words()
    if not home.exists():  # some trainers load their reference from where the model is from
        llama().save_pretrained(home)
        words.save_pretrained(home)
    model = LlamaForCausalLM.from_pretrained(home)
    given = {name: made() for name, made in case.given.items()}
    if "teacher_model" in given:
        given["teacher_model"].config._name_or_path = str(home)
    settings = {
        "output_dir": str(folder),
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        **ON_DEVICE,
    }
    return trainer_class(
        model=model,
        args=config_class(**(settings | case.config | arguments)),
        train_dataset=case.data(),
        processing_class=words,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None),
        **given,
    )


def trained(*args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and log, without what is of the clock and of this package."""
    trainer = make(*args, **kwargs)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    kept = [
        {key: x for key, x in entry.items() if not any(clock in key for clock in CLOCKS)}
        for entry in trainer.state.log_history
    ]
    return weights_of(trainer.model), kept


CLOCKS = ("runtime", "per_second", "flos", "step_time", "fsam/")

# By hand --------------------------------------------------------------------------------------------------------------


@contextmanager
def logits_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """All logits with a gradient that are made inside, in order. TRL's two heads that make none are put aside for the
    same in plain torch."""
    seen: list[Tensor] = []

    def see(z: Tensor) -> Tensor:
        if z.requires_grad:
            seen.append(z)
        return z

    def transformed(z: Tensor, scale: float, cap: float | None, temperature: float) -> Tensor:
        z = z * scale
        return ((cap * (z / cap).tanh() if cap else z) / temperature).log_softmax(-1)

    utils, distillation = (importlib.import_module(f"trl.trainer.{name}") for name in ("utils", "distillation_trainer"))
    fused, divergence = utils._ChunkedLogProbFunction, distillation.ChunkedDivergenceFunction

    def log_probabilities(
        h: Tensor, w: Tensor, b: Any, targets: Tensor, t: float, chunk: int, cap: Any, *rest: Any
    ) -> Any:
        _, entropy, *others = fused.apply(h.detach(), w.detach(), b, targets, t, chunk, cap, *rest)
        log_p = transformed(see(F.linear(h, w, b)), rest[0], cap, t)
        if entropy is not None:
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy, *others

    def diverged(
        h: Tensor, w: Tensor, b: Any, th: Tensor, tw: Tensor, tb: Any, beta: float, t: float, *rest: Any
    ) -> Any:
        log_p, log_q = (
            transformed(see(F.linear(h, w, b)), *rest[:2], t),
            transformed(F.linear(th, tw, tb), *rest[2:], t),
        )
        p, q = log_p.exp(), log_q.exp().detach()
        m = (1 - beta) * p + beta * q
        to_student, to_teacher = (p * (log_p - m.log())).sum(-1), (q * (log_q - m.log())).sum(-1)
        mixed = beta * to_teacher + (1 - beta) * to_student
        found = {0.0: (q * (log_q - log_p)).sum(-1), 1.0: (p * (log_p - log_q)).sum(-1)}.get(beta, mixed)
        return found, -(p * log_p).sum(-1).detach()

    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: see(output))
    utils._ChunkedLogProbFunction = SimpleNamespace(apply=log_probabilities)
    distillation.ChunkedDivergenceFunction = SimpleNamespace(apply=diverged)
    try:
        yield seen
    finally:
        handle.remove()
        utils._ChunkedLogProbFunction, distillation.ChunkedDivergenceFunction = fused, divergence


class ByHand:
    """Before a TRL trainer: the gradient of its loss is J(θ+ε)ᵀu(θ), or SAM's, and nothing here is of hf_fsam. What it
    returns has the loss's value and that gradient."""

    variant = "functional"

    def compute_loss(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        def loss() -> Tensor:
            found = super(ByHand, self).compute_loss(model, copy.deepcopy(inputs), *args, **kwargs)
            return found[0] if isinstance(found, tuple) else found

        weights = list(model.parameters())
        stream = torch.get_rng_state()
        with logits_of(model) as z:
            clean = loss()
        g = torch.autograd.grad(clean, weights, retain_graph=True)
        u = torch.autograd.grad(clean, z, allow_unused=True)
        theta = [weight.detach().clone() for weight in weights]
        size = torch.stack([each.norm() for each in g]).norm()
        with torch.no_grad():
            for weight, each in zip(weights, g, strict=True):
                weight.add_(RHO * each / size)
        torch.set_rng_state(stream)
        with logits_of(model) as moved_z:
            moved = loss()
        pairs = [(a, b) for a, b in zip(moved_z, u, strict=True) if b is not None]
        of, cotangent = ([moved], None) if self.variant == "sam" else zip(*pairs, strict=True)
        gradients = torch.autograd.grad(of, weights, cotangent)
        with torch.no_grad():
            for weight, value in zip(weights, theta, strict=True):
                weight.copy_(value)
        dots = [(each * (weight - weight.detach())).sum() for each, weight in zip(gradients, weights, strict=True)]
        return clean.detach() + torch.stack(dots).sum()


class SAMByHand(ByHand):
    variant = "sam"


# Tests ----------------------------------------------------------------------------------------------------------------


@cases
def test_none_is_the_plain_trainer_to_the_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    weights, log = trained(case, tmp_path)
    found, found_log = trained(case, tmp_path, (FSAMMixin,), fsam_variant="none")
    assert same_bits(found, weights)
    assert found_log == log


@pytest.mark.parametrize("variant", ["functional", pytest.param("sam", marks=pytest.mark.slow)])
@cases
def test_a_trainer_ends_where_a_gradient_by_hand_takes_it(name: str, variant: str, tmp_path: Path) -> None:
    """And its first line in the log, of the clean weights, is that of the plain trainer."""
    case, by_hand = CASES[name], ByHand if variant == "functional" else SAMByHand
    settings = {"fsam_variant": variant, "fsam_rho": RHO, "fsam_precondition": False}
    start = weights_of(LlamaForCausalLM.from_pretrained(make(case, tmp_path).model.config._name_or_path))
    wanted, _ = trained(case, tmp_path, (by_hand,))
    _, plain = trained(case, tmp_path, max_steps=1)
    found, log = trained(case, tmp_path, (FSAMMixin,), **settings)
    way = distance(wanted, start)
    assert distance(found, wanted) < 1e-5 * way
    for key in plain[0].keys() - {"grad_norm", "epoch"}:
        assert log[0][key] == pytest.approx(plain[0][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    "name", ["grpo", "rloo", "distillation", *(pytest.param(each, marks=pytest.mark.slow) for each in CASES)]
)
def test_an_ascent_on_a_whole_step_works_or_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    settings = {"fsam_ascent_scope": "optimizer_step", "fsam_rho": RHO, "lmbda": 1.0}
    settings = {key: value for key, value in settings.items() if key != "lmbda" or name == "gkd"}
    if not case.refused:
        trained(case, tmp_path, (FSAMMixin,), **settings)
        return
    with pytest.raises(ValueError, match=case.refused) as error:
        trained(case, tmp_path, (FSAMMixin,), **settings)
    assert "fsam_ascent_scope='micro_batch'" in str(error.value)
    trained(case, tmp_path, (FSAMMixin,), **settings, gradient_accumulation_steps=1, per_device_train_batch_size=4)


def test_a_trainer_that_makes_its_gradient_by_itself_is_refused_before_it_does(tmp_path: Path) -> None:
    """Online DPO computes its loss in `training_step`."""
    case = Case("OnlineDPO", E + "online_dpo", prompts, {"max_new_tokens": 4} | LONGER, REWARDED)
    trainer = make(case, tmp_path, (FSAMMixin,))
    start = weights_of(trainer.model)
    with pytest.raises(RuntimeError, match=r"OnlineDPOTrainer: .* did not back-propagate the loss of compute_loss"):
        trainer.train()
    assert same_bits(weights_of(trainer.model), start)
    assert all(weight.grad is None for weight in trainer.model.parameters())
    weights, log = trained(case, tmp_path)
    found, found_log = trained(case, tmp_path, (FSAMMixin,), fsam_variant="none")
    assert same_bits(found, weights)
    assert found_log == log


def test_a_head_that_no_boundary_can_be_put_into_is_refused() -> None:
    """It trains on a GPU alone."""
    module = importlib.import_module(E + "async_distillation")
    (refusal,) = unknown_heads(module.AsyncDistillationTrainer)
    assert refusal == (
        "AsyncDistillationTrainer, whose loss makes its logits by itself, in pieces",
        "set fsam_variant='sam'",
    )
    for case in CASES.values():
        assert not list(unknown_heads(case.classes()[0]))


@pytest.mark.slow
def test_diagnostics_measure_on_one_text_and_leave_the_training_alone(tmp_path: Path) -> None:
    """A2PO generates for each batch; GRPO cuts a text, which the diagnostics would do out of turn."""
    weights, _ = trained(CASES["a2po"], tmp_path)
    settings = {"fsam_variant": "none", "fsam_diagnostics_steps": 1}
    prepared: list[Any] = []

    class Prepares:
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared.append(inputs)
            return super()._prepare_inputs(inputs)  # type: ignore[misc]

    trainer = make(CASES["a2po"], tmp_path, (FSAMMixin, Prepares), **settings)
    trainer.train()
    assert STEPS * ACCUMULATION < len(prepared) <= 2 * STEPS * ACCUMULATION  # once to train, and once to measure
    assert same_bits(weights_of(trainer.model), weights)
    assert any("fsam/logit_path" in entry for entry in trainer.state.log_history)
    with pytest.raises(ValueError, match="what _prepare_inputs of GRPOTrainer makes"):
        make(CASES["grpo"], tmp_path, (FSAMMixin,), **settings).train()
