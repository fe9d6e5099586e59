"""The boundary is the module that makes the logits: found, named, or refused with candidates."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.utils import logging

from hf_fsam.boundary import find_boundary
from tests.toys import gpt2, llama, make_trainer

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
TINY_XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 20}
TINY_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 20,
}
TINY_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

TINY_WAV2VEC2 = {"conv_dim": [4], "conv_stride": [4], "conv_kernel": [4], "num_conv_pos_embeddings": 4}
TINY_WAV2VEC2 |= {"num_conv_pos_embedding_groups": 2}

FOUND = [
    ("Llama", "CausalLM", TINY, "lm_head"),
    ("GPT2", "LMHead", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}, "lm_head"),
    ("Bert", "MaskedLM", TINY, "cls.predictions.decoder"),
    ("Roberta", "MaskedLM", TINY, "lm_head.decoder"),
    ("DistilBert", "MaskedLM", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}, "vocab_projector"),
    ("T5", "ConditionalGeneration", TINY_T5, "lm_head"),
    ("Bart", "ConditionalGeneration", TINY_BART, "lm_head"),
    ("Llama", "SequenceClassification", TINY, "score"),
    ("Llama", "TokenClassification", TINY, "score"),
    ("Llama", "QuestionAnswering", TINY, "qa_outputs"),
    ("Bert", "SequenceClassification", TINY, "classifier"),
    ("Bert", "TokenClassification", TINY, "classifier"),
    ("Bert", "MultipleChoice", TINY, "classifier"),
    ("Bert", "QuestionAnswering", TINY, "qa_outputs"),
    ("Roberta", "SequenceClassification", TINY, "classifier"),
    ("Bart", "SequenceClassification", TINY_BART, "classification_head"),
    ("Bart", "QuestionAnswering", TINY_BART, "qa_outputs"),
    ("T5", "SequenceClassification", TINY_T5, "classification_head"),
    ("XLNet", "SequenceClassification", TINY_XLNET, "logits_proj"),
    ("XLNet", "MultipleChoice", TINY_XLNET, "logits_proj"),
    ("Electra", "SequenceClassification", TINY | {"embedding_size": 16}, "classifier"),
    ("Electra", "MultipleChoice", TINY | {"embedding_size": 16}, "classifier"),
    ("DebertaV2", "SequenceClassification", TINY, "classifier"),
    ("ModernBert", "SequenceClassification", TINY | {"pad_token_id": 0}, "classifier"),
    ("ViT", "ImageClassification", TINY_VIT | {"image_size": 8, "patch_size": 4}, "classifier"),
    ("Swin", "ImageClassification", {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 8}, "classifier"),
    ("ConvNext", "ImageClassification", {"hidden_sizes": [4] * 4, "depths": [1] * 4}, "classifier"),
    ("Wav2Vec2", "CTC", TINY | TINY_WAV2VEC2, "lm_head"),
    ("ResNet", "ImageClassification", {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}, "classifier"),
]


@pytest.mark.parametrize(("family", "task", "settings", "name"), FOUND, ids=[f"{f}-{t}" for f, t, _, _ in FOUND])
def test_the_head_is_found(family: str, task: str, settings: dict, name: str) -> None:
    suffix = "LMHeadModel" if task == "LMHead" else f"For{task}"
    model = getattr(tf, f"{family}{suffix}")(getattr(tf, f"{family}Config")(**settings))
    found, module = find_boundary(model, None)
    assert found == name
    assert module is model.get_submodule(name)


def test_the_head_is_found_in_peft_models() -> None:
    lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    assert find_boundary(lora, None)[0] == "base_model.model.lm_head"  # the adapter's module, not the layer in it
    assert find_boundary(lora, "lm_head")[1] is find_boundary(lora, None)[1]
    prompt = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert find_boundary(prompt, None)[0] == "base_model.lm_head"
    classifier = tf.BertForSequenceClassification(tf.BertConfig(**TINY))
    lora = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert find_boundary(lora, None)[0] == "base_model.model.classifier"  # the wrapper of PEFT's modules_to_save


class _Headless(nn.Module):
    def __init__(self, past: bool = False, pair: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.top, self.past, self.pair = nn.Linear(4, 4), nn.Linear(4, 3), past, pair

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        logits = self.top(hidden)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.past:
            loss = loss + hidden.square().mean()
        return {"loss": loss, "logits": logits}


ROWS = [{"x": torch.ones(4) * i, "labels": torch.tensor(i % 3)} for i in range(6)]


def test_an_unknown_model_is_refused_with_candidates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no boundary.*fsam_boundary.*'top', 'body'"):
        make_trainer(tmp_path, _Headless(), trainer={"train_dataset": ROWS})
    with pytest.raises(ValueError, match=r"fsam_boundary='head' is no module of _Headless.*'top', 'body'"):
        make_trainer(tmp_path, _Headless(), trainer={"train_dataset": ROWS}, fsam_boundary="head")
    trainer = make_trainer(tmp_path, _Headless(), trainer={"train_dataset": ROWS}, fsam_boundary="top")
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.03, rel=1e-3)
    make_trainer(tmp_path, _Headless(), trainer={"train_dataset": ROWS}, fsam_variant="sam").train()


def test_candidates_of_a_language_model_are_its_head_not_its_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Candidates: 'lm_head', 'model\.norm', 'model\.embed_tokens'\."):
        make_trainer(tmp_path, fsam_boundary="head")


def test_a_boundary_off_the_way_to_the_loss_is_an_error_not_a_silent_sam(tmp_path: Path) -> None:
    class Unused(_Headless):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(4, 3)

    with pytest.raises(ValueError, match=r"boundary 'classifier'.*never crossed"):
        make_trainer(tmp_path, Unused(), trainer={"train_dataset": ROWS}).train()


def test_a_boundary_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="fsam_boundary: module 'model' returns BaseModelOutputWithPast"):
        make_trainer(tmp_path, fsam_boundary="model").train()


def test_a_loss_past_the_boundary_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    rows = {"train_dataset": ROWS}
    make_trainer(tmp_path, _Headless(), trainer=rows, fsam_boundary="top").train()
    assert "past the boundary" not in caplog.text
    make_trainer(tmp_path, _Headless(past=True), trainer=rows, fsam_boundary="top").train()
    told = [record.message for record in caplog.records if "past the boundary" in record.message]
    assert len(told) == 1
    assert "2 weights (body.bias, body.weight" in told[0]


@pytest.mark.parametrize("model", [llama, gpt2])
def test_nothing_goes_past_the_head_of_a_language_model(tmp_path: Path, model, caplog) -> None:
    logging.enable_propagation()
    make_trainer(tmp_path, model()).train()
    assert "past the boundary" not in caplog.text
