"""Functional-SAM (Singh, Mobahi, Agarwala, Dauphin, ICML 2025, arXiv 2502.02407) in the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fsam.arguments import FSAMArguments, FSAMTrainingArguments
    from hf_fsam.diagnostics.callback import FSAMDiagnosticsCallback
    from hf_fsam.trainer import FSAMMixin, FSAMTrainer

__all__ = ["FSAMArguments", "FSAMDiagnosticsCallback", "FSAMMixin", "FSAMTrainer", "FSAMTrainingArguments"]
__version__ = "0.1.0"

# Each public name is imported when it is first used: PyTorch and Transformers take seconds to import, which
# `hf-fsam --help` should not cost.
_MODULE_OF = {
    "FSAMArguments": "hf_fsam.arguments",
    "FSAMDiagnosticsCallback": "hf_fsam.diagnostics.callback",
    "FSAMMixin": "hf_fsam.trainer",
    "FSAMTrainer": "hf_fsam.trainer",
    "FSAMTrainingArguments": "hf_fsam.arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
