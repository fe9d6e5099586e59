"""The clean and the second pass by themselves, in plain torch and without a Trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fsam.boundary import Boundary
from hf_fsam.cleanup import Cleanup
from hf_fsam.passes import CleanPass, SecondPass


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


@pytest.fixture
def boundary(head: nn.Linear) -> Boundary:
    attached = Boundary(Cleanup())
    attached.attach({"head": head})
    return attached


def _record(boundary: Boundary, forward: Callable[[], Tensor], scale: float = 1.0) -> CleanPass:
    clean = CleanPass()
    with boundary.running(clean):
        (clean.take_loss(forward()) * scale).backward()
    return clean


def _replay(
    boundary: Boundary, clean: CleanPass, cotangents: CleanPass | None, forward: Callable[[], Tensor], scale: float
) -> tuple[Tensor, SecondPass]:
    second = SecondPass(clean, cotangents)
    with boundary.running(second):
        loss = second.take_loss(forward())
        (loss * scale).backward()
    return loss, second


def test_the_second_pass_joins_its_own_jacobian_with_the_recorded_cotangent(
    head: nn.Linear, boundary: Boundary
) -> None:
    """z = W h and ℓ = Σ z³: u = 3 z², and ∂ℓ/∂W = u hᵀ with u of the first h and hᵀ of the second."""
    h1, h2 = torch.randn(3), torch.randn(3)
    clean = _record(boundary, lambda: head(h1).pow(3).sum(), scale=8.0)
    u = 3 * head(h1).detach().square()
    torch.testing.assert_close(clean.crossings[0].cotangents[0], 8 * u)
    head.zero_grad()
    loss, second = _replay(boundary, clean, clean, lambda: head(h2).pow(3).sum(), scale=0.5)
    torch.testing.assert_close(head.weight.grad, 0.5 * torch.outer(u, h2))
    assert loss == clean.loss  # the clean value
    assert second.loss != clean.loss
    assert not clean.crossings[0].cotangents  # taken out, so that its memory is free


class _Sink(torch.autograd.Function):
    """As that of DDP, which sends None back to an output that the loss ignored."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return upstream


def test_an_output_that_gets_no_gradient_has_no_cotangent(head: nn.Linear) -> None:
    class Outputs(nn.Module):
        def forward(self, h: Tensor) -> dict[str, Tensor]:
            return {"ignored": ignored(h), "z": head(h)}

    ignored, outputs, boundary = nn.Linear(3, 4), Outputs(), Boundary(Cleanup())
    boundary.attach({"outputs": outputs})

    def loss(h: Tensor) -> Tensor:
        _, z = _Sink.apply(*outputs(h).values())
        return z.pow(3).sum()

    h1, h2 = torch.randn(3), torch.randn(3)
    clean = _record(boundary, lambda: loss(h1))
    assert [len(crossing.cotangents) for crossing in clean.crossings] == [0, 1]
    head.zero_grad()
    _replay(boundary, clean, clean, lambda: loss(h2), scale=1.0)
    torch.testing.assert_close(head.weight.grad, torch.outer(3 * head(h1).detach().square(), h2))
    assert ignored.weight.grad is None


def test_a_loss_may_differentiate_by_itself(head: nn.Linear, boundary: Boundary) -> None:
    """Of two crossings, the first is back-propagated before the loss is returned, so without the loss scale. The second
    is differentiated twice, and its cotangents come back in the order in which they were recorded."""
    h1, h2 = torch.randn(3), torch.randn(3)

    def forward(h: Tensor) -> Tensor:
        head(2 * h).pow(3).sum().backward()
        z = head(h)
        (first,) = torch.autograd.grad(z.pow(2).sum(), head.weight, retain_graph=True)
        seen.append(first)
        return z.pow(3).sum()

    seen: list[Tensor] = []
    clean = _record(boundary, lambda: forward(h1), scale=8.0)
    early, square, late = 3 * head(2 * h1).detach().square(), 2 * head(h1).detach(), 3 * head(h1).detach().square()
    head.zero_grad()
    _replay(boundary, clean, clean, lambda: forward(h2), scale=0.5)
    torch.testing.assert_close(seen[1], torch.outer(square, h2))
    torch.testing.assert_close(head.weight.grad, torch.outer(early, 2 * h2) + 0.5 * torch.outer(late, h2))


def test_a_clean_pass_that_stops_at_the_boundary_gives_the_weights_no_gradient(
    head: nn.Linear, boundary: Boundary
) -> None:
    clean = CleanPass(stops_at_boundary=True)
    with boundary.running(clean):
        clean.differentiate(clean.take_loss(head(torch.ones(3)).pow(3).sum() + head.bias.sum()))
    assert clean.crossings[0].cotangents[0].shape == (4,)
    assert clean.scale == 1
    assert head.weight.grad is None
    assert head.bias.grad is None  # nor along the way past the boundary


