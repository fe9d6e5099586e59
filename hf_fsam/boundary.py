"""Find the module whose output ends the function and begins the loss."""

from typing import Any

from torch import nn

# The heads of transformers' models for sequence and token classification, multiple choice, question answering, image
# classification and speech recognition by CTC, whose `lm_head` is no output embedding (read in transformers 5.23, 400
# classes), in the order in which one wins where a model has two: XLNet's `logits_proj` stands behind its
# `sequence_summary`.
_HEADS = ("qa_outputs", "classification_head", "logits_proj", "score", "classifier", "sequence_summary", "lm_head")


def find_boundary(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """Name and module of the boundary of `model` (unwrapped; a PEFT model is looked into).

    Args:
        name: the module's name in `model.named_modules()`, or, in a PEFT model, in those of its base model. None: the
            output embeddings of a language model, or else the head of a classification or question answering model.

    Raises:
        ValueError: no such module, or none found; the message lists candidates.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if name is not None:
        for root in (model, base):
            module = dict(root.named_modules()).get(name)
            if module is not None:
                return name, module
        raise ValueError(
            f"fsam_boundary={name!r} is no module of {type(base).__name__}. Candidates: {_candidates(model)}."
        )
    head = _output_embeddings(base)
    if head is None:
        head = next((getattr(base, head) for head in _HEADS if isinstance(getattr(base, head, None), nn.Module)), None)
    for found, module in model.named_modules():
        if module is head:
            return found, module
    raise ValueError(
        f"no boundary between function and loss was found in {type(base).__name__}: name the module whose output is "
        f"the logits with fsam_boundary. Candidates: {_candidates(model)}. (fsam_variant='sam' and 'none' need none.)"
    )


def _output_embeddings(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def _candidates(model: nn.Module, most: int = 8) -> str:
    """The last modules without children that hold weights and stand outside the numbered layers: heads, most likely."""
    leaves = [
        name
        for name, module in model.named_modules()
        if name and not list(module.children()) and next(module.parameters(), None) is not None
    ]
    outside = [name for name in leaves if not any(part.isdigit() for part in name.split("."))]
    return ", ".join(repr(name) for name in reversed((outside or leaves)[-most:])) or "none, the model has no modules"
