"""pretrain.py, and then how much of the model is left with quantized or noisy weights, or after a fine-tuning.

This is the recipe of after_training.yaml. It adds to the metrics of results.json; all but the last are rises of the
validation loss in nats:

    int8_rise, int4_rise    weights quantized by torchao: symmetric int8 by row, int4 in groups of 32
    noise_rise              normal noise of `noise` times its root mean square on every weight matrix, mean of 3 draws
    forgotten               after a fine-tuning by plain AdamW on the English of `help()`
    new_loss                the validation loss of that fine-tuning
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
import pretrain
from config import CONFIGS, parse
from data import DatasetArguments, for_validation, load_splits

from hf_fsam import FSAMTrainingArguments


@dataclass
class AfterArguments(FSAMTrainingArguments):
    noise: float = field(
        default=0.1, metadata={"help": "Size of the noise, as a share of each matrix's root mean square."}
    )
    later_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the fine-tuning that follows."}
    )
    later_epochs: int = field(default=2, metadata={"help": "Epochs of the fine-tuning that follows."})


def run(argv: list[str]) -> dict[str, Any]:
    quantized = quantizations()  # before the training, so that a missing torchao is found at once
    results = pretrain.run(argv, arguments_class=AfterArguments)
    _, data, args = parse((pretrain.ModelArguments, DatasetArguments, AfterArguments), argv, Path(__file__).name)
    folder = Path(args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(args.device)
    blocks = for_validation(load_splits(data).validation, AutoTokenizer.from_pretrained(folder), data)
    before = loss_of(model, blocks)
    rises = {
        **{f"{name}_rise": loss_of(changed(model, change), blocks) - before for name, change in quantized.items()},
        "noise_rise": sum(loss_of(changed(model, noisy(args.noise, draw)), blocks) for draw in range(3)) / 3 - before,
    }
    later = finetune.run(
        [
            str(CONFIGS / "finetune_topics.yaml"),
            *("--model_name_or_path", str(folder), "--output_dir", str(folder / "later"), "--seed", str(args.seed)),
            *("--adapter", "none", "--fsam_variant", "none", "--eval_strategy", "no", "--disable_tqdm", "true"),
            *("--learning_rate", str(args.later_learning_rate), "--num_train_epochs", str(args.later_epochs)),
        ]
    )
    rises |= {"forgotten": later["domains"]["old"]["change"], "new_loss": later["domains"]["new"]["loss_after"]}
    results["metrics"] |= rises
    (folder / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return results


def quantizations() -> dict[str, Callable[[nn.Module], Any]]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("This study quantizes with torchao: pip install 'hf-fsam[quantization]'") from error
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    return {name: partial(quantize_, config=config) for name, config in configs.items()}


def noisy(share: float, draw: int) -> Callable[[nn.Module], Any]:
    @torch.no_grad()
    def add(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(draw)
        for weight in model.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight.add_(noise * weight.square().mean().sqrt() * share)

    return add


def changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    result = copy.deepcopy(model)
    change(result)
    return result


@torch.no_grad()
def loss_of(model: Any, blocks: Dataset, batch: int = 16) -> float:
    """The mean over all blocks, in nats per token."""
    total = 0.0
    for start in range(0, len(blocks), batch):
        ids = torch.tensor(blocks[start : start + batch]["input_ids"], device=model.device)
        total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
    return total / len(blocks)


if __name__ == "__main__":
    run(sys.argv[1:])
