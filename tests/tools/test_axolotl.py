"""The plugin for Axolotl. By default with a stand-in for it, and with the real one where that is installed
(`make test-axolotl`): then a whole training, too, as `axolotl train` runs it."""
# ruff: noqa: E402  (what Axolotl makes when it is imported depends on the plugins that there are by then)

import copy
import json
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_fsam import FSAMArguments, FSAMMixin
from tests import reference
from tests.reference import Problem, causal_lm_loss, count_shifted_labels
from tests.tools import axolotl_interface
from tests.toys import VOCABULARY, llama, sentences

REAL = find_spec("axolotl") is not None
PLUGIN = "hf_fsam.axolotl.FSAMPlugin"
if REAL:
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().register(PLUGIN)
else:
    axolotl_interface.install(PLUGIN)

from axolotl.core.builders import HFCausalTrainerBuilder
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

from hf_fsam.axolotl import FSAMInputs, FSAMPlugin

only_real = pytest.mark.skipif(not REAL, reason="needs axolotl, Python 3.12: make test-axolotl")
# What Axolotl's own check asks for.
LEAST = {
    "base_model": "none",
    "datasets": [{"path": "none", "type": "completion"}],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "bf16": False,
    "fp16": False,
}
RHO = 0.3
CAUSAL = Problem(loss=causal_lm_loss, count=count_shifted_labels)


@pytest.fixture(autouse=True)
def _plugins_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())


def checked(plugins: tuple[str, ...] = (PLUGIN,), **settings: Any) -> Any:
    cfg = DictDefault({**LEAST, "plugins": list(plugins), **settings})
    prepare_plugins(cfg)
    return validate_config(cfg)


def trainer_class_of(cfg: Any) -> type[Trainer]:
    return HFCausalTrainerBuilder._get_trainer_cls(SimpleNamespace(cfg=cfg))


# ---- Settings ----


