"""The hook on the boundary, through which a pass sees what crosses it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsam.cleanup import Cleanup
from hf_fsam.graph import autograd_nodes
from hf_fsam.heads.deferred_logits import DeferredLogits
from hf_fsam.heads.find import IDENTITY
from hf_fsam.heads.fused_head import DeferringForward, FusedHead
from hf_fsam.heads.trl import intercepted
from hf_fsam.passes import CleanPass, SecondPass


class Boundary:
    """A forward hook on the boundary, which does nothing except inside :meth:`running`.

    Attributes:
        name: of the module, as in `model.named_modules()`.
        head: the module's fused head, where it can have one.
    """

    def __init__(self, cleanup: Cleanup) -> None:
        self.name = ""
        self.head: FusedHead | None = None
        self._cleanup = cleanup
        self._module: nn.Module | None = None
        self._replaced_forward = False
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._pass: CleanPass | SecondPass | None = None

    def attach(self, name: str, module: nn.Module, head: FusedHead | None = None, compiled: bool = False) -> None:
        """Put the hook on the boundary `module`. It stays there between steps, because torch.compile would compile anew
        for each hook that comes or goes.

        compiled: torch.compile runs the model. It does not look at hooks (torch 2.13): code that it has compiled for
        another model of this class would run here without the hook. It does look at whether `forward` is the class's,
        so the module gets a `forward` of its own.
        """
        self.name, self.head, self._module = name, head, module
        self._replaced_forward = compiled and "forward" not in module.__dict__
        if self._replaced_forward:
            module.__dict__["forward"] = MethodType(type(module).forward, module)
        self._handle = module.register_forward_hook(_Hook(self))

    @property
    def attached(self) -> bool:
        return self._handle is not None

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._module is not None and self._replaced_forward:
            self._module.__dict__.pop("forward", None)
        self._handle = self._module = None

    @contextmanager
    def running(self, one_pass: CleanPass | SecondPass) -> Iterator[None]:
        """Inside, what crosses the boundary goes through the doors of `one_pass`."""
        if one_pass.defers_logits is None:
            one_pass.defers_logits = self.attached and self.head is not None and not self.head.off
        head = self.head if one_pass.defers_logits else None

        def undo() -> None:
            self._pass, one_pass.ended = None, True

        with ExitStack() as contexts:
            contexts.enter_context(self._cleanup.after(undo))
            self._pass = one_pass
            if self.attached:
                contexts.enter_context(intercepted(one_pass, self._cleanup))
            if head is not None:
                deferring = DeferringForward(head, one_pass)
                contexts.enter_context(self._cleanup.replaced(head.module, "forward", deferring))
            yield
        if self.attached:
            one_pass.finish(self.name)

    def see_output(self, output: Any) -> Tensor | None:
        """What the module returned; None leaves it as it is."""
        if self._pass is None or not torch.is_grad_enabled() or isinstance(output, DeferredLogits):
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"fsam_boundary: module {self.name!r} returns {type(output).__name__}, but the boundary must return "
                f"one tensor, the logits. Name the module that makes them. {IDENTITY}."
            )
        return self._pass.take_logits(output) if output.requires_grad else None


class _Hook:
    """A forward hook that a callback may copy or pickle with the model: the copy does nothing."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    # Hooks with side effects in the backward pass are not to be traced: the compiled graph breaks here, once.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        return self.boundary.see_output(output)

    def __reduce__(self) -> tuple:
        # A function of three arguments that returns None, and that loads where this package is not installed.
        return getattr, (nullcontext(), "__exit__")


def weights_past_boundary(loss: Tensor, clean: CleanPass, names: Mapping[Any, str]) -> list[str]:
    """Names of the weights that reach `loss` on a way that does not cross the boundary.

    Their gradient on that way (a router's balancing loss, say) is not split: both factors are taken at θ+ε.
    """
    leaves = (getattr(node, "variable", None) for node in autograd_nodes(loss.grad_fn, clean.nodes))
    return sorted({names[leaf] for leaf in leaves if leaf is not None and leaf in names})
