"""Supervised fine-tuning with TRL, on prompts and completions, conversations or text.

python recipes/sft.py recipes/configs/sft_docstrings.yaml
accelerate launch recipes/sft.py recipes/configs/sft_capybara.yaml
"""

from dataclasses import dataclass

import align
from trl import SFTConfig, SFTTrainer

from hf_fsam import FSAMArguments, FSAMMixin


@dataclass
class FSAMSFTConfig(FSAMArguments, SFTConfig):
    pass


class FSAMSFTTrainer(FSAMMixin, SFTTrainer):
    pass


if __name__ == "__main__":
    align.main("sft.py", FSAMSFTTrainer, FSAMSFTConfig)
