"""pretrain.py, and then how much of the model is left with quantized or noisy weights, or after a fine-tuning.

This is the recipe of after_training.yaml and after_training_late.yaml. As in late.py, the last part of the training may
be the only one that perturbs; as in averaging.py, the model may be an average of the weights, which then is what is
saved and measured. It adds to the metrics of results.json:

    int8_rise, int4_rise    rise of the validation loss with weights quantized by torchao: symmetric int8 by row, int4
                            in groups of 32
    noise_rise              its rise with normal noise of `noise` times its root mean square on every weight matrix,
                            mean of 3 draws
    forgotten               its rise after a fine-tuning by plain AdamW on the English of `help()`
    new_loss                the validation loss of that fine-tuning

With several `later_learning_rates` there are forgotten_1e-3, new_loss_1e-3 and so on, one pair for each rate. With
`equal_new_loss` N* there are two more. Let N and F be `new_loss` and `forgotten` at each rate, in rising order, and
before them N_0, the loss on that English without a fine-tuning, with F_0 = 0. For the first i with N_i > N* >= N_i+1

    forgotten_at_equal      F_i + (F_i+1 - F_i) (N_i - N*) / (N_i - N_i+1), and 0 if N_0 <= N*
    old_loss_at_equal       the same, on top of the old domain's loss before the fine-tuning

If there is no such i, the model did not learn as much at any rate, and both are NaN (null in a study's rows).
"""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import finetune
import pretrain
from averaging import AveragingArguments, AveragingMixin
from config import CONFIGS, parse
from data import DatasetArguments, for_validation, load_splits
from late import LateArguments, LateTrainer
from report import main

Domains = dict[str, dict[str, float]]  # {old, new} → {loss_before, loss_after, change}


@dataclass
class AfterArguments(AveragingArguments, LateArguments):
    noise: float = field(
        default=0.1, metadata={"help": "Size of the noise, as a share of each matrix's root mean square."}
    )
    later_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3],
        metadata={"help": "Learning rates of the fine-tunings that follow, each of which starts from the same model."},
    )
    later_epochs: int = field(default=2, metadata={"help": "Epochs of each fine-tuning that follows."})
    equal_new_loss: float | None = field(
        default=None,
        metadata={"help": "The loss on the new text at which runs are compared by what they have forgotten."},
    )

    def __post_init__(self) -> None:
        if not self.later_learning_rates or min(self.later_learning_rates) <= 0:
            raise ValueError(
                f"later_learning_rates={self.later_learning_rates} are no learning rates: give one or more above 0."
            )
        super().__post_init__()


SETTINGS = (pretrain.ModelArguments, DatasetArguments, AfterArguments)
METRICS = (
    *pretrain.METRICS,
    *("int8_rise", "int4_rise", "noise_rise", "forgotten", "new_loss"),
    *("forgotten_*", "new_loss_*", "old_loss_at_equal"),  # * is a rate, or at_equal
)


class AfterTrainer(AveragingMixin, LateTrainer):
    pass


def run(argv: list[str]) -> dict[str, Any]:
    quantized = quantizations()  # before the training, so that a missing torchao is found at once
    results = pretrain.run(argv, AfterTrainer, AfterArguments, Path(__file__).name)
    _, data, args = parse(SETTINGS, argv, Path(__file__).name)
    folder = Path(args.output_dir)
    state = PartialState()
    state.wait_for_everyone()  # the main process has written the model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(args.device)
    blocks = for_validation(load_splits(data).validation, AutoTokenizer.from_pretrained(folder), data)
    before = loss_of(model, blocks)
    results["metrics"] |= {
        **{f"{name}_rise": loss_of(changed(model, change), blocks) - before for name, change in quantized.items()},
        "noise_rise": sum(loss_of(changed(model, noisy(args.noise, draw)), blocks) for draw in range(3)) / 3 - before,
        **forgetting({rate: fine_tuned(folder, rate, args) for rate in args.later_learning_rates}, args.equal_new_loss),
    }
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return results


def forgetting(later: dict[float, Domains], equal_new_loss: float | None = None) -> dict[str, float]:
    """The metrics of the fine-tunings, which are given by their rates."""
    metrics = {}
    for rate, domains in later.items():
        suffix = f"_{written(rate)}" if len(later) > 1 else ""
        metrics[f"forgotten{suffix}"] = domains["old"]["change"]
        metrics[f"new_loss{suffix}"] = domains["new"]["loss_after"]
    if equal_new_loss is not None:
        points = [(later[rate]["new"]["loss_after"], later[rate]["old"]["change"]) for rate in sorted(later)]
        start = next(iter(later.values()))
        forgotten = forgotten_at(equal_new_loss, [(start["new"]["loss_before"], 0.0), *points])
        metrics |= {"forgotten_at_equal": forgotten, "old_loss_at_equal": start["old"]["loss_before"] + forgotten}
    return metrics


def fine_tuned(folder: Path, rate: float, args: AfterArguments) -> Domains:
    """The losses on both domains before and after a fine-tuning by plain AdamW."""
    settings = {
        "model_name_or_path": folder,
        "output_dir": folder / "later",
        "adapter": "none",
        "fsam_variant": "none",
        "learning_rate": rate,
        "num_train_epochs": args.later_epochs,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    return finetune.run([str(CONFIGS / "finetune_topics.yaml"), *argv])["domains"]


def written(rate: float) -> str:
    """0.001 → 1e-3, as a study's YAML has it."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def forgotten_at(new_loss: float, frontier: Sequence[tuple[float, float]]) -> float:
    """What is forgotten where the line through the points (new loss, forgotten) first comes down to `new_loss`; NaN
    where it never does."""
    if frontier[0][0] <= new_loss:
        return frontier[0][1]
    for (loss, forgotten), (next_loss, next_forgotten) in pairwise(frontier):
        if loss > new_loss >= next_loss:
            return forgotten + (next_forgotten - forgotten) * (loss - new_loss) / (loss - next_loss)
    return nan


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
    main("after_training.py", run)
