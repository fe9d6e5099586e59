"""What sft.py and dpo.py share. TRL prepares the data and defines the loss; this module loads, trains and reports."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import report
from config import parse
from data import DatasetArguments, check_rows, in_turn, limited, load_splits, load_tokenizer, on_hub, refuse_unused
from datasets import Dataset
from finetune import ModelArguments, load_config, load_model
from models import model_folder
from report import quiet, show_progress, write_report
from transformers import AutoModelForCausalLM, set_seed

from hf_fsam.mistakes import refused_by_libraries


@dataclass
class AlignDataArguments(DatasetArguments):
    """Data arguments without those for columns and sequence length, since TRL has its own."""

    method: Literal["sft", "dpo"] = field(default="sft", metadata={"help": "Which script the configuration is for."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unused(
            self, sequence_length="use max_length", text_column="use TRL's own columns", num_proc="use dataset_num_proc"
        )
        if self.streaming:
            raise ValueError(
                "streaming=True is for pretrain.py: fine-tuning reads its data more than once. Set streaming=False."
            )

    def columns(self) -> dict[str, str]:
        return {}

    def questions(self, rows: Dataset) -> Iterable[Any] | None:
        if "prompt" in rows.column_names:
            return in_turn(rows, "prompt")
        for column in ("messages", "conversations", "chosen"):
            if column in rows.column_names and isinstance(rows[0][column], list):
                return (turns[:-1] for turns in in_turn(rows, column))
        return None

    def check_rows(self, rows: Dataset) -> None:
        columns = next((each for each in self.formats() if {*each} <= {*rows.column_names}), ())
        check_rows(rows, self.dataset, list(columns), text=False)

    def formats(self, text_field: str = "text") -> list[tuple[str, ...]]:
        """The columns of each format that TRL takes, in the order in which it looks for them."""
        if self.method == "dpo":
            return [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
        return [("messages",), ("conversations",), ("prompt", "completion"), ("input_ids",), (text_field,)]


SETTINGS = (ModelArguments, AlignDataArguments)  # and TRL's
METRICS = tuple(f"eval_{name}" for name in ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"))


def check_columns(documents: Dataset, name: str, choices: list[tuple[str, ...]]) -> None:
    """
    Raises:
        ValueError: the data set has all columns of none of the choices, or a row lacks one.
    """
    chosen = next((columns for columns in choices if set(columns) <= set(documents.column_names)), None)
    if chosen is None:
        needed = ", or ".join(" and ".join(map(repr, columns)) for columns in choices)
        raise ValueError(
            f"dataset={name!r} has the columns {', '.join(map(repr, documents.column_names))}. TRL needs {needed}: "
            "rename them."
        )
    check_rows(documents, name, list(chosen), text=False)


def run(argv: list[str], script: str, trainer_class: Any, config_class: Any, metrics: Sequence[str]) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds."""
    started = time.perf_counter()
    model_args, data_args, training_args = parse((*SETTINGS, config_class), argv, script, metrics)
    if script != f"{data_args.method}.py":
        raise ValueError(f"method={data_args.method!r} is for {data_args.method}.py, not {script}.")
    quiet(training_args)
    set_seed(training_args.seed)

    # ---- Data ----
    model_args.model_name_or_path = model_folder(model_args.model_name_or_path)
    load_config(model_args.model_name_or_path)  # so that a missing model is found before the data is prepared
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    with training_args.main_process_first(desc="preparing the data"):
        splits = load_splits(data_args)
    formats = data_args.formats(getattr(training_args, "dataset_text_field", "text"))
    for documents in (splits.train, splits.validation):
        check_columns(documents, data_args.dataset, formats)

    # ---- Model and training ----
    training_args.eval_on_start = True  # to know how good the model was before
    model = load_model(model_args, AutoModelForCausalLM, tokenizer.pad_token_id)
    with refused_by_libraries():
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=splits.train,
            eval_dataset=limited(splits.validation, data_args),
            processing_class=tokenizer,
        )
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    measured = trainer.evaluate()

    # ---- Report ----
    return write_report(
        trainer,
        arguments={"model": model_args, "data": data_args, "training": training_args},
        metrics=measured,
        started=started,
        extra={"corpus_sha256": splits.sha256},
        card={
            "model_name": Path(training_args.output_dir).name,
            "dataset_name": data_args.dataset if on_hub(data_args.dataset) else None,
        },
        task="text-generation",
    )


def main(script: str, trainer_class: Any, config_class: Any, metrics: Sequence[str]) -> None:
    report.main(script, lambda argv: run(argv, script, trainer_class, config_class, metrics))
