"""A language model's linear head and its loss, a tile of logits at a time: tensors in, tensors out.

The head makes a = h Wᵀ + b of the final hidden states h, the model may scale and cap that to logits z, and the loss
takes of each token's logits nothing but log Σ exp z, the target's logit and their mean. So neither a, z nor the
cotangent u = ∂loss/∂a has to exist for all tokens at once: u of any tile follows from h, W, the targets and log Σ exp
z.

Why not a kernel (Triton, Liger)? The second pass needs u once more after the loss is gone, in a product with another
Jacobian, which no published kernel hands out; and this runs wherever torch does. A tile is wide enough for its matrix
products to take longer than the reading and writing around them.

Shapes: n tokens, width d, vocabulary v.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits in a tile: 8 MiB in float32 on a CPU, near its cache; on a GPU enough to fill it with one matrix product.
_TILE = {"cpu": 1 << 21}
_TILE_ELSEWHERE = 1 << 26

# Cotangents of a window that are kept, and need not be computed again: for small models all of them, and for large ones
# a constant amount of memory.
_KEPT = {"cpu": 1 << 23}
_KEPT_ELSEWHERE = 1 << 26

_MOST_IN_A_DOT = 1 << 30  # BLAS counts in 32 bits


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output a on the way to the logits z: z = before · a (Cohere, Granite), or with a
    cap z = after · tanh(before · a) (Gemma 2)."""

    before: float = 1.0
    after: float = 1.0
    tanh: bool = False

    def scaled(self, factor: float) -> "LogitTransform":
        if self.tanh:
            return replace(self, after=self.after * factor)
        return replace(self, before=self.before * factor)

    def apply_(self, a: Tensor) -> Tensor:
        """a → z in place, in any shape."""
        if self.before != 1.0:
            a.mul_(self.before)
        return a.tanh_().mul_(self.after) if self.tanh else a

    def slope(self, z: Tensor) -> Tensor | float:
        """∂z/∂a in the shape of z, or one number for all."""
        if not self.tanh:
            return self.before
        return (z / self.after).square_().neg_().add_(1).mul_(self.after * self.before)


