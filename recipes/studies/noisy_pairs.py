"""Fine-tune a language model on pairs of which some are mismatched, and test it on right ones: for noisy_pairs.yaml.

A pair is a prompt and its completion, and only the completion is learned. For each seed it draws pairs to train, to
validate and to test on, and some of the training's exchange their completions. Every run is looked at in three ways: at
its end, and where its loss was best on the validation pairs as they are, or with as many of them mismatched as in the
training. So what early stopping would give needs no run of its own. `results.json` has

    test_loss                       on the test pairs, which all match, at the end of the training
    test_loss_stopped_clean, _noisy the same at the two best epochs, and step_stopped_... when they were
    best_clean_loss, _noisy_loss    on the validation pairs, at their best epoch; after every epoch they are in the
                                    history, as eval_clean_loss and eval_noisy_loss
    memorized                       on the mismatched pairs of the training, at the end: the lower, the more of them the
                                    model knows by heart

Each is the cross entropy in nats per token of the completions, whatever the training's loss.
"""

import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import report
from averaging import AveragingArguments, AveragingMixin
from config import evaluate_each_epoch, parse, refuse_checkpoints
from data import DatasetArguments, check_sequence_length, in_turn, load_splits, load_tokenizer, refuse_unused
from finetune import load_config
from losses import generalized_cross_entropy
from models import model_folder

from hf_fsam import FSAMTrainer, FSAMTrainingArguments

STOPS = ("clean", "noisy")  # the validation pairs that choose an epoch


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="outputs/pairs_base", metadata={"help": "Checkpoint to start from: a folder, or a name on the hub."}
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the attention, the only one that a Llama has. Its own by default."}
    )


