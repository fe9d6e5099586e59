"""The geometry of the loss around a trainer's weights, measured on a few fixed batches; the training stays as it was.

Notation of :mod:`hf_fsam.passes`: g = J(θ)ᵀu(θ). To first order in ρ, what SAM adds to g comes on two paths (arXiv
2502.02407, section 3): the logit path J(θ)ᵀ(u(θ+ε) − u(θ)), in which the logits' statistics move, and the functional
path (J(θ+ε) − J(θ))ᵀu(θ), in which the function's geometry does. Functional-SAM keeps the second alone.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_fsam import batches
from hf_fsam.engines.local import gradients_set_aside
from hf_fsam.forward_state import RandomState, running_statistics
from hf_fsam.graph import autograd_nodes
from hf_fsam.heads.find import find_boundary
from hf_fsam.heads.trl import Counters
from hf_fsam.optimizer_state import precondition, second_moments
from hf_fsam.passes import Boundary, CleanPass, SecondPass
from hf_fsam.perturbation import Perturbation, WeightSwap, norm, perturb

logger = logging.get_logger(__name__)

IGNORED = -100


@dataclass
class Clean:
    """A pass at θ.

    Attributes:
        loss: ℓ(θ), shape ().
        gradients: g, one for each trainable weight, in its shape and dtype.
        recorded: with the cotangents u(θ).
    """

    loss: Tensor
    gradients: list[Tensor]
    recorded: CleanPass


@dataclass(frozen=True)
class Paths:
    """What one ε makes of one batch.

    Attributes:
        rise: ℓ(θ+ε) − ℓ(θ).
        linear: ⟨g, ε⟩, what the rise would be on a plane.
        gradient: ‖g‖.
        logit: ‖J(θ)ᵀ(u(θ+ε) − u(θ))‖.
        functional: ‖(J(θ+ε) − J(θ))ᵀu(θ)‖.
        cosine: of the two paths.
        kept: the share of ρ along ε that the package's stochastic rounding leaves of θ+ε in the weights' format.
        to_nearest: what `weight.add_(ε)` would.
    """

    rise: float
    linear: float
    gradient: float
    logit: float
    functional: float
    cosine: float
    kept: float
    to_nearest: float


class Probe:
    """Measures on the first micro-batches that each process trains on.

    Args:
        trainer: an :class:`~hf_fsam.FSAMTrainer`.
        count: how many of them, as soon as there are so many.

    Raises:
        ValueError: parameters or gradients are sharded over processes; the message names the engine.
    """

    def __init__(self, trainer: Any, count: int) -> None:
        if not trainer._fsam_engine.gradients_whole:
            raise ValueError(
                f"{type(trainer._fsam_engine).__name__} shards weights or gradients, and the geometry is measured in "
                "one process or under DDP only. Measure there, on a smaller model if need be: set "
                "fsam_diagnostics_steps=0 here."
            )
        self.trainer = trainer
        self.device: torch.device = trainer.args.device
        self.random = RandomState.capture(self.device)
        self.count = count
        self.batches: list[dict[str, Any]] = []
        self.name, self.boundary = find_boundary(trainer.model, trainer.args.fsam_boundary)

    def see(self, batches: Sequence[dict[str, Any]]) -> None:
        """Micro-batches that the training has fetched. A loader of the probe's own would draw from the data and the
        collator, which may have a state."""
        self.batches += [dict(batch) for batch in batches[: self.count - len(self.batches)]]

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def weights(self) -> list[Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """All measurements belong inside: afterwards gradients, random stream, mode, statistics and counters are those
        of the training."""
        before, training = RandomState.capture(self.device), self.model.training
        self.model.train()
        cleanup = self.trainer._fsam_cleanup
        try:
            with (
                gradients_set_aside(self.weights, cleanup),
                cleanup.after(running_statistics(self.model)),
                cleanup.after(Counters(self.trainer).restore),
            ):
                yield
        finally:
            self.model.train(training)
            before.restore()

    # ---- Passes ----

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """ℓ of one batch, a mean over what it holds, shape (); every call draws the same dropout masks."""
        self.random.restore()
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, batches.copied(self.trainer._prepare_inputs(batch)))

    def clean(self, batch: dict[str, Any], boundary: Boundary) -> Clean:
        recorded = CleanPass()
        with boundary.running(recorded):
            loss = recorded.see_loss(self.loss(batch))
            gradients = self.back_propagate(loss)
        return Clean(loss.detach(), gradients, recorded)

    def replayed(
        self, batch: dict[str, Any], boundary: Boundary, clean: CleanPass, cotangents: CleanPass
    ) -> list[Tensor]:
        """J at the weights as they are, times the recorded cotangents, which are used up."""
        second = SecondPass(clean, cotangents)
        with boundary.running(second):
            return self.back_propagate(second.see_loss(self.loss(batch)))

    def back_propagate(self, loss: Tensor) -> list[Tensor]:
        """The gradient of `loss`, zeros where it reaches no weight."""
        weights = self.weights
        for weight in weights:
            weight.grad = None
        self.trainer._fsam_engine.scale(loss).backward()
        unit = self.unit
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad / unit for weight in weights]
        for weight in weights:
            weight.grad = None
        return gradients

    @property
    def unit(self) -> float:
        """The loss scaler's."""
        return float(self.trainer._fsam_engine.scale(torch.ones((), device=self.device)))

    @contextmanager
    def hooked(self) -> Iterator[Boundary]:
        boundary = Boundary(self.trainer._fsam_cleanup)
        boundary.attach(self.name, self.boundary)  # without a fused head: the logits themselves cross
        try:
            yield boundary
        finally:
            boundary.detach()

    # ---- Perturbations ----

    @torch.no_grad()
    def direction(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """d of the trainer's settings for these ascent gradients, which stay as they are."""
        result = [gradient.clone() for gradient in gradients]
        optimizer = self.trainer.optimizer
        if self.trainer.args.fsam_precondition and optimizer is not None:
            precondition(result, second_moments(optimizer, self.weights))
        return result

    def random_direction(self, seed: int) -> list[Tensor]:
        """Drawn evenly from all."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(weight.shape, generator=generator, device=weight.device).to(weight.dtype)
            for weight in self.weights
        ]

    def away(self, direction: Sequence[Tensor], rho: float) -> Perturbation:
        """θ+ε with ε = ρ d / ‖d‖₂."""
        generator = torch.Generator(self.device).manual_seed(0)
        return perturb(self.weights, [part.clone() for part in direction], None, rho, generator)

    @torch.no_grad()
    def kept_to_nearest(self, direction: Sequence[Tensor], rho: float) -> float:
        """⟨round(θ+ε) − θ, ε⟩ / ρ²: what rounding to the nearest number leaves of the radius, 1 where it takes none."""
        scale, along = ratio(rho, float(norm(direction))), 0.0
        for weight, part in zip(self.weights, direction, strict=True):
            epsilon = part.float() * scale
            moved = (weight.float() + epsilon).to(weight.dtype).float() - weight.float()
            along += float(torch.dot(moved.flatten(), epsilon.flatten()))
        return ratio(along, rho**2)

    # ---- Measurements ----

    def paths(self, batch: dict[str, Any], rho: float) -> Paths:
        """Four passes; up to seven copies of the trainable weights."""
        with self.hooked() as boundary:
            clean = self.clean(batch, boundary)
            direction = self.direction(clean.gradients)
            perturbation = self.away(direction, rho)
            with WeightSwap()(perturbation):
                moved = self.clean(batch, boundary)
                functional = self.replayed(batch, boundary, clean.recorded, clean.recorded)
            logit = self.replayed(batch, boundary, clean.recorded, moved.recorded)
        for path in (functional, logit):
            torch._foreach_sub_(path, clean.gradients)
        return Paths(
            rise=float(moved.loss - clean.loss),
            linear=rho * ratio(dot(clean.gradients, direction), float(norm(direction))),
            gradient=float(norm(clean.gradients)),
            logit=float(norm(logit)),
            functional=float(norm(functional)),
            cosine=ratio(dot(logit, functional), float(norm(logit)) * float(norm(functional))),
            kept=ratio(float(perturbation.radius), rho),
            to_nearest=self.kept_to_nearest(direction, rho),
        )

    @torch.no_grad()
    def rise_random(self, batch: dict[str, Any], rho: float, directions: int = 2) -> float:
        """Mean of ℓ(θ+ε) − ℓ(θ) over random ε of norm ρ."""
        clean, rises = self.loss(batch), []
        for seed in range(directions):
            with WeightSwap()(self.away(self.random_direction(seed), rho)):
                rises.append(float(self.loss(batch) - clean))
        return sum(rises) / directions

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> dict[str, float]:
        """Entropy of softmax(z), in nats, and the norm of z less its mean, which softmax does not see: means over the
        positions whose target counts. NaN where the boundary's rows are not one a label, each over the classes, as in
        question answering, multiple choice and decoders that classify."""
        seen: list[Tensor] = []
        handle = self.boundary.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        try:
            self.loss(batch)
        finally:
            handle.remove()
        labels = self.targets(batch)
        entropies, norms, count = 0.0, 0.0, 0
        for z in seen:
            rows = z.reshape(-1, z.shape[-1])
            if labels is None or labels.shape != z.shape[:-1]:
                return {"logit_entropy": math.nan, "logit_norm": math.nan}
            counted = rows[(labels.reshape(-1) != IGNORED).to(rows.device)]
            for part in counted.split(1024):  # so that little is copied to fp32 at a time
                part = part.float()
                entropies += float(torch.distributions.Categorical(logits=part, validate_args=False).entropy().sum())
                norms += float((part - part.mean(dim=-1, keepdim=True)).norm(dim=-1).sum())
                count += len(part)
        return {"logit_entropy": ratio(entropies, count), "logit_norm": ratio(norms, count)}

    def targets(self, batch: dict[str, Any]) -> Tensor | None:
        """What each position is to predict: a causal model the next label, any other its own."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return None
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if type(base).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return labels
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)

    def top_curvature(self, batch: dict[str, Any], iterations: int = 20, tolerance: float = 1e-3) -> float:
        """The eigenvalue of the batch's Hessian of largest magnitude, by power iteration: where the largest lie close
        together, `iterations` may end some per cent below.

        The Hessian times a vector is exact: a second backward pass through the first one's graph, on the trainer's
        own `compute_loss`, in a mathematical attention since the fused ones have no second derivative. NaN where some
        other operation has none, or may have none.
        """
        weights = self.weights
        generator = torch.Generator(self.device).manual_seed(0)
        vector = [torch.randn(weight.shape, generator=generator, device=weight.device) for weight in weights]
        eigenvalue = math.inf
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                loss, unit = self.trainer._fsam_engine.scale(self.loss(batch)), self.unit
                opaque = opaque_node(loss)
                if opaque is not None:
                    raise RuntimeError(f"the backward pass of {opaque} is its own, and may have no derivative.")
                gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
                used = [
                    (gradient, index)
                    for index, gradient in enumerate(gradients)
                    if gradient is not None and gradient.requires_grad
                ]
                for _ in range(iterations):
                    size = float(norm(vector))
                    vector = [part / size for part in vector]
                    product = torch.autograd.grad(
                        [gradient for gradient, _ in used],
                        weights,
                        grad_outputs=[vector[index].to(gradient.dtype) for gradient, index in used],
                        retain_graph=True,
                        allow_unused=True,
                    )
                    before, moved = (
                        eigenvalue,
                        [
                            torch.zeros_like(part) if each is None else each.float()
                            for part, each in zip(vector, product, strict=True)
                        ],
                    )
                    eigenvalue = dot(vector, moved) / unit
                    vector = moved
                    if abs(eigenvalue - before) <= tolerance * abs(eigenvalue) or not float(norm(vector)) > 0:
                        break
            except RuntimeError as error:
                logger.warning_once(f"No Hessian for this model, fsam/top_curvature is left out: {error}")
                return math.nan
        return eigenvalue


def opaque_node(loss: Tensor) -> str | None:
    """The name of a function on the way to `loss` whose backward pass is Python code, as that of a fused kernel is: it
    may have no derivative that autograd knows of."""
    node: Node
    for node in autograd_nodes(loss.grad_fn):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return node.name()
    return None


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all tensors together."""
    pairs = zip(a, b, strict=True)
    return float(sum(torch.dot(left.flatten().float(), right.flatten().float()) for left, right in pairs))


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
