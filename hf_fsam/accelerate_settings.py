"""What Accelerate does for a training, whether the Trainer's arguments say so, or a configuration or environment of
Accelerate's own."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compiles(args: Any, accelerator: Accelerator) -> bool:
    """Whether the model is or will be compiled."""
    return bool(args.torch_compile) or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def passes_dtype(accelerator: Accelerator) -> torch.dtype:
    """The format to which the passes round float32 weights where they use them."""
    device = accelerator.device.type
    if torch.is_autocast_enabled(device):  # in a region of the caller's
        return torch.get_autocast_dtype(device)
    return _FORMATS.get(accelerator.mixed_precision, torch.float32)
