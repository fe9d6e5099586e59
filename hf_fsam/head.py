"""A language model's linear head and its loss, a piece at a time: tensors in, tensors out.

The head makes a = h Wᵀ + b of final hidden states h, the model may scale and cap them to logits z, and the loss takes
of each token's logits nothing but log Σ exp z, the target's logit and their mean. So neither a, z nor the cotangent
u = ∂loss/∂a has to exist for all tokens at once: u of any piece follows from h, W, the targets and log Σ exp z.

Shapes: n tokens, width d, vocabulary v.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

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

# torch.addmm(..., out_dtype=torch.float32) of narrower matrices, on CUDA alone.
_MIXED_PRODUCTS = Version(torch.__version__) >= Version("2.8")


@dataclass(frozen=True)
class Squash:
    """What a model does to its head's output a: z = before · a, or with a cap z = after · tanh(before · a)."""

    before: float = 1.0
    after: float = 1.0
    tanh: bool = False

    def scaled(self, factor: float) -> "Squash":
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
class Statistic:
    """What the loss took of the logits of n tokens, and enough to have their cotangent again, piece by piece.

    Attributes:
        hidden: h, (n, d).
        weight, bias: of the head that made the logits.
        dtype: what the head computes in; autocast may narrow its weights.
        squash: between the head and the loss.
        targets: (n,); None where the loss looked at no target.
        smoothing: of the labels.
        value: what the loss was given: Σ over the tokens of log Σ exp z − (1 − s) z[target] − s mean z, shape (); or
            log Σ exp z of each token, (n,).
        log_sum: log Σ exp z, (n,), in float32 or wider.
        others: what else the caller was given beside `value`, without a gradient.
        along: ⟨u, h Wᵀ⟩ in the units of the pass that recorded u, shape (); None where the graph was cut.
        kept: ∂value/∂a of the first tokens, (some, v).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    squash: Squash
    targets: Tensor | None = None
    smoothing: float = 0.0
    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    log_sum: Tensor = field(default_factory=lambda: torch.zeros(0))
    others: tuple = ()
    along: Tensor | None = None
    kept: Tensor | None = None

    def see_gradient(self, to_hidden: Tensor) -> None:
        """to_hidden: uW, the gradient of `hidden`."""
        self.along = _dot(to_hidden.to(self.wide), self.hidden)

    def cotangents(self, columns: slice, upstream: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """u of some columns of the vocabulary, (tokens, columns), in the head's dtype, for some tokens after others.

        upstream: ∂loss/∂value of each token, (n,); None where that is one number for all, which is left to the caller.
        """
        known = 0 if self.kept is None else self.kept.shape[0]
        if self.kept is not None:
            yield slice(0, known), self.kept[:, columns]
        if known == self.hidden.shape[0]:
            return
        z = self.squash.apply_(self.product(self.hidden[known:], columns))
        slope = self.squash.slope(z)
        u = z.sub_(self.log_sum[known:].unsqueeze(-1)).exp_()
        if self.targets is not None:
            self._less_targets(u, self.targets[known:] - columns.start)
        if upstream is not None:
            u.mul_(upstream[known:].unsqueeze(-1))
        yield slice(known, None), _times(u, slope).to(self.dtype)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def product(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """a of some columns, rounded as the whole would be, in float32 or wider."""
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


def vjp(
    statistic: Statistic,
    upstream: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Jᵀu with the cotangent of `statistic` and the Jacobian of a head at `hidden` and `weight`, its own or others.

    Returns ∂/∂h (n, d), ∂/∂W (v, d), ∂/∂b (v,) in the :func:`sum_dtype` of h, W and b, None for what `needs` (W, b)
    leaves out; and ⟨u, h Wᵀ⟩, shape ().
    """
    dtype, wide, weight = statistic.dtype, statistic.wide, weight.detach()
    to_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    to_weight = torch.zeros_like(weight, dtype=sum_dtype(weight)) if needs[0] else None
    to_bias = torch.zeros(weight.shape[0], dtype=wide, device=hidden.device) if needs[1] else None
    with torch.autocast(hidden.device.type, enabled=False):
        narrow = hidden.to(dtype)
        for columns in pieces(weight.shape[0], hidden.shape[0], hidden.device):
            for tokens, u in statistic.cotangents(columns, upstream):
                _add_product(to_hidden[tokens], u, weight[columns].to(dtype))
                if to_weight is not None:
                    _add_product(to_weight[columns], u.t(), narrow[tokens])
                if to_bias is not None:
                    to_bias[columns] += u.sum(0, dtype=wide)
    if to_bias is not None and bias is not None:
        to_bias = to_bias.to(sum_dtype(bias))
    return to_hidden.to(sum_dtype(hidden)), to_weight, to_bias, _dot(to_hidden, hidden)


