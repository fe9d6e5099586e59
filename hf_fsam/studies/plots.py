"""Shows what a study found in one figure: the differences to the baseline, and below them curves, costs and radii."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which styles for a screen
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from hf_fsam.studies.report import Row, by_arm, cost, difference, verdict
from hf_fsam.studies.study import Study

Runs = dict[str, dict[int, Row]]  # of every arm, by seed
Styles = dict[str, dict[str, Any]]  # how the lines of every arm are drawn

WIDTH = 12.0  # inches
# Blue, orange and grey, which the colour-blind tell apart as well.
VERDICTS = {"better": "#0072B2", "worse": "#D55E00", "undecided": "0.5"}


def plot(study: Study, rows: list[Row], path: Path) -> None:
    draw(study, rows).savefig(path, dpi=110)


def draw(study: Study, rows: list[Row]) -> Figure:
    """The differences to the baseline in a panel of full width, the other panels in a row below, one legend for those.

    The panels below are the curves where every arm has some, the metric over the cost, and the metric over ρ where ρ
    was tuned.
    """
    final, styles = by_arm(rows, "final"), styles_of(study)
    radii = {arm: rho_curve(study, rows, arm) for arm in final}
    radii = {arm: curve for arm, curve in radii.items() if len(curve) > 1}
    has_curve = bool(final) and all(curves_of(study, runs) for runs in final.values())

    others = len(styles) - 1
    heights = [1.2 + (0.12 + height_of(styles)) * others, 4.0] if others else [4.0]
    figure = Figure((WIDTH, sum(heights) + 0.7), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    figure.suptitle(shown(study.question or study.name, 100), fontsize=13)
    add_legend(figure, styles)
    *top, bottom = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    for part in top:
        plot_differences(part.subplots(), study, final)
    panels = iter(bottom.subplots(1, 1 + has_curve + bool(radii), squeeze=False).flat)
    if has_curve:
        plot_curves(next(panels), study, final, styles)
    plot_costs(next(panels), study, final, styles)
    if radii:
        plot_radii(next(panels), study, radii, styles)
    return figure


def shown(text: str, width: int = 48) -> str:
    """Wrapped, and with dollars that don't start a formula."""
    return textwrap.fill(text, width).replace("$", r"\$")


def height_of(names: Iterable[str]) -> float:
    """The height, in inches, of the tallest of the names."""
    return 0.17 * max(shown(name).count("\n") + 1 for name in names)


def add_legend(figure: Figure, styles: Styles) -> None:
    """Below the panels, in as many columns as the longest name leaves room for. The figure grows by its height."""
    names = [shown(arm) for arm in styles]
    widest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, int(WIDTH / (0.8 + 0.065 * widest)))
    handles = [Line2D([], [], **style) for style in styles.values()]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3, fontsize=9)
    legend.set_frame_on(False)
    figure.set_figheight(figure.get_figheight() + height_of(styles) * math.ceil(len(names) / columns))


def styles_of(study: Study) -> Styles:
    """The baseline is black and on top. Each ten of the others have their own colours, lines and markers."""
    styles: Styles = {study.baseline: {"color": "black", "linestyle": "-", "marker": "o", "zorder": 3}}
    shades = color_sequences["tab20"]  # a strong one, the light one to it, the next strong one ...
    colors = [*shades[::2], *shades[1::2]]
    for index, arm in enumerate(arm for arm in study.arms if arm != study.baseline):
        linestyle, marker = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))[index // 10 % 4]
        styles[arm] = {"color": colors[index % 20], "linestyle": linestyle, "marker": marker}
    return styles


def plot_differences(axes: Axes, study: Study, final: Runs) -> None:
    """A forest plot: one row an arm, with its cost."""
    metric, base = study.metrics[0], final[study.baseline]
    arms = [arm for arm in study.arms if arm != study.baseline]
    for place, arm in enumerate(arms):
        found, judged = difference(final[arm], base, metric), verdict(study, final[arm], base)
        if found and judged in VERDICTS:
            axes.errorbar(found.mean, place, xerr=found.half, fmt="o", color=VERDICTS[judged], capsize=3)
        else:
            middle = axes.get_yaxis_transform()
            text = axes.text(0.5, place, shown(judged), transform=middle, ha="center", va="center")
            text.set_backgroundcolor("white")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks(range(len(arms)), [shown(arm) for arm in arms])
    costs = [cost(final[arm], base) for arm in arms]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(arms)), ["" if math.isnan(each) else f"{each:.2f}x" for each in costs])
    right.set_ylabel("cost, plain passes")
    side, name = "right" if study.greater_is_better else "left", shown(study.baseline)
    axes.set_title(f"Difference to {name}: {side} is better (blue: better, orange: worse, grey: undecided)")
    seeds = f"mean of {len(study.seeds)} seeds and its 95 % interval" if len(study.seeds) > 1 else "one seed"
    axes.set_xlabel(f"{metric} minus that of {name}, {seeds}")
    axes.grid(alpha=0.3)


