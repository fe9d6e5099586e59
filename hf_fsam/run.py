"""Run a training script as it is, with the steps of its trainers split.

    hf-fsam run run_clm.py --model_name_or_path gpt2 --output_dir out --fsam_rho 0.1
    hf-fsam run -m trl.scripts.sft --config sft.yaml --fsam_variant functional
    hf-fsam run --fsam_rho 0.1 train.py              # a script that does not parse its training arguments
    torchrun --nproc_per_node 8 -m hf_fsam run run_clm.py ...
    accelerate launch -m hf_fsam run run_clm.py ...
    deepspeed --module hf_fsam run run_clm.py ...

While the script runs, `transformers.Trainer`, `Seq2SeqTrainer`, `TrainingArguments` and `Seq2SeqTrainingArguments` are
those of hf_fsam, for the libraries that it imports, too. The `fsam_*` arguments are then arguments of the script, if it
parses its training arguments or reads them from a file. Given before the script, they are the defaults of its training
arguments. What the script prints, its exit status, signals and tracebacks are its own. A script that ends without a
training ends in an error.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import HfArgumentParser

from hf_fsam.arguments import FSAMArguments
from hf_fsam.cleanup import Cleanup
from hf_fsam.swap import ARGUMENTS, TRAINERS, swapped


@dataclass
class Script:
    """A script, or a module that is run as `python -m` does, with its arguments."""

    name: str
    arguments: list[str]
    is_module: bool = False

    def run(self, cleanup: Cleanup) -> None:
        """Run it as Python would: as `__main__`, with its own `sys.argv` and `sys.path`. Returns where it came to its
        end, also by `sys.exit(0)`."""
        folder = os.getcwd() if self.is_module else str(Path(self.name).resolve().parent)
        path = sys.path if sys.flags.safe_path else [folder, *sys.path[1:]]
        with (
            cleanup.replaced(sys, "argv", [self.name, *self.arguments]),
            cleanup.replaced(sys, "path", path),
        ):
            try:
                if self.is_module:
                    runpy.run_module(self.name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(self.name, run_name="__main__")
            except SystemExit as ended:
                if type(ended) is not SystemExit or ended.code or {"-h", "--help"} & set(self.arguments):
                    raise
            except BaseException:
                sys.excepthook = _of_script(sys.excepthook)  # it is called when all else has been left
                raise


@dataclass
class Call:
    """What the command was given.

    Attributes:
        defaults: `fsam_*` arguments before the script, which are the defaults of its training arguments.
        given: those behind it, which it has to read by itself.
        options: all others before the script.
    """

    script: Script
    defaults: FSAMArguments
    given: dict[str, Any]
    options: argparse.Namespace


def script_parser(prog: str, description: str | None) -> HfArgumentParser:
    """A parser of `PROG [--fsam_* ...] SCRIPT ARGS ...`."""
    parser = _fsam_parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher of DeepSpeed puts it first
    parser.add_argument(
        "--settings",
        type=Path,
        help="a JSON file of settings, each of which becomes an argument of the script, `--name=value`; with it, "
        "`hf-fsam run` saves the Trainer's state in its output folder at the end, which hf-fsam compare reads",
    )
    parser.add_argument("script", help="a training script that uses transformers' Trainer or a subclass of it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the script")
    return parser


def parse(parser: HfArgumentParser, argv: list[str] | None) -> Call:
    """What a :func:`script_parser` finds in `argv`. What it can't take ends the command, with status 2."""
    try:
        defaults, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    if not args.module and not Path(args.script).exists():
        parser.error(f"{args.script} does not exist: give the path of a training script, or -m and a module's name.")
    arguments = list(args.arguments)
    if args.settings is not None:
        try:
            settings = dict(json.loads(args.settings.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"--settings {args.settings}: give a JSON file of one object of names and values ({error}).")
        arguments = [*_flags(settings), *arguments]
    if args.local_rank is not None:
        arguments.insert(0, f"--local_rank={args.local_rank}")
    theirs = _fsam_parser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    theirs.set_defaults(**{each.name: None for each in fields(FSAMArguments)})
    found, _ = theirs.parse_known_args(arguments)
    given = {name: value for name, value in vars(found).items() if value is not None}
    return Call(Script(args.script, arguments, args.module), defaults, given, args)


def _fsam_parser(**options: Any) -> HfArgumentParser:
    return HfArgumentParser(FSAMArguments, **options)  # type: ignore[arg-type]


def _flags(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as the parsers of transformers and TRL read them. None is their default and is left out."""
    for name, value in settings.items():
        if value is not None:
            if isinstance(value, list):
                yield from (f"--{name}", *map(_text, value))
            else:  # in one piece, since a parser takes -1e-5 for an option
                yield f"--{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer():  # YAML's 2e3 may be a count of steps
        return str(int(value))
    return str(value)


def main(argv: list[str] | None = None, prog: str = "python -m hf_fsam.run") -> None:
    call, cleanup = parse(script_parser(prog, __doc__), argv), Cleanup()
    name = call.script.name
    if int(os.environ.get("RANK", "0")) == 0:
        names = " and ".join(", ".join([*TRAINERS, *ARGUMENTS]).rsplit(", ", 1))
        print(f"{prog}: in {name} the {names} of transformers split the step.", file=sys.stderr, flush=True)
    with swapped(cleanup, call.defaults, call.given) as trainings:
        call.script.run(cleanup)
    if call.options.settings is not None:
        trainings.save_states()
    if not trainings.begun:
        sys.exit(
            f"{prog}: {name} ended without training with a Trainer of transformers, so nothing was trained with a "
            "split step. A script that trains in a loop of its own, or in another process that it starts itself, "
            "can't be run like this: let it use transformers' Trainer, or start the other process with hf-fsam run."
        )


def _of_script(show: Callable[..., Any]) -> Callable[..., Any]:
    """An excepthook that shows a traceback from where the script begins."""

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> Any:
        here = traceback
        while here is not None and here.tb_frame.f_code is not Script.run.__code__:
            here = here.tb_next
        while here is not None and here.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            here = here.tb_next
        return show(kind, error.with_traceback(here), here)

    return hook


if __name__ == "__main__":
    main()
