"""The recipes from end to end: what they refuse, and what a run leaves behind."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from hf_fsam import FSAMTrainer, FSAMTrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import align
import config
import demo
import dpo
import finetune
import pretrain
import sft
from averaging import AveragingArguments, AveragingMixin
from data import Splits, cut, load_splits
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard

from tests.toys import make_trainer, weights_of

ROOT = Path(__file__).parents[2]
TINY = {
    "corpus_max_bytes": 400_000,
    "validation_fraction": 0.2,
    "sequence_length": 64,
    "validation_blocks": 24,
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "max_steps": 6,
    "eval_steps": 3,
    "logging_steps": 2,
    "warmup_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "use_cpu": True,
}
CLASSIFIED = 19  # rows that a classifier is evaluated on


def arguments(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "demo.py", "sft.py", "dpo.py"])
def test_help_is_printed(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = {
        "pretrain.py": pretrain.run,
        "finetune.py": finetune.run,
        "demo.py": demo.main,
        "sft.py": lambda argv: align.run(argv, "sft.py", *ALIGNED["sft"]),
        "dpo.py": lambda argv: align.run(argv, "dpo.py", *ALIGNED["dpo"]),
    }[script]
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    assert ("--output_dir" if script == "demo.py" else "--fsam_rho") in capsys.readouterr().out


# ---- A run from end to end ----


@dataclass
class Run:
    folder: Path
    results: dict[str, Any]

    @property
    def written(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def run_pretrain(folder: Path, cache: str, **settings: Any) -> Run:
    line = arguments({**TINY, "output_dir": folder, "cache_dir": cache, "hub_token": "secret", **settings})
    return Run(folder, pretrain.run([str(config.CONFIGS / "pretrain_tiny.yaml"), *line]))


def run_finetune(name: str, folder: Path, cache: str, base: Run, **settings: Any) -> Run:
    small = {key: TINY[key] for key in TINY if key not in ("corpus_max_bytes", "vocab_size", "hidden_size", "layers")}
    small = {key: value for key, value in small.items() if key not in ("intermediate_size", "heads")}
    line = {**small, "model_name_or_path": base.folder, "output_dir": folder, "cache_dir": cache, **settings}
    return Run(folder, finetune.run([str(config.CONFIGS / f"{name}.yaml"), *arguments(line)]))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Run:
    return run_pretrain(tmp_path_factory.mktemp("run") / "base", cache)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, cache: str, pretrained: Run) -> Run:
    return run_finetune("finetune_topics", tmp_path_factory.mktemp("run") / "lora", cache, pretrained)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, cache: str, pretrained: Run) -> Run:
    folder = tmp_path_factory.mktemp("run") / "classes"
    # In batches of 8 the last one is shorter.
    return run_finetune("finetune_packages", folder, cache, pretrained, validation_blocks=CLASSIFIED)


def test_pretraining_leaves_a_model_that_reproduces_its_loss(pretrained: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained.folder)
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    assert model.config.vocab_size == len(tokenizer) == 512
    metrics = pretrained.results["metrics"]
    # The loss of transformers and the sum of the metric are two computations of one number.
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-4)
    assert 0 <= metrics["eval_next_token_accuracy"] <= 1
    untrained = math.log(512)
    assert metrics["eval_loss"] < untrained
    ids = tokenizer("import os\nimport sys\n", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss < untrained


def test_the_results_record_what_was_run(pretrained: Run) -> None:
    written = pretrained.written
    assert written["metrics"] == pretrained.results["metrics"]
    assert (written["seed"], written["steps"], written["tokens_seen"]) == (0, 6, 6 * 4 * 64)
    assert len(written["corpus_sha256"]) == 64
    assert written["parameters"] == sum(w.numel() for w in load_file(pretrained.folder / "model.safetensors").values())
    assert {"python", "torch", "transformers", "peft", "hf-fsam"} <= written["versions"].keys()
    assert written["arguments"]["training"]["fsam_variant"] == "functional"
    assert written["arguments"]["data"]["sequence_length"] == 64
    assert written["arguments"]["model"]["layers"] == 2
    assert 0 < written["train_seconds"] < written["wall_seconds"]
    assert {"cpu_count", "gpus", "processes"} <= written["machine"].keys()
    steps = [entry["step"] for entry in written["history"] if "eval_loss" in entry]
    assert steps == [3, 6, 6]
    text = (pretrained.folder / "results.json").read_text()
    assert "secret" not in text
    assert os.uname().nodename not in text.split('"history"')[0].replace('"localhost"', "")


def test_a_run_leaves_curves_and_a_card(pretrained: Run, lora: Run, classifier: Run) -> None:
    for run in (pretrained, lora, classifier):
        assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        card = (run.folder / "README.md").read_text()
        assert "2502.02407" in card
    card = ModelCard.load(pretrained.folder / "README.md")
    assert "This model was trained from scratch on the stdlib dataset." in card.text
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, None)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["loss"] == pytest.approx(pretrained.results["metrics"]["eval_loss"])
    assert set(results) == {"loss", "perplexity", "next_token_accuracy"}


def true_card(run: Run, base: Run) -> None:
    """What every fine-tuning's card says."""
    card = ModelCard.load(run.folder / "README.md")
    assert f"This model is a fine-tuned version of `{Path(*base.folder.parts[-2:])}`" in card.text
    assert "functional-sam" in card.data.tags
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    assert card.data.eval_results
    assert (card.data.base_model, card.data.datasets) == (None, None)
    for false in ("None", "from scratch", "licence", str(base.folder)):
        assert false not in str(card)


