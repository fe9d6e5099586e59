"""The second device behaves as an accelerator does. If it did not, the other checks would prove nothing.

Run by tests/second_device/test_second_device.py, or by hand: python -m pytest tests/second_device/check_rules.py
"""

from tests.second_device.device import host_waits  # before transformers

# isort: split

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from tests.toys import gpt2


def here(*shape: int) -> Tensor:
    return torch.ones(shape, device="npu")


REFUSED: dict[str, Callable[[], Any]] = {
    "a sum": lambda: here(3) + torch.ones(3),
    "a sum in place": lambda: torch.ones(3).add_(here(3)),
    "a number of the host that is written to": lambda: torch.ones(()).add_(here()),
    "a product of matrices": lambda: here(2, 2) @ torch.ones(2, 2),
    "a product of vectors": lambda: torch.dot(here(2), torch.ones(2)),
    "numbers stacked": lambda: torch.stack([here(), torch.ones(())]),
    "an index to gather at": lambda: here(2).gather(0, torch.zeros(1, dtype=torch.long)),
    "tokens": lambda: F.embedding(torch.zeros(1, dtype=torch.long), here(2, 2)),
    "targets": lambda: F.cross_entropy(here(2, 2), torch.zeros(2, dtype=torch.long)),
    "lists": lambda: torch._foreach_add_([here(2)], [torch.ones(2)]),
    "a generator": lambda: torch.randn(2, device="npu", generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_operator_on_tensors_of_two_devices_is_refused(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|[Ee]xpected a.*generator|different from other tensors"):
        REFUSED[what]()


def test_a_single_number_on_the_host_is_accepted_where_cuda_accepts_it() -> None:
    two = torch.tensor(2.0)
    for result in (here(3) * two, here(3).div_(two).mul_(4), torch.where(here(3) > 0, two, 0.0), here(3).fill_(two)):
        assert result.tolist() == [2, 2, 2]
    assert here(3)[torch.tensor([0, 2])].tolist() == [1, 1]


PINNED = {"pin_memory": True}
WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: here().item(),
    "truth": lambda: bool(here(2).all()),
    "a mask": lambda: here(3)[here(3) > 0],
    "a mask written to": lambda: here(3).index_put_([here(3) > 0], here(3)),
    "nonzero": lambda: here(3).nonzero(),
    "equal": lambda: torch.equal(here(3), here(3)),
    "unique": lambda: here(3).unique(),
    "to the host": lambda: here(3).cpu(),
    "to pageable memory of the host": lambda: torch.empty(3).copy_(here(3), non_blocking=True),
    "to pinned memory, blocking": lambda: torch.empty(3, **PINNED).copy_(here(3)),
    "from the host": lambda: torch.ones(3).to("npu"),
    "a tensor of numbers": lambda: torch.tensor([1.0], device="npu"),
    "an index from the host": lambda: here(3)[torch.tensor([0, 2])],
    "synchronize": lambda: torch.npu.synchronize(),
}
AT_ONCE: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (here(3) + 1).relu().sum().sqrt(),
    "a number of the host": lambda: here(3) * torch.tensor(2.0),
    "a number written to a mask": lambda: here(3).masked_fill_(here(3) > 0, 0.0),
    "a number put where a mask is": lambda: here(3).__setitem__(here(3) > 0, 0.0),
    "to pinned memory": lambda: torch.empty(3, **PINNED).copy_(here(3), non_blocking=True),
    "to the host, which torch pins": lambda: here(3).to("cpu", non_blocking=True),
    "from pinned memory": lambda: torch.ones(3, **PINNED).to("npu", non_blocking=True),
    "draws": lambda: torch.randint(0, 9, (3,), device="npu"),
    "the random stream's state": lambda: torch.npu.set_rng_state(torch.npu.get_rng_state()),
    "a backward pass": lambda: (here(3).requires_grad_() ** 2).sum().backward(),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_makes_the_host_wait_is_counted(what: str) -> None:
    with host_waits() as waits:
        WAITING[what]()
    assert waits.total() == 1, waits


@pytest.mark.parametrize("what", AT_ONCE)
def test_what_does_not_make_the_host_wait_is_not_counted(what: str) -> None:
    with host_waits() as waits:
        AT_ONCE[what]()
    assert not waits


def test_uninitialized_memory_is_not_zero() -> None:
    assert torch.empty(3, device="npu").isnan().all()


def test_the_device_has_a_random_stream_of_its_own() -> None:
    torch.manual_seed(0)
    of_the_host = torch.get_rng_state()
    state = torch.npu.get_rng_state()
    first = F.dropout(here(50))
    assert torch.equal(torch.get_rng_state(), of_the_host)
    assert not torch.equal(F.dropout(here(50)), first)
    torch.npu.set_rng_state(state)
    assert torch.equal(F.dropout(here(50)), first)
    torch.manual_seed(0)
    assert torch.equal(F.dropout(here(50)), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision_where_cuda_does(dtype: torch.dtype) -> None:
    with torch.autocast("npu", dtype):
        assert (here(2, 2) @ here(2, 2)).dtype == dtype
        assert F.linear(here(2, 2), here(2, 2)).dtype == dtype
        assert here(2).to(dtype).softmax(-1).dtype == torch.float32
        assert F.layer_norm(here(2).to(dtype), (2,)).dtype == torch.float32


def test_tensors_are_saved_and_models_are_moved_as_on_an_accelerator() -> None:
    file = io.BytesIO()
    torch.save(here(3), file)
    for place in ("npu", "cpu"):
        file.seek(0)
        assert torch.load(file, map_location=place).device.type == place
    model = gpt2().to("npu")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head.weight, nn.Parameter)


def test_the_trainer_chooses_it_as_its_device(tmp_path: Any) -> None:
    assert TrainingArguments(str(tmp_path)).device == torch.device("npu:0")
