"""What is put in place for the time of a step, and taken back whatever happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cleanup:
    """What a step has to take back, until it has.

    A `finally` in a generator does not do: Ctrl-C on the way into its context manager's exit leaves it waiting for as
    long as the traceback is kept, as in a notebook, and it would run in the middle of some later step.
    """

    def __init__(self) -> None:
        self._due: list[Callable[[], object]] = []

    @contextmanager
    def after(self, undo: Callable[[], object]) -> Iterator[None]:
        """`undo` is called once, on the way out or by :meth:`run`, whichever comes first. It has to bear that there is
        nothing to take back yet, and, where it was interrupted itself, to be called again."""

        def due() -> None:
            undo()

        self._due.append(due)
        try:
            yield
        finally:
            if due in self._due:
                due()
                self._due.remove(due)

    @contextmanager
    def replaced(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        """`owner.name` is `value` inside. An attribute of the class shows again afterwards, one of its own returns."""
        had, own = name in vars(owner), vars(owner).get(name)

        def undo() -> None:
            if had:
                setattr(owner, name, own)
            elif name in vars(owner):
                delattr(owner, name)

        with self.after(undo):
            setattr(owner, name, value)
            yield

    def run(self) -> None:
        while self._due:
            try:
                self._due[-1]()
            except Exception:  # what it can't take back, it can't the next time, either
                self._due.pop()
                raise
            self._due.pop()
