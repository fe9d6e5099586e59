"""Reports what a study found in one table, from the rows of its runs."""

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

from hf_fsam.studies.masking import masked
from hf_fsam.studies.study import Study, canonical, fingerprint

Row = dict[str, Any]

ALIKE = ("corpus_sha256", "versions", "machine")  # what all runs of a table should have in common


def alike(values: Sequence[Any]) -> bool:
    """Whether they are equal; of mappings, in the keys that all have."""
    if all(isinstance(value, dict) for value in values):
        shared = set.intersection(*map(set, values))
        values = [{key: value[key] for key in shared} for value in values]
    return len({canonical(value) for value in values}) == 1


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and half the width of its 95 % interval by Student's t: NaN for a single pair."""

    mean: float
    half: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        count = len(differences)
        if count < 2:
            return cls(statistics.fmean(differences), math.nan)
        error = statistics.stdev(differences) / math.sqrt(count)
        return cls(statistics.fmean(differences), float(t.ppf(0.975, count - 1)) * error)

    def verdict(self, greater_is_better: bool = False) -> str:
        if math.isnan(self.half) or abs(self.mean) <= self.half:
            return "undecided"
        return "better" if (self.mean > 0) == greater_is_better else "worse"

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.mean - self.half:+.4f}, {self.mean + self.half:+.4f}]"


def write_report(study: Study, rows: list[Row], path: Path, command: str) -> str:
    """Writes the table and its setting as Markdown, and returns that text."""
    text = "\n".join(
        [f"**{study.name}**: {study.question}".strip(), "", *table(study, rows), "", *setting(study, rows, command)]
    )
    path.write_text(text + "\n", encoding="utf-8")
    return text


