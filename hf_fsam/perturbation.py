"""The perturbation ε = ρ · d / ‖d‖₂ of a list of weights. Nothing but tensors goes in and comes out."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from hf_fsam.kernels import kernels_for

# Changes the gradients (second argument) of the weights (first argument) in place, towards what ε is to go along.
Direction = Callable[[Sequence[Tensor], Sequence[Tensor]], None]

# Bits of a float32 mantissa that the narrower format drops.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}

# How many numbers are worked on at a time. Temporaries take 14 bytes a number: they have to stay small beside one copy
# of the weights, and on a CPU they should fit its cache.
_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 22


@dataclass
class Perturbation:
    """θ+ε for the weights that have an ascent gradient, and what the logs tell of it.

    Attributes:
        weights: the perturbed tensors. They are at θ, except inside of :class:`WeightSwap`.
        values: θ+ε of each, in its dtype, in the memory that was the ascent gradient's.
        gradient_norm: ‖g‖₂ of the ascent gradient in the units it was back-propagated in, shape (), float32.
        radius: ⟨θ'−θ, ε⟩ / ρ for the θ' in `values`, shape (), float32: how far the weights really move along ε once
            they are rounded. It is ρ where rounding loses nothing.
        skipped: True where the ascent gradient was not finite, and ε is 0 for that; shape (), bool.
    """

    weights: list[Tensor]
    values: list[Tensor]
    gradient_norm: Tensor
    radius: Tensor
    skipped: Tensor


@torch.no_grad()
def perturb(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: float,
    generator: torch.Generator,
    directions: Sequence[Direction] = (),
    total: Callable[[Tensor], Tensor] = lambda norm: norm,
    passes_dtype: torch.dtype = torch.float32,
) -> Perturbation:
    """Turn ascent gradients into perturbed weights, in place: afterwards `gradients` hold θ+ε.

    Args:
        weights: θ, which is not changed; each on the device of its gradient or offloaded from it.
        gradients: g, each in the shape and dtype of its weight, no two of them in the same memory
            (:func:`own_storage`).
        rho: the L2 radius ρ over all weights together.
        generator: draws the stochastic rounding, on the device of the weights: of those in bfloat16 and float16, and of
            all that the passes round to these formats.
        directions: applied one after the other, they turn g into d. Without any, d = g.
        total: makes the norm over all processes out of the norm over this one's shards.
        passes_dtype: to which the passes round float32 weights where they use them.
    """
    gradient_norm = direction_norm = total(norm(gradients))  # ()
    for direction in directions:
        if direction(weights, gradients) is not None:  # type: ignore[func-returns-value]
            raise TypeError("fsam_direction returned something: change the gradients in place, and return nothing.")
    if directions:
        direction_norm = total(norm(gradients))
    finite = direction_norm.isfinite() & gradient_norm.isfinite()
    scale = rho / direction_norm
    # d may be 0, or so short that ρ / ‖d‖ is infinite. The weights stay where they are then.
    scale = torch.where(finite & scale.isfinite(), scale, 0.0)
    along = torch.zeros_like(direction_norm)  # (), ⟨θ'−θ, ε⟩
    kernels = kernels_for(scale.device.type)
    for_kernel: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for weight, gradient in zip(weights, gradients, strict=True):
        (for_kernel if kernels and kernels.takes(gradient, weight) else others).append((weight, gradient))
    if kernels and for_kernel:
        along += kernels.move(for_kernel, scale, generator, passes_dtype, DROPPED_BITS)
    for weight, gradient in others:
        for theta, chunk in chunks(weight, gradient):
            along += _move(theta, chunk, scale, generator, passes_dtype)
    return Perturbation(list(weights), list(gradients), gradient_norm, along / rho, ~finite)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all `tensors` together, shape (), float32."""
    if not tensors:
        return torch.zeros(())
    # In chunks, because torch 2.13 on the CPU is 1.1 % short on 10⁸ numbers at once.
    pieces = [piece for tensor in tensors for (piece,) in chunks(tensor)]
    wide = torch.float64 if any(piece.dtype == torch.float64 for piece in pieces) else torch.float32
    norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=wide))  # (pieces,)
    return torch.linalg.vector_norm(norms).float()


def _move(
    theta: Tensor, gradient: Tensor, scale: Tensor, generator: torch.Generator, passes_dtype: torch.dtype
) -> Tensor:
    """Write θ' ≈ θ + scale · gradient over `gradient`, rounded so that its mean is exact; returns ⟨θ'−θ, ε⟩."""
    theta = theta.to(gradient.device)  # a shard may be offloaded
    wide = torch.promote_types(theta.dtype, torch.float32)
    # A gradient that is not finite has scale 0, but 0 · ∞ is NaN. With NaN set to 0 nothing moves, and the host does
    # not have to ask the device.
    epsilon = gradient.to(wide).mul(scale).nan_to_num_(nan=0.0)
    gradient.copy_(_perturbed(theta, epsilon, generator, passes_dtype))
    return torch.dot((gradient.to(wide) - theta).flatten(), epsilon.flatten()).float()  # ()


