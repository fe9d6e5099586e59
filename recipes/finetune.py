"""Fine-tune a checkpoint: on text or instructions (task causal_lm) or with labels (task sequence_classification).

    python recipes/finetune.py recipes/configs/finetune_topics.yaml --adapter dora
    accelerate launch recipes/finetune.py recipes/configs/glue_sst2.yaml

What it leaves in output_dir loads with `AutoModelForCausalLM.from_pretrained(output_dir)`, an adapter as well, for it
names its base model. An adapter does not name its classes, results.json does:
`AutoPeftModelForSequenceClassification.from_pretrained(output_dir, num_labels=len(results["labels"]))`.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from models import check_model

    check_model("finetune.py")

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from averaging import AveragingArguments, AveragingMixin
from config import check_best_model, parse
from data import (
    PART_TO_VALIDATE,
    DatasetArguments,
    Splits,
    check_sequence_length,
    for_validation,
    in_turn,
    limited,
    load_splits,
    load_tokenizer,
    packed,
    refuse_unused,
)
from datasets import ClassLabel, Dataset
from evaluation import (
    ClassificationMetrics,
    LanguageModelMetrics,
    evaluate_by_batch,
    reduce_classification,
    reduce_language_model,
)
from models import DEFAULT_MODEL, model_folder
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from report import main, quiet, show_progress, write_report
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from hf_fsam.mistakes import first_line, refused_by_libraries

INSTRUCTION = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={
            "help": "Checkpoint to start from: a folder, a name on the hub, or package:NAME for the folder `model` of "
            "an installed package."
        },
    )
    adapter: Literal["none", "lora", "dora"] = field(
        default="none", metadata={"help": "Train low-rank adapters in place of all weights (none)."}
    )
    adapter_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    adapter_alpha: int = field(default=32, metadata={"help": "Their scale: alpha / r."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    adapter_targets: str = field(
        default="all-linear", metadata={"help": "Modules to adapt: all-linear, or a regular expression over names."}
    )


@dataclass
class FinetuneDataArguments(DatasetArguments):
    task: Literal["causal_lm", "sequence_classification"] = field(
        default="causal_lm", metadata={"help": "causal_lm: the next token. sequence_classification: one label a text."}
    )
    format: Literal["text", "alpaca"] = field(
        default="text",
        metadata={
            "help": "For causal_lm. text: text_column, packed. alpaca: columns instruction, input (may be missing or "
            "empty) and output, of which only output is learned."
        },
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "For sequence_classification: the second sentence's column."}
    )
    label_column: str = field(default="label", metadata={"help": "For sequence_classification: the label's column."})
    old_dataset: str | None = field(
        default=None,
        metadata={
            "help": "For causal_lm: text whose loss is measured too, to see what the model forgets. Of a data set "
            f"without a validation split it is the part that pretrain.py leaves out by default ({PART_TO_VALIDATE})."
        },
    )
    old_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the hub."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise ValueError("streaming=True is for pretrain.py: fine-tuning goes over its data more than once.")
        if self.task == "sequence_classification":
            of_text = "it is for task='causal_lm', so leave it out"
            refuse_unused(self, old_dataset=of_text, old_dataset_config=of_text, format=of_text)
        else:
            of_labels = "it is for task='sequence_classification', so leave it out"
            refuse_unused(self, text_pair_column=of_labels, label_column=of_labels)
            if self.format == "alpaca":
                refuse_unused(self, text_column="format='alpaca' has columns of its own")
            if self.old_dataset is None:
                refuse_unused(self, old_dataset_config="it is for old_dataset, which is not set")

    def columns(self) -> dict[str, str]:
        if self.task == "sequence_classification":
            pair = {} if self.text_pair_column is None else {"text_pair_column": self.text_pair_column}
            return {**super().columns(), **pair, "label_column": self.label_column}
        if self.format == "alpaca":
            return {"format='alpaca', instruction": "instruction", "format='alpaca', output": "output"}
        return super().columns()

    def questions(self, rows: Dataset) -> Iterable[Any] | None:
        if self.task == "causal_lm" and self.format == "text":
            return None
        columns = self.text_columns() if self.task == "sequence_classification" else ["instruction", "input"]
        there = [in_turn(rows, column) for column in columns if column in rows.column_names]
        return zip(*there, strict=True) if there else None


@dataclass
class FinetuneTrainingArguments(AveragingArguments, FSAMTrainingArguments):
    pass


class FinetuneTrainer(AveragingMixin, FSAMTrainer):
    pass


SETTINGS = (ModelArguments, FinetuneDataArguments, FinetuneTrainingArguments)
OF_LABELS = ("eval_loss", "eval_accuracy", "eval_f1")
OF_NEW, OF_OLD = (
    tuple(f"eval_{name}_{metric}" for metric in ("loss", "perplexity", "next_token_accuracy"))
    for name in ("new", "old")
)
METRICS = (*OF_LABELS, *OF_NEW, *OF_OLD)

# ---- Model ----


def load_config(name_or_path: str) -> PretrainedConfig:
    """The checkpoint's configuration, and with it the proof that there is a checkpoint.

    Raises:
        FileNotFoundError, ModuleNotFoundError: a folder or a package that is not there.
        ValueError: there is no model in it or on the hub, or no network.
    """
    folder = model_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} holds no model ({first_line(error)}). Give the folder of a model; or "
            "its name on the hub, and see that there is a network."
        ) from error


def load_model(args: ModelArguments, auto: type, pad_token_id: int, **options: Any) -> PreTrainedModel | PeftModel:
    # Weights that are trained are kept in fp32 whatever the checkpoint has, as bf16 would round small updates away. To
    # these belongs a new classification head, and it needs inputs of its own type, so from layers in fp32.
    dtype = "float32" if args.adapter == "none" or auto is AutoModelForSequenceClassification else "auto"
    model = auto.from_pretrained(args.model_name_or_path, dtype=dtype, pad_token_id=pad_token_id, **options)
    if auto is AutoModelForSequenceClassification:
        # Its loss is the mean over a micro-batch. The Trainer takes it for one over the whole batch, since the model's
        # `forward` has **kwargs, and would not divide it by the number of micro-batches.
        model.accepts_loss_kwargs = False
    if args.adapter == "none":
        return model
    adapter = LoraConfig(
        # SEQ_CLS also trains and saves the new classification head.
        task_type=TaskType.CAUSAL_LM if auto is AutoModelForCausalLM else TaskType.SEQ_CLS,
        r=args.adapter_r,
        lora_alpha=args.adapter_alpha,
        lora_dropout=args.adapter_dropout,
        target_modules=args.adapter_targets,
        use_dora=args.adapter == "dora",
    )
    with refused_by_libraries():
        return get_peft_model(model, adapter)


# ---- Instructions ----


def encoding_instruction(
    tokenizer: PreTrainedTokenizerBase, length: int
) -> Callable[[dict[str, Any]], dict[str, list[int]]]:
    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        """Prompt and answer as one sequence of at most `length` tokens; the loss sees the answer and its end only."""
        context = row.get("input")
        prompt = INSTRUCTION.format(
            paired=PAIRED if context else "",
            instruction=row["instruction"],
            context=f"### Input:\n{context}\n\n" if context else "",
        )
        prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
        answer_ids = tokenizer(row["output"], add_special_tokens=False, verbose=False)["input_ids"]
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
        return {
            "input_ids": (prompt_ids + answer_ids)[:length],
            "attention_mask": [1] * min(len(prompt_ids + answer_ids), length),
            "labels": ([-100] * len(prompt_ids) + answer_ids)[:length],
        }

    return encode


def has_answer(row: dict[str, Any]) -> bool:
    return any(label != -100 for label in row["labels"])


def encode_instructions(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: FinetuneDataArguments, name: str
) -> Dataset:
    encoded = documents.map(
        encoding_instruction(tokenizer, data.sequence_length),
        remove_columns=documents.column_names,
        num_proc=data.num_proc,
        desc=f"Tokenizing the {name} instructions",
    ).filter(has_answer, desc="Leaving out prompts that fill the whole sequence")
    if len(encoded) == 0:
        raise ValueError(
            f"No answer in the {name} split of {data.dataset!r} begins within sequence_length={data.sequence_length} "
            "tokens: raise it."
        )
    return encoded


# ---- Labels ----


def label_names(splits: Splits, column: str) -> list[str]:
    """The classes in the order of their indices."""
    feature = splits.train.features[column]
    dtype = str(getattr(feature, "dtype", type(feature).__name__))  # a list of labels has none
    if not dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        raise ValueError(f"label_column={column!r} holds {dtype}: classification needs one class a row.")
    found = {*splits.train.unique(column), *splits.validation.unique(column)}
    if isinstance(feature, ClassLabel) and -1 in found:  # how the hub's test splits hide their labels
        raise ValueError(f"label_column={column!r} has rows without a label: choose another split, or leave them out.")
    numbers = all(re.fullmatch(r"-?\d+", str(name)) for name in found)  # also as text, as a table has them
    ordered = sorted(map(str, found), key=(lambda name: (int(name), name)) if numbers else None)
    names = list(feature.names) if isinstance(feature, ClassLabel) else ordered
    if "" in found:
        raise ValueError(f"label_column={column!r} has rows with an empty label: give them one, or leave them out.")
    if len(found) < 2:  # of a single class Transformers makes a regression
        (only,) = found
        shown = names[only] if isinstance(feature, ClassLabel) else only
        raise ValueError(
            f"label_column={column!r} holds {shown!r} in every row, and classification needs two classes or more: add "
            "rows of another class, or name another column."
        )
    return names


def head_of(names: list[str]) -> dict[str, Any]:
    """Options of `from_pretrained`. A checkpoint that is a classifier of as many other classes keeps its head."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "ignore_mismatched_sizes": True,
    }


