"""The optimizer's moments: the ascent may go along the first one, and be preconditioned with the second."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from hf_fsam.kernels import kernels_for
from hf_fsam.perturbation import chunks


@dataclass(frozen=True)
class SecondMoment:
    """The second moment of one weight, or of a shard of it, as an optimizer of the Adam family holds it.

    Attributes:
        average: the running average v of g², in the shape of the weight; it may be offloaded from its device.
        beta: its decay β₂.
        step: the steps t that it has averaged over, a number or a tensor of shape (). It is 0 where a loss scaler has
            skipped every step so far: a fused optimizer has made its state by then.
        eps: the optimizer's own epsilon.
    """

    average: Tensor
    beta: float
    step: float | Tensor
    eps: float

    def divide(self, gradient: Tensor) -> None:
        """g → g / (√v̂ + eps) with v̂ = v / (1 − β₂ᵗ), in place; g is left as it is where t = 0."""
        kernels = kernels_for(gradient.device.type)
        if kernels and kernels.takes(gradient, self.average):
            kernels.divide(gradient, self.average, self.beta, self.step, self.eps)
            return
        # The device alone may know t. Where t is 0, so is v, and dividing by 0 / 1 + 1 is right without asking.
        stepped = torch.as_tensor(self.step > 0)  # ()
        correction = torch.where(stepped, (1 - self.beta**self.step) ** 0.5, 1.0)  # ()
        eps = torch.where(stepped, self.eps, 1.0)  # ()
        for g, v in chunks(gradient, self.average):
            g.div_(v.to(g.device).sqrt().div_(correction).add_(eps))


def precondition(gradients: Sequence[Tensor], moments: Iterable[SecondMoment | None]) -> None:
    """g → g / (√v̂ + eps), in place; g is left as it is where there is no moment yet."""
    for gradient, moment in zip(gradients, moments, strict=True):
        if moment is not None:
            moment.divide(gradient)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of its wrappers, Accelerate's and others'."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether it has taken a step. A fused optimizer makes its state in its first step even if a loss scaler skips
    that, and only the device knows; the host waits for it."""
    return any(state.get("step", 1) > 0 for state in optimizer.state.values() if state)


def momenta(optimizer: Optimizer, weights: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the weights that have a momentum, and a copy of it in their dtype and on their device; none before the
    optimizer's first step.

    Raises:
        ValueError: the optimizer has stepped and has no momentum, or one of another shape.
    """
    optimizer = innermost(optimizer)
    found, averages = [], []
    for weight in weights:
        average = _momentum(optimizer, weight, optimizer.state.get(weight, {}))
        if average is not None:
            found.append(weight)
            averages.append(average.to(weight.device, weight.dtype, copy=True))
    return found, averages


def _momentum(optimizer: Optimizer, weight: Tensor, state: dict[str, Any]) -> Tensor | None:
    """That in a weight's `state`; None where the state is empty, or its momentum.

    Raises:
        ValueError: the state has none, or in a format or a shape that is not known here.
    """
    average = state[momentum_name(optimizer, state)] if state else None
    if average is not None and type(average) not in (Tensor, DTensor):
        raise ValueError(
            f"fsam_ascent_direction='momentum': {type(optimizer).__name__} keeps its momentum in a format of its own "
            f"({type(average).__name__}). Choose optim='adamw_torch', or fsam_ascent_direction='gradient'."
        )
    if average is not None and average.shape != weight.shape:
        raise ValueError(
            f"fsam_ascent_direction='momentum': {type(optimizer).__name__} keeps a momentum of shape "
            f"{tuple(average.shape)} for a weight of shape {tuple(weight.shape)}, as low-rank optimizers do. Choose "
            "optim='adamw_torch', or fsam_ascent_direction='gradient'."
        )
    return average


def momentum_name(optimizer: Optimizer, state: dict[str, Any] | None = None) -> str:
    """The name of the momentum in a weight's `state`; None: in that of any weight that has one.

    Raises:
        ValueError: there is none.
    """
    if state is None:
        state = next((each for each in optimizer.state.values() if each), {})
    for name in ("exp_avg", "momentum_buffer"):
        if name in state:
            return name
    raise ValueError(
        f"fsam_ascent_direction='momentum': {type(optimizer).__name__} has none (no 'exp_avg' and no 'momentum_buffer' "
        f"in its state, which is {sorted(state)}). Choose an optimizer that has one, or "
        "fsam_ascent_direction='gradient'."
    )


def second_moments(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[SecondMoment | None]:
    """The second moment of each weight; None before its first step, and for weights that are not the optimizer's.

    Raises:
        ValueError: the optimizer's has another shape than the weight.
    """
    optimizer = innermost(optimizer)
    group_of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    moments: list[SecondMoment | None] = []
    for weight in weights:
        group, state = group_of.get(weight), optimizer.state.get(weight, {})
        if group is None or "exp_avg_sq" not in state:
            moments.append(None)
            continue
        average = state["exp_avg_sq"]
        if average.shape != weight.shape:
            raise ValueError(
                f"fsam_precondition=True: {type(optimizer).__name__} has a second moment of shape "
                f"{tuple(average.shape)} for a weight of shape {tuple(weight.shape)}, as low-rank optimizers do. Set "
                "fsam_precondition=False."
            )
        moments.append(SecondMoment(average, group["betas"][1], state["step"], group["eps"]))
    return moments


def second_moments_of_shards(optimizer: Optimizer, averages: Iterable[Tensor]) -> Iterator[SecondMoment]:
    """The same for shards whose running averages are known, while it is not known which group they belong to. Each is
    taken only when the one before has been used, because offloaded state visits the device.

    Raises:
        ValueError: the optimizer has no second moment, or its groups differ in β₂ or epsilon.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    settings = {(group.get("betas", (0, None))[1], group.get("eps")) for group in groups}
    state = next((state for state in optimizer.state.values() if "exp_avg_sq" in state), None)
    if state is None or len(settings) != 1 or None in next(iter(settings)):
        raise ValueError(
            f"fsam_precondition=True needs an optimizer of the Adam family with one β₂ and one epsilon for all groups; "
            f"{type(optimizer).__name__} under DeepSpeed has {settings}. Set fsam_precondition=False."
        )
    beta, eps = groups[0]["betas"][1], groups[0]["eps"]
    step = state["step"] if "step" in state else groups[0]["step"]  # DeepSpeed's own optimizers have it in the group
    return (SecondMoment(average, beta, step, eps) for average in averages)


def _stepped_twin(optimizer: Optimizer) -> tuple[Any, Tensor]:
    """Another optimizer of the same class and settings that has taken a step, and the weight that it has stepped, which
    is large enough for a quantized state to be quantized. Before training, it tells what the optimizer will keep."""
    group = next(group for group in optimizer.param_groups if group["params"])
    like = group["params"][0]
    probe = torch.zeros(64, 64, dtype=like.dtype, device=like.device, requires_grad=True)  # (64, 64)
    probe.grad = torch.ones_like(probe)
    taken = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in group.items() if key in taken and key != "params"}
    twin: Any = type(optimizer)([probe], **settings)
    if callable(getattr(twin, "train", None)):  # schedule-free ones refuse to step in the mode that they begin in
        twin.train()
    twin.step()
    return twin, probe


