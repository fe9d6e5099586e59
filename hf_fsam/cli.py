"""The command `hf-fsam`. A command's module is imported when it is called, so that `--help` needs no PyTorch."""

import sys

import hf_fsam
from hf_fsam.mistakes import did_you_mean

COMMANDS = ("run", "rho", "compare")

USAGE = """\
usage: hf-fsam COMMAND ...

  run SCRIPT [ARGS ...]   run a training script as it is, with the steps of its trainers split
  rho SCRIPT [ARGS ...]   suggest a radius for a training script from measurements on a few batches
  compare STUDY.yaml      train a recipe under several settings and seeds; report a table with intervals and a plot
  --version               print the version

`hf-fsam COMMAND --help` lists the options of a command."""


def main() -> None:
    argv = sys.argv[1:] or ["--help"]
    if argv[0].startswith("--local_rank=") and argv[1:]:  # the launcher of DeepSpeed puts it before all else
        argv[:2] = argv[1], argv[0]
    name, *rest = argv
    if name in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    if name == "--version":
        print(f"hf-fsam {hf_fsam.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(USAGE, file=sys.stderr)
        hint = did_you_mean(name, COMMANDS)
        print(f"hf-fsam: there is no command {name!r}; choose one of {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        sys.exit(2)
    if name == "run":
        from hf_fsam.run import main as command

        command(rest, prog=f"hf-fsam {name}")
        return
    try:
        if name == "compare":
            from hf_fsam.studies.compare import main as command
        else:
            from hf_fsam.rho import main as command
        command(rest, prog=f"hf-fsam {name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("yaml", "matplotlib", "scipy", "tqdm"):
            raise
        sys.exit(f"hf-fsam {name} needs {error.name}: pip install 'hf-fsam[studies]'")