def encode_labelled(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: FinetuneDataArguments, names: list[str], name: str
) -> Dataset:
    index = {label: position for position, label in enumerate(names)}
    by_index = isinstance(documents.features[data.label_column], ClassLabel)
    pair = data.text_pair_column

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch[data.text_column],) if pair is None else (batch[data.text_column], batch[pair])
        labels = batch[data.label_column]
        return {
            **tokenizer(*texts, truncation=True, max_length=data.sequence_length),
            "labels": labels if by_index else [index[str(label)] for label in labels],
        }

    return documents.map(
        encode,
        batched=True,
        remove_columns=documents.column_names,
        num_proc=data.num_proc,
        desc=f"Tokenizing the {name} texts",
    )


# ---- The two tasks ----


@dataclass
class Task:
    """What a task decides: the model's class and what the Trainer needs beside it."""

    auto: type
    model_options: dict[str, Any]
    trainer_options: dict[str, Any]


def language_model_task(data: FinetuneDataArguments, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Task:
    if data.format == "alpaca":
        train = encode_instructions(splits.train, tokenizer, data, "training")
        evaluated = {"new": limited(encode_instructions(splits.validation, tokenizer, data, "validation"), data)}
    else:
        train = packed(splits.train, tokenizer, data, "training")
        evaluated = {"new": for_validation(splits.validation, tokenizer, data)}
    if data.old_dataset is not None:
        old = DatasetArguments(
            dataset=data.old_dataset,
            dataset_config=data.old_dataset_config,
            sequence_length=data.sequence_length,
            validation_blocks=data.validation_blocks,
            num_proc=data.num_proc,
            cache_dir=data.cache_dir,
        )
        evaluated["old"] = for_validation(load_splits(old).validation, tokenizer, old)
    return Task(
        AutoModelForCausalLM,
        model_options={},
        trainer_options={
            "train_dataset": train,
            "eval_dataset": evaluated,
            "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),  # pads labels too
            "compute_metrics": LanguageModelMetrics(),
            "preprocess_logits_for_metrics": reduce_language_model,
        },
    )


def classification_task(data: FinetuneDataArguments, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Task:
    names = label_names(splits, data.label_column)
    return Task(
        AutoModelForSequenceClassification,
        model_options=head_of(names),
        trainer_options={
            "train_dataset": encode_labelled(splits.train, tokenizer, data, names, "training"),
            "eval_dataset": limited(encode_labelled(splits.validation, tokenizer, data, names, "validation"), data),
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": ClassificationMetrics(),
            "preprocess_logits_for_metrics": reduce_classification,
        },
    )


def before_and_after(history: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each evaluated data set's first loss, taken before the first step, and its last."""
    found = {}
    for name in ("new", "old"):
        losses = [entry[f"eval_{name}_loss"] for entry in history if f"eval_{name}_loss" in entry]
        if losses:
            found[name] = {"loss_before": losses[0], "loss_after": losses[-1], "change": losses[-1] - losses[0]}
    return found


def run(argv: list[str]) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds."""
    started = time.perf_counter()
    model_args, data_args, training_args = parse(SETTINGS, argv, "finetune.py")
    names = OF_LABELS
    if data_args.task == "causal_lm":
        names = OF_NEW if data_args.old_dataset is None else (*OF_NEW, *OF_OLD)
        if training_args.metric_for_best_model in ("loss", "eval_loss"):  # the first is the default
            training_args.metric_for_best_model = "new_loss"
    check_best_model(training_args, names)
    model_args.model_name_or_path = model_folder(model_args.model_name_or_path)
    quiet(training_args)
    set_seed(training_args.seed)

    # ---- Data: the main process fills the caches, the others read them ----
    config = load_config(model_args.model_name_or_path)
    check_sequence_length(data_args, config)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    prepare = language_model_task if data_args.task == "causal_lm" else classification_task
    with training_args.main_process_first(desc="preparing the data"):
        splits = load_splits(data_args)
        task = prepare(data_args, splits, tokenizer)

    # ---- Model and training ----
    training_args.eval_on_start = True  # what the model could do before
    model = load_model(model_args, task.auto, tokenizer.pad_token_id, **task.model_options)
    with refused_by_libraries():
        trainer = FinetuneTrainer(
            model=model,
            args=evaluate_by_batch(training_args),
            processing_class=tokenizer,
            **task.trainer_options,
        )
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = trainer.evaluate()

    # ---- Report ----
    card_task = "text-generation" if data_args.task == "causal_lm" else "text-classification"
    return write_report(
        trainer,
        arguments={"model": model_args, "data": data_args, "training": training_args},
        metrics=metrics,
        started=started,
        extra={
            "corpus_sha256": splits.sha256,
            "domains": before_and_after(trainer.state.log_history),
            "labels": list(task.model_options.get("label2id", [])),
        },
        card={"tasks": card_task, "dataset": data_args.dataset, "dataset_tags": data_args.dataset},
        task=card_task,
    )


if __name__ == "__main__":
    main("finetune.py", run)
