"""Which module is the boundary: the one that is found or that `fsam_boundary` names; or an error with candidates."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from hf_fsam import FSAMTrainer
from hf_fsam.heads.find import find_boundary
from tests import reference
from tests.parity.test_parity import Setting, assert_same_weights, sgd, train_with_reference, train_with_trainer
from tests.toys import adapted, distance, gpt2, llama, make_trainer, train

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
def test_the_head_is_found_as_the_boundary(family: str, task: str, settings: dict, name: str) -> None:
    suffix = "LMHeadModel" if task == "LMHead" else f"For{task}"
    model = getattr(tf, f"{family}{suffix}")(getattr(tf, f"{family}Config")(**settings))
    ((found, module),) = find_boundary(model, None).items()
    assert found == name
    assert module is model.get_submodule(name)


IDS = torch.arange(3, 15).view(2, 6)
TWO = torch.tensor([0, 1])
IMAGES = {"pixel_values": torch.rand(2, 3, 8, 8), "bool_masked_pos": torch.tensor([[True, False, True, False]] * 2)}
TINY_IMAGES = TINY_VIT | {"image_size": 8, "patch_size": 4}
TINY_DECODER = {f"decoder_{name}": value for name, value in TINY_VIT.items()}
TINY_SERIES = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8}
TINY_PATCHTST = TINY_SERIES | {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8, "loss": "mse"}
TINY_MIXER = TINY_SERIES | {"num_layers": 1, "loss": "mse"}
SERIES = {"past_values": torch.rand(2, 16, 2)}
TINY_BLIP = {
    "text_config": TINY | {"encoder_hidden_size": 16, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0},
    "vision_config": TINY_IMAGES,
    "projection_dim": 8,
}
TINY_SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8]}
TINY_SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [1, 1]}
TINY_FUNNEL = {"vocab_size": 20, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16}
TINY_LXMERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
TINY_LXMERT |= {"l_layers": 1, "x_layers": 1, "r_layers": 1, "num_qa_labels": 3, "visual_feat_dim": 4}
PIXELS = {"pixel_values": torch.rand(2, 3, 16, 16), "labels": torch.ones(2, 16, 16, dtype=torch.long)}

# Models that compute their own loss, and the inputs for it.
ALONE = [
    ("ElectraForPreTraining", TINY | {"embedding_size": 16}, {"input_ids": IDS, "labels": IDS % 2}),
    ("FunnelForPreTraining", TINY_FUNNEL | {"num_decoder_layers": 1}, {"input_ids": IDS, "labels": IDS % 2}),
    ("BertForNextSentencePrediction", TINY, {"input_ids": IDS, "labels": TWO}),
    ("ViTMAEForPreTraining", TINY_IMAGES | TINY_DECODER, {"pixel_values": IMAGES["pixel_values"]}),
    (
        "VideoMAEForPreTraining",
        TINY_IMAGES | TINY_DECODER | {"num_frames": 2, "tubelet_size": 2},
        IMAGES | {"pixel_values": torch.rand(2, 2, 3, 8, 8)},
    ),
    ("ViTForMaskedImageModeling", TINY_IMAGES | {"encoder_stride": 4}, IMAGES),
    (
        "SwinForMaskedImageModeling",
        {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 8, "window_size": 2, "encoder_stride": 4},
        IMAGES,
    ),
    ("SegformerForSemanticSegmentation", TINY_SEGFORMER | {"decoder_hidden_size": 8, "num_labels": 3}, PIXELS),
    (
        "GLPNForDepthEstimation",
        {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [1] * 4}
        | {"decoder_hidden_size": 8},
        {"pixel_values": torch.rand(2, 3, 32, 32), "labels": torch.rand(2, 32, 32) + 0.1},
    ),
    ("PatchTSTForClassification", TINY_PATCHTST | {"num_targets": 3}, SERIES | {"target_values": TWO}),
    ("PatchTSTForRegression", TINY_PATCHTST | {"num_targets": 2}, SERIES | {"target_values": torch.rand(2, 2)}),
    (
        "PatchTSTForPrediction",
        TINY_PATCHTST | {"prediction_length": 3},
        SERIES | {"future_values": torch.rand(2, 3, 2)},
    ),
    ("PatchTSTForPretraining", TINY_PATCHTST | {"do_mask_input": True}, SERIES),
    ("PatchTSMixerForTimeSeriesClassification", TINY_MIXER | {"num_targets": 3}, SERIES | {"target_values": TWO}),
    ("PatchTSMixerForRegression", TINY_MIXER | {"num_targets": 2}, SERIES | {"target_values": torch.rand(2, 2)}),
    (
        "PatchTSMixerForPrediction",
        TINY_MIXER | {"prediction_length": 3},
        SERIES | {"future_values": torch.rand(2, 3, 2)},
    ),
    ("PatchTSMixerForPretraining", TINY_MIXER, SERIES),
    (
        "BigBirdForQuestionAnswering",
        TINY | {"attention_type": "original_full"},
        {"input_ids": IDS, "token_type_ids": IDS * 0, "start_positions": TWO, "end_positions": TWO},
    ),
    (
        "LxmertForQuestionAnswering",
        TINY_LXMERT,
        {"input_ids": IDS, "visual_feats": torch.rand(2, 3, 4), "visual_pos": torch.rand(2, 3, 4), "labels": TWO},
    ),
    (
        "FSMTForConditionalGeneration",
        TINY_BART | {"langs": ["a", "b"], "src_vocab_size": 20, "tgt_vocab_size": 20},
        {"input_ids": IDS, "labels": IDS},
    ),
    (
        "BlipForQuestionAnswering",
        TINY_BLIP,
        {"input_ids": IDS, "pixel_values": IMAGES["pixel_values"], "labels": IDS, "decoder_input_ids": IDS},
    ),
    (
        "BlipForConditionalGeneration",
        TINY_BLIP,
        {"input_ids": IDS, "pixel_values": IMAGES["pixel_values"], "labels": IDS},
    ),
]


def weights_past(loss: Tensor, boundary: set[object], model: nn.Module) -> set[str]:
    """The weights that reach the loss without crossing the boundary."""
    names = {weight: name for name, weight in model.named_parameters()}
    found, seen, stack = set(), set(boundary), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        found |= {names[weight]} if weight in names else set()
        stack += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize(("name", "settings", "inputs"), ALONE, ids=[name for name, _, _ in ALONE])
def test_no_weight_reaches_the_loss_past_the_head_that_is_found(name: str, settings: dict, inputs: dict) -> None:
    model_class = getattr(tf, name)
    model = model_class(model_class.config_class(**settings))
    crossings: set[object] = set()
    (boundary,) = find_boundary(model, None).values()
    boundary.register_forward_hook(lambda module, args, output: crossings.add(output.grad_fn))
    loss = model(**inputs).loss
    assert crossings
    assert not weights_past(loss, crossings, model)
    assert weights_past(loss, set(), model)  # without a boundary in its way, the walk does find weights


TINY_CLIP = {"text_config": TINY, "vision_config": TINY_IMAGES, "projection_dim": 8}
SEVERAL = [  # the loss takes the outputs of several modules together, or there is no loss
    ("CLIPModel", TINY_CLIP),
    ("YolosForObjectDetection", TINY_IMAGES | {"image_size": [8, 8], "num_detection_tokens": 2}),
    ("SplinterForQuestionAnswering", TINY),
    ("SwiftFormerForImageClassification", {"depths": [1] * 4, "embed_dims": [8] * 4}),
    ("PatchTSTForRegression", TINY_PATCHTST | {"loss": "nll"}),
    ("MusicgenForCausalLM", {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16}),
    ("BertModel", TINY),
]


@pytest.mark.parametrize(("name", "settings"), SEVERAL, ids=[f"{name}{len(tiny)}" for name, tiny in SEVERAL])
def test_a_model_where_no_single_module_makes_the_logits_is_refused(name: str, settings: dict) -> None:
    model_class = getattr(tf, name)
    config_class = tf.MusicgenDecoderConfig if "Musicgen" in name else model_class.config_class
    with pytest.raises(ValueError, match=r"no boundary.*torch\.nn\.Identity\(\).*fsam_boundary='boundary'.*'sam'"):
        find_boundary(model_class(config_class(**settings)), None)


class _Wrapper(nn.Module):
    """A wrapper as sentence-transformers' CrossEncoder is one."""

    def __init__(self, model: nn.Module, more: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.more = model, more


def test_the_head_is_found_inside_a_wrapper_that_has_no_weights_of_its_own() -> None:
    classifier = tf.BertForSequenceClassification(tf.BertConfig(**TINY))
    assert find_boundary(_Wrapper(classifier), None) == {"model.classifier": classifier.classifier}
    with pytest.raises(ValueError, match="no boundary"):  # the wrapper's own weights may come after the head
        find_boundary(_Wrapper(classifier, nn.Linear(2, 2)), None)


class _Contrastive(FSAMTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        logits = self.model.boundary(model(**inputs).logits_per_text)
        return contrastive_loss((logits,)) / self.args.gradient_accumulation_steps


def contrastive_loss(logits: reference.Logits, *_: object) -> Tensor:
    (z,) = logits
    labels = torch.arange(len(z))
    return (nn.functional.cross_entropy(z, labels) + nn.functional.cross_entropy(z.t(), labels)) / 2


@pytest.mark.parametrize("variant", ["functional", "logit"])
def test_an_identity_after_the_logits_as_boundary_agrees_with_the_formulas(
    tmp_path: Path, variant: reference.Variant
) -> None:
    """CLIP, with the cure that the message names. Its logits are a product of two towers' outputs."""
    torch.manual_seed(0)
    drawn = {"initializer_range": 0.2, "initializer_factor": 5.0}
    towers = {"text_config": TINY | drawn, "vision_config": TINY_IMAGES | drawn}
    model = tf.CLIPModel(tf.CLIPConfig(**towers, projection_dim=8, initializer_factor=5.0))
    model.boundary = nn.Identity()
    start = copy.deepcopy(model)
    rows = [{"input_ids": torch.randint(3, 20, (6,)), "pixel_values": torch.rand(3, 8, 8)} for _ in range(15)]
    setting = Setting(variant)

    def logits(model: nn.Module, theta: reference.Tensors, inputs: reference.Batch) -> reference.Logits:
        return (functional_call(model, theta, kwargs=inputs).logits_per_text,)

    problem = reference.Problem(contrastive_loss, logits=logits)
    optimizer = functools.partial(sgd, learning_rate=0.01)
    wanted = train_with_reference(model, problem, rows, setting, optimizer)
    train_with_trainer(model, rows, setting, optimizer, tmp_path, boundary="boundary", trainer_class=_Contrastive)
    assert_same_weights(model, start, wanted)


class _OwnLoss(FSAMTrainer):
    """The model's own contrastive loss, which its forward pass computes from both towers' outputs."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        return model(**inputs, return_loss=True).loss


@pytest.mark.parametrize("setting", [Setting("functional", accumulation=3), Setting("logit")], ids=str)
def test_two_towers_that_are_named_together_agree_with_the_formulas(tmp_path: Path, setting: Setting) -> None:
    """CLIP whose temperature is fixed. The towers' projections, before they are normalized, go to the loss."""
    torch.manual_seed(0)
    drawn = {"initializer_range": 0.2, "initializer_factor": 5.0}
    towers = {"text_config": TINY | drawn, "vision_config": TINY_IMAGES | drawn}
    model = tf.CLIPModel(tf.CLIPConfig(**towers, projection_dim=8, initializer_factor=5.0))
    model.logit_scale.requires_grad_(False)
    start = copy.deepcopy(model)
    rows = [{"input_ids": torch.randint(3, 20, (6,)), "pixel_values": torch.rand(3, 8, 8)} for _ in range(47)]
    rows = rows[: setting.examples]

    def logits(model: nn.Module, theta: reference.Tensors, inputs: reference.Batch) -> reference.Logits:
        heads = ("visual_projection", "text_projection")
        return tuple(reference.head_logits(head)(model, theta, inputs)[0] for head in heads)

    def loss(z: reference.Logits, batch: reference.Batch, window: reference.Window) -> Tensor:
        image, text = (each / each.norm(dim=-1, keepdim=True) for each in z)
        return contrastive_loss((start.logit_scale.exp() * text @ image.T,)) / len(window.batches)

    optimizer = functools.partial(sgd, learning_rate=0.01)
    wanted = train_with_reference(model, reference.Problem(loss, logits=logits), rows, setting, optimizer)
    both = "visual_projection, text_projection"
    train_with_trainer(model, rows, setting, optimizer, tmp_path, boundary=both, trainer_class=_OwnLoss)
    assert_same_weights(model, start, wanted)


def test_no_weight_reaches_the_loss_of_a_detector_past_both_of_its_heads(tmp_path: Path) -> None:
    model = tf.YolosForObjectDetection(
        tf.YolosConfig(**TINY_IMAGES | {"image_size": [8, 8], "num_detection_tokens": 2, "num_labels": 3})
    )
    crossings: set[object] = set()
    for head in find_boundary(model, "class_labels_classifier, bbox_predictor").values():
        head.register_forward_hook(lambda module, args, output: crossings.add(output.grad_fn))
    label = {"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}
    loss = model(pixel_values=torch.rand(2, 3, 8, 8), labels=[label, label]).loss
    assert len(crossings) == 2
    assert not weights_past(loss, crossings, model)


def test_the_head_is_found_in_peft_models() -> None:
    lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    found = find_boundary(lora, None)
    assert list(found) == ["base_model.model.lm_head"]  # the adapter's module, not the layer in it
    assert find_boundary(lora, "lm_head")["lm_head"] is found["base_model.model.lm_head"]
    prompt = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert list(find_boundary(prompt, None)) == ["base_model.lm_head"]
    classifier = tf.BertForSequenceClassification(tf.BertConfig(**TINY))
    lora = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert list(find_boundary(lora, None)) == ["base_model.model.classifier"]  # the wrapper of PEFT's modules_to_save


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


def test_the_candidates_of_a_language_model_are_its_head_but_not_its_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Candidates: 'lm_head', 'model\.norm', 'model\.embed_tokens'\."):
        make_trainer(tmp_path, fsam_boundary="head")


def test_a_boundary_that_is_not_on_the_way_to_the_loss_is_an_error_not_a_silent_sam(tmp_path: Path) -> None:
    class Unused(_Headless):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(4, 3)

    with pytest.raises(ValueError, match=r"nothing crossed the boundary 'classifier'"):
        make_trainer(tmp_path, Unused(), trainer={"train_dataset": ROWS}).train()


class _Returns(_Headless):
    """Its `whole` returns what the loss is computed from, in one thing or another."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], unwrap: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unwrap, self.whole = unwrap, nn.Identity()
        self.whole.forward = lambda x: wrap(self.top(self.body(x)), self.body(x))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits, hidden = self.unwrap(self.whole(x))
        return {"loss": nn.functional.cross_entropy(logits, labels) + hidden.square().mean()}


class _Pair(NamedTuple):
    z: Tensor
    hidden: Tensor


CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dict": (lambda z, h: {"z": z, "hidden": h, "mask": None}, lambda out: (out["z"], out["hidden"])),
    "ModelOutput": (lambda z, h: BaseModelOutput(z, hidden_states=(h,)), lambda out: (out[0], out.hidden_states[0])),
    "tuple": (lambda z, h: (z, {"hidden": h}, 1), lambda out: (out[0], out[1]["hidden"])),
    "NamedTuple": (_Pair, lambda out: (out.z, out.hidden)),
}


def test_a_boundary_may_return_several_tensors(tmp_path: Path) -> None:
    """The weights are those of a model that calls an identity on each."""
    settings = {"trainer": {"train_dataset": ROWS}, "fsam_rho": 0.3, "optim": "sgd"}
    identity = train(tmp_path, model=_Identity(), fsam_boundary="boundary", **settings)
    for name, functions in CONTAINERS.items():
        returned = train(tmp_path, model=_Returns(*functions), fsam_boundary="whole", **settings)
        assert distance(returned, identity) < 1e-6, name
    assert distance(train(tmp_path, model=_Identity(), fsam_variant="sam", **settings), identity) > 1e-4


class _Identity(_Headless):
    """Calls an identity on each of two tensors that the loss takes."""

    def __init__(self) -> None:
        super().__init__()
        self.boundary = nn.Identity()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.boundary(self.body(x))
        logits = self.boundary(self.top(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels) + hidden.square().mean()}


def test_a_boundary_that_returns_no_tensor_or_the_loss_is_refused(tmp_path: Path) -> None:
    opaque = _Returns(lambda z, h: SimpleNamespace(z=z, hidden=h), lambda out: (out.z, out.hidden))
    with pytest.raises(TypeError, match="fsam_boundary: module 'whole' returns SimpleNamespace"):
        make_trainer(tmp_path, opaque, trainer={"train_dataset": ROWS}, fsam_boundary="whole").train()
    with pytest.raises(TypeError, match=r"fsam_boundary: module 'base_model\.model' returns the loss with it"):
        make_trainer(tmp_path, adapted(gpt2()), fsam_boundary="base_model.model").train()


def test_a_boundary_behind_another_is_refused(tmp_path: Path) -> None:
    """The cotangent of the first would have the Jacobian of the second in it."""
    with pytest.raises(ValueError, match=r"boundary 'body, top', one tensor is computed from another"):
        make_trainer(tmp_path, _Headless(), trainer={"train_dataset": ROWS}, fsam_boundary="body,top").train()


def test_weights_that_reach_the_loss_past_the_boundary_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    rows = {"train_dataset": ROWS}
    make_trainer(tmp_path, _Headless(), trainer=rows, fsam_boundary="top").train()
    assert "past the boundary" not in caplog.text
    make_trainer(tmp_path, _Headless(past=True), trainer=rows, fsam_boundary="top").train()
    told = [record.message for record in caplog.records if "past the boundary" in record.message]
    assert len(told) == 1
    assert "2 weights (body.bias, body.weight" in told[0]


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_boundary_that_most_weights_pass_by_is_refused(tmp_path: Path, direction: str) -> None:
    """Not where they reach the loss through it, too, as those below a router with a balancing loss do."""
    settings = {"fsam_boundary": "model.layers.0", "fsam_ascent_direction": direction}
    with pytest.raises(
        ValueError, match=r"\d+ weights \(lm_head.weight, .* past the boundary 'model\.layers\.0' alone"
    ):
        make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"'lm_haed' is no module.*Did you mean 'lm_head'"):
        make_trainer(tmp_path, fsam_boundary="lm_haed")


@pytest.mark.parametrize("model", [llama, gpt2])
def test_no_weight_of_a_language_model_reaches_the_loss_past_its_head(tmp_path: Path, model, caplog) -> None:
    logging.enable_propagation()
    make_trainer(tmp_path, model()).train()
    assert "past the boundary" not in caplog.text
