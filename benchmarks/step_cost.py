"""Measures the time and memory of a step: every variant against the plain Trainer, interleaved in one run.

    python benchmarks/step_cost.py                                # a tiny Llama on the CPU, or a 0.1B one on a GPU
    python benchmarks/step_cost.py --model PATH --length 1024     # your own checkpoint
    # The exact split and cheaper ones, on eight blocks:
    python benchmarks/step_cost.py --layers 8 --arms functional momentum "a quarter of the blocks"
    # A Llama of 1.2B under DeepSpeed, against plain DeepSpeed (with as many arms as fit on the device together):
    torchrun --nproc_per_node 1 benchmarks/step_cost.py --deepspeed recipes/launch/zero3.json --dtype bfloat16 \\
      --hidden 2048 --layers 16 --length 1024 --arms functional --out benchmarks/results/zero3_gpu

All arms are in memory at once and take turns. In every round each makes one step, in a new order, so that other work on
the machine slows all of them alike. The command prints a Markdown table, and `--out NAME` writes NAME.md and NAME.json.
"""

import argparse
import gc
import json
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.last_blocks import LastBlocksTrainer
from benchmarks.peak_memory import PeakMemory
from benchmarks.products import counted_products
from hf_fsam import FSAMTrainer, FSAMTrainingArguments

