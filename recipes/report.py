"""What a run shows while it trains, and what it leaves behind: model, results.json, curves.png and a model card."""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from data import DatasetArguments, on_hub
from huggingface_hub import EvalResult, ModelCard
from models import RECIPES
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_fsam import FSAMTrainer
from hf_fsam.mistakes import told_in_one_line
from hf_fsam.studies.masking import masked

PACKAGES = ("hf-fsam", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "tokenizers", "deepspeed")
Curve = tuple[list[float], list[float]]  # steps and values


class Progress(ProgressCallback):
    """Shows the latest losses beside the Trainer's progress bar, instead of printing a dict at every logging step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            for name, value in (logs or {}).items():
                if name.endswith("loss") and name != "train_loss":
                    self.shown[name] = f"{value:.3f}"
            self.training_bar.set_postfix(self.shown)


class Resumed(TrainerCallback):
    """Remembers how many entries of the history are from before the training was resumed."""

    entries = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.entries = len(state.log_history)


def show_progress(trainer: FSAMTrainer) -> None:
    """Also has the trainer remember where it was resumed, for `write_report`."""
    trainer.add_callback(Resumed)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)


def quiet(args: TrainingArguments) -> None:
    """Lets only the main process show progress bars, and silences warnings of libraries."""
    for library in ("torch", "transformers"):
        warnings.filterwarnings("ignore", category=Warning, module=library)
    if args.process_index != 0 or args.disable_tqdm:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def write_report(
    trainer: FSAMTrainer,
    arguments: dict[str, Any],
    metrics: dict[str, float],
    started: float,
    extra: dict[str, Any],
    card: dict[str, Any],
    task: str,
) -> dict[str, Any]:
    """Saves the model with its tokenizer, then the main process writes the report. Returns what results.json holds.

    Args:
        arguments: the recipe's dataclasses by name.
        started: `time.perf_counter()` at the start of the run.
        extra: further results, of this recipe alone.
        card: arguments of `Trainer.create_model_card`.
        task: what the hub calls the task.
    """
    trainer.save_model()  # by all processes: where the weights are sharded, each has a part of them
    results = write_results(trainer, arguments, metrics, started, extra)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        plot_curves(trainer.state.log_history, folder / "curves.png", f"Losses of {folder.resolve().name}")
        trainer.create_model_card(**card)
        add_results(folder, task, arguments["data"], metrics)
    return results


def write_results(
    trainer: FSAMTrainer, arguments: dict[str, Any], metrics: dict[str, float], started: float, extra: dict[str, Any]
) -> dict[str, Any]:
    """The main process writes results.json. Returns what it holds. The arguments are those of :func:`write_report`."""
    history = trainer.state.log_history
    results = {
        "metrics": metrics,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "parameters": sum(map(size, trainer.model.parameters())),
        "trainable_parameters": sum(size(weight) for weight in trainer.model.parameters() if weight.requires_grad),
        "wall_seconds": time.perf_counter() - started,
        "train_seconds": training_seconds(history[trainer.pop_callback(Resumed).entries :]),
        **extra,
        "arguments": {name: as_dict(each) for name, each in arguments.items()},
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(trainer.args),
        "history": history,
    }
    if trainer.is_world_process_zero():
        text = json.dumps(results, indent=2, default=str)
        Path(trainer.args.output_dir, "results.json").write_text(text + "\n", encoding="utf-8")
    return results


def add_results(folder: Path, task: str, data: DatasetArguments, metrics: dict[str, float]) -> None:
    """Puts the metrics into the model card, and the data set only where it is one of the hub's."""
    card = ModelCard.load(folder / "README.md")
    name = data.dataset if on_hub(data.dataset) else Path(data.dataset).name
    card.data.model_name = folder.resolve().name
    card.data.datasets = [name] if on_hub(data.dataset) else None
    card.data.eval_results = [
        EvalResult(task, name, name, metric.removeprefix("eval_"), value, dataset_config=data.dataset_config)
        for metric, value in shown(metrics).items()
    ]
    card.save(folder / "README.md")


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """Without how long they took."""
    return {name: value for name, value in metrics.items() if not name.endswith(("_second", "_runtime", "epoch"))}


def size(weight: torch.nn.Parameter) -> int:
    return getattr(weight, "ds_numel", weight.numel())  # under ZeRO-3 the weight itself is empty


def as_dict(arguments: Any) -> dict[str, Any]:
    """A dict of the arguments in which tokens and passwords are masked."""
    return masked(arguments.to_dict() if isinstance(arguments, TrainingArguments) else asdict(arguments))


def main(script: str, run: Callable[[list[str]], dict[str, Any]]) -> None:
    """A recipe's whole program: `run` with the command line, and what it found."""
    with told_in_one_line(script, RECIPES):
        print_summary(run(sys.argv[1:]))
    leave_group()


def print_summary(results: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        for name, value in shown(results["metrics"]).items():
            print(f"{name:32} {value:.4f}")
        print(f"{'seconds':32} {results['wall_seconds']:.1f}")
        print(f"{'written to':32} {results['arguments']['training']['output_dir']}")


def leave_group() -> None:
    """Leaves the process group at the end of a script.

    The process aborts if a thread of gloo returns a tensor to Python while the interpreter shuts down (torch 2.13), and
    DeepSpeed keeps these threads alive. So they get a second to return what they still hold.
    """
    state = PartialState()
    gloo = state.backend == "gloo"
    state.destroy_process_group()
    if gloo:
        time.sleep(1)


def training_seconds(history: list[dict[str, float]]) -> float:
    """The time that the optimizer steps took: the Trainer's training time without the evaluations in it.

    history: since the training was begun or resumed, as the Trainer's clock is.
    """
    end = next((index for index, entry in enumerate(history) if "train_runtime" in entry), None)
    if end is None:
        return 0.0
    evaluations = (value for entry in history[:end] for name, value in entry.items() if name.endswith("_runtime"))
    return history[end]["train_runtime"] - sum(evaluations)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(args: TrainingArguments) -> dict[str, Any]:
    """What one needs to judge a measured time by, without the host's name or a path."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": args.world_size,
    }


def plot_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Plots the training loss and every validation loss over the steps."""
    lines = [("training", "0.7", "", curve(history, "loss"))]
    keys = sorted({key for entry in history for key in entry if key.startswith("eval") and key.endswith("loss")})
    for index, key in enumerate(keys):
        # eval_loss → validation, eval_old_loss → validation old
        label = " ".join(["validation", *key.split("_")[1:-1]])
        lines.append((label, f"C{index}", "o", curve(history, key)))
    draw(lines, path, title, "loss (nats per token or example)")


def draw(lines: list[tuple[str, str, str, Curve]], path: Path, title: str, ylabel: str) -> None:
    """lines: label, colour, marker and points of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for label, color, marker, (steps, values) in lines:
        if steps:
            axes.plot(steps, values, color=color, marker=marker, markersize=3, label=label)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def curve(history: list[dict[str, float]], key: str) -> Curve:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]
