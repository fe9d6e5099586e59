"""All that is known of TRL's fused heads.

Read in TRL 1.16. The fused head goes from hidden states to log-probabilities and makes no logits, so the boundary lies
inside of it: `trl.trainer.utils._ChunkedLogProbFunction.apply` returns the log-probability of each token's target, and
four more tensors, of which the entropy alone may have a gradient. A distillation's `ChunkedDivergenceFunction` goes
from hidden states to a loss; it is computed here from logits, which cross the boundary.
"""

import functools
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from hf_fsam.cleanup import Cleanup
from hf_fsam.heads.deferred_logits import gradient_edge
from hf_fsam.heads.fused_loss import FusedLoss, LogitTransform, compute_dtype, dot, replay
from hf_fsam.passes import SAME_FUNCTION, CleanPass, Crossing, SecondPass

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_PARAMETERS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_LOG_SUM = 4  # log Σ exp z is the fifth tensor that it saves


UNKNOWN = "the fused head of this TRL, which is another than that of TRL 1.16"
CURE = "install trl==1.16.*, or set fsam_variant='sam'"

_DISTILLATION, _DIVERGENCE = "trl.trainer.distillation_trainer", "ChunkedDivergenceFunction"
_DIVERGENCE_PARAMETERS = (
    *("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias"),
    *("beta", "temperature", "student_logit_scale", "student_final_logit_softcapping"),
    *("teacher_logit_scale", "teacher_final_logit_softcapping"),
)
_IN_PIECES = "_chunked_jsd_loss"


def note_storages(trainer: Any) -> None:
    """Call it when the weights have other memory: TRL's `activation_offloading` leaves in place what lies in that of a
    weight, which it looked up once."""
    context = _offloading(trainer)
    if context is not None:
        context.update_model_params(trainer.model)


def offloading_anew(trainer: Any) -> AbstractContextManager[Any]:
    """For each pass. TRL's `activation_offloading` begins and ends with its context, and counts on one pass inside. In
    a second one it would let go of nothing that it fetches, and keep what one that stopped at the boundary left."""
    context = _offloading(trainer)
    return nullcontext() if context is None else context


def _offloading(trainer: Any) -> Any:
    """The context of TRL's `activation_offloading`, by the name that TRL or Axolotl have for it; None: it is off."""
    offloads: Any = getattr(sys.modules.get("trl.models.activation_offloading"), "OffloadActivations", ())
    return next((each for each in vars(trainer).values() if isinstance(each, offloads)), None)


def _as_saved() -> saved_tensors_hooks:
    """Inside, a function saves tensors as they are, so that they can be read before the backward pass: what
    `activation_offloading` gives back in their place, it does inside of one alone. Detached, or an output would hold
    its own node for ever."""
    return saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def unknown_heads(trainer_class: type) -> Iterator[tuple[str, str]]:
    """What of TRL's heads that `trainer_class` makes its loss in no boundary can be put into, and what to do."""
    if has_unknown_fused_head(trainer_class):
        yield UNKNOWN, CURE
    for each in trainer_class.__mro__:
        if hasattr(sys.modules.get(each.__module__), _IN_PIECES):
            yield f"{each.__name__}, whose loss makes its logits by itself, in pieces", "set fsam_variant='sam'"


def has_unknown_fused_head(trainer_class: type) -> bool:
    """Whether `trainer_class` is a trainer of TRL's that makes its loss in a fused head other than the one known
    here."""
    modules = [sys.modules.get(each.__module__) for each in trainer_class.__mro__ if each.__module__.startswith("trl.")]
    if any(hasattr(module, _DIVERGENCE) for module in modules) and not _divergence_is_known():
        return True
    if not any(hasattr(module, "add_fused_lm_head") for module in modules):
        return False
    function = getattr(sys.modules.get(_MODULE), _NAME, None)
    return function is None or not _is_known(function, function.forward)


