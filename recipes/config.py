"""A recipe's settings come from one YAML file and from the command line, through the same `HfArgumentParser`."""

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, IntervalStrategy, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from transformers.utils import is_liger_kernel_available

from hf_fsam.mistakes import did_you_mean, first_line, refused_by_libraries
from hf_fsam.studies.masking import masked
from hf_fsam.studies.study import load_yaml

CONFIGS = Path(__file__).parent / "configs"
SCRIPTS = ("pretrain.py", "finetune.py", "sft.py", "dpo.py")


class RecipeParser(HfArgumentParser):
    """An `HfArgumentParser` that raises an error where argparse prints two hundred Trainer arguments and exits."""

    def error(self, message: str) -> NoReturn:
        value, *choices = re.findall(r"'(.*?)'", message) or [""]
        hint = did_you_mean(value, choices)
        raise ValueError(f"{message}.{hint} `{self.prog} --help` lists every argument with its type.")


def parse(dataclasses: tuple[type, ...], argv: list[str], script: str, metrics: Sequence[str] = ()) -> tuple[Any, ...]:
    """Returns one instance per dataclass, from `argv = [CONFIG.yaml, --name, value, ...]`. Later values win.

    Args:
        metrics: the names by which the recipe can tell the best model, where `*` stands for any text.

    Raises:
        FileNotFoundError: the YAML file does not exist.
        ValueError: an argument is unknown, or its value is of the wrong type. The message names it.
    """
    usage = f"{script} CONFIG.yaml [--name value ...]"
    parser = RecipeParser(dataclasses, prog=script, usage=usage, allow_abbrev=False)
    if argv[:1] in (["-h"], ["--help"]):
        parser.print_help()
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
        raise ValueError(f"The first argument of {script} is a YAML file. In recipes/configs there are: {known}.")
    # The values of the file become command line arguments in front of the user's. So types and choices are checked in
    # one way (YAML reads 1e-3 as a string), and one rule says which value wins.
    arguments = yaml_to_argv(Path(argv[0]), parser) + argv[1:]
    try:
        with refused_by_libraries():
            *parsed, unknown = parser.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
    except FileNotFoundError as error:  # of a JSON file that an argument names
        raise FileNotFoundError(f"{error.filename!r} does not exist: give the path of a file that does.") from error
    if unknown:
        raise ValueError(unknown_argument(unknown[0], parser, "on the command line"))
    if any(getattr(args, "use_liger_kernel", False) for args in parsed) and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True needs a package that is not installed: pip install liger-kernel, for a GPU. Or "
            "leave it out: with fsam_fused_head, the default, a language model makes no logits in training either."
        )
    for args in parsed:
        if isinstance(args, TrainingArguments):
            check_folders(args)
            check_trackers(args)
            check_schedule(args)
            check_best_model(args, metrics)
    return tuple(parsed)


def check_folders(args: TrainingArguments) -> None:
    """Finds out before the data is prepared. `resume_from_checkpoint: true` becomes the newest one in output_dir."""
    folder, checkpoint = Path(args.output_dir), args.resume_from_checkpoint
    if folder.is_file():
        raise ValueError(f"output_dir={args.output_dir!r} is a file: give a folder.")
    if checkpoint is None:
        return
    if checkpoint.lower() == "true":
        args.resume_from_checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if args.resume_from_checkpoint is None or not Path(args.resume_from_checkpoint).is_dir():
        found = ", ".join(sorted(map(str, folder.glob("checkpoint-*")))) or "none"
        raise FileNotFoundError(
            f"resume_from_checkpoint={checkpoint!r}: there is no such checkpoint. In output_dir there are: {found}."
        )


def check_trackers(args: TrainingArguments) -> None:
    """The Trainer would find out when the data is prepared."""
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ValueError(f"report_to={args.report_to!r}: {first_line(error)}.") from error


