"""The walk over the autograd graph."""

import torch

from hf_fsam.graph import autograd_nodes


def test_each_node_is_visited_once_and_the_walk_ends_at_the_stops() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    middle = a * 2
    loss = (middle * middle + middle * b).sum()
    found = list(autograd_nodes(loss.grad_fn))
    assert len(found) == len(set(found))
    assert {id(node.variable) for node in found if hasattr(node, "variable")} == {id(a), id(b)}
    rest = list(autograd_nodes(loss.grad_fn, stop={middle.grad_fn}))
    assert middle.grad_fn not in rest
    assert {id(node.variable) for node in rest if hasattr(node, "variable")} == {id(b)}
    assert list(autograd_nodes(None)) == []
