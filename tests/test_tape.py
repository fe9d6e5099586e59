"""The tape by itself: plain torch, no Trainer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fsam.tape import Recording, Tape


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def _record(tape: Tape, forward: Callable[[], Tensor], scale: float = 1.0) -> Recording:
    with tape.record(keep=True) as recording:
        (tape.see_loss(forward()) * scale).backward()
    return recording


def _record_cut(tape: Tape, forward: Callable[[], Tensor]) -> Recording:
    with tape.record(keep=True, cut=True) as recording:
        recording.differentiate(tape.see_loss(forward()))
    return recording


def _replay(tape: Tape, clean: Recording, cotangents: Recording | None, forward: Callable[[], Tensor], scale: float):
    with tape.replay(clean, cotangents) as replayed:
        loss = tape.see_loss(forward())
        (loss * scale).backward()
    return loss, replayed


def test_the_replayed_gradient_is_the_new_jacobian_with_the_old_cotangent(head: nn.Linear) -> None:
    """z = W h and ℓ = Σ z³: u = 3 z², and ∂ℓ/∂W = u hᵀ with u of the first h and hᵀ of the second."""
    h1, h2 = torch.randn(3), torch.randn(3)
    tape = Tape()
    tape.attach("head", head)
    clean = _record(tape, lambda: head(h1).pow(3).sum(), scale=8.0)
    u = 3 * head(h1).detach().square()
    torch.testing.assert_close(clean.cotangents[0], 8 * u)
    head.zero_grad()
    loss, replayed = _replay(tape, clean, clean, lambda: head(h2).pow(3).sum(), scale=0.5)
    torch.testing.assert_close(head.weight.grad, 0.5 * torch.outer(u, h2))
    assert loss == clean.loss  # the clean value
    assert replayed.loss != clean.loss
    assert not clean.cotangents  # used up


def test_cut_ends_the_backward_pass_at_the_boundary(head: nn.Linear) -> None:
    tape = Tape()
    tape.attach("head", head)
    recording = _record_cut(tape, lambda: head(torch.ones(3)).pow(3).sum() + head.bias.sum())
    assert recording.cotangents[0].shape == (4,)
    assert recording.scale == 1
    assert head.weight.grad is None
    assert head.bias.grad is None  # nor along the way that the boundary does not cut


def test_two_crossings_that_share_one_cotangent_are_scaled_once_each(head: nn.Linear) -> None:
    h1, h2 = torch.randn(3), torch.randn(3)

    def forward() -> Tensor:
        return (head(h1) + head(h2)).pow(3).sum()

    tape = Tape()
    tape.attach("head", head)
    clean = _record(tape, forward)
    expected = 0.5 * head.weight.grad
    head.zero_grad()
    _replay(tape, clean, clean, forward, scale=0.5)
    torch.testing.assert_close(head.weight.grad, expected)


def test_an_expanded_cotangent_is_scaled_too(head: nn.Linear) -> None:
    tape = Tape()
    tape.attach("head", head)
    clean = _record(tape, lambda: head(torch.ones(3)).sum())
    head.zero_grad()
    _replay(tape, clean, clean, lambda: head(torch.ones(3)).sum(), scale=0.5)
    torch.testing.assert_close(head.weight.grad, torch.full((4, 3), 0.5))


def test_passes_that_differ_are_an_error(head: nn.Linear) -> None:
    tape = Tape()
    tape.attach("head", head)
    one, two = torch.ones(3), torch.ones(2, 3)

    def once(h: Tensor = one) -> Tensor:
        return head(h).sum()

    def twice() -> Tensor:
        return (head(one) * head(one)).sum()

    clean = _record(tape, once)
    with pytest.raises(RuntimeError, match=r"tensor \(2, 4\) where the first had \(4,\)"):
        _replay(tape, clean, clean, lambda: once(two), scale=1.0)
    clean = _record(tape, once)
    with pytest.raises(RuntimeError, match="where the first had none"):
        _replay(tape, clean, clean, twice, scale=1.0)
    clean = _record(tape, twice)
    with pytest.raises(RuntimeError, match="1 recorded cotangents met no tensor"):
        _replay(tape, clean, clean, once, scale=1.0)
    with pytest.raises(RuntimeError, match="compute_loss was called twice"):
        _record(tape, lambda: tape.see_loss(head(one).sum()))


def test_outside_of_a_pass_the_hook_does_nothing(head: nn.Linear) -> None:
    tape = Tape()
    tape.attach("head", head)
    z = head(torch.ones(3))
    assert z._backward_hooks is None
    assert tape.see_loss(z) is z
    tape.detach()
    assert not head._forward_hooks