def test_the_card_of_a_fine_tuning_names_what_it_began_with(lora: Run, classifier: Run, pretrained: Run) -> None:
    true_card(lora, pretrained)
    true_card(classifier, pretrained)


def test_the_same_settings_give_the_same_weights_from_the_cache(pretrained: Run, cache: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in Path(cache).rglob("*.arrow"))
    again = run_pretrain(tmp_path / "again", cache)
    first, second = (load_file(run.folder / "model.safetensors") for run in (pretrained, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in Path(cache).rglob("*.arrow")) == before  # nothing was tokenized again


def test_lora_reports_both_domains_before_and_after(lora: Run, pretrained: Run) -> None:
    domains = lora.written["domains"]
    assert domains.keys() == {"new", "old"}
    for name, losses in domains.items():
        key = f"eval_{name}_loss"
        evaluated = [(entry["step"], entry[key]) for entry in lora.written["history"] if key in entry]
        assert evaluated[0] == (0, losses["loss_before"])
        assert losses["loss_after"] == lora.results["metrics"][f"eval_{name}_loss"]
        assert losses["change"] == losses["loss_after"] - losses["loss_before"] != 0
    assert domains["new"]["change"] < 0
    # Before the first step an adapter changes nothing, so that the old loss is that of the pretrained model.
    assert domains["old"]["loss_before"] == pytest.approx(pretrained.results["metrics"]["eval_loss"], abs=0.3)


def test_lora_adapter_loads_in_the_three_ways(lora: Run, pretrained: Run) -> None:
    assert not (lora.folder / "model.safetensors").exists()
    assert 0 < lora.results["trainable_parameters"] < lora.results["parameters"]
    ids = torch.arange(20).unsqueeze(0)  # (1, 20)
    base = AutoModelForCausalLM.from_pretrained(pretrained.folder)
    plain = base(ids).logits
    tuned = [
        PeftModel.from_pretrained(base, lora.folder)(ids).logits,
        AutoPeftModelForCausalLM.from_pretrained(lora.folder)(ids).logits,
        AutoModelForCausalLM.from_pretrained(lora.folder)(ids).logits,
    ]
    assert all(torch.allclose(each, tuned[0], atol=1e-5) for each in tuned)
    assert not torch.allclose(plain, tuned[0], atol=1e-4)


def test_trained_weights_are_in_fp32_and_frozen_ones_in_the_type_of_the_checkpoint(
    tmp_path: Path, pretrained: Run
) -> None:
    AutoModelForCausalLM.from_pretrained(pretrained.folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    dtypes = {}
    for adapter in ("none", "lora"):
        model_args = finetune.ModelArguments(str(tmp_path), adapter)
        model = finetune.load_model(model_args, AutoModelForCausalLM, pad_token_id=1)
        dtypes[adapter] = {(weight.dtype, weight.requires_grad) for weight in model.parameters()}
    assert dtypes["none"] == {(torch.float32, True)}
    assert dtypes["lora"] == {(torch.bfloat16, False), (torch.float32, True)}
    model = finetune.load_model(model_args, AutoModelForSequenceClassification, pad_token_id=1)
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert any("score" in name for name in trained)  # the new head
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # in one type from end to end


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_classifiers_gradient_does_not_grow_with_the_micro_batches(
    tmp_path: Path, pretrained: Run, adapter: str
) -> None:
    rows = [{"input_ids": [row, 7, 9, row + 3], "attention_mask": [1] * 4, "labels": row % 2} for row in range(8)]
    logged = []
    for batch, count in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model_args = finetune.ModelArguments(str(pretrained.folder), adapter)
        model = finetune.load_model(model_args, AutoModelForSequenceClassification, pad_token_id=1)
        args = finetune.FinetuneTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            fsam_variant="none",  # since Functional-SAM perturbs each micro-batch by itself
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=count,
        )
        trainer = finetune.FinetuneTrainer(model, args, train_dataset=Dataset.from_list(rows))
        trainer.train()
        logged.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_dora_and_full_fine_tuning(tmp_path: Path, cache: str, pretrained: Run) -> None:
    settings = {"max_steps": 2, "eval_strategy": "no", "validation_blocks": 8}
    dora = run_finetune("finetune_topics", tmp_path / "dora", cache, pretrained, adapter="dora", **settings)
    assert json.loads((dora.folder / "adapter_config.json").read_text())["use_dora"] is True
    best = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "adapter": "none"}
    full = run_finetune("finetune_topics", tmp_path / "full", cache, pretrained, **settings | best)
    state = json.loads((full.folder / "checkpoint-2" / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_new_loss"] for entry in state["log_history"] if "eval_new_loss" in entry}
    assert state["best_metric"] == min(evaluated[1], evaluated[2])
    line = [str(config.CONFIGS / "finetune_topics.yaml"), "--output_dir", str(full.folder)]
    parsed = config.parse(finetune.SETTINGS, [*line, "--resume_from_checkpoint", "true"], "finetune.py")[-1]
    assert parsed.resume_from_checkpoint == str(full.folder / "checkpoint-2")
    assert full.results["trainable_parameters"] == full.results["parameters"]
    # The Trainer's clock starts anew when it resumes, so what was evaluated before is not in its time.
    path = full.folder / "checkpoint-1" / "trainer_state.json"
    before = json.loads(path.read_text())
    before["log_history"][0]["eval_new_runtime"] = 1e6
    path.write_text(json.dumps(before))
    again = settings | best | {"resume_from_checkpoint": path.parent}
    resumed = run_finetune("finetune_topics", tmp_path / "full", cache, pretrained, **again)
    assert 0 < resumed.results["train_seconds"] < resumed.results["wall_seconds"]
    AutoModelForCausalLM.from_pretrained(full.folder)


def test_a_classifier_is_saved_with_its_labels(classifier: Run, cache: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier.folder)
    assert model.config.id2label == dict(enumerate(sorted(model.config.id2label.values())))
    assert "asyncio" in model.config.label2id

    # The metrics are those of one example after the other, so no means over batches, of which the last one is shorter.
    data = finetune.FinetuneDataArguments(**classifier.written["arguments"]["data"])
    task = finetune.classification_task(data, load_splits(data), AutoTokenizer.from_pretrained(classifier.folder))
    rows = task.trainer_options["eval_dataset"]
    assert len(rows) == CLASSIFIED
    assert len(set(rows["labels"])) > 3
    with torch.no_grad():
        guesses = [int(model(torch.tensor([row["input_ids"]])).logits.argmax()) for row in rows]
    metrics = classifier.results["metrics"]
    assert metrics["eval_accuracy"] == pytest.approx(accuracy_score(rows["labels"], guesses))
    assert metrics["eval_f1"] == pytest.approx(f1_score(rows["labels"], guesses, average="macro"))


def test_an_adapter_with_labels_is_loaded_with_their_number(tmp_path: Path, cache: str, pretrained: Run) -> None:
    settings = {"adapter": "lora", "max_steps": 2, "eval_strategy": "no"}
    run = run_finetune("finetune_packages", tmp_path / "out", cache, pretrained, **settings)
    labels = run.written["labels"]
    assert labels == sorted(labels)
    model = AutoPeftModelForSequenceClassification.from_pretrained(run.folder, num_labels=len(labels))
    saved = load_file(run.folder / "adapter_model.safetensors")
    head = next(value for name, value in saved.items() if "score" in name)  # (classes, hidden)
    assert head.shape[0] == len(labels) == 6
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, head)


def test_a_fine_tuning_saves_the_average_of_its_weights(tmp_path: Path, cache: str, pretrained: Run) -> None:
    def saved(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        settings |= {"max_steps": 3, "eval_strategy": "no", "warmup_steps": 0, "learning_rate": 1e-2}
        run = run_finetune("finetune_packages", tmp_path / name, cache, pretrained, **settings)
        return load_file(run.folder / "model.safetensors")

    plain = saved("plain")
    last, average = (saved(f"ema{decay}", weight_average="ema", average_decay=decay) for decay in (0.0, 0.5))
    assert all(torch.equal(last[name], plain[name]) for name in plain)
    assert not any(torch.equal(average[name], plain[name]) for name in plain)


class AveragingTrainer(AveragingMixin, FSAMTrainer): ...


@dataclass
class AveragedArguments(AveragingArguments, FSAMTrainingArguments): ...


def averaging_trainer(folder: Path, **settings: Any) -> AveragingTrainer:
    kinds = {"trainer_class": AveragingTrainer, "arguments_class": AveragedArguments}
    return make_trainer(folder, weight_average="ema", average_decay=0.9, **kinds, **settings)


def test_a_second_training_begins_its_average_anew(tmp_path: Path) -> None:
    trainer = averaging_trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert trainer.averaged_steps == 3


def test_a_checkpoint_holds_the_weights_and_a_saved_model_their_average(tmp_path: Path) -> None:
    """The Trainer saves a checkpoint on SIGTERM, whatever save_strategy says."""
    trainer = averaging_trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.save_model(str(tmp_path / "model"))
    checkpoint, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-3", "model"))
    assert {*checkpoint} == {*saved}
    weights = weights_of(trainer.model)
    assert all(torch.equal(checkpoint[name], weights[name]) for name in saved)
    assert not any(torch.equal(saved[name], weights[name]) for name in saved)


def test_a_training_with_an_average_saves_nothing_on_sigterm_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = averaging_trainer(tmp_path, enable_jit_checkpoint=True)  # as the image's entry point sets it
    assert not trainer.args.enable_jit_checkpoint
    assert "no checkpoint is saved on SIGTERM" in caplog.text


def test_a_training_with_an_average_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True: no checkpoint holds the average"):
        averaging_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_an_average_of_sharded_weights_is_refused(engine: str) -> None:
    class Sharding:
        def __init__(self) -> None:
            self.args = SimpleNamespace(weight_average="ema")
            self.is_deepspeed_enabled = self.is_fsdp_enabled = False
            setattr(self, engine, True)

    class Averaging(AveragingMixin, Sharding): ...

    with pytest.raises(ValueError, match="weight_average='ema' needs whole weights"):
        Averaging()


# ---- Other data ----


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": f"Add {i}.", "input": "1" if i % 2 else "", "output": f"{i + 1}"} for i in range(40)]
    rows += [{"instruction": "long " * 200, "input": "", "output": "never seen"}]
    path = tmp_path_factory.mktemp("instructions") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_instructions_are_masked_up_to_the_answer(pretrained: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    for context in ("the context", "", None):
        row = {"instruction": "Do it.", "input": context, "output": "Done."}
        encoded = finetune.encoding_instruction(tokenizer, length=1000)(row)
        learned = [label for label in encoded["labels"] if label != -100]
        masked = len(encoded["labels"]) - len(learned)
        assert tokenizer.decode(learned) == "Done." + tokenizer.eos_token
        assert encoded["labels"][masked:] == encoded["input_ids"][masked:] == learned
        prompt = tokenizer.decode(encoded["input_ids"][:masked])
        assert prompt.endswith("### Response:\n")
        assert ("### Input:\nthe context" in prompt) == bool(context)
        assert "### Instruction:\nDo it.\n" in prompt
        assert len(finetune.encoding_instruction(tokenizer, length=5)(row)["input_ids"]) == 5


def test_instructions_from_a_local_file(tmp_path: Path, cache: str, pretrained: Run, instructions: Path) -> None:
    # An Alpaca prompt is longer than the 64 positions of the tiny model.
    base = run_pretrain(tmp_path / "base", cache, sequence_length=256, max_steps=1, eval_strategy="no")
    settings = {"dataset": instructions, "sequence_length": 256, "max_steps": 2, "bf16": False, "eval_strategy": "no"}
    run = run_finetune("alpaca", tmp_path / "out", cache, base, old_dataset="stdlib", **settings)
    assert {"eval_new_loss", "eval_old_loss"} <= run.results["metrics"].keys()
    with pytest.raises(ValueError, match=r"No answer in the training split .* within sequence_length=16"):
        run_finetune("alpaca", tmp_path / "out", cache, base, **{**settings, "sequence_length": 16})


def test_validation_blocks_limits_instructions_too(cache: str, pretrained: Run, instructions: Path) -> None:
    data = finetune.FinetuneDataArguments(
        dataset=str(instructions), format="alpaca", sequence_length=256, validation_blocks=2, cache_dir=cache
    )
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    task = finetune.language_model_task(data, load_splits(data), tokenizer)
    assert len(task.trainer_options["eval_dataset"]["new"]) == 2


def test_pairs_of_sentences_with_labels_from_a_local_file(tmp_path: Path, cache: str, pretrained: Run) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": "same" if i % 3 else "other"} for i in range(30)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"dataset": path, "max_steps": 2, "eval_strategy": "no", "dataset_config": "default"}
    run = run_finetune("glue_mrpc", tmp_path / "out", cache, pretrained, **settings)
    assert AutoConfig.from_pretrained(run.folder).id2label == {0: "other", 1: "same"}
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "label": None}])))
    with pytest.raises(ValueError, match="row 31: there is no 'label'"):
        run_finetune("glue_mrpc", tmp_path / "out", cache, pretrained, **settings)
    with pytest.raises(ValueError, match="label_column='lable' is not a column"):
        run_finetune("glue_mrpc", tmp_path / "out", cache, pretrained, **settings, label_column="lable")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("-1,1,-1,1", None),
        ("01,1,2,10", None),
        ("TRUE,true,TRUE,true", None),
        ("a,,b,a", "row 2: there is no 'label'"),
        ("1,,2,1", "row 2: there is no 'label'"),
    ],
)
def test_the_labels_of_a_table_are_what_is_written_there(
    labels: str, message: str | None, tmp_path: Path, cache: str
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("text,label\n" + "\n".join(f"text {i},{label}" for i, label in enumerate(labels.split(","))))
    data_args = finetune.FinetuneDataArguments(
        task="sequence_classification", dataset=str(table), validation_fraction=0.5, cache_dir=cache
    )
    if message is None:
        names = finetune.label_names(load_splits(data_args), "label")
        assert names == list(dict.fromkeys(labels.split(",")))  # numbers in their order
    else:
        with pytest.raises(ValueError, match=message):
            load_splits(data_args)


def test_a_mistyped_text_column_is_named(tmp_path: Path, cache: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("text,label\na,x\nb,y\nc,x\n")
    arguments = {"task": "sequence_classification", "dataset": str(table), "text_column": "txt", "cache_dir": cache}
    with pytest.raises(ValueError, match=r"text_column='txt' is not a column of .* Did you mean 'text'"):
        load_splits(finetune.FinetuneDataArguments(**arguments))


def test_texts_that_several_people_labelled_are_on_one_side(tmp_path: Path, cache: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("text,label\n" + "\n".join(f"text {i // 5},{'ab'[i % 2]}" for i in range(200)))
    splits = load_splits(
        finetune.FinetuneDataArguments(
            task="sequence_classification", dataset=str(table), validation_fraction=0.31, cache_dir=cache
        )
    )
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert len(splits.validation) == 65


def dialogue(question: int, answer: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{question}"}, {"role": "assistant", "content": f"{answer}"}]


def test_validation_rows_that_ask_what_a_training_row_asks_are_counted(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    (tmp_path / "validation.csv").write_text("text,label\na,y\nd,y\nb,y\n")
    load_splits(finetune.FinetuneDataArguments(task="sequence_classification", dataset=str(tmp_path), cache_dir=cache))
    assert "2 of the 3 validation rows have the text or the prompt of a training row" in caplog.text


@pytest.mark.parametrize("row", [0, 19])
def test_a_row_of_a_dialogue_that_lacks_a_value_is_named_by_its_place_in_the_file(
    row: int, tmp_path: Path, cache: str
) -> None:
    rows = [{"prompt": f"{i}", "completion": None if i == row else "b"} for i in range(20)]
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"row {row + 1}: there is no 'completion'"):
        load_splits(align.AlignDataArguments(dataset=str(table), cache_dir=cache))


ALPACA = {"task": "causal_lm", "format": "alpaca"}


@pytest.mark.parametrize(
    ("arguments", "settings", "row"),
    [
        (finetune.FinetuneDataArguments, ALPACA, lambda i: {"instruction": f"ask {i // 3}", "output": f"{i}"}),
        (
            finetune.FinetuneDataArguments,
            ALPACA,
            lambda i: {"instruction": "add", "input": f"{i // 3}", "output": f"{i}"},
        ),
        (align.AlignDataArguments, {}, lambda i: {"prompt": f"ask {i // 3}", "completion": f"{i}"}),
        (
            align.AlignDataArguments,
            {"method": "dpo"},
            lambda i: {"prompt": [{"role": "user", "content": f"{i // 3}"}], "chosen": f"{i}", "rejected": "no"},
        ),
        (
            align.AlignDataArguments,
            {"method": "dpo"},
            lambda i: {"chosen": dialogue(i // 3, i), "rejected": dialogue(i // 3, -i)},
        ),
        (align.AlignDataArguments, {}, lambda i: {"messages": dialogue(i // 3, i)}),
    ],
)
def test_answers_to_one_prompt_are_on_one_side(
    arguments: Any, settings: dict[str, str], row: Any, tmp_path: Path, cache: str
) -> None:
    table = tmp_path / "answers.jsonl"
    table.write_text("\n".join(json.dumps({**row(i), "question": i // 3}) for i in range(90)))
    splits = load_splits(arguments(dataset=str(table), validation_fraction=0.2, cache_dir=cache, **settings))
    train, validation = ({*side["question"]} for side in (splits.train, splits.validation))
    assert not train & validation
    assert (len(train), len(validation)) == (24, 6)


@pytest.mark.parametrize("prompts", [["add"] * 40, ["add"] * 20 + ["subtract"] * 20])
def test_where_rows_have_few_prompts_they_are_split_by_row_with_a_warning(
    prompts: list[str], tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "answers.jsonl"
    table.write_text("\n".join(json.dumps({"prompt": each, "completion": f"{i}"}) for i, each in enumerate(prompts)))
    splits = load_splits(align.AlignDataArguments(dataset=str(table), validation_fraction=0.1, cache_dir=cache))
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert "so many rows with the same text or prompt" in caplog.text


def test_an_empty_prompt_is_not_the_same_as_another(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "texts.jsonl"
    table.write_text("\n".join(json.dumps({"messages": dialogue(i, i)[1:], "text": None}) for i in range(40)))
    splits = load_splits(align.AlignDataArguments(dataset=str(table), validation_fraction=0.1, cache_dir=cache))
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert caplog.text == ""


def test_texts_with_many_rows_are_not_preferred(cache: str) -> None:
    rows = Dataset.from_dict({"text": [f"many {i // 5}" for i in range(1000)] + [f"one {i}" for i in range(1000)]})
    first, others = cut(rows, 600, rows["text"], seed=0)
    for side in (first, others):
        assert 0.4 < sum(text.startswith("many") for text in side["text"]) / len(side) < 0.6
    alone = rows.select(range(1000, 2000))
    assert cut(alone, 300, alone["text"], seed=3)[0]["text"][:] == alone.shuffle(seed=3)["text"][:300]


@pytest.mark.parametrize("feature", [Value("string"), ClassLabel(names=["ham", "spam"])])
def test_a_label_that_is_the_same_in_every_row_is_refused(feature: Value | ClassLabel) -> None:
    def splits(*labels: str) -> Splits:
        rows = Dataset.from_dict({"kind": list(labels)}).cast_column("kind", feature)
        return Splits(rows, rows, sha256=None, key="")

    if feature == Value("string"):
        with pytest.raises(ValueError, match="label_column='kind' has rows with an empty label"):
            finetune.label_names(splits("ham", "", "spam"), "kind")
    else:
        hidden = Dataset.from_dict({"kind": [0, 1, -1]}, features=Features({"kind": feature}))
        with pytest.raises(ValueError, match="label_column='kind' has rows without a label"):
            finetune.label_names(Splits(hidden, hidden, sha256=None, key=""), "kind")
    with pytest.raises(ValueError, match=r"label_column='kind' holds 'spam' in every row, .*: add rows of another"):
        finetune.label_names(splits("spam", "spam"), "kind")
    assert finetune.label_names(splits("spam", "ham"), "kind") == ["ham", "spam"]


def test_pretraining_on_a_stream(tmp_path: Path, cache: str, pretrained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i} " * 30}) for i in range(200)))
    monkeypatch.setattr("data.STREAM_VALIDATION_DOCUMENTS", 20)
    line = {key: value for key, value in TINY.items() if key != "corpus_max_bytes"}
    line |= {"dataset": path, "streaming": True, "output_dir": tmp_path / "out", "cache_dir": cache, "vocab_size": 300}
    tiny = str(config.CONFIGS / "pretrain_tiny.yaml")
    results = pretrain.run([tiny, *arguments(line)])
    assert results["steps"] == 6
    assert results["corpus_sha256"] is None
    with pytest.raises(ValueError, match="streaming=True needs max_steps"):
        pretrain.run([tiny, *arguments({**line, "max_steps": -1})])


@pytest.mark.parametrize(
    ("recipe", "settings", "error", "message"),
    [
        (
            "finetune_topics",
            {"model_name_or_path": "./absent"},
            FileNotFoundError,
            "'./absent' does not exist. Give the folder",
        ),
        ("finetune_topics", {"model_name_or_path": "nobody/no"}, ValueError, "model_name_or_path='nobody/no' holds no"),
        ("finetune_topics", {"sequence_length": 65}, ValueError, "sequence_length=65 .* maximum of 64"),
        ("finetune_packages", {"sequence_length": 65}, ValueError, "sequence_length=65 .* maximum of 64"),
        ("finetune_topics", {"task": "translation"}, ValueError, "--task: invalid choice: 'translation'"),
        ("finetune_topics", {"adapter": "ia3"}, ValueError, "--adapter: invalid choice: 'ia3'"),
        ("finetune_topics", {"old_dataset": "./absent"}, FileNotFoundError, "'./absent' does not exist"),
        (
            "finetune_packages",
            {"old_dataset": "stdlib"},
            ValueError,
            "old_dataset='stdlib' is not for this recipe",
        ),
        ("finetune_packages", {"format": "alpaca"}, ValueError, "format='alpaca' is not for this recipe or task"),
        (
            "finetune_topics",
            {"label_column": "kind"},
            ValueError,
            "label_column='kind' is not for .*='seq",
        ),
        ("finetune_topics", {"streaming": True, "dataset": "x/y"}, ValueError, "streaming=True is for pretrain.py"),
        ("finetune_packages", {"dataset": "stdlib"}, ValueError, "label_column='label' is not a column of 'stdlib'"),
        ("finetune_topics", {"format": "alpaca"}, ValueError, "format='alpaca', instruction='instruction' is not a"),
        ("finetune_topics", {"fsam_rho": -1}, ValueError, "fsam_rho=-1.0"),
        (
            "finetune_topics",
            {"load_best_model_at_end": True, "eval_strategy": "no"},
            ValueError,
            "load_best_model_at_end=True needs evaluations",
        ),
        (
            "finetune_topics",
            {"load_best_model_at_end": True, "save_steps": 3, "save_strategy": "steps", "metric_for_best_model": "los"},
            ValueError,
            "metric_for_best_model='los' is none of the metrics, which are eval_new_loss",
        ),
        ("finetune_packages", {"metric_for_best_model": "los"}, ValueError, "'los' is .* Did you mean 'eval_loss'"),
        ("finetune_packages", {"metric_for_best_model": "new_loss"}, ValueError, "'new_loss' is none of the metrics"),
    ],
)
def test_what_fine_tuning_cannot_use_is_refused_by_name_before_training(
    recipe: str,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    cache: str,
    pretrained: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FSAMTrainer, "train", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(error, match=message):
        run_finetune(recipe, tmp_path, cache, pretrained, **settings)


def test_a_model_configuration_with_too_few_positions_is_refused(tmp_path: Path, cache: str, pretrained: Run) -> None:
    with pytest.raises(ValueError, match=r"sequence_length=65 .* maximum of 64"):
        run_pretrain(tmp_path, cache, model_config=pretrained.folder, sequence_length=65)
    with pytest.raises(FileNotFoundError, match=r"model_config='\./absent' does not exist"):
        run_pretrain(tmp_path, cache, model_config="./absent")
    with pytest.raises(FileNotFoundError, match=r"tokenizer='\./absent' does not exist"):
        run_pretrain(tmp_path, cache, tokenizer="./absent")


# ---- The demo ----


def test_demo_compares_the_same_batches(tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {**TINY, "cache_dir": cache, "logging_steps": 1}
    demo.main(["--output_dir", str(tmp_path), *arguments(tiny)])
    arms = {
        "adamw": ("none", 0.1),
        "adamw-weight-decay-1": ("none", 1),
        "functional-sam": ("functional", 0.1),
        "functional-sam-weight-decay-1": ("functional", 1),
    }
    written = {arm: json.loads((tmp_path / arm / "results.json").read_text()) for arm in arms}
    for arm, (variant, decay) in arms.items():
        training = written[arm]["arguments"]["training"]
        assert (training["fsam_variant"], training["weight_decay"]) == (variant, decay)
    first = [result["history"][0]["loss"] for result in written.values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-6)  # the loss at the same weights on the same batch
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["optimizer"] for row in table] == list(demo.ARMS)
    for row, result in zip(table, written.values(), strict=True):
        assert row["validation loss"] == pytest.approx(result["metrics"]["eval_loss"], abs=1e-4)
    assert table[0]["time (AdamW = 1)"] == 1
    out = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in out
    assert str(tmp_path / "difference.png") in out
    assert (tmp_path / "difference.png").exists()
    assert "{'loss'" not in out


# ---- Several processes ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [("torchrun", 1), ("torchrun", 2), ("accelerate", 1)],  # accelerate starts several on CPUs through MPI only
)
def test_the_launchers_train(launcher: str, processes: int, tmp_path: Path) -> None:
    command = {
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"],
        "accelerate": ["accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--main_process_port=0"],
    }[launcher]
    line = arguments({**TINY, "output_dir": tmp_path, "cache_dir": tmp_path / "cache"})
    run = subprocess.run(
        [sys.executable, "-m", *command, "recipes/pretrain.py", "recipes/configs/pretrain_tiny.yaml", *line],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("eval_perplexity") == 1  # one process speaks
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["processes"] == processes
    assert written["tokens_per_step"] == processes * 4 * 64
    metrics = written["metrics"]
    # The blocks of all processes count, each once, so that the metric over 24 blocks is the Trainer's mean loss.
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-4)
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(24, abs=0.5)
    assert not list(tmp_path.glob("cache/tmp*"))


# ---- TRL ----

ALIGNED = {
    "sft": (sft.FSAMSFTTrainer, sft.FSAMSFTConfig, sft.METRICS),
    "dpo": (dpo.FSAMDPOTrainer, dpo.FSAMDPOConfig, dpo.METRICS),
}


def run_aligned(script: str, folder: Path, cache: str, base: Run, **settings: Any) -> Run:
    names = ("max_steps", "eval_steps", "logging_steps", "warmup_steps", "use_cpu", "validation_blocks")
    few = {key: TINY[key] for key in (*names, "corpus_max_bytes", "validation_fraction")}
    own = {"model_name_or_path": base.folder, "output_dir": folder, "cache_dir": cache, "max_length": 48}
    line = arguments(few | own | {"per_device_train_batch_size": 4, "hub_token": "secret"} | settings)
    path = config.CONFIGS / f"{script}_docstrings.yaml"
    return Run(folder, align.run([str(path), *line], f"{script}.py", *ALIGNED[script]))


@pytest.mark.parametrize("method", ALIGNED)
def test_trl_recipes_run_offline(method: str, tmp_path: Path, cache: str, pretrained: Run) -> None:
    run = run_aligned(method, tmp_path / "out", cache, pretrained)
    history = run.written["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 3, 6, 6]
    logged = next(entry for entry in history if "loss" in entry)
    assert logged["fsam/radius"] == pytest.approx(0.03, rel=1e-3)
    assert "fsam/functional_sharpness" in logged
    declared = (*{"sft": sft, "dpo": dpo}[method].METRICS, "eval_runtime", "eval_*_per_second")
    evaluated = {name for entry in history for name in entry if name.startswith("eval_")}
    assert {name for name in evaluated if not any(fnmatchcase(name, each) for each in declared)} == set()
    true_card(run, pretrained)
    assert "secret" not in (run.folder / "results.json").read_text()
    AutoModelForCausalLM.from_pretrained(run.folder)


def test_trl_recipes_refuse_arguments_that_they_would_ignore(tmp_path: Path, cache: str, pretrained: Run) -> None:
    for wrong, message in (
        ({"sequence_length": 64}, "use max_length"),
        ({"text_column": "body"}, "TRL's own columns"),
        ({"method": "dpo"}, "for dpo.py, not sft.py"),
        ({"metric_for_best_model": "rewards/margins"}, "'rewards/margins' is none of the metrics"),
    ):
        with pytest.raises(ValueError, match=message):
            run_aligned("sft", tmp_path, cache, pretrained, **wrong)
    best = TrainingArguments(metric_for_best_model="rewards/margins", use_cpu=True)
    config.check_best_model(best, dpo.METRICS)


def test_columns_that_trl_can_not_use_are_refused() -> None:
    questions = Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    choices = [("messages",), ("prompt", "completion")]
    needed = "has the columns 'question', 'answer'. TRL needs 'messages', or 'prompt' and 'completion': rename them"
    with pytest.raises(ValueError, match=needed):
        align.check_columns(questions, "mine", choices)
    gap = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", None]})
    with pytest.raises(ValueError, match="dataset='mine', row 2: there is no 'completion'"):
        align.check_columns(gap, "mine", choices)
