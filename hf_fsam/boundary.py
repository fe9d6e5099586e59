"""The hook on the boundary, through which a pass sees what crosses it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_fsam.cleanup import Cleanup
from hf_fsam.graph import autograd_nodes, parents
from hf_fsam.heads.deferred_logits import DeferredLogits
from hf_fsam.heads.find import IDENTITY
from hf_fsam.heads.fused_head import DeferringForward, FusedHead
from hf_fsam.heads.trl import intercepted
from hf_fsam.passes import CleanPass, SecondPass, Through


class Boundary:
    """A forward hook on each module of the boundary, which does nothing except inside :meth:`running`.

    Attributes:
        name: of the modules, as in `model.named_modules()`.
        head: the fused head of one of them, where one can have it.
    """

    def __init__(self, cleanup: Cleanup) -> None:
        self.name = ""
        self.head: FusedHead | None = None
        self._cleanup = cleanup
        self._replaced_forward: list[nn.Module] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._pass: CleanPass | SecondPass | None = None

    def attach(self, modules: Mapping[str, nn.Module], head: FusedHead | None = None, compiled: bool = False) -> None:
        """Put the hooks on `modules`. They stay there between steps, because torch.compile would compile anew for each
        hook that comes or goes.

        compiled: torch.compile runs the model. It does not look at hooks (torch 2.13): code that it has compiled for
        another model of this class, or for this one before, would run here without the hook. It does look at whether
        `forward` is the class's, so each module gets a `forward` of its own.
        """
        self.name, self.head = ", ".join(modules), head
        for name, module in modules.items():
            if compiled and "forward" not in module.__dict__:
                module.__dict__["forward"] = MethodType(type(module).forward, module)
                self._replaced_forward.append(module)
            self._handles.append(module.register_forward_hook(_Hook(self, name)))

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced_forward:
            module.__dict__.pop("forward", None)
        self._handles, self._replaced_forward = [], []

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

    def see_output(self, name: str, output: Any) -> Any:
        """What the module called `name` returned; None leaves it as it is."""
        one_pass = self._pass
        if one_pass is None or not torch.is_grad_enabled() or isinstance(output, DeferredLogits):
            return None
        if isinstance(output, Tensor):
            return _crossed(one_pass, output)
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is not None or not isinstance(output, MutableMapping | list | tuple):
            what = "the loss with it" if loss is not None else type(output).__name__
            raise TypeError(
                f"fsam_boundary: module {name!r} returns {what}, but the boundary must return what the loss takes, one "
                f"tensor or several in a mapping, a list or a tuple. Name the module that makes the logits. {IDENTITY}."
            )
        return _crossed(one_pass, output)


def _crossed(one_pass: CleanPass | SecondPass, output: Any) -> Any:
    """A copy of `output` whose tensors have crossed the boundary. Those in `output` itself have not: one may be
    computed from another, and the module's caller may have it for an input of the network again, or, where the module
    is an identity, for a term of the loss past the boundary."""
    if isinstance(output, Tensor):
        return one_pass.take_logits(Through.apply(output)) if output.requires_grad else output
    if isinstance(output, MutableMapping):
        result = copy.copy(output)
        for key, value in output.items():
            result[key] = _crossed(one_pass, value)
        return result
    if isinstance(output, list | tuple):
        parts = [_crossed(one_pass, value) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


class _Hook:
    """A forward hook that a callback may copy or pickle with the model: the copy does nothing."""

    def __init__(self, boundary: Boundary, name: str) -> None:
        self.boundary, self.name = boundary, name

    # Hooks with side effects in the backward pass are not to be traced: the compiled graph breaks here, once.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.boundary.see_output(self.name, output)

    def __reduce__(self) -> tuple:
        # A function of three arguments that returns None, and that loads where this package is not installed.
        return getattr, (nullcontext(), "__exit__")


def is_in_compiled(modules: Iterable[nn.Module], model: nn.Module) -> bool:
    """Whether the user has compiled `model`, or a part of it that has one of `modules` in it."""
    return any(_is_compiled(part) and not set(modules).isdisjoint(part.modules()) for part in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    """The first is what `module.compile()` sets, the second what torch.compile(module) and module.forward =
    torch.compile(module.forward) do (torch 2.13)."""
    own = vars(module)
    return own.get("_compiled_call_impl") is not None or hasattr(own.get("forward"), "_torchdynamo_orig_callable")


def weights_past_boundary(loss: Tensor, clean: CleanPass, names: Mapping[Any, str]) -> list[str]:
    """Names of the weights that reach `loss` on a way that does not cross the boundary.

    Their gradient on that way (a router's balancing loss, say) is not split: both factors are taken at θ+ε.
    """
    return _weights(autograd_nodes(loss.grad_fn, stop=clean.nodes), names)


def weights_behind_boundary(clean: CleanPass, names: Mapping[Any, str]) -> list[str]:
    """Names of the weights that reach the loss on a way that crosses the boundary."""
    return _weights(_inside(clean), names)


def crosses_twice(clean: CleanPass) -> bool:
    """Whether something that crossed the boundary was computed from something else that did. The cotangent of the
    latter would then have a part of the network's Jacobian in it."""
    return not clean.nodes.isdisjoint(_inside(clean))


def _inside(clean: CleanPass) -> Iterator[Any]:
    """The nodes that what crossed the boundary was computed by."""
    return autograd_nodes(*(parent for node in clean.nodes if node is not None for parent in parents(node)))


def _weights(nodes: Iterator[Any], names: Mapping[Any, str]) -> list[str]:
    leaves = (getattr(node, "variable", None) for node in nodes)
    return sorted({names[leaf] for leaf in leaves if leaf is not None and leaf in names})
