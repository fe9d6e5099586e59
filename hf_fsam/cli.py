"""The command `hf-fsam`."""

import sys

USAGE = """\
usage: hf-fsam COMMAND ...

  compare STUDY.yaml      variants, radii and seeds over one recipe: a table with intervals, a plot
  rho SCRIPT [ARGS ...]   a radius for your own training script, from a few batches

hf-fsam COMMAND --help says more."""


def main() -> None:
    name, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    try:
        if name == "compare":
            from hf_fsam.studies.compare import main as compare

            compare(argv, prog="hf-fsam compare")
        elif name == "rho":
            from hf_fsam.rho import main as rho

            rho(argv, prog="hf-fsam rho")
        else:
            print(USAGE, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
            sys.exit(0 if name in ("-h", "--help") else 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("yaml", "matplotlib", "scipy", "tqdm"):
            raise
        sys.exit(f"hf-fsam {name} needs {error.name}: pip install 'hf-fsam[studies]'")
