"""Measures the peak memory of a language model's head, with and without logits, for several sizes of the vocabulary.

    python benchmarks/head_memory.py --out benchmarks/results/head_memory_cpu

The model is a Llama of one layer, so that the head takes most of the memory, and it trains with AdamW. The step that is
measured comes after one that creates the optimizer's state. Counted are the bytes of tensors beyond those that are
alive between steps. In every row they include the gradients, which are one copy of the weights, and where the step
perturbs also θ+ε, which is another; "of it the loss" leaves these out. TRL's row is the model's forward pass through
TRL's head, as its SFTTrainer calls it, without the metrics. "The fused loss" is that of this package, in one pass.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peak_memory import PeakAllocated
from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from hf_fsam.boundary import Boundary
from hf_fsam.cleanup import Cleanup
from hf_fsam.heads.fused_head import FusedHead
from hf_fsam.passes import CleanPass

FUNCTIONAL = {"fsam_variant": "functional", "fsam_precondition": False}


class FusedPlainTrainer(FSAMTrainer):
    """Makes the plain step, but computes its loss through the fused head."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        boundary = Boundary(Cleanup())
        boundary.attach({"lm_head": self.model.lm_head}, FusedHead(self.model.lm_head))
        try:
            with boundary.running(CleanPass(records=False)):
                return super().compute_loss(*args, **kwargs)
        finally:
            boundary.detach()


def trl_loss(trainer: Trainer) -> None:
    """Lets the model's forward pass go through TRL's fused head, as SFTTrainer does."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(trainer.model)
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: forward(*args, **kwargs, fused_lm_head=True)


ARMS: dict[str, tuple[type, dict[str, Any], Callable | None]] = {
    "plain Trainer": (FSAMTrainer, {"fsam_variant": "none"}, None),
    "plain, TRL's fused loss": (FSAMTrainer, {"fsam_variant": "none"}, trl_loss),
    "plain, the fused loss": (FusedPlainTrainer, {"fsam_variant": "none"}, None),
    "split, logits in memory": (FSAMTrainer, FUNCTIONAL | {"fsam_fused_head": False}, None),
    "split, fused": (FSAMTrainer, FUNCTIONAL, None),
}


def peak(arm: str, vocabulary: int, args: argparse.Namespace) -> tuple[int, int]:
    """Returns the bytes at the peak of a step beyond those between steps, and the bytes of one copy of the weights."""
    trainer_class, settings, prepare = ARMS[arm]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        num_hidden_layers=1,
        num_attention_heads=args.hidden // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ids = torch.randint(vocabulary, (args.batch, args.length))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            FSAMTrainingArguments(
                output_dir=folder, report_to="none", use_cpu=not torch.cuda.is_available(), **settings
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        )
        if prepare is not None:
            prepare(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        batch = {"input_ids": ids, "labels": ids}
        count = torch.tensor(args.batch * (args.length - 1))

        def step() -> None:
            trainer.training_step(trainer.model, batch, count)
            trainer.optimizer.step()
            trainer.model.zero_grad()

        step()
        gc.collect()
        with PeakAllocated() as memory:
            step()
    return memory.peak, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_768, 65_536, 131_072, 262_144])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for vocabulary in args.vocabularies:
        for arm in ARMS:
            found, weights = peak(arm, vocabulary, args)
            copies = weights * (2 if arm.startswith("split") else 1)
            rows.append(
                {
                    "vocabulary": vocabulary,
                    "arm": arm,
                    "peak_mib": found / 2**20,
                    "loss_mib": (found - copies) / 2**20,
                    "weights_mib": weights / 2**20,
                }
            )
            print(rows[-1], flush=True)
    setting = {
        **{name: getattr(args, name) for name in ("hidden", "batch", "length", "dtype")},
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "benchmarks/head_memory.py", *sys.argv[1:]]),
    }
    text = markdown(rows, args.vocabularies) + "\n\n" + "\n".join(f"- {key}: {value}" for key, value in setting.items())
    print(text)
    if args.out is not None:
        args.out.with_suffix(".md").write_text(text + "\n")
        args.out.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


def markdown(rows: list[dict[str, Any]], vocabularies: list[int]) -> str:
    by = {(row["arm"], row["vocabulary"]): row for row in rows}
    lines = [
        "| step's peak, MiB (of it the loss) | " + " | ".join(f"{v // 1024}k" for v in vocabularies) + " |",
        "|---" * (len(vocabularies) + 1) + "|",
    ]
    for arm in ARMS:
        cells = [f"{by[arm, v]['peak_mib']:.0f} ({by[arm, v]['loss_mib']:.0f})" for v in vocabularies]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for name, one, other in (
        ("split, logits in memory / fused", "split, logits in memory", "split, fused"),
        ("split, fused / plain, the fused loss", "split, fused", "plain, the fused loss"),
    ):
        pairs = [(by[one, v], by[other, v]) for v in vocabularies]
        ratios = [f"{a['peak_mib'] / b['peak_mib']:.2f} ({a['loss_mib'] / b['loss_mib']:.2f})" for a, b in pairs]
        lines.append(f"| {name} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
