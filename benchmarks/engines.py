"""What Functional-SAM adds under every engine: collectives and bytes a step, and peak memory of a process, counted.

    python benchmarks/engines.py --out benchmarks/results/engines

Two and four gloo processes on the CPU train a Llama of a million weights; the third step is counted, so nothing here is
timed. Needs the development installation (`make install`): the processes are those of the tests.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.engines.distributed import ENGINES, train_distributed, zero
from tests.toys import WIDE, llama

BASE = {"max_steps": 3, "per_device_train_batch_size": 1, "wide": True, "measured": True, "logging_strategy": "no"}
SCOPES: dict[str, dict[str, Any]] = {
    "plain": {"fsam_variant": "none"},
    "micro_batch": {"fsam_ascent_scope": "micro_batch", "fsam_precondition": True},
    "optimizer_step": {"fsam_ascent_scope": "optimizer_step", "fsam_precondition": True},
    "rank": {"fsam_ascent_scope": "rank", "fsam_precondition": False},
}
WHOLE = ("ddp", "zero0", "zero1", "zero2")  # where `rank` is supported
ACCUMULATION = (1, 2, 8)
BUCKET = {"reduce_bucket_size": 20_000}
SETTINGS = ENGINES | {"zero1": zero(1, **BUCKET), "zero2": zero(2, **BUCKET), "zero3": zero(3, **BUCKET)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", help="write the tables to OUT.md and OUT.json")
    args = parser.parse_args()
    rows = [row for engine in args.engines for processes in args.processes for row in measure(engine, processes)]
    text = report(rows)
    print(text)
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text + "\n")
        out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def measure(engine: str, processes: int) -> list[dict[str, Any]]:
    cases = [
        (scope, accumulation) for accumulation in ACCUMULATION for scope in SCOPES if scope != "rank" or engine in WHOLE
    ]
    with tempfile.TemporaryDirectory() as folder:
        ended = train_distributed(
            Path(folder) / "run",
            processes,
            *(
                BASE | {"rows": 256, "gradient_accumulation_steps": accumulation} | SCOPES[scope] | SETTINGS[engine]
                for scope, accumulation in cases
            ),
        )
    return [
        {"engine": engine, "processes": processes, "scope": scope, "accumulation": accumulation}
        | {key: result.facts[key] for key in ("calls", "bytes", "peak")}
        for (scope, accumulation), result in zip(cases, ended, strict=True)
    ]


def report(rows: list[dict[str, Any]]) -> str:
    weights = 4 * sum(parameter.numel() for parameter in llama(**WIDE).parameters())
    lines = [
        "| engine | processes | scope | micro-batches | collectives | bytes / weights | × plain | peak, shards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain: dict[str, Any] = {}
    for row in rows:
        if row["scope"] == "plain":
            plain = row
        calls = ", ".join(f"{count} {name}" for name, count in sorted(row["calls"].items()))
        shards = (row["peak"] - plain["peak"]) / (weights / row["processes"])
        lines.append(
            f"| {row['engine']} | {row['processes']} | {row['scope']} | {row['accumulation']} | {calls} "
            f"| {row['bytes'] / weights:.2f} | {row['bytes'] / plain['bytes']:.2f} | {shards:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "- bytes: of whole tensors, an all-reduce counted twice (it is a reduce-scatter and an all-gather)",
            "- scalars: tensors of at most 64 bytes",
            "- peak: of the step, beyond the plain one's",
            f"- weights: {weights // 4}, float32, {weights / 2**20:.1f} MiB; a shard is that divided by the processes",
            f"- Python {platform.python_version()}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}; CPU",
            f"- command: {' '.join(['python', 'benchmarks/engines.py', *sys.argv[1:]])}",
        ]
    )


if __name__ == "__main__":
    main()
