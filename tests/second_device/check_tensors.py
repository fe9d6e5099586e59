"""Perturbation and moments with tensors on two devices: weights, or an optimizer's state, that are offloaded to the
host while gradients are on the device.

Run by tests/second_device/test_second_device.py, or by hand: python -m pytest tests/second_device/check_tensors.py
"""

from tests.second_device.device import host_waits  # before transformers

# isort: split

import pytest
import torch
from torch import Tensor

from hf_fsam.optimizer_state import SecondMoment, has_stepped, momenta, precondition
from hf_fsam.perturbation import Direction, perturb

RHO, BETA, EPS = 0.3, 0.9, 1e-3
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # ε is 1e-4; the CPU's norm of 2²² numbers, float32 all along, is off by 6e-5
# Tensors longer than a chunk on either device (2¹⁹ and 2²² numbers), one of them in its rows alone, and tensors of few
# numbers, of one and of none.
SHAPES = [(2100, 2001), (2, 600_000), (700_001,), (3, 5), (), (0,)]


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def to(place: str, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(place, copy=True) for tensor in tensors]


def away(weights: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """θ + ρ d / ‖d‖₂ in double precision."""
    length = torch.cat([d.double().flatten() for d in directions]).norm()
    return [w.double() + RHO * d.double() / length for w, d in zip(weights, directions, strict=True)]


def device_generator() -> torch.Generator:
    return torch.Generator("npu").manual_seed(0)


def divided_by(moments: list[SecondMoment]) -> Direction:
    return lambda weights, gradients: precondition(gradients, moments)


@pytest.mark.parametrize("place", ["cpu", "npu"])
def test_weights_on_either_device_are_perturbed_exactly(place: str) -> None:
    weights, gradients = drawn(0, 0.02), drawn(1)
    result = perturb(to(place, weights), to("npu", gradients), RHO, device_generator())
    for value, wanted in zip(result.values, away(weights, gradients), strict=True):
        assert value.device.type == "npu"
        torch.testing.assert_close(value.cpu().double(), wanted, **CLOSE)
    assert result.radius.item() == pytest.approx(RHO, rel=1e-3)


@pytest.mark.parametrize("place", ["cpu", "npu"])
def test_in_bfloat16_the_radius_is_still_rho(place: str) -> None:
    weights = [w.bfloat16() for w in drawn(0, 0.02)]
    gradients = [g.bfloat16() for g in drawn(1)]
    result = perturb(to(place, weights), to("npu", gradients), RHO, device_generator())
    moved = [value.cpu().double() - w.double() for value, w in zip(result.values, weights, strict=True)]
    epsilon = [a - w.double() for a, w in zip(away(weights, gradients), weights, strict=True)]
    along = sum(float(torch.dot(m.flatten(), e.flatten())) for m, e in zip(moved, epsilon, strict=True)) / RHO
    assert along == pytest.approx(RHO, rel=0.02)
    assert result.radius.item() == pytest.approx(along, rel=1e-3)


@pytest.mark.parametrize("place", ["cpu", "npu"])
@pytest.mark.parametrize("step", [3, torch.tensor(3.0), torch.tensor(3.0, device="npu")], ids=["number", "cpu", "npu"])
def test_gradients_are_preconditioned_by_moments_on_either_device(place: str, step: float | Tensor) -> None:
    weights, gradients = drawn(0, 0.02), drawn(1)
    averages = [g.abs() + 0.1 for g in drawn(2)]
    moments = [SecondMoment(v, BETA, step, EPS) for v in to(place, averages)]
    directions = [
        g.double() / ((v.double() / (1 - BETA**3)).sqrt() + EPS) for g, v in zip(gradients, averages, strict=True)
    ]
    result = perturb(to(place, weights), to("npu", gradients), RHO, device_generator(), [divided_by(moments)])
    for value, wanted in zip(result.values, away(weights, directions), strict=True):
        torch.testing.assert_close(value.cpu().double(), wanted, **CLOSE)


def test_a_moment_of_no_steps_leaves_the_gradient_without_a_wait_of_the_host() -> None:
    gradients = drawn(1)
    found = to("npu", gradients)
    moments = [SecondMoment(torch.zeros_like(g), BETA, torch.zeros((), device="npu"), EPS) for g in found]
    with host_waits() as waits:
        precondition(found, moments)
    assert not waits
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, gradients, strict=True))


def test_a_momentum_on_the_host_perturbs_weights_on_the_device() -> None:
    weights = [torch.nn.Parameter(w) for w in to("npu", drawn(0, 0.02))]
    optimizer = torch.optim.AdamW(weights)
    assert not has_stepped(optimizer)
    averages = drawn(1)
    for weight, average in zip(weights, averages, strict=True):
        optimizer.state[weight] = {"exp_avg": average, "step": torch.ones(())}
    assert has_stepped(optimizer)
    found, copies = momenta(optimizer, weights)
    assert all(a is b for a, b in zip(found, weights, strict=True))
    result = perturb(found, copies, RHO, device_generator())
    for value, wanted in zip(result.values, away(drawn(0, 0.02), averages), strict=True):
        torch.testing.assert_close(value.cpu().double(), wanted, **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(averages, drawn(1), strict=True))  # the optimizer's are unchanged


def test_a_momentum_on_the_device_perturbs_weights_on_the_host() -> None:
    weights, averages = drawn(0, 0.02), drawn(1)
    result = perturb(weights, to("npu", averages), RHO, device_generator())
    for value, wanted in zip(result.values, away(weights, averages), strict=True):
        torch.testing.assert_close(value.cpu().double(), wanted, **CLOSE)


def test_a_perturbation_does_not_make_the_host_wait() -> None:
    weights, gradients = to("npu", drawn(0, 0.02)), to("npu", drawn(1))
    moments = [SecondMoment(g.abs(), BETA, torch.ones((), device="npu"), EPS) for g in gradients]
    generator = device_generator()
    with host_waits() as waits:
        perturb(weights, gradients, RHO, generator, [divided_by(moments)])
    assert not waits
