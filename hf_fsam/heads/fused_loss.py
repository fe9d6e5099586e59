"""A language model's linear head and its loss, a tile at a time: tensors in, tensors out.

The head makes a = h Wᵀ + b of final hidden states h, the model may scale and cap them to logits z, and the loss takes
of each token's logits nothing but log Σ exp z, the target's logit and their mean. So neither a, z nor the cotangent
u = ∂loss/∂a has to exist for all tokens at once: u of any tile follows from h, W, the targets and log Σ exp z.

Shapes: n tokens, width d, vocabulary v.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

# Numbers of logits at a time: near the cache of a CPU, wide enough for matrix products on a GPU.
_TILE = {"cpu": 1 << 21}
_TILE_ELSEWHERE = 1 << 26

# Numbers of a window's cotangents that are kept, and need not be computed again: a constant, and for small models all.
_KEPT = {"cpu": 1 << 23}
_KEPT_ELSEWHERE = 1 << 26

_MOST_IN_A_DOT = 1 << 30  # BLAS counts in 32 bits


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output a: z = before · a, or with a cap z = after · tanh(before · a)."""

    before: float = 1.0
    after: float = 1.0
    tanh: bool = False

    def scaled(self, factor: float) -> "LogitTransform":
        if self.tanh:
            return replace(self, after=self.after * factor)
        return replace(self, before=self.before * factor)

    def apply_(self, a: Tensor) -> Tensor:
        """a → z in place."""
        if self.before != 1.0:
            a.mul_(self.before)
        return a.tanh_().mul_(self.after) if self.tanh else a

    def slope(self, z: Tensor) -> Tensor | float:
        """∂z/∂a."""
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
    """What the loss took of the logits of n tokens, and enough to have their cotangent again, tile by tile.

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
        grad_dot_logits: ⟨∂value/∂a, h Wᵀ⟩, times `upstream` from when that is known, shape (); None where it was not
            computed.
        kept: ∂value/∂a of the first tokens, (some, v).
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
    grad_dot_logits: Tensor | None = None
    kept: Tensor | None = None

    def weighed(self, upstream: Tensor) -> Tensor:
        """`upstream` of a sum over tokens, (); 0 where none of them counts. A loss that divides by their number has ∞
        there, and what it is multiplied by is 0."""
        if self.counted is not None:
            return torch.where(self.counted.any(), upstream, 0.0)
        return upstream if len(self.hidden) else torch.zeros_like(upstream)

    def cotangents(self, columns: slice, upstream: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """u of some columns of the vocabulary, (tokens, columns), in the head's dtype, for some tokens after others.

        upstream: ∂loss/∂value of each token, (n,); None where that is one number for all, which is left to the caller.
        """
        known = 0 if self.kept is None else self.kept.shape[0]
        if self.kept is not None:
            yield slice(0, known), self.kept[:, columns]
        if known == self.hidden.shape[0]:
            return
        z = self.transform.apply_(self.product(self.hidden[known:], columns))  # (n − known, columns)
        slope = self.transform.slope(z)
        u = z.sub_(self.log_sum[known:].unsqueeze(-1)).exp_()
        if self.targets is not None:
            self._less_targets(u, self.targets[known:] - columns.start)
        if self.counted is not None:
            u.masked_fill_(~self.counted[known:].unsqueeze(-1), 0.0)
        if upstream is not None:
            u.mul_(upstream[known:].unsqueeze(-1))
        yield slice(known, None), _times(u, slope).to(self.dtype)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def product(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """a of some columns, rounded as all of them would be, in float32 or wider."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return F.linear(hidden.to(self.dtype), self.weight[columns].to(self.dtype), bias).to(self.wide)

    def place_for(self, tokens: slice) -> Tensor | None:
        """The memory in which the cotangents of `tokens` will be kept, if they can be computed there."""
        inside = self.kept is not None and tokens.stop <= self.kept.shape[0] and self.kept.dtype == self.wide
        return self.kept[tokens] if self.kept is not None and inside else None

    def keep(self, tokens: slice, u: Tensor) -> None:
        if self.kept is not None and tokens.start < self.kept.shape[0]:
            place = self.kept[tokens]
            if place.data_ptr() != u.data_ptr():
                place.copy_(u[: place.shape[0]])

    def _less_targets(self, p: Tensor, place: Tensor) -> None:
        """Softmax p of some columns → ∂(cross entropy)/∂z. place: of the targets, which may be outside of them."""
        if self.smoothing:
            p.sub_(self.smoothing / self.weight.shape[0])
        inside = (place >= 0) & (place < p.shape[-1])
        less = inside.to(p.dtype).mul_(self.smoothing - 1)
        p.scatter_add_(-1, place.clamp(0, p.shape[-1] - 1).unsqueeze(-1), less.unsqueeze(-1))


