"""Find the modules whose output ends the function and begins the loss."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_fsam.mistakes import did_you_mean

# The heads of transformers' models for sequence and token classification, multiple choice, question answering, image
# classification, segmentation and speech recognition by CTC, whose `lm_head` is no output embedding (read in
# transformers 5.23, 900 classes), in the order in which one wins where a model has two: XLNet's `logits_proj` stands
# behind its `sequence_summary`.
_HEADS = (
    *("qa_outputs", "classification_head", "logits_proj", "score", "classifier", "sequence_summary", "lm_head"),
    *("ctc_head", "logits_dense", "qa_classifier", "discriminator_predictions", "segmentation_head"),
)

# Names that stand for a head only in classes for these tasks.
_HEADS_OF = {
    "ForNextSentencePrediction": ("cls",),
    "ForMaskedImageModeling": ("decoder",),
    "ForPreTraining": ("decoder.decoder_pred", "decoder.head"),  # ViT-MAE, VideoMAE
    "ForQuestionAnswering": ("answer_head", "text_decoder.cls.predictions.decoder"),  # LXMERT, BLIP
    "ForConditionalGeneration": ("model.decoder.output_projection", "text_decoder.cls.predictions.decoder"),  # FSMT
    "ForSemanticSegmentation": ("decode_head",),
    "ForImageClassification": ("head",),
    "ForDepthEstimation": ("head",),
    "ForPoseEstimation": ("head",),
    "ForClassification": ("head",),  # PatchTST, PatchTSMixer, and so the next four
    "ForTimeSeriesClassification": ("head",),
    "ForRegression": ("head",),
    "ForPrediction": ("head",),
    "ForPretraining": ("head",),
}
# In a model with one of these, the loss takes more than the head makes: there is a second head, or the head returns the
# parameters of a distribution.
_OTHERS = ("auxiliary_head", "dist_head", "distribution_output")

IDENTITY = (
    "Where several modules make together what the loss takes, as in CLIP and in detectors, name them all, "
    "fsam_boundary='visual_projection, text_projection'. Or give the model an identity, model.boundary = "
    "torch.nn.Identity(), call it on each tensor that goes to the loss (in forward, loss_function or compute_loss: "
    "logits = model.boundary(logits)), and set fsam_boundary='boundary'"
)


def find_boundary(model: nn.Module, names: str | None) -> dict[str, nn.Module]:
    """Names and modules of the boundary of `model`, which is not wrapped for an engine. The search goes into PEFT
    models, and into other wrappers that have no weights of their own.

    Args:
        names: of the modules, separated by commas, in `model.named_modules()`, or, in a PEFT model, in those of its
            base model. None: the output embeddings of a language model, or else the head of a model for another task,
            or the last module of a pipeline, as sentence-transformers' models are.

    Raises:
        ValueError: no such module, or none found; the message lists candidates.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if names is not None:
        known = dict(base.named_modules()) | dict(model.named_modules())
        wanted = [name.strip() for name in names.split(",")]
        for name in wanted:
            if not name or name not in known:  # the model itself is called ''
                raise ValueError(
                    f"fsam_boundary={name!r} is no module of {type(base).__name__}: choose one that makes the logits, "
                    f"or leave it out to have the head found.{did_you_mean(name, known)} Candidates: "
                    f"{_candidates(model)}. {IDENTITY}."
                )
        return {name: known[name] for name in wanted}
    head = base[-1] if isinstance(base, nn.Sequential) and len(base) else _head(_inside(base))
    for found, module in model.named_modules():
        if head is not None and module is head:
            return {found: module}
    raise ValueError(
        f"no boundary between function and loss was found in {type(base).__name__}: if one module makes all that the "
        f"loss takes, name it with fsam_boundary. Candidates: {_candidates(model)}. {IDENTITY}. Or set "
        "fsam_variant='sam' or 'none', which need none."
    )


def _head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    # FSMT names the embeddings of its input, which its output projection is tied to, and MusicGen a list of heads.
    if isinstance(head, nn.Module) and not isinstance(head, nn.Embedding | nn.ModuleList):
        return head
    return next((part for name in _names(model) if (part := _part(model, name)) is not None), None)


def _names(model: nn.Module) -> Iterator[str]:
    yield from _HEADS
    if not any(getattr(model, other, None) is not None for other in _OTHERS):
        classes = [each.__name__ for each in type(model).__mro__]
        for task, names in _HEADS_OF.items():
            if any(each.endswith(task) for each in classes):
                yield from names


def _part(model: nn.Module, name: str) -> nn.Module | None:
    found: Any = model
    for step in name.split("."):
        found = getattr(found, step, None)
    return found if isinstance(found, nn.Module) else None


def _inside(model: nn.Module) -> nn.Module:
    """The model of transformers in a wrapper without weights of its own, as sentence-transformers' CrossEncoder is."""
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            return inner if set(model.parameters()) <= set(inner.parameters()) else model
    return model


def _candidates(model: nn.Module, most: int = 8) -> str:
    """Modules that are heads most likely: the last ones without children that hold weights, outside of the numbered
    layers."""
    leaves = [
        name
        for name, module in model.named_modules()
        if name and not list(module.children()) and next(module.parameters(), None) is not None
    ]
    outside = [name for name in leaves if not any(part.isdigit() for part in name.split("."))]
    return ", ".join(repr(name) for name in reversed((outside or leaves)[-most:])) or "none, the model has no modules"
