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

from hf_fsam import kernels

SCALARS = {"numbers": "i32", "step": "fp32", "log2_beta": "fp32", "eps": "fp32"}
POINTERS = {"along_at": "*fp32", "scale_at": "*fp32", "step_at": "*fp32", "seed_at": "*i64"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (kernels._move, {"DROPPED": 0, "OF_PASSES": False, "QUARTER": 1024}),
        (kernels._move, {"DROPPED": 13, "OF_PASSES": False, "QUARTER": 1024}),
        (kernels._move, {"DROPPED": 16, "OF_PASSES": True, "QUARTER": 1024}),
        (kernels._divide, {"ON_DEVICE": True, "BLOCK": 4096}),
        (kernels._divide, {"ON_DEVICE": False, "BLOCK": 4096}),
    ],
    ids=str,
)
def test_a_kernel_compiles(
    kernel: triton.JITFunction, constants: dict[str, int | bool], dtype: str, capability: int
) -> None:
    types = dict.fromkeys(constants, "constexpr") | SCALARS | POINTERS
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
    assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
