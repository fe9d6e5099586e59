"""What a window keeps of its head at θ, for the second passes that run at θ+ε."""

import torch
from torch import Tensor

from hf_fsam.heads.fused_loss import cotangent_cache_numel


class CotangentCache:
    """Memory for the cotangents of a window's first tokens, which then need not be computed again.

    It is allocated once and used by window after window: on a CPU, fresh memory costs more than what is written there.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def clear(self) -> None:
        """A new window begins, and the memory of the last one is free."""
        self._used = 0

    def take(self, tokens: int, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Memory for as many of `tokens` as there is room for, (some, v), on the device of `weight` (v, d); None where
        the cache is full."""
        vocabulary, most = weight.shape[0], cotangent_cache_numel(weight.device)
        some = min(tokens, (most - self._used) // vocabulary)
        if some <= 0:
            return None
        start, self._used = self._used, self._used + some * vocabulary
        memory = self._memory
        if memory.numel() < self._used or memory.dtype != dtype or memory.device != weight.device:
            # What was handed out before stays alive with its owner.
            numel = min(most, max(self._used, start + tokens * vocabulary))
            self._memory = memory = weight.new_empty(numel, dtype=dtype)
        return memory[start : self._used].view(some, vocabulary)


class UnperturbedHead:
    """W (v, d) and b (v,) of the head as they are in the clean passes of one window.

    Args:
        detached_weights_stay: what the engine says (:class:`~hf_fsam.engines.base.Engine`): a weight that is detached
            now still is at θ while the model is at θ+ε. Where it is not, because weights are moved in place or gathered
            for a moment only, they are copied.
        cotangents: where the window's first cotangents are cached. None: they are computed again.
    """

    def __init__(self, detached_weights_stay: bool = True, cotangents: CotangentCache | None = None) -> None:
        self.cotangents = cotangents
        self._detached_weights_stay = detached_weights_stay
        self._taken: tuple[Tensor, Tensor | None] | None = None
        if cotangents is not None:
            cotangents.clear()

    def take(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and b as they were at the first call, without a gradient."""
        if self._taken is None:
            self._taken = self._now(weight), None if bias is None else self._now(bias)
        return self._taken

    def _now(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self._detached_weights_stay else tensor.detach().clone()
