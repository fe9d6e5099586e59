"""A batch of its own for each pass: whatever a pass does to its batch, the other pass does not see it."""

import copy
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

_UNCHANGEABLE = (str, bytes, Number, torch.dtype, torch.device, type(None))


def copied(batch: Any, name: str = "") -> Any:
    """`batch` with its tensors, arrays and containers copied, and what else is in it, a cache of keys and values say.

    Copying a batch takes no longer than reading it once.

    name: of this part of it, for an error.

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
    """What `batch` holds, by name, down its containers."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from parts(value, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from parts(value, f"{name}[{index}]")
    else:
        yield name, batch


def version(part: Any) -> int | None:
    """What changes when a tensor is written to in place."""
    return part._version if isinstance(part, Tensor) and not part.is_inference() else None


def alike(a: Any, b: Any) -> bool:
    """Whether two parts hold the same numbers, NaN where NaN is."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.to(a.device, a.dtype)
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, _UNCHANGEABLE):
        return bool(a == b)
    return type(a) is type(b)
