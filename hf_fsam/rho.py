"""Find a radius for a training script of your own, in the manner of a learning rate finder.

    hf-fsam rho train.py --its --own arguments
    hf-fsam rho --out rho.png recipes/pretrain.py recipes/configs/pretrain_tiny.yaml

The script runs as it is, with its model, data, precision and FSAMTrainer, for `--after` plain optimizer steps, so that
the weights are those of a training and the optimizer has a second moment to precondition with. There it measures, for
every ρ of a range and on a few batches, how the loss rises along ε, what the two paths of SAM's gradient amount to, and
what of ρ the weights' format swallows. Then it stops: nothing is evaluated or saved.
"""

import argparse
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from hf_fsam.cleanup import Cleanup
from hf_fsam.diagnostics.probe import Paths, Probe, ratio
from hf_fsam.optimizer_state import check_keeps_second_moment
from hf_fsam.trainer import FSAMMixin

RADII = tuple(10 ** (exponent / 4) for exponent in range(-14, 3))  # 0.0003 to 3.2, four a decade
FUNCTIONAL = 0.1  # of ‖g‖: the share that the suggested ρ makes Functional-SAM change
NOISE = 3.0  # and so many times what is left of it at the smallest ρ, which may be rounding
LINEAR = 2.0  # times the rise of a plane


def measure(probe: Probe, radii: tuple[float, ...] = RADII) -> dict[float, Paths]:
    """Means over the batches and processes, by ρ: four passes for each batch and ρ."""
    found = {}
    names = [field.name for field in fields(Paths)]
    with probe.measuring():
        for rho in radii:
            each = [probe.paths(batch, rho) for batch in probe.batches]
            means = [sum(getattr(paths, name) for paths in each) / len(each) for name in names]
            found[rho] = Paths(
                *probe.trainer.accelerator.reduce(torch.tensor(means, device=probe.device), "mean").tolist()
            )
    return found


def suggest(found: dict[float, Paths]) -> tuple[float | None, str]:
    """A radius and the reason for it, or None and why there is none."""
    floor = NOISE * found[min(found)].functional
    visible = [rho for rho, paths in found.items() if paths.functional >= max(FUNCTIONAL * paths.gradient, floor) > 0.0]
    if not visible:
        return None, (
            f"no ρ up to {max(found):g} changes the function's part of the gradient by {FUNCTIONAL:.0%}, and by "
            f"{NOISE:g} times what is there at {min(found):.1g}: Functional-SAM would do next to nothing here, or "
            "nothing that stands out of rounding."
        )
    rho = min(visible)
    steep = found[rho].rise > LINEAR * found[rho].linear
    reason = (
        f"the smallest ρ at which Functional-SAM changes the gradient by {FUNCTIONAL:.0%} of its norm; SAM would "
        f"change another {ratio(found[rho].logit, found[rho].gradient):.0%} through the logits"
    )
    if steep:
        reason += (
            f". The loss rises {ratio(found[rho].rise, found[rho].linear):.1f} times as much as on a plane there: so "
            "try smaller ones, too"
        )
    return rho, reason + "."


def table(found: dict[float, Paths]) -> str:
    lines = ["       ρ      rise on a plane functional path logit path  ρ kept to nearest"]
    for rho, paths in found.items():
        lines.append(
            f"{rho:8.4f} {paths.rise:9.4f} {paths.linear:10.4f} {ratio(paths.functional, paths.gradient):15.3f} "
            f"{ratio(paths.logit, paths.gradient):10.3f} {paths.kept:7.2f} {paths.to_nearest:10.2f}"
        )
    lines.append("rise: of the loss, nats. paths: in units of ‖g‖. kept: share of ρ along ε in the weights' format, as")
    lines.append("this package rounds, and as weight.add_(ε) would.")
    return "\n".join(lines)


