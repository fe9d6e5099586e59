"""The perturbation of the last blocks alone, for an encoder that is built like BERT.

    class MyTrainer(LastBlocksMixin, FSAMTrainer): ...

ε is zero outside of the last k blocks and what comes behind them, and all weights are trained. A step costs what the
split of all blocks does here. One that runs the other blocks once, as it could, is measured in
benchmarks/last_blocks.py.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class LastBlocksArguments:
    """Put it before FSAMTrainingArguments."""

    layers_to_perturb: int | None = field(
        default=None, metadata={"help": "Perturb so many of the last blocks and what is behind them. All by default."}
    )

    def __post_init__(self) -> None:
        if self.layers_to_perturb is not None and self.layers_to_perturb < 1:
            raise ValueError(
                f"layers_to_perturb={self.layers_to_perturb} perturbs no block: give 1 or more, or leave it out."
            )
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()


class LastBlocksMixin:
    """Put it before a class with `FSAMMixin`; its arguments have the field of :class:`LastBlocksArguments`."""

    def fsam_perturbs(self, name: str, weight: nn.Parameter) -> bool:
        last = self.args.layers_to_perturb
        if not super().fsam_perturbs(name, weight):
            return False
        if last is None:
            return True
        first = self.blocks() - last
        block = re.search(r"encoder\.layer\.(\d+)\.", name)
        return int(block[1]) >= first if block else "embeddings." not in name

    def blocks(self) -> int:
        layers = getattr(getattr(self.model.base_model, "encoder", None), "layer", ())
        if self.args.layers_to_perturb > len(layers):
            raise ValueError(
                f"layers_to_perturb={self.args.layers_to_perturb} needs a model with as many `encoder.layer`, and "
                f"{type(self.model).__name__} has {len(layers)}: give fewer, or leave it out."
            )
        return len(layers)
