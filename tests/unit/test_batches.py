"""What counts as a change of a batch."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_fsam.batches import Snapshot

NAN = float("nan")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])),
        (np.array([1.0, NAN]), np.array([1.0, 2.0])),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([1, 2]), np.array([1, 2, 2])),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([None, "b"]), np.array([None, "c"])),
        (np.array([None, "b"]), ["b"]),
        ("a", "b"),
    ],
)
def test_other_numbers_are_a_change(before: Any, after: Any) -> None:
    same = before.clone() if isinstance(before, torch.Tensor) else np.copy(before)
    snapshot = Snapshot({"part": before})
    assert snapshot.change({"part": same if not isinstance(before, str) else before}) is None
    assert snapshot.change({"part": after}) == "['part']"
