"""TRL's trainers under the mixin: they count right, and end on the formulas' weights without logits in memory.

The batches are TRL's own, recorded as the trainer gets them. `tests.reference` computes everything after that.
"""

import copy
import functools
import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainingArguments
from trl.models.activation_offloading import OffloadActivations

from hf_fsam import FSAMArguments, FSAMMixin, FSAMTrainingArguments
from hf_fsam.counters import Counters
from tests import reference, zoo
from tests.parity.test_parity import assert_same_weights
from tests.reference import IGNORED, Batch, Problem, Window
from tests.toys import ON_DEVICE, VOCABULARY, llama

RHO, STEPS, ACCUMULATION = 0.3, 4, 2


class FSAMSFTTrainer(FSAMMixin, trl.SFTTrainer):
    pass


class FSAMDPOTrainer(FSAMMixin, trl.DPOTrainer):
    pass


class FSAMRewardTrainer(FSAMMixin, trl.RewardTrainer):
    pass


@dataclass
class FSAMSFTConfig(FSAMArguments, trl.SFTConfig):
    pass


@dataclass
class FSAMDPOConfig(FSAMArguments, trl.DPOConfig):
    pass


@dataclass
class FSAMRewardConfig(FSAMArguments, trl.RewardConfig):
    pass


SETTINGS = {
    "none": {"fsam_variant": "none"},
    "sam": {"fsam_variant": "sam", "fsam_precondition": False},
    "functional": {"fsam_variant": "functional", "fsam_precondition": False},
    "window": {"fsam_variant": "functional", "fsam_precondition": True, "fsam_ascent_scope": "optimizer_step"},
    "momentum": {"fsam_variant": "functional", "fsam_precondition": True, "fsam_ascent_direction": "momentum"},
    "logit": {"fsam_variant": "logit", "fsam_precondition": False},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")


def ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def lengths(generator: torch.Generator) -> int:
    return int(torch.randint(4, 9, (), generator=generator))


def conversations() -> Dataset:
    """Texts of unequal length, of which the first two tokens are the prompt."""
    g = torch.Generator().manual_seed(0)
    texts = [ids(lengths(g), g) for _ in range(40)]
    return Dataset.from_list([{"input_ids": t, "completion_mask": [0, 0] + [1] * (len(t) - 2)} for t in texts])


def preferences() -> Dataset:
    g = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return "".join(f" t{i}" for i in ids(count, g))

    rows = [{"prompt": text(3), "chosen": text(lengths(g)), "rejected": text(lengths(g))} for _ in range(20)]
    return Dataset.from_list(rows)


def sft_on(args: TrainingArguments) -> FSAMSFTTrainer:
    return FSAMSFTTrainer(model=llama(), args=args, train_dataset=conversations(), processing_class=tokenizer())


def test_fsam_fields_set_on_plain_training_arguments_are_kept_where_trl_makes_its_own_of_them(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args.fsam_rho = 0.5
    trainer = sft_on(args)
    assert isinstance(trainer.args, trl.SFTConfig)
    assert (trainer.args.fsam_rho, trainer.args.fsam_variant) == (0.5, "functional")


def test_training_arguments_that_trl_cannot_take_name_the_class_that_it_can(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"FSAMTrainingArguments that it.*FSAMSFTConfig\(FSAMArguments, SFTConfig\)"):
        sft_on(FSAMTrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    sft_on(FSAMSFTConfig(str(tmp_path), report_to="none", use_cpu=True))


def make_trainer(
    folder: Path, trainer_class: Any, config_class: Any, model: nn.Module, data: Dataset, **arguments: Any
) -> Any:
    optimizer = torch.optim.AdamW(reference.trainable(model).values(), lr=5e-3, eps=1e-3)
    fsam = issubclass(trainer_class, FSAMMixin)
    given = {name: value for name, value in arguments.items() if fsam or not name.startswith("fsam_")}
    trainer = trainer_class(
        model=model,
        args=config_class(
            output_dir=str(folder),
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_checkpointing=given.pop("gradient_checkpointing", False),
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            **({"fsam_rho": RHO} if fsam else {}),
            **ON_DEVICE,
            **given,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.batches = []
    training_step = trainer.training_step

    def recording(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        trainer.batches.append(
            {name: x.cpu().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in inputs.items()}
        )
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = recording
    return trainer


def check(trainer: Any, start: nn.Module, problem: Problem, setting: str) -> None:
    trainer.train()
    assert trainer.state.global_step == STEPS
    chosen = SETTINGS[setting]
    wanted = reference.train(
        start,
        problem,
        trainer.batches,
        variant=chosen["fsam_variant"],
        rho=RHO,
        precondition=chosen.get("fsam_precondition", False),
        momentum="fsam_ascent_direction" in chosen,
        scope=chosen.get("fsam_ascent_scope", "micro_batch"),
        accumulation=ACCUMULATION,
        optimizer_factory=lambda model: torch.optim.AdamW(reference.trainable(model).values(), lr=5e-3, eps=1e-3),
    )
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")  # the copy of the adapters that TRL makes for π₀
    assert_same_weights(trainer.model, start, wanted)


# SFT ------------------------------------------------------------------------------------------------------------------


def seen_by_the_model(batch: Batch) -> Batch:
    """The model's inputs, and no cache: with one, a model does not look for packed sequences in `position_ids`."""
    seen = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return seen | {"use_cache": False}


SFT = Problem(reference.causal_lm_loss, inputs=seen_by_the_model, count=reference.count_shifted_labels)
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "checkpointed": {"gradient_checkpointing": True},
    "offloaded": {"fsam_offload_hidden_states": True},
}


@settings
@pytest.mark.parametrize("layout", ["padded", "packed", "padding_free"])
def test_sft_agrees_with_the_formulas(layout: str, setting: str, tmp_path: Path) -> None:
    """The loss is that of completions alone, which `completion_mask` marks."""
    model = llama()
    start = copy.deepcopy(model)
    arguments = SETTINGS[setting] | LAYOUTS[layout]
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **arguments)
    check(trainer, start, SFT, setting)
    assert any((batch["labels"] == IGNORED).any() for batch in trainer.batches)
    assert ("attention_mask" in trainer.batches[0]) == (layout == "padded")


@pytest.mark.parametrize("layout", ["checkpointed", "offloaded"])
def test_sft_with_checkpointing_or_offloading_agrees_with_the_formulas(layout: str, tmp_path: Path) -> None:
    model = llama()
    start = copy.deepcopy(model)
    arguments = SETTINGS["window"] | LAYOUTS[layout]
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **arguments)
    check(trainer, start, SFT, "window")


def test_sft_of_a_model_that_caps_its_logits_agrees_with_the_formulas(tmp_path: Path) -> None:
    model = zoo.gemma2()
    start = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **SETTINGS["functional"])
    problem = replace(SFT, loss=zoo.capped_loss, logits=reference.head_logits("lm_head"))
    check(trainer, start, problem, "functional")


def test_sft_of_a_head_with_a_bias_agrees_with_the_formulas(tmp_path: Path) -> None:
    from tests.unit.test_fused_head import phi

    model = phi()
    start = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **SETTINGS["functional"])
    check(trainer, start, SFT, "functional")
    assert all(0 < entry["fsam/functional_sharpness"] < 2 for entry in trainer.state.log_history[:STEPS])


@pytest.mark.parametrize("setting", ["functional", "window"])
def test_sft_with_label_smoothing_agrees_with_the_formulas(setting: str, tmp_path: Path) -> None:
    """For label smoothing, TRL makes the logits, and computes its metrics in a pass of their own without gradients."""
    model = llama()
    start = copy.deepcopy(model)
    arguments = SETTINGS[setting] | {"label_smoothing_factor": 0.1}
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **arguments)
    check(trainer, start, replace(SFT, loss=reference.label_smoothing(shift=True, factor=0.1)), setting)


