"""What a user gave wrong: how a command ends for it, and which name may have been meant."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb

_PACKAGE = Path(__file__).parent


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """A question to end a message with, or nothing where no known name is close to `name`."""
    close = get_close_matches(str(name), [str(each) for each in known], cutoff=0.7)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """An error of a library's, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def told_in_one_line(prog: str, *folders: Path) -> Iterator[None]:
    """Ends the program with status 2, and with the message alone, for what this package or code in `folders` refuses.

    A refusal is what a `raise` statement there raises: its message is written for the user, and says what to change.
    What Python or a library raises may be a mistake in the program, so it keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        file = _raised_in(error)
        if file is None or not any(file.is_relative_to(folder) for folder in (_PACKAGE, *folders)):
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def refused_by_libraries() -> Iterator[None]:
    """Inside, libraries check the user's settings. What they refuse becomes a ValueError of this package."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError) as error:  # the last of a tracker that is not installed
        file = _raised_in(error)
        if file is None or file.is_relative_to(_PACKAGE):
            raise
        raise ValueError(" ".join(str(error).split())) from error


def _raised_in(error: BaseException) -> Path | None:
    """The file whose `raise` statement raised the error; None where no such statement did."""
    frames = extract_tb(error.__traceback__)
    return Path(frames[-1].filename) if frames and (frames[-1].line or "").startswith("raise ") else None