def plot(found: dict[float, Paths], suggested: float | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    radii, each = list(found), list(found.values())
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    axes[0].plot(radii, [paths.rise for paths in each], "o-", label="ℓ(θ+ε) − ℓ(θ)")
    axes[0].plot(radii, [paths.linear for paths in each], "--", color="0.5", label="on a plane")
    axes[0].set(yscale="symlog", ylabel="rise of the loss, nats")
    axes[0].set_yscale("symlog", linthresh=1e-4)
    axes[1].plot(radii, [ratio(paths.functional, paths.gradient) for paths in each], "o-", label="functional path")
    axes[1].plot(radii, [ratio(paths.logit, paths.gradient) for paths in each], "o-", label="logit path")
    axes[1].set(yscale="log", ylabel="change of the gradient / ‖g‖")
    axes[2].plot(radii, [paths.kept for paths in each], "o-", label="stochastic rounding (this package)")
    axes[2].plot(radii, [paths.to_nearest for paths in each], "o-", label="rounding to nearest")
    axes[2].set(ylabel="share of ρ left along ε", ylim=(0, 1.1))
    for axis in axes:
        if suggested is not None:
            axis.axvline(suggested, color="C3", alpha=0.5, label=f"suggested: {suggested:.2g}")
        axis.set(xscale="log", xlabel="ρ")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class _Found(SystemExit):
    """Ends the script: whatever it does after its training is not wanted."""


class _Finder(TrainerCallback):
    """Trains plainly for `after` steps, then measures and ends the script."""

    def __init__(self, trainer: Any, after: int, batches: int, out: Path) -> None:
        self.trainer, self.after, self.batches, self.out = trainer, after, batches, out
        self.probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fsam_precondition:
            check_keeps_second_moment(self.trainer.optimizer)
        if state.max_steps < self.after:
            raise ValueError(f"--after {self.after}: the script trains for {state.max_steps} steps only.")
        self.probe = Probe(self.trainer, self.batches)
        self.trainer._fsam_probes.append(self.probe)
        args.fsam_variant = "none"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        if self.probe is None or state.global_step < self.after:
            return
        found = measure(self.probe)
        if state.is_world_process_zero:
            self.report(found)
        raise _Found(0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False

    def report(self, found: dict[float, Paths]) -> None:
        suggested, reason = suggest(found)
        print(f"\n{table(found)}\n")
        print(f"no suggestion: {reason}" if suggested is None else f"suggested: fsam_rho={suggested:.2g}, {reason}")
        plot(found, suggested, self.out)
        print(f"plot: {self.out}")


def main(argv: list[str] | None = None, prog: str = "python -m hf_fsam.rho") -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--after", type=int, default=100, help="plain optimizer steps before the measurement")
    parser.add_argument("--batches", type=int, default=2, help="to measure on")
    parser.add_argument("--out", type=Path, default=Path("rho.png"), help="the plot")
    parser.add_argument("script", type=Path, help="a training script that uses FSAMTrainer or FSAMMixin")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(argv)
    for name in ("after", "batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more.")
    if not args.script.is_file():
        parser.error(f"{args.script} does not exist: give the path of a training script.")
    train, of_any = FSAMMixin.train, Trainer.train

    def refuse_plain(trainer: Any, *rest: Any, **options: Any) -> Any:
        if not isinstance(trainer, FSAMMixin):
            sys.exit(
                f"{args.script} trains with {type(trainer).__name__}: let it use FSAMTrainer, or put FSAMMixin before "
                "its class. Nothing was trained or measured."
            )
        return of_any(trainer, *rest, **options)

    def find(trainer: Any, *rest: Any, **options: Any) -> Any:
        # The script's folder, its checkpoints and its trackers are left alone.
        trainer.args.eval_on_start = trainer.args.push_to_hub = False
        for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
            trainer.remove_callback(tracker)
        trainer.add_callback(_Finder(trainer, args.after, args.batches, args.out))
        return train(trainer, *rest, **options)

    cleanup = Cleanup()
    with (
        cleanup.replaced(sys, "argv", [str(args.script), *args.arguments]),
        cleanup.replaced(sys, "path", [str(args.script.resolve().parent), *sys.path]),  # as Python does for a script
        cleanup.replaced(FSAMMixin, "train", find),
        cleanup.replaced(Trainer, "train", refuse_plain),
    ):
        try:
            runpy.run_path(str(args.script), run_name="__main__")
        except _Found:
            return
    sys.exit(f"{args.script} ended without training with an FSAMTrainer for {args.after} steps: nothing was measured.")


if __name__ == "__main__":
    main()
