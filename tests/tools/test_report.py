"""What `hf-fsam compare` reports: the setting of a study, its table and its plots."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import ttest_rel

from hf_fsam.arguments import FSAMArguments, plain_passes
from hf_fsam.studies.compare import main
from hf_fsam.studies.plots import draw, rho_curve
from hf_fsam.studies.report import Difference, cost, setting, table
from tests.tools.studies import RECIPE, compare, run, study_of, write_study


def row(arm: str, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    base = {"stage": "final", "settings": {}, "passes": 1.0, "steps": 100, "train_seconds": 10.0, "resumed": False}
    return {"arm": arm, "seed": seed, "metrics": {"eval_loss": loss}, "curve": [], **base, **more}


# ---- The table ----


def test_differences_are_paired_by_seed_with_students_interval(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0, 1, 2])
    rows = [row("A", seed, 2.0 + seed) for seed in range(3)]
    rows += [row("B", seed, 2.0 + seed + 0.1 * (seed + 1), passes=2.0, train_seconds=19.0) for seed in range(3)]
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    # 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t(0.975, 2) = 4.3027: 4.3027 × 0.1 / √3 = 0.2484
    assert "+0.2000 [-0.0484, +0.4484]" in line
    assert "undecided" in line
    assert "3.2000 ± 1.1000" in line
    assert "| 2.00 " in line
    assert "| 1.90 " in line
    # The clock of a resumed run started anew.
    for each in rows:
        each["resumed"], each["train_seconds"] = (
            each["seed"] == 0,
            each["train_seconds"] * (1 + 9 * (each["seed"] == 0)),
        )
    rows[3]["train_seconds"] = rows[4]["train_seconds"] = 1.0
    rows[5]["train_seconds"] = 21.0
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "| 1.10 " in line  # of 0.1 and 2.1, without the first seed's 0.01
    assert Difference.of([-0.1, -0.12, -0.11]).verdict() == "better"
    assert Difference.of([0.1, 0.12, 0.11]).verdict() == "worse"
    assert Difference.of([0.1, 0.12, 0.11]).verdict(greater_is_better=True) == "better"
    assert Difference.of([0.1]).verdict() == "undecided"


def test_an_arm_that_diverged_with_one_seed_is_not_called_better(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0, 1, 2])
    rows = [row("A", seed, 2.0) for seed in range(3)] + [row("B", seed, 1.0 + 0.01 * seed) for seed in range(2)]
    rows.append(row("B", 2, None))
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "no value 1/3" in line
    assert "better" not in line
    rows = [row("A", seed, 2.0 if seed else None) for seed in range(3)]
    rows += [row("B", seed, 2.5 + 0.01 * seed) for seed in range(3)]
    line = next(line for line in table(study, rows) if line.startswith("| B"))
    assert "A: no value 1/3" in line
    assert "worse" not in line


def test_tuning_and_verdict_follow_greater_is_better(folder: Path) -> None:
    (folder / "recipe.py").write_text(RECIPE.replace('metrics = {"eval_loss": loss', 'metrics = {"eval_f1": -loss'))
    keys = {"metrics": ["eval_f1"], "arms": {"A": {"rate": 3, "learning_rate": [1, 2]}, "B": {"learning_rate": 3}}}
    study = study_of(folder, **keys, greater_is_better=True)
    rows = run(study, folder)
    final = [each for each in rows if each["stage"] == "final"]
    assert {each["settings"]["learning_rate"] for each in final if each["arm"] == "A"} == {2}
    assert any(line.startswith("| B") and "better" in line for line in table(study, rows))
    for name in ("eval_f1", "eval_rewards/accuracies", "eval_rewards/margins"):  # the last is unknown
        with pytest.raises(ValueError, match="add `greater_is_better: true`"):
            study_of(folder, **{**keys, "metrics": [name]})
    with pytest.raises(ValueError, match=r"or false\. Did you mean 'eval_loss'"):
        study_of(folder, **{**keys, "metrics": ["eval_los"]})
    for metric, tune_on, greater in (("eval_rewards/margins", "eval_loss", True), ("margin", "eval_f1", False)):
        with pytest.raises(ValueError, match="are not better in the same direction"):
            study_of(folder, metrics=[metric], tune_on=tune_on, greater_is_better=greater)


def test_cost_counts_steps_and_passes() -> None:
    base = {0: row("A", 0, 1.0)}
    assert cost({0: row("B", 0, 1.0, settings={"per_device_train_batch_size": 16})}, base) == 2.0
    assert cost({0: row("B", 0, 1.0, steps=50, passes=2.0)}, base) == 1.0
    assert cost({0: row("B", 0, 1.0, settings={"gradient_accumulation_steps": 4})}, base) == 4.0
    assert plain_passes(FSAMArguments(fsam_variant="none")) == 1
    assert plain_passes(FSAMArguments(fsam_variant="sam")) == 2
    assert plain_passes(FSAMArguments(fsam_rho=0.0)) == 1
    assert plain_passes(FSAMArguments(fsam_ascent_direction="momentum")) == pytest.approx(4 / 3)
    assert plain_passes(FSAMArguments(fsam_every_steps=4)) == 1.25
    assert plain_passes(FSAMArguments(fsam_variant="logit")) == pytest.approx(7 / 3)


def test_tuned_values_at_the_edge_are_marked_and_the_radius_has_a_curve(folder: Path) -> None:
    study = study_of(folder)
    rows = run(study, folder)
    lines = table(study, rows)
    assert any("learning_rate 3 " in line for line in lines)  # of 1, 3, 5
    assert any("rho 0.2!" in line for line in lines)  # of 0.1, 0.2
    curve = rho_curve(study, rows, "FSAM")
    assert [rho for rho, _ in curve] == [0.1, 0.2]
    assert curve[0][1] == pytest.approx(12 + 0.01)  # 2 + (0.1 - 0.2)² + 0.1 · 100


def test_the_curve_of_the_radii_has_the_settings_that_tuning_chose(folder: Path) -> None:
    study = study_of(folder, arms={"A": {"fsam_rho": [0.1, 0.2], "rate": [1, 2]}}, metrics=["test_loss", "eval_loss"])
    study.tune_on = "eval_loss"
    rows = []
    for rho, rate, tuning, test in ((0.1, 1, 1.0, 5.0), (0.1, 2, 2.0, 4.0), (0.2, 1, 3.0, 6.0), (0.2, 2, 2.5, None)):
        rows.append(row("A", 100, tuning) | {"stage": "tuning", "settings": {"fsam_rho": rho, "rate": rate}})
        rows[-1]["metrics"]["test_loss"] = test
    assert rho_curve(study, rows, "A") == [(0.1, 5.0), (0.2, 6.0)]


def test_results_that_hold_only_metrics_make_a_table(folder: Path) -> None:
    """The table then has no curve, cost and time."""
    (folder / "recipe.py").write_text(
        "import json, sys\n"
        "settings = json.load(open(sys.argv[1]))\n"
        "results = {'metrics': {'eval_loss': settings['loss'] + settings['seed']}}\n"
        "json.dump(results, open(settings['output_dir'] + '/results.json', 'w'))\n"
    )
    write_study(folder, arms={"A": {"loss": 1.0}, "B": {"loss": 2.0}})
    compare(folder)
    line = next(line for line in (folder / "out" / "study.md").read_text().splitlines() if line.startswith("| B"))
    assert "+1.0000 [+1.0000, +1.0000] | worse" in line
    assert "nan" not in line
    assert (folder / "out" / "study.png").stat().st_size > 1000


def test_versions_are_compared_where_both_runs_say(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    rows = [
        row(arm, 0, 1.0, versions={"torch": "2.13.0", **more}) for arm, more in (("A", {}), ("B", {"python": "3.11"}))
    ]
    assert "CAUTION" not in "\n".join(setting(study, rows, "command"))
    rows[0]["versions"]["torch"] = "2.8.0"
    assert "the runs differ in versions" in "\n".join(setting(study, rows, "command"))


def test_runs_of_another_recipe_or_corpus_are_pointed_out(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    rows = run(study, folder)
    assert "CAUTION" not in "\n".join(setting(study, rows, "command"))
    (folder / "recipe.py").write_text(RECIPE + "\n# changed\n")
    assert "their recipe, which has changed since" in "\n".join(setting(study, rows, "command"))
    rows[0]["corpus_sha256"] = "other"
    assert "the runs differ in corpus_sha256" in "\n".join(setting(study, rows, "command"))
    tuning = row("A", 100, 1.0, stage="tuning", recipe_sha256="of an older recipe")
    final = row("A", 0, 1.0)
    assert "CAUTION" not in "\n".join(setting(study, [final], "command"))
    assert "their recipe, which has changed since" in "\n".join(setting(study, [tuning, final], "command"))


def test_a_study_with_a_point_in_its_name_gets_a_report_of_that_name(folder: Path) -> None:
    write_study(folder, seeds=[0]).rename(folder / "size_1.2b.yaml")
    main([str(folder / "size_1.2b.yaml"), "--out", str(folder / "out")])
    assert {path.name for path in (folder / "out").glob("size*")} == {"size_1.2b.md", "size_1.2b.png"}


# ---- The plots ----

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#808080"


def dots(forest: Axes) -> dict[str, tuple[float, list[float], str]]:
    """The arm's name at every dot: the dot's place on the x-axis, the ends of its bar, its colour."""
    names = dict(zip(forest.get_yticks(), texts(forest.get_yticklabels()), strict=True))
    found = {}
    for dot, _, bars in (container.lines for container in forest.containers):
        ((x, y),) = dot.get_xydata()
        found[names[y]] = x, [end for bar in bars for end, _ in bar.get_segments()[0]], to_hex(dot.get_color())
    return found


def texts(labels: list[Text]) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(
    ("greater_is_better", "side", "colors"), [(False, "left", [BLUE, ORANGE]), (True, "right", [ORANGE, BLUE])]
)
def test_the_forest_has_the_difference_of_every_arm_with_its_interval(
    folder: Path, greater_is_better: bool, side: str, colors: list[str]
) -> None:
    seeds, values = (
        range(4),
        {
            "lower": [1.5, 1.4, 1.7, 1.6],
            "base": [2.0, 2.1, 2.2, 2.1],
            "higher": [2.6, 2.5, 2.9, 2.6],
            "much alike": [2.1, 2.2, 2.0, 2.0],
        },
    )
    arms: dict[str, dict] = {name: {} for name in values}
    study = study_of(folder, arms=arms, seeds=[*seeds], baseline="base", greater_is_better=greater_is_better)
    passes = {"lower": 2.0, "much alike": 4 / 3}
    rows = [row(arm, seed, values[arm][seed], passes=passes.get(arm, 1.0)) for seed in seeds for arm in reversed(arms)]
    forest = draw(study, rows).axes[0]
    assert texts(forest.get_yticklabels()) == ["lower", "higher", "much alike"]
    assert texts(forest.child_axes[0].get_yticklabels()) == ["2.00x", "1.00x", "1.33x"]
    assert forest.yaxis_inverted()  # the first is on top
    found = dots(forest)
    for arm, color in zip(("lower", "higher", "much alike"), (*colors, GREY), strict=True):
        test = ttest_rel(values[arm], values["base"])
        interval = test.confidence_interval(0.95)
        mean, ends, shade = found[arm]
        assert mean == pytest.approx((interval.low + interval.high) / 2)
        assert ends == pytest.approx([interval.low, interval.high])
        assert shade == color
    assert any(set(line.get_xdata()) == {0} for line in forest.lines)
    assert f": {side} is better" in forest.get_title()
    assert "eval_loss minus that of base, mean of 4 seeds and its 95 % interval" in forest.get_xlabel()


def test_the_forest_says_that_an_arm_or_the_baseline_diverged(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}, "C": {}}, seeds=[0, 1, 2])
    rows = [row(arm, seed, 1.0 + seed**2) for arm in "AB" for seed in range(3)]
    rows += [row("C", seed, None if seed == 1 else 1.5) for seed in range(3)]
    forest = draw(study, rows).axes[0]
    assert list(dots(forest)) == ["B"]
    (text,) = forest.texts
    assert (text.get_text(), text.get_position()[1]) == ("no value 1/3", 1)
    rows[0]["metrics"]["eval_loss"] = None
    forest = draw(study, rows).axes[0]
    assert not dots(forest)
    assert texts(forest.texts) == ["A: no value 1/3", "no value 1/3"]


def test_a_single_seed_has_a_dot_and_no_interval(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    forest = draw(study, [row("A", 0, 1.0), row("B", 0, 1.5)]).axes[0]
    assert dots(forest) == {"B": (0.5, [], GREY)}
    assert forest.get_xlabel().endswith("A, one seed")


def test_the_curves_are_named_after_the_metric_that_they_show(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}}, seeds=[0], metrics=["test_loss"], tune_on="best_eval_loss")
    curves = draw(study, [row("A", 0, 1.0, metrics={"test_loss": 1.0}, curve=[[1, 3.0], [2, 2.0]])]).axes[0]
    assert curves.get_ylabel() == "eval_loss"


@pytest.mark.parametrize(("names", "lines"), [(["eval_loss", "test_loss"], 0), ([None, "eval_loss"], 2)])
def test_curves_are_drawn_where_every_arm_has_one(folder: Path, names: list[str | None], lines: int) -> None:
    study = study_of(folder, arms={"A": {}, "B": {}}, seeds=[0])
    rows = [
        row(arm, 0, 1.0, curve=[[1, 3.0], [2, 2.0]], **({"curve_of": name} if name else {}))
        for arm, name in zip("AB", names, strict=True)
    ]
    panels = [axes for axes in draw(study, rows).axes if axes.get_title().startswith("Curves")]
    assert sum(len(axes.lines) for axes in panels) == lines


def apart(labels: list[Text]) -> bool:
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_many_arms_with_long_names_can_be_read(folder: Path) -> None:
    long = r"of a long name, as $\frac$, "  # TeX would not take it
    arms = {"AdamW": {}, **{f"arm {index}, {long * (index % 4)}": {} for index in range(21)}}
    curve = [[1, 3.0], [2, 2.0]]

    def drawn(count: int, *radii: float) -> Figure:
        chosen = dict(itertools.islice(arms.items(), count))
        study = study_of(folder, arms=chosen, seeds=[0, 1], question="Is any of them better? " * 9)
        rows = [row(arm, seed, 2.0 + seed, curve=curve, passes=2.0) for arm in chosen for seed in (0, 1)]
        rows += [row("AdamW", 9, 2.0, stage="tuning", settings={"fsam_rho": rho}) for rho in radii]
        figure = draw(study, rows)
        figure.draw_without_rendering()
        return figure

    figure = drawn(22, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 3)
    forest, curves, costs, radius = figure.axes
    assert all(axes.get_title() for axes in figure.axes)
    assert all(axes.get_legend() is None for axes in figure.axes)
    (legend,) = figure.legends
    names = [text.replace("\n", " ").replace("\\$", "$") for text in texts(legend.get_texts())]
    assert names == [name.strip() for name in arms]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves.lines}) == 22
    handles = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert handles == [(line.get_color(), line.get_linestyle()) for line in curves.lines]
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)

    title = figure.get_suptitle()
    assert title.replace("\n", " ") == ("Is any of them better? " * 9).strip()
    every = [*legend.get_texts(), *forest.get_yticklabels(), *forest.child_axes[0].get_yticklabels()]
    for label in [*every, *figure.texts, *radius.get_xticklabels(), *(axes.title for axes in figure.axes)]:
        box = label.get_window_extent()
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= figure.bbox.x1, label
        assert box.y1 <= figure.bbox.y1, label
    assert apart(every)
    assert apart(radius.get_xticklabels())
    assert texts(radius.get_xticklabels()) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.3", "3"]
    means = [line for line in costs.lines if line.get_marker() != "x"]
    assert {line.get_xdata()[0] for line in means} == {2.0}
    assert len({line.get_transform().transform(line.get_xydata())[0, 0] for line in means}) == 22  # side by side

    small = drawn(5, 0.1, 0.2, 0.3)
    assert not any(texts(small.axes[3].get_xticklabels(minor=True)))
    assert figure.get_figheight() > small.get_figheight() + 17 * 0.25
    for panel in (radius, small.axes[3]):  # the legend leaves them their height
        assert panel.get_window_extent().height > 2.6 * figure.dpi


def test_an_arm_alone_has_no_forest(folder: Path) -> None:
    study = study_of(folder, arms={"A": {}}, seeds=[0])
    (costs,) = draw(study, [row("A", 0, 1.0)]).axes
    assert costs.get_title().startswith("Cost")
