"""Measures peak memory by counting storages. This is exact on any device, and leaves out what an allocator wastes."""

import itertools
import json
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """The bytes of all live storages that were created inside: now (`current`) and at the most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._counted = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # An argument that is not counted yet was there before, and its views take no new memory.
        for storage in _storages((args, kwargs)):
            self._counted.setdefault(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._counted:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._counted[storage] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.current -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


class PeakAllocated:
    """The same from the CPU's allocations, which torch's profiler writes down: `peak` is known afterwards.

    While :class:`PeakMemory` watches, autograd adds gradients up out of place (torch 2.13), and a step can take more
    than it does otherwise. This sees what happens without a watcher, but nothing of what other devices allocate.
    """

    def __enter__(self) -> "PeakAllocated":
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each.get("name") == "[memory]")
        self.peak = max(itertools.accumulate((change for _, change in changes), initial=0))
