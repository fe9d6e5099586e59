"""pretrain.py for text that is scarce and read many times: what helps against that, and a test set to see it on.

This is the recipe of scarce_text.yaml. Every second document of the validation split is kept for a test. What early
stopping would give needs no run of its own: the weights of the lowest validation loss are kept, tested and saved.
`results.json` has, in nats per token,

    test_loss_stopped   on the test blocks, with the weights of the lowest validation loss
    test_loss           the same at the end of the training
    eval_loss           on the validation blocks, at the end; the runner adds `best_eval_loss`, the lowest
    step_stopped        the step of the lowest validation loss

Masked inputs follow arXiv 2606.06888, "masked-input regularization", and its code: of a sequence's input tokens a share
is replaced by a mask token, the targets stay, all positions count, attention is causal, and the share is drawn for each
sequence, evenly from 0 to twice `masked_inputs`. The loss is (1 - w) L(inputs) + w L(masked inputs) with w =
`masked_weight`. The paper's own, L(inputs) + 0.4 L(masked inputs), is w = 2/7 but for a factor. Here the first tokens
of a sequence are masked too, which there stay (8 of 2048). w = 1 trains on masked inputs alone, in one pass a step, as
in arXiv 2502.07490 and 2606.16246. The model has the mask token in every arm, so that all start from the same weights.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import pretrain
from averaging import AveragingArguments, AveragingMixin
from config import parse, refuse_checkpoints
from data import DatasetArguments, Splits, load_splits, packed
from report import main, quiet, show_progress, write_report

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from hf_fsam.cleanup import Cleanup

MASK = "<|mask|>"
Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass
class ScarceModelArguments(pretrain.ModelArguments):
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout of a Llama: of attention weights, of embeddings, and of what attention and MLP add."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a share: give a number from 0 to below 1.")


@dataclass
class ScarceTrainingArguments(AveragingArguments, FSAMTrainingArguments):
    masked_inputs: float = field(
        default=0.0, metadata={"help": "Mean share of the input tokens that are masked in training, at most 0.5."}
    )
    masked_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the loss on the masked inputs; the rest to 1 is that of the loss on the inputs as they "
            "are. With 1 a step takes one pass, and two otherwise."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.masked_inputs <= 0.5:
            raise ValueError(f"masked_inputs={self.masked_inputs} is not a share: give a number from 0 to 0.5.")
        if not 0 < self.masked_weight <= 1:
            raise ValueError(f"masked_weight={self.masked_weight} is not above 0 and at most 1.")
        super().__post_init__()
        if self.masked_weight != 1 and not self.masked_inputs:
            raise ValueError(
                f"masked_weight={self.masked_weight} has no effect without masked_inputs: set a share, or leave it out."
            )
        if self.masked_inputs and (self.dataloader_num_workers or self.world_size > 1):
            raise ValueError(
                f"masked_inputs={self.masked_inputs} with dataloader_num_workers={self.dataloader_num_workers} and "
                f"{self.world_size} processes: each worker and process would draw the same masks. Leave the workers "
                "out, and train in one process."
            )


SETTINGS = (ScarceModelArguments, DatasetArguments, ScarceTrainingArguments)
METRICS = ("eval_loss", "test_loss_stopped", "test_loss", "step_stopped")

# ---- Data ----


def load_blocks(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: DatasetArguments) -> dict[str, Dataset]:
    """Blocks to train on, and `validation_blocks` to validate and to test on, which are the same in every run.

    Raises:
        ValueError: there are not as many.
    """
    blocks = {"training": packed(splits.train, tokenizer, data, "training")}
    for start, name in enumerate(("validation", "test")):
        documents = splits.validation.select(range(start, len(splits.validation), 2))
        if not len(documents):
            raise ValueError(
                f"There is no {name} document: raise validation_fraction={data.validation_fraction}, whose documents "
                "are for validation and test."
            )
        # Shuffled, so that a part of them comes from all documents.
        found = packed(documents, tokenizer, data, name).shuffle(seed=0)
        count = len(found) if data.validation_blocks is None else data.validation_blocks
        if count > len(found):
            raise ValueError(
                f"validation_blocks={count}: the {name} documents make only {len(found)}. Lower it, or raise "
                f"validation_fraction={data.validation_fraction}, whose documents are for validation and test."
            )
        blocks[name] = found.select(range(count))
    return blocks


class MaskedInputs:
    """Collates training blocks, and adds to them `masked_input_ids`.

    It draws from a generator of its own, so that dropout is the same with it and without.
    """

    def __init__(self, share: float, mask_token_id: int, seed: int) -> None:
        self.share, self.mask_token_id = share, mask_token_id
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = default_data_collator(rows)
        ids = batch["input_ids"]  # (B, T)
        share = 2 * self.share * torch.rand(len(ids), 1, generator=self.generator)  # (B, 1)
        hidden = torch.rand(ids.shape, generator=self.generator) < share
        return {**batch, "masked_input_ids": ids.masked_fill(hidden, self.mask_token_id)}


# ---- Model ----


def add_dropout(model: nn.Module, share: float) -> None:
    """Dropout where GPT-2 has it. A Llama's configuration has only that of the attention weights."""
    if model.config.model_type != "llama":
        raise ValueError(
            f"dropout={share} is for a Llama, and this is {model.config.model_type!r}: set architecture='llama', or "
            "leave dropout out and set it in model_config."
        )

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, share, module.training)

    model.get_input_embeddings().register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = share
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(drop)


