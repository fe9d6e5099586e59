"""Pretrain a causal language model from scratch.

python recipes/pretrain.py recipes/configs/pretrain_tiny.yaml --fsam_rho 0.05
accelerate launch recipes/pretrain.py recipes/configs/c4_118m.yaml
torchrun --nproc_per_node 8 recipes/pretrain.py recipes/configs/c4_118m.yaml --gradient_accumulation_steps 1
"""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from config import parse
from data import (
    STREAM_SHUFFLE_BUFFER,
    DatasetArguments,
    Splits,
    check_sequence_length,
    check_streaming,
    for_validation,
    load_splits,
    load_tokenizer,
    packed,
    trained_tokenizer,
)
from evaluation import LanguageModelMetrics, evaluate_by_batch, reduce_language_model
from models import model_folder
from report import main, quiet, show_progress, write_report
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from hf_fsam.mistakes import first_line, refused_by_libraries


@dataclass
class ModelArguments:
    architecture: Literal["llama", "gpt2"] = field(default="llama", metadata={"help": "Architecture of the new model."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the residual stream."})
    intermediate_size: int = field(default=256, metadata={"help": "Width inside the MLP."})
    layers: int = field(default=4, metadata={"help": "Number of blocks."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads, which must divide hidden_size."})
    tie_embeddings: bool = field(default=True, metadata={"help": "Use one matrix for the embeddings and the head."})
    model_config: str | None = field(
        default=None, metadata={"help": "Name or path of a model configuration to use instead of the fields above."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or path of a tokenizer. By default, one is trained on the training text."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary size of the tokenizer that is trained."})

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small: give 1 or more.")
        if self.hidden_size % self.heads or (self.architecture == "llama" and self.hidden_size // self.heads % 2):
            raise ValueError(
                f"heads={self.heads} does not divide hidden_size={self.hidden_size} into heads of equal, even width."
            )
        if self.vocab_size < 258:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small: 256 bytes and 2 special tokens need at least 258."
            )


SETTINGS = (ModelArguments, DatasetArguments, FSAMTrainingArguments)
METRICS = ("eval_loss", "eval_perplexity", "eval_next_token_accuracy")


def build_tokenizer(model: ModelArguments, data: DatasetArguments, splits: Splits) -> PreTrainedTokenizerBase:
    if model.tokenizer is not None:
        return load_tokenizer(model.tokenizer, "tokenizer")
    return trained_tokenizer(splits, data, model.vocab_size)


def config_for(tokenizer: PreTrainedTokenizerBase, model: ModelArguments, data: DatasetArguments) -> PretrainedConfig:
    """The configuration of a model that reads what `tokenizer` makes. Tells the tokenizer how much it can read."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = build_config(model, len(tokenizer), data.sequence_length, **special)
    check_sequence_length(data, config)
    tokenizer.model_max_length = config.max_position_embeddings
    return config


def build_config(
    model: ModelArguments, vocab_size: int, sequence_length: int, **special_tokens: int
) -> PretrainedConfig:
    if model.model_config is not None:
        folder = model_folder(model.model_config, "model_config")
        try:
            return AutoConfig.from_pretrained(folder, vocab_size=vocab_size, **special_tokens)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model_config={model.model_config!r} holds no model's configuration ({first_line(error)}). Give the "
                "folder of one; or its name on the hub, and see that there is a network."
            ) from error
    shared = {"vocab_size": vocab_size, "tie_word_embeddings": model.tie_embeddings, **special_tokens}
    if model.architecture == "gpt2":
        return GPT2Config(
            n_embd=model.hidden_size,
            n_inner=model.intermediate_size,
            n_layer=model.layers,
            n_head=model.heads,
            n_positions=sequence_length,
            # No dropout, since no text is seen often enough here to be memorized.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    return LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=sequence_length,
        **shared,
    )


def run(
    argv: list[str],
    trainer_class: type[FSAMTrainer] = FSAMTrainer,
    arguments_class: type[FSAMTrainingArguments] = FSAMTrainingArguments,
    script: str = "pretrain.py",
) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds. `recipes/studies` trains with classes of its own."""
    started = time.perf_counter()
    model_args, data_args, training_args = parse(
        (ModelArguments, DatasetArguments, arguments_class), argv, script, METRICS
    )
    quiet(training_args)
    check_streaming(data_args, training_args.max_steps)
    set_seed(training_args.seed)

    # ---- Data: the main process fills the caches, the others read them ----
    with training_args.main_process_first(desc="preparing the data"):
        splits = load_splits(data_args)
        tokenizer = build_tokenizer(model_args, data_args, splits)
        config = config_for(tokenizer, model_args, data_args)
        train = packed(splits.train, tokenizer, data_args, "training")
        validation = for_validation(splits.validation, tokenizer, data_args)
    if data_args.streaming:
        train = train.shuffle(seed=training_args.seed, buffer_size=STREAM_SHUFFLE_BUFFER)

    # ---- Model and training ----
    model = AutoModelForCausalLM.from_config(config)
    with refused_by_libraries():
        trainer = trainer_class(
            model=model,
            args=evaluate_by_batch(training_args),
            train_dataset=train,  # blocks of (sequence_length,)
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            compute_metrics=LanguageModelMetrics(),
            preprocess_logits_for_metrics=reduce_language_model,
        )
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = trainer.evaluate()

    # ---- Report ----
    tokens_per_step = data_args.sequence_length * training_args.train_batch_size
    tokens_per_step *= training_args.gradient_accumulation_steps * training_args.world_size
    return write_report(
        trainer,
        arguments={"model": model_args, "data": data_args, "training": training_args},
        metrics=metrics,
        started=started,
        extra={
            "corpus_sha256": splits.sha256,
            "vocabulary": len(tokenizer),
            "training_blocks": None if data_args.streaming else len(train),
            "tokens_per_step": tokens_per_step,
            "tokens_seen": tokens_per_step * trainer.state.global_step,
        },
        card={"tasks": "text-generation", "dataset": data_args.dataset, "dataset_tags": data_args.dataset},
        task="text-generation",
    )


if __name__ == "__main__":
    main("pretrain.py", run)
