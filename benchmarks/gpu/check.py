"""What a check is, and the process that runs one."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        what: was measured.
        measured, expected: for people to read; `expected` was written before anything was measured.
        ok: whether it is as expected; None where nothing was expected.
    """

    what: str
    measured: Any
    expected: str = ""
    ok: bool | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """One check, in a process of its own.

    Attributes:
        rows: measures, (toy); toy: at a size that a CPU takes in seconds. Rows that it has yielded stay, whatever then
            happens to it.
        limit: seconds that it may take.
        needs: packages that it does not run without.
        cpu: there is something to be seen of it on a CPU.
    """

    rows: Callable[[bool], Iterator[Row]]
    limit: int
    needs: tuple[str, ...] = ()
    cpu: bool = True

    @functools.cached_property
    def about(self) -> str:
        """The first line of what `rows` says of itself, or what of it a partial function is given."""
        if isinstance(self.rows, functools.partial):
            return f"{(self.rows.func.__doc__ or '').splitlines()[0]} {' '.join(map(str, self.rows.args))}"
        return (self.rows.__doc__ or "").splitlines()[0]


def main(module: str, name: str, out: str, toy: str) -> None:
    """The check `name` of `module`'s CHECKS: a JSON line in the file `out` for each row, as soon as it is there."""
    check: Check = importlib.import_module(module).CHECKS[name]
    with Path(out).open("w", encoding="utf-8") as file:
        for row in check.rows(toy == "toy"):
            print(row, flush=True)
            print(json.dumps(dataclasses.asdict(row)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