PLAIN = "plain Trainer"
ARMS: dict[str, dict] = {
    PLAIN: {"fsam_variant": "none"},
    "sam": {"fsam_variant": "sam", "fsam_precondition": False},
    "functional": {"fsam_variant": "functional", "fsam_precondition": False},
    "functional, preconditioned": {"fsam_variant": "functional", "fsam_precondition": True},
    "logit (diagnosis)": {"fsam_variant": "logit", "fsam_precondition": False},
}
# Measured where they are named.
CHEAPER: dict[str, dict] = {"momentum": {"fsam_variant": "functional", "fsam_ascent_direction": "momentum"}}
# In benchmarks/last_blocks.py alone: the share of the blocks that ε moves, and whether it lies along the momentum.
LAST_BLOCKS: dict[str, tuple[float, bool]] = {
    f"{part} of the blocks{', momentum' if along_momentum else ''}": (share, along_momentum)
    for part, share in (("half", 1 / 2), ("a quarter", 1 / 4), ("an eighth", 1 / 8))
    for along_momentum in (False, True)
}
GPU = torch.get_device_module() if torch.accelerator.is_available() else None  # torch.cuda, or another accelerator's


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures as `argv` says and returns what goes into NAME.json."""
    args = parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    make_model = model_maker(args)
    rows = [{"input_ids": (ids := torch.randint(args.vocabulary, (args.length,))), "labels": ids}] * args.batch
    chosen = ARMS if args.arms is None else args.arms
    names = [PLAIN, *(name for name in (*ARMS, *CHEAPER, *LAST_BLOCKS) if name in chosen and name != PLAIN)]
    arms = {name: Arm(name, make_model, rows, args) for name in names}
    for arm in arms.values():  # the first steps allocate memory, and the optimizer's second moment
        for _ in range(2):
            arm.step()
    order = list(arms)
    for _ in range(args.rounds):
        random.shuffle(order)
        for name in order:
            arms[name].seconds.append(arms[name].step())
    for arm in arms.values():
        arm.release()
    for name in names:  # by itself, so that one arm's memory is not another's
        arms[name].peak, arms[name].products = Arm(name, make_model, rows, args).memory_and_products()
        gc.collect()
    return report(arms, make_model, args)


class Arm:
    """One Trainer, stepped by hand: the step with its clipping, the optimizer's step, and the gradient's reset."""

    def __init__(self, name: str, make_model: Callable[[], nn.Module], rows: list[dict], args: argparse.Namespace):
        self.seconds: list[float] = []
        self.peak = self.products = 0
        self.folder = tempfile.TemporaryDirectory()
        if args.deepspeed:
            AcceleratorState._reset_state()  # each arm has a DeepSpeed engine of its own
        model = make_model()
        trainer = FSAMTrainer
        if name in LAST_BLOCKS:
            share, along_momentum = LAST_BLOCKS[name]
            blocks = max(1, round(share * model.config.num_hidden_layers))
            trainer = partial(LastBlocksTrainer, blocks=blocks, rho=0.03, along_momentum=along_momentum)
        self.trainer = trainer(
            model=model,
            args=FSAMTrainingArguments(
                output_dir=self.folder.name,
                report_to="none",
                use_cpu=GPU is None,
                bf16=GPU is not None and (args.dtype == "float32" or bool(args.deepspeed)),
                deepspeed=args.deepspeed,
                per_device_train_batch_size=args.batch,
                max_steps=10**6,
                **(ARMS | CHEAPER).get(name, ARMS[PLAIN]),
            ),
            train_dataset=rows,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        accelerator = self.trainer.accelerator
        if args.deepspeed:
            self.trainer.args.hf_deepspeed_config.trainer_config_finalize(self.trainer.args, self.trainer.model, 10**6)
        self.model, self.trainer.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.batch = self.trainer.data_collator(rows)
        self.tokens = torch.tensor(args.batch * (args.length - 1), device=self.trainer.args.device)

    def step(self) -> float:
        """Makes one step. Returns its seconds, including the work of the device."""
        synchronize()
        start = time.perf_counter()
        self.trainer.training_step(self.model, self.batch, self.tokens)
        if not self.trainer.is_deepspeed_enabled:  # DeepSpeed has done all this in its backward pass
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.trainer.optimizer.step()
            self.model.zero_grad()
        synchronize()
        return time.perf_counter() - start

    def memory_and_products(self) -> tuple[int, int]:
        """The peak in bytes of the second and the third step, without the weights and the optimizer's state, and the
        floating point operations of the matrix products of the fourth. Under DeepSpeed the size of that state is not
        known, so it is counted there."""
        with PeakMemory() if GPU is None else nullcontext() as memory:
            before = GPU.memory_allocated() if GPU else 0
            self.step()  # creates the optimizer's state, and what a step keeps for the next one
            if GPU:
                GPU.reset_peak_memory_stats()
            else:
                memory.peak = memory.current
            self.step(), self.step()
        peak = GPU.max_memory_allocated() - before if GPU else memory.peak
        state = () if self.trainer.is_deepspeed_enabled else self.trainer.optimizer.state.values()
        peak -= sum(x.nbytes for each in state for x in each.values() if isinstance(x, torch.Tensor))
        with counted_products() as counted:
            self.step()
        return peak, counted.get_total_flops()

    def release(self) -> None:
        del self.trainer, self.model, self.batch
        gc.collect()


def report(arms: dict[str, Arm], make_model: Callable[[], nn.Module], args: argparse.Namespace) -> dict[str, Any]:
    plain = arms[PLAIN]
    # Under ZeRO-3 the weight itself is empty.
    weights = [(getattr(p, "ds_numel", p.numel()), p.element_size()) for p in make_model().parameters()]
    copy = sum(numel * size for numel, size in weights)
    width = 2 if GPU or args.dtype == "bfloat16" else 4  # under autocast the logits are in bfloat16
    logits = args.batch * args.length * args.vocabulary * width
    rows = []
    for name, arm in arms.items():
        ratios = [seconds / base for seconds, base in zip(arm.seconds, plain.seconds, strict=True)]
        low, middle, high = quartiles(ratios)
        rows.append(
            {
                "arm": name,
                "seconds_median": statistics.median(arm.seconds),
                "ratio_median": middle,
                "ratio_quartiles": [low, high],
                "products_ratio": arm.products / plain.products,
                "peak_mib": arm.peak / 2**20,
                "peak_beyond_plain_mib": (arm.peak - plain.peak) / 2**20,
            }
        )
    setting = {
        "weights": sum(numel for numel, _ in weights),
        "one copy of the weights, MiB": round(copy / 2**20, 1),
        "one cotangent, MiB": round(logits / 2**20, 1),
        "vocabulary": args.vocabulary,
        "batch": args.batch,
        "length": args.length,
        "dtype": args.dtype + (", bf16 autocast" if GPU and args.dtype == "float32" else ""),
        "rounds": args.rounds,
        "deepspeed": args.deepspeed,
        "device": GPU.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "command": shlex.join(["python", "benchmarks/step_cost.py", *args.argv]),
    }
    table = [
        "| arm | step, ms (median) | × plain (median, quartiles) | matrix products × plain | peak of a step, MiB "
        "| beyond plain, MiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['arm']} | {1e3 * row['seconds_median']:.1f} | {row['ratio_median']:.2f} "
            f"({row['ratio_quartiles'][0]:.2f} to {row['ratio_quartiles'][1]:.2f}) | {row['products_ratio']:.3f} "
            f"| {row['peak_mib']:.1f} | {row['peak_beyond_plain_mib']:.1f} |"
            for row in rows
        ),
    ]
    text = "\n".join([*table, "", *(f"- {key}: {value}" for key, value in setting.items())])
    print(text)
    result = {"setting": setting, "arms": rows}
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text + "\n")
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    if len(numbers) < 2:
        return numbers[0], numbers[0], numbers[0]
    low, middle, high = statistics.quantiles(numbers, n=4)
    return low, middle, high


def synchronize() -> None:
    if GPU:
        GPU.synchronize()


def model_maker(args: argparse.Namespace) -> Callable[[], nn.Module]:
    dtype = getattr(torch, args.dtype)
    there = torch.get_default_device() if GPU is None else torch.accelerator.current_accelerator()
    if args.model:
        args.vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
        return lambda: AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        max_position_embeddings=args.length,
        tie_word_embeddings=args.tied,
    )

    def make() -> nn.Module:
        with torch.device(there):  # a billion random numbers take the host many seconds
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    return make


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of a causal language model, in place of a Llama of the sizes below")
    parser.add_argument("--hidden", type=int, default=768 if GPU else 128)
    parser.add_argument(
        "--intermediate", type=int, help="width of the feed-forward blocks (default: four times --hidden)"
    )
    parser.add_argument("--layers", type=int, default=12 if GPU else 4)
    parser.add_argument("--vocabulary", type=int, default=32_000 if GPU else 2048)
    parser.add_argument("--tied", action="store_true", help="use the embeddings' matrix as the head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512 if GPU else 128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, *CHEAPER, *LAST_BLOCKS],
        help="what to measure beside the plain Trainer (default: all variants)",
    )
    parser.add_argument("--deepspeed", help="DeepSpeed configuration, for a process that torchrun starts")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of PyTorch on the CPU (0: as many as it chooses)"
    )
    parser.add_argument("--out", help="write the table to OUT.md and OUT.json")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    if args.deepspeed and (found := LAST_BLOCKS.keys() & set(args.arms or ())):
        parser.error(f"--arms {min(found)!r} runs without DeepSpeed alone: leave it out, or --deepspeed")
    return args


if __name__ == "__main__":
    main()
