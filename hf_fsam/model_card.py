"""What the Trainer's and TRL's model cards say of a model's origin, corrected, and what this package adds to them."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

TAG = "functional-sam"
# How the cards of transformers 5.23 and TRL 1.16 begin.
_ORIGIN = re.compile(r"This model (was trained from scratch|is a fine-tuned version of \[.*?\]\(.*?\))")


def origin(model: Any) -> str:
    """The folder or the name on the hub that the weights were loaded from; empty where they were not loaded."""
    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    name = getattr(adapter, "base_model_name_or_path", None) or getattr(model.config, "_name_or_path", "")
    return str(name or "")


def complete(path: Path, model: Any, settings: dict[str, Any], tagged: bool) -> None:
    """Corrects the card at `path` and adds the `fsam_*` settings.

    tagged: the model was trained with Functional-SAM.
    """
    card, name = ModelCard.load(path), origin(model)
    local = Path(name).is_dir()
    if not name:
        told = "This model was trained from scratch"
    elif local:
        told = f"This model is a fine-tuned version of `{_short(name)}`"
    else:
        told = f"This model is a fine-tuned version of [{name}](https://huggingface.co/{name})"
    card.text = _ORIGIN.sub(lambda _: told, card.text, count=1)
    # `generator` is how `datasets` made the rows; "None" is where TRL's card expects a name on the hub.
    for false, true in {
        " on an unknown dataset.": ".",
        " on the generator dataset.": ".",
        '"None"': f'"{_short(str(path.parent))}"',
    }.items():
        card.text = card.text.replace(false, true)
    card.data.datasets = [each for each in card.data.datasets or [] if each != "generator"] or None
    tags = [tag for tag in card.data.tags or [] if not (local and tag.endswith(f":{name}"))]
    card.data.tags = [*tags, *({TAG} - set(tags) if tagged else ())]
    card.data.pop("licence", None)  # TRL's 'licence: license' names none
    if local:
        card.data.base_model = None  # the hub would look for a repository of that name
    lines = "\n".join(f"- {each}: {value}" for each, value in settings.items() if value is not None)
    card.text += f"\n\n### Functional-SAM\n\n[arXiv 2502.02407](https://arxiv.org/abs/2502.02407)\n\n{lines}\n"
    card.save(path)


def _short(name: str) -> str:
    """A relative path as it is; of an absolute one, which tells of a machine, the end."""
    path = Path(name)
    return str(Path(*path.parts[-2:]) if path.is_absolute() else path)
