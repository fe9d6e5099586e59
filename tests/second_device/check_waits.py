"""The host waits for the device as often as under the plain Trainer, and not once more.

Run by tests/second_device/test_second_device.py, or by hand: python -m pytest tests/second_device/check_waits.py
"""

from tests.second_device.device import Wait, host_waits  # before transformers

# isort: split

import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.gpu import checks
from tests.parity.test_trl import FSAMSFTConfig, FSAMSFTTrainer, conversations, tokenizer
from tests.toys import llama, make_trainer, sentences

FUNCTIONAL: dict[str, Any] = {"fsam_variant": "functional"}
PRECONDITIONED = FUNCTIONAL | {"fsam_precondition": True}
MOMENTUM = PRECONDITIONED | {"fsam_ascent_direction": "momentum"}
LOGITS = {"fsam_fused_head": False}
SMOOTHED = {"label_smoothing_factor": 0.1}
TWO = {"gradient_accumulation_steps": 2}
WINDOW = TWO | {"fsam_ascent_scope": "optimizer_step"}
CASES: dict[str, dict[str, Any]] = {
    "none": {"fsam_variant": "none"},
    "sam": {"fsam_variant": "sam", "fsam_precondition": True},
    "functional": FUNCTIONAL,
    "functional-logits": FUNCTIONAL | LOGITS,
    "logit": {"fsam_variant": "logit"},
    "logit-logits": {"fsam_variant": "logit"} | LOGITS,
    "preconditioned": PRECONDITIONED | TWO,
    "preconditioned-logits": PRECONDITIONED | TWO | LOGITS,
    "momentum": MOMENTUM,
    "momentum-logits": MOMENTUM | LOGITS,
    "smoothed": PRECONDITIONED | SMOOTHED,
    "smoothed-logits": PRECONDITIONED | SMOOTHED | LOGITS,
    "window": PRECONDITIONED | WINDOW,
    "window-logits": PRECONDITIONED | WINDOW | LOGITS,
    "momentum-window": MOMENTUM | WINDOW,
    "offloaded": FUNCTIONAL | WINDOW | {"fsam_offload_hidden_states": True},
    "bf16": PRECONDITIONED | {"bf16": True},
    "fp16": PRECONDITIONED | {"fp16": True},
    "not_fused_adamw": PRECONDITIONED | {"optim": "adamw_torch"},
    "every_second_step": FUNCTIONAL | {"fsam_every_steps": 2},
}


class Waiting(TrainerCallback):
    """Counts what happens from the beginning of the fourth step to the end of the sixth."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.counting = host_waits()
            self.waits = self.counting.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            self.counting.__exit__(None, None, None)


def waits_of(trainer: Trainer) -> Counter[Wait]:
    trainer.add_callback(callback := Waiting())
    trainer.train()
    return callback.waits


def waits(folder: str | Path, **settings: Any) -> Counter[Wait]:
    # In each forward pass, transformers' models check on the host whether sequences are packed or padded, unless they
    # have a mask and eager attention.
    model = llama(attn_implementation="eager")
    rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in sentences()]
    # A log would read its means from the device.
    quiet = {"use_cpu": False, "logging_strategy": "no"}
    return waits_of(make_trainer(folder, model, **({"trainer": {"train_dataset": rows}} | quiet | settings)))


@cache
def of_the_plain_trainer(settings: str) -> Counter[Wait]:
    with TemporaryDirectory() as folder:
        return waits(folder, trainer_class=Trainer, arguments_class=TrainingArguments, **json.loads(settings))


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_more_often_than_a_plain_one(case: str, tmp_path: Path) -> None:
    plain = of_the_plain_trainer(
        json.dumps({name: value for name, value in CASES[case].items() if not name.startswith("fsam_")})
    )
    found = waits(tmp_path, **CASES[case])
    assert plain  # it copies its batches and reads its loss
    more = Counter(wait.inner for wait in found.elements()) - Counter(wait.inner for wait in plain.elements())
    assert not more, "\n".join(f"{wait.inner}, from {wait.own}" for wait in found if wait.inner in more)


@pytest.mark.parametrize(
    "settings", [FUNCTIONAL, PRECONDITIONED | WINDOW, MOMENTUM], ids=["functional", "window", "momentum"]
)
def test_with_trls_fused_head_no_wait_comes_from_the_package(settings: dict[str, Any], tmp_path: Path) -> None:
    """TRL 1.16 reads its metrics in `compute_loss`, and so in either pass. The package reads nothing."""
    arguments = {"use_cpu": False, "logging_strategy": "no", "max_steps": 6, "report_to": "none", "save_strategy": "no"}
    found = waits_of(
        FSAMSFTTrainer(
            llama(),
            FSAMSFTConfig(str(tmp_path), bf16=False, per_device_train_batch_size=2, **arguments, **settings),
            train_dataset=conversations(),
            processing_class=tokenizer(),
        )
    )
    assert any("trl" in wait.inner for wait in found)
    assert not [wait for wait in found if "/hf_fsam/" in wait.inner]


def test_the_check_for_gpus_counts_the_waits_of_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a thread of the device's own, where no line of Python has called it."""
    device = torch.device("npu")
    monkeypatch.setattr(checks, "DEVICE", device)
    x = torch.ones(4, device=device, requires_grad=True)
    mask = torch.tensor([True, False, True, True], device=device)
    with checks._Waits() as waits:
        loss = x[mask].sum()
        forward = waits.others
        loss.backward()
    assert waits.others > forward > 0
    assert not waits.own
