"""What is done to every weight in a step, as Triton kernels: all is read once and written once.

In plain PyTorch (`perturbation.py`, `optimizer_state.py`) a move takes a dozen kernels, each of which reads and writes
as much. The noise of its rounding comes from Triton's generator (Philox) and is never stored. Written for Triton 3.6
and 3.7.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_QUARTER = 1024  # numbers for each of the four integers that Philox makes at a time
_BLOCK = 4 * _QUARTER
_WARPS = 8


@triton.jit
def _cut_off(x, noise, DROPPED: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True) + noise
    return (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def _move_some(theta_at, gradient_at, inside, scale, random, DROPPED: tl.constexpr, OF_PASSES: tl.constexpr):
    theta = tl.load(theta_at, mask=inside, other=0.0).to(tl.float32)
    epsilon = tl.load(gradient_at, mask=inside, other=0.0).to(tl.float32) * scale
    epsilon = tl.where(epsilon == epsilon, epsilon, 0.0)  # a gradient that is not finite has scale 0, but 0 · ∞ is NaN
    moved = theta + epsilon
    if DROPPED > 0:
        noise = (random & ((1 << DROPPED) - 1)).to(tl.int32)
        if OF_PASSES:
            moved = theta + (_cut_off(moved, noise, DROPPED) - _cut_off(theta, noise, DROPPED))
        else:
            moved = _cut_off(moved, noise, DROPPED)
    moved = moved.to(gradient_at.dtype.element_ty)
    tl.store(gradient_at, moved, mask=inside)
    return tl.sum((moved.to(tl.float32) - theta) * epsilon)


# Neither address changes what is compiled: they lie where they fall in tensors that all weights share.
@triton.jit(do_not_specialize_on_alignment=["along_at", "seed_at"])
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
    first, second, third, fourth = tl.randint4x(tl.load(seed_at), program * QUARTER + within)
    at = program.to(tl.int64) * (4 * QUARTER) + within
    along = tl.zeros((), tl.float32)
    for quarter in tl.static_range(4):
        random = first if quarter == 0 else (second if quarter == 1 else (third if quarter == 2 else fourth))
        along += _move_some(theta_at + at, gradient_at + at, at < numbers, scale, random, DROPPED, OF_PASSES)
        at += QUARTER
    tl.store(along_at + program, along)


@triton.jit
def _divide(
    gradient_at, average_at, step_at, step, log_beta, eps, numbers, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    gradient = tl.load(gradient_at + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_at + at, mask=inside, other=0.0).to(tl.float32)
    t = step
    if ON_DEVICE:
        t = tl.load(step_at).to(tl.float32)
    # Where t is 0, so is v, and dividing by 0 / 1 + 1 leaves g. In float64, since 1 − β loses digits.
    power = tl.exp(t.to(tl.float64) * log_beta)
    correction = tl.where(t > 0, tl.sqrt((1.0 - power).to(tl.float32)), 1.0)
    divided = gradient / (tl.sqrt(average) / correction + tl.where(t > 0, eps, 1.0))
    tl.store(gradient_at + at, divided.to(gradient_at.dtype.element_ty), mask=inside)


def takes(gradient: Tensor, other: Tensor) -> bool:
    """Whether the kernels can work on `gradient` together with `other`, its weight or its second moment. What they
    can't, plain PyTorch does, or refuses."""
    return (
        gradient.device == other.device
        and gradient.shape == other.shape
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and tensor.is_contiguous()
            for tensor in (gradient, other)
        )
    )


def move(
    pairs: Sequence[tuple[Tensor, Tensor]],
    scale: Tensor,
    generator: torch.Generator,
    passes_dtype: torch.dtype,
    dropped_bits: Mapping[torch.dtype, int],
) -> Tensor:
    """Write θ' ≈ θ + scale · g over each g, rounded so that its mean is exact.

    Args:
        pairs: θ and g of each weight, of one dtype, such that :func:`takes` says yes; all on the device of `scale`.
        scale: shape (), float32.
        generator: draws a seed for the noise of each weight.
        passes_dtype: to which the passes round float32 weights where they use them.
        dropped_bits: of a float32 mantissa, by the narrower format.

    Returns:
        Σ ⟨θ'−θ, scale · g⟩ over all weights, shape (), float32.
    """
    programs = [triton.cdiv(theta.numel(), _BLOCK) for theta, _ in pairs]
    along = torch.empty(sum(programs), dtype=torch.float32, device=scale.device)
    seeds = torch.randint(1 << 62, (len(pairs),), device=scale.device, generator=generator)
    with torch.cuda.device_of(scale):
        for (theta, gradient), seed, part in zip(pairs, seeds.unbind(), along.split(programs), strict=True):
            of_passes = theta.dtype == torch.float32 and passes_dtype in dropped_bits
            dropped = dropped_bits.get(passes_dtype if of_passes else theta.dtype, 0)
            if len(part):
                _move[(len(part),)](
                    *(theta, gradient, part, scale, seed, theta.numel(), dropped, of_passes, _QUARTER),
                    num_warps=_WARPS,
                )
    return along.sum()


def divide(gradient: Tensor, average: Tensor, beta: float, step: float | Tensor, eps: float) -> None:
    """g → g / (√v̂ + eps) with v̂ = v / (1 − βᵗ), in place; g is left as it is where t = 0.

    Args:
        gradient, average: g and v, such that :func:`takes` says yes.
        beta, step, eps: β, t and eps. The step may be a tensor of shape (), on any device.
    """
    if not gradient.numel():
        return
    on_device = isinstance(step, Tensor) and step.device == gradient.device
    log_beta = math.log(beta) if beta > 0 else -math.inf
    steps = (step, 0.0) if on_device else (average, float(step))  # the kernel reads one of the two
    with torch.cuda.device_of(gradient):
        _divide[(triton.cdiv(gradient.numel(), _BLOCK),)](
            *(gradient, average, *steps, log_beta, eps, gradient.numel(), on_device, _BLOCK), num_warps=_WARPS
        )


def try_out(device_type: str) -> None:
    """Compile and run the kernels once for each dtype, and each that the passes may round to.

    Raises:
        AssertionError: one does something else than it should; and whatever Triton raises where it can't run.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theta = torch.ones(_BLOCK + 1, dtype=dtype, device=device_type)
        for passes_dtype in (torch.float32, torch.bfloat16, torch.float16):
            gradient = torch.ones_like(theta)
            along = move(
                [(theta, gradient)],
                torch.ones((), device=device_type, dtype=torch.float32),
                torch.Generator(device_type),
                passes_dtype,
                {torch.bfloat16: 16, torch.float16: 13},
            )
            torch.testing.assert_close(gradient, torch.full_like(gradient, 2))
            assert along == len(theta)
        for step in (1, torch.ones((), device=device_type)):
            gradient = torch.ones_like(theta)
            divide(gradient, theta, 0.75, step, 0.0)  # v̂ = 1 / 0.25
            torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5))
