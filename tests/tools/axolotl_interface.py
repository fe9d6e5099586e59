"""A stand-in for Axolotl, which needs Python 3.12 and pins of its own: only what its plugins see, written from reading
0.21.0. `make test-axolotl` runs the same tests with the real one.

Names are those of Axolotl. What differs: there is one pydantic class of a few settings, no builder beyond the choice of
the class, and a Trainer that changes only where the real one stands in the way of a step.
"""

import contextlib
import sys
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import BaseModel, create_model
from transformers import Trainer, TrainingArguments


class BasePlugin:
    """Every method that a plugin leaves out answers nothing."""

    def get_input_args(self) -> str | None: ...
    def get_training_args_mixin(self) -> str | None: ...
    def get_training_args(self, cfg: Any) -> dict[str, Any] | None: ...
    def get_trainer_cls(self, cfg: Any) -> type | None: ...
    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None: ...


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _answers(method: str) -> list[Any]:
    """The classes that the plugins name."""
    answers = [getattr(plugin, method)() for plugin in PluginManager.get_instance().plugins.values()]
    return [_named(path) for path in answers if path is not None]


class PluginManager:
    """One for the process. The first plugin that names a trainer class wins."""

    _one: "PluginManager | None" = None

    def __init__(self) -> None:
        self.plugins: dict[str, BasePlugin] = {}

    @classmethod
    def get_instance(cls) -> "PluginManager":
        cls._one = cls._one or cls()
        return cls._one

    def get_trainer_cls(self, cfg: Any) -> type | None:
        answers = (plugin.get_trainer_cls(cfg) for plugin in self.plugins.values())
        return next((answer for answer in answers if answer is not None), None)

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {
            key: value
            for plugin in self.plugins.values()
            for key, value in (plugin.get_training_args(cfg) or {}).items()
        }

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        for plugin in self.plugins.values():
            plugin.post_trainer_create(cfg, trainer)


class DictDefault(dict):
    """A key that is missing is None, and an attribute is a key."""

    def __missing__(self, key: str) -> None:
        return None

    def __getattr__(self, key: str) -> Any:
        return self[key]


class AxolotlInputConfig(BaseModel):
    """Keys that it does not know are dropped."""

    base_model: str | None = None
    plugins: list[str] | None = None
    trainer_cls: str | None = None
    rl: str | None = None
    reward_model: bool | None = None
    process_reward_model: bool | None = None
    chunked_cross_entropy: bool | None = None
    flash_attn_cross_entropy: bool | None = None
    sequence_parallel_degree: int | None = None
    context_parallel_size: int | None = None
    tensor_parallel_size: int | None = None
    # These come from plugins of Axolotl.
    cut_cross_entropy: bool | None = None
    liger_cross_entropy: bool | None = None
    liger_fused_linear_cross_entropy: bool | None = None
    expert_parallel_size: int = 1


def prepare_plugins(cfg: DictDefault) -> None:
    manager = PluginManager.get_instance()
    for path in cfg.plugins or []:
        if path not in manager.plugins:
            manager.plugins[path] = _named(path)()


def validate_config(cfg: DictDefault) -> DictDefault:
    inputs = [
        _named(path) for plugin in PluginManager.get_instance().plugins.values() if (path := plugin.get_input_args())
    ]
    merged = create_model("Merged", __base__=(AxolotlInputConfig, *inputs))
    return DictDefault(merged(**cfg).model_dump(exclude_none=True))


@dataclass
class AxolotlTrainingMixins:
    sample_packing: bool = False
    include_tkps: bool = False


class AxolotlTrainer(Trainer):
    """`training_step` runs in a context, `compute_loss` takes a key from the batch, and `log` adds to its line."""

    def __init__(self, *args: Any, eval_data_collator: Any = None, dataset_tags: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs.pop("attention_mask", None)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["ppl"] = 1.0
        super().log(logs, start_time)


class HFCausalTrainerBuilder:
    cfg: DictDefault

    def _get_trainer_cls(self) -> type:
        chosen = PluginManager.get_instance().get_trainer_cls(self.cfg)
        if chosen:
            return chosen
        return _named(self.cfg.trainer_cls) if self.cfg.trainer_cls else AxolotlTrainer


def _training_arguments() -> type:
    """Made of the plugins that there are by then."""
    mixins = _answers("get_training_args_mixin")
    return make_dataclass("AxolotlTrainingArguments", [], bases=(AxolotlTrainingMixins, *mixins, TrainingArguments))


def _make_importable(homes: dict[str, dict[str, Any]]) -> None:
    for name, members in homes.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module


def install(plugin: str) -> None:
    """Makes Axolotl importable in this process, with a plugin of it. As in the real one, the training arguments are
    made of the plugins that there are when they are imported."""
    _make_importable(
        {
            "axolotl": {},
            "axolotl.integrations": {},
            "axolotl.integrations.base": {"BasePlugin": BasePlugin, "PluginManager": PluginManager},
            "axolotl.utils": {},
            "axolotl.utils.config": {"prepare_plugins": prepare_plugins, "validate_config": validate_config},
            "axolotl.utils.dict": {"DictDefault": DictDefault},
        }
    )
    prepare_plugins(DictDefault(plugins=[plugin]))
    _make_importable(
        {
            "axolotl.core": {},
            "axolotl.core.builders": {"HFCausalTrainerBuilder": HFCausalTrainerBuilder},
            "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
            "axolotl.core.training_args": {"AxolotlTrainingArguments": _training_arguments()},
        }
    )