@dataclass
class PairsDataArguments(DatasetArguments):
    prompt_column: str = field(default="prompt", metadata={"help": "Name of the column that has the prompts."})
    completion_column: str = field(default="completion", metadata={"help": "The same of the completions."})
    completion_length: int = field(
        default=32,
        metadata={
            "help": "Tokens of the longest completion. A prompt has the rest of sequence_length. Longer ones are left "
            "out, so that every prompt has room for every completion."
        },
    )
    train_examples: int | None = field(
        default=None, metadata={"help": "Pairs of the training split to train on. All by default."}
    )
    validation_examples: int = field(default=300, metadata={"help": "Pairs of one half of the validation split."})
    test_examples: int | None = field(
        default=None,
        metadata={"help": "Pairs of its other half, to test on. All by default."},
    )
    pair_noise: float = field(
        default=0.0, metadata={"help": "Share of the training pairs that get the completions of others."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unused(
            self,
            text_column="use prompt_column and completion_column",
            validation_blocks="use validation_examples and test_examples",
            num_proc="one process prepares the data, so leave it out",
        )
        if self.streaming:
            raise ValueError("streaming=True is for pretrain.py: fine-tuning goes over its data more than once.")
        if not 0 <= self.pair_noise <= 1:
            raise ValueError(f"pair_noise={self.pair_noise} is not a share: give a number from 0 to 1.")
        for name in ("train_examples", "validation_examples", "test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small: give 1 or more, or leave it out.")
        if not 0 < self.completion_length < self.sequence_length:
            raise ValueError(
                f"completion_length={self.completion_length} leaves nothing of sequence_length={self.sequence_length} "
                "for prompt or completion: give a number between 0 and that."
            )

    def columns(self) -> dict[str, str]:
        return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}

    def questions(self, rows: Dataset) -> Iterable[str] | None:
        return in_turn(rows, self.prompt_column) if self.prompt_column in rows.column_names else None


@dataclass
class PairsTrainingArguments(AveragingArguments, FSAMTrainingArguments):
    generalized_q: float = field(
        default=0.0,
        metadata={
            "help": "Train with (1 - p^q) / q of each token's probability p, for q above 0 and at most 1 "
            "(arXiv 1805.07836). With 0, its limit: cross entropy."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.generalized_q <= 1:
            raise ValueError(f"generalized_q={self.generalized_q} is not a number from 0 to 1.")
        if self.generalized_q and self.label_smoothing_factor:
            raise ValueError(
                f"generalized_q={self.generalized_q} and label_smoothing_factor={self.label_smoothing_factor} are two "
                "losses: choose one."
            )
        super().__post_init__()


SETTINGS = (ModelArguments, PairsDataArguments, PairsTrainingArguments)
METRICS = (
    *("test_loss", "test_loss_stopped_clean", "test_loss_stopped_noisy", "step_stopped_clean", "step_stopped_noisy"),
    *("best_clean_loss", "best_noisy_loss", "eval_clean_loss", "eval_noisy_loss", "memorized"),
)

# ---- Data ----


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    completion: list[int]


@dataclass
class Drawn:
    """Rows {input_ids, labels}. `mismatched` are those of `train` whose completion is another's."""

    train: Dataset
    mismatched: Dataset
    validation: dict[str, Dataset]
    test: Dataset


def encoded(rows: Dataset, data: PairsDataArguments, tokenizer: PreTrainedTokenizerBase, seen: set[str]) -> list[Pair]:
    """The pairs that are short enough and whose completion is not in `seen`, to which their completions are added.

    So no completion is exchanged for one that says the same, and none that is tested on was learned.
    """
    kept = []
    for prompt, completion in zip(rows[data.prompt_column], rows[data.completion_column], strict=True):
        if completion not in seen:
            seen.add(completion)
            kept.append((prompt, completion))
    if not kept:
        return []
    prompts, completions = zip(*kept, strict=True)
    # verbose=False: a prompt that is longer than the model is left out here.
    prompt_ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    completion_ids = tokenizer(list(completions), add_special_tokens=False, verbose=False)["input_ids"]
    room = data.sequence_length - data.completion_length
    return [
        Pair(prompt, [*completion, tokenizer.eos_token_id])
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        if len(prompt) <= room and len(completion) < data.completion_length
    ]


def draw(pool: list[Pair], held_out: list[Pair], data: PairsDataArguments, seed: int) -> Drawn:
    """Draws the parts and mismatches some of their pairs, all by `seed`.

    Raises:
        ValueError: a split has fewer pairs than are asked for.
    """
    # Halves that are the same for all seeds, or the pairs that one seed is tuned on would test another.
    apart = random.Random(0).sample(held_out, len(held_out))
    to_validate, to_test = apart[::2], apart[1::2]
    for pairs, where, count in (
        (pool, "training split", data.train_examples or 1),
        (to_validate, "half of the validation split that validates", data.validation_examples),
        (to_test, "half of the validation split that tests", data.test_examples or 1),
    ):
        if len(pairs) < count:
            raise ValueError(
                f"The {where} of dataset={data.dataset!r} has {len(pairs)} different pairs of at most "
                f"{data.sequence_length - data.completion_length} and {data.completion_length} tokens, and {count} are "
                "needed: lower train_examples, validation_examples or test_examples."
            )
    generator = random.Random(seed)
    right = generator.sample(pool, data.train_examples or len(pool))
    clean = generator.sample(to_validate, data.validation_examples)
    test = generator.sample(to_test, data.test_examples or len(to_test))
    train, mismatched = exchange(right, data.pair_noise, generator)
    noisy, _ = exchange(clean, data.pair_noise, generator)
    return Drawn(
        train=masked(train),
        mismatched=masked([train[index] for index in mismatched]),
        validation={"clean": masked(clean), "noisy": masked(noisy)},
        test=masked(test),
    )


def exchange(pairs: list[Pair], share: float, generator: random.Random) -> tuple[list[Pair], list[int]]:
    """Lets a share of the pairs exchange their completions. Returns all pairs, and the indices of those.

    Raises:
        ValueError: the share is one pair, which has none to exchange with.
    """
    chosen = generator.sample(range(len(pairs)), round(share * len(pairs)))
    if len(chosen) == 1:
        raise ValueError(f"pair_noise={share} of {len(pairs)} pairs is one pair, and two can exchange: raise it.")
    exchanged = list(pairs)
    # Each gets the completion of the next: none its own, and every completion is there as often as before.
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        exchanged[here] = Pair(pairs[here].prompt, pairs[there].completion)
    return exchanged, chosen


def masked(pairs: list[Pair]) -> Dataset:
    """Rows whose labels are those of the completion alone."""
    return Dataset.from_dict(
        {
            "input_ids": [pair.prompt + pair.completion for pair in pairs],
            "labels": [[-100] * len(pair.prompt) + pair.completion for pair in pairs],
        }
    )


# ---- Model ----


def load_model(args: ModelArguments, config: PretrainedConfig, pad_token_id: int) -> PreTrainedModel:
    options = {}
    if args.attention_dropout is not None:
        if not hasattr(config, "attention_dropout"):
            raise ValueError(
                f"attention_dropout={args.attention_dropout} is no setting of {type(config).__name__}: leave it out, "
                "or choose another model."
            )
        options["attention_dropout"] = args.attention_dropout
    return AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, dtype="float32", pad_token_id=pad_token_id, **options
    )


# ---- Training ----


@dataclass
class Epoch:
    """The best so far, by one kind of validation pairs: their loss, and the model as it would be used."""

    loss: float
    step: int
    weights: list[Tensor]


class NoisyPairsTrainer(AveragingMixin, FSAMTrainer):
    """Keeps the epochs that are best by the validation pairs as they are, and by the noisy ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, preprocess_logits_for_metrics=summed, compute_metrics=per_token, **kwargs)
        self.chosen: dict[str, Epoch] = {}
        if self.args.generalized_q:
            self.compute_loss_func = self.generalized

    def generalized(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        targets = labels[:, 1:]  # (B, T-1)
        learned = targets != -100
        loss = generalized_cross_entropy(outputs["logits"][:, :-1][learned], targets[learned], self.args.generalized_q)
        # The number of items is that of all micro-batches of the step, whose losses the Trainer adds up.
        return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, which calls this again for each of the two data sets."""
        metrics = super().evaluate(*args, **kwargs)
        for kind in STOPS:
            loss = metrics.get(f"eval_{kind}_loss")
            if loss is not None and (kind not in self.chosen or loss < self.chosen[kind].loss):
                weights = [weight.clone() for weight in self.evaluated_weights()]
                self.chosen[kind] = Epoch(loss, self.state.global_step, weights)
        return metrics

    def loss_of(self, rows: Dataset, weights: list[Tensor]) -> float:
        self.average = None  # or it would be used in place of `weights`
        with self.using(weights):
            return self.predict(rows).metrics["test_loss"]


def summed(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The Trainer's `preprocess_logits_for_metrics`: turns logits (B, T, V) into sums of losses and counts, (B, 2)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]  # (B, T-1)
    learned = targets != -100
    losses = torch.zeros_like(targets, dtype=torch.float32)
    losses[learned] = F.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
    return torch.stack([losses.sum(dim=1), learned.sum(dim=1)], dim=1)


def per_token(prediction: EvalPrediction) -> dict[str, float]:
    """The Trainer's `compute_metrics`. Its own loss would be the training's, averaged over batches."""
    loss, tokens = prediction.predictions.astype("float64").sum(axis=0)
    return {"loss": float(loss / tokens)}


def run(argv: list[str]) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds."""
    started = time.perf_counter()
    model_args, data, args = parse(SETTINGS, argv, Path(__file__).name)
    report.quiet(args)
    refuse_checkpoints(args)
    evaluate_each_epoch(args)
    model_args.model_name_or_path = model_folder(model_args.model_name_or_path)
    config = load_config(model_args.model_name_or_path)  # so that a missing model is found before the data is prepared
    check_sequence_length(data, config)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    splits = load_splits(data)
    seen: set[str] = set()
    pool, held_out = (encoded(rows, data, tokenizer, seen) for rows in (splits.train, splits.validation))
    drawn = draw(pool, held_out, data, args.seed)

    set_seed(args.seed)
    trainer = NoisyPairsTrainer(
        model=load_model(model_args, config, tokenizer.pad_token_id),
        args=args,
        train_dataset=drawn.train,
        eval_dataset=drawn.validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),  # pads labels too
        processing_class=tokenizer,
    )
    report.show_progress(trainer)
    trainer.train()
    last = trainer.evaluated_weights()
    metrics = {"test_loss": trainer.loss_of(drawn.test, last)}
    for kind in STOPS:
        best = trainer.chosen[kind]
        metrics |= {
            f"best_{kind}_loss": best.loss,
            f"test_loss_stopped_{kind}": trainer.loss_of(drawn.test, best.weights),
            f"step_stopped_{kind}": best.step,
        }
    if len(drawn.mismatched):
        metrics["memorized"] = trainer.loss_of(drawn.mismatched, last)

    arguments = {"model": model_args, "data": data, "training": args}
    return report.write_results(trainer, arguments, metrics, started, extra={"corpus_sha256": splits.sha256})


if __name__ == "__main__":
    report.main("noisy_pairs.py", run)
