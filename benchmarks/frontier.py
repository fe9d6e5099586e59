"""Measures validation loss against cost, for every way of paying less for the ascent, and for AdamW with that budget.

    python benchmarks/frontier.py                            # all arms, three seeds: about an hour on two CPU cores
    python benchmarks/frontier.py --steps 20 --seeds 0       # a quick try

Each arm pretrains the Llama of `recipes/configs/pretrain_tiny.yaml` on the embedded corpus. With the same seed all arms
have the same first weights and the same batches. The cost is what an arm computes, counted in passes of plain training
(a forward pass is a third of one), and not a measured time. "Equal compute" compares with AdamW that trains for more
steps, with its schedule stretched over them, at the budget nearest to the arm's.

Every run that ends adds a line to OUT.jsonl, and a run whose line is there is not repeated. At the end the table is in
OUT.md and the plot in OUT.png. Two of the ways of paying less did not gain enough to become part of the package: the
ascent on a quarter of the batch, which is in this file, and perturbing late, which is in recipes/studies/late.py.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "studies"))
import pretrain
from config import CONFIGS
from late import LateArguments, LateTrainer

from hf_fsam import FSAMTrainer


class QuarterBatchTrainer(FSAMTrainer):
    """Ascends along the gradient of a quarter of the micro-batch. The clean forward pass is over all of it."""

    def fsam_ascent_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value[: max(1, len(value) // 4)] for name, value in inputs.items()}


@dataclass(frozen=True)
class Arm:
    """
    Args:
        cost: of a step, averaged over the run, in passes of plain training.
        settings: of the run, on top of `BASE`.
        longer: the factor by which the run has more steps than the others.
    """

    cost: float
    settings: dict[str, Any] = field(default_factory=dict)
    longer: float = 1.0
    trainer: type[FSAMTrainer] = FSAMTrainer


def adamw(budget: float) -> Arm:
    return Arm(budget, {"fsam_variant": "none"}, longer=budget)


BASE = {"fsam_rho": 0.02, "fsam_precondition": True}
ARMS = {
    "AdamW": adamw(1.0),
    "AdamW, 1.25x the steps": adamw(1.25),
    "AdamW, 1.33x the steps": adamw(4 / 3),
    "AdamW, 1.5x the steps": adamw(1.5),
    "AdamW, 2x the steps": adamw(2.0),
    "every step": Arm(2.0),
    "every step, ρ = 0.1": Arm(2.0, {"fsam_rho": 0.1}),
    "along the momentum": Arm(4 / 3, {"fsam_ascent_direction": "momentum"}),
    "along the momentum, ρ = 0.1": Arm(4 / 3, {"fsam_ascent_direction": "momentum", "fsam_rho": 0.1}),
    "ascent on a quarter of the batch": Arm(1 + 1 / 3 + 1 / 4, trainer=QuarterBatchTrainer),
    "every 2nd step": Arm(1.5, {"fsam_every_steps": 2}),
    "every 4th step": Arm(1.25, {"fsam_every_steps": 4}),
    "the last half": Arm(1.5, {"perturb_last": 0.5}, trainer=LateTrainer),
    "the last quarter": Arm(1.25, {"perturb_last": 0.25}, trainer=LateTrainer),
    "momentum, the last half": Arm(
        7 / 6, {"fsam_ascent_direction": "momentum", "perturb_last": 0.5}, trainer=LateTrainer
    ),
}


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    arm = ARMS[name]
    steps = round(steps * arm.longer)
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "seed": seed, "max_steps": steps, "eval_steps": steps, **BASE, **arm.settings}
        options["warmup_steps"] = steps // 10
        argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        result = pretrain.run([str(CONFIGS / "pretrain_tiny.yaml"), *argv], arm.trainer, LateArguments)
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "cost": arm.cost,
        "eval_loss": result["metrics"]["eval_loss"],
        "train_seconds": result["train_seconds"],
        "corpus_sha256": result["corpus_sha256"],
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm, with its differences to AdamW at equal steps and at equal compute, paired by seed."""
    losses = {(each["arm"], each["seed"]): each["eval_loss"] for each in runs}
    seconds = {(each["arm"], each["seed"]): each["train_seconds"] for each in runs}
    seeds = sorted({seed for _, seed in losses})
    rows = []
    for name, arm in ARMS.items():
        done = [seed for seed in seeds if (name, seed) in losses]
        if not done:
            continue
        budgets = [other for other in ARMS if ARMS[other].longer > 1]
        equal = min(budgets, key=lambda other: abs(ARMS[other].cost - arm.cost))
        row = {
            "arm": name,
            "cost": round(arm.cost, 2),
            "loss": statistics.mean(losses[name, seed] for seed in done),
            "seconds": statistics.median(seconds[name, seed] / seconds["AdamW", seed] for seed in done),
        }
        for column, other in (("equal steps", "AdamW"), ("equal compute", equal)):
            both = [seed for seed in done if (other, seed) in losses]
            if other != name and both and arm.longer == 1 and name != "AdamW":
                row[column] = [losses[name, seed] - losses[other, seed] for seed in both]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| arm | cost, plain passes | validation loss, mean | minus AdamW, equal steps: mean (by seed) "
        "| minus AdamW, equal compute: mean (by seed) | × AdamW's time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["arm"], f"{row['cost']:.2f}", f"{row['loss']:.3f}"]
        for found in (row.get("equal steps"), row.get("equal compute")):
            seeds = " ".join(f"{each:+.3f}" for each in found or ())
            cells.append(f"{statistics.mean(found):+.3f} ({seeds})" if found else "")
        cells.append(f"{row['seconds']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    losses = {name: [each["eval_loss"] for each in runs if each["arm"] == name] for name in ARMS}
    figure, axes = plt.subplots(figsize=(8, 5))
    plain = [name for name in ARMS if name.startswith("AdamW") and losses[name]]
    means = [statistics.mean(losses[name]) for name in plain]
    axes.plot([ARMS[name].cost for name in plain], means, "o-", color="black", label="AdamW, with that budget")
    for name, found in losses.items():
        if found and name not in plain:
            (line,) = axes.plot(ARMS[name].cost, statistics.mean(found), "o", label=name)
            axes.plot([ARMS[name].cost] * len(found), found, "x", color=line.get_color(), alpha=0.4)
    axes.set(xlabel="cost, in passes of plain training a step", ylabel="validation loss, nats (x: one seed)")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch (0: as many as it chooses)")
    parser.add_argument("--out", type=Path, default=Path("outputs/frontier"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    log = args.out.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(each["arm"], each["seed"], each["steps"]) for each in runs}
    todo = [(seed, name) for seed in args.seeds for name in args.arms]
    for count, (seed, name) in enumerate(todo, start=1):
        if (name, seed, round(args.steps * ARMS[name].longer)) in done:
            continue
        print(f"{count}/{len(todo)} {name}, seed {seed}", flush=True)
        runs.append(run(name, seed, args.steps))
        with log.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    runs = [each for each in runs if each["steps"] == round(args.steps * ARMS[each["arm"]].longer)]
    setting = {
        "steps": args.steps,
        "seeds": " ".join(map(str, args.seeds)),
        "corpus": runs[0]["corpus_sha256"],
        "device": f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "benchmarks/frontier.py", *sys.argv[1:]]),
    }
    text = "\n".join([markdown(table(runs)), "", *(f"- {key}: {value}" for key, value in setting.items())])
    args.out.with_suffix(".md").write_text(text + "\n")
    plot(runs, args.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
