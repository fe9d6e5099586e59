"""pretrain.py, but only the last part of the training perturbs: the recipe of some arms of equal_compute.yaml."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrain
from data import DatasetArguments
from report import main

from hf_fsam import FSAMTrainer, FSAMTrainingArguments


@dataclass
class LateArguments(FSAMTrainingArguments):
    perturb_last: float = field(
        default=1.0, metadata={"help": "Share of the optimizer steps, at the end of the training, that perturb."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.perturb_last <= 1:
            raise ValueError(f"perturb_last={self.perturb_last} is not a share: give a number above 0, at most 1.")
        super().__post_init__()


SETTINGS = (pretrain.ModelArguments, DatasetArguments, LateArguments)
METRICS = pretrain.METRICS


class LateTrainer(FSAMTrainer):
    """Perturbs in the last share `perturb_last` of the training alone."""

    def fsam_is_due(self) -> bool:
        first = (1 - self.args.perturb_last) * self.state.max_steps
        return super().fsam_is_due() and self.state.global_step >= first


def run(argv: list[str]) -> dict[str, Any]:
    return pretrain.run(argv, LateTrainer, LateArguments, "late.py")


if __name__ == "__main__":
    main("late.py", run)
