"""The entry point of the image: runs a command, or the recipe that a configuration is for, on every visible GPU."""

import os
import shlex
import sys
from pathlib import Path

from hf_fsam.studies.masking import masked_command

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

USAGE = """\
usage: docker run --rm --gpus all --ipc=host -v "$PWD/outputs:/app/outputs" IMAGE CONFIG.yaml [--name value ...]
       docker run ... IMAGE COMMAND [argument ...]

A configuration starts its recipe, with everything after it; `CONFIG.yaml --help` lists the arguments. With several GPUs
there is one process for each. Anything else is a command, as `hf-fsam compare recipes/studies/core.yaml`. Results
appear in outputs/, and `-v hf-fsam-cache:/cache` keeps downloads and prepared data. More is in docs/docker.md.
"""


def recipe_of(config: Path) -> str:
    """The script that `config` is for.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no YAML file of settings, or has none by which a recipe is known.
    """
    from config import script_for  # here, since it takes seconds that nothing else needs

    from hf_fsam.studies.study import load_yaml

    if not config.is_file():
        raise FileNotFoundError(f"The configuration {str(config)!r} does not exist.")
    script = script_for(load_yaml(config))
    if script is None:
        raise ValueError(
            f"{config} does not tell which recipe it is for. Let it name one of: architecture or model_config for "
            "pretrain.py; model_name_or_path for finetune.py; method: sft or dpo. A study is started by "
            f"`hf-fsam compare {config}`."
        )
    return script


def is_config(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml")


def recipe_command(argv: list[str], gpus: int) -> list[str]:
    """The command line to execute for `argv = [CONFIG.yaml, ...]`."""
    script = str(RECIPES / recipe_of(Path(argv[0])))
    several = gpus > 1 or os.environ.keys() & {"NNODES", "PROCESSES"}
    launcher = str(RECIPES / "launch" / "torchrun.sh") if several else sys.executable
    # On SIGTERM, which `docker stop` sends, the Trainer saves a checkpoint. The user's own value comes later and wins.
    return [launcher, script, argv[0], "--enable_jit_checkpoint=true", *argv[1:]]


def usage() -> str:
    """How to call the image, and the configurations that are in it."""
    listed = [f"  {path.relative_to(RECIPES.parent)}" for path in sorted(RECIPES.glob("configs/*.yaml"))]
    return "\n".join([USAGE, "configurations:", *listed])


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    line = argv
    if is_config(argv[0]):
        import torch

        try:
            line = recipe_command(argv, torch.cuda.device_count())
        except (OSError, ValueError) as error:
            sys.exit(f"{error}\n\n{usage()}")
        if os.path.isdir("outputs") and not os.access("outputs", os.W_OK):
            sys.exit(
                f"outputs/ cannot be written by user {os.getuid()}. Make the folder before the container is started, "
                'and start it as the folder\'s owner: docker run --user "$(id -u):$(id -g)" ...'
            )
    print("+", shlex.join(masked_command(line)), flush=True)
    try:
        os.execvp(line[0], line)  # replaces this process, so that signals and the exit status are the training's
    except OSError as error:
        sys.exit(f"{line[0]!r} is neither a configuration, which ends in .yaml, nor a command: {error}.\n\n{usage()}")


if __name__ == "__main__":
    main(sys.argv[1:])
