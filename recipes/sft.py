"""Supervised fine-tuning with TRL, on prompts and completions, conversations or text.

python recipes/sft.py recipes/configs/sft_docstrings.yaml
accelerate launch recipes/sft.py recipes/configs/sft_capybara.yaml
"""

if __name__ == "__main__":  # before the imports that take seconds
    from models import check_model

    check_model("sft.py")

from dataclasses import dataclass

import align
from trl import SFTConfig, SFTTrainer

from hf_fsam import FSAMArguments, FSAMMixin


@dataclass
class FSAMSFTConfig(FSAMArguments, SFTConfig):
    pass


SETTINGS = (*align.SETTINGS, FSAMSFTConfig)
METRICS = align.METRICS


class FSAMSFTTrainer(FSAMMixin, SFTTrainer):
    pass


if __name__ == "__main__":
    align.main("sft.py", FSAMSFTTrainer, FSAMSFTConfig, METRICS)