@functools.lru_cache(maxsize=1)
def _is_known(function: Any, forward: Any) -> bool:
    """Whether TRL's function has the parameters that are known here, and saves what it is known to save."""
    if tuple(inspect.signature(forward).parameters)[1:] != _PARAMETERS:
        return False
    hidden, weight = torch.eye(2, requires_grad=True), torch.arange(6.0).view(3, 2)  # (n, d), (v, d)
    targets = torch.zeros(2, dtype=torch.long)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), _as_saved():
        log_p, *_ = function.apply(hidden, weight, None, targets, 1.0, 2, None, 1.0, ())
    saved = log_p.grad_fn.saved_tensors
    wanted = (hidden @ weight.t()).logsumexp(-1)  # (n,)
    return len(saved) > _LOG_SUM and torch.allclose(saved[_LOG_SUM], wanted, atol=1e-4)


def _divergence_is_known() -> bool:
    function: Any = getattr(sys.modules.get(_DISTILLATION), _DIVERGENCE, None)
    return function is None or tuple(inspect.signature(function.forward).parameters)[1:] == _DIVERGENCE_PARAMETERS


@dataclass
class LogProbabilityHead:
    """Stands in the place of TRL's function while a pass runs (a :class:`~hf_fsam.passes.Fused`).

    The arguments of a call are hidden (n, d), weight (v, d), bias (v,) or None, and then targets (n,), temperature,
    chunk_size, final_logit_softcapping, logit_scale, outputs.
    """

    function: Any
    one_pass: CleanPass | SecondPass

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple:
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return self.one_pass.take_fused(self, hidden, weight, *rest)
        return self.plain(hidden, weight, *rest)

    def plain(self, *args: Any) -> tuple:
        return self.function.apply(*args)

    def record(
        self, clean: CleanPass, crossing: Crossing, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple:
        if not _is_known(
            self.function, self.function.forward
        ):  # a trainer that is not TRL's own was not asked at the start
            raise ValueError(f"hf_fsam does not support {UNKNOWN}: {CURE}; or set fsam_variant='none'.")
        targets, temperature, _, cap, scale, _ = rest
        # Only then, because with hooks ZeRO-3's weight comes back without its state, which TRL asks for.
        with _as_saved() if clean.offloads else nullcontext():
            log_p, entropy, *others = self.plain(hidden, weight, bias, *rest)
        transform = LogitTransform(scale / temperature)
        if cap is not None:
            transform = LogitTransform(scale / cap, cap / temperature, tanh=True)
        unperturbed = clean.unperturbed.take(weight, bias)
        fused = FusedLoss(hidden.detach(), *unperturbed, compute_dtype(hidden), transform, targets=targets)
        fused.value = log_p.detach()
        fused.others = tuple(None if each is None else each.detach() for each in (entropy, *others))
        fused.entropy = fused.others[0]
        fused.log_sum = log_p.grad_fn.saved_tensors[_LOG_SUM]
        crossing.fused.append(fused)
        clean.nodes.add(log_p.grad_fn)

        def take_hidden_gradient(gradient: Tensor) -> None:
            fused.grad_dot_logits = dot(gradient.to(fused.wide), fused.hidden)

        def came_back(upstream: Tensor) -> None:
            fused.upstream = upstream.detach().clone()
            crossing.early += clean.in_compute_loss

        def entropy_came_back(upstream: Tensor | None) -> None:
            if upstream is None:  # the loss ignored it
                return
            fused.entropy_upstream = upstream.detach().clone()
            fused.upstream = torch.zeros_like(fused.value) if fused.upstream is None else fused.upstream
            crossing.early += clean.in_compute_loss

        if hidden.requires_grad:
            hidden.register_hook(take_hidden_gradient)
        at_boundary = clean.from_here(log_p)
        at_boundary.register_hook(came_back)
        if entropy is not None and entropy.requires_grad:
            entropy = clean.from_here(entropy)
            entropy.register_hook(entropy_came_back)
        return at_boundary.clone() if clean.stops_at_boundary else at_boundary, entropy, *others

    def replay(
        self, second: SecondPass, crossing: Crossing, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple:
        if not crossing.reached:
            raise RuntimeError(
                f"the second pass called TRL's fused head where the first did not, or for nothing: {SAME_FUNCTION}"
            )
        fused = crossing.fused[0]
        if hidden.shape != fused.hidden.shape:
            raise RuntimeError(
                f"the second pass took log-probabilities of {len(hidden)} tokens where the first had "
                f"{len(fused.hidden)}: {SAME_FUNCTION}"
            )
        values = weight.detach(), None if bias is None else bias.detach()
        log_p = _Replayed.apply(hidden, gradient_edge(weight), gradient_edge(bias), values, second, crossing)
        return log_p, *fused.others


class _Replayed(torch.autograd.Function):
    """The log-probabilities of the clean pass, with the Jacobian of this one. What comes back to them is dropped.

    All is computed in the forward pass, where an engine that shards the weights has the head gathered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_edge: Tensor,
        bias_edge: Tensor | None,
        values: tuple[Tensor, Tensor | None],
        second: SecondPass,
        crossing: Crossing,
    ) -> Tensor:
        ctx.second, ctx.crossing = second, crossing
        (fused,) = crossing.fused
        assert fused.upstream is not None
        # Of log p = z[target] − log Σ exp z the gradient is minus the cross entropy's.
        fused.upstream = -fused.upstream
        ctx.gradients, product = replay(fused, hidden, *values, ctx.needs_input_grad[1:3])
        second.take_products(fused.grad_dot_logits, product)
        return fused.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.times_(ctx.second.ratio(ctx.crossing)), None, None, None)


@dataclass
class DivergenceHead:
    """Stands in the place of TRL's divergence of a student from a teacher while a pass runs. The student's logits are
    in memory here, (n, v), as those of any other distillation are.

    The arguments of a call are hidden (n, d), weight (v, d) and bias (v,) or None of the student, and the same of the
    teacher; then beta, temperature, and logit_scale and final_logit_softcapping of each. Returns divergence and
    entropy of each token, (n,); the entropy has no gradient.
    """

    one_pass: CleanPass | SecondPass

    def apply(self, *args: Any) -> tuple[Tensor, Tensor]:
        student, teacher, (beta, temperature, scale, cap, teacher_scale, teacher_cap) = args[:3], args[3:6], args[6:]
        with torch.no_grad():
            log_q = _log_probabilities(_logits(*teacher), teacher_scale, teacher_cap, temperature)  # (n, v)
        z = _logits(*student)
        if torch.is_grad_enabled() and z.requires_grad:
            z = self.one_pass.take_logits(z)
        log_p = _log_probabilities(z, scale, cap, temperature)
        if 0.0 < beta < 1.0:
            log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
            divergence = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
        else:
            divergence = _kl(log_p, log_q) if beta else _kl(log_q, log_p)
        return divergence, -(log_p.exp() * log_p).sum(-1).detach()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rounded as TRL's are: what is multiplied, and not the product."""
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        return F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide), None if bias is None else bias.to(wide))


def _log_probabilities(z: Tensor, scale: float, cap: float | None, temperature: float) -> Tensor:
    z = z * scale
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    return (z / temperature).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each token, (n,), of log-probabilities (n, v)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@contextmanager
def intercepted(one_pass: CleanPass | SecondPass, cleanup: Cleanup) -> Iterator[None]:
    """Inside, a fused head of TRL's that has a gradient to compute goes through a door of `one_pass`."""
    utils: Any = sys.modules.get(_MODULE)
    function: Any = getattr(utils, _NAME, None)
    distillation: Any = sys.modules.get(_DISTILLATION)
    with ExitStack() as replaced:
        if function is not None:
            replaced.enter_context(cleanup.replaced(utils, _NAME, LogProbabilityHead(function, one_pass)))
        if hasattr(distillation, _DIVERGENCE):
            replaced.enter_context(cleanup.replaced(distillation, _DIVERGENCE, DivergenceHead(one_pass)))
        yield