def check_schedule(args: TrainingArguments) -> None:
    """The Trainer would find out when the data is prepared, and name neither of the arguments."""
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=0,
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} does not suit "
            f"lr_scheduler_type={args.lr_scheduler_type.value!r}: {first_line(error)}."
        ) from error


def refuse_checkpoints(args: TrainingArguments) -> None:
    """For the recipes that test the weights of the best evaluations, which no checkpoint holds."""
    if args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"save_strategy='{args.save_strategy.value}': this recipe needs its whole training, because no checkpoint "
            "holds the weights of its best evaluation. Set save_strategy to 'no'."
        )
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r}: this recipe needs its whole training, because no "
            "checkpoint holds the weights of its best evaluation. Leave it out."
        )


def evaluate_each_epoch(args: TrainingArguments) -> None:
    """For the recipes whose early stopping chooses among the epochs, whatever `eval_strategy` says."""
    if args.eval_delay:
        raise ValueError(f"eval_delay={args.eval_delay}: this recipe evaluates after every epoch. Leave it out.")
    args.eval_strategy = IntervalStrategy.EPOCH


def check_best_model(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """The Trainer would find out at its first evaluation, or never."""
    if args.load_best_model_at_end and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "load_best_model_at_end=True needs evaluations to tell the best, and there are none with "
            "eval_strategy='no': set eval_strategy and save_strategy to 'steps' or 'epoch', or leave it out."
        )
    if args.metric_for_best_model is None or not metrics:
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if not any(fnmatchcase(name, each) for each in metrics):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is none of the metrics, which are "
            f"{', '.join(metrics)}.{did_you_mean(name, metrics)}"
        )
    if name.endswith("perplexity"):
        args.greater_is_better = False  # the Trainer takes all but a loss for better where it is greater


def yaml_to_argv(path: Path, parser: HfArgumentParser) -> list[str]:
    """`{fsam_rho: 0.05, text_columns: [a, b]}` → `["--fsam_rho=0.05", "--text_columns", "a", "b"]`."""
    if not path.is_file():
        hint = did_you_mean(path.name, (each.name for each in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"The configuration {str(path)!r} does not exist: give the path of a YAML file.{hint}")
    values = load_yaml(path)
    if values.keys() & {"arms", "studies"}:
        raise ValueError(f"{path} is a study: hf-fsam compare {path}")
    script = script_for(values)
    if parser.prog in SCRIPTS and script not in (None, parser.prog):
        raise ValueError(f"{path} is for another script than {parser.prog}: python recipes/{script} {path}")
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in values.items():
        if name not in actions:
            raise ValueError(unknown_argument(str(name), parser, f"in {path}"))
        if value is None:  # `name:` and `name: null` ask for the default
            continue
        if isinstance(value, list):
            if actions[name].nargs != "+":
                shown = masked({name: value})[name]
                raise ValueError(f"{name}={shown!r} in {path} is a list, but {name} takes one value.")
            arguments += [f"--{name}", *map(str, value)]
        else:
            if value is False and "no" in (actions[name].choices or ()):
                value = "no"  # YAML reads the no of `save_strategy: no` as false
            # With `=`, because argparse takes -1e-3 by itself for an option.
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def script_for(values: dict[str, Any]) -> str | None:
    """The recipe that a configuration is for, by keys that those of the other recipes don't have. None: it has none."""
    if "method" in values:
        script = f"{values['method']}.py"
        return script if script in SCRIPTS else None
    if "model_name_or_path" in values:
        return "finetune.py"
    return "pretrain.py" if {"architecture", "model_config"} & values.keys() else None


def unknown_argument(name: str, parser: HfArgumentParser, where: str) -> str:
    bare = name.split("=")[0].lstrip("-").replace("-", "_")
    hint = did_you_mean(bare, sorted({action.dest for action in parser._actions}))
    cure = hint or f" `{parser.prog} --help` lists the arguments."
    return f"{bare!r} {where} is not an argument of {parser.prog}.{cure}"
