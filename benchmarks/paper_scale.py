"""Estimates hours and cost of the paper's ladder on C4 (recipes/studies/c4_*.yaml) from the compute of each study.

    python benchmarks/paper_scale.py --utilization 0.2 0.2 0.3 0.3 0.4

A forward and backward pass takes 6 operations for each weight of a matrix and each token, and attention takes 12 ·
layers · width · length operations for each token (a backward pass counts as two forward passes). `--utilization` is the
share of the device's peak that a plain step reaches. It is a guess until the step is measured, and the last column is
the time to compare with.
"""

import argparse
import math
from pathlib import Path

from hf_fsam.studies.study import Study, load_studies

STUDIES = Path(__file__).parents[1] / "recipes" / "studies"
SIZES = ("24m", "42m", "118m", "208m", "1.2b")


def tokens_per_step(study: Study) -> int:
    return 256 * int(study.settings["sequence_length"])


def operations_per_token(study: Study) -> float:
    """For a forward and backward pass. Embeddings and head are one matrix, which only the head multiplies with."""
    width, inner, layers = (int(study.settings[name]) for name in ("hidden_size", "intermediate_size", "layers"))
    weights = layers * (4 * width**2 + 3 * width * inner) + width * int(study.settings["vocab_size"])
    return 6 * weights + 12 * layers * width * int(study.settings["sequence_length"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilization", type=float, nargs=len(SIZES), default=[0.2, 0.2, 0.3, 0.3, 0.4])
    parser.add_argument(
        "--peak", type=float, default=989e12, help="operations per second (default: of an H100 in bfloat16, dense)"
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--price", type=float, default=3.0, help="US dollars per GPU and hour")
    args = parser.parse_args()
    print("| size | one run of AdamW, hours | runs | the study, in runs of AdamW | hours | US$ | plain step, ms |")
    print("|---|---|---|---|---|---|---|")
    hours_of_all = []
    for size, utilization in zip(SIZES, args.utilization, strict=True):
        (study,) = load_studies(STUDIES / f"c4_{size}.yaml")
        rate = args.peak * args.gpus * utilization
        step = operations_per_token(study) * tokens_per_step(study) / rate
        steps = study.total_weight()  # of plain training, over all runs together
        hours_of_all.append(steps * step / 3600)
        one = int(study.settings["max_steps"])
        print(
            f"| {size} | {one * step / 3600:.2f} | {runs(study)} | {steps / one:.0f} | {hours_of_all[-1]:.1f} "
            f"| {hours_of_all[-1] * args.gpus * args.price:.0f} | {1e3 * step:.0f} |"
        )
    total = math.fsum(hours_of_all)
    print(
        f"\nAll: {total:.0f} hours, US$ {total * args.gpus * args.price:.0f} on {args.gpus} GPUs at US$ {args.price:g}."
    )
    print(f"Assumed utilization, by size: {' '.join(map(str, args.utilization))}.")


def runs(study: Study) -> int:
    tuned = sum(len(arm.candidates(study.settings)) for arm in study.arms.values() if arm.tuned)
    return tuned * len(study.tuning_seeds) + len(study.arms) * len(study.seeds)


if __name__ == "__main__":
    main()
