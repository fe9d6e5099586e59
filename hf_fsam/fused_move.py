"""One Triton kernel that moves a weight along its gradient: θ and g are read once, and θ' is written once.

In plain PyTorch (`perturbation.py`) the same takes a dozen kernels and 90 bytes of traffic for every number of a
bfloat16 weight, where 6 do. The noise of the rounding comes from Triton's generator (Philox), and is drawn again from
the same seed and never stored. Written for Triton 3.6 and later.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fsam.perturbation import DROPPED_BITS

_QUARTER = 1024  # numbers for each of the four integers that Philox makes at a time


@triton.jit
def _cut_off(x, noise, DROPPED: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True) + noise
    return (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def _move_some(
    theta_at, gradient_at, inside, scale, drawn, DROPPED: tl.constexpr, OF_PASSES: tl.constexpr, QUARTER: tl.constexpr
):
    theta = tl.load(theta_at, mask=inside, other=0.0).to(tl.float32)
    epsilon = tl.load(gradient_at, mask=inside, other=0.0).to(tl.float32) * scale
    epsilon = tl.where(epsilon == epsilon, epsilon, 0.0)  # a gradient that is not finite has scale 0, but 0 · ∞ is NaN
    moved = theta + epsilon
    if DROPPED > 0:
        noise = (drawn & ((1 << DROPPED) - 1)).to(tl.int32)
        if OF_PASSES:
            moved = theta + (_cut_off(moved, noise, DROPPED) - _cut_off(theta, noise, DROPPED))
        else:
            moved = _cut_off(moved, noise, DROPPED)
    moved = moved.to(gradient_at.dtype.element_ty)
    tl.store(gradient_at, moved, mask=inside)
    return tl.sum((moved.to(tl.float32) - theta) * epsilon)


@triton.jit
def _move(
    theta_at,
    gradient_at,
    along_at,
    scale_at,
    seed_at,
    numbers,
    DROPPED: tl.constexpr,
    OF_PASSES: tl.constexpr,
    QUARTER: tl.constexpr,
):
    program = tl.program_id(0)
    scale = tl.load(scale_at)
    within = tl.arange(0, QUARTER)
    a, b, c, d = tl.randint4x(tl.load(seed_at), program * QUARTER + within)
    first = program.to(tl.int64) * (4 * QUARTER) + within
    at, along = first, tl.zeros((), tl.float32)
    for drawn in tl.static_range(4):
        noise = a if drawn == 0 else (b if drawn == 1 else (c if drawn == 2 else d))
        along += _move_some(theta_at + at, gradient_at + at, at < numbers, scale, noise, DROPPED, OF_PASSES, QUARTER)
        at += QUARTER
    tl.store(along_at + program, along)


def takes(theta: Tensor, gradient: Tensor) -> bool:
    """Whether :func:`move` can move `theta` along `gradient`, two tensors of one shape and dtype."""
    return (
        theta.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and theta.device == gradient.device
        and theta.is_contiguous()
        and gradient.is_contiguous()
    )


def move(
    pairs: Sequence[tuple[Tensor, Tensor]], scale: Tensor, generator: torch.Generator, passes_dtype: torch.dtype
) -> Tensor:
    """Write θ' ≈ θ + scale · g over each g, rounded so that its mean is exact.

    Args:
        pairs: θ and g of each weight, such that :func:`takes` says yes; all on the device of `scale`.
        scale: shape (), float32.
        generator: draws a seed for the noise of each weight.
        passes_dtype: to which the passes round float32 weights where they use them.

    Returns:
        Σ ⟨θ'−θ, scale · g⟩ over all weights, shape (), float32.
    """
    programs = [triton.cdiv(theta.numel(), 4 * _QUARTER) for theta, _ in pairs]
    along = torch.empty(sum(programs), device=scale.device)
    seeds = torch.randint(1 << 62, (len(pairs),), device=scale.device, generator=generator)
    with torch.cuda.device_of(scale):
        for (theta, gradient), seed, part in zip(pairs, seeds.unbind(), along.split(programs), strict=True):
            of_passes = theta.dtype == torch.float32 and passes_dtype in DROPPED_BITS
            dropped = DROPPED_BITS.get(passes_dtype if of_passes else theta.dtype, 0)
            if len(part):
                _move[(len(part),)](
                    theta, gradient, part, scale, seed, theta.numel(), dropped, of_passes, _QUARTER, num_warps=8
                )
    return along.sum()