def curves_of(study: Study, runs: dict[int, Row]) -> list[list[tuple[int, float]]]:
    """The curves of the metric that tuning looks at. A run that another study made may have that of another metric."""
    name = study.tune_on.removeprefix("best_")
    known = (None, name, f"eval_{name}")  # older rows don't say
    return [row["curve"] for row in runs.values() if row["curve"] and row.get("curve_of") in known]


def plot_curves(axes: Axes, study: Study, final: Runs, styles: Styles) -> None:
    for arm, runs in final.items():
        curves = curves_of(study, runs)
        length = min(map(len, curves))
        # The mean over the seeds, whose trainings may differ in length where each has pruned its data.
        steps = [statistics.fmean(curve[point][0] for curve in curves) for point in range(length)]
        values = [[curve[point][1] for curve in curves] for point in range(length)]
        axes.plot(steps, [statistics.fmean(each) for each in values], **{**styles[arm], "marker": ""})
        low, high = ([pick(each) for each in values] for pick in (min, max))
        alpha = min(0.15, 1 / len(final))  # or many arms would hide the lines
        axes.fill_between(steps, low, high, color=styles[arm]["color"], alpha=alpha, linewidth=0)
    axes.set(title="Curves, mean and range of the seeds", xlabel="step", ylabel=study.tune_on.removeprefix("best_"))
    axes.grid(alpha=0.3)


def plot_costs(axes: Axes, study: Study, final: Runs, styles: Styles) -> None:
    metric = study.metrics[0]
    costs = {arm: round(cost(runs, final[study.baseline]), 2) for arm, runs in final.items()}
    for arm, runs in final.items():
        values = [row["metrics"][metric] for row in runs.values() if row["metrics"][metric] is not None]
        if math.isnan(costs[arm]) or not values:
            continue
        seeds = axes.plot([costs[arm]] * len(values), values, "x", color=styles[arm]["color"], alpha=0.4)
        mean = axes.plot(costs[arm], statistics.fmean(values), **styles[arm])
        alike = [each for each in final if costs[each] == costs[arm]]  # would lie on top of each other
        points = min(6, 60 / len(alike)) * (alike.index(arm) - (len(alike) - 1) / 2)
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        for line in seeds + mean:
            line.set_transform(axes.transData + aside)
    axes.margins(x=0.2)
    axes.set(title="Cost (equal ones side by side; x: a seed)", ylabel=metric)
    axes.set_xlabel("plain passes over the baseline's examples")
    axes.grid(alpha=0.3)


def plot_radii(axes: Axes, study: Study, radii: dict[str, list[tuple[float, float]]], styles: Styles) -> None:
    for arm, curve in radii.items():
        axes.plot(*zip(*curve, strict=True), **styles[arm])
    axes.set(title="Radii, mean of the tuning seeds", xlabel="ρ", ylabel=study.metrics[0], xscale="log")
    tried = sorted({rho for curve in radii.values() for rho, _ in curve})
    ticks = tried[:1]
    for rho in tried:
        if rho > ticks[-1] * (tried[-1] / tried[0]) ** 0.06:  # or its label would touch the one before
            ticks.append(rho)
    axes.set_xticks(ticks, [f"{rho:g}" for rho in ticks], rotation=90)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def rho_curve(study: Study, rows: list[Row], arm: str) -> list[tuple[float, float]]:
    """(ρ, mean of the first metric) for every ρ above zero that was tried in tuning and left a value with every seed,
    at the other settings that tuning would choose with it."""
    found: dict[float, dict[str, list[Row]]] = {}
    for row in rows:
        rho = row["settings"].get("fsam_rho")
        if row["stage"] == "tuning" and row["arm"] == arm and rho:
            others = str(sorted((name, str(value)) for name, value in row["settings"].items() if name != "fsam_rho"))
            found.setdefault(rho, {}).setdefault(others, []).append(row)
    best = max if study.greater_is_better else min
    curve = []
    for rho, groups in sorted(found.items()):
        means = [
            tuple(statistics.fmean(row["metrics"][name] for row in runs) for name in (study.tune_on, study.metrics[0]))
            for runs in groups.values()
            if all(row["metrics"][name] is not None for row in runs for name in (study.tune_on, study.metrics[0]))
        ]
        if means:
            curve.append((rho, best(means)[1]))
    return curve
