"""What a forward pass reads and changes besides computing its output: the random stream, and running statistics.

Both passes of a step have to draw the same dropout masks, and a step has to leave both as the plain Trainer's would.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a model's forward pass draws from: Python's, NumPy's, torch's on the CPU and
    on the device of the training. Some models draw LayerDrop and SpecAugment masks from the first two."""

    python: tuple
    numpy: dict[str, Any] | tuple
    cpu: torch.Tensor
    accelerator: torch.Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        accelerator = None
        if device.type != "cpu":
            accelerator = torch.get_device_module(device).get_rng_state(*_which(device))
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator, device)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, *_which(self.device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is only one of these, and no argument for it


def running_statistics(model: nn.Module) -> Callable[[], None]:
    """Returns a function that sets the running statistics of batch and instance norms back to what they are now. A
    forward pass at θ+ε must not count in them, and a second one at θ has been counted already."""
    buffers = [
        buffer
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None  # torch's own norms, and others that were made like them
        for buffer in module.buffers(recurse=False)
    ]
    saved = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)

    return restore
