"""sentence-transformers' trainers agree with the formulas: the logits are what the model's last module returns."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler

from hf_fsam import FSAMArguments, FSAMMixin
from tests import reference
from tests.parity.test_parity import DISTINCT, Setting, distance, sgd
from tests.zoo import ENCODER, WIDTH

TOLERANCE = 1e-5  # ‖θ - θ_ref‖ / ‖θ_ref - θ₀‖
BATCH_SIZE, STEPS = 4, 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30))]


@dataclass
class _Arguments(FSAMArguments, SentenceTransformerTrainingArguments):
    pass


class _Trainer(FSAMMixin, SentenceTransformerTrainer):
    pass


@dataclass
class _CrossArguments(FSAMArguments, CrossEncoderTrainingArguments):
    pass


class _CrossTrainer(FSAMMixin, CrossEncoderTrainer):
    pass


@dataclass
class _SparseArguments(FSAMArguments, SparseEncoderTrainingArguments):
    pass


class _SparseTrainer(FSAMMixin, SparseEncoderTrainer):
    pass


@functools.cache
def saved(model_class: str, folder: Path) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODER | {"vocab_size": len(WORDS), "num_labels": 1})
    getattr(transformers, model_class)(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("sentence_transformers")
    return lambda model_class: saved(model_class, root / model_class)


def embedder(folder: Callable[[str], str], *more: nn.Module) -> SentenceTransformer:
    bert = Transformer(folder("BertModel"))
    return SentenceTransformer(modules=[bert, Pooling(WIDTH), *more], device="cpu").double()


def rows(*columns: str, count: int = BATCH_SIZE * STEPS, **labels: list) -> Dataset:
    draw = random.Random(0)
    text = {name: [" ".join(draw.choices(WORDS[5:], k=draw.randint(3, 8))) for _ in range(count)] for name in columns}
    return Dataset.from_dict(text | labels)


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def trained(
    folder: Path,
    model: nn.Module,
    loss: nn.Module,
    data: Dataset,
    setting: Setting,
    kind: tuple[type, type] = (_Trainer, _Arguments),
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **arguments: Any,
) -> Any:
    trainer_class, arguments_class = kind
    fsam = {
        "fsam_variant": setting.variant,
        "fsam_rho": setting.rho,
        "fsam_ascent_scope": setting.scope,
        "fsam_ascent_direction": setting.direction,
    }
    if not issubclass(trainer_class, FSAMMixin):
        fsam = {}
    trainer = trainer_class(
        model=model,
        args=arguments_class(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=setting.accumulation,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            batch_sampler=in_order,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **fsam,
            **arguments,
        ),
        train_dataset=data,
        loss=loss,
        optimizers=(sgd(loss, arguments.get("learning_rate", 0.05)), None),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def batches_of(model: Any, data: Dataset) -> Iterator[dict[str, Any]]:
    columns = [name for name in data.column_names if name != "label"]
    for part in data.batch(BATCH_SIZE):
        label = {"label": torch.tensor(part["label"])} if "label" in part else {}
        yield {"columns": [model.preprocess(part[name]) for name in columns]} | label


def embeddings(model: nn.Module, theta: reference.Tensors, batch: reference.Batch) -> reference.Logits:
    return tuple(functional_call(model, theta, ({**column},))["sentence_embedding"] for column in batch["columns"])


def expected(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Dataset,
    setting: Setting,
    logits: Callable[..., reference.Logits] = embeddings,
) -> reference.Tensors:
    def share(z: reference.Logits, batch: reference.Batch, window: reference.Window) -> Tensor:
        return loss(*z, label=batch.get("label")) / len(window.batches)

    return reference.train(
        model,
        reference.Problem(share, inputs=lambda batch: batch, logits=logits),
        list(batches_of(model, data)),
        variant=setting.variant,
        rho=setting.rho,
        scope=setting.scope,
        accumulation=setting.accumulation,
        momentum=setting.direction == "momentum",
        optimizer_factory=functools.partial(sgd, learning_rate=0.05),
    )


def assert_agrees(model: nn.Module, start: reference.Tensors, wanted: reference.Tensors) -> None:
    went = distance(start, wanted)
    apart = distance(reference.trainable(model), wanted) / went
    assert apart < TOLERANCE, f"{apart:.2e} of the way that the reference went"


# Losses, from their formulas ------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


def ranking(anchor: Tensor, *candidates: Tensor, label: None = None) -> Tensor:
    """The anchor's own candidate, the first column's, is to win over all others of the batch."""
    scores = 20 * cosine(anchor, torch.cat(candidates))
    return -scores.log_softmax(-1).diagonal().mean()


def of_pairs(a: Tensor, b: Tensor, label: Tensor) -> Tensor:
    return (cosine(a, b).diagonal() - label).square().mean()


def cosent(a: Tensor, b: Tensor, label: Tensor) -> Tensor:
    """log(1 + Σ exp(20 (cos_j - cos_i))) over the pairs where i has the greater label."""
    scores = 20 * cosine(a, b).diagonal()
    worse = (scores[None, :] - scores[:, None])[label[:, None] > label[None, :]]
    return torch.cat([torch.zeros(1), worse]).logsumexp(0)


def nested(*columns: Tensor, label: None = None) -> Tensor:
    return sum(ranking(*(each[:, :size] for each in columns)) for size in (WIDTH, WIDTH // 2))


SCORES = {"label": [0.1, 0.9, 0.4, 0.7] * STEPS}
CACHED = functools.partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=3)
PAIR, TRIPLET = ("anchor", "positive"), ("anchor", "positive", "negative")
Loss = Callable[[nn.Module], nn.Module]
LOSSES: dict[str, tuple[Loss, Callable[..., Tensor], Dataset]] = {
    "MultipleNegativesRanking": (losses.MultipleNegativesRankingLoss, ranking, rows(*PAIR)),
    "negatives": (losses.MultipleNegativesRankingLoss, ranking, rows(*TRIPLET)),
    "CachedMultipleNegativesRanking": (CACHED, ranking, rows(*TRIPLET)),
    "CosineSimilarity": (losses.CosineSimilarityLoss, of_pairs, rows(*PAIR, **SCORES)),
    "CoSENT": (losses.CoSENTLoss, cosent, rows(*PAIR, **SCORES)),
    "Matryoshka": (
        lambda model: losses.MatryoshkaLoss(
            model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[WIDTH, WIDTH // 2]
        ),
        nested,
        rows(*PAIR),
    ),
}
FUNCTIONAL, MOMENTUM = Setting("functional"), Setting("functional", direction="momentum")
SETTINGS = [
    Setting("sam"),
    Setting("logit"),
    Setting("functional", accumulation=2, scope="optimizer_step"),
    MOMENTUM,
]
RANKING = "MultipleNegativesRanking"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, FUNCTIONAL) for name in LOSSES),
        *((RANKING, setting) for setting in SETTINGS),
        (f"Cached{RANKING}", MOMENTUM),
    ],
    ids=str,
)
def test_a_sentence_transformer_agrees_with_the_formulas(
    tmp_path: Path, folder: Callable[[str], str], name: str, setting: Setting
) -> None:
    loss, formula, data = LOSSES[name]
    model = embedder(folder, Normalize())
    start = reference.leaves(reference.trainable(model))
    wanted = expected(model, formula, data, setting)
    trained(tmp_path, model, loss(model), data, setting)
    assert_agrees(model, start, wanted)


def test_the_variants_of_a_sentence_transformer_end_apart(folder: Callable[[str], str]) -> None:
    model = embedder(folder, Normalize())
    variants: list[reference.Variant] = ["none", "sam", "functional", "logit"]
    ends = [expected(model, ranking, rows(*PAIR), Setting(variant)) for variant in variants]
    went = distance(reference.trainable(model), ends[0])
    for i, end in enumerate(ends):
        assert all(distance(end, other) > DISTINCT * went for other in ends[:i])


def test_none_is_the_sentence_transformer_trainer_to_the_bit(tmp_path: Path, folder: Callable[[str], str]) -> None:
    plain, split = embedder(folder), embedder(folder)
    kind = (SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
    trained(tmp_path, plain, losses.MultipleNegativesRankingLoss(plain), rows(*PAIR), FUNCTIONAL, kind)
    trained(tmp_path, split, losses.MultipleNegativesRankingLoss(split), rows(*PAIR), Setting("none"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), split.parameters(), strict=True))


def layers(model: nn.Module, theta: reference.Tensors, batch: reference.Batch) -> reference.Logits:
    """The embeddings of every layer of BERT, the last first, of each column."""
    found = []
    for column in batch["columns"]:
        bert = {name.removeprefix("0.model."): weight for name, weight in theta.items()}
        inputs = {name: column[name] for name in ("input_ids", "attention_mask")}
        hidden = functional_call(model[0].model, bert, kwargs=inputs | {"output_hidden_states": True}).hidden_states
        mask = column["attention_mask"].unsqueeze(-1)
        found.append([(each * mask).sum(1) / mask.sum(1) for each in (hidden[-1], *hidden[:-1])])
    return tuple(each for pair in zip(*found, strict=True) for each in pair)


def of_layers(*z: Tensor, label: None = None) -> Tensor:
    """The last layer's loss, and the mean of those of the embeddings and of the first layer, by 1 and 1/2."""
    last, embedded, first = (ranking(*z[i : i + 2]) for i in (0, 2, 4))
    return last + (embedded + first / 2) / 2


