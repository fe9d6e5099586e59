"""Find a radius for a training script of your own, as a learning rate finder finds a rate.

    hf-fsam rho train.py --its --own arguments
    hf-fsam rho --out rho.png recipes/pretrain.py recipes/configs/pretrain_tiny.yaml
    hf-fsam rho -m trl.scripts.sft --config sft.yaml

The script runs as it is, as under `hf-fsam run`, with its own model, data, precision and Trainer, but the first
`--after` optimizer steps are plain ones: they bring the weights to where a training has them, and the optimizer to a
second moment that can precondition. A script that trains for fewer steps is measured where it ends. What is found
depends on where the weights are, so look again with another `--after` before you rely on it.

Then a few batches are measured at every ρ of a range: by how much the loss rises along ε, how large the two paths of
SAM's gradient are, and how much of ρ is lost when θ+ε is rounded to the weights' format. That ends the script. Nothing
is evaluated or saved.
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from hf_fsam.cleanup import Cleanup
from hf_fsam.diagnostics.probe import Paths, Probe, ratio
from hf_fsam.optimizer_state import check_keeps_second_moment
from hf_fsam.run import parse, script_parser
from hf_fsam.swap import swapped
from hf_fsam.trainer import FSAMMixin

RADII = tuple(10 ** (exponent / 4) for exponent in range(-14, 3))  # 0.0003 to 3.2, four a decade
FUNCTIONAL = 0.1  # the change by Functional-SAM, as a share of ‖g‖, that the suggested ρ reaches
NOISE = 3.0  # the change must also be this many times the one at the smallest ρ, which may be rounding
LINEAR = 2.0  # the loss is called steep where it rises by more than this many times its linear part


def measure(probe: Probe, radii: tuple[float, ...] = RADII) -> dict[float, Paths]:
    """For each ρ, the means over the batches and processes. Takes four passes for each batch and ρ."""
    found = {}
    names = [field.name for field in fields(Paths)]
    with probe.measuring():
        for rho in radii:
            each = [probe.paths(batch, rho) for batch in probe.batches]
            means = torch.tensor([sum(getattr(paths, name) for paths in each) / len(each) for name in names])
            found[rho] = Paths(*probe.trainer.accelerator.reduce(means.to(probe.device), "mean").tolist())
    return found


def suggest(found: dict[float, Paths]) -> tuple[float | None, str]:
    """Returns a radius and the reason for it, or None and why there is no suggestion."""
    noise = NOISE * found[min(found)].functional
    visible = [rho for rho, paths in found.items() if paths.functional >= max(FUNCTIONAL * paths.gradient, noise) > 0.0]
    if not visible:
        return None, (
            f"at no ρ up to {max(found):g} does the functional path reach {FUNCTIONAL:.0%} of the gradient's norm and "
            f"{NOISE:g} times its value at {min(found):.1g}, which may be rounding. Functional-SAM would hardly change "
            "the training here."
        )
    rho = min(visible)
    paths = found[rho]
    reason = (
        f"This is the smallest ρ at which Functional-SAM changes the gradient by {FUNCTIONAL:.0%} of its norm; SAM "
        f"would change another {ratio(paths.logit, paths.gradient):.0%} through the logits."
    )
    if paths.loss_change > LINEAR * paths.linear_loss_change:
        reason += (
            f" The loss rises by {ratio(paths.loss_change, paths.linear_loss_change):.1f} times its linear part there, "
            "so try smaller radii, too."
        )
    return rho, reason


def verdict(rho: float, paths: Paths) -> str:
    """What follows from the measurement at the suggested ρ, in one sentence."""
    times = ratio(paths.logit, paths.functional)
    candidate = (
        "Functional-SAM is the candidate"
        if times > 1
        else "SAM changes the function more than the logits, so that fsam_variant=sam may serve as well"
    )
    return (
        f"The logit path is {times:.1f} times the functional one at ρ = {rho:.2g}: {candidate}; begin tuning at "
        f"fsam_rho={rho:.2g}."
    )


def table(found: dict[float, Paths]) -> str:
    lines: list[tuple[str, ...]] = [
        ("ρ", "rise", "on a plane", "functional path", "logit path", "ρ kept", "to nearest")
    ]
    for rho, paths in found.items():
        functional, logit = ratio(paths.functional, paths.gradient), ratio(paths.logit, paths.gradient)
        changes = (f"{each:.4f}" for each in (rho, paths.loss_change, paths.linear_loss_change))
        shares = (f"{each:.2f}" for each in (paths.stochastic_share, paths.nearest_share))
        lines.append((*changes, f"{functional:.3f}", f"{logit:.3f}", *shares))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [
            *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines),
            "rise: ℓ(θ+ε) − ℓ(θ) in nats; on a plane: its linear part ⟨g, ε⟩. The two paths are in units of ‖g‖.",
            "ρ kept: the share of ρ along ε that is left when θ+ε is rounded to the weights' format as this package",
            "rounds it; to nearest: the same for rounding to the nearest number, as weight.add_(ε) does.",
        ]
    )


def plot(found: dict[float, Paths], suggested: float | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    radii, each = list(found), list(found.values())
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    figure.suptitle("What a perturbation of radius ρ does")
    axes[0].plot(radii, [paths.loss_change for paths in each], "o-", color="C0", label="ℓ(θ+ε) − ℓ(θ)")
    axes[0].plot(radii, [paths.linear_loss_change for paths in each], "--", color="0.5", label="its linear part")
    axes[0].set(title="Rise of the loss", ylabel="nats")
    axes[0].set_yscale("symlog", linthresh=1e-4)
    axes[1].plot(
        radii, [ratio(paths.functional, paths.gradient) for paths in each], "s-", color="C2", label="functional path"
    )
    axes[1].plot(radii, [ratio(paths.logit, paths.gradient) for paths in each], "s-", color="C1", label="logit path")
    axes[1].set(title="Change of the gradient", yscale="log", ylabel="share of ‖g‖")
    axes[2].plot(radii, [paths.stochastic_share for paths in each], "^-", color="C4", label="rounded stochastically")
    axes[2].plot(radii, [paths.nearest_share for paths in each], "v--", color="C5", label="rounded to nearest")
    axes[2].set(title="What rounding leaves of ρ", ylabel="share along ε", ylim=(0, 1.1))
    for axis in axes:
        axis.set(xscale="log", xlabel="ρ")
        axis.grid(alpha=0.3)
    lines = [line for axis in axes for line in axis.get_lines()]
    if suggested is not None:
        marks = [axis.axvline(suggested, color="C3", alpha=0.5, label=f"suggested: {suggested:.2g}") for axis in axes]
        lines.append(marks[0])
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class _Measured(SystemExit):
    """Ends the script after the measurement, as `sys.exit()` in it would."""


class _Finder(TrainerCallback):
    """Trains plainly for `after` steps or to the end, then measures, reports and ends the script."""

    def __init__(self, trainer: FSAMMixin, after: int, batches: int, out: Path) -> None:
        self.trainer, self.after, self.batches, self.out = trainer, after, batches, out
        self.probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fsam_precondition:
            check_keeps_second_moment(self.trainer.optimizer)
        self.probe = Probe(self.trainer.fsam, self.batches)
        self.trainer.fsam.probes.append(self.probe)
        args.fsam_variant = "none"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        ends = control.should_training_stop
        if self.probe is None or (state.global_step < self.after and not ends):
            return
        found = measure(self.probe)
        if state.is_world_process_zero:
            suggested, reason = suggest(found)
            where = ", where the training ends" if ends else ""
            print(f"\n{table(found)}\n")
            print(
                f"no suggestion: {reason}" if suggested is None else f"{verdict(suggested, found[suggested])} {reason}"
            )
            print(f"measured after {state.global_step} plain steps{where}; it may differ at another --after")
            plot(found, suggested, self.out)
            print(f"plot: {self.out.resolve()}")
        raise _Measured(0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False


def main(argv: list[str] | None = None, prog: str = "python -m hf_fsam.rho") -> None:
    parser = script_parser(prog, __doc__)
    parser.add_argument("--after", type=int, default=100, help="plain optimizer steps before the measurement")
    parser.add_argument("--batches", type=int, default=2, help="batches to measure on")
    parser.add_argument("--out", type=Path, default=Path("rho.png"), help="file of the plot")
    call, cleanup = parse(parser, argv), Cleanup()
    script, args = call.script, call.options
    for name in ("after", "batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more.")
    with swapped(cleanup, call.defaults, call.given):
        train = FSAMMixin.train

        def find(trainer: Any, *rest: Any, **options: Any) -> Any:
            # The finder's short training must not touch the script's output folder, the hub or the script's trackers.
            trainer.args.eval_on_start = trainer.args.push_to_hub = False
            for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
                trainer.remove_callback(tracker)
            trainer.add_callback(_Finder(trainer, args.after, args.batches, args.out))
            return train(trainer, *rest, **options)

        with cleanup.replaced(FSAMMixin, "train", find):
            try:
                script.run(cleanup)
            except _Measured:
                return
    sys.exit(
        f"{script.name} ended without a step of a Trainer of transformers: nothing was measured. Give a script that "
        "trains with one."
    )


if __name__ == "__main__":
    main()
