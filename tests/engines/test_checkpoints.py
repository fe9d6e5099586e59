"""Under every engine: resumed runs end alike, nothing perturbed is ever written, a failure is not a hang."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engines.distributed import ENGINES, train_distributed
from tests.toys import distance, gpt2, same_bits

pytest.importorskip("deepspeed", reason="pip install hf-fsam[deepspeed]")

PROCESSES = 2
CORE = ("zero3", "fsdp2")
BASE: dict[str, Any] = {
    "fsam_rho": 0.3,
    "fsam_precondition": True,
    "max_steps": 4,
    "per_device_train_batch_size": 1,
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
ALL = [pytest.param(engine, marks=() if engine in CORE else pytest.mark.slow) for engine in ENGINES]


def settings_of(engine: str) -> dict[str, Any]:
    settings = BASE | ENGINES[engine]
    if engine.startswith("zero3"):
        zero = settings["deepspeed"]["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": True}
        settings["deepspeed"] = settings["deepspeed"] | {"zero_optimization": zero}
    return settings


def named(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saved weights by the names of the parameters: tied ones are saved once, and buffers with them."""
    saved = {name.removeprefix("module."): weight for name, weight in saved.items()}
    return {name: saved[name].float() for name, _ in gpt2().named_parameters()}


def weights_in(checkpoint: Path, engine: str) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint, as its users get them."""
    if engine.startswith("zero") and engine != "zero0":
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        assert (checkpoint / "zero_to_fp32.py").is_file()  # the script that calls the same
        return named(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
    if engine == "fsdp2":
        return named(torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True))
    return named(load_file(checkpoint / "model.safetensors"))


@pytest.mark.parametrize("engine", ALL)
def test_killed_and_resumed_and_saved(engine: str, tmp_path: Path) -> None:
    settings = settings_of(engine)
    kill = {"struck": {"kind": "kill", "step": 2}, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(AssertionError, match="SIGKILL"):
        train_distributed(tmp_path / "first", PROCESSES, settings | SAVING | kill)

    checkpoint = tmp_path / "killed" / "checkpoint-2"
    terminate = {"struck": {"kind": "terminate", "step": 1}, "enable_jit_checkpoint": True}
    interrupted = {"struck": {"kind": "raise", "step": 1}, "save_to": str(tmp_path / "interrupted"), "evaluated": True}
    resumed, whole, one, two, terminated, survived = train_distributed(
        tmp_path / "second",
        PROCESSES,
        settings | {"resume": str(checkpoint), "output_dir": str(tmp_path / "resumed")},
        settings,
        settings | {"max_steps": 1, "evaluated": True},
        settings | {"max_steps": 2, "save_to": str(tmp_path / "saved")},
        settings | terminate | {"output_dir": str(tmp_path / "terminated")},
        settings | interrupted,
    )
    assert same_bits(resumed.masters, whole.masters)
    assert same_bits(resumed.weights, whole.weights)
    assert not same_bits(whole.weights, two.weights)
    assert same_bits(weights_in(checkpoint, engine), two.masters)
    assert same_bits(named(load_file(tmp_path / "saved" / "model.safetensors")), two.weights)
    assert same_bits(named(load_file(tmp_path / "interrupted" / "model.safetensors")), one.weights)
    assert same_bits(survived.masters, one.masters)
    assert survived.facts["loss"] == one.facts["loss"]  # nothing that was gathered at θ+ε is used again
    # The Trainer writes it before the optimizer's step, which DeepSpeed has made by then.
    stepped = two if engine.startswith("zero") else one
    assert same_bits(terminated.masters, two.masters)
    assert same_bits(weights_in(tmp_path / "terminated" / "checkpoint-1", engine), stepped.masters)


@pytest.mark.parametrize("engine", ALL)
def test_one_process_that_raises_takes_the_run_down(engine: str, tmp_path: Path) -> None:
    began = time.monotonic()
    struck = {"struck": {"kind": "raise", "step": 1, "rank": 1}}
    with pytest.raises(AssertionError, match="struck in the second pass"):
        train_distributed(tmp_path / "run", PROCESSES, settings_of(engine) | struck)
    assert time.monotonic() - began < 120  # the group's own limit is half an hour


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddp", "zero1"))]
)
def test_after_running_out_of_memory_it_begins_again_at_theta(engine: str, tmp_path: Path) -> None:
    memory = {"struck": {"kind": "memory", "step": 0}, "auto_find_batch_size": True, "per_device_train_batch_size": 2}
    again, wanted = train_distributed(
        tmp_path / "run",
        PROCESSES,
        settings_of(engine) | memory | {"max_steps": 2},
        settings_of(engine) | {"max_steps": 2},
    )
    assert distance(again.weights, wanted.weights) < 1e-6


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_one_process_that_would_need_another_forward_pass_says_what_helps(engine: str, tmp_path: Path) -> None:
    """In which the weights would be gathered from processes that make none."""
    struck = {"struck": {"kind": "write", "step": 1, "rank": 1}}
    with pytest.raises(AssertionError, match=r"changes the logits in place .*set fsam_fused_head=False"):
        train_distributed(tmp_path / "run", PROCESSES, settings_of(engine) | struck)
    train_distributed(tmp_path / "cured", PROCESSES, settings_of(engine) | struck | {"fsam_fused_head": False})


# Below stage 3 DeepSpeed waits in groups of its own, which have torch's limit.
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "zero3_offload", "zero3_offload_all", "fsdp2"])
def test_a_process_that_hangs_ends_the_run_after_ddp_timeout(engine: str, tmp_path: Path) -> None:
    began = time.monotonic()
    struck = {"struck": {"kind": "hang", "step": 1, "rank": 1}, "ddp_timeout": 20}
    with pytest.raises(AssertionError, match=r"(?i)timed? ?out"):
        train_distributed(tmp_path / "run", PROCESSES, settings_of(engine) | struck)
    assert 15 < time.monotonic() - began < 150