def test_a_loss_that_feeds_what_it_was_given_to_the_model_again_agrees_with_the_formulas(
    tmp_path: Path, folder: Callable[[str], str]
) -> None:
    model = embedder(folder)
    start = reference.leaves(reference.trainable(model))
    wanted = expected(model, of_layers, rows(*PAIR), FUNCTIONAL, layers)
    inner = losses.MultipleNegativesRankingLoss(model)
    trained(
        tmp_path,
        model,
        losses.AdaptiveLayerLoss(model, inner, -1, kl_temperature=0, layer_weighting="linear"),
        rows(*PAIR),
        FUNCTIONAL,
    )
    assert_agrees(model, start, wanted)


def test_the_weights_of_a_loss_get_the_gradient_of_the_second_pass_alone(
    tmp_path: Path, folder: Callable[[str], str]
) -> None:
    """φ of the loss: ∂ℓ(F(θ+ε), φ)/∂φ. Nothing perturbs φ."""
    data = rows(*PAIR, label=[0, 1, 2, 1] * STEPS)
    model = embedder(folder)
    loss = losses.SoftmaxLoss(model, WIDTH, num_labels=3)
    loss.classifier.double()
    theta, phi = reference.leaves(reference.trainable(model)), reference.leaves(reference.trainable(loss.classifier))
    start, momentum = reference.leaves(theta | phi), {}

    def value(z: reference.Logits, label: Tensor) -> Tensor:
        a, b = z
        return F.cross_entropy(F.linear(torch.cat([a, b, (a - b).abs()], 1), phi["weight"], phi["bias"]), label)

    for batch in list(batches_of(model, data)):
        z = embeddings(model, theta, batch)
        u = torch.autograd.grad(value(z, batch["label"]), z, retain_graph=True)
        epsilon = reference.perturbation(reference.vjp(z, theta, u), FUNCTIONAL.rho)
        moved = reference.leaves({name: weight + epsilon.get(name, 0) for name, weight in theta.items()})
        z = embeddings(model, moved, batch)
        gradient = reference.vjp(z, moved, u) | reference.vjp((value(z, batch["label"]),), phi, (torch.ones(()),))
        for name, g in gradient.items():
            momentum[name] = 0.9 * momentum.get(name, 0) + g
            (theta | phi)[name].data -= 0.05 * momentum[name]
    trained(tmp_path, model, loss, data, FUNCTIONAL)
    both = reference.trainable(model) | reference.trainable(loss.classifier)
    assert distance(both, theta | phi) < TOLERANCE * distance(start, theta | phi)
    assert distance(reference.trainable(loss.classifier), phi) < TOLERANCE


