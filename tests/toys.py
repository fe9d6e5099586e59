"""A language model of three thousand weights, its data, and a Trainer around them, on the device of the tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

from hf_fsam import FSAMTrainer, FSAMTrainingArguments

# HF_FSAM_TEST_DEVICE=cuda, or the name of another accelerator that torch sees, has the tests' Trainers train on it.
# References stay on the CPU, and so do the processes of the distributed tests.
DEVICE = torch.device(os.environ.get("HF_FSAM_TEST_DEVICE", "cpu"))
if DEVICE.type != "cpu" and DEVICE.type != getattr(torch.accelerator.current_accelerator(), "type", None):
    raise ValueError(
        f"HF_FSAM_TEST_DEVICE={DEVICE.type}, but torch's accelerator is {torch.accelerator.current_accelerator()}: "
        "give its name, or unset the variable for the CPU."
    )
# Training arguments. The tests need full float32, and torch_compile would switch TF32 on.
ON_DEVICE: dict[str, Any] = {
    "use_cpu": DEVICE.type == "cpu",
    "dataloader_pin_memory": DEVICE.type == "cuda",
    "tf32": False,
}
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

VOCABULARY, LENGTH = 48, 10
# The sizes of a Llama with a million weights: a copy of them stands out beside the memory of ten tokens.
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


def llama(dropout: float = 0.0, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": dropout,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def adapted(model: nn.Module) -> nn.Module:
    """The model with LoRA on GPT-2's attention. No adapter begins at zero, or half of the gradients would be zero."""
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    return get_peft_model(model, config)


def sentences(count: int = 24, seed: int = 1, masked: bool = False) -> list[dict[str, Tensor]]:
    """Rows of random tokens, which are the labels, too. masked: each row has another number of targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    labels = rows.clone()
    if masked:
        for index, row in enumerate(labels):
            row[2 + index % (LENGTH - 3) :] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def make_trainer(
    folder: Path | str,
    model: nn.Module | None = None,
    trainer_class: Callable[..., Trainer] = FSAMTrainer,
    arguments_class: Callable[..., Any] = FSAMTrainingArguments,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer on the tests' device that takes six steps and prints nothing. trainer: arguments of the Trainer; all
    others are training arguments."""
    settings = ON_DEVICE | {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 6,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # a tiny one blows up the rounding noise of gradients that are zero (a key's bias)
        "lr_scheduler_type": "constant",
        "seed": 3,
    }
    return trainer_class(
        **{
            "model": llama() if model is None else model,
            "args": arguments_class(**(settings | arguments)),
            "train_dataset": sentences(),
            **(trainer or {}),
        }
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU, to be compared."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def train(folder: Path | str, **kwargs: Any) -> dict[str, Tensor]:
    """Weights after the training that :func:`make_trainer` sets up."""
    trainer = make_trainer(folder, **kwargs)
    trainer.train()
    return weights_of(trainer.model)


def distance(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Relative L2 distance over all weights together."""
    assert weights.keys() == reference.keys()
    apart = sum((weights[name].double() - reference[name].double()).square().sum() for name in reference)
    return float((apart / sum(tensor.double().square().sum() for tensor in reference.values())).sqrt())


def same_bits(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    return weights.keys() == reference.keys() and all(torch.equal(weights[name], reference[name]) for name in weights)
