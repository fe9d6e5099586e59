"""Collectives, counted where torch dispatches them, whoever calls: DDP, FSDP, DeepSpeed or Accelerate."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch 2.13's names, and how often the bytes of the whole pass through a process's link in a ring, up to (n-1)/n.
PASSES = {
    "allreduce_": 2,
    "reduce_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "broadcast_": 1,
}
SMALL = 64  # bytes: norms, counts and losses


class Collectives(TorchDispatchMode):
    """Counts what passes through torch.distributed inside.

    Attributes:
        calls: of each kind, those of at most `SMALL` bytes as "scalars".
        bytes: of the whole tensor, each time it passes: an all-reduce counts twice, since it is a reduce-scatter and an
            all-gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            if name in PASSES:
                self._count(name, args)
            elif name not in ("barrier", "monitored_barrier_"):
                raise ValueError(f"the collective {name} is not counted")
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        # Of what goes in and what comes out, the whole is the larger one.
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args[:2]]
        whole = max(sizes)
        if whole <= SMALL:
            self.calls["scalars"] += 1
        else:
            self.calls[name.strip("_")] += 1
            self.bytes += PASSES[name] * whole