@settings
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft_without_a_target_has_a_zero_gradient(smoothing: float, setting: str, tmp_path: Path) -> None:
    """The completions of a micro-batch, and of a whole window, are cut off. Their gradient is zero, as under TRL."""
    rows = list(conversations())
    for row in rows[2:8]:
        row["completion_mask"] = [0] * len(row["input_ids"])
    model = llama()
    start = copy.deepcopy(model)
    arguments = SETTINGS[setting] | {"label_smoothing_factor": smoothing, "train_sampling_strategy": "sequential"}
    arguments |= {"max_length": None, "completion_only_loss": True}  # or TRL would leave out such rows
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, Dataset.from_list(rows), **arguments)
    loss = reference.label_smoothing(shift=True, factor=smoothing) if smoothing else SFT.loss

    def silent(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        return loss(logits, batch, window) if window.num_items else 0.0 * logits[0].sum()

    check(trainer, start, replace(SFT, loss=silent), setting)
    counted = [int((batch["labels"] != IGNORED).sum()) for batch in trainer.batches]
    assert [count > 0 for count in counted] == [True, False, False, False, *[True] * 4]


# DPO and rewards ------------------------------------------------------------------------------------------------------

BETA = 0.5


def dpo(start: nn.Module, losses: Callable[..., Tensor] | None = None) -> Problem:
    """−log σ(β (Δ log π − Δ log π₀)) over the completions, π₀ the model as it began; or another of the losses below."""

    def completion_log_probability(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        scores, targets = logits[:, :-1].log_softmax(-1), batch["input_ids"][:, 1:]
        picked = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * batch["completion_mask"][:, 1:]
        return picked.sum(1).chunk(2)

    def loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
        chosen, rejected = completion_log_probability(logits[0], batch)
        with torch.no_grad():
            outputs = start(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            chosen_before, rejected_before = completion_log_probability(outputs.logits, batch)
        now, then, lengths = (
            (chosen, rejected),
            (chosen_before, rejected_before),
            batch["completion_mask"].sum(1).chunk(2),
        )
        each = (losses or DPO_LOSSES["sigmoid"])(chosen - then[0], rejected - then[1], now, then, lengths)
        return each.mean() / len(window.batches)

    return Problem(loss, inputs=seen_by_the_model)


@settings
def test_dpo_with_lora_agrees_with_the_formulas(setting: str, tmp_path: Path) -> None:
    model = zoo.llama_lora(use_dora=False)
    arguments = SETTINGS[setting] | {"beta": BETA}
    start = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, FSAMDPOTrainer, FSAMDPOConfig, model, preferences(), **arguments)
    check(trainer, start, dpo(copy.deepcopy(start)), setting)


# Each of the loss, as a function of a = log π/π₀ of the chosen answers and b of the rejected ones, (n,); of log π and
# log π₀ themselves in rows of (a, b); of their lengths, (n,). Label smoothing is 0.1, which is ε.
SMOOTHING = 0.1
DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda a, b, *_: -F.logsigmoid(BETA * (a - b)),
    "hinge": lambda a, b, *_: (1 - BETA * (a - b)).clamp(min=0),
    "ipo": lambda a, b, now, then, n: (a / n[0] - b / n[1] - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda a, b, *_: sum(
        q * (q.log() - p.log())
        for q, p in (
            ((BETA * (a - b)).sigmoid(), torch.tensor(1 - SMOOTHING)),
            ((BETA * (b - a)).sigmoid(), torch.tensor(SMOOTHING)),
        )
    ),
    "nca_pair": lambda a, b, *_: (
        -F.logsigmoid(BETA * a) - 0.5 * F.logsigmoid(-BETA * a) - 0.5 * F.logsigmoid(-BETA * b)
    ),
    "robust": lambda a, b, *_: (
        (SMOOTHING * F.logsigmoid(BETA * (b - a)) - (1 - SMOOTHING) * F.logsigmoid(BETA * (a - b)))
        / (1 - 2 * SMOOTHING)
    ),
    "bco_pair": lambda a, b, *_: -F.logsigmoid(BETA * a) - F.logsigmoid(-BETA * b),
    "sppo_hard": lambda a, b, *_: (a - 0.5 / BETA) ** 2 + (b + 0.5 / BETA) ** 2,
    "aot": lambda a, b, now, then, n: smoothed((now[0] - now[1]).sort()[0] - (then[0] - then[1]).sort()[0]),
    "aot_unpaired": lambda a, b, *_: smoothed(a.sort()[0] - b.sort()[0]),
    "apo_zero": lambda a, b, *_: 1 - (BETA * a).sigmoid() + (BETA * b).sigmoid(),
    "apo_down": lambda a, b, *_: (BETA * a).sigmoid() + 1 - (BETA * (a - b)).sigmoid(),
    "discopop": lambda a, b, *_: torch.lerp(
        -F.logsigmoid(BETA * (a - b)), (BETA * (b - a)).exp(), (BETA * (a - b) / 0.05).sigmoid()
    ),
    "sft": lambda a, b, now, then, n: -now[0].sum() / n[0].sum() * torch.ones(len(a)),
    "sigmoid_norm": lambda a, b, now, then, n: -F.logsigmoid(BETA * (a / n[0] - b / n[1])),
}


def smoothed(margin: Tensor) -> Tensor:
    return -(1 - SMOOTHING) * F.logsigmoid(BETA * margin) - SMOOTHING * F.logsigmoid(-BETA * margin)


@pytest.mark.parametrize(
    "loss_type", [pytest.param(each, marks=[pytest.mark.slow] * (each != "ipo")) for each in DPO_LOSSES]
)
def test_each_loss_of_dpo_agrees_with_the_formulas(loss_type: str, tmp_path: Path) -> None:
    model = zoo.llama_lora(use_dora=False)
    start = copy.deepcopy(model)
    settings = SETTINGS["functional"] | {"beta": BETA, "loss_type": [loss_type], "label_smoothing": SMOOTHING}
    trainer = make_trainer(tmp_path, FSAMDPOTrainer, FSAMDPOConfig, model, preferences(), **settings)
    check(trainer, start, dpo(copy.deepcopy(start), DPO_LOSSES[loss_type]), "functional")


def reward_loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
    chosen, rejected = logits[0].squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean() / len(window.batches)


@pytest.mark.parametrize("setting", ["none", "functional", "window"])
def test_reward_training_agrees_with_the_formulas(setting: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**zoo.DECODER, num_labels=1))
    start = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, FSAMRewardTrainer, FSAMRewardConfig, model, preferences(), **SETTINGS[setting])
    check(trainer, start, Problem(reward_loss, inputs=seen_by_the_model), setting)