@pytest.mark.parametrize("stops_at_boundary", [False, True])
def test_what_the_loss_takes_of_the_input_of_an_identity_is_past_the_boundary(
    head: nn.Linear, stops_at_boundary: bool
) -> None:
    """ℓ = Σ z³ + Σ z⁴, of which the identity sees the first alone: ∂ℓ/∂W = (3 z₁² + 4 z₂³) h₂ᵀ, plain SAM's along the
    second. An identity returns the tensor that it is given."""
    identity, boundary = nn.Identity(), Boundary(Cleanup())
    boundary.attach({"identity": identity})

    def loss(h: Tensor) -> Tensor:
        z = head(h)
        return identity(z).pow(3).sum() + z.pow(4).sum()

    h1, h2 = torch.randn(3), torch.randn(3)
    clean = CleanPass(stops_at_boundary=stops_at_boundary)
    with boundary.running(clean):
        clean.differentiate(clean.take_loss(loss(h1))) if stops_at_boundary else clean.take_loss(loss(h1)).backward()
    head.zero_grad()
    _replay(boundary, clean, clean, lambda: loss(h2), scale=1.0)
    z1, z2 = head(h1).detach(), head(h2).detach()
    torch.testing.assert_close(head.weight.grad, torch.outer(3 * z1**2 + 4 * z2**3, h2))


def test_two_crossings_that_share_one_cotangent_are_scaled_once_each(head: nn.Linear, boundary: Boundary) -> None:
    h1, h2 = torch.randn(3), torch.randn(3)

    def forward() -> Tensor:
        return (head(h1) + head(h2)).pow(3).sum()

    clean = _record(boundary, forward)
    expected = 0.5 * head.weight.grad
    head.zero_grad()
    _replay(boundary, clean, clean, forward, scale=0.5)
    torch.testing.assert_close(head.weight.grad, expected)


def test_an_expanded_cotangent_is_scaled_too(head: nn.Linear, boundary: Boundary) -> None:
    clean = _record(boundary, lambda: head(torch.ones(3)).sum())
    head.zero_grad()
    _replay(boundary, clean, clean, lambda: head(torch.ones(3)).sum(), scale=0.5)
    torch.testing.assert_close(head.weight.grad, torch.full((4, 3), 0.5))


def test_passes_that_cross_the_boundary_differently_are_an_error(head: nn.Linear, boundary: Boundary) -> None:
    one, two = torch.ones(3), torch.ones(2, 3)

    def once(h: Tensor = one) -> Tensor:
        return head(h).sum()

    def twice() -> Tensor:
        return (head(one) * head(one)).sum()

    clean = _record(boundary, once)
    with pytest.raises(RuntimeError, match=r"tensor \(2, 4\) where the first had \(4,\)"):
        _replay(boundary, clean, clean, lambda: once(two), scale=1.0)
    clean = _record(boundary, once)
    with pytest.raises(RuntimeError, match="where the first had none"):
        _replay(boundary, clean, clean, twice, scale=1.0)
    clean = _record(boundary, twice)
    with pytest.raises(RuntimeError, match="1 recorded cotangents met no tensor"):
        _replay(boundary, clean, clean, once, scale=1.0)
    with pytest.raises(RuntimeError, match="compute_loss was called twice"), boundary.running(clean := CleanPass()):
        clean.take_loss(clean.take_loss(head(one).sum()))


def test_an_interrupted_backward_pass_is_distinguished_from_one_that_never_began(
    head: nn.Linear, boundary: Boundary
) -> None:
    def refuse(gradient: Tensor) -> None:
        raise ValueError("mine")

    def forward() -> Tensor:
        z = head(torch.ones(3))
        z.register_hook(refuse)
        return z.sum()

    clean = CleanPass()
    with pytest.raises(ValueError, match="mine"), boundary.running(clean):
        clean.take_loss(forward()).backward()
    assert clean.interrupted
    whole = _record(boundary, lambda: head(torch.ones(3)).sum())
    assert whole.backward_ended
    assert not whole.interrupted
    assert not CleanPass().interrupted


def test_outside_of_a_pass_the_hook_leaves_the_output_alone(head: nn.Linear, boundary: Boundary) -> None:
    z = head(torch.ones(3))
    assert z._backward_hooks is None
    boundary.detach()
    assert not head._forward_hooks


def test_a_loss_of_no_weight_has_a_backward_pass_that_stops_at_it() -> None:
    clean = CleanPass(stops_at_boundary=True)
    clean.differentiate(clean.take_loss(torch.tensor(2.0)))
    assert clean.was_differentiated
    assert clean.loss == 2.0
