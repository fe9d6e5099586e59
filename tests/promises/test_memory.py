"""A step holds one more copy of the trainable weights, and the cotangent, and no more, counted storage by storage."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.peak_memory import PeakAllocated, PeakMemory
from hf_fsam import perturbation
from tests.toys import LENGTH, llama, make_trainer

ROWS = 2


def _peak(folder: Path, model: nn.Module, **arguments) -> int:
    trainer = make_trainer(folder, model, max_steps=3, per_device_train_batch_size=ROWS, **arguments)
    with PeakMemory() as memory:
        trainer.train()
    return memory.peak


def _wide(dtype: torch.dtype = torch.float32, vocabulary: int = 48) -> nn.Module:
    """A million weights and few tokens, so that a copy of the weights stands out."""
    return llama(hidden_size=128, intermediate_size=512, num_hidden_layers=4, vocab_size=vocabulary).to(dtype)


def _size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_holds_at_most_one_copy_of_the_weights_more_than_a_plain_one(
    tmp_path: Path, dtype: torch.dtype, precondition: bool, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Temporaries are as small beside this model as they are beside one of ten million weights.
    monkeypatch.setitem(perturbation._CHUNK, "cpu", 1 << 14)
    copy = _size(_wide(dtype))
    plain = _peak(tmp_path, _wide(dtype), fsam_variant="none", gradient_accumulation_steps=accumulation)
    for variant in ("sam", "functional"):
        for scope in ("micro_batch", "optimizer_step"):
            split = _peak(
                tmp_path,
                _wide(dtype),
                fsam_variant=variant,
                fsam_ascent_scope=scope,
                fsam_precondition=precondition,
                gradient_accumulation_steps=accumulation,
            )
            cotangents = accumulation * ROWS * LENGTH * 48 * dtype.itemsize
            assert split - plain <= 1.03 * copy + cotangents, (variant, scope, (split - plain) / copy)
            assert split - plain > 0.5 * copy  # or the measurement misses the copy


def test_with_lora_only_the_adapters_are_copied(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        return get_peft_model(_wide(), LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))

    copy, base = _size(adapted()), _size(_wide())
    assert copy < base / 3
    extra = _peak(tmp_path, adapted()) - _peak(tmp_path, adapted(), fsam_variant="none")
    assert extra <= 1.05 * copy + ROWS * LENGTH * 48 * 4


def test_the_cotangent_costs_one_tensor_of_the_size_of_the_logits(tmp_path: Path) -> None:
    """The vocabulary is so large that the logits are most of the memory."""
    plain, split = (
        _peak(tmp_path, llama(vocab_size=20_000), fsam_variant=variant, optim="sgd", fsam_precondition=False)
        for variant in ("none", "functional")
    )
    logits = ROWS * LENGTH * 20_000 * 4
    weights = _size(llama(vocab_size=20_000))
    assert split - plain <= weights + 1.1 * logits


@pytest.mark.skipif(torch.accelerator.is_available(), reason="counts what the CPU allocates")
def test_gradients_of_tied_embeddings_are_added_in_place(tmp_path: Path) -> None:
    """Nearly all weights are one table: θ+ε, the head's gradient and the embeddings' are three copies, the sum none."""
    model = llama(hidden_size=128, vocab_size=20_000, tie_word_embeddings=True)
    trainer = make_trainer(tmp_path, model, max_steps=3, per_device_train_batch_size=ROWS, optim="sgd")
    with PeakAllocated() as memory:
        trainer.train()
    logits = ROWS * LENGTH * 20_000 * 4
    assert 2.5 * _size(model) < memory.peak < 3.1 * _size(model) + 2 * logits
