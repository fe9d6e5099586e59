"""Keeps tokens, passwords and keys out of what is written and printed, as `TrainingArguments.to_dict` does:
`hub_token: hf_…` becomes `hub_token: <HUB_TOKEN>`."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

_SECRET = re.compile(r"(^|[_.-])(token|api_?key|access_?key(_id)?|secret(_?key)?|private_?key|passw(or)?d|passphrase)$")


def is_secret(name: str) -> bool:
    """Whether a setting of this name is a secret: a name that ends in `_token` (as for the Trainer), an API key, a
    password."""
    return _SECRET.search(name.lower().replace("-", "_")) is not None


def masked(value: Any) -> Any:
    """A copy of settings in which secrets are masked, at any depth."""
    if isinstance(value, dict):
        return {name: _mask(str(name)) if is_secret(str(name)) else masked(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each) for each in value]
    return value


def masked_command(words: Sequence[str]) -> list[str]:
    """A command line in which secrets are masked: those of `--name value`, `--name=value` and `NAME=value`, also in a
    command that is an argument of it."""
    found: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        before = found[-1] if found else ""
        if before.startswith("-") and "=" not in before and is_secret(before):
            found.append(_mask(before))
        elif equals and not re.search(r"\s", name) and is_secret(name):
            found.append(f"{name}={_mask(name)}")
        else:
            found.append(_masked_word(word))
    return found


def _masked_word(word: str) -> str:
    if not re.search(r"\s", word):
        return word
    try:
        words = shlex.split(word)
    except ValueError:  # its quotes do not close, so this is no command
        return word
    hidden = masked_command(words)
    return word if hidden == words else shlex.join(hidden)


def without_secrets(text: str, settings: Any) -> str:
    """Returns `text` with the values of the secrets in `settings` masked."""
    for value, mask in sorted(_secrets(settings), key=lambda each: len(each[0]), reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", mask.replace("\\", r"\\"), text)
    return text


def _secrets(settings: Any) -> Iterator[tuple[str, str]]:
    if isinstance(settings, dict):
        for name, value in settings.items():
            if is_secret(str(name)):
                values = value if isinstance(value, list) else [value]
                yield from ((str(each), _mask(str(name))) for each in values if each and not isinstance(each, bool))
            else:
                yield from _secrets(value)
    elif isinstance(settings, list | tuple):
        for each in settings:
            yield from _secrets(each)


def _mask(name: str) -> str:
    return f"<{name.lstrip('-').upper()}>"
