"""What the trainers of other libraries count and collect of a batch in `compute_loss`, where a split step is twice.

Read in TRL 1.16 and sentence-transformers 6.2.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

# By the library whose trainers have them. All else in TRL's that is a number is a count, too.
_NAMED = {
    "trl": ("_metrics", "_stored_metrics", "_entropy_window_stats"),
    "sentence_transformers": ("accum_loss_components",),
}


class Counters:
    """How the counts of a trainer stand when this is made. Lists in its dictionaries only grow there."""

    def __init__(self, trainer: Trainer) -> None:
        libraries = {base.__module__.partition(".")[0] for base in type(trainer).__mro__} & _NAMED.keys()
        named = {name for library in libraries for name in _NAMED[library]}
        self._attributes = trainer.__dict__
        self._stood = {
            name: _mark(value)
            for name, value in self._attributes.items()
            if name in named or ("trl" in libraries and _is_count(value))
        }

    def restore(self) -> None:
        self._attributes.update({name: _back_to(mark) for name, mark in self._stood.items()})


def _is_count(value: Any) -> bool:
    """Neither a flag, nor a loss's own weight, nor a memory that it has."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad and not isinstance(value, nn.Parameter)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mark(counted: Any) -> tuple[Any, Any]:
    """What it is, and how it stands. Lists are long: their length is enough."""
    if isinstance(counted, dict):
        return counted, {key: _mark(value) for key, value in counted.items()}
    if isinstance(counted, list):
        return counted, len(counted)
    return counted.clone() if isinstance(counted, Tensor) else counted, None


def _back_to(mark: tuple[Any, Any]) -> Any:
    counted, stood = mark
    if isinstance(counted, dict):
        for key in counted.keys() - stood.keys():
            del counted[key]
        counted.update({key: _back_to(value) for key, value in stood.items()})
    elif isinstance(counted, list):
        del counted[stood:]
    return counted
