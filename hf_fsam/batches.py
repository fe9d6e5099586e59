"""A batch for each pass, so that one pass does not see what the other does to its batch."""

import copy
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MISSING = object()
_UNCHANGEABLE = (str, bytes, Number, torch.dtype, torch.device, type(None))


def copied(batch: Any, name: str = "") -> Any:
    """A deep copy of `batch`, of its tensors, arrays and containers, and of what else is in it (a cache of keys and
    values, say).

    name: where in the whole batch this part is, for an error message.

    Raises:
        TypeError: it holds something that cannot be copied.
    """
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, _UNCHANGEABLE):
        return batch
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, Mapping):
        result: Any = copy.copy(batch)  # its class, and what it holds beside its items
        for key, value in batch.items():
            result[key] = copied(value, f"{name}[{key!r}]")
        return result
    if isinstance(batch, list | tuple):
        parts = [copied(value, f"{name}[{index}]") for index, value in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    try:
        return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"the batch's {name or 'value'} is a {type(batch).__name__} that cannot be copied ({error}), so both "
            "passes of a step would share it. Leave it out in the data collator, or set fsam_variant='none'."
        ) from error


def parts(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that `batch` and the containers in it hold, each with a name."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from parts(value, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from parts(value, f"{name}[{index}]")
    else:
        yield name, batch


def version(part: Any) -> int | None:
    """A number that changes when the tensor is written to in place; None for what has none."""
    return part._version if isinstance(part, Tensor) and not part.is_inference() else None


class Snapshot:
    """What a batch holds, so that a later change to it is seen. Nothing is copied."""

    def __init__(self, batch: Any) -> None:
        self._parts = {name: (part, version(part)) for name, part in parts(batch)}

    def change(self, batch: Any) -> str | None:
        """The name of a part that `batch` holds otherwise; None where there is none."""
        given = dict(parts(batch))
        for name, (part, stood) in self._parts.items():
            other = given.get(name, _MISSING)
            if version(part) != stood or not (other is part or alike(part, other)):
                return name
        return next((name for name in given if name not in self._parts), None)


def alike(a: Any, b: Any) -> bool:
    """Whether two parts hold the same numbers; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.to(a.device, a.dtype)
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.dtype.hasobject:
            return a.shape == b.shape and all(x is y or alike(x, y) for x, y in zip(a.flat, b.flat, strict=True))
        return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, _UNCHANGEABLE):
        return bool(a == b)
    return type(a) is type(b)