def check_keeps_momentum(optimizer: Optimizer) -> None:
    """Make sure, before training, that an ascent along the momentum will find one. Optimizers whose state stays empty,
    as that of SGD may, and those that can't be asked pass.

    Raises:
        ValueError: it has none, or none in a format that is known here; the message names the cure.
    """
    optimizer = innermost(optimizer)
    try:
        twin, probe = _stepped_twin(optimizer)
    except Exception:  # an unknown optimizer may raise anything; after its first step `momenta` sees what it has
        return
    _momentum(optimizer, probe, twin.state.get(probe, {}))


def check_keeps_second_moment(optimizer: Optimizer) -> None:
    """Make sure, before training, that `fsam_precondition` will find what it divides by.

    Raises:
        ValueError: it has no second moment, or none in a form that is known here; the message names optimizers that do.
    """
    optimizer = innermost(optimizer)
    why, error = None, None
    try:
        twin, probe = _stepped_twin(optimizer)
        has = (twin.state[probe].keys(), twin.param_groups[0].keys())
        lacks = [name for name in ("exp_avg_sq", "step") if name not in has[0]]
        lacks += [name for name in ("betas", "eps") if name not in has[1]]
        if lacks:
            state = ", ".join(map(str, has[0])) or "empty"
            why = f"keeps none that is known here: no {', no '.join(map(repr, lacks))} (its state is {state})"
        elif type(average := twin.state[probe]["exp_avg_sq"]) is not Tensor:
            why = f"keeps it in a format of its own ({type(average).__name__})"
        else:
            second_moments(twin, [probe])
    except Exception as raised:  # an unknown optimizer may raise anything
        if isinstance(optimizer, Adam | AdamW | NAdam | RAdam):
            return  # a subclass whose constructor takes other arguments
        why, error = f"could not be asked ({type(raised).__name__}: {raised})", raised
    if why is not None:
        raise ValueError(
            "fsam_precondition=True divides by the optimizer's second moment, read from its state 'exp_avg_sq' and "
            f"'step' and its groups' 'betas' and 'eps', but {type(optimizer).__name__} {why}. torch.optim's Adam, "
            "AdamW, NAdam and RAdam have them, as optim='adamw_torch' and 'adamw_torch_fused' do: choose one, or set "
            "fsam_precondition=False."
        ) from error
