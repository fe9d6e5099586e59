"""What a study found: one table, one plot, from the rows of its runs."""

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib  # here, so that what is missing is said before the first run
from scipy.stats import t

from hf_fsam.studies.masking import masked
from hf_fsam.studies.study import Study, canonical, fingerprint

Row = dict[str, Any]

ALIKE = ("corpus_sha256", "versions", "machine")  # of all runs in a table


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % interval from Student's t; one pair has no interval."""

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
    """Writes PATH.md and PATH.png, and returns the first's text."""
    final = [row for row in rows if row["stage"] == "final"]
    text = "\n".join(
        [f"**{study.name}**: {study.question}".strip(), "", *table(study, rows), "", *setting(study, final, command)]
    )
    # Not with_suffix, for which c4_1.2b has one.
    path.with_name(f"{path.name}.md").write_text(text + "\n", encoding="utf-8")
    plot(study, rows, path.with_name(f"{path.name}.png"))
    return text


def table(study: Study, rows: list[Row]) -> list[str]:
    """Lines of Markdown, padded so that a terminal shows columns."""
    header = ["arm", "tuned"]
    for name in study.metrics:
        header += [f"{name}, mean ± sd", f"minus {study.baseline} [95 %]"]
    header += ["verdict", "cost, plain passes", "× time"]
    lines = [header]
    final = by_arm(rows, "final")
    base = final[study.baseline]
    for arm, own in final.items():
        line = [arm, tuned(study, arm, rows)]
        verdict = ""
        for index, name in enumerate(study.metrics):
            line.append(spread([row["metrics"][name] for row in own.values()]))
            pairs = [(own[seed]["metrics"][name], base[seed]["metrics"][name]) for seed in own if seed in base]
            whole = [(value, other) for value, other in pairs if value is not None and other is not None]
            if arm == study.baseline:
                line.append("")
                continue
            difference = Difference.of([value - other for value, other in whole]) if whole else None
            line.append(str(difference or ""))
            if index == 0:
                lost, lost_by_base = (sum(pair[side] is None for pair in pairs) for side in (0, 1))
                if lost:
                    verdict = f"diverged {lost}/{len(pairs)}"
                elif lost_by_base:
                    verdict = f"{study.baseline} diverged {lost_by_base}/{len(pairs)}"
                elif difference:
                    verdict = difference.verdict(study.greater_is_better)
        shared = [seed for seed in own if seed in base]
        spent = cost(own, base)
        lines.append([*line, verdict, "" if math.isnan(spent) else f"{spent:.2f}", times(own, base, shared)])
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


def tuned(study: Study, arm: str, rows: list[Row]) -> str:
    """The values that tuning chose; ! where one is the least or the most that was tried: the best may lie outside."""
    own = next(row["settings"] for row in rows if row["arm"] == arm and row["stage"] == "final")
    parts = []
    for name in study.arms[arm].tuned:
        values = masked(study.arms[arm].settings)[name]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        edge = "!" if numeric and own[name] in (min(values), max(values)) else ""
        parts.append(f"{name.removeprefix('fsam_')} {own[name]:g}{edge}" if numeric else f"{name} {own[name]}")
    return ", ".join(parts)


def spread(values: list[float | None]) -> str:
    whole = [value for value in values if value is not None]
    diverged = f" ({len(values) - len(whole)} diverged)" if len(whole) < len(values) else ""
    if not whole:
        return diverged.strip()
    if len(whole) == 1:
        return f"{whole[0]:.4f}{diverged}"
    return f"{statistics.fmean(whole):.4f} ± {statistics.stdev(whole):.4f}{diverged}"


def cost(own: dict[int, Row], base: dict[int, Row]) -> float:
    """In passes of plain training over what the baseline sees; NaN where the runs do not say how many steps."""
    arm, baseline = (next(iter(rows.values())) for rows in (own, base))
    if not (arm["steps"] and baseline["steps"]):
        return math.nan
    return arm["passes"] * examples(arm) / examples(baseline)


def examples(row: Row) -> float:
    """That the run saw, for each process."""
    settings = row["settings"]
    batch = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
    return row["steps"] * batch


