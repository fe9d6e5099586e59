"""Run a study, which is one YAML file: tune every arm on its own seeds, run all arms on the same batches, report.

    hf-fsam compare recipes/studies/core.yaml
    hf-fsam compare recipes/studies/core.yaml --max_steps 20 --seeds 0 1 --out outputs/try    # a quick try

The module hf_fsam.studies.study describes the file. Its recipe can be any script that takes one JSON file of settings,
as recipes/*.py and Transformers' own examples do (`script.py run.json`), with `output_dir` and `seed` among them. In
`output_dir` the script has to leave `results.json` (`metrics`, and for curves and costs `history`, `steps`,
`train_seconds`), or the Trainer's `all_results.json` and `trainer_state.json`. With the key `script` in place of
`recipe` any other training script will do: see `hf-fsam run`. For a seed all arms get the same batches, because the
Trainer's sampler draws from `seed` alone.

Every run that ends adds a line to OUT/runs.jsonl, without tokens and passwords. A run whose line is there is not
repeated, even by another study. So a study that was killed goes on where it was, within a run from its last checkpoint
if the recipe saves any. A run is identified by its script, settings, seed and --launch. It is repeated when a file
that its settings name, such as a table of labels, has changed since. Other files (those of a folder, modules beside the
script) are not looked at, so choose another --out when they have changed.

At the end the table is in OUT/STUDY.md and the plots are in OUT/STUDY.png. The first one is a forest plot: every arm's
mean difference to the baseline with its 95 % interval, and what the arm costs.
"""

import argparse
import math
import shlex
import signal
import statistics
import sys
from pathlib import Path

import yaml
from tqdm import tqdm

from hf_fsam.mistakes import told_in_one_line
from hf_fsam.studies.masking import is_secret, masked_command, without_secrets
from hf_fsam.studies.plots import plot
from hf_fsam.studies.report import write_report
from hf_fsam.studies.runner import Row, Runner, Task
from hf_fsam.studies.study import Settings, Study, load_studies, numbers

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"


def main(argv: list[str] | None = None, prog: str = "python -m hf_fsam.studies.compare") -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, overrides = parse(argv, prog)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runner ends the runs, too
    command = without_secrets(f"{prog} {shlex.join(masked_command(argv))}", overrides)
    try:
        with told_in_one_line(prog):
            run_studies(args, overrides, command)
    except KeyboardInterrupt:
        kept = args.out / "runs.jsonl"
        told = f"interrupted. {kept} keeps the runs that have ended; the same command goes on from there."
        print(f"\n{prog}: {told}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_studies(args: argparse.Namespace, overrides: Settings, command: str) -> None:
    studies = list(load_studies(args.study, overrides, args.seeds, args.baseline))
    with tqdm(total=sum(study.total_weight() for study in studies), bar_format=BAR, smoothing=0) as bar:

        def advance(weight: float, ran: bool) -> None:
            if not ran:  # a run that was there took no time, and must not shorten the estimate for the others
                bar.initial += weight
            bar.update(weight)

        for study in studies:
            bar.set_description(study.name)
            with Runner(study, args.out, args.launch, args.parallel, args.keep, advance) as runner:
                rows = run_study(study, runner)
            report = write_report(study, rows, args.out / f"{study.name}.md", command)
            plot(study, rows, args.out / f"{study.name}.png")
            bar.write(f"\n{report}\n", file=sys.stdout)


def run_study(study: Study, runner: Runner) -> list[Row]:
    """Tunes and runs all arms. Returns the rows of all runs."""
    chosen: dict[str, Settings] = {}
    rows: list[Row] = []
    for arms in study.tuning_order():
        candidates = {arm.name: arm.candidates(chosen[arm.like] if arm.like else study.settings) for arm in arms}
        tasks = [
            Task(arm, settings, seed, "tuning")
            for arm in arms
            if len(candidates[arm.name]) > 1
            for settings in candidates[arm.name]
            for seed in study.tuning_seeds
        ]
        tuning = runner.run(tasks)
        rows += tuning
        for arm in arms:
            if len(candidates[arm.name]) == 1:
                (chosen[arm.name],) = candidates[arm.name]
                continue
            losses = [
                statistics.fmean(
                    loss(study, row)
                    for task, row in zip(tasks, tuning, strict=True)
                    if task.arm is arm and task.settings == candidate
                )
                for candidate in candidates[arm.name]
            ]
            if min(losses) == math.inf and arm.name == study.baseline:
                raise RuntimeError(
                    f"{study.name}: {arm.name}: no candidate ended with a finite {study.tune_on}, so there is "
                    "nothing to compare with. Give candidates at which training does not diverge "
                    "and comes to where that is measured."
                )
            # That another arm diverges with every candidate is a result: it goes into the table with its first one.
            chosen[arm.name] = candidates[arm.name][losses.index(min(losses))]
    # Seed by seed, so that the rows of a study that was stopped compare all arms.
    final = [Task(arm, chosen[name], seed, "final") for seed in study.seeds for name, arm in study.arms.items()]
    return rows + runner.run(final)


def loss(study: Study, row: Row) -> float:
    """The value of the metric that tuning looks at, so that lower is better. Infinite where it is not finite."""
    value = row["metrics"][study.tune_on]
    if value is None:
        return math.inf
    return -value if study.greater_is_better else value


def parse(argv: list[str], prog: str) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other `--name value` after the file is a setting of all arms. An arm that sets it is an error.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/studies"), help="folder of the rows, tables and plots"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to use instead of the study's")
    parser.add_argument("--baseline", help="arm to compare with instead of the study's baseline")
    parser.add_argument("--parallel", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs, with their models")
    parser.add_argument(
        "--launch",
        type=shlex.split,
        help='command that starts a recipe, such as "torchrun --nproc_per_node 8" (default: Python, on one GPU)',
    )
    args, rest = parser.parse_known_args(argv)
    if not args.study.is_file():
        parser.error(f"{args.study} does not exist: the study's YAML file comes before other settings.")
    if args.parallel < 1:
        parser.error(f"--parallel {args.parallel}: give 1 or more.")
    if args.launch and args.parallel > 1:
        parser.error("--parallel with --launch: the runs would use the same port and the same GPUs. Leave one out.")
    overrides: Settings = {}
    while rest:
        name, *value = rest.pop(0).split("=", 1)
        if not name.startswith("--"):
            parser.error(f"a value without its name after {list(overrides)[-1:] or args.study}: give `--name value`.")
        if not (value or rest):
            parser.error(f"{name!r} has no value: give `{name} value`.")
        text, name = value[0] if value else rest.pop(0), name.removeprefix("--")
        try:
            overrides[name] = text if is_secret(name) else numbers(yaml.safe_load(text))
        except yaml.YAMLError:
            parser.error(f"--{name}: its value can't be read as YAML: put it in quotes, or close its brackets.")
    return args, overrides


if __name__ == "__main__":
    main()
