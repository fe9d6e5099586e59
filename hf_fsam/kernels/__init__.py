"""Kernels for what is done to every weight in a step, where plain PyTorch takes many."""

import functools
import os
from types import ModuleType

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


@functools.cache
def kernels_for(device_type: str) -> ModuleType | None:
    """The module `triton_kernels`, where it runs: on NVIDIA's GPUs, and on the CPU in Triton's interpreter. None
    elsewhere, and where what Triton needs is missing."""
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (device_type != "cuda" or torch.version.hip is not None):
        return None
    try:
        from hf_fsam.kernels import triton_kernels

        triton_kernels.try_out(device_type)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises many kinds of error, and plain PyTorch does the same work
        logger.warning(
            f"hf_fsam: the Triton kernels do not start ({error}). PyTorch's own take more time for the same. They need "
            "the package triton, a C compiler and Python's headers."
        )
        return None
    return triton_kernels
