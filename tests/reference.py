"""Functional-SAM written out from its formulas in plain torch: what the package has to agree with.

Nothing here comes from `hf_fsam` or from `transformers.Trainer`. A model is split into the function F_θ(x) = z (the
logits) and the loss ℓ(z, y). With the cotangent u(θ) = ∂ℓ/∂z and the Jacobian J(θ) = ∂F_θ/∂θ, the gradient is

    none        J(θ)ᵀ   u(θ)
    sam         J(θ+ε)ᵀ u(θ+ε)
    functional  J(θ+ε)ᵀ u(θ)
    logit       J(θ)ᵀ   u(θ+ε)

    ε = ρ d / ‖d‖₂,  d = g  or  d = g / (√v̂ + eps)
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Batch = dict[str, Tensor]
Tensors = dict[str, Tensor]  # by parameter name; a parameter that gets no gradient has no entry
Logits = tuple[Tensor, ...]
IGNORED = -100


@dataclass(frozen=True)
class Window:
    """The micro-batches that one optimizer step accumulates, and how many targets they hold together."""

    batches: Sequence[Batch]
    num_items: int


def output_logits(model: nn.Module, theta: Tensors, inputs: Batch) -> Logits:
    """z = F_θ(x), read from the model's output: one tensor, or two for extractive question answering."""
    outputs = functional_call(model, theta, kwargs=inputs)
    return (outputs.start_logits, outputs.end_logits) if "start_logits" in outputs else (outputs.logits,)


def head_logits(head: str) -> Callable[[nn.Module, Tensors, Batch], Logits]:
    """z = F_θ(x), the output of the module called `head`, for models that compute more between it and their output."""

    def read(model: nn.Module, theta: Tensors, inputs: Batch) -> Logits:
        seen: list[Tensor] = []
        handle = model.get_submodule(head).register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            functional_call(model, theta, kwargs=inputs)
        finally:
            handle.remove()
        (logits,) = seen
        return (logits,)

    return read


def without_targets(batch: Batch) -> Batch:
    """x: everything in the batch that the function sees."""
    return {name: value for name, value in batch.items() if name not in ("labels", "start_positions", "end_positions")}


@dataclass(frozen=True)
class Problem:
    """A model and its loss, split at the logits.

    Args:
        loss: ℓ(z, batch, window), this micro-batch's share of the window's loss. The shares add up to that loss.
        inputs: what of a batch the function sees.
        logits: F_θ(x).
        count: how many targets a batch holds, as the Trainer counts them.
    """

    loss: Callable[[Logits, Batch, Window], Tensor]
    inputs: Callable[[Batch], Batch] = field(default=without_targets)
    logits: Callable[[nn.Module, Tensors, Batch], Logits] = field(default=output_logits)
    count: Callable[[Batch], int] = field(default=lambda batch: 0)


# The plain Trainer's losses -------------------------------------------------------------------------------------------


def count_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def count_shifted_labels(batch: Batch) -> int:
    """The label at position 0 does not count: there are no logits before it that could predict it."""
    return int((batch["labels"][..., 1:] != IGNORED).sum())