# Counts ---------------------------------------------------------------------------------------------------------------

TRAINERS: dict[str, tuple[Any, Any, Any, Any, Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "sft": (FSAMSFTTrainer, FSAMSFTConfig, trl.SFTTrainer, trl.SFTConfig, llama, conversations),
    "dpo": (
        FSAMDPOTrainer,
        FSAMDPOConfig,
        trl.DPOTrainer,
        trl.DPOConfig,
        lambda: zoo.llama_lora(use_dora=False),
        preferences,
    ),
}
CLOCKS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_batch_is_counted_once_and_measured_at_the_clean_weights(name: str, tmp_path: Path) -> None:
    """With `none`, the log is TRL's own to the bit. With every other variant, it counts the same tokens and has the
    metrics of the clean weights."""
    trainer_class, config_class, plain_class, plain_config, model, data = TRAINERS[name]

    def log(trainer_class: Any, config_class: Any, **arguments: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, trainer_class, config_class, model(), data(), **arguments)
        trainer.train()
        return [
            {key: value for key, value in entry.items() if key not in CLOCKS} for entry in trainer.state.log_history
        ]

    plain = log(plain_class, plain_config)
    assert log(trainer_class, config_class, fsam_variant="none") == plain
    measured = log(trainer_class, config_class, fsam_variant="none", fsam_diagnostics_steps=2)
    assert [entry for entry in measured if "fsam/logit_path" not in entry] == plain
    assert len(measured) > len(plain)
    first = {key: value for key, value in plain[0].items() if key != "grad_norm"}
    for setting in ("sam", "functional", "window", "momentum", "logit"):
        entries = log(trainer_class, config_class, **SETTINGS[setting])
        assert [entry.get("num_tokens") for entry in entries] == [entry.get("num_tokens") for entry in plain]
        assert {key: entries[0][key] for key in first} == pytest.approx(first, rel=1e-5), setting


class _Tempered(FSAMSFTTrainer):
    """A loss with a weight and a memory of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature, self.queue, self.told = nn.Parameter(torch.ones(())), torch.zeros(2), False
        self.optimizer.add_param_group({"params": [self.temperature]})

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.queue[0] += 1
        self.told |= self.fsam_pass == "second"
        return super().compute_loss(*args, **kwargs) * self.temperature


def test_what_is_no_count_of_trls_is_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, _Tempered, FSAMSFTConfig, llama(), conversations(), fsam_precondition=False)
    temperature, queue = trainer.temperature, trainer.queue
    trainer.train()
    assert trainer.temperature is temperature
    assert temperature.item() < 0.99  # trained
    assert trainer.queue is queue
    assert queue[0] == 2 * STEPS * ACCUMULATION
    assert trainer.told


def test_counters_are_those_of_the_library(tmp_path: Path) -> None:
    """GRPO collects the entropies of a window of micro-batches, and has None before."""
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, llama(), conversations())
    trainer._entropy_window_stats, trainer.tokens, trainer.seen = None, 3, torch.tensor(3)
    counters = Counters(trainer)
    trainer._entropy_window_stats = torch.ones(2)
    trainer.tokens += 1
    trainer.seen += 1
    counters.restore()
    assert trainer._entropy_window_stats is None
    assert trainer.tokens == trainer.seen == 3


def test_a_trl_whose_fused_head_has_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["trl.trainer.utils"], "_ChunkedLogProbFunction")
    given = (tmp_path, FSAMSFTTrainer, FSAMSFTConfig, llama(), conversations())
    with pytest.raises(ValueError, match=r"fused head of this TRL.*trl==1\.16\.\*, or set fsam_variant='sam'"):
        make_trainer(*given, **SETTINGS["functional"])
    make_trainer(*given, fsam_variant="sam")


def test_a_trl_whose_fused_head_takes_other_parameters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None: ...

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "forward", staticmethod(forward))
    with pytest.raises(ValueError, match=r"fused head of this TRL.*install trl==1\.16"):
        make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, llama(), conversations(), **SETTINGS["functional"])


def test_a_trl_whose_fused_head_saves_other_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function: Any = trl.trainer.utils._ChunkedLogProbFunction
    forward = function.forward

    @functools.wraps(forward)
    def reordered(ctx: Any, *args: Any) -> Any:
        save = ctx.save_for_backward

        class Context:
            def __getattr__(self, name: str) -> Any:
                return getattr(ctx, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(ctx, name, value)

            def save_for_backward(self, *tensors: Any) -> None:
                save(*tensors[:4], tensors[4] + 1.0, *tensors[5:])

        return forward(Context(), *args)

    monkeypatch.setattr(function, "forward", staticmethod(reordered))
    with pytest.raises(ValueError, match=r"fused head of this TRL.*install trl==1\.16"):
        make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, llama(), conversations(), **SETTINGS["functional"])


def offloading_context(monkeypatch: pytest.MonkeyPatch) -> OffloadActivations:
    with monkeypatch.context() as patched:  # its constructor wants an accelerator
        patched.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        return OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=0)


@settings
def test_sft_with_activations_on_the_host_agrees_with_the_formulas(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's `activation_offloading` knows the weights' memory, and counts on one forward and one backward pass."""
    context = offloading_context(monkeypatch)
    left: list[int] = []
    known: list[bool] = []

    class Watched(FSAMSFTTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            addresses = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
            known.append(addresses <= context.param_storages)
            left.append(len(context.tracker))
            return super().compute_loss(model, *args, **kwargs)

    model = llama()
    start = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, Watched, FSAMSFTConfig, model, conversations(), **SETTINGS[setting])
    context.update_model_params(trainer.model)
    trainer.maybe_activation_offload_context = context
    check(trainer, start, SFT, setting)
    assert all(known)
    assert not any(left)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("setting", ["functional", "momentum", "logit"])
def test_no_pass_is_left_in_memory_after_its_step(
    setting: str, offloads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that stopped at the boundary no backward pass frees what the fused head has saved."""
    nodes: list[weakref.ref] = []

    class Mark(torch.autograd.Function):
        """A node of the graph below the head."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nodes.append(weakref.ref(ctx))
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            return upstream

    model = llama()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: Mark.apply(output))
    trainer = make_trainer(tmp_path, FSAMSFTTrainer, FSAMSFTConfig, model, conversations(), **SETTINGS[setting])
    if offloads:
        trainer.maybe_activation_offload_context = offloading_context(monkeypatch)
    trainer.train()
    vars(trainer).pop("maybe_activation_offload_context")  # it keeps what the last step left until the next one
    gc.collect()
    assert len(nodes) >= 2 * STEPS
    assert not any(node() for node in nodes)
