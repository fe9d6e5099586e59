"""Measures the share of ‖ε‖² that the input embeddings take, with and without preconditioning.

    python benchmarks/ascent_share.py

Tokens are drawn by Zipf's law, so that rare ones turn up all the time. Their embeddings have a second moment that is
zero or has long decayed, and g / (√v̂ + eps) is largest there.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from hf_fsam import FSAMTrainer, FSAMTrainingArguments

VOCABULARY, LENGTH, BATCH, STEPS, SEEDS = 2048, 32, 8, 400, (0, 1, 2)
WINDOWS = ((1, 20), (20, 100), (100, 200), (200, 400))  # optimizer steps


class Watching(FSAMTrainer):
    """Notes the embeddings' share of each direction d. Since ε = ρ d / ‖d‖, it is also their share of ‖ε‖²."""

    def fsam_direction(self, weights, gradients):
        super().fsam_direction(weights, gradients)
        embeddings = self.model.get_input_embeddings().weight
        squares = [gradient.square().sum().item() for gradient in gradients]
        own = next(square for weight, square in zip(weights, squares, strict=True) if weight is embeddings)
        self.shares.append(own / sum(squares))


def shares(precondition: bool, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    zipf = 1.0 / torch.arange(1, VOCABULARY + 1)
    rows = torch.multinomial(zipf, STEPS * BATCH * LENGTH, replacement=True, generator=generator).view(-1, LENGTH)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = FSAMTrainingArguments(
            folder,
            fsam_precondition=precondition,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            seed=seed,
        )
        trainer = Watching(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.shares = []
        trainer.train()
    return trainer.shares


def main() -> None:
    model = {False: "g", True: "g / (√v̂ + eps), eps 1e-8"}
    lines = ["| ascent along | " + " | ".join(f"steps {a} to {b}" for a, b in WINDOWS) + " |", "|---|---|---|---|---|"]
    record = []
    for precondition, name in model.items():
        runs = [shares(precondition, seed) for seed in SEEDS]
        cells = []
        for start, stop in WINDOWS:
            medians = [statistics.median(run[start:stop]) for run in runs]
            record.append({"precondition": precondition, "steps": [start, stop], "median_share_by_seed": medians})
            cells.append(f"{statistics.median(medians):.4f} ({min(medians):.4f} to {max(medians):.4f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = (
        "\n".join(lines)
        + f"\n\nMedian over the steps; median, least and greatest of seeds {SEEDS}. torch {torch.__version__}.\n"
    )
    print(text)
    out = Path(__file__).parent / "results" / "ascent_share"
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