def table(study: Study, rows: list[Row]) -> list[str]:
    """Lines of a Markdown table, padded so that its columns are aligned in a terminal, too."""
    header = ["arm", "tuned"]
    for name in study.metrics:
        header += [f"{name}, mean ± sd", f"minus {study.baseline} [95 %]"]
    header += ["verdict", "cost, plain passes", "× time"]
    lines = [header]
    final = by_arm(rows, "final")
    base = final[study.baseline]
    for arm, runs in final.items():
        line = [arm, tuned(study, arm, rows)]
        for name in study.metrics:
            line.append(spread([row["metrics"][name] for row in runs.values()]))
            line.append("" if arm == study.baseline else str(difference(runs, base, name) or ""))
        line.append("" if arm == study.baseline else verdict(study, runs, base))
        passes = cost(runs, base)
        lines.append([*line, "" if math.isnan(passes) else f"{passes:.2f}", times(runs, base)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "-|-".join("-" * width for width in widths)
    return [f"| {padded[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in padded[1:])]


def by_arm(rows: list[Row], stage: str) -> dict[str, dict[int, Row]]:
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def pairs(runs: dict[int, Row], base: dict[int, Row], metric: str) -> list[tuple[float | None, float | None]]:
    """The metric of an arm and that of the baseline, for every seed."""
    return [(row["metrics"][metric], base[seed]["metrics"][metric]) for seed, row in runs.items() if seed in base]


def difference(runs: dict[int, Row], base: dict[int, Row], metric: str) -> Difference | None:
    """Of an arm to the baseline, over the seeds with which both have a value. None: there is no such seed."""
    found = [value - other for value, other in pairs(runs, base, metric) if value is not None and other is not None]
    return Difference.of(found) if found else None


def verdict(study: Study, runs: dict[int, Row], base: dict[int, Row]) -> str:
    """On an arm, by the metric that decides. A run without a value, as one that diverged, leaves no other verdict."""
    found = pairs(runs, base, study.metrics[0])
    missing, base_missing = (sum(pair[side] is None for pair in found) for side in (0, 1))
    if missing:
        return f"no value {missing}/{len(found)}"
    if base_missing:
        return f"{study.baseline}: no value {base_missing}/{len(found)}"
    compared = difference(runs, base, study.metrics[0])
    return compared.verdict(study.greater_is_better) if compared else ""


def tuned(study: Study, arm: str, rows: list[Row]) -> str:
    """The values that tuning chose. A ! marks the least or the greatest that was tried: the best may lie outside."""
    chosen = next(row["settings"] for row in rows if row["arm"] == arm and row["stage"] == "final")
    parts = []
    for name in study.arms[arm].tuned:
        values = masked(study.arms[arm].settings)[name]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        edge = "!" if numeric and chosen[name] in (min(values), max(values)) else ""
        parts.append(f"{name.removeprefix('fsam_')} {chosen[name]:g}{edge}" if numeric else f"{name} {chosen[name]}")
    return ", ".join(parts)


def spread(values: list[float | None]) -> str:
    finite = [value for value in values if value is not None]
    missing = f" ({len(values) - len(finite)} without a value)" if len(finite) < len(values) else ""
    if not finite:
        return missing.strip()
    if len(finite) == 1:
        return f"{finite[0]:.4f}{missing}"
    return f"{statistics.fmean(finite):.4f} ± {statistics.stdev(finite):.4f}{missing}"


def cost(runs: dict[int, Row], base: dict[int, Row]) -> float:
    """The cost of an arm in passes of plain training over the examples that the baseline sees. NaN where the runs do
    not say how many steps they took."""
    arm, baseline = (next(iter(rows.values())) for rows in (runs, base))
    if not (arm["steps"] and baseline["steps"]):
        return math.nan
    examples, base_examples = (
        row["steps"]
        * row["settings"].get("per_device_train_batch_size", 8)
        * row["settings"].get("gradient_accumulation_steps", 1)
        for row in (arm, baseline)
    )
    return arm["passes"] * examples / base_examples


def times(runs: dict[int, Row], base: dict[int, Row]) -> str:
    """The median over the seeds of the training time in units of the baseline's, without runs that were resumed."""
    pairs = [(row, base[seed]) for seed, row in runs.items() if seed in base]
    ratios = [
        row["train_seconds"] / other["train_seconds"]
        for row, other in pairs
        if not (row["resumed"] or other["resumed"]) and row["train_seconds"] and other["train_seconds"]
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def setting(study: Study, rows: list[Row], command: str) -> list[str]:
    final = [row for row in rows if row["stage"] == "final"]
    first = final[0]
    machine = first.get("machine", {})
    versions = first.get("versions", {"python": platform.python_version()})
    device = ", ".join(machine.get("gpus") or []) or f"CPU, {machine.get('torch_threads')} threads a run"
    lines = {
        "seeds": " ".join(map(str, study.seeds)) + f" (tuned on {' '.join(map(str, study.tuning_seeds))})",
        "weights": first.get("parameters"),
        "steps": " ".join(map(str, sorted({row["steps"] for row in final}))),
        "training time of the final runs, hours": round(sum(row["train_seconds"] or 0 for row in final) / 3600, 2),
        "corpus": first.get("corpus_sha256"),
        "device": device if machine else None,  # a script of others does not say
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "command": command,
    }
    others = len(study.arms) - 1
    notes = (
        [f"- {others} comparisons, each at 95 % by itself: one in twenty stands out by chance"] if others > 1 else []
    )
    if any(arm.tuned for arm in study.arms.values()):
        notes.append("- !: tuned to the edge of what was tried")
    if any(row["metrics"][name] is None for row in final for name in study.metrics):
        notes.append("- without a value: the run diverged, or never came to where it would be measured")
    # Of the runs that tuned as well, since the table rests on what they chose.
    mixed = [name for name in ALIKE if not alike([row.get(name) for row in rows])]
    if any(row.get("recipe_sha256") not in (None, fingerprint(study.arms[row["arm"]].recipe.path)) for row in rows):
        mixed.append("their recipe, which has changed since some of them")
    if mixed:
        notes.append(f"- CAUTION: the runs differ in {', '.join(mixed)}, and not only in their arms")
    return [*notes, *(f"- {name}: {value}" for name, value in lines.items() if value)]
