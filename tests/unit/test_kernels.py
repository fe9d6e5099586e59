"""The Triton kernels compile for NVIDIA's GPUs. What they compute is in test_perturbation.py."""

import os
import re

import pytest

pytest.importorskip("triton", reason="make test-triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_fsam.kernels import triton_kernels

TYPES = {"numbers": "i32", "step": "fp32", "log_beta": "fp32", "eps": "fp32"}
TYPES |= {"along_at": "*fp32", "scale_at": "*fp32", "step_at": "*fp32", "seed_at": "*i64"}


def move(dtype: str, dropped: int, of_passes: bool, numbers: str = "i32") -> tuple[triton.JITFunction, dict, dict]:
    constants = {"DROPPED": dropped, "OF_PASSES": of_passes, "QUARTER": 1024}
    return triton_kernels._move, {"theta_at": f"*{dtype}", "gradient_at": f"*{dtype}", "numbers": numbers}, constants


def divide(gradient: str, average: str, on_device: bool) -> tuple[triton.JITFunction, dict, dict]:
    constants = {"ON_DEVICE": on_device, "BLOCK": 4096}
    return triton_kernels._divide, {"gradient_at": f"*{gradient}", "average_at": f"*{average}"}, constants


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "case",
    [
        move("fp32", 0, False),
        move("fp32", 16, True),
        move("fp32", 13, True),
        move("bf16", 16, False),
        move("bf16", 16, False, "i64"),
        move("fp16", 13, False),
        divide("fp32", "fp32", True),
        divide("fp32", "fp32", False),
        divide("bf16", "bf16", True),
        divide("bf16", "fp32", False),
        divide("fp16", "fp32", False),
    ],
    ids=str,
)
def test_a_kernel_compiles(case: tuple[triton.JITFunction, dict, dict], capability: int) -> None:
    kernel, types, constants = case
    types = dict.fromkeys(constants, "constexpr") | TYPES | types
    source = ASTSource(kernel, signature={name: types[name] for name in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
    assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