@dataclass
class Gradients:
    """Sums over tokens, in the :func:`sum_dtype` of what they belong to; None where nobody asked for them.

    Attributes:
        hidden: ∂/∂h, (n, d).
        weight: ∂/∂W, (v, d).
        bias: ∂/∂b, (v,).
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.hidden, self.weight, self.bias))

    def times_(self, factor: Tensor | float) -> "Gradients":
        for gradient in self:
            if gradient is not None:
                gradient.mul_(factor)
        return self

    def plus(self, other: "Gradients") -> "Gradients":
        return Gradients(*(b if a is None else a if b is None else a + b for a, b in zip(self, other, strict=True)))


@dataclass(eq=False)
class FusedLoss:
    """What a loss took of the logits of n tokens, and all that it takes to have their cotangent again, tile by tile.

    Attributes:
        hidden: h, (n, d).
        weight, bias: of the head that made the logits.
        dtype: what the head computes in; autocast may narrow its weights.
        transform: between the head and the loss.
        rows: which of the head's tokens, (n,); None for all of them in order.
        targets: (n,); None where the loss looked at no target.
        counted: (n,), bool, the tokens whose target counts; None where all do.
        smoothing: of the labels.
        value: what the loss was given: Σ over the tokens of log Σ exp z − (1 − s) z[target] − s mean z, shape (); or
            log Σ exp z of each token, (n,).
        log_sum: log Σ exp z, (n,), in float32 or wider.
        others: what else the caller was given beside `value`, without a gradient.
        upstream: ∂(scaled loss)/∂value, in its shape; None until the backward pass, and where the loss ignored it.
        entropy: of each token's softmax, (n,); None where the caller was given none.
        entropy_upstream: ∂(scaled loss)/∂entropy, (n,); None where the loss ignored it.
        grad_dot_logits: ⟨∂value/∂a, h Wᵀ⟩, times `upstream` from when that is known, shape (); None where it was not
            computed.
        cached: ∂value/∂a of the first tokens, (some, v); None where there was no memory for any.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    transform: LogitTransform
    rows: Tensor | None = None
    targets: Tensor | None = None
    counted: Tensor | None = None
    smoothing: float = 0.0
    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    log_sum: Tensor = field(default_factory=lambda: torch.zeros(0))
    others: tuple = ()
    upstream: Tensor | None = None
    entropy: Tensor | None = None
    entropy_upstream: Tensor | None = None
    grad_dot_logits: Tensor | None = None
    cached: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """What sums are taken in."""
        return torch.promote_types(self.dtype, torch.float32)

    def head_output(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """Some columns of a = h Wᵀ + b, (tokens, columns), in float32 or wider, rounded as the head itself rounds."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return F.linear(hidden.to(self.dtype), self.weight[columns].to(self.dtype), bias).to(self.wide)

    def weighed(self, upstream: Tensor) -> Tensor:
        """`upstream` of a sum over tokens, shape (); 0 where none of them counts. A loss that divides by their number
        has ∞ there, and what it is multiplied with is 0."""
        if self.counted is not None:
            return torch.where(self.counted.any(), upstream, 0.0)
        return upstream if len(self.hidden) else torch.zeros_like(upstream)

    def cotangents(self, columns: slice, upstream: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Which tokens, and their u in some columns of the vocabulary, (tokens, columns), in the head's dtype. First
        the cached ones, then the others, which are computed again.

        upstream: ∂loss/∂value of each token, (n,); None where it is one number for all, which is left to the caller.
        """
        known = 0 if self.cached is None else self.cached.shape[0]
        if self.cached is not None:
            yield slice(0, known), self.cached[:, columns]
        if known == self.hidden.shape[0]:
            return
        rest = slice(known, self.hidden.shape[0])
        z = self.transform.apply_(self.head_output(self.hidden[rest], columns))  # (n − known, columns)
        slope = self.transform.slope(z)
        log_p = z.sub_(self.log_sum[rest].unsqueeze(-1))
        of_entropy = self.entropy_cotangent(log_p, rest)
        p = log_p.exp_()  # their part of the softmax
        u = self.subtract_targets_(p, rest, columns.start)
        if upstream is not None:
            u.mul_(upstream[rest].unsqueeze(-1))
        if of_entropy is not None:
            u.add_(of_entropy)
        yield rest, _times(u, slope).to(self.dtype)

    def entropy_cotangent(self, log_p: Tensor, tokens: slice) -> Tensor | None:
        """∂loss/∂z through the entropy H, −p (log p + H) times what came back to H, in some columns of the vocabulary,
        (tokens, columns). None where nothing did."""
        if self.entropy is None or self.entropy_upstream is None:
            return None
        entropy, upstream = (each[tokens].unsqueeze(-1) for each in (self.entropy, self.entropy_upstream))
        return (log_p + entropy).mul_(log_p.exp()).mul_(-upstream)

    def subtract_targets_(self, p: Tensor, tokens: slice, first_column: int = 0) -> Tensor:
        """Some columns of the softmax, (tokens, columns), → ∂value/∂z there, in place."""
        if self.targets is not None:
            if self.smoothing:
                p.sub_(self.smoothing / self.weight.shape[0])
            column = self.targets[tokens] - first_column  # (tokens,), maybe outside of these columns
            inside = (column >= 0) & (column < p.shape[-1])
            share = inside.to(p.dtype).mul_(self.smoothing - 1)
            p.scatter_add_(-1, column.clamp(0, p.shape[-1] - 1).unsqueeze(-1), share.unsqueeze(-1))
        if self.counted is not None:
            p.masked_fill_(~self.counted[tokens].unsqueeze(-1), 0.0)
        return p

    def of_all_tokens(self, gradients: "Gradients", hidden: Tensor) -> "Gradients":
        """The gradient of :attr:`hidden` as that of all the head's hidden states, `hidden` (all, d)."""
        if self.rows is None or gradients.hidden is None:
            return gradients
        total = torch.zeros_like(hidden, dtype=gradients.hidden.dtype).index_add_(0, self.rows, gradients.hidden)
        return Gradients(total, gradients.weight, gradients.bias)

    def cache_for(self, tokens: slice) -> Tensor | None:
        """The memory in which the cotangents of `tokens` will be cached, if they can be computed there."""
        inside = self.cached is not None and tokens.stop <= self.cached.shape[0] and self.cached.dtype == self.wide
        return self.cached[tokens] if self.cached is not None and inside else None

    def cache(self, tokens: slice, u: Tensor) -> None:
        """Keep u (tokens, v), as far as there is memory for it."""
        if self.cached is not None and tokens.start < self.cached.shape[0]:
            place = self.cached[tokens]
            if place.data_ptr() != u.data_ptr():
                place.copy_(u[: place.shape[0]])


def cross_entropy_sum(fused: FusedLoss, needs: tuple[bool, bool, bool]) -> Gradients | None:
    """Fill in `value`, the sum of the tokens' cross entropies, and `log_sum`; and return ∂value/∂(h, W, b), of what
    `needs` names, None if it names nothing.

    The gradient is taken now, while a tile's logits are at hand: all that a backward pass adds to it is one factor.
    """
    hidden, weight, bias = fused.hidden, fused.weight, fused.bias  # (n, d), (v, d), (v,)
    wide, device = fused.wide, hidden.device
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=device) if any(needs) else None  # (n, d)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=device) if needs[1] else None  # (v, d)
    grad_bias = torch.zeros(len(weight), dtype=wide, device=device) if needs[2] else None  # (v,)
    total = torch.zeros((), dtype=wide, device=device)
    log_sum = torch.empty(len(hidden), dtype=wide, device=device)  # (n,)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        narrow = replace(fused, weight=weight.to(fused.dtype))
        for tokens in tiles(len(hidden), len(weight), hidden.shape[1], device):
            h = hidden[tokens].to(fused.dtype)  # (tile, d)
            losses, log_sum[tokens], u = _cross_entropies(narrow, h, tokens, grad_hidden is not None)
            total += losses.sum()
            if grad_hidden is None or u is None:
                continue
            fused.cache(tokens, u)
            _add_product(grad_hidden[tokens], u, narrow.weight)
            if grad_weight is not None:
                _add_product(grad_weight, u.t(), h)
            if grad_bias is not None:
                grad_bias += u.sum(0, dtype=wide)
            del u  # before the next tile takes its memory
    fused.log_sum, fused.value = log_sum, total
    if grad_hidden is None:
        return None
    fused.grad_dot_logits = dot(grad_hidden, hidden)
    return Gradients(
        grad_hidden.to(sum_dtype(hidden)),
        None if grad_weight is None else grad_weight.to(sum_dtype(weight)),
        None if grad_bias is None or bias is None else grad_bias.to(sum_dtype(bias)),
    )


