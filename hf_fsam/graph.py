"""The autograd graph: a walk over it, and the order of its nodes."""

from collections.abc import Collection, Iterator
from typing import Any

import torch


def autograd_nodes(*roots: Any, stop: Collection[Any] = ()) -> Iterator[Any]:
    """Yields `roots`, each a tensor's `grad_fn` or None, and every node that their backward passes lead to, each once.

    Args:
        stop: nodes that are not yielded, and past which the walk does not go.
    """
    seen, stack = set(stop), list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parents(node))


def parents(node: Any) -> list[Any]:
    """The nodes that the backward pass of `node` leads to. None where its tensor is gone and nothing was computed from
    it, for which torch 2.8 has an error."""
    try:
        return [parent for parent, _ in node.next_functions]
    except RuntimeError:
        return []


def node_number(node: Any) -> int:
    """A node's place in the order in which this thread makes nodes (private in torch 2.13)."""
    return node._sequence_nr()


def node_count() -> int:
    """More than the number of every node that this thread has made."""
    with torch.enable_grad():
        return node_number(torch.zeros((), requires_grad=True).clone().grad_fn)
