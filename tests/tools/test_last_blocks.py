"""benchmarks/last_blocks.py measures a step with the gradient that it names, and computes what it says in the second
pass."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from benchmarks.last_blocks import LastBlocksTrainer
from benchmarks.products import counted_products
from benchmarks.step_cost import main
from tests import reference
from tests.reference import Tensors
from tests.toys import distance, llama, make_trainer, sentences, weights_of

BLOCKS, STEPS, RHO = 4, 5, 0.3
FIRST = ("model.embed_tokens.", *(f"model.layers.{index}." for index in range(3)))


def of_the_last(theta: Tensors, direction: Tensors) -> Tensors:
    return {name: d for name, d in direction.items() if not name.startswith(FIRST)}


@pytest.mark.parametrize("along_momentum", [False, True])
def test_the_step_has_the_gradient_of_the_formulas(tmp_path: Path, along_momentum: bool) -> None:
    trainer = make_trainer(
        tmp_path,
        model=llama(num_hidden_layers=BLOCKS),
        trainer_class=partial(LastBlocksTrainer, blocks=1, rho=RHO, along_momentum=along_momentum),
        arguments_class=TrainingArguments,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    trainer.train()
    rows = sentences()
    batches = [
        {key: torch.stack([row[key] for row in rows[start : start + 2]]) for key in rows[0]}
        for start in range(0, 2 * STEPS, 2)
    ]

    def expected(**settings: object) -> Tensors:
        return reference.train(
            llama(num_hidden_layers=BLOCKS),
            reference.Problem(reference.causal_lm_loss, count=reference.count_shifted_labels),
            batches,
            variant="functional",
            rho=RHO,
            optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0),
            momentum=along_momentum,
            perturbs=lambda step: step > 0 or not along_momentum,  # there is no momentum at first
            **settings,
        )

    assert distance(weights_of(trainer.model), expected(turned=of_the_last)) < 1e-5
    assert distance(weights_of(trainer.model), expected()) > 1e-3


def test_the_first_blocks_run_once() -> None:
    """In matrix products a quarter of the blocks costs about 3 + 3/4 passes of the body where the plain step has 3, or
    3 + 1/4 along the momentum. The head, which is small here, has five products in place of three."""
    sizes = ["--layers", "8", "--vocabulary", "64", "--batch", "2", "--length", "16", "--rounds", "1", "--threads", "1"]
    result = main([*sizes, "--arms", "functional", "a quarter of the blocks", "a quarter of the blocks, momentum"])
    ratios = {arm["arm"]: arm["products_ratio"] for arm in result["arms"]}
    assert ratios["functional"] == pytest.approx(2, abs=0.02)
    assert ratios["a quarter of the blocks"] == pytest.approx(1.25, abs=0.02)
    assert ratios["a quarter of the blocks, momentum"] == pytest.approx(13 / 12, abs=0.02)


def test_products_that_are_added_in_place_or_to_wider_numbers_are_counted() -> None:
    total = torch.zeros(2, 4, device="meta")
    a, b = torch.ones(2, 3, device="meta"), torch.ones(3, 4, device="meta")
    with counted_products() as counted:
        total.addmm_(a, b)
        torch.addmm(total, a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=total)
    assert counted.get_total_flops() == 2 * (2 * 2 * 3 * 4)
