"""Defines a check, and is the process that runs one."""

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
    """One measurement.

    Attributes:
        what: what was measured.
        measured, expected: for people to read. `expected` was written before anything was measured.
        ok: whether the value is as expected. None: nothing was expected.
    """

    what: str
    measured: Any
    expected: str = ""
    ok: bool | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own.

    Attributes:
        rows: measures and yields rows. Its argument `toy` asks for a size that a CPU takes seconds for. Rows that were
            yielded are kept, whatever happens to the check afterwards.
        limit: the seconds that it may take.
        needs: the packages that it needs.
        cpu: whether it shows something on a CPU.
        timed: whether it measures time, so that nothing may run beside it.
    """

    rows: Callable[[bool], Iterator[Row]]
    limit: int
    needs: tuple[str, ...] = ()
    cpu: bool = True
    timed: bool = False

    @functools.cached_property
    def about(self) -> str:
        """The first line of the docstring of `rows`, and the arguments of a partial function."""
        if isinstance(self.rows, functools.partial):
            return f"{(self.rows.func.__doc__ or '').splitlines()[0]} {' '.join(map(str, self.rows.args))}"
        return (self.rows.__doc__ or "").splitlines()[0]


def main(module: str, name: str, out: str, toy: str) -> None:
    """Runs the check `name` of CHECKS in `module`, and writes each row to the file `out` at once, as a line of JSON."""
    check: Check = importlib.import_module(module).CHECKS[name]
    with Path(out).open("w", encoding="utf-8") as file:
        for row in check.rows(toy == "toy"):
            print(row, flush=True)
            print(json.dumps(dataclasses.asdict(row)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
