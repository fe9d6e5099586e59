"""TRL's trainers on two processes end where plain torch does with the batches of both.

The batches are TRL's own, recorded as each process gets them: padded to another length on each, or packed. For
`tests.reference` the batches that two processes get at once are one, whose logits are those of the one beside those of
the other.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.engines.distributed import ENGINES, Trained, train_distributed
from tests.reference import Batch, Logits, Problem, Tensors, Window
from tests.toys import distance, same_bits

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")
pytest.importorskip("trl", reason="pip install hf-fsam[recipes]")

from tests.engines.trl_worker import model_of
from tests.parity.test_trl import SETTINGS, SFT, dpo

PROCESSES = 2
SAME = 1e-5  # relative, of the way that the weights went
BASE: dict[str, Any] = {
    "fsam_rho": 0.3,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
}
TRL_ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
PACKED = {"packing": True, "max_length": 16, "per_device_train_batch_size": 1}
PADDING_FREE = {"padding_free": True, "max_length": None}
PRECOMPUTED = {"precompute_ref_log_probs": True}
TIED, LORA = {"tied": True}, {"lora": True}
WINDOW = SETTINGS["window"]  # preconditioned, with fsam_ascent_scope="optimizer_step"
BY_DEFAULT: dict[str, dict[str, Any]] = {"sft": {"method": "sft"} | WINDOW}
LONG: dict[str, dict[str, Any]] = {
    f"{method}-{variant}{name}": {"method": method} | SETTINGS[variant] | head
    for method in ("sft", "dpo")
    for variant in ("none", "sam", "functional", "logit")
    for name, head in (("", {}), ("-tied", TIED))
} | {
    "sft-window-tied": {"method": "sft"} | WINDOW | TIED,
    "sft-momentum": {"method": "sft"} | SETTINGS["momentum"],
    "sft-packed": {"method": "sft"} | SETTINGS["functional"] | PACKED,
    "sft-packed-window": {"method": "sft"} | WINDOW | PACKED | TIED,
    "sft-padding_free": {"method": "sft"} | SETTINGS["functional"] | PADDING_FREE,
    "sft-checkpointed": {"method": "sft"} | WINDOW | {"gradient_checkpointing": True},
    "sft-lora": {"method": "sft"} | WINDOW | LORA,
    "dpo-window": {"method": "dpo"} | WINDOW,
    "dpo-precomputed": {"method": "dpo"} | SETTINGS["functional"] | PRECOMPUTED,
    "dpo-precomputed-tied": {"method": "dpo"} | WINDOW | PRECOMPUTED | TIED,
    "dpo-lora": {"method": "dpo"} | SETTINGS["functional"] | LORA,
    # Without preconditioning, whose quotients of small gradients leave float32 1e-4 of the way from float64.
    "dpo-lora-window": {"method": "dpo"} | WINDOW | LORA | {"fsam_precondition": False},
}
PLAIN_TRL = {f"{name}-plain": case | {"plain": True} for name, case in LONG.items() if case["fsam_variant"] == "none"}


def parts(batch: Batch) -> Iterator[Batch]:
    """Of each process."""
    for process in range(PROCESSES):
        mark = f"{process} "
        yield {name.removeprefix(mark): value for name, value in batch.items() if name.startswith(mark)}


def joined(batches: tuple[Batch, ...]) -> Batch:
    return {f"{process} {name}": x for process, batch in enumerate(batches) for name, x in batch.items()}


def on_each(problem: Problem, averaged: bool) -> Problem:
    """The problem of all processes, whose shares of the loss add up, or are averaged."""

    def logits(model: torch.nn.Module, theta: Tensors, batch: Batch) -> Logits:
        return sum((problem.logits(model, theta, problem.inputs(part)) for part in parts(batch)), ())

    def loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
        shares = [problem.loss((z,), part, window) for z, part in zip(logits, parts(batch), strict=True)]
        return torch.stack(shares).sum() / (PROCESSES if averaged else 1)

    def count(batch: Batch) -> int:
        return sum(problem.count(part) for part in parts(batch))

    return Problem(loss, inputs=lambda batch: batch, logits=logits, count=count)


def reference_weights(settings: dict[str, Any], batches: list[list[Batch]]) -> tuple[Tensors, Tensors]:
    """Where plain torch begins, and where it ends with the batches of all processes in one, in float64."""
    model = model_of(settings.get("tied", False), settings.get("lora", False)).double()
    if settings["method"] == "sft":
        problem = on_each(SFT, averaged=False)
    else:
        problem = on_each(dpo(copy.deepcopy(model).eval()), averaged=True)
    ended = reference.train(
        model,
        problem,
        [joined(each) for each in zip(*batches, strict=True)],
        variant=settings["fsam_variant"],
        rho=BASE["fsam_rho"],
        precondition=settings.get("fsam_precondition", False),
        momentum="fsam_ascent_direction" in settings,
        scope=settings.get("fsam_ascent_scope", "micro_batch"),
        accumulation=BASE["gradient_accumulation_steps"],
        max_grad_norm=1.0,
        optimizer_factory=lambda model: torch.optim.AdamW(
            reference.trainable(model).values(), lr=1e-2, eps=1e-3, weight_decay=0.0
        ),
    )
    return {name: weight.detach() for name, weight in reference.trainable(model).items()}, ended


def train_all(folder: Path, engines: Sequence[str], cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Trained]:
    """(engine, case) → what two processes end with; they start once."""
    settings = {(engine, name): BASE | case | ENGINES[engine] for engine in engines for name, case in cases.items()}
    worker = "tests.engines.trl_worker"
    ended = train_distributed(folder, PROCESSES, *settings.values(), worker=worker, timeout=550)
    return dict(zip(settings, ended, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trained]:
    return train_all(tmp_path_factory.mktemp("trl") / "all", TRL_ENGINES, BY_DEFAULT)


@pytest.fixture(scope="module")
def trained_long(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def trained(engine: str) -> dict[tuple[str, str], Trained]:
        return train_all(tmp_path_factory.mktemp("trl") / engine, [engine], LONG | PLAIN_TRL)

    return trained


def check(engine: str, settings: dict[str, Any], trained: Trained) -> None:
    assert trained.facts["sharded"] == (engine == "fsdp2")
    assert trained.facts["deepspeed"] == engine.startswith("zero")
    one, other = trained.facts["batches"]
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(one, other, strict=True))
    start, wanted = reference_weights(settings, trained.facts["batches"])
    weights = {name: trained.weights[name] for name in wanted}
    way = distance(wanted, start)
    assert way > 1e-3
    assert distance(weights, wanted) < SAME * way


@pytest.mark.parametrize("case", BY_DEFAULT)
@pytest.mark.parametrize("engine", TRL_ENGINES)
def test_two_processes_end_where_plain_torch_does(engine: str, case: str, trained: Any) -> None:
    check(engine, BY_DEFAULT[case], trained[engine, case])


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("engine", TRL_ENGINES)
def test_two_processes_end_where_plain_torch_does_in_all_cases(engine: str, case: str, trained_long: Any) -> None:
    check(engine, LONG[case], trained_long(engine)[engine, case])


@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN_TRL)
@pytest.mark.parametrize("engine", TRL_ENGINES)
def test_none_is_trls_own_training_to_the_bit(engine: str, case: str, trained_long: Any) -> None:
    plain, under_the_mixin = (
        trained_long(engine)[engine, case],
        trained_long(engine)[engine, case.removesuffix("-plain")],
    )
    assert same_bits(under_the_mixin.weights, plain.weights)
