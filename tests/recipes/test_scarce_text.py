"""recipes/studies/scarce_text.py: masked inputs, averaged and stopped weights, and a test set apart."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))

import pretrain
import scarce_text
from data import DatasetArguments, load_splits
from transformers import AutoModelForCausalLM

from hf_fsam.studies.runner import read_results
from tests.toys import LENGTH, distance, llama, make_trainer, sentences, weights_of

ROOT = Path(__file__).parents[2]
MASK = 0  # a token that the toys' sentences do not have


def scarce_trainer(folder: Path, share: float = 0.0, **arguments: Any) -> scarce_text.ScarceTrainer:
    collators: dict[str, Any] = {"data_collator": default_data_collator}
    if share:
        collators["train_collator"] = scarce_text.MaskedInputs(share, MASK, seed=3)
        arguments["masked_inputs"] = share
    return make_trainer(
        folder,
        trainer_class=scarce_text.ScarceTrainer,
        arguments_class=scarce_text.ScarceTrainingArguments,
        trainer={"eval_dataset": sentences(8, seed=2), **collators},
        fsam_variant=arguments.pop("fsam_variant", "none"),
        **arguments,
    )


def seen_by(trainer: scarce_text.ScarceTrainer) -> list[tuple[bool, Tensor, Tensor]]:
    """What the model will be given: whether it is in training, its inputs and its labels."""
    seen: list[tuple[bool, Tensor, Tensor]] = []

    def see(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((module.training, kwargs["input_ids"].cpu(), kwargs["labels"].cpu()))

    trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    return seen


# ---- Masked inputs ----


def test_masks_take_the_asked_share_of_the_inputs_and_leave_the_targets() -> None:
    rows = sentences(3000)
    batch = scarce_text.MaskedInputs(0.2, MASK, seed=0)(rows)
    original = torch.stack([row["input_ids"] for row in rows])
    assert torch.equal(batch["labels"], original)
    assert torch.equal(batch["input_ids"], original)
    hidden = batch["masked_input_ids"] == MASK
    assert torch.equal(batch["masked_input_ids"][~hidden], original[~hidden])
    assert hidden.float().mean().item() == pytest.approx(0.2, abs=0.01)
    shares = hidden.float().mean(dim=1)  # from 0 to 0.4, and what the draws of 10 tokens add
    assert shares.var().item() == pytest.approx(0.4**2 / 12 + 0.16 * (1 - 0.16 / 0.75) / LENGTH, rel=0.15)
    positions = hidden.float().mean(dim=0)
    assert positions.min() > 0.15


def test_masks_are_drawn_anew_and_alike_for_a_seed() -> None:
    first, again, other = (scarce_text.MaskedInputs(0.5, MASK, seed) for seed in (0, 0, 1))
    rows = sentences(50)
    state = torch.get_rng_state()
    masked = first(rows)["masked_input_ids"]
    assert torch.equal(masked, again(rows)["masked_input_ids"])
    assert not torch.equal(masked, first(rows)["masked_input_ids"])
    assert not torch.equal(masked, other(rows)["masked_input_ids"])
    assert torch.equal(torch.get_rng_state(), state)  # so that dropout is what it is without masks


@pytest.mark.parametrize("variant", ["none", "functional"])
def test_only_the_training_is_masked(tmp_path: Path, variant: str) -> None:
    trainer = scarce_trainer(tmp_path, share=0.4, fsam_variant=variant)
    seen = seen_by(trainer)
    trainer.train()
    trainer.evaluate()
    in_training = [ids for training, ids, _ in seen if training]
    assert len(in_training) == (6 if variant == "none" else 12)
    assert (torch.cat(in_training) == MASK).float().mean() > 0.2
    assert not any((ids == MASK).any() for training, ids, _ in seen if not training)
    assert not any((labels == MASK).any() for _, _, labels in seen)
    if variant == "functional":  # both passes of a step have the same masks
        assert all(map(torch.equal, in_training[::2], in_training[1::2]))


def test_the_loss_is_that_on_masked_inputs_and_that_on_the_inputs_by_weight(tmp_path: Path) -> None:
    trainer = scarce_trainer(tmp_path, share=0.4, masked_weight=0.3)
    batch = scarce_text.MaskedInputs(0.4, MASK, seed=0)(sentences(4))
    batch = {name: each.to(trainer.args.device) for name, each in batch.items()}
    plain, masked = (
        trainer.model(input_ids=batch[name], labels=batch["labels"]).loss.item()
        for name in ("input_ids", "masked_input_ids")
    )
    assert plain != pytest.approx(masked, abs=1e-3)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.7 * plain + 0.3 * masked, rel=1e-5)


def test_a_small_perturbation_of_a_masked_step_changes_little(tmp_path: Path) -> None:
    """The split step records both forward passes of the loss."""
    weights = {}
    for variant, rho in (("none", 0), ("functional", 1e-7), ("functional", 0.1)):
        trainer = scarce_trainer(tmp_path, share=0.4, masked_weight=0.3, fsam_variant=variant, fsam_rho=rho)
        trainer.train()
        weights[variant, rho] = weights_of(trainer.model)
    assert distance(weights["functional", 1e-7], weights["none", 0]) < 1e-5
    assert distance(weights["functional", 0.1], weights["none", 0]) > 1e-2


# ---- Averaged and stopped weights ----


class Copies(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append([weight.detach().double() for weight in model.parameters()])


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_are_those_of_plain_torch(tmp_path: Path, average: str) -> None:
    settings = {"max_steps": 10, "average_decay": 0.7, "average_from": 0.5}
    trainer = scarce_trainer(tmp_path, weight_average=average, **settings)
    copies = Copies()
    trainer.add_callback(copies)
    trainer.train()
    expected = []
    for steps in zip(*copies.weights, strict=True):
        if average == "swa":
            expected.append(torch.stack(steps[5:]).mean(dim=0))  # steps 6 to 10
            continue
        value = steps[0]
        for count, step in enumerate(steps[1:], start=2):
            decay = min(0.7, 1 - 1 / count)
            value = decay * value + (1 - decay) * step
        expected.append(value)
    for found, value in zip(trainer.evaluated_weights(), expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)

    last = weights_of(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    assert distance(weights_of(trainer.model), last) == 0
    averaged = llama().to(trainer.args.device).eval()
    with torch.no_grad():
        for weight, value in zip(averaged.parameters(), expected, strict=True):
            weight.copy_(value)
        rows = default_data_collator(sentences(8, seed=2))
        ids = rows["input_ids"].to(trainer.args.device)
        assert loss == pytest.approx(averaged(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("average", ["none", "ema"])
def test_the_stopped_weights_are_those_of_the_lowest_validation_loss(tmp_path: Path, average: str) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 16, "learning_rate": 3e-2}
    trainer = scarce_trainer(tmp_path, weight_average=average, average_decay=0.5, **arguments)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    lowest = min(losses, key=losses.__getitem__)
    assert lowest < 16  # or this would show nothing
    last = trainer.evaluate()["eval_loss"]
    # The validation set in place of the test set, since its losses are known.
    found = trainer.test(trainer.eval_dataset)
    assert found == {
        "test_loss": pytest.approx(last, rel=1e-6),
        "test_loss_stopped": pytest.approx(losses[lowest], rel=1e-6),
        "step_stopped": lowest,
    }
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[lowest], rel=1e-6)  # they stay in the model


def test_a_training_that_falls_over_has_no_stopped_weights(tmp_path: Path) -> None:
    trainer = scarce_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    trainer.train()
    found = trainer.test(trainer.eval_dataset)
    assert found["test_loss_stopped"] != found["test_loss_stopped"]
    assert found["step_stopped"] == 0


# ---- Dropout ----


def test_dropout_is_in_training_alone_and_of_a_llama_alone(tmp_path: Path) -> None:
    model = llama()
    ids = torch.randint(3, 40, (2, LENGTH))
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        scarce_text.add_dropout(model, 0.5)
        assert torch.equal(model(input_ids=ids).logits, before)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    dropped: list[float] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: dropped.append((output == 0).float().mean().item())
    )
    model(input_ids=ids)
    assert dropped == [pytest.approx(0.5, abs=0.1)]
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    model.config.model_type = "other"
    with pytest.raises(ValueError, match=r"dropout=0\.5 is for a Llama, and this is 'other'"):
        scarce_text.add_dropout(model, 0.5)


# ---- The whole recipe ----

SMALL = {
    "corpus_max_bytes": 600000,
    "validation_fraction": 0.8,
    "validation_blocks": 8,
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "layers": 1,
    "max_steps": 6,
    "eval_steps": 2,
    "warmup_steps": 0,
    "logging_steps": 2,
    "disable_tqdm": "true",
    "fsam_variant": "none",
}


def test_the_parts_share_no_document() -> None:
    data = DatasetArguments(corpus_max_bytes=600000, validation_fraction=0.8, validation_blocks=40)
    splits = load_splits(data)
    model = pretrain.ModelArguments(vocab_size=300)
    tokenizer = pretrain.build_tokenizer(model, data, splits)
    blocks = scarce_text.load_blocks(splits, tokenizer, data)
    assert len(blocks["validation"]) == len(blocks["test"]) == 40

    documents = [splits.train["text"], splits.validation["text"][::2], splits.validation["text"][1::2]]
    assert len({text for part in documents for text in part}) == len(splits.train) + len(splits.validation)
    for name, texts in zip(blocks, documents, strict=True):
        whole = tokenizer.eos_token.join(texts)  # a block may go on in the next document
        pieces = [tokenizer.decode(block)[5:-5] for block in blocks[name]["input_ids"][:40]]  # without cut characters
        assert all(piece in whole for piece in pieces), name
        others = [tokenizer.eos_token.join(other) for other in documents if other is not texts]
        assert sum(piece in other for piece in pieces for other in others) <= 1, name  # boilerplate may be in two
        if name != "training":  # all documents, and not the first alone
            assert sum(any(piece in text for piece in pieces) for text in texts) > 5, name
    again = scarce_text.load_blocks(splits, tokenizer, data)
    assert all(again[name]["input_ids"] == blocks[name]["input_ids"] for name in blocks)
    data.validation_blocks = 10**6
    with pytest.raises(ValueError, match="validation_blocks=1000000: the validation documents make only"):
        scarce_text.load_blocks(splits, tokenizer, data)


def test_results_have_the_test_losses_and_the_model_is_the_stopped_one(tmp_path: Path) -> None:
    argv = [str(ROOT / "recipes" / "configs" / "study.yaml"), "--output_dir", str(tmp_path)]
    settings = {**SMALL, "weight_average": "ema", "masked_inputs": 0.2, "dropout": 0.1}
    scarce_text.run([*argv, *(str(part) for name in settings for part in (f"--{name}", settings[name]))])
    results = json.loads((tmp_path / "results.json").read_text())
    metrics = read_results(tmp_path, "best_eval_loss")["metrics"]
    assert {"test_loss_stopped", "test_loss", "eval_loss", "best_eval_loss", "step_stopped"} <= metrics.keys()
    curve = {entry["step"]: entry["eval_loss"] for entry in results["history"] if "eval_loss" in entry}
    assert metrics["best_eval_loss"] == curve[metrics["step_stopped"]] == min(curve.values())
    assert metrics["eval_loss"] == curve[6]
    assert results["blocks"]["validation"] == results["blocks"]["test"] == 8
    assert results["steps"] == 6
    card = (tmp_path / "README.md").read_text()
    assert "This model was trained from scratch on the stdlib dataset." in card
    assert "functional-sam" not in card  # fsam_variant is none

    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    data = DatasetArguments(corpus_max_bytes=600000, validation_fraction=0.8, validation_blocks=8)
    tokenizer = pretrain.build_tokenizer(pretrain.ModelArguments(tokenizer=str(tmp_path)), data, load_splits(data))
    assert len(tokenizer) == 301 == model.config.vocab_size
    ids = torch.tensor(scarce_text.load_blocks(load_splits(data), tokenizer, data)["test"]["input_ids"])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(metrics["test_loss_stopped"], rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"masked_inputs": 0.6}, "masked_inputs=0.6 is not a share: give a number from 0 to 0.5"),
        ({"masked_weight": 0.5}, "masked_weight=0.5 has no effect without masked_inputs"),
        ({"masked_weight": 0}, "masked_weight=0 is not above 0 and at most 1"),
        ({"masked_inputs": 0.2, "dataloader_num_workers": 2}, "would draw the same masks"),
        ({"average_decay": 1}, "average_decay=1 is not a share"),
        ({"weight_average": "ema", "save_strategy": "steps"}, "weight_average='ema' keeps the average in memory"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scarce_text.ScarceTrainingArguments(output_dir=str(tmp_path), **{"save_strategy": "no", **wrong})
    with pytest.raises(ValueError, match=r"dropout=1\.0 is not a share"):
        scarce_text.ScarceModelArguments(dropout=1.0)