# Cross encoders and sparse encoders -----------------------------------------------------------------------------------


def scores(model: nn.Module, theta: reference.Tensors, batch: reference.Batch) -> reference.Logits:
    (pairs,) = batch["columns"]
    return (functional_call(model, theta, ({**pairs},))["scores"],)


def test_a_cross_encoder_agrees_with_the_formulas(tmp_path: Path, folder: Callable[[str], str]) -> None:
    data = rows("query", "answer", label=[1.0, 0.0, 0.0, 1.0] * STEPS)
    pairs = Dataset.from_dict({"pair": list(zip(data["query"], data["answer"], strict=True)), "label": data["label"]})
    model = CrossEncoder(folder("BertForSequenceClassification"), num_labels=1, device="cpu")
    start = reference.leaves(reference.trainable(model))

    def formula(z: Tensor, label: Tensor) -> Tensor:
        return F.softplus(z.view(-1)).mean() - (z.view(-1) * label).mean()

    wanted = expected(model, formula, pairs, FUNCTIONAL, scores)
    kind = (_CrossTrainer, _CrossArguments)
    trained(tmp_path, model, BinaryCrossEntropyLoss(model), data, FUNCTIONAL, kind)
    assert_agrees(model, start, wanted)


class _ConstantWeights(SpladeRegularizerWeightSchedulerCallback):
    """In place of the schedule that SPLADE has by default."""

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        pass


