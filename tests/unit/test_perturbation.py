"""The perturbation of a list of tensors: its length, its direction, its rounding, its way back.

On a GPU (HF_FSAM_TEST_DEVICE=cuda) and in Triton's interpreter (`make test-triton`) the weights are moved by the
kernels of `hf_fsam/kernels`, and otherwise by plain PyTorch. What has to be true is the same.
"""

import itertools
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_fsam import kernels, perturbation
from hf_fsam.kernels import kernels_for
from hf_fsam.optimizer_state import SecondMoment, precondition
from hf_fsam.perturbation import WeightSwap, chunks, norm, own_storage, perturb, stochastic_round
from tests.toys import DEVICE


@pytest.fixture(autouse=True)
def _on_the_device_of_the_tests() -> Iterator[None]:
    """If Triton did not start, the kernels would not be tested, and nobody would see it."""
    if (DEVICE.type == "cuda" and torch.version.hip is None) or os.environ.get("TRITON_INTERPRET") == "1":
        assert kernels_for(DEVICE.type)
    with DEVICE:
        yield


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def _pair(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = _generator(7)
    weights = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape in shapes]
    return weights, [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_epsilon_is_rho_times_the_unit_direction_over_all_weights_together(preconditioned: bool) -> None:
    weights, gradients = _pair((3, 4), (5,), ())
    directions = [g.double() for g in gradients]
    moments = None
    if preconditioned:
        # v̂ = v / (1 − β₂ᵗ); the second weight has not been stepped yet.
        averages = [g.abs() + 0.1 for g in gradients]
        moments = [SecondMoment(v, 0.9, 3, 1e-3) for v in averages]
        moments[1] = None
        for i in (0, 2):
            directions[i] = directions[i] / ((averages[i].double() / (1 - 0.9**3)).sqrt() + 1e-3)
    length = torch.cat([d.flatten() for d in directions]).norm()
    expected = [w.double() + 0.3 * d / length for w, d in zip(weights, directions, strict=True)]
    whole = torch.cat([g.flatten() for g in gradients]).norm()

    divide = [lambda weights, gradients: precondition(gradients, moments)] if preconditioned else []
    result = perturb(weights, gradients, 0.3, _generator(), divide)
    for value, reference in zip(result.values, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-7)
    assert result.radius.item() == pytest.approx(0.3, rel=1e-5)
    assert result.gradient_norm.item() == pytest.approx(whole.item(), rel=1e-6)
    assert not result.skipped


def test_directions_are_applied_in_turn_after_the_norm_that_is_logged() -> None:
    weights, gradients = _pair((3, 4), (5,))
    before = [g.clone() for g in gradients]

    def adaptive(weights: list[Tensor], gradients: list[Tensor]) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.mul_(weight)

    def second_alone(weights: list[Tensor], gradients: list[Tensor]) -> None:
        gradients[0].zero_()

    result = perturb(weights, gradients, 0.3, _generator(), [adaptive, second_alone])
    direction = before[1] * weights[1]
    assert torch.equal(result.values[0], weights[0])
    torch.testing.assert_close(result.values[1], weights[1] + 0.3 * direction / direction.norm())
    assert result.gradient_norm.item() == pytest.approx(norm(before).item())
    assert result.radius.item() == pytest.approx(0.3, rel=1e-5)


def test_large_tensors_are_perturbed_in_chunks_with_the_same_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perturb(*_pair((37, 5), (64,)), 0.1, _generator())
    monkeypatch.setitem(perturbation._CHUNK, DEVICE.type, 16)
    pieces = perturb(*_pair((37, 5), (64,)), 0.1, _generator())
    assert all(map(torch.equal, whole.values, pieces.values))
    assert pieces.radius.item() == pytest.approx(whole.radius.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (40,), (9, 4), (1, 37), (3, 2, 50), (2, 1, 1, 33), (17, 1)])
