"""`plugins: [hf_fsam.axolotl.FSAMPlugin]` in a configuration of Axolotl: its supervised training, split.

docs/axolotl.md tells how to use it. Axolotl's interface was read in 0.21.0.
"""

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, create_model, model_validator
from transformers import Trainer

from hf_fsam.arguments import FSAMArguments
from hf_fsam.trainer import FSAMMixin

_FIELDS = {field.name: field for field in fields(FSAMArguments)}

# Where the loss is one of these kernels, it is not the model's own, which takes its logits from the boundary.
_LOSS_KERNELS = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
)
_PARALLELISM = (
    "context_parallel_size",
    "sequence_parallel_degree",
    "tensor_parallel_size",
    "expert_parallel_size",
)


def refusals(cfg: Any) -> Iterator[tuple[str, str]]:
    """What of a configuration is not supported, and what to do about it. Asked when Axolotl checks the configuration;
    what the trainer refuses comes after that."""
    for name in _LOSS_KERNELS:
        if getattr(cfg, name, None):
            yield (
                f"{name}: true, whose loss replaces the model's own",
                f"set {name}: false; with fsam_fused_head a language model makes no logits either",
            )
    for name in _PARALLELISM:
        size = getattr(cfg, name, None) or 1
        if size > 1:
            yield f"{name}: {size}", f"leave out {name}, and shard with FSDP2 or DeepSpeed ZeRO-3"
    for name in ("reward_model", "process_reward_model"):
        if getattr(cfg, name, None):
            yield (
                f"{name}: true, whose trainer Axolotl lets no plugin extend",
                "train it with TRL and FSAMMixin, as docs/works_with.md shows",
            )
    if getattr(cfg, "rl", None) and not getattr(cfg, "trainer_cls", None):
        yield (
            f"rl: {getattr(cfg.rl, 'value', cfg.rl)} with a trainer of Axolotl's own",
            "name one in trainer_cls that has FSAMMixin first, as docs/axolotl.md shows",
        )


class _Checked(BaseModel):
    """What is checked of the settings while Axolotl checks the rest of its configuration."""

    @model_validator(mode="before")
    @classmethod
    def fsam_names(cls, data: Any) -> Any:
        """Axolotl drops keys that it does not know."""
        for name in data:
            if str(name).startswith("fsam_") and name not in _FIELDS:
                raise ValueError(f"{name} is no setting of hf_fsam: choose one of {', '.join(_FIELDS)}.")
        return data

    @model_validator(mode="after")
    def fsam_values(self) -> "_Checked":
        settings = FSAMArguments(**{name: getattr(self, name) for name in _FIELDS})
        if settings.fsam_variant != "none":
            for what, cure in refusals(self):
                raise ValueError(f"Functional-SAM does not support {what}: {cure}, or set fsam_variant: none.")
        return self


_HINTS = get_type_hints(FSAMArguments)
# The fields of FSAMArguments as keys of the YAML.
FSAMInputs: type[BaseModel] = create_model(
    "FSAMInputs",
    __base__=_Checked,
    **{  # type: ignore[call-overload]
        name: (_HINTS[name], Field(default=field.default, json_schema_extra={"description": field.metadata["help"]}))
        for name, field in _FIELDS.items()
    },
)


class FSAMPlugin(BasePlugin):
    """Puts :class:`FSAMMixin` before the trainer class that Axolotl would use, for pretraining and supervised
    fine-tuning, and the `fsam_*` keys into its training arguments.

    Raises:
        ValueError: when the configuration is checked, for a key that is not in :class:`FSAMArguments`, a value out of
            range, and what :func:`refusals` names; before training, where the trainer has no FSAMMixin.
    """

    _stands_aside = False

    def get_input_args(self) -> str:
        return f"{__name__}.{FSAMInputs.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{FSAMArguments.__module__}.{FSAMArguments.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {name: cfg[name] for name in _FIELDS if cfg.get(name) is not None}

    def get_trainer_cls(self, cfg: Any) -> type[Trainer] | None:
        """None where Axolotl asks again, and where it gives its own classes arguments that no other gets: reward models
        and `rl`."""
        if self._stands_aside or cfg.get("rl") or cfg.get("reward_model") or cfg.get("process_reward_model"):
            return None
        # Not at the top: Axolotl makes its training arguments at this import, of the plugins that there are by then.
        from axolotl.core.builders import HFCausalTrainerBuilder

        self._stands_aside = True
        try:
            # Axolotl's own choice, between other plugins, trainer_cls and the model's. It reads nothing but `cfg`.
            trainer_class = HFCausalTrainerBuilder._get_trainer_cls(SimpleNamespace(cfg=cfg))
        finally:
            self._stands_aside = False
        if issubclass(trainer_class, FSAMMixin):
            return trainer_class
        return type(f"FSAM{trainer_class.__name__}", (FSAMMixin, trainer_class), {})

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        if cfg["fsam_variant"] != "none" and not isinstance(trainer, FSAMMixin):
            raise ValueError(
                f"{type(trainer).__name__} has no FSAMMixin, so that it would train plainly. Put "
                "hf_fsam.axolotl.FSAMPlugin before the other plugins or, with rl, FSAMMixin before the class in "
                "trainer_cls. Or set fsam_variant: none."
            )
