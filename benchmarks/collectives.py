"""Counts collectives where PyTorch dispatches them, whether DDP, FSDP, DeepSpeed or Accelerate calls them."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The names in torch 2.13, and how often the bytes of the whole tensor pass through the link of a process in a ring, up
# to the factor (n-1)/n.
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
    """Counts what is sent through torch.distributed inside the context.

    Attributes:
        calls: the number of calls of each kind; calls with at most `SMALL` bytes count as "scalars".
        bytes: the sum over all calls of the bytes of the whole tensor. An all-reduce counts twice, since it is a
            reduce-scatter and an all-gather.
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
        # Either the input or the output is the whole tensor: the larger one.
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args[:2]]
        whole = max(sizes)
        if whole <= SMALL:
            self.calls["scalars"] += 1
        else:
            self.calls[name.strip("_")] += 1
            self.bytes += PASSES[name] * whole
