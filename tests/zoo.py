"""Tiny models of every kind the Trainer meets, each with examples and with the split into its function and its loss.

The weights' standard deviation is large, so that gradients and the differences between variants are far from zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import torch
import transformers
from torch import Tensor, nn

from tests import reference
from tests.reference import IGNORED, Batch, Problem

VOCABULARY = 48
WIDTH = 16
LENGTH = 10
CLASSES = 5
PAD = 0

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """
    Args:
        build: the model, the same at every call.
        example: one example, drawn with the default generator.
        problem: the split into function and loss.
        boundary: what to give as `fsam_boundary`, for models whose head is not found by itself.
        learning_rate: of SGD.
        check: asserts what else must hold for the model and its first batch.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Example]
    problem: Problem
    boundary: str | None = None
    learning_rate: float = 0.05
    check: Callable[[nn.Module, Batch], None] = field(default=lambda model, batch: None)

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    def examples(self, count: int) -> list[Example]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return [self.example() for _ in range(count)]


def batches(examples: list[Example], size: int) -> list[Batch]:
    """In order, as the Trainer's sequential sampler gives them; the last may be smaller."""
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [{name: torch.stack([example[name] for example in group]) for name in group[0]} for group in groups]


# Examples -------------------------------------------------------------------------------------------------------------


def tokens(length: int = LENGTH) -> Example:
    """Token ids, none of them padding, then padding up to `length`."""
    real = int(torch.randint(length // 2, length + 1, ()))
    mask = (torch.arange(length) < real).long()
    return {"input_ids": torch.randint(1, VOCABULARY, (length,)) * mask, "attention_mask": mask}


def next_tokens() -> Example:
    """Labels are the tokens, except for the padding and for the prompt that some examples have."""
    text = tokens()
    prompt = torch.arange(LENGTH) < torch.randint(0, 4, ())
    return text | {"labels": text["input_ids"].masked_fill(prompt | (text["attention_mask"] == 0), IGNORED)}


def masked_tokens() -> Example:
    """A third of the tokens has to be predicted, and always the first."""
    text = tokens()
    predicted = (torch.rand(LENGTH) < 1 / 3) & (text["attention_mask"] == 1)
    predicted[0] = True
    return text | {"labels": text["input_ids"].masked_fill(~predicted, IGNORED)}


def classified_tokens() -> Example:
    text = tokens()
    labels = torch.randint(CLASSES, (LENGTH,)).masked_fill(text["attention_mask"] == 0, IGNORED)
    labels[1] = IGNORED  # a word's second piece carries no label
    return text | {"labels": labels}


def classified_text() -> Example:
    return tokens() | {"labels": torch.randint(CLASSES, ())}


def answered_question() -> Example:
    """The answer starts in the first half of the text, and ends in the second. (An end behind the text would not count;
    in a batch with no other, the loss of both Trainers is NaN.)"""
    return tokens() | {
        "start_positions": torch.randint(LENGTH // 2, ()),
        "end_positions": torch.randint(LENGTH // 2, LENGTH, ()),
    }


def multiple_choice() -> Example:
    choices = [tokens() for _ in range(3)]
    return {name: torch.stack([choice[name] for choice in choices]) for name in choices[0]} | {
        "labels": torch.randint(3, ())
    }


def translation() -> Example:
    target = tokens(LENGTH - 2)
    return tokens() | {"labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)}


def image() -> Example:
    return {"pixel_values": torch.randn(3, 8, 8), "labels": torch.randint(CLASSES, ())}


def features() -> Example:
    return {"features": torch.randn(WIDTH), "labels": torch.randint(CLASSES, ())}


# Models ---------------------------------------------------------------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": WIDTH // 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def llama(**options: object) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | options))


def qwen3() -> nn.Module:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def gemma2() -> nn.Module:
    """Tied weights, and a tanh between the head and the model's logits, which belongs to the loss."""
    config = DECODER | {"num_key_value_heads": 2}
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**config, query_pre_attn_scalar=WIDTH // 2, final_logit_softcapping=2.0)
    )


def capped_loss(logits: reference.Logits, batch: Batch, window: reference.Window) -> Tensor:
    return reference.causal_lm_loss((2.0 * torch.tanh(logits[0] / 2.0),), batch, window)


def mixtral() -> nn.Module:
    """Five experts, of which two are asked for each token, and the last for none.

    The router's rows are a, -a, b, -b and 0: two of the first four have positive scores, whatever the token is.
    """
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**DECODER, num_local_experts=5, num_experts_per_tok=2)
    )
    for layer in model.model.layers:
        a, b = torch.randn(2, WIDTH)
        layer.mlp.gate.weight.data = torch.stack([a, -a, b, -b, torch.zeros(WIDTH)])
    return model


def the_last_expert_gets_no_gradient(model: nn.Module, batch: Batch) -> None:
    model(**batch).loss.backward()
    for layer in model.model.layers:
        by_expert = layer.mlp.experts.down_proj.grad.flatten(1).abs().sum(1)
        assert by_expert[-1] == 0
        assert (by_expert[:-1] > 0).all()
    model.zero_grad()


def bert(head: str, num_labels: int = CLASSES) -> Callable[[], nn.Module]:
    config = ENCODER | {"num_labels": num_labels}
    return lambda: getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**config))


