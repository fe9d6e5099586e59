"""A recipe's settings come from one YAML file and from the command line, through the same `HfArgumentParser`."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_fsam.studies.masking import masked

CONFIGS = Path(__file__).parent / "configs"


class RecipeParser(HfArgumentParser):
    """An `HfArgumentParser` that raises an error where argparse prints two hundred Trainer arguments and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `python recipes/{self.prog} --help` lists every argument with its type.")


def parse(dataclasses: tuple[type, ...], argv: list[str], script: str) -> tuple[Any, ...]:
    """Returns one instance per dataclass, from `argv = [CONFIG.yaml, --name, value, ...]`. Later values win.

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
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(unknown_argument(unknown[0], parser, "on the command line"))
    return tuple(parsed)


def yaml_to_argv(path: Path, parser: HfArgumentParser) -> list[str]:
    """`{fsam_rho: 0.05, text_columns: [a, b]}` → `["--fsam_rho=0.05", "--text_columns", "a", "b"]`."""
    if not path.is_file():
        raise FileNotFoundError(f"The configuration {str(path)!r} does not exist: give the path of a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:  # its own message repeats the line, which may hold a password
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path} can't be read as YAML: {error.problem}, in line {line}. Correct that line.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not `name: value` lines.")
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


def unknown_argument(name: str, parser: HfArgumentParser, where: str) -> str:
    bare = name.split("=")[0].lstrip("-").replace("-", "_")
    close = get_close_matches(bare, {action.dest for action in parser._actions}, n=3)
    cure = f"Did you mean {' or '.join(close)}?" if close else f"`{parser.prog} --help` lists the arguments."
    return f"{bare!r} {where} is not an argument of {parser.prog}. {cure}"
