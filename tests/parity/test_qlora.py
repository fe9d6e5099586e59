"""LoRA on a base in 4 bits: the adapters alone train and are perturbed, as on the same base in float32.

Runs only where bitsandbytes is installed (the extra `quantization`, or `make test-quantized`).
"""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.utils import logging

from benchmarks.peak_memory import PeakMemory
from tests import reference, zoo
from tests.parity.test_parity import (
    BATCH_SIZE,
    Setting,
    adamw,
    assert_same_weights,
    distance,
    sgd,
    train_with_reference,
    train_with_trainer,
)
from tests.toys import DEVICE, LENGTH, VOCABULARY, llama, make_trainer
from tests.zoo import SHIFTED, Case

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the reference is on the CPU")

WIDTH = 64  # a block of 4-bit weights
ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=WIDTH, intermediate_size=WIDTH, initializer_range=0.1).save_pretrained(folder)
    return folder


def loaded(base: Path, **options: Any) -> nn.Module:
    """The base in 4 bits."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        | options,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTER | options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)  # zero by default: A would have no gradient
    return model


def dequantized(model: nn.Module, **options: Any) -> nn.Module:
    """The same model in float32, of torch.nn's own layers."""
    plain = adapted(llama(hidden_size=WIDTH, intermediate_size=WIDTH), **options)
    values = {
        name: bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        if isinstance(weight, bnb.nn.Params4bit)
        else weight.data
        for name, weight in model.named_parameters()
    }
    plain.load_state_dict(values)
    return plain


CASE = Case(build=lambda: nn.Module(), example=zoo.next_tokens, problem=SHIFTED)
LEARNING = functools.partial(sgd, learning_rate=0.01)
SETTINGS = [
    Setting("functional"),
    Setting("sam"),
    Setting("functional", precondition=True, accumulation=3, scope="optimizer_step"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_qlora_agrees_with_the_formulas_on_the_dequantized_base(tmp_path: Path, base: Path, setting: Setting) -> None:
    model = adapted(peft.prepare_model_for_kbit_training(loaded(base)))
    kinds = {type(weight) for weight in model.parameters() if not weight.requires_grad}
    assert kinds == {nn.Parameter, bnb.nn.Params4bit}
    assert model.is_gradient_checkpointing
    agrees(model, dequantized(model), setting, tmp_path)


def agrees(model: nn.Module, plain: nn.Module, setting: Setting, folder: Path) -> None:
    start, examples = copy.deepcopy(model), CASE.examples(setting.examples)
    optimizer = adamw if setting.precondition else LEARNING
    wanted = train_with_reference(plain, CASE.problem, examples, setting, optimizer)
    train_with_trainer(model, examples, setting, optimizer, folder)
    assert_same_weights(model, start, wanted)


HEADS = {
    "frozen": ({}, {}, True),
    "quantized": ({"llm_int8_skip_modules": []}, {}, False),
    "saved": ({}, {"modules_to_save": ["lm_head"]}, False),
    "adapted": ({}, {"target_modules": ["q_proj", "lm_head"]}, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_qlora_with_any_head_agrees_with_the_formulas(
    tmp_path: Path, base: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    quantization, options, fused = HEADS[head]
    model = adapted(loaded(base, **quantization), **options)
    agrees(model, dequantized(model, **options), Setting("functional"), tmp_path)
    assert ("The fused head is off" in caplog.text) is not fused


def test_qlora_that_computes_in_bfloat16_trains_like_float32_within_its_precision(tmp_path: Path, base: Path) -> None:
    """It ends nearer to the same variant in float32 than to any other."""
    mixed = adapted(peft.prepare_model_for_kbit_training(loaded(base, bnb_4bit_compute_dtype=torch.bfloat16)))
    seen: set[torch.dtype] = set()
    mixed.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").register_forward_hook(
        lambda module, args, output: seen.add(module.compute_dtype)
    )
    plain, setting = dequantized(mixed), Setting("functional", rho=1.0)
    examples = CASE.examples(setting.examples)
    train_with_trainer(mixed, examples, setting, LEARNING, tmp_path, bf16=True)
    assert seen == {torch.bfloat16}
    variants: list[reference.Variant] = ["functional", "none", "sam", "logit"]
    own, *others = (
        distance(
            reference.trainable(mixed),
            train_with_reference(plain, CASE.problem, examples, replace(setting, variant=variant), LEARNING),
        )
        for variant in variants
    )
    assert own < 0.25 * min(others), (own, others)


def test_qlora_keeps_one_copy_of_the_adapters_and_none_of_the_base(tmp_path: Path, base: Path) -> None:
    peaks = []
    for variant in ("none", "functional"):
        model = adapted(loaded(base), r=32, target_modules="all-linear")
        copy_of_adapters = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        trainer = make_trainer(tmp_path, model, fsam_variant=variant, max_steps=2)
        with PeakMemory() as memory:
            trainer.train()
        peaks.append(memory.peak)
    cotangents = BATCH_SIZE * LENGTH * VOCABULARY * 4
    assert 0.5 * copy_of_adapters < peaks[1] - peaks[0] <= 1.05 * copy_of_adapters + cotangents
