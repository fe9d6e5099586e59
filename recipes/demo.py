"""Little text, read ten times: a setting where Functional-SAM is meant to help, and a greater weight decay, too.

python recipes/demo.py                    # or `make demo`: minutes on two CPU cores, no download
python recipes/demo.py --max_steps 100    # takes every argument of pretrain.py, for all arms

It prints what this seed gives. Study 2 has five seeds of the same (docs/EVIDENCE.md).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pretrain
from config import CONFIGS
from models import RECIPES
from report import curve, draw

from hf_fsam.mistakes import told_in_one_line

CONFIG = CONFIGS / "study.yaml"
SETTING = {"corpus_max_bytes": 200_000, "vocab_size": 1024, "validation_fraction": 0.2, "learning_rate": 4e-3}
ARMS: dict[str, dict[str, Any]] = {
    "AdamW": {"fsam_variant": "none"},
    "AdamW, weight decay 1": {"fsam_variant": "none", "weight_decay": 1},
    "Functional-SAM": {"fsam_rho": 0.1},
    "Functional-SAM, weight decay 1": {"fsam_rho": 0.1, "weight_decay": 1},
}


def run_arms(output_dir: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Each arm's results.json. All arms have the seed of the configuration, so the same first weights and batches."""
    results = {}
    for number, (name, settings) in enumerate(ARMS.items(), start=1):
        print(f"{number}/{len(ARMS)} {name}", flush=True)
        folder = output_dir / name.lower().replace(",", "").replace(" ", "-")
        own = [f"--{key}={value}" for key, value in {**SETTING, **settings, "output_dir": folder}.items()]
        results[name] = pretrain.run([str(CONFIG), *own, *overrides])
    return results


def compare(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    baseline = results["AdamW"]["train_seconds"]
    return [
        {
            "optimizer": name,
            "validation loss": round(result["metrics"]["eval_loss"], 4),
            "perplexity": round(result["metrics"]["eval_perplexity"], 2),
            "next-token accuracy": round(result["metrics"]["eval_next_token_accuracy"], 4),
            "training seconds": round(result["train_seconds"], 1),
            "time (AdamW = 1)": round(result["train_seconds"] / baseline, 2),
        }
        for name, result in results.items()
    ]


def plot_difference(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The validation losses minus AdamW's at the same step: the losses themselves lie on top of each other."""
    curves = {name: curve(result["history"], "eval_loss") for name, result in results.items()}
    steps, losses = curves.pop("AdamW")
    base = dict(zip(steps, losses, strict=True))
    lines = [("AdamW", "black", "", (steps, [0.0] * len(steps)))]
    for index, (name, (at, values)) in enumerate(curves.items()):
        change = [value - base[step] for step, value in zip(at, values, strict=True)]
        lines.append((name, f"C{index}", "o", (at, change)))
    draw(lines, path, "Validation loss minus AdamW's: below 0 is better", "nats per token")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    header, *body = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" if line != rule else f"|-{line}-|" for line in (header, rule, *body))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/demo"), help="Folder for everything that is written."
    )
    own, overrides = parser.parse_known_args(argv)
    results = run_arms(own.output_dir, overrides)
    rows = compare(results)
    table = markdown(rows)
    (own.output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    (own.output_dir / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    plot = own.output_dir / "difference.png"
    plot_difference(results, plot)
    first = results["AdamW"]
    print(
        f"\n{first['parameters']:,} parameters, {first['steps']} steps of {first['tokens_per_step']} tokens each."
        "\nLittle text, read many times: here Functional-SAM is meant to help."
    )
    print(f"\n{table}\n\nThe difference over the training: {plot}")


if __name__ == "__main__":
    with told_in_one_line("demo.py", RECIPES):
        main(sys.argv[1:])
