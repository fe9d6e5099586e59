"""One process, or DDP: every process holds every weight whole."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_fsam.cleanup import Cleanup
from hf_fsam.engines.base import Ascent, Bucket, Engine
from hf_fsam.optimizer_state import SecondMoment, check_keeps_second_moment, has_stepped, momenta, second_moments
from hf_fsam.perturbation import Perturbation, WeightSwap

_REDUCED_AT_ONCE = 1 << 23  # numbers in a bucket, about as many as in one of DDP's own


class LocalEngine(Engine):
    """Every process ascends on all of its weights, which then change places with θ+ε."""

    detached_weights_stay = True
    forward_can_be_retried = True
    gradients_whole = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._swap = WeightSwap()
        self._has_second_moment: Optimizer | None = None  # the optimizer that is known to have one
        self._has_stepped: Optimizer | None = None  # the optimizer that is known to have stepped

    @contextmanager
    def ascent(self, model: nn.Module, weights: Sequence[Tensor], *, average: bool, passes: int) -> Iterator[Ascent]:
        average = average and self.accelerator.num_processes > 1
        with gradients_set_aside(trainable(model), self._cleanup), self._ascending(model):
            ascent = Ascent(self._backward)
            yield ascent
            bucket = Bucket(_REDUCED_AT_ONCE, self._average)
            for weight in weights:
                gradient = weight.grad
                if gradient is None:
                    if not average:
                        continue
                    # Another process may have used this weight, and all have to take part in the reduction.
                    gradient = torch.zeros_like(weight)
                if gradient.layout != torch.strided:
                    raise ValueError(
                        "hf_fsam does not support sparse gradients: build the embedding with sparse=False."
                    )
                if average:
                    bucket.add(weight, gradient)
                ascent.weights.append(weight)
                ascent.gradients.append(gradient)
            bucket.flush()

    def _ascending(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, nothing takes the backward passes of an ascent for those of the training."""
        hooks = "_post_accumulate_grad_hooks"  # read in torch 2.13
        if any(getattr(weight, hooks, None) for weight in model.parameters()):
            raise ValueError(
                "hf_fsam does not support post-accumulate-gradient hooks on weights, such as an optimizer that steps "
                "in the backward pass: they would act on the ascent's gradient too. Remove them, or set "
                "fsam_variant='none'."
            )
        return nullcontext()

    @contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[nn.Module]:
        ddp = next((each for each in model.modules() if isinstance(each, DistributedDataParallel)), None)
        if ddp is None:
            yield model
            return
        # `no_sync` sets the latter. It has to be set in the forward passes too, where DDP prepares its reducer. DDP
        # sets the former there, unless the pass breaks off: then this process alone would broadcast buffers once more.
        with (
            self._cleanup.after(lambda: setattr(ddp, "require_forward_param_sync", False)),
            self._cleanup.replaced(ddp, "require_backward_grad_sync", False),
        ):
            yield model

    def _average(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Over the processes, in place."""
        sizes = [gradient.numel() for gradient in gradients]
        means = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def momentum(self, model: nn.Module, weights: Sequence[Tensor], optimizer: Optimizer) -> Ascent | None:
        found, averages = self._momenta(weights, optimizer)
        return Ascent(self._backward, found, averages) if found else None

    def _momenta(self, weights: Sequence[Tensor], optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        # `has_stepped` may make the host wait for the device, so it is asked only until the answer is yes.
        if optimizer is not self._has_stepped:
            if not has_stepped(optimizer):
                return [], []
            self._has_stepped = optimizer
        return momenta(optimizer, weights)

    def _backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()

    def scale(self, loss: Tensor) -> Tensor:
        scaler = self.accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def second_moments(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> Iterable[SecondMoment | None] | None:
        if optimizer is not self._has_second_moment:  # preconditioning may be switched on in the middle of a training
            check_keeps_second_moment(optimizer)
            self._has_second_moment = optimizer
        return second_moments(optimizer, weights)

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        self._swap.restore()
        # A new one, because the context of the last one may end late: when a notebook lets go of its traceback.
        self._swap = WeightSwap()
        return self._swap(perturbation)

    def restore(self) -> None:
        self._swap.restore()
        super().restore()


def trainable(model: nn.Module) -> list[Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@contextmanager
def gradients_set_aside(weights: Sequence[Tensor], cleanup: Cleanup | None = None) -> Iterator[None]:
    """A plain backward pass inside begins with empty `.grad`, and afterwards what was there is there again.

    Not `torch.autograd.grad`, because reentrant checkpointing refuses that.
    """
    aside = [weight.grad for weight in weights]

    def put_back() -> None:
        for weight, gradient in zip(weights, aside, strict=True):
            weight.grad = gradient

    with (cleanup or Cleanup()).after(put_back):
        for weight in weights:
            weight.grad = None
        yield
