"""The entry point of the image: runs the recipe that a configuration is for, on every visible GPU."""

import os
import shlex
import sys
from pathlib import Path

import yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Keys that the configurations of one recipe have and those of the other can't have: the model to make or to start from.
TELLTALES = {"pretrain.py": ("architecture", "model_config"), "finetune.py": ("model_name_or_path",)}

USAGE = """\
usage: docker run --rm --gpus all --ipc=host -v "$PWD/outputs:/app/outputs" IMAGE CONFIG.yaml [--name value ...]

Everything after the configuration is passed to its recipe; `CONFIG.yaml --help` lists the arguments. With several GPUs
there is one process for each. Results appear in outputs/, and `-v hf-fsam-cache:/cache` keeps downloads and prepared
data.
"""


TRL = ("sft", "dpo")  # `method: sft`


def recipe_of(config: Path) -> str:
    """The script that `config` is for.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not the configuration of exactly one recipe.
    """
    if not config.is_file():
        raise FileNotFoundError(f"The configuration {str(config)!r} does not exist.")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    names = settings if isinstance(settings, dict) else {}
    if names.get("method") in TRL:
        return f"{names['method']}.py"
    fitting = [script for script, telltales in TELLTALES.items() if any(name in names for name in telltales)]
    if len(fitting) != 1:
        choices = "; ".join(f"{' or '.join(telltales)} for {script}" for script, telltales in TELLTALES.items())
        raise ValueError(
            f"{config} does not tell which recipe it is for. Let it name one of: {choices}; method: {' or '.join(TRL)}."
        )
    return fitting[0]


def command(argv: list[str], gpus: int) -> list[str]:
    """The command line to execute for `argv = [CONFIG.yaml, ...]`."""
    script = str(RECIPES / recipe_of(Path(argv[0])))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    return [sys.executable, *launcher, script, *argv]


def usage() -> str:
    """How to call the image, and the configurations that are in it."""
    listed = [f"  {path.relative_to(RECIPES.parent)}" for path in sorted(RECIPES.glob("configs/*.yaml"))]
    return "\n".join([USAGE, "configurations:", *listed])


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    import torch  # here, since it takes seconds that the usage message does not need

    try:
        line = command(argv, torch.cuda.device_count())
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"{error}\n\n{usage()}")
    if os.path.isdir("outputs") and not os.access("outputs", os.W_OK):
        sys.exit(
            f"outputs/ cannot be written by user {os.getuid()}. Make the folder before the container is started, or "
            'build the image with --build-arg UID="$(id -u)".'
        )
    print("+", shlex.join(line), flush=True)
    os.execv(line[0], line)  # replaces this process, so that Ctrl-C and the exit status are the training's


if __name__ == "__main__":
    main(sys.argv[1:])