def times(own: dict[int, Row], base: dict[int, Row], seeds: list[int]) -> str:
    ratios = [
        own[seed]["train_seconds"] / base[seed]["train_seconds"]
        for seed in seeds
        if not (own[seed]["resumed"] or base[seed]["resumed"])
        and own[seed]["train_seconds"]
        and base[seed]["train_seconds"]
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def setting(study: Study, final: list[Row], command: str) -> list[str]:
    first = final[0]
    machine = first.get("machine", {})
    versions = first.get("versions", {"python": platform.python_version()})
    device = ", ".join(machine.get("gpus") or []) or f"CPU, {machine.get('torch_threads', '?')} threads a run"
    lines = {
        "seeds": " ".join(map(str, study.seeds)) + f" (tuned on {' '.join(map(str, study.tuning_seeds))})",
        "weights": first.get("parameters"),
        "steps": " ".join(map(str, sorted({row["steps"] for row in final}))),
        "training time of the final runs, hours": round(sum(row["train_seconds"] or 0 for row in final) / 3600, 2),
        "corpus": first.get("corpus_sha256"),
        "device": device,
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "command": command,
    }
    others = len(study.arms) - 1
    notes = (
        [f"- {others} comparisons, each at 95 % by itself: one in twenty stands out by chance"] if others > 1 else []
    )
    if any(arm.tuned for arm in study.arms.values()):
        notes.append("- !: tuned to the edge of what was tried")
    mixed = [name for name in ALIKE if len({canonical(row.get(name)) for row in final}) > 1]
    if any(row.get("recipe_sha256") not in (None, recipe_of(study, row)) for row in final):
        mixed.append("their recipe, which is another one now")
    if mixed:
        notes.append(f"- CAUTION: the runs differ in {', '.join(mixed)}, so that not only the arms do")
    return [*notes, *(f"- {name}: {value}" for name, value in lines.items() if value)]


def recipe_of(study: Study, row: Row) -> str:
    return fingerprint(study.arms[row["arm"]].recipe or study.recipe)


def plot(study: Study, rows: list[Row], path: Path) -> None:
    """Curves, loss against compute and, where ρ was tuned, the loss against ρ."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric = study.metrics[0]
    final, tuning = by_arm(rows, "final"), [row for row in rows if row["stage"] == "tuning"]
    radii = {arm: rho_curve(tuning, arm, metric, study.greater_is_better) for arm in final}
    radii = {arm: curve for arm, curve in radii.items() if len(curve) > 1}
    base = final[study.baseline]
    has_curve = any(row["curve"] for row in rows if row["stage"] == "final")
    kinds = [kind for kind, there in (("curve", has_curve), ("cost", True), ("radius", bool(radii))) if there]
    size = (5.2 * len(kinds), 4.4)
    figure, panels = plt.subplots(1, len(kinds), figsize=size, layout="constrained", squeeze=False)
    axes = dict(zip(kinds, panels[0], strict=True))
    for index, (arm, own) in enumerate(final.items()):
        color = f"C{index % 10}"
        curves = [row["curve"] for row in own.values() if row["curve"]]
        if curves:
            length = min(map(len, curves))
            steps = [step for step, _ in curves[0][:length]]
            values = [[curve[point][1] for curve in curves] for point in range(length)]
            axes["curve"].plot(steps, [statistics.fmean(each) for each in values], color=color, label=arm)
            low, high = ([pick(each) for each in values] for pick in (min, max))
            axes["curve"].fill_between(steps, low, high, alpha=0.15)
        losses = [row["metrics"][metric] for row in own.values() if row["metrics"][metric] is not None]
        if losses:
            where = cost(own, base)
            axes["cost"].plot([where] * len(losses), losses, "x", color=color, alpha=0.4)
            axes["cost"].plot(where, statistics.fmean(losses), "o", color=color, label=arm)
        if arm in radii:
            axes["radius"].plot(*zip(*radii[arm], strict=True), "o-", color=color, label=arm)
    labels = {
        "curve": {"xlabel": "step", "ylabel": f"{metric.removeprefix('best_')}, mean and range of the seeds"},
        "cost": {
            "xlabel": "cost, in passes of plain training over the baseline's steps",
            "ylabel": f"{metric} (x: one seed)",
        },
        "radius": {"xlabel": "ρ", "ylabel": f"{metric}, tuning seeds", "xscale": "log"},
    }
    for kind, each in axes.items():
        each.set(**labels[kind])
        each.grid(alpha=0.3)
        each.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rho_curve(tuning: list[Row], arm: str, metric: str, greater_is_better: bool = False) -> list[tuple[float, float]]:
    """(ρ, mean of the metric) for every ρ above zero that was tried and did not diverge, at its best other settings."""
    found: dict[float, dict[str, list[float | None]]] = {}
    for row in tuning:
        rho = row["settings"].get("fsam_rho")
        if row["arm"] == arm and rho:
            others = str(sorted((name, str(value)) for name, value in row["settings"].items() if name != "fsam_rho"))
            found.setdefault(rho, {}).setdefault(others, []).append(row["metrics"][metric])
    curve = []
    for rho, groups in sorted(found.items()):
        whole = [[value for value in values if value is not None] for values in groups.values() if None not in values]
        if whole:
            best = max if greater_is_better else min
            curve.append((rho, best(map(statistics.fmean, whole))))
    return curve