def cross_entropy_sum(statistic: FusedLoss, needs: tuple[bool, bool, bool]) -> Gradients | None:
    """Fill in `value`, the sum of the tokens' cross entropies, and `log_sum`; and return ∂value/∂(h, W, b), of what
    `needs` names, None if it names nothing.

    The gradient is taken now, while a token's logits are at hand: what comes back to a sum is one number.
    """
    assert statistic.targets is not None
    hidden, weight, bias = statistic.hidden, statistic.weight, statistic.bias
    wide, smoothing, device = statistic.wide, statistic.smoothing, statistic.hidden.device
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    to_hidden = torch.zeros(hidden.shape, dtype=wide, device=device) if any(needs) else None  # (n, d)
    to_weight = torch.zeros(weight.shape, dtype=wide, device=device) if needs[1] else None  # (v, d)
    to_bias = torch.zeros(vocabulary, dtype=wide, device=device) if needs[2] else None  # (v,)
    total = torch.zeros((), dtype=wide, device=device)
    log_sum = torch.empty(rows, dtype=wide, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        narrow = replace(statistic, weight=weight.to(statistic.dtype))
        for tokens in tiles(rows, vocabulary, hidden.shape[1], device):
            h = hidden[tokens].to(statistic.dtype)
            z = statistic.transform.apply_(narrow.product(h))  # (tile, v)
            target = statistic.targets[tokens].unsqueeze(-1)
            p = torch.softmax(z, -1, out=statistic.place_for(tokens))
            # The largest probability is no less than 1 / v: its logarithm is exact where the target's may be −∞.
            top, rest = z.amax(-1, keepdim=True), p.amax(-1).log_().neg_()
            log_sum[tokens] = top.squeeze(-1) + rest
            # Each token's by itself, from its top: of confident tokens little is left after the subtraction.
            losses = rest + (1 - smoothing) * (top - z.gather(-1, target)).squeeze(-1)
            if smoothing:
                losses += smoothing * (top - z.mean(-1, keepdim=True)).squeeze(-1)
            silent = None if statistic.counted is None else ~statistic.counted[tokens]
            total += (losses if silent is None else losses.masked_fill_(silent, 0.0)).sum()
            if to_hidden is None:
                continue
            p.scatter_add_(-1, target, torch.full_like(target, smoothing - 1, dtype=wide))
            if smoothing:
                p.sub_(smoothing / vocabulary)
            if silent is not None:
                p.masked_fill_(silent.unsqueeze(-1), 0.0)
            u = _times(p, statistic.transform.slope(z)).to(statistic.dtype)
            statistic.keep(tokens, u)
            _add_product(to_hidden[tokens], u, narrow.weight)
            if to_weight is not None:
                _add_product(to_weight, u.t(), h)
            if to_bias is not None:
                to_bias += u.sum(0, dtype=wide)
    statistic.log_sum, statistic.value = log_sum, total
    if to_hidden is None:
        return None
    statistic.grad_dot_logits = dot(to_hidden, hidden)
    return Gradients(
        to_hidden.to(sum_dtype(hidden)),
        None if to_weight is None else to_weight.to(sum_dtype(weight)),
        None if to_bias is None or bias is None else to_bias.to(sum_dtype(bias)),
    )


def log_sum_exp(statistic: FusedLoss) -> None:
    """Fill in `value` and `log_sum`, log Σ exp z of each token, (n,)."""
    hidden = statistic.hidden
    parts = [torch.zeros(0, dtype=statistic.wide, device=hidden.device)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow = replace(statistic, weight=statistic.weight.to(statistic.dtype))
        for tokens in tiles(hidden.shape[0], statistic.weight.shape[0], hidden.shape[1], hidden.device):
            parts.append(statistic.transform.apply_(narrow.product(hidden[tokens])).logsumexp(-1))
    statistic.log_sum = statistic.value = torch.cat(parts)


def vjp(
    statistic: FusedLoss,
    upstream: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Gradients, Tensor]:
    """Jᵀu with the cotangent of `statistic` and the Jacobian of a head at `hidden` (n, d) and `weight` (v, d), its own
    or others.

    upstream: see :meth:`FusedLoss.cotangents`. needs: whether W's and b's gradients are asked for.

    Returns the gradients, and ⟨u, h Wᵀ⟩, shape ().
    """
    dtype, wide, weight = statistic.dtype, statistic.wide, weight.detach()
    to_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    to_weight = torch.zeros_like(weight, dtype=sum_dtype(weight)) if needs[0] else None
    to_bias = torch.zeros(weight.shape[0], dtype=wide, device=hidden.device) if needs[1] else None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow = hidden.to(dtype)
        for columns in tiles(weight.shape[0], hidden.shape[0], hidden.shape[1], hidden.device):
            for tokens, u in statistic.cotangents(columns, upstream):
                _add_product(to_hidden[tokens], u, weight[columns].to(dtype))
                if to_weight is not None:
                    _add_product(to_weight[columns], u.t(), narrow[tokens])
                if to_bias is not None:
                    to_bias[columns] += u.sum(0, dtype=wide)
    if to_bias is not None and bias is not None:
        to_bias = to_bias.to(sum_dtype(bias))
    return Gradients(to_hidden.to(sum_dtype(hidden)), to_weight, to_bias), dot(to_hidden, hidden)


def replay(
    fused: FusedLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Gradients, Tensor]:
    """:func:`vjp` at other weights, with all that came back to `fused`, in the loss scale that it came with.

    Returns the gradients, and ⟨u, a'⟩ of the head's output a' there, shape (), up to what a bias adds in both passes.
    """
    upstream = fused.upstream
    assert upstream is not None
    fused.hidden = fused.hidden.to(hidden.device, non_blocking=True)  # it may have waited on the host
    if upstream.ndim:
        gradients, product = vjp(fused, upstream, hidden, weight, bias, needs)
    else:  # one number for all tokens
        gradients, product = vjp(fused, None, hidden, weight, bias, needs)
        gradients, product = gradients.times_(upstream), product * upstream
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
    elif total.dtype == torch.float32 and _has_mixed_products(a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def _has_mixed_products(device: torch.device) -> bool:
    """Whether `torch.addmm(..., out_dtype=torch.float32)` takes narrower matrices here: on NVIDIA's devices from Ampere
    on, since torch 2.8."""
    if device.type != "cuda" or torch.version.hip is not None or Version(torch.__version__) < Version("2.8"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
