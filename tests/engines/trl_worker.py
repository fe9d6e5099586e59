"""What each process of a test of TRL runs: `python -m tests.engines.trl_worker FOLDER` trains the cases that
FOLDER/cases.json lists."""

import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk
from torch.distributed.tensor import DTensor

from tests import zoo
from tests.engines.worker import main, whole
from tests.parity import test_trl as one_process
from tests.toys import llama, make_trainer

CLASSES: dict[str, tuple[Any, Any]] = {
    "sft": (one_process.FSAMSFTTrainer, one_process.FSAMSFTConfig),
    "dpo": (one_process.FSAMDPOTrainer, one_process.FSAMDPOConfig),
}
PLAIN: dict[str, tuple[Any, Any]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
}


def model_of(tied: bool, lora: bool) -> Any:
    torch.manual_seed(0)  # the adapters, which the zoo draws on from where it finds the stream
    return zoo.llama_lora(use_dora=False) if lora else llama(tie_word_embeddings=tied)


CASES = itertools.count()


def on_disk(data: Dataset, folder: Path) -> Dataset:
    """Where all processes find what the first of them adds: TRL's log-probabilities of a reference model.

    Before the first training there is no process group that could tell who is first, or wait.
    """
    path = folder / f"data-{next(CASES)}"
    if os.environ["RANK"] == "0":
        unfinished = path.with_suffix(".unfinished")
        data.save_to_disk(unfinished)
        unfinished.rename(path)
    while not path.exists():
        time.sleep(0.05)
    return load_from_disk(path)


def train(
    folder: Path, method: str, plain: bool = False, tied: bool = False, lora: bool = False, **settings: Any
) -> tuple[Any, ...]:
    """One case.

    Args:
        method: "sft" or "dpo".
        plain: TRL's own trainer, without the mixin.
        tied: the head shares its weights with the embeddings.
        lora: train adapters.

    DPO's reference model is a second model, or with adapters TRL's copy of them, or else its log-probabilities are
    computed before the training (`precompute_ref_log_probs`), for which TRL wants a second model under FSDP, too.
    """
    trainer_class, arguments_class = (PLAIN if plain else CLASSES)[method]
    given = {name: value for name, value in settings.items() if not (plain and name.startswith("fsam_"))}
    parts = {
        "train_dataset": on_disk(one_process.conversations() if method == "sft" else one_process.preferences(), folder),
        "processing_class": one_process.tokenizer(),
    }
    if method == "dpo":
        given["beta"] = one_process.BETA
        if not lora and (settings.get("fsdp") or not settings.get("precompute_ref_log_probs")):
            parts["ref_model"] = model_of(tied, lora)
    trainer: Any = make_trainer(
        folder,
        model_of(tied, lora),
        trainer_class,
        arguments_class,
        trainer=parts,
        bf16=False,
        gradient_checkpointing=given.pop("gradient_checkpointing", False),
        **given,
    )
    batches: list[dict[str, Any]] = []
    training_step = trainer.training_step

    def recording(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        batches.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = recording
    trainer.train()
    weights, masters = whole(trainer.model, trainer.is_deepspeed_enabled)
    facts = {
        "batches": gather_object([batches]),
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "deepspeed": trainer.is_deepspeed_enabled,
    }
    return weights, masters, trainer.state.log_history, facts


if __name__ == "__main__":
    main(train)