def _cross_entropies(
    fused: FusedLoss, h: Tensor, tokens: slice, with_cotangent: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of some tokens, whose hidden states are h (tile, d): the cross entropy of each, (tile,); log Σ exp z of each,
    (tile,); and the cotangent ∂value/∂a in the head's dtype, (tile, v), if it is asked for.

    A function of its own, so that the logits' memory is free again before the next tile's are made.
    """
    assert fused.targets is not None
    target, smoothing = fused.targets[tokens].unsqueeze(-1), fused.smoothing  # (tile, 1)
    z = fused.transform.apply_(fused.head_output(h))  # (tile, v)
    p = torch.softmax(z, -1, out=fused.cache_for(tokens))  # (tile, v)
    # The largest probability is no less than 1 / v: its logarithm is exact where the target's may be −∞.
    top, rest = z.amax(-1, keepdim=True), p.amax(-1).log_().neg_()  # (tile, 1), (tile,)
    # Each token's loss is taken from its largest logit, and not from log Σ exp z: of the confident tokens' little would
    # be left after the subtraction.
    losses = rest + (1 - smoothing) * (top - z.gather(-1, target)).squeeze(-1)  # (tile,)
    if smoothing:
        losses += smoothing * (top - z.mean(-1, keepdim=True)).squeeze(-1)
    if fused.counted is not None:
        losses.masked_fill_(~fused.counted[tokens], 0.0)
    log_sum = top.squeeze(-1) + rest
    if not with_cotangent:
        return losses, log_sum, None
    slope = fused.transform.slope(z)
    del z
    return losses, log_sum, _times(fused.subtract_targets_(p, tokens), slope).to(fused.dtype)


def log_sum_exp(fused: FusedLoss) -> None:
    """Fill in `value` and `log_sum`, both log Σ exp z of each token, (n,)."""
    hidden = fused.hidden
    parts = [torch.zeros(0, dtype=fused.wide, device=hidden.device)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow = replace(fused, weight=fused.weight.to(fused.dtype))
        for tokens in tiles(len(hidden), len(fused.weight), hidden.shape[1], hidden.device):
            parts.append(fused.transform.apply_(narrow.head_output(hidden[tokens])).logsumexp(-1))
    fused.log_sum = fused.value = torch.cat(parts)


def vjp(
    fused: FusedLoss,
    upstream: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Gradients, Tensor]:
    """Jᵀu with the cotangent u of `fused`, and the Jacobian of a head at `hidden` (n, d) and `weight` (v, d), its own
    or others.

    upstream: ∂loss/∂value, () or (n,); None for 1. needs: whether W's and b's gradients are asked for.

    Returns the gradients, and ⟨u, h Wᵀ⟩, shape ().
    """
    dtype, wide, weight = fused.dtype, fused.wide, weight.detach()
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)  # (n, d)
    grad_weight = torch.zeros_like(weight, dtype=sum_dtype(weight)) if needs[0] else None  # (v, d)
    grad_bias = torch.zeros(len(weight), dtype=wide, device=hidden.device) if needs[1] else None  # (v,)
    of_all = upstream if upstream is not None and upstream.ndim == 0 else None
    of_each = upstream if of_all is None else None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow = hidden.to(dtype)
        # Tiles of columns: W and its gradient, which may be the larger ones, are then gone through once.
        for columns in tiles(len(weight), len(hidden), hidden.shape[1], hidden.device):
            for tokens, u in fused.cotangents(columns, of_each):  # (tokens, columns)
                _add_product(grad_hidden[tokens], u, weight[columns].to(dtype))
                if grad_weight is not None:
                    _add_product(grad_weight[columns], u.t(), narrow[tokens])
                if grad_bias is not None:
                    grad_bias[columns] += u.sum(0, dtype=wide)
    product = dot(grad_hidden, hidden)
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(sum_dtype(bias))
    gradients = Gradients(grad_hidden.to(sum_dtype(hidden)), grad_weight, grad_bias)
    return (gradients, product) if of_all is None else (gradients.times_(of_all), product * of_all)


def replay(
    fused: FusedLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Gradients, Tensor]:
    """:func:`vjp` at other weights, with all that came back to `fused`, in the loss scale in which it came.

    Returns the gradients, and ⟨u, a'⟩ with the head's output a' there, shape (), but for ⟨u, b⟩ of the clean pass,
    which is not in `grad_dot_logits` either.
    """
    assert fused.upstream is not None
    fused.hidden = fused.hidden.to(hidden.device, non_blocking=True)  # it may have waited on the host
    gradients, product = vjp(fused, fused.upstream, hidden, weight, bias, needs)
    if gradients.bias is not None and bias is not None and fused.bias is not None:  # ⟨u, b' − b⟩
        product = product + dot(gradients.bias.to(product.dtype), bias.detach() - fused.bias)
    return gradients, product


def dense_vjp(u: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> Gradients:
    """The gradients of :func:`vjp` for a cotangent u that is in memory, (n, v)."""
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        to_weight = u.t() @ hidden.to(u.dtype) if needs[0] else None
        return Gradients(u @ weight.to(u.dtype), to_weight, u.sum(0) if needs[1] else None)


def sum_dtype(of: Tensor) -> torch.dtype:
    """For a gradient that is a sum over tokens, before it is divided by their number: float16 ends at 65504. Autograd
    narrows it."""
    return torch.float32 if of.dtype == torch.float16 else of.dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, without rounding the product to a's format first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.dtype == torch.float32 and _has_mixed_products(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def _has_mixed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.addmm(..., out_dtype=torch.float32)` takes narrower matrices here: on NVIDIA's devices from Ampere
    on, with a torch that lets the total be wider than they are, as some do not."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    one, total = torch.ones(1, 1, dtype=dtype, device=device), torch.ones(1, 1, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    """In place, and without a look at x where that would change nothing."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ in a's dtype, shape ()."""
    pairs = zip(a.flatten().split(_MOST_IN_A_DOT), b.detach().flatten().split(_MOST_IN_A_DOT), strict=True)
    products = [torch.dot(left, right.to(a.dtype)) for left, right in pairs]
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def cotangent_cache_numel(device: torch.device) -> int:
    """How many numbers of a window's cotangents are kept."""
    return _KEPT.get(device.type, _KEPT_ELSEWHERE)


def tiles(count: int, across: int, width: int, device: torch.device) -> Iterator[slice]:
    """`count` rows or columns cut into slices, each `across` long on the other side.

    For every tile the gradient of that other side, (across, width), is read and written. On an accelerator a tile has
    at least half of `width` rows: logits and softmax of a tile are then together as large as that gradient, and its
    matrix products take longer than the reading and writing.
    """
    step = max(1, _TILE.get(device.type, _TILE_ELSEWHERE) // max(1, across))
    if device.type not in _TILE:
        step = max(step, width // 2)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