# ---- Training ----


class ScarceTrainer(AveragingMixin, FSAMTrainer):
    """Keeps a copy of the weights of the lowest validation loss.

    Args:
        train_collator: collates the training blocks in place of `data_collator`, such as :class:`MaskedInputs`.
    """

    def __init__(self, *args: Any, train_collator: Collator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator
        self.lowest = math.inf
        self.stopped: list[Tensor] | None = None
        self.step_stopped = 0

    def get_train_dataloader(self) -> DataLoader:
        with Cleanup().replaced(self, "data_collator", self.train_collator):
            return super().get_train_dataloader()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        masked_ids = inputs.pop("masked_input_ids", None)
        if masked_ids is None:  # an evaluation, or a training without masks
            return super().compute_loss(model, inputs, *args, **kwargs)
        weight = self.args.masked_weight
        loss = weight * super().compute_loss(model, {**inputs, "input_ids": masked_ids}, *args, **kwargs)
        if weight < 1:
            loss = loss + (1 - weight) * super().compute_loss(model, inputs, *args, **kwargs)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if metrics["eval_loss"] < self.lowest:
            self.lowest, self.step_stopped = metrics["eval_loss"], self.state.global_step
            self.stopped = [weight.clone() for weight in self.evaluated_weights()]
        return metrics

    def test(self, blocks: Dataset) -> dict[str, float]:
        """The losses on the test blocks. Leaves the model with the weights of the lowest validation loss."""
        last = self.loss_on(blocks)
        if self.stopped is None:  # no validation loss was finite
            return {"test_loss": last, "test_loss_stopped": math.nan, "step_stopped": 0}
        self.average = None  # or it would be tested again
        torch._foreach_copy_(self.trained_weights(), self.stopped)
        return {"test_loss": last, "test_loss_stopped": self.loss_on(blocks), "step_stopped": self.step_stopped}

    def loss_on(self, blocks: Dataset) -> float:
        """Not by `predict`, which would keep the logits of all blocks."""
        return super().evaluate(blocks, metric_key_prefix="test")["test_loss"]


def run(argv: list[str]) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds."""
    started = time.perf_counter()
    model_args, data, args = parse(SETTINGS, argv, Path(__file__).name)
    quiet(args)
    refuse_checkpoints(args)
    if data.streaming:
        raise ValueError("streaming=True is for pretrain.py: scarce text is read more than once.")
    set_seed(args.seed)
    splits = load_splits(data)
    tokenizer = pretrain.build_tokenizer(model_args, data, splits)
    tokenizer.add_special_tokens({"mask_token": MASK})
    model = AutoModelForCausalLM.from_config(pretrain.config_for(tokenizer, model_args, data))
    if model_args.dropout:
        add_dropout(model, model_args.dropout)
    blocks = load_blocks(splits, tokenizer, data)
    masking = MaskedInputs(args.masked_inputs, tokenizer.mask_token_id, args.seed) if args.masked_inputs else None
    trainer = ScarceTrainer(
        model=model,
        args=args,
        train_dataset=blocks["training"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        train_collator=masking,
    )
    show_progress(trainer)
    trainer.train()
    metrics = trainer.evaluate() | trainer.test(blocks["test"])
    return write_report(
        trainer,
        arguments={"model": model_args, "data": data, "training": args},
        metrics=metrics,
        started=started,
        extra={
            "corpus_sha256": splits.sha256,
            "vocabulary": len(tokenizer),
            "blocks": {name: len(each) for name, each in blocks.items()},
        },
        card={"tasks": "text-generation", "dataset": data.dataset, "dataset_tags": data.dataset},
        task="text-generation",
    )


if __name__ == "__main__":
    main("scarce_text.py", run)
