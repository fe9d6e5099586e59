"""Functional-SAM (Singh, Mobahi, Agarwala, Dauphin, ICML 2025, arXiv 2502.02407) in the Hugging Face Trainer."""

from hf_fsam.arguments import FSAMArguments, FSAMTrainingArguments
from hf_fsam.trainer import FSAMMixin, FSAMTrainer

__all__ = ["FSAMArguments", "FSAMMixin", "FSAMTrainer", "FSAMTrainingArguments"]
__version__ = "0.1.0"
