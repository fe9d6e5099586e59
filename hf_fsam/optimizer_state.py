"""The optimizer's moments: the first one to ascend along, the second one to precondition with."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from hf_fsam.perturbation import chunks


@dataclass(frozen=True)
class SecondMoment:
    """One weight's second moment as an optimizer of the Adam family keeps it.

    Attributes:
        average: the running average v of g², in the shape of the weight; maybe offloaded from its device.
        beta: its decay β₂.
        step: the steps t that it has averaged over, a number or a tensor of shape (). 0 where a loss scaler has skipped
            them all: a fused optimizer has made its state by then.
        eps: the optimizer's own epsilon.
    """

    average: Tensor
    beta: float
    step: float | Tensor
    eps: float

    def divide(self, gradient: Tensor) -> None:
        """g → g / (√v̂ + eps) with v̂ = v / (1 − β₂ᵗ), in place; g stays where t = 0."""
        # The device alone may know t: where it is 0, and v with it, divide by 0 / 1 + 1 without asking.
        stepped = torch.as_tensor(self.step > 0)
        correction = torch.where(stepped, (1 - self.beta**self.step) ** 0.5, 1.0)
        eps = torch.where(stepped, self.eps, 1.0)
        for g, v in chunks(gradient, self.average):
            g.div_(v.to(g.device).sqrt().div_(correction).add_(eps))


def precondition(gradients: Sequence[Tensor], moments: Iterable[SecondMoment | None]) -> None:
    """g → g / (√v̂ + eps), in place; g stays where there is no moment yet."""
    for gradient, moment in zip(gradients, moments, strict=True):
        if moment is not None:
            moment.divide(gradient)


def innermost(optimizer: Any) -> Any:
    """Past the wrappers, Accelerate's and others'."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether it has taken a step. The host waits for the device where that alone knows: a fused optimizer makes its
    state in its first step, also if a loss scaler skips that."""
    return any(state.get("step", 1) > 0 for state in optimizer.state.values() if state)


def momenta(optimizer: Optimizer, weights: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that have a momentum, and a copy of it in their dtype, on their device; none before the optimizer's
    first step.

    Raises:
        ValueError: the optimizer has stepped and keeps none.
    """
    optimizer, found = innermost(optimizer), []
    for weight in weights:
        state = optimizer.state.get(weight, {})
        average = state.get("exp_avg", state.get("momentum_buffer"))
        if average is not None:
            found.append((weight, average.to(weight.device, weight.dtype, copy=True)))
        elif state:
            raise ValueError(
                f"fsam_ascent_direction='momentum': {type(optimizer).__name__} keeps none (state 'exp_avg' or "
                f"'momentum_buffer', it has {sorted(state)}). Choose an optimizer that does, or 'gradient'."
            )
    return [weight for weight, _ in found], [average for _, average in found]


def second_moments(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[SecondMoment | None]:
    """The second moment of each weight; None before its first step, and for weights that are not the optimizer's.

    Raises:
        ValueError: the optimizer keeps one of another shape than the weight's.
    """
    optimizer = innermost(optimizer)
    group_of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    return [_second_moment(optimizer, group_of.get(weight), weight) for weight in weights]


def _second_moment(optimizer: Optimizer, group: dict | None, weight: Tensor) -> SecondMoment | None:
    state = optimizer.state.get(weight, {})
    if group is None or "exp_avg_sq" not in state:
        return None
    if state["exp_avg_sq"].shape != weight.shape:
        raise ValueError(
            f"fsam_precondition=True: {type(optimizer).__name__} keeps a second moment of shape "
            f"{tuple(state['exp_avg_sq'].shape)} for a weight of shape {tuple(weight.shape)}, as low-rank optimizers "
            "do. Set fsam_precondition=False."
        )
    return SecondMoment(state["exp_avg_sq"], group["betas"][1], state["step"], group["eps"])


def check_keeps_second_moment(optimizer: Optimizer) -> None:
    """Make sure, before training, that `fsam_precondition` will find what it divides by.

    An optimizer shows its state only after a step, so one of the same class and settings takes a step on a weight of
    two by two numbers.

    Raises:
        ValueError: it keeps no second moment, or none that is known here; the message names optimizers that do.
    """
    optimizer = innermost(optimizer)
    group = next(group for group in optimizer.param_groups if group["params"])
    like = group["params"][0]
    probe = torch.zeros(2, 2, dtype=like.dtype, device=like.device, requires_grad=True)
    probe.grad = torch.ones_like(probe)
    taken = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in group.items() if key in taken and key != "params"}
    why, error = None, None
    try:
        twin: Any = type(optimizer)([probe], **settings)
        if callable(getattr(twin, "train", None)):  # a schedule-free one begins in evaluation mode, and does not step
            twin.train()
        twin.step()
        has = (twin.state[probe].keys(), twin.param_groups[0].keys())
        lacks = [name for name in ("exp_avg_sq", "step") if name not in has[0]]
        lacks += [name for name in ("betas", "eps") if name not in has[1]]
        if lacks:
            state = ", ".join(map(str, has[0])) or "empty"
            why = f"keeps none that is known here: no {', no '.join(map(repr, lacks))} (its state is {state})"
        else:
            second_moments(twin, [probe])
    except Exception as raised:  # whatever an unknown optimizer raises, it could not be asked
        if isinstance(optimizer, Adam | AdamW | NAdam | RAdam):
            return  # a subclass with arguments of its own
        why, error = f"could not be asked ({type(raised).__name__}: {raised})", raised
    if why is not None:
        raise ValueError(
            "fsam_precondition=True divides by the optimizer's second moment, read from its state 'exp_avg_sq' and "
            f"'step' and its groups' 'betas' and 'eps', but {type(optimizer).__name__} {why}. torch.optim's Adam, "
            "AdamW, NAdam and RAdam have them, as optim='adamw_torch' and 'adamw_torch_fused' do: choose one, or set "
            "fsam_precondition=False."
        ) from error
