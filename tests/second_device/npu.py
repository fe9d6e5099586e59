"""`torch.npu` and `torch_npu`: what torch, accelerate and transformers ask of them for a training (read in torch 2.13,
accelerate 1.15, transformers 5.23). There is one device and nothing runs late, so most answers are short."""

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_initialized = True  # torch.utils.checkpoint saves the random stream only of devices that say so


def is_available() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def get_device_name(which: Any = None) -> str:
    return "a stand-in"


def set_device(which: Any) -> None:
    pass


device = nullcontext  # `with torch.npu.device(0):`


def empty_cache() -> None:
    pass


def synchronize(which: Any = None) -> None:
    torch.ops.second_device.synchronize()


# ---- Random numbers ----


def manual_seed_all(seed: int) -> None:
    torch.ops.second_device.seed(seed)


manual_seed = manual_seed_all


def get_rng_state(which: Any = None) -> Tensor:
    return torch.ops.second_device.rng_state()


def set_rng_state(state: Tensor, which: Any = None) -> None:
    torch.ops.second_device.set_rng_state(state)


random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)

# ---- Mixed precision ----


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


amp = SimpleNamespace(GradScaler=partial(torch.amp.GradScaler, "npu"))


def __getattr__(name: str) -> None:
    if not name.startswith("npu_"):
        raise AttributeError(f"the second device has no {name!r}: {sys.modules[__name__].__doc__}")
    # Fused kernels, which transformers imports by name and never calls here.
