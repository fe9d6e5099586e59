"""Measures the loss around a trainer's weights, on a few fixed batches, and leaves the training as it was.

Notation of :mod:`hf_fsam.passes`: g = J(θ)ᵀu(θ). To first order in ρ, what SAM adds to g has two parts (arXiv
2502.02407, section 3). The logit path J(θ)ᵀ(u(θ+ε) − u(θ)) comes from the change of the loss derivative at the logits,
the functional path (J(θ+ε) − J(θ))ᵀu(θ) from the change of the network's Jacobian. Functional-SAM keeps the second.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_fsam import batches
from hf_fsam.accelerate_settings import passes_dtype
from hf_fsam.boundary import Boundary
from hf_fsam.counters import Counters
from hf_fsam.engines.local import gradients_set_aside
from hf_fsam.forward_state import RandomState, running_statistics
from hf_fsam.functional_sam import FunctionalSAM
from hf_fsam.graph import autograd_nodes
from hf_fsam.heads.find import find_boundary
from hf_fsam.heads.liger import makes_the_loss
from hf_fsam.optimizer_state import precondition, second_moments
from hf_fsam.passes import CleanPass, SecondPass
from hf_fsam.perturbation import Perturbation, WeightSwap, norm, perturb
from hf_fsam.refusals import counts_what_it_prepares

logger = logging.get_logger(__name__)

IGNORED = -100  # the label of a position that does not count

_WITHOUT = "set fsam_diagnostics_steps=0, leave out FSAMDiagnosticsCallback, and choose fsam_rho by hf-fsam compare"


@dataclass(frozen=True)
class Paths:
    """The effects of one perturbation ε on one batch.

    Attributes:
        loss_change: ℓ(θ+ε) − ℓ(θ).
        linear_loss_change: ⟨g, ε⟩, which the change would be if the loss were linear in the weights.
        gradient: ‖g‖.
        logit: ‖J(θ)ᵀ(u(θ+ε) − u(θ))‖.
        functional: ‖(J(θ+ε) − J(θ))ᵀu(θ)‖.
        cosine: of the angle between the two paths.
        stochastic_share: the share of ρ along ε that is left once θ+ε has been rounded stochastically to the weights'
            format, as this package rounds it.
        nearest_share: the same for rounding to the nearest number, as `weight.add_(ε)` rounds.
    """

    loss_change: float
    linear_loss_change: float
    gradient: float
    logit: float
    functional: float
    cosine: float
    stochastic_share: float
    nearest_share: float


class Probe:
    """Measures on the first micro-batches that each process trains on.

    Args:
        fsam: of the trainer, its attribute of that name.
        count: the number of micro-batches. The probe has fewer until the training has fetched that many.

    Raises:
        ValueError: parameters or gradients are sharded over processes; the message names the engine. Or the trainer
            counts what it prepares, or Liger makes the model's loss.
    """

    def __init__(self, fsam: FunctionalSAM, count: int) -> None:
        if not fsam.engine.gradients_whole:
            raise ValueError(
                f"{type(fsam.engine).__name__} shards weights or gradients, but the diagnostics and hf-fsam rho "
                "measure in one process or under DDP only: measure there, with a smaller model if this one does not "
                f"fit. Here {_WITHOUT}."
            )
        counts = counts_what_it_prepares(type(fsam.trainer))
        if counts:
            raise ValueError(
                f"the diagnostics and hf-fsam rho prepare a batch by themselves, but what _prepare_inputs of {counts} "
                f"makes may go by how often its training_step was called: {_WITHOUT}."
            )
        if makes_the_loss(fsam.trainer.model):
            raise ValueError(
                f"the loss of this {type(fsam.trainer.model).__name__} is Liger's, made without the logits that the "
                "diagnostics and hf-fsam rho measure at: set liger_kernel_config={'fused_linear_cross_entropy': "
                f"False}}, or load the model without it. Or {_WITHOUT}."
            )
        self.fsam, self.trainer = fsam, fsam.trainer
        self.model: Any = fsam.trainer.model
        self.device: torch.device = fsam.trainer.args.device
        self.random = RandomState.capture(self.device)
        self.count = count
        self.batches: list[dict[str, Any]] = []
        self._prepared: dict[int, Any] = {}  # by the batch's place; what is drawn or generated is not made anew
        self.boundary = find_boundary(self.model, fsam.trainer.args.fsam_boundary)

    def see(self, batches: Sequence[dict[str, Any]]) -> None:
        """Takes micro-batches that the training has fetched, until there are `count`.

        The probe has no data loader of its own: that would draw from the data set and call the collator, and either
        may have a state that the training depends on.
        """
        self.batches += [copy.copy(batch) for batch in batches[: self.count - len(self.batches)]]

    @property
    def weights(self) -> list[Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def loss_scale(self) -> float:
        """The factor of the loss scaler, 1 without one."""
        return float(self.fsam.engine.scale(torch.ones((), device=self.device)))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Every measurement belongs inside. At the end the gradients, the random stream, the model's mode, its running
        statistics and the trainer's counters are again what they were."""
        before, training = RandomState.capture(self.device), self.model.training
        self.model.train()
        cleanup = self.fsam.cleanup
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
        """ℓ of one batch, averaged over what the batch holds, shape (). Every call draws the same dropout masks."""
        place = id(batch)
        if place not in self._prepared:
            self._prepared[place] = self.trainer._prepare_inputs(batch)
        self.random.restore()
        with self.trainer.compute_loss_context_manager():
            result = self.trainer.compute_loss(self.model, batches.copied(self._prepared[place]))
        return result[0] if isinstance(result, tuple) else result

    def differentiate(
        self, batch: dict[str, Any], boundary: Boundary, one_pass: CleanPass | SecondPass
    ) -> tuple[Tensor, list[Tensor]]:
        """Makes one forward and backward pass at the weights as they are.

        Returns:
            The loss, shape (), and a gradient for each trainable weight, in its shape and dtype: zeros where the loss
            does not depend on it. In a second pass the gradient is that of the recorded cotangents, which it uses up.
        """
        weights = self.weights
        with boundary.running(one_pass):
            loss = one_pass.take_loss(self.loss(batch))
            for weight in weights:
                weight.grad = None
            self.fsam.engine.scale(loss).backward()
        scale = self.loss_scale
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad / scale for weight in weights]
        for weight in weights:
            weight.grad = None
        return loss.detach(), gradients

    # ---- Perturbations ----

    @torch.no_grad()
    def direction(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The direction d that the trainer makes of these ascent gradients, which stay as they are."""
        result = [gradient.clone() for gradient in gradients]
        optimizer = self.trainer.optimizer
        if self.trainer.args.fsam_precondition and optimizer is not None:
            precondition(result, second_moments(optimizer, self.weights))
        self.trainer.fsam_direction(*self.restrict(result))
        return result

    def random_direction(self, seed: int) -> list[Tensor]:
        """A direction drawn uniformly from all directions in the space of the perturbed weights."""
        generator = torch.Generator(self.device).manual_seed(seed)
        result = [
            torch.randn(weight.shape, generator=generator, device=weight.device).to(weight.dtype)
            for weight in self.weights
        ]
        self.restrict(result)
        return result

    def restrict(self, direction: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Sets the direction to 0 for the weights that the trainer does not perturb. Returns the others and its parts
        for them."""
        weights: list[Tensor] = []
        parts: list[Tensor] = []
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        for (name, weight), part in zip(named, direction, strict=True):
            if self.trainer.fsam_perturbs(name, weight):
                weights.append(weight)
                parts.append(part)
            else:
                part.zero_()
        return weights, parts

    def perturbation(self, direction: Sequence[Tensor], rho: float) -> Perturbation:
        """θ+ε with ε = ρ d / ‖d‖₂."""
        generator = torch.Generator(self.device).manual_seed(0)
        gradients = [part.clone() for part in direction]
        return perturb(self.weights, gradients, rho, generator, passes_dtype=passes_dtype(self.trainer.accelerator))

    @torch.no_grad()
    def nearest_share(self, direction: Sequence[Tensor], rho: float) -> float:
        """⟨round(θ+ε) − round(θ), ε⟩ / ρ²: the share of ρ along ε that rounding to the nearest number leaves, in the
        format of the weights or, where that is narrower, of the passes."""
        scale, product, seen = ratio(rho, float(norm(direction))), 0.0, passes_dtype(self.trainer.accelerator)
        for weight, part in zip(self.weights, direction, strict=True):
            epsilon, dtype = part.float() * scale, seen if weight.dtype == torch.float32 else weight.dtype
            moved = (weight.float() + epsilon).to(dtype).float() - weight.to(dtype).float()
            product += float(torch.dot(moved.flatten(), epsilon.flatten()))
        return ratio(product, rho**2)

    # ---- Measurements ----

    def paths(self, batch: dict[str, Any], rho: float) -> Paths:
        """Takes four passes, and memory for up to seven copies of the trainable weights."""
        clean, moved = CleanPass(), CleanPass()
        boundary = Boundary(self.fsam.cleanup)
        boundary.attach(self.boundary)  # without a fused head, so that the logits themselves cross
        try:
            loss, gradient = self.differentiate(batch, boundary, clean)
            direction = self.direction(gradient)
            perturbation = self.perturbation(direction, rho)
            with WeightSwap()(perturbation):
                moved_loss, _ = self.differentiate(batch, boundary, moved)
                _, functional = self.differentiate(batch, boundary, SecondPass(clean, clean))
            _, logit = self.differentiate(batch, boundary, SecondPass(clean, moved))
        finally:
            boundary.detach()
        for path in (functional, logit):
            torch._foreach_sub_(path, gradient)
        return Paths(
            loss_change=float(moved_loss - loss),
            linear_loss_change=rho * ratio(dot(gradient, direction), float(norm(direction))),
            gradient=float(norm(gradient)),
            logit=float(norm(logit)),
            functional=float(norm(functional)),
            cosine=ratio(dot(logit, functional), float(norm(logit)) * float(norm(functional))),
            stochastic_share=ratio(float(perturbation.radius), rho),
            nearest_share=self.nearest_share(direction, rho),
        )

    @torch.no_grad()
    def random_loss_change(self, batch: dict[str, Any], rho: float, directions: int = 2) -> float:
        """The mean of ℓ(θ+ε) − ℓ(θ) over random ε of norm ρ."""
        clean, changes = self.loss(batch), []
        for seed in range(directions):
            with WeightSwap()(self.perturbation(self.random_direction(seed), rho)):
                changes.append(float(self.loss(batch) - clean))
        return sum(changes) / directions

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> dict[str, float]:
        """The entropy of softmax(z), in nats, and the norm of z less its mean, to which softmax is blind.

        Both are means over the positions whose label counts. They are NaN where the boundary's output is not one row of
        classes for each label, as in question answering, multiple choice and decoders that classify.
        """
        seen: list[Any] = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output)

        handles = [module.register_forward_hook(see) for module in self.boundary.values()]
        try:
            self.loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if isinstance(labels, Tensor) and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)  # a causal model predicts the next position's label
        entropies, norms, count = 0.0, 0.0, 0
        for z in seen:
            if not (isinstance(labels, Tensor) and isinstance(z, Tensor) and labels.shape == z.shape[:-1]):
                return {"logit_entropy": math.nan, "logit_norm": math.nan}
            rows = z.reshape(-1, z.shape[-1])  # (positions, classes)
            counted = rows[(labels.reshape(-1) != IGNORED).to(rows.device)]
            for part in counted.split(1024):  # so that only these rows are copied to fp32 at a time
                part = part.float()
                entropies += float(torch.distributions.Categorical(logits=part, validate_args=False).entropy().sum())
                norms += float((part - part.mean(dim=-1, keepdim=True)).norm(dim=-1).sum())
                count += len(part)
        return {"logit_entropy": ratio(entropies, count), "logit_norm": ratio(norms, count)}

    def top_curvature(self, batch: dict[str, Any], iterations: int = 20, tolerance: float = 1e-3) -> float:
        """The eigenvalue of the batch's Hessian of largest magnitude, by power iteration. Where the largest eigenvalues
        lie close together, the iteration may stop some per cent below the largest.

        The product of the Hessian and a vector is exact: a second backward pass goes through the graph of the first, of
        the trainer's own `compute_loss`. Attention is computed by its plain formula meanwhile, since the fused kernels
        have no second derivative. NaN where some other operation has none, or may have none.
        """
        weights = self.weights
        generator = torch.Generator(self.device).manual_seed(0)
        eigenvalue = math.inf
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                loss, scale = self.fsam.engine.scale(self.loss(batch)), self.loss_scale
                opaque = opaque_node(loss)
                if opaque is not None:
                    raise RuntimeError(f"{opaque} computes its own backward pass, which may have no derivative.")
                gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
                # The Hessian's rows and columns are zero for a weight whose gradient depends on no weight.
                pairs = [
                    (weight, gradient)
                    for weight, gradient in zip(weights, gradients, strict=True)
                    if gradient is not None and gradient.requires_grad
                ]
                vector = [torch.randn(weight.shape, generator=generator, device=weight.device) for weight, _ in pairs]
                if not pairs:
                    return 0.0
                for _ in range(iterations):
                    length = float(norm(vector))
                    vector = [part / length for part in vector]
                    product = torch.autograd.grad(
                        [gradient for _, gradient in pairs],
                        [weight for weight, _ in pairs],
                        grad_outputs=[v.to(gradient.dtype) for v, (_, gradient) in zip(vector, pairs, strict=True)],
                        retain_graph=True,
                        allow_unused=True,
                    )
                    moved = [
                        torch.zeros_like(part) if each is None else each.float()
                        for part, each in zip(vector, product, strict=True)
                    ]
                    before, eigenvalue = eigenvalue, dot(vector, moved) / scale
                    vector = moved
                    if abs(eigenvalue - before) <= tolerance * abs(eigenvalue) or not float(norm(vector)) > 0:
                        break
            except torch.OutOfMemoryError:  # a RuntimeError, too, and no fault of the model's
                raise
            except RuntimeError as error:
                logger.warning_once(f"No Hessian for this model, so fsam/top_curvature is not logged: {error}")
                return math.nan
        return eigenvalue


def opaque_node(loss: Tensor) -> str | None:
    """The name of a function in the graph of `loss` whose backward pass is written in Python, as that of a fused kernel
    is. Autograd may not be able to differentiate such a backward pass, and would not raise."""
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
