"""The command `hf-fsam`. A command's module is imported when it is called, so that `--help` needs no PyTorch."""

import sys

import hf_fsam

COMMANDS = ("compare", "rho")

USAGE = """\
usage: hf-fsam COMMAND ...

  compare STUDY.yaml      train a recipe under several settings and seeds; report a table with intervals and a plot
  rho SCRIPT [ARGS ...]   suggest a radius for your own training script from measurements on a few batches
  --version               print the version

`hf-fsam COMMAND --help` lists the options of a command."""


def main() -> None:
    name, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    if name == "--version":
        print(f"hf-fsam {hf_fsam.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(USAGE, file=sys.stderr)
        print(f"hf-fsam: there is no command {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    try:
        if name == "compare":
            from hf_fsam.studies.compare import main as command
        else:
            from hf_fsam.rho import main as command
        command(argv, prog=f"hf-fsam {name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("yaml", "matplotlib", "scipy", "tqdm"):
            raise
        sys.exit(f"hf-fsam {name} needs {error.name}: pip install 'hf-fsam[studies]'")