def nll_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """-Σ log softmax(z)[y] over the labels that count."""
    kept = labels != IGNORED
    log_probabilities = logits.log_softmax(-1)
    picked = log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * kept).sum()


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at position t and the label at t + 1 that they predict."""
    return logits[..., :-1, :], labels[..., 1:]


def causal_lm_loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
    """Σ over the micro-batch's next tokens, divided by the window's count of them."""
    return nll_sum(*shifted(logits[0], batch["labels"])) / window.num_items


def summed_loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
    """The same without a shift, for models that pass `num_items_in_batch` on to their loss."""
    return nll_sum(logits[0], batch["labels"]) / window.num_items


def mean_loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
    """The micro-batch's mean, not divided by the number of micro-batches.

    For models whose forward takes `**kwargs` but whose own loss is a plain mean (most of BERT's family, T5). The
    Trainer assumes that they have divided by the window's count already, a quirk of transformers 5, not of the method.
    """
    return nll_sum(logits[0], batch["labels"]) / count_labels(batch)


def mean_loss_over_window(logits: Logits, batch: Batch, window: Window) -> Tensor:
    """The micro-batch's mean, divided by the number of micro-batches, for models that take no count of targets."""
    return mean_loss(logits, batch, window) / len(window.batches)


def question_answering_loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
    """The mean of the losses of start and end. A position outside of the text is ignored. No `labels`, so no count."""
    losses = []
    for scores, position in zip(logits, (batch["start_positions"], batch["end_positions"]), strict=True):
        inside = position < scores.shape[-1]
        losses.append(nll_sum(scores, position.where(inside, IGNORED)) / inside.sum())
    return sum(losses) / 2 / len(window.batches)


def label_smoothing(shift: bool, factor: float) -> Callable[[Logits, Batch, Window], Tensor]:
    """(1 - s)·NLL(y) + s·mean over the vocabulary of the NLL, both over the window's count."""

    def loss(logits: Logits, batch: Batch, window: Window) -> Tensor:
        scores, labels = shifted(logits[0], batch["labels"]) if shift else (logits[0], batch["labels"])
        uniform = -(scores.log_softmax(-1).mean(-1) * (labels != IGNORED)).sum()
        return ((1 - factor) * nll_sum(scores, labels) + factor * uniform) / window.num_items

    return loss


# The method -----------------------------------------------------------------------------------------------------------

Variant = Literal["none", "sam", "functional", "logit"]
Scope = Literal["micro_batch", "optimizer_step"]
Direction = Callable[[Tensors], Tensors]


def vjp(logits: Logits, theta: Tensors, cotangent: Logits) -> Tensors:
    """J(θ)ᵀ u."""
    gradients = torch.autograd.grad(
        logits, list(theta.values()), grad_outputs=cotangent, allow_unused=True, retain_graph=True
    )
    return {name: gradient for name, gradient in zip(theta, gradients, strict=True) if gradient is not None}


def add(total: Tensors, other: Tensors) -> Tensors:
    return {
        name: total[name] + other[name] if name in total and name in other else (total | other)[name]
        for name in total | other
    }


def norm(tensors: Tensors) -> Tensor:
    """One L2 norm over all tensors together."""
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()


def perturbation(direction: Tensors, rho: float) -> Tensors:
    """ε = ρ d / ‖d‖₂, and ε = 0 where d = 0."""
    length = norm(direction)
    return {name: rho * d / length if length > 0 else torch.zeros_like(d) for name, d in direction.items()}


def leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def window_gradient(
    problem: Problem,
    model: nn.Module,
    theta: Tensors,
    batches: Sequence[Batch],
    *,
    variant: Variant,
    rho: float,
    scope: Scope = "micro_batch",
    direction: Direction = lambda gradient: gradient,
) -> Tensors:
    """The gradient of one optimizer step, at θ, summed over the window's micro-batches.

    Both passes over a micro-batch draw the same dropout masks, and the random stream ends where one pass leaves it.
    """
    window = Window(batches, sum(problem.count(batch) for batch in batches))
    theta = leaves(theta)

    def evaluate(weights: Tensors, batch: Batch) -> tuple[Logits, Logits]:
        """z = F(x) and u = ∂ℓ/∂z at these weights."""
        logits = problem.logits(model, weights, problem.inputs(batch))
        return logits, torch.autograd.grad(problem.loss(logits, batch, window), logits, retain_graph=True)

    streams, clean, gradients = [], [], []
    plain: Tensors = {}
    for batch in batches:
        streams.append(torch.get_rng_state())
        logits, cotangent = evaluate(theta, batch)
        clean.append((logits, cotangent))
        gradients.append(vjp(logits, theta, cotangent))  # J(θ)ᵀ u(θ)
        plain = add(plain, gradients[-1])
    if variant == "none":
        return plain

    end_of_stream = torch.get_rng_state()
    total: Tensors = {}
    for batch, stream, (logits, cotangent), gradient in zip(batches, streams, clean, gradients, strict=True):
        epsilon = perturbation(direction(plain if scope == "optimizer_step" else gradient), rho)
        moved = leaves({name: theta[name] + epsilon[name] if name in epsilon else theta[name] for name in theta})
        torch.set_rng_state(stream)
        moved_logits, moved_cotangent = evaluate(moved, batch)
        match variant:
            case "sam":
                total = add(total, vjp(moved_logits, moved, moved_cotangent))  # J(θ+ε)ᵀ u(θ+ε)
            case "functional":
                total = add(total, vjp(moved_logits, moved, cotangent))  # J(θ+ε)ᵀ u(θ)
            case "logit":
                total = add(total, vjp(logits, theta, moved_cotangent))  # J(θ)ᵀ u(θ+ε)
    torch.set_rng_state(end_of_stream)
    return total


def second_moment_direction(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> Direction:
    """d = g / (√v̂ + eps) with Adam's v̂ = v / (1 - β₂ᵗ); d = g where the optimizer has no second moment yet."""

    def direction(gradient: Tensors) -> Tensors:
        d = dict(gradient)
        for group in optimizer.param_groups:
            names = [name for name, parameter in parameters.items() if any(parameter is p for p in group["params"])]
            for name in names:
                state = optimizer.state.get(parameters[name])
                if name in gradient and state:
                    v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                    d[name] = gradient[name] / (v_hat.sqrt() + group["eps"])
        return d

    return direction


def momentum_direction(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> Direction:
    """d = the optimizer's first moment; d = g before its first step."""

    def direction(gradient: Tensors) -> Tensors:
        found = {
            name: state["exp_avg" if "exp_avg" in state else "momentum_buffer"].clone()
            for name, parameter in parameters.items()
            if (state := optimizer.state.get(parameter))
        }
        return found or gradient

    return direction


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """θ: a parameter under two names (tied embeddings) is one entry."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def windows(batches: Sequence[Batch], accumulation: int) -> Iterator[Sequence[Batch]]:
    """`accumulation` micro-batches at a time; an epoch's last window may be shorter."""
    for start in range(0, len(batches), accumulation):
        yield batches[start : start + accumulation]


def train(
    model: nn.Module,
    problem: Problem,
    batches: Sequence[Batch],
    *,
    variant: Variant,
    rho: float,
    optimizer_factory: Callable[[nn.Module], torch.optim.Optimizer],
    precondition: bool = False,
    momentum: bool = False,
    perturbs: Callable[[int], bool] = lambda step: True,
    turned: Callable[[Tensors, Tensors], Tensors] = lambda theta, direction: direction,
    scope: Scope = "micro_batch",
    accumulation: int = 1,
    epochs: int = 1,
    max_grad_norm: float = 0.0,
) -> Tensors:
    """Train a copy of `model` and return its trainable weights by name.

    Args:
        perturbs: whether the optimizer step with this index, counted from 0, perturbs the weights; else it is plain.
        turned: a further change to the direction, given θ and d. ε is 0 for weights that it leaves out.
    """
    model = copy.deepcopy(model).train()
    parameters = trainable(model)
    optimizer = optimizer_factory(model)
    along: Direction = momentum_direction(optimizer, parameters) if momentum else lambda gradient: gradient
    divided: Direction = second_moment_direction(optimizer, parameters) if precondition else lambda gradient: gradient
    step = 0
    for _ in range(epochs):
        for window in windows(batches, accumulation):
            gradient = window_gradient(
                problem,
                model,
                parameters,
                window,
                variant=variant if perturbs(step) else "none",
                rho=rho,
                scope=scope,
                direction=lambda gradient: turned(parameters, divided(along(gradient))),
            )
            step += 1
            if max_grad_norm > 0:
                shrink = min(1.0, max_grad_norm / (float(norm(gradient)) + 1e-6))
                gradient = {name: g * shrink for name, g in gradient.items()}
            for name, parameter in parameters.items():
                parameter.grad = gradient.get(name)
            optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
