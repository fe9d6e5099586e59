"""One process, or DDP: every process holds every parameter whole."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_fsam.cleanup import Cleanup
from hf_fsam.engines.base import Ascent, Bucket
from hf_fsam.optimizer_state import check_keeps_second_moment, has_stepped, momenta, precondition, second_moments
from hf_fsam.perturbation import Perturbation, WeightSwap, own_storage, perturb

_REDUCED_AT_ONCE = 1 << 23  # numbers: about DDP's own buckets


class LocalEngine:
    keeps = True
    forward_can_be_retried = True
    gradients_whole = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._cleanup = Cleanup()
        self._exchange = WeightSwap()
        self._asked: Optimizer | None = None
        self._seen_stepping: Optimizer | None = None

    @contextmanager
    def ascent(self, model: nn.Module, *, average: bool, passes: int) -> Iterator[Ascent]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with gradients_set_aside(parameters, self._cleanup), self._apart(model) as inner:
            ascent = Ascent(inner, self._backward)
            yield ascent
            several = average and self.accelerator.num_processes > 1
            bucket = Bucket(_REDUCED_AT_ONCE, self._average)
            for parameter in parameters:
                gradient = parameter.grad
                if gradient is None:
                    if not several:
                        continue
                    # Another process may have used this weight: all take part in the reduction.
                    gradient = torch.zeros_like(parameter)
                if gradient.layout != torch.strided:
                    raise ValueError(
                        "hf_fsam does not support sparse gradients: build the embedding with sparse=False."
                    )
                if several:
                    bucket.add(parameter, gradient)
                ascent.weights.append(parameter)
                ascent.gradients.append(gradient)
            bucket.flush()

    @contextmanager
    def _apart(self, model: nn.Module) -> Iterator[nn.Module]:
        """What to call in the ascent's passes, of which nobody who waits for the training's passes must know."""
        hooked = "_post_accumulate_grad_hooks"  # torch 2.13
        if any(getattr(parameter, hooked, None) for parameter in model.parameters()):
            raise ValueError(
                "hf_fsam does not support post-accumulate-gradient hooks on weights, such as an optimizer that steps "
                "in the backward pass: they would act on the ascent's gradient too. Remove them, or set "
                "fsam_variant='none'."
            )
        ddp = next((each for each in model.modules() if isinstance(each, DistributedDataParallel)), None)
        if ddp is None:
            yield model
            return
        # The forward passes, too, have to stay out of DDP's reducer, which would take them for the training's. This is
        # what `no_sync` sets.
        with self._cleanup.replaced(ddp, "require_backward_grad_sync", False):
            yield model

    def _average(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Over the processes, in place."""
        sizes = [gradient.numel() for gradient in gradients]
        means = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def momentum(self, model: nn.Module, optimizer: Optimizer) -> Ascent | None:
        weights, averages = self._momenta(model, optimizer)
        return Ascent(unwrapped(self.accelerator, model), self._backward, weights, averages) if weights else None

    def _momenta(self, model: nn.Module, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        if optimizer is not self._seen_stepping:  # once it has stepped, nobody has to ask again
            if not has_stepped(optimizer):
                return [], []
            self._seen_stepping = optimizer
        return momenta(optimizer, (each for each in model.parameters() if each.requires_grad))

    def _backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()

    def scale(self, loss: Tensor) -> Tensor:
        scaler = self.accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def perturb(
        self, ascent: Ascent, optimizer: Optimizer | None, rho: float, seed: int, cotangents: list[Tensor]
    ) -> Perturbation:
        generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        gradients = own_storage(ascent.gradients, cotangents)
        divide = None
        if optimizer is not None:
            self._check(optimizer)
            divide = partial(precondition, moments=second_moments(optimizer, ascent.weights))
        return perturb(ascent.weights, gradients, divide, rho, generator)

    def _check(self, optimizer: Optimizer) -> None:
        if optimizer is not self._asked:  # preconditioning may be switched on in the middle of a training
            check_keeps_second_moment(optimizer)
            self._asked = optimizer

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        self._exchange.restore()
        self._exchange = WeightSwap()  # whose end nobody else's can be, however late that comes
        return self._exchange(perturbation)

    def restore(self) -> None:
        self._exchange.restore()
        self._cleanup.run()

    def settle(self) -> None:
        pass


@contextmanager
def gradients_set_aside(parameters: Sequence[Tensor], cleanup: Cleanup | None = None) -> Iterator[None]:
    """A plain backward pass inside begins with empty `.grad`; afterwards what was there is there again.

    Not `torch.autograd.grad`, which reentrant checkpointing refuses.
    """
    aside = [parameter.grad for parameter in parameters]

    def put_back() -> None:
        for parameter, gradient in zip(parameters, aside, strict=True):
            parameter.grad = gradient

    with (cleanup or Cleanup()).after(put_back):
        for parameter in parameters:
            parameter.grad = None
        yield


def unwrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """`model` past the wrappers, which would wait for a backward pass of the training. Compiled or not, but for one
    process: Accelerate 1.15 would take DDP out of the compiled model for good."""
    return accelerator.unwrap_model(model, keep_torch_compile=accelerator.num_processes == 1)
