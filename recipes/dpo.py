"""Direct preference optimization with TRL, on prompts with a chosen and a rejected answer.

python recipes/dpo.py recipes/configs/dpo_docstrings.yaml
accelerate launch recipes/dpo.py recipes/configs/dpo_ultrafeedback.yaml
"""

if __name__ == "__main__":  # before the imports that take seconds
    from models import check_model

    check_model("dpo.py")

from dataclasses import dataclass

import align
from trl import DPOConfig, DPOTrainer

from hf_fsam import FSAMArguments, FSAMMixin


@dataclass
class FSAMDPOConfig(FSAMArguments, DPOConfig):
    pass


SETTINGS = (*align.SETTINGS, FSAMDPOConfig)
METRICS = (*align.METRICS, "eval_rewards/*", "eval_logps/*", "eval_logits/*")


class FSAMDPOTrainer(FSAMMixin, DPOTrainer):
    pass


if __name__ == "__main__":
    align.main("dpo.py", FSAMDPOTrainer, FSAMDPOConfig, METRICS)