def test_a_sparse_encoder_agrees_with_the_formulas(tmp_path: Path, folder: Callable[[str], str]) -> None:
    """SPLADE: the ranking by dot products, and the squares of the mean activations."""
    data = rows(*PAIR)
    bert = Transformer(folder("BertForMaskedLM"), transformer_task="fill-mask")
    model = SparseEncoder(modules=[bert, SpladePooling()], device="cpu").double()
    start = reference.leaves(reference.trainable(model))

    def formula(a: Tensor, b: Tensor, label: None) -> Tensor:
        regularizer = 0.1 * a.mean(0).square().sum() + 0.2 * b.mean(0).square().sum()
        return regularizer - (a @ b.T).log_softmax(-1).diagonal().mean()

    wanted = expected(model, formula, data, FUNCTIONAL)
    inner = SparseMultipleNegativesRankingLoss(model)
    splade = SpladeLoss(model, inner, document_regularizer_weight=0.2, query_regularizer_weight=0.1)
    kind = (_SparseTrainer, _SparseArguments)
    trained(tmp_path, model, splade, data, FUNCTIONAL, kind, callbacks=[_ConstantWeights(splade)])
    assert_agrees(model, start, wanted)


def test_the_terms_of_a_loss_are_logged_as_they_are_at_the_clean_weights(
    tmp_path: Path, folder: Callable[[str], str]
) -> None:
    """They add up to the loss. Measuring leaves them alone, too."""

    def logged(variant: str, **arguments: Any) -> list[dict[str, float]]:
        bert = Transformer(folder("BertForMaskedLM"), transformer_task="fill-mask")
        model = SparseEncoder(modules=[bert, SpladePooling()], device="cpu").double()
        inner = SparseMultipleNegativesRankingLoss(model)
        splade = SpladeLoss(model, inner, document_regularizer_weight=0.2, query_regularizer_weight=0.1)
        setting = Setting(variant, rho=1.0)
        kind, callbacks = (_SparseTrainer, _SparseArguments), [_ConstantWeights(splade)]
        arguments |= {"logging_steps": 1, "max_steps": 2, "learning_rate": 0.0}
        trainer = trained(tmp_path, model, splade, rows(*PAIR), setting, kind, callbacks, **arguments)
        terms = ("loss", "base_loss", "document_regularizer_loss", "query_regularizer_loss")
        return [{name: entry[name] for name in terms} for entry in trainer.state.log_history if "base_loss" in entry]

    plain = logged("none")
    assert len(plain) == 2
    assert logged("none", fsam_diagnostics_steps=1) == plain
    for variant in ("sam", "functional", "logit"):
        for split, entry in zip(logged(variant), plain, strict=True):
            assert split == pytest.approx(entry, abs=2e-4), variant  # it logs four digits
