"""The stand-in accelerator of `device.cpp` under the name `npu`. torch leaves that name free, and accelerate and
transformers train on the device that has it.

Importing this module changes torch for the whole process, and has to come before transformers.
"""

import ctypes
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import NamedTuple

import torch

from tests.second_device import npu
from tests.second_device.compiled import load


class Wait(NamedTuple):
    """Why the host would wait for the device, and where.

    Attributes:
        inner: why, and the innermost line of Python.
        own: the innermost line of hf_fsam's.
    """

    inner: str
    own: str


_waits: Counter[Wait] | None = None


@contextmanager
def host_waits() -> Iterator[Counter[Wait]]:
    """How often the host would wait for the device inside."""
    global _waits
    _waits = Counter()
    try:
        yield _waits
    finally:
        _waits = None


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _tell(what: bytes, op: bytes) -> None:
    if _waits is not None:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_stack()[:-1]]
        own = [line for line in lines if "/hf_fsam/" in line[0]]
        _waits[Wait(f"{what.decode()} ({op.decode()}) at {_last(lines)}", _last(own))] += 1


def _last(lines: list[tuple[str, int | None]]) -> str:
    return (
        "{}:{}".format(*lines[-1]) if lines else "no line"
    )  # as in a backward pass, which runs in a thread of its own


def install() -> None:
    load()
    torch.ops.second_device.register_hooks()
    torch.ops.second_device.listen(ctypes.cast(_tell, ctypes.c_void_p).value)
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", npu)
    torch.utils.generate_methods_for_privateuse1_backend()
    npu.__spec__ = ModuleSpec("torch_npu", None)  # libraries look for it before they use `torch.npu`
    sys.modules["torch_npu"] = npu
    # With this, `module.to(device)` leaves tied weights tied, as on CUDA; without it, it unties them (torch 2.13).
    torch.__future__.set_swap_module_params_on_conversion(True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Accelerate loads DeepSpeed, which would try to use this one


install()
