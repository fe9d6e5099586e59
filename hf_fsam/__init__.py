"""Functional-SAM (Singh, Mobahi, Agarwala, Dauphin, ICML 2025, arXiv 2502.02407) in the Hugging Face Trainer."""

from hf_fsam.arguments import FSAMArguments, FSAMTrainingArguments
from hf_fsam.diagnostics.callback import FSAMDiagnosticsCallback
from hf_fsam.trainer import FSAMMixin, FSAMTrainer

__all__ = ["FSAMArguments", "FSAMDiagnosticsCallback", "FSAMMixin", "FSAMTrainer", "FSAMTrainingArguments"]
__version__ = "0.1.0"
