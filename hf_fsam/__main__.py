"""`python -m hf_fsam` is the command `hf-fsam`."""

from hf_fsam.cli import main

if __name__ == "__main__":
    main()