def test_the_keys_are_the_fields_of_the_arguments() -> None:
    assert list(FSAMInputs.model_fields) == [field.name for field in fields(FSAMArguments)]
    assert FSAMArguments(**FSAMInputs().model_dump()) == FSAMArguments()
    given = {"fsam_variant": "sam", "fsam_rho": 0.1, "fsam_boundary": "lm_head"}
    cfg = checked(**given)
    handed_over = PluginManager.get_instance().get_training_args(cfg)
    assert FSAMArguments(**{name: value for name, value in handed_over.items() if name.startswith("fsam_")}) == (
        FSAMArguments(**given)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsam_roh": 0.1}, "fsam_roh is no setting of hf_fsam: choose one of fsam_variant, fsam_rho"),
        ({"fsam_rho": -1.0}, "fsam_rho=-1.0 is not a radius"),
        ({"fsam_variant": "fsam"}, "'none', 'sam', 'functional' or 'logit'"),
        ({"chunked_cross_entropy": True}, "chunked_cross_entropy: true, .*: set chunked_cross_entropy: false"),
        ({"flash_attn_cross_entropy": True}, "set flash_attn_cross_entropy: false"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2: leave out context_parallel_size"),
        ({"sequence_parallel_degree": 2}, r"(context_parallel_size|sequence_parallel_degree): 2: leave out"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2: leave out tensor_parallel_size"),
        ({"reward_model": True}, "reward_model: true, whose trainer Axolotl lets no plugin extend"),
        ({"process_reward_model": True}, "process_reward_model: true, whose"),
        ({"rl": "ipo"}, "rl: ipo with a trainer of Axolotl's own: name one in trainer_cls"),
    ],
)
def test_what_is_not_supported_is_told_when_the_configuration_is_checked(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checked(**settings)
    if not any(name.startswith("fsam_") for name in settings) and not REAL:
        checked(fsam_variant="none", **settings)


@pytest.mark.parametrize(
    ("plugin", "key"),
    [
        ("axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin", None),  # true as soon as it is listed
        ("axolotl.integrations.liger.LigerPlugin", "liger_fused_linear_cross_entropy"),
        ("axolotl.integrations.liger.LigerPlugin", "liger_cross_entropy"),
        ("axolotl.integrations.expert_parallel.ExpertParallelPlugin", "expert_parallel_size"),
    ],
)
def test_kernels_of_other_plugins_are_refused(plugin: str, key: str | None) -> None:
    name = key or "cut_cross_entropy"
    settings = {} if key is None and REAL else {name: 2 if name.endswith("size") else True}
    with pytest.raises(ValueError, match=f"Functional-SAM does not support {name}: "):
        checked((PLUGIN, plugin) if REAL else (PLUGIN,), **settings)


# ---- The class ----


class OwnTrainer(AxolotlTrainer):
    pass


class FSAMOwnTrainer(FSAMMixin, AxolotlTrainer):
    pass


class OtherPlugin(BasePlugin):
    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        return OwnTrainer


def test_the_mixin_stands_before_the_class_that_axolotl_would_use() -> None:
    own, split, other = (f"{__name__}.{name}" for name in ("OwnTrainer", "FSAMOwnTrainer", "OtherPlugin"))
    assert trainer_class_of(checked()).__bases__ == (FSAMMixin, AxolotlTrainer)
    assert trainer_class_of(checked(trainer_cls=own)).__bases__ == (FSAMMixin, OwnTrainer)
    assert trainer_class_of(checked(trainer_cls=split)) is FSAMOwnTrainer
    assert trainer_class_of(checked((PLUGIN, other))).__bases__ == (FSAMMixin, OwnTrainer)


def test_reward_models_and_rl_keep_their_classes() -> None:
    for name in ("rl", "reward_model", "process_reward_model"):
        assert FSAMPlugin().get_trainer_cls(DictDefault({name: "dpo"})) is None


def test_a_trainer_without_the_mixin_is_refused(tmp_path: Path) -> None:
    cfg = checked((f"{__name__}.OtherPlugin", PLUGIN))
    assert trainer_class_of(cfg) is OwnTrainer  # the first plugin is asked first
    trainer = Trainer(llama(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"Trainer has no FSAMMixin, .* before the other plugins"):
        FSAMPlugin().post_trainer_create(cfg, trainer)
    FSAMPlugin().post_trainer_create(DictDefault({"fsam_variant": "none"}), trainer)


# ---- The training ----


def seen_batches(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The micro-batches that it will have trained on."""
    seen: list[dict[str, Tensor]] = []
    fetch = trainer.get_batch_samples

    def record(*args: Any, **kwargs: Any) -> Any:
        batches, count = fetch(*args, **kwargs)
        seen.extend(copy.deepcopy(batch) for batch in batches)
        return batches, count

    trainer.get_batch_samples = record
    return seen


def check_against_reference(trainer: Trainer, variant: str, accumulation: int) -> list[dict[str, Tensor]]:
    """Trains, and compares with plain torch on the same batches, which it returns, relative to the way that the weights
    went."""
    start = copy.deepcopy(trainer.model)
    seen = seen_batches(trainer)
    trainer.train()
    assert len(seen) == trainer.state.global_step * accumulation
    group = trainer.optimizer.param_groups[0]
    expected = reference.train(
        start,
        CAUSAL,
        [{name: value for name, value in batch.items() if name != "length"} for batch in seen],
        variant=variant,
        rho=RHO,
        optimizer_factory=lambda model: torch.optim.AdamW(
            model.parameters(), lr=0.01, betas=group["betas"], eps=group["eps"], weight_decay=0.0
        ),
        accumulation=accumulation,
        max_grad_norm=trainer.args.max_grad_norm,
    )
    begin, end = (reference.trainable(model) for model in (start, trainer.model))
    apart = reference.norm({name: end[name].detach() - expected[name] for name in expected})
    way = reference.norm({name: expected[name] - begin[name].detach() for name in expected})
    print(f"{variant}: {float(apart / way):.1e} of the way")
    assert apart < 1e-5 * way
    return seen


@pytest.mark.parametrize("variant", ["none", "functional"])
def test_the_step_is_split_in_axolotls_trainer(tmp_path: Path, variant: str) -> None:
    cfg = checked(fsam_variant=variant, fsam_rho=RHO)
    from axolotl.core.training_args import AxolotlTrainingArguments

    arguments = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        adam_epsilon=1e-3,
        lr_scheduler_type="constant",
        **PluginManager.get_instance().get_training_args(cfg),
    )
    rows = [
        {name: value.tolist() for name, value in row.items()} | {"attention_mask": [1] * len(row["labels"])}
        for row in sentences(masked=True)
    ]
    trainer = trainer_class_of(cfg)(
        model=llama().double(), args=arguments, train_dataset=Dataset.from_list(rows).with_format("torch")
    )
    PluginManager.get_instance().post_trainer_create(cfg, trainer)
    check_against_reference(trainer, variant, accumulation=2)
    assert ("fsam/radius" in trainer.state.log_history[0]) == (variant != "none")
    assert "ppl" in trainer.state.log_history[0]


# ---- A whole configuration ----


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def text(seed: int, length: int) -> str:
    words = torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{word}" for word in words.tolist())


def set_up(folder: Path, rows: list[dict[str, str]], **settings: Any) -> Trainer:
    """What `axolotl train` makes of these settings, with a model, a tokenizer and data of its own."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    llama(max_position_embeddings=64).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    dataset = {"path": str(folder / "rows.jsonl"), "ds_type": "json", **settings.pop("dataset")}
    cfg = load_cfg(
        DictDefault(
            {
                **LEAST,
                "plugins": [PLUGIN],
                "base_model": str(folder / "model"),
                "datasets": [dataset],
                "dataset_prepared_path": str(folder / "prepared"),
                "dataset_num_proc": 1,
                "output_dir": str(folder / "out"),
                "sequence_len": 32,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "optimizer": "adamw_torch",
                "adam_epsilon": 1e-3,
                "lr_scheduler": "constant",
                "attn_implementation": "sdpa",
                "logging_steps": 1,
                "save_strategy": "no",
                "val_set_size": 0,
                "fsam_rho": RHO,
                **settings,
            }
        )
    )
    trainer, *_ = setup_model_and_trainer(cfg, (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg))
    return trainer


@only_real
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["none", "functional"])
def test_a_configuration_trains_as_plain_torch_does(tmp_path: Path, variant: str, packed: bool) -> None:
    trainer = set_up(
        tmp_path,
        [{"text": text(seed, 6 + seed % 7)} for seed in range(48)],
        dataset={"type": "completion", "field": "text"},
        fsam_variant=variant,
        sample_packing=packed,
    )
    assert type(trainer).__bases__ == (FSAMMixin, AxolotlTrainer)
    trainer.model.double()
    batches = check_against_reference(trainer, variant, accumulation=2)
    texts = [int((batch["position_ids"] == 0).sum()) if "position_ids" in batch else 2 for batch in batches]
    assert all((count > 2) == packed for count in texts), texts


@only_real
def test_a_preference_trainer_is_named_in_trainer_cls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

    own = type("FSAMDPOTrainer", (FSAMMixin, AxolotlDPOTrainer), {})
    monkeypatch.setitem(globals(), own.__name__, own)
    trainer = set_up(
        tmp_path,
        [{"prompt": text(seed, 4), "chosen": text(seed + 50, 5), "rejected": text(seed + 90, 5)} for seed in range(12)],
        dataset={"type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}},
        rl="dpo",
        trainer_cls=f"{__name__}.FSAMDPOTrainer",
    )
    assert type(trainer) is own
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(RHO)
