"""What is put in place for the time of a step is taken back, whatever happens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cleanup:
    """A list of what a step has yet to take back.

    A `finally` in a generator is not enough. If Ctrl-C strikes just before its context manager's exit, the generator
    waits for as long as somebody keeps the traceback, as a notebook does, and then runs in the middle of a later step.
    """

    def __init__(self) -> None:
        self._due: list[Callable[[], object]] = []

    @contextmanager
    def after(self, undo: Callable[[], object]) -> Iterator[None]:
        """`undo` is called once: on the way out, or by :meth:`run`, whichever comes first. It must work where there is
        nothing to take back yet, and be called again where it was interrupted."""

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
        """`owner.name` is `value` inside. Afterwards it is what it was: the owner's own attribute, or its class's."""
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
        """Take back everything, the latest first."""
        while self._due:
            try:
                self._due[-1]()
            except Exception:  # it would not succeed the next time, either
                self._due.pop()
                raise
            self._due.pop()