def _perturbed(theta: Tensor, epsilon: Tensor, generator: torch.Generator, passes_dtype: torch.dtype) -> Tensor:
    """θ+ε in the format of θ; or, where the passes round θ to a narrower one, what they see of it is θ+ε in the mean.

    Weights from a bfloat16 checkpoint are numbers of that format until training has moved them. Rounded to nearest, as
    a pass rounds, θ+ε would be θ again where ε is shorter than half a gap. So θ moves by the difference between θ+ε and
    θ, both rounded with the same noise: its mean is ε, and it is a whole number of gaps, which a pass keeps.
    """
    if theta.dtype == torch.float32 and passes_dtype in DROPPED_BITS:
        noise = _noise(theta, passes_dtype, generator)
        return theta + (_cut_off(theta + epsilon, noise, passes_dtype) - _cut_off(theta, noise, passes_dtype))
    return stochastic_round(theta + epsilon, theta.dtype, generator)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 `x` to one of its two neighbors in `dtype`, with the probabilities that make the mean `x`.

    At ρ = 0.05 over 10⁸ bfloat16 weights, rounding to nearest leaves 15 % of the radius, because most entries of ε are
    far smaller than the gap between two numbers. Stochastic rounding leaves all of it along the direction, in
    expectation. Where `dtype` is as wide as `x`, `x` comes back unchanged.
    """
    if dtype not in DROPPED_BITS:
        return x.to(dtype)
    return _cut_off(x, _noise(x, dtype, generator), dtype).to(dtype)


def _noise(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Uniform in the bits that `dtype` drops, int32, in the shape of x."""
    return torch.randint(0, 1 << DROPPED_BITS[dtype], x.shape, dtype=torch.int32, device=x.device, generator=generator)


def _cut_off(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """A neighbor of float32 `x` in `dtype`, as float32: noise below the bits that stay carries into them with the right
    probability, and then the rest is cut off."""
    return (noise + x.view(torch.int32)).bitwise_and_(-(1 << DROPPED_BITS[dtype])).view(torch.float32)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views that make up `tensors`, which are all cut at the same places. None is longer than a chunk.

    One of the tensors may be offloaded from the device of another: the smaller of their devices' chunks counts.

    Raises:
        ValueError: they are not of one shape.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"tensors of the shapes {shapes} can't be cut at the same places.")
    return _cut(tensors, min(_CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE) for tensor in tensors))


def _cut(tensors: tuple[Tensor, ...], most: int) -> Iterator[tuple[Tensor, ...]]:
    numbers = tensors[0].numel()
    if numbers <= most:
        yield tensors
    elif rows := most * tensors[0].shape[0] // numbers:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    else:  # a single row is too long, such as one expert's matrix in a stack of experts
        for row in zip(*(tensor.unbind() for tensor in tensors), strict=True):
            yield from _cut(row, most)


def own_storage(gradients: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[Tensor]:
    """`gradients`, but with a copy of each that begins where another one, or one of `others`, does.

    Autograd may give several leaves the same memory (p.view(-1) + q.view(-1) does), and a recorded cotangent too.
    """
    seen = {other.data_ptr() for other in others}
    result = []
    for gradient in gradients:
        result.append(gradient.clone() if gradient.data_ptr() in seen else gradient)
        seen.add(result[-1].data_ptr())
    return result


class WeightSwap:
    """Puts θ+ε in the place of θ and takes it back. The tensors change places and nothing is computed, so that θ comes
    back bit for bit and no third copy is needed."""

    def __init__(self) -> None:
        self._theta: tuple[list[Tensor], list[Tensor]] | None = None  # the weights, and the memory of their θ

    @contextmanager
    def __call__(self, perturbation: Perturbation) -> Iterator[None]:
        """The weights are at θ+ε inside and at θ afterwards, whatever was raised."""
        self._theta = (perturbation.weights, [weight.data for weight in perturbation.weights])
        try:
            _put(perturbation.weights, perturbation.values)
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """The weights are at θ after this, whether they were before or not. Whoever lets an exception pass calls it
        again, because Ctrl-C may have struck on the line before the first call."""
        if self._theta is not None:
            _put(*self._theta)
            self._theta = None


def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    # One call into C for the whole list. Ctrl-C waits until it is done, and can't leave half of the weights perturbed.
    deque(map(setattr, weights, repeat("data"), values), maxlen=0)
    # In an autocast region of the caller's, the casts of the weights as they were would be used again.
    torch.clear_autocast_cache()