def roberta() -> nn.Module:
    return transformers.RobertaForTokenClassification(transformers.RobertaConfig(**ENCODER))


def llama_classification() -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_labels=CLASSES))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return transformers.T5ForConditionalGeneration(config)


def t5_inputs(batch: Batch) -> Batch:
    """The decoder reads its own targets, one position later."""
    labels = batch["labels"]
    start = torch.full_like(labels[:, :1], PAD)
    decoder_input_ids = torch.cat([start, labels[:, :-1]], dim=1)
    return reference.without_targets(batch) | {
        "decoder_input_ids": decoder_input_ids.masked_fill(decoder_input_ids == IGNORED, PAD)
    }


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def llama_lora(use_dora: bool) -> nn.Module:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_dora=use_dora,
    )
    model = peft.get_peft_model(llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)  # zero by default: A would have no gradient
    return model


VIRTUAL_TOKENS = 3


def llama_prompt_tuning() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    return peft.get_peft_model(llama(), config)


def prompt_tuning_loss(logits: reference.Logits, batch: Batch, window: reference.Window) -> Tensor:
    """The last virtual token predicts the first real one, which the Trainer's count leaves out."""
    virtual = torch.full_like(batch["labels"][:, :VIRTUAL_TOKENS], IGNORED)
    return reference.causal_lm_loss(logits, {"labels": torch.cat([virtual, batch["labels"]], dim=1)}, window)


def llama_frozen() -> nn.Module:
    """Embeddings and the first layer are frozen, and the loss does not depend on one trainable parameter."""
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


class Classifier(nn.Module):
    """A model of a user's own: no output embeddings, no `**kwargs`, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.last = nn.Linear(WIDTH, CLASSES)
        self.config = transformers.PretrainedConfig()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.last(self.body(features))
        if labels is None:
            return {"scores": scores}
        return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}


SHIFTED = Problem(reference.causal_lm_loss, count=reference.count_shifted_labels)
MEAN = Problem(reference.mean_loss, count=reference.count_labels)

CASES = {
    # The Trainer does not know that GPT-2's loss shifts the labels, and counts the first one, too.
    "gpt2": Case(gpt2, next_tokens, Problem(reference.causal_lm_loss, count=reference.count_labels)),
    "llama": Case(llama, next_tokens, SHIFTED),
    "qwen3": Case(qwen3, next_tokens, SHIFTED),
    "gemma2": Case(
        gemma2,
        next_tokens,
        Problem(capped_loss, logits=reference.head_logits("lm_head"), count=reference.count_shifted_labels),
    ),
    "mixtral": Case(mixtral, next_tokens, SHIFTED, learning_rate=0.02, check=the_last_expert_gets_no_gradient),
    "bert_classification": Case(bert("SequenceClassification"), classified_text, MEAN),
    "bert_question_answering": Case(
        bert("QuestionAnswering", num_labels=2), answered_question, Problem(reference.question_answering_loss)
    ),
    "bert_masked_lm": Case(bert("MaskedLM"), masked_tokens, MEAN),
    "roberta_tokens": Case(roberta, classified_tokens, MEAN),
    "bert_multiple_choice": Case(bert("MultipleChoice"), multiple_choice, MEAN),
    "llama_classification": Case(llama_classification, classified_text, MEAN, learning_rate=0.02),
    "t5": Case(t5, translation, Problem(reference.mean_loss, inputs=t5_inputs)),
    "vit": Case(vit, image, Problem(reference.summed_loss, count=reference.count_labels)),
    "llama_lora": Case(lambda: llama_lora(use_dora=False), next_tokens, SHIFTED),
    "llama_dora": Case(lambda: llama_lora(use_dora=True), next_tokens, SHIFTED),
    "llama_prompt_tuning": Case(
        llama_prompt_tuning, next_tokens, Problem(prompt_tuning_loss, count=reference.count_shifted_labels)
    ),
    "llama_frozen": Case(llama_frozen, next_tokens, SHIFTED),
    "own_module": Case(
        Classifier,
        features,
        Problem(
            reference.mean_loss_over_window,
            logits=lambda model, theta, inputs: (torch.func.functional_call(model, theta, kwargs=inputs)["scores"],),
        ),
        boundary="last",
    ),
}