class Edge(torch.autograd.Function):
    """Where the gradient of a weight goes in, in the weight's shape and without its memory: an engine that shards the
    weights has it gathered now, and will not have when the gradient comes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.new_empty(1).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        if ctx.weight.shape != upstream.shape:
            # ZeRO-3 has emptied it, and autograd wants the shape of a gradient where it leaves one. The next gathering
            # puts its own memory there.
            ctx.weight.data = upstream.new_empty(1).expand(upstream.shape)
        return upstream


class CrossEntropySum(torch.autograd.Function):
    """Σ of the tokens' cross entropies, shape (). The gradient is taken in the forward pass, while a token's logits are
    at hand: what comes back to a sum is one number."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, statistic: Statistic) -> Tensor:
        ctx.statistic, ctx.gradients = statistic, None
        wide, needs = statistic.wide, ctx.needs_input_grad[:3]
        assert statistic.targets is not None
        rows, vocabulary, smoothing = hidden.shape[0], weight.shape[0], statistic.smoothing
        to_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if any(needs) else None
        to_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if needs[1] else None
        to_bias = torch.zeros(vocabulary, dtype=wide, device=hidden.device) if needs[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        log_sum = torch.empty(rows, dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = replace(statistic, weight=statistic.weight.to(statistic.dtype))
            for tokens in pieces(rows, vocabulary, hidden.device):
                h = hidden[tokens].to(statistic.dtype)
                z = statistic.squash.apply_(narrow.product(h))
                target = statistic.targets[tokens].unsqueeze(-1)
                p = torch.softmax(z, -1, out=statistic.place_for(tokens))
                # The largest probability is no less than 1 / v: its logarithm is exact where the target's may be −∞.
                top, rest = z.amax(-1, keepdim=True), p.amax(-1).log_().neg_()
                log_sum[tokens] = top.squeeze(-1) + rest
                # Each token's by itself, from its top: of confident tokens little is left after the subtraction.
                total += (rest + (1 - smoothing) * (top - z.gather(-1, target)).squeeze(-1)).sum()
                if smoothing:
                    total += smoothing * (top - z.mean(-1, keepdim=True)).sum()
                if to_hidden is None:
                    continue
                p.scatter_add_(-1, target, torch.full_like(target, smoothing - 1, dtype=wide))
                if smoothing:
                    p.sub_(smoothing / vocabulary)
                u = _times(p, statistic.squash.slope(z)).to(statistic.dtype)
                statistic.keep(tokens, u)
                _add_product(to_hidden[tokens], u, narrow.weight)
                if to_weight is not None:
                    _add_product(to_weight, u.t(), h)
                if to_bias is not None:
                    to_bias += u.sum(0, dtype=wide)
        statistic.log_sum, statistic.value = log_sum, total
        if to_hidden is not None:
            statistic.along = _dot(to_hidden, hidden)
            gradients = zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
            ctx.gradients = [None if gradient is None else gradient.to(sum_dtype(of)) for gradient, of in gradients]  # type: ignore[arg-type]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        ctx.statistic.along = ctx.statistic.along * upstream
        return (*(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), None)


class LogSumExp(torch.autograd.Function):
    """log Σ exp z of each token, (n,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, statistic: Statistic) -> Tensor:
        ctx.statistic = statistic
        parts = [torch.zeros(0, dtype=statistic.wide, device=hidden.device)]
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = replace(statistic, weight=statistic.weight.to(statistic.dtype))
            for tokens in pieces(hidden.shape[0], weight.shape[0], hidden.device):
                parts.append(statistic.squash.apply_(narrow.product(hidden[tokens])).logsumexp(-1))
        statistic.log_sum = torch.cat(parts)
        statistic.value = statistic.log_sum
        return statistic.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        statistic = ctx.statistic
        *gradients, statistic.along = vjp(
            statistic, upstream, statistic.hidden, statistic.weight, statistic.bias, ctx.needs_input_grad[1:3]
        )
        return (*gradients, None)


class Replayed(torch.autograd.Function):
    """A statistic of a clean pass in the place of the same of a perturbed one: its value, and Jᵀu with u of the clean
    pass and J of the head and hidden states given here. What comes back to it, the perturbed pass's own derivative,
    is dropped.

    All is computed in the forward pass, where an engine that shards the weights has the head gathered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        statistic: Statistic,
        upstream: Tensor,
        replay: Any,
        values: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """weight, bias: where the gradients go, :class:`Edge`. values: their numbers. replay: told of ⟨u, a'⟩ − ⟨u, a⟩,
        where the latter is known, with `replay.rises(number)`; asked for `replay.ratio`, which the gradients are
        multiplied by, in the backward pass."""
        ctx.replay = replay
        one = upstream.ndim == 0  # for all tokens
        needs = ctx.needs_input_grad[1:3]
        *ctx.gradients, along = vjp(statistic, None if one else upstream, hidden, *values, needs)
        ctx.upstream = upstream if one else torch.ones_like(along)
        rise = None
        if statistic.along is not None:
            rise = along * ctx.upstream - statistic.along
            if values[1] is not None and statistic.bias is not None and ctx.gradients[2] is not None:  # ⟨u, b' − b⟩
                rise = rise + _dot(ctx.gradients[2].to(rise.dtype), values[1] - statistic.bias) * ctx.upstream
        replay.rises(rise)
        return statistic.value.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        factor = ctx.upstream * ctx.replay.ratio
        return (
            *(None if gradient is None else gradient.mul_(factor) for gradient in gradients),
            None,
            None,
            None,
            None,
        )


def sum_dtype(of: Tensor) -> torch.dtype:
    """For a gradient that is a sum over tokens, before it is divided by their number: float16 ends at 65504. Autograd
    narrows it."""
    return torch.float32 if of.dtype == torch.float16 else of.dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, without rounding the product to a's format first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _MIXED_PRODUCTS and a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    """In place, and without a look at x where that would change nothing."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.detach().flatten().to(a.dtype))


def room(device: torch.device) -> int:
    """How many numbers of a window's cotangents are kept."""
    return _KEPT.get(device.type, _KEPT_ELSEWHERE)


def pieces(count: int, across: int, device: torch.device) -> Iterator[slice]:
    """`count` rows or columns cut so that a piece of them, `across` wide, is a tile."""
    step = max(1, _TILE.get(device.type, _TILE_ELSEWHERE) // max(1, across))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