def test_chunks_have_a_greatest_length_and_make_up_the_tensor(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(perturbation._CHUNK, DEVICE.type, 16)
    count = torch.Size(shape).numel()
    tensor = torch.arange(count).view(shape)
    pieces = [piece for (piece,) in chunks(tensor)]
    assert torch.cat([piece.flatten() for piece in pieces]).tolist() == list(range(count))
    assert max(piece.numel() for piece in pieces) <= 16
    assert all(piece.data_ptr() == tensor.data_ptr() for piece in pieces[:1])  # views


def test_tensors_on_two_devices_or_in_two_layouts_are_cut_at_the_same_places() -> None:
    """A shard that is offloaded, and its gradient: what is a chunk differs."""
    shape = (3, 1 << 19)
    offloaded, elsewhere = torch.empty(shape, device="cpu"), torch.empty(shape, device="meta")
    assert len(list(chunks(offloaded))) > len(list(chunks(elsewhere)))
    transposed = torch.empty(shape[::-1], device="meta").t()
    cut = list(chunks(offloaded, elsewhere, transposed))
    assert len(cut) == 3
    for pieces in cut:
        assert len({piece.shape for piece in pieces}) == 1


def test_tensors_of_two_shapes_are_not_cut() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(12,\)"):
        chunks(torch.zeros(3, 4), torch.zeros(12))


@pytest.mark.parametrize("step", [0, 0.0, torch.tensor(0.0), torch.tensor(0)], ids=repr)
def test_a_second_moment_that_has_averaged_nothing_yet_leaves_the_gradient(step: float | Tensor) -> None:
    """A fused optimizer has made its state by the time a loss scaler skips its first step."""
    _, gradients = _pair((3, 4), (2,))
    before = [g.clone() for g in gradients]
    precondition(gradients, [SecondMoment(torch.zeros_like(g), 0.999, step, 1e-8) for g in gradients])
    assert all(map(torch.equal, gradients, before))


@pytest.mark.parametrize("step", [1, 7.0, torch.tensor(7.0, device=DEVICE), torch.tensor(7)], ids=repr)
@pytest.mark.parametrize("beta", [0.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_moment_divides(dtype: torch.dtype, beta: float, step: float | Tensor) -> None:
    _, gradients = _pair((37, 130), (0,), dtype=dtype)
    averages = [g.square() for g in reversed(gradients[:1])] + [gradients[1]]
    averages[0][0] = 0.0
    t = float(step)
    wanted = gradients[0].double() / ((averages[0].double() / (1 - beta**t)).sqrt() + 1e-3)
    precondition(gradients, [SecondMoment(v, beta, step, 1e-3) for v in averages])
    # 1 − 0.999 has lost four digits of float32.
    torch.testing.assert_close(gradients[0].double(), wanted, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    weights, gradients = _pair((3, 4), (5,))
    gradients[1][2] = bad
    result = perturb(weights, gradients, 0.1, _generator())
    assert all(map(torch.equal, result.values, weights))
    assert result.skipped
    assert result.radius == 0


def test_a_gradient_of_zero_moves_nothing_and_is_no_failure() -> None:
    weights, gradients = _pair((3, 4))
    result = perturb(weights, [g.zero_() for g in gradients], 0.1, _generator())
    assert torch.equal(result.values[0], weights[0])
    assert not result.skipped
    assert result.radius == 0


def test_a_gradient_too_short_to_be_scaled_moves_nothing() -> None:
    weights, gradients = _pair((3, 4))
    result = perturb(weights, [g.mul_(1e-42) for g in gradients], 0.1, _generator())
    assert torch.equal(result.values[0], weights[0])


def test_no_weights_at_all() -> None:
    assert perturb([], [], 0.1, _generator()).radius == 0


def test_without_triton_plain_pytorch_moves_the_weights_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # asks for the kernels on the CPU, too
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "hf_fsam.kernels.triton_kernels", None)  # an import of it fails
    kernels_for.cache_clear()
    try:
        for _ in range(2):
            assert perturb(*_pair((3, 4)), 0.3, _generator()).radius.item() == pytest.approx(0.3, rel=1e-5)
    finally:
        kernels_for.cache_clear()
    assert caplog.text.count("do not start") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_keeps_the_radius_along_the_direction_where_rounding_to_nearest_loses_it(dtype: torch.dtype) -> None:
    """At 10⁸ weights of standard deviation 0.02, ρ = 0.05 moves each by 5·10⁻⁶. Here: the same move for each of 4·10⁶,
    of which rounding to nearest leaves 15 % in bfloat16."""
    count, rho = 1 << 22, 0.05 * (2**22 / 1e8) ** 0.5
    weights, gradients = _pair((count,), dtype=dtype)
    direction = gradients[0].float() / gradients[0].float().norm()
    nearest = (weights[0].float() + rho * direction).to(dtype)
    kept = torch.dot(nearest.float() - weights[0].float(), direction).item() / rho
    if dtype == torch.bfloat16:
        assert kept < 0.2
    result = perturb(weights, gradients, rho, _generator())
    along = torch.dot(result.values[0].float() - weights[0].float(), direction).item()
    assert along == pytest.approx(rho, rel=0.05)
    assert result.radius.item() == pytest.approx(along, rel=1e-2)


def test_bfloat16_keeps_the_radius_at_a_hundred_million_weights() -> None:
    weights, gradients = _pair((10_000, 10_000), dtype=torch.bfloat16)
    length = gradients[0].double().norm().item()
    result = perturb(weights, gradients, 0.05, _generator())
    assert result.gradient_norm.item() == pytest.approx(length, rel=1e-3)
    assert result.radius.item() == pytest.approx(0.05, rel=0.01)  # the mean is exact; its error is 0.4 % here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_has_the_right_mean_and_only_neighbours(dtype: torch.dtype) -> None:
    low = torch.tensor([1.0, -1.0, 0.02, -3.0], dtype=dtype)
    x = low.float() * (1 + 0.3 * torch.finfo(dtype).eps)
    rounded = stochastic_round(x.expand(200_000, 4).contiguous(), dtype, _generator())
    for column, number, below in zip(rounded.float().T, x, low.float(), strict=True):
        gap = column.unique() - below
        assert len(gap) == 2
        assert 0 in gap
        # Its standard error is gap/2/√200000, a thousandth of the gap.
        assert column.double().mean().item() == pytest.approx(number.item(), abs=0.01 * gap.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_perturbed_weight_is_a_neighbour_of_what_it_should_be_and_right_in_the_mean(dtype: torch.dtype) -> None:
    count, eps = 100_000, torch.finfo(dtype).eps
    theta = torch.tensor([1.0, -1.0, 0.02, -3.0], dtype=dtype)
    weights = [theta.repeat(count), theta.repeat(count)]
    gradients = [weight.clone() for weight in weights]
    length = norm(gradients).item()
    result = perturb(weights, gradients, 0.3 * eps * length, _generator())  # so that θ+ε is θ (1 + 0.3 eps)
    values = torch.stack(result.values).view(-1, 4).double()
    for column, number in zip(values.T, theta.double(), strict=True):
        gap = column.unique() - number
        assert len(gap) == 2
        assert 0 in gap
        wanted = number.item() * (1 + 0.3 * eps)
        assert column.mean().item() == pytest.approx(wanted, abs=0.01 * gap.abs().max().item())
    # Each weight has noise of its own, and so has each piece of it.
    pieces = [piece for value in result.values for piece in value[: 8 * 1024].split(1024)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(pieces, 2))


def test_float32_weights_move_by_whole_gaps_of_what_the_passes_round_to_and_right_in_the_mean() -> None:
    count, gap = 100_000, 2.0**-7  # of bfloat16 between 1 and 2
    theta = torch.full((count,), 1.00123)
    rho = 0.3 * gap * count**0.5
    result = perturb([theta], [torch.ones(count)], rho, _generator(), passes_dtype=torch.bfloat16)
    moved = (result.values[0] - theta).double()
    assert moved.unique().tolist() == pytest.approx([0, gap], abs=1e-6)
    assert moved.mean().item() == pytest.approx(0.3 * gap, rel=0.02)


@pytest.mark.parametrize("passes_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_seed_decides_the_noise(dtype: torch.dtype, passes_dtype: torch.dtype) -> None:
    def values(seed: int) -> Tensor:
        result = perturb(*_pair((3, 4099), dtype=dtype), 1e-3, _generator(seed), passes_dtype=passes_dtype)
        return result.values[0].clone()

    assert torch.equal(values(1), values(1))
    rounded = dtype == torch.bfloat16 or (dtype == torch.float32 and passes_dtype == torch.bfloat16)
    assert torch.equal(values(1), values(2)) != rounded


def test_weights_whose_numbers_do_not_lie_in_a_row_are_perturbed_alike() -> None:
    """A view that is transposed or has gaps goes another way where a kernel takes the others."""
    weights, gradients = _pair((64, 48), (64, 48), (64, 48))
    plain = perturb([w.clone() for w in weights], [g.clone() for g in gradients], 0.1, _generator())
    weights[1], gradients[1] = (x[1].t().contiguous().t() for x in (weights, gradients))
    wide = torch.zeros(64, 96)
    wide[:, ::2] = gradients[2]
    gradients[2] = wide[:, ::2]
    views = perturb(weights, gradients, 0.1, _generator())
    for value, other in zip(views.values, plain.values, strict=True):
        torch.testing.assert_close(value, other)
    assert views.radius.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("moved", [0.0, 1e-5, 1e-4])
def test_what_passes_in_bfloat16_see_of_float32_weights_moves_by_rho(moved: float) -> None:
    """Weights from a bfloat16 checkpoint stay numbers of that format until training has moved them: a pass that rounds
    to nearest would see θ where ε is shorter than half a gap."""
    count, rho = 1 << 22, 0.02
    (theta,), (gradient,) = _pair((count,), dtype=torch.bfloat16)
    theta = theta.float() + moved * torch.randn(count, generator=_generator())
    direction = gradient.float() / gradient.float().norm()

    def seen(weights: torch.Tensor) -> float:
        return torch.dot(weights.bfloat16().float() - theta.bfloat16().float(), direction).item()

    if moved < 1e-4:
        assert seen(theta + rho * direction) < 0.5 * rho
    result = perturb([theta], [direction.clone()], rho, _generator(), passes_dtype=torch.bfloat16)
    assert seen(result.values[0]) == pytest.approx(rho, rel=0.03)
    assert result.radius.item() == pytest.approx(rho, rel=0.03)


def test_numbers_that_need_no_rounding_are_kept() -> None:
    x = torch.randn(1000, generator=_generator()).bfloat16()
    assert torch.equal(stochastic_round(x.float(), torch.bfloat16, _generator()), x)
    y = torch.randn(1000, generator=_generator())
    assert torch.equal(stochastic_round(y, torch.float32, _generator()), y)


def test_the_swap_is_exact_and_undone_by_any_exception() -> None:
    weights, gradients = _pair((3, 4), (5,), dtype=torch.bfloat16)
    parameters = [torch.nn.Parameter(w) for w in weights]
    before, places = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    result = perturb(parameters, gradients, 1.0, _generator())
    swap = WeightSwap()

    def interrupted() -> None:
        with swap(result):
            assert not any(map(torch.equal, parameters, before))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(map(torch.equal, parameters, before))
    assert [p.data_ptr() for p in parameters] == places  # whoever holds a view of the weights still does
    swap.restore()
    assert all(map(torch.equal, parameters, before))


def test_gradients_that_share_memory_are_told_apart() -> None:
    """p.view(-1) + q.view(-1) hands both leaves the same memory; writing into one would write into the other."""
    p, q = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    ((p.view(-1) + q.view(-1)) ** 2).sum().backward()
    assert p.grad.data_ptr() == q.grad.data_ptr()
    taken = torch.zeros(4)
    own = own_storage([p.grad, q.grad, taken], [taken])
    assert len({g.data_ptr() for g in own} | {taken.data_ptr()}) == 4
    assert torch.equal(own[0], p.grad)
    assert torch.equal(own[1], q.grad)


def test_norm_is_over_all_and_in_float32() -> None:
    tensors = [torch.full((300,), 0.1, dtype=torch.bfloat16), torch.ones(2, 2)]
    assert norm(tensors).item() == pytest.approx((300 * float(tensors[0][0]) ** 2 + 4) ** 0.5, rel=1e-6)
    assert norm(tensors).dtype == torch.float32
