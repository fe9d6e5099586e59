"""The recipes before they train: how settings reach them, which models they start from, and the paper's ladder."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_fsam import FSAMTrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import align
import config
import dpo
import finetune
import models
import pretrain
import sft
from data import DatasetArguments

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(config.CONFIGS.glob("*.yaml"))


# ---- Settings ----


@dataclass
class Settings:
    rate: float = 0.1
    count: int | None = None
    flag: bool = True
    kind: Literal["a", "b", "no"] = "a"
    names: list[str] = field(default_factory=lambda: ["x"])


def parse(tmp_path: Path, text: str, *line: str) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return config.parse((Settings,), [str(path), *line], "recipe.py")[0]


def test_yaml_wins_over_defaults_and_the_command_line_over_yaml(tmp_path: Path) -> None:
    text = "rate: 1e-3\ncount: 7\nflag: false\nnames: [p, q]\n"  # YAML itself reads 1e-3 as a string
    assert parse(tmp_path, "") == Settings()
    assert parse(tmp_path, text) == Settings(rate=0.001, count=7, flag=False, names=["p", "q"])
    assert parse(tmp_path, text, "--rate=-2e-4", "--flag", "--names", "r") == Settings(-2e-4, 7, True, "a", ["r"])
    assert parse(tmp_path, "rate:\nkind: b") == Settings(kind="b")
    assert parse(tmp_path, "kind: no") == Settings(kind="no")  # which YAML reads as false


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("rat: 1", [], "'rat' in .*settings.yaml is not an argument of recipe.py. Did you mean 'rate'"),
        ("", ["--cuont=1"], "'cuont' on the command line is not an argument.*Did you mean 'count'"),
        ("", ["stray"], "'stray' on the command line"),
        ("", ["--coun=1"], "'coun' on the command line"),  # no guessing from a prefix
        ("rate: fast", [], "--rate: invalid float value: 'fast'"),
        ("count: 1.5", [], "--count: invalid int value: '1.5'"),
        ("kind: c", [], "--kind: invalid choice: 'c'"),
        ("flag: perhaps", [], "--flag.*perhaps"),
        ("count: [1, 2]", [], r"count=\[1, 2\] in .* is a list, but count takes one value"),
        ("- 1", [], "holds list"),
        ("studies: [core.yaml]", [], "settings.yaml is a study: hf-fsam compare"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, text: str, line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text, *line)


def test_files_and_folders_that_cannot_be_used_are_refused() -> None:
    tiny = str(config.CONFIGS / "pretrain_tiny.yaml")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        pretrain.run(["absent.yaml"])
    with pytest.raises(ValueError, match=r"first argument.*pretrain_tiny\.yaml"):
        pretrain.run(["--fsam_rho", "0.1"])
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint='true': there is no such checkpoint"):
        pretrain.run([tiny, "--output_dir", "outputs/absent", "--resume_from_checkpoint", "true"])
    with pytest.raises(ValueError, match="is a file: give a folder"):
        pretrain.run([tiny, "--output_dir", __file__])
    with pytest.raises(ValueError, match=r"report_to=\['wandbb'\]: wandbb is not supported, only .*wandb"):
        pretrain.run([tiny, "--report_to", "wandbb"])
    with pytest.raises(
        ValueError, match=r"lr_scheduler_kwargs=\{'num_cycle': 2\} does not suit lr_scheduler_type='cosine'"
    ):
        pretrain.run([tiny, "--lr_scheduler_kwargs", '{"num_cycle": 2}'])
    with pytest.raises(FileNotFoundError, match=r"'absent\.json' does not exist: give the path"):
        pretrain.run([tiny, "--fsdp", "true", "--fsdp_config", "absent.json"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses(path: Path) -> None:
    # bf16 is checked against the hardware, which is not what this is about.
    line = [str(path), "--bf16", "false", "--fsam_rho", "0.07"]
    settings = yaml.safe_load(path.read_text())
    if "method" in settings:
        own = {"sft": sft.FSAMSFTConfig, "dpo": dpo.FSAMDPOConfig}[settings["method"]]
        types = (finetune.ModelArguments, align.AlignDataArguments, own)
    elif "model_name_or_path" in settings:
        types = (finetune.ModelArguments, finetune.FinetuneDataArguments, finetune.FinetuneTrainingArguments)
    else:
        types = (pretrain.ModelArguments, DatasetArguments, FSAMTrainingArguments)
    training = config.parse(types, line, "recipe.py")[-1]
    assert training.fsam_rho == 0.07
    assert training.report_to == []
    assert Path(training.output_dir) == Path("outputs") / path.stem


@pytest.mark.parametrize(("name", "greater"), [("perplexity", False), ("eval_loss", False)])
def test_the_best_model_is_that_of_the_lowest_perplexity(name: str, greater: bool) -> None:
    line = [str(config.CONFIGS / "pretrain_tiny.yaml"), "--load_best_model_at_end", "true", "--save_strategy", "steps"]
    line += ["--save_steps", "50", "--eval_steps", "50", "--metric_for_best_model", name]
    types = (pretrain.ModelArguments, DatasetArguments, FSAMTrainingArguments)
    assert config.parse(types, line, "pretrain.py", pretrain.METRICS)[-1].greater_is_better == greater


@pytest.mark.parametrize(
    ("script", "name", "other"),
    [
        ("pretrain.py", "finetune_topics", "finetune.py"),
        ("pretrain.py", "sft_docstrings", "sft.py"),
        ("finetune.py", "pretrain_tiny", "pretrain.py"),
        ("dpo.py", "sft_docstrings", "sft.py"),
    ],
)
def test_a_configuration_of_another_recipe_is_refused(script: str, name: str, other: str) -> None:
    path = str(config.CONFIGS / f"{name}.yaml")
    with pytest.raises(ValueError, match=f"is for another script than {script}: python recipes/{other} .*{name}.yaml"):
        config.parse((Settings,), [path], script)


def test_every_configuration_tells_its_recipe() -> None:
    told = {path.stem: config.script_for(yaml.safe_load(path.read_text())) for path in CONFIGS}
    assert told.pop("study") == "pretrain.py"
    for name, script in told.items():
        assert f"recipes/{script} recipes/configs/{name}.yaml" in (config.CONFIGS / f"{name}.yaml").read_text()


# ---- Models ----


def test_what_can_be_a_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    paths = ["outputs/x", "./x", "~/x", "/x", "a/b/c", "here", "here/model", "here/absent", "../x/y"]
    assert [name for name in paths if not models.is_path(name)] == []
    assert [name for name in ("gpt2", "google-bert/bert-base-uncased", "elsewhere/model") if models.is_path(name)] == []
    with pytest.raises(FileNotFoundError, match=r"'here/modle' does not exist\. Did you mean 'model'"):
        models.model_folder("here/modle")
    with pytest.raises(FileNotFoundError, match=r"'here/other' .* since there is a folder 'here': start elsewhere"):
        models.model_folder("here/other")
    assert models.model_folder("here/model") == "here/model"


def test_the_models_that_configurations_start_from_are_those_that_others_make() -> None:
    made = {yaml.safe_load(path.read_text())["output_dir"]: path.name for path in CONFIGS}
    for path in CONFIGS:
        name = yaml.safe_load(path.read_text()).get("model_name_or_path", "")
        if name.startswith("outputs/"):
            assert models.MADE_BY[name].endswith(f"recipes/configs/{made[name]}")


@pytest.mark.parametrize(
    ("script", "name", "cure"),
    [
        ("dpo.py", "dpo_docstrings", "python recipes/sft.py recipes/configs/sft_docstrings.yaml"),
        ("sft.py", "sft_docstrings", "python recipes/pretrain.py recipes/configs/pretrain_tiny.yaml"),
        ("finetune.py", "finetune_topics", "python recipes/pretrain.py recipes/configs/pretrain_tiny.yaml"),
    ],
)
def test_a_missing_model_is_told_in_one_line_at_once(script: str, name: str, cure: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch takes seconds to import')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / script), str(config.CONFIGS / f"{name}.yaml")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.strip().endswith(f"does not exist. This makes it: {cure}")


def test_the_default_model_is_the_one_that_pretraining_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = yaml.safe_load((config.CONFIGS / "pretrain_tiny.yaml").read_text())
    assert tiny["output_dir"] == finetune.ModelArguments().model_name_or_path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python recipes/pretrain\.py recipes/configs/pretrain_tiny\.yaml"):
        finetune.run([str(config.CONFIGS / "finetune_topics.yaml")])
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"python recipes/pretrain\.py recipes/configs/pretrain_tiny\.yaml"):
        finetune.run(["empty.yaml"])


# ---- The paper's ladder ----

LADDER = {"c4_24m": 24e6, "c4_42m": 42e6, "c4_118m": 118e6, "c4_208m": 208e6, "c4_1.2b": 1.2e9}


@pytest.mark.parametrize(("name", "size"), LADDER.items(), ids=LADDER)
def test_the_models_of_the_ladder_have_the_sizes_of_their_names(name: str, size: float) -> None:
    path = config.CONFIGS / f"{name}.yaml"
    types = (pretrain.ModelArguments, DatasetArguments, FSAMTrainingArguments)
    model, data, training = config.parse(types, [str(path), "--bf16", "false"], "pretrain.py")
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(pretrain.build_config(model, model.vocab_size, data.sequence_length))
    assert sum(parameter.numel() for parameter in built.parameters()) == pytest.approx(size, rel=0.05)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 256
    assert (model.vocab_size, data.sequence_length, training.max_steps) == (32_000, 512, 10_000)
    assert (data.dataset, data.dataset_config, data.streaming) == ("allenai/c4", "en", True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_both_architectures_have_the_shape_in_the_arguments(architecture: str) -> None:
    arguments = pretrain.ModelArguments(architecture, hidden_size=32, intermediate_size=48, layers=3, heads=2)
    built = AutoModelForCausalLM.from_config(pretrain.build_config(arguments, vocab_size=300, sequence_length=16))
    weights = dict(built.named_parameters())
    shapes = {tuple(weight.shape) for weight in weights.values()}
    assert built.get_input_embeddings().weight is built.get_output_embeddings().weight
    assert built.get_input_embeddings().weight.shape == (300, 32)
    assert shapes & {(48, 32), (32, 48)}
    assert sum(name.endswith(("o_proj.weight", "attn.c_proj.weight")) for name in weights) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30, "heads": 4}, "heads=4 does not divide hidden_size=30"),
        ({"layers": 0}, "layers=0 is too small"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
    ],
)
def test_impossible_model_shapes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.ModelArguments(**settings)
