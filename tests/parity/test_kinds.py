"""Kinds of models beside those of the zoo agree with the formulas: images with text, speech, routers, tuples."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests import reference, zoo
from tests.parity.test_parity import DISTINCT, Setting, check_parity, distance, optimizer_for, train_with_reference
from tests.reference import IGNORED, Batch, Problem, Tensors, Window
from tests.zoo import DECODER, LENGTH, PAD, SHIFTED, VOCABULARY, WIDTH, Case, Example

IMAGE, PATCHES = VOCABULARY - 1, 4  # the token of an image, and how many of them one takes
VISION = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4, "initializer_range": 0.2, "initializer_factor": 5.0}


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_id=IMAGE,
        initializer_range=0.2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def captioned_image() -> Example:
    """The image, and behind it a text, which is predicted."""
    text = zoo.next_tokens()
    image = torch.full((PATCHES,), IMAGE)
    words = text["input_ids"] % (IMAGE - 1) + (text["input_ids"] > 0)
    return {
        "input_ids": torch.cat([image, words]),
        "attention_mask": torch.cat([torch.ones_like(image), text["attention_mask"]]),
        "labels": torch.cat([torch.full_like(image, IGNORED), words.where(text["labels"] != IGNORED, IGNORED)]),
        "pixel_values": torch.randn(3, 8, 8),
    }


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return transformers.WhisperForConditionalGeneration(config)


def spoken() -> Example:
    return {"input_features": torch.randn(8, 2 * LENGTH), "labels": zoo.translation()["labels"]}


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **zoo.ENCODER | {"hidden_dropout_prob": 0.0},
        conv_dim=[WIDTH],
        conv_kernel=[4],
        conv_stride=[4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    return transformers.Wav2Vec2ForCTC(config)


def heard() -> Example:
    """A wave that makes twenty frames, and three letters."""
    return {"input_values": torch.randn(80), "labels": torch.randint(1, VOCABULARY, (3,))}


def ctc_loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
    """The micro-batch's mean, not divided by their number, as in `reference.mean_loss`."""
    frames, labels = logits[0].log_softmax(-1).transpose(0, 1), batch["labels"]
    lengths = [torch.full((len(labels),), size) for size in (len(frames), labels.shape[1])]
    return F.ctc_loss(frames, labels.flatten(), *lengths, blank=PAD, zero_infinity=True)


BALANCE = 0.5


def balanced_mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **DECODER, num_local_experts=3, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=BALANCE
    )
    return transformers.MixtralForCausalLM(config)


def logits_and_balance(model: nn.Module, theta: Tensors, inputs: Batch) -> reference.Logits:
    """The balancing loss of the routers goes past the head. On its way the step is plain SAM, which is what the
    formulas say of an output whose cotangent is constant."""
    outputs = functional_call(model, theta, kwargs=inputs)
    return outputs.logits, outputs.aux_loss


def balanced_loss(logits: reference.Logits, batch: Batch, window: Window) -> Tensor:
    return reference.causal_lm_loss(logits[:1], batch, window) + BALANCE * logits[1]


class Tuple(zoo.Classifier):
    """A model of a user's own that returns a tuple, its loss first."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        outputs = super().forward(features, labels)
        return tuple(outputs.values())


KINDS = {
    "llava": Case(llava, captioned_image, SHIFTED),
    "whisper": Case(whisper, spoken, Problem(reference.mean_loss, inputs=zoo.t5_inputs)),
    "wav2vec2": Case(wav2vec2, heard, Problem(ctc_loss)),
    "balanced_mixtral": Case(
        balanced_mixtral,
        zoo.next_tokens,
        Problem(balanced_loss, logits=logits_and_balance, count=reference.count_shifted_labels),
    ),
    "tuple": Case(
        Tuple,
        zoo.features,
        Problem(
            reference.mean_loss_over_window,
            logits=lambda model, theta, inputs: functional_call(model, theta, kwargs=inputs),
        ),
        boundary="last",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_trained_weights_agree_with_the_formulas(name: str, tmp_path: Path) -> None:
    case, setting = KINDS[name], Setting("functional", accumulation=3)
    ends = {
        variant: train_with_reference(
            case.model(),
            case.problem,
            case.examples(setting.examples),
            dataclasses.replace(setting, variant=variant),
            optimizer_for(case, setting),
        )
        for variant in ("functional", "sam", "none")
    }
    wanted = ends.pop("functional")
    went = distance(reference.trainable(case.model()), wanted)
    assert all(distance(end, wanted) > DISTINCT * went for end in ends.values())
    check_parity(case, setting, tmp_path, wanted)
