"""Every `fsam_*` field is parsed, checked and saved, and what is not supported is refused by name before training."""

import json
import math
import random
import re
from dataclasses import fields
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType, DummyOptim, TorchDynamoPlugin
from transformers import HfArgumentParser, TrainerCallback

from hf_fsam import FSAMArguments, FSAMTrainer, FSAMTrainingArguments
from hf_fsam.arguments import check
from hf_fsam.engines import select_engine
from tests.toys import llama, make_trainer

GIVEN = {
    "fsam_variant": "none",
    "fsam_rho": 0.5,
    "fsam_precondition": False,
    "fsam_ascent_scope": "optimizer_step",
    "fsam_ascent_direction": "momentum",
    "fsam_every_steps": 3,
    "fsam_boundary": "lm_head",
    "fsam_fused_head": False,
    "fsam_offload_hidden_states": True,
    "fsam_diagnostics_steps": 5,
}


def test_every_field_parses_from_command_line_yaml_and_json(tmp_path: Path) -> None:
    assert {field.name for field in fields(FSAMArguments)} == set(GIVEN)
    parser = HfArgumentParser(FSAMTrainingArguments)
    line = [f"--{name}={value}" for name, value in ({"output_dir": "out"} | GIVEN).items()]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"output_dir": "out"} | GIVEN))
    (tmp_path / "a.json").write_text(json.dumps({"output_dir": "out"} | GIVEN))
    for (parsed,) in (
        parser.parse_args_into_dataclasses(line),
        parser.parse_yaml_file(str(tmp_path / "a.yaml")),
        parser.parse_json_file(str(tmp_path / "a.json")),
    ):
        assert {name: getattr(parsed, name) for name in GIVEN} == GIVEN
        assert GIVEN.items() <= parsed.to_dict().items()


def test_every_field_has_a_help_text() -> None:
    usage = HfArgumentParser(FSAMTrainingArguments).format_help()
    for field in fields(FSAMArguments):
        assert f"--{field.name}" in usage
        assert len(field.metadata["help"]) > 40


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fsam_variant", "functionnal"),
        ("fsam_ascent_scope", "batch"),
        ("fsam_rho", -0.1),
        ("fsam_rho", math.nan),
        ("fsam_rho", math.inf),
        ("fsam_rho", "large"),
        ("fsam_precondition", "yes"),
        ("fsam_ascent_direction", "last"),
        ("fsam_every_steps", 0),
        ("fsam_every_steps", 1.5),
        ("fsam_every_steps", True),
        ("fsam_boundary", ""),
        ("fsam_fused_head", "yes"),
        ("fsam_rho", True),
        ("fsam_rho", 1e39),  # infinite in float32
        ("fsam_rho", 10**30),
        ("fsam_rho", 1e-39),
        ("fsam_rho", Decimal("NaN")),
        ("fsam_diagnostics_steps", True),
        ("fsam_diagnostics_steps", -1),
        ("fsam_every_steps", 2**31),
        ("fsam_variant", None),
    ],
)
def test_bad_values_are_refused_with_the_name_and_the_value(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        FSAMTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


class _Word(str, Enum):  # noqa: UP042 - many scripts still write it this way
    SAM = "sam"


# A value of every kind that a script, a configuration file, a search or NumPy may give, and the value that replaces it.
ODD: dict[str, tuple[Any, Any]] = {
    "fsam_rho": (np.float32(0.25), 0.25),
    "fsam_every_steps": (np.int64(2), 2),
    "fsam_diagnostics_steps": (torch.tensor(4), 4),
    "fsam_precondition": (np.True_, True),
    "fsam_fused_head": (torch.tensor(False), False),
    "fsam_offload_hidden_states": (np.array(True), True),
    "fsam_variant": (_Word.SAM, "sam"),
    "fsam_ascent_scope": (np.str_("optimizer_step"), "optimizer_step"),
    "fsam_ascent_direction": (np.str_("gradient"), "gradient"),
    "fsam_boundary": (np.str_("lm_head"), "lm_head"),
}
RADII = (0.25, "2.5e-1", Fraction(1, 4), Decimal("0.25"), torch.tensor(0.25), torch.tensor([0.25]), np.float16(0.25))


def exactly(value: Any) -> tuple[type, Any]:
    return type(value), value


@pytest.mark.parametrize("value", RADII, ids=repr)
def test_numbers_of_any_type_are_accepted(tmp_path: Path, value: Any) -> None:
    assert exactly(FSAMTrainingArguments(str(tmp_path), use_cpu=True, fsam_rho=value).fsam_rho) == (float, 0.25)


def test_values_that_no_float_holds_or_python_prints_are_refused_by_name(tmp_path: Path) -> None:
    values = (10**400, 10**5000, Fraction(10**400, 3), torch.zeros(3), np.zeros(2), 1j, np.complex64(1), "", [])
    for name in ("fsam_rho", "fsam_every_steps", "fsam_precondition", "fsam_variant", "fsam_boundary"):
        for value in values:
            with pytest.raises(ValueError, match=f"{name}=.*(give|choose)"):
                FSAMTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


def test_every_value_is_either_refused_by_name_or_saved_and_read_back(tmp_path: Path) -> None:
    """Two thousand random values for every field: those that pass have types of Python's own and survive every file."""
    draw = random.Random(0)
    names = [field.name for field in fields(FSAMArguments)]
    words = ["none", "sam", "logit", "rank", "momentum", "", "nan", "1e-2", "3", "true", "lm_head", "\x00"]
    numbers = [0, 1, -1, 3, 2**31, 10**30, 0.0, -0.0, 0.03, 1e-300, 1e39, math.inf, math.nan, 7.0, 1.5]
    makers: list[Any] = [
        *(np.float16, np.float32, np.float64, np.longdouble, np.bool_, np.complex64, np.array, np.str_),
        *(torch.tensor, Decimal, str, bool, float, complex, repr, lambda x: [x], lambda x: {x: x}, lambda x: x),
    ]
    passed = 0
    for _ in range(2000):
        name, make, value = draw.choice(names), draw.choice(makers), draw.choice(words + numbers)
        try:
            with np.errstate(all="ignore"):
                odd = make(value)
        except (TypeError, ValueError, OverflowError, ArithmeticError, RuntimeError):
            continue
        args, error = FSAMArguments(), ""
        setattr(args, name, odd)
        try:
            check(args)
        except ValueError as refused:
            error = str(refused)
        if error:
            assert f"{name}=" in error, (name, odd)
            continue
        passed += 1
        own = {each: getattr(args, each) for each in names}
        default = {each: getattr(FSAMArguments(), each) for each in names}
        for each in set(names) - {"fsam_boundary"}:
            assert type(own[each]) is type(default[each]), (name, odd)
        assert type(own["fsam_boundary"]) in (str, type(None))
        assert json.loads(json.dumps(own, allow_nan=False)) == own
        torch.save(own, tmp_path / "args.bin")
        assert torch.load(tmp_path / "args.bin", weights_only=True) == own
    assert passed > 200


def test_odd_values_set_by_a_callback_are_saved_with_every_checkpoint(tmp_path: Path) -> None:
    class Schedule(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, (odd, _) in ODD.items():
                setattr(args, name, odd)

    trainer = make_trainer(tmp_path, fsam_precondition=True, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.add_callback(Schedule())
    trainer.train()
    plain = {name: value for name, (_, value) in ODD.items()}
    for folder in tmp_path.glob("checkpoint-[23]"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["FSAMSettings"]["args"] == plain
        saved = torch.load(folder / "training_args.bin", weights_only=False)
        assert {name: exactly(getattr(saved, name)) for name in plain} == {n: exactly(v) for n, v in plain.items()}
        assert plain.items() <= json.loads(saved.to_json_string()).items()


@pytest.mark.parametrize(
    ("where", "change", "named"),
    [
        ("args", {"_n_gpu": 2}, "DataParallel"),
        ("args", {"optim": "lomo"}, "lomo"),
        ("args", {"torch_compile_mode": "reduce-overhead"}, "CUDA graphs"),
        ("state", {"dynamo_plugin": TorchDynamoPlugin(mode="max-autotune")}, "CUDA graphs"),
        ("state", {"dynamo_plugin": TorchDynamoPlugin(backend="cudagraphs")}, "CUDA graphs"),
        ("accelerator", {"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ("args", {"optim": "galore_adamw_layerwise"}, "galore_adamw_layerwise"),
        ("trainer", {"is_model_parallel": True}, "hf_device_map"),
        ("trainer", {"is_distributed_loading_by_transformers": True}, "DistributedConfig"),
        ("accelerator", {"distributed_type": DistributedType.XLA}, "XLA"),
        ("accelerator", {"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM"),
        ("accelerator", {"parallelism_config": SimpleNamespace(tp_enabled=True)}, "tensor, context"),
    ],
)
def test_unsupported_ways_of_running_are_refused_by_name(
    tmp_path: Path, where: str, change: dict[str, Any], named: str
) -> None:
    trainer = make_trainer(tmp_path, fsam_variant="none")
    state = SimpleNamespace(dynamo_plugin=TorchDynamoPlugin())
    distributed_type = trainer.accelerator.distributed_type
    accelerator = SimpleNamespace(
        distributed_type=distributed_type, parallelism_config=None, mixed_precision="no", state=state
    )
    view = SimpleNamespace(
        args=trainer.args,
        accelerator=accelerator,
        is_model_parallel=False,
        is_distributed_loading_by_transformers=False,
        model=trainer.model,
    )
    select_engine(view)  # raises nothing without the change
    for name, value in change.items():
        setattr({"args": view.args, "trainer": view, "accelerator": accelerator, "state": state}[where], name, value)
    with pytest.raises(ValueError, match=named):
        select_engine(view)


def test_the_trainer_checks_before_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        make_trainer(tmp_path, **settings)
    make_trainer(tmp_path, **settings, fsam_variant="none")


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(tmp_path, trainer={"train_dataset": []}).train()


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output_dir: out\nfsam_rho: 5e-2\n")
    (parsed,) = HfArgumentParser(FSAMTrainingArguments).parse_yaml_file(str(tmp_path / "a.yaml"))
    assert parsed.fsam_rho == 0.05


@pytest.mark.parametrize(("name", "value"), [("fsam_variant", "funtional"), ("fsam_rho", math.nan), ("fsam_rho", -0.1)])
def test_fields_changed_after_the_start_are_checked_too(tmp_path: Path, name: str, value: Any) -> None:
    trainer = make_trainer(tmp_path)
    setattr(trainer.args, name, value)  # as a hyperparameter search does
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        trainer.train()


def test_preconditioning_switched_on_later_checks_the_optimizer_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fsam_variant="none", fsam_precondition=True, optim="sgd")
    later = TrainerCallback()
    later.on_step_begin = lambda args, state, control, **_: setattr(args, "fsam_variant", "functional")
    trainer.add_callback(later)
    with pytest.raises(ValueError, match=r"fsam_precondition=True.*but SGD keeps none"):  # not Accelerate's wrapper
        trainer.train()


def test_a_parameter_group_without_weights_is_accepted(tmp_path: Path) -> None:
    """Training norms alone leaves the Trainer's group with weight decay empty."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "norm" in name
    trainer = make_trainer(tmp_path, model, fsam_rho=0.1, fsam_precondition=True)
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.1, rel=1e-3)


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="post-accumulate-gradient hooks"):
        make_trainer(tmp_path, model).train()


class _OwnAdam(torch.optim.Adam):
    pass


class _NamedAdam(torch.optim.AdamW):
    """With arguments that only this optimizer has."""

    def __init__(self, params, name: str, **kwargs) -> None:
        self.name = name
        super().__init__(params, **kwargs)


class _Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    beta1, beta2 = group["betas"]
                    p.sub_(torch.sign(beta1 * momentum + (1 - beta1) * p.grad), alpha=group["lr"])
                    momentum.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def _adafactor(params):
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False)


KEEPS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "a user's": _OwnAdam,
    "with its own arguments": lambda params: _NamedAdam(params, "mine"),
    "fused": lambda params: torch.optim.AdamW(params, fused=True),
    "amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
}
KEEPS_NONE = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": _adafactor,
    "torch Adafactor": torch.optim.Adafactor,
    "Lion": _Lion,
    "Adamax": torch.optim.Adamax,
    "Adagrad": torch.optim.Adagrad,
    "SparseAdam": torch.optim.SparseAdam,
}


@pytest.mark.parametrize("name", KEEPS)
def test_preconditioning_takes_optimizers_with_a_second_moment(tmp_path: Path, name: str) -> None:
    model = llama()
    trainer = make_trainer(
        tmp_path,
        model,
        trainer={"optimizers": (KEEPS[name](model.parameters()), None)},
        fsam_rho=0.1,
        fsam_precondition=True,
    )
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", KEEPS_NONE)
def test_preconditioning_refuses_the_others_before_the_first_step_and_names_the_cure(tmp_path: Path, name: str) -> None:
    model = llama()
    optimizer = KEEPS_NONE[name](model.parameters())
    given = {"optimizers": (optimizer, None)}
    trainer = make_trainer(tmp_path, model, trainer=given, fsam_rho=0.1, fsam_precondition=True)
    with pytest.raises(ValueError, match=r"fsam_precondition=True.*AdamW.*fsam_precondition=False"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)


@pytest.mark.parametrize("name", ["RMSprop", "Adafactor", "torch Adafactor", "Adagrad"])
def test_an_ascent_along_a_momentum_refuses_an_optimizer_without_one_before_the_first_step(
    tmp_path: Path, name: str
) -> None:
    model = llama()
    given = {"optimizers": (KEEPS_NONE[name](model.parameters()), None)}
    trainer = make_trainer(tmp_path, model, trainer=given, fsam_ascent_direction="momentum")
    with pytest.raises(ValueError, match=r"has none .*Choose an optimizer that has one"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(tmp_path, model, trainer=given, fsam_ascent_direction="momentum", fsam_rho=0.0).create_optimizer()


@pytest.mark.parametrize("needs", [{"fsam_precondition": True}, {"fsam_ascent_direction": "momentum"}])
def test_the_optimizer_of_a_deepspeed_configuration_is_left_to_the_engine(tmp_path: Path, needs: dict) -> None:
    trainer = make_trainer(tmp_path, **needs)
    trainer.optimizer = DummyOptim(trainer.model.parameters())
    assert trainer.create_optimizer() is trainer.optimizer


@pytest.mark.parametrize("name", ["SGD", "Lion", "Adamax", "with its own arguments"])
def test_an_ascent_along_a_momentum_takes_optimizers_that_have_one(tmp_path: Path, name: str) -> None:
    model = llama()
    given = {"optimizers": ((KEEPS | KEEPS_NONE)[name](model.parameters()), None)}
    make_trainer(tmp_path, model, trainer=given, fsam_ascent_direction="momentum").create_optimizer()


@pytest.mark.parametrize("name", [name for name in KEEPS_NONE if name != "SparseAdam"])
def test_without_preconditioning_any_optimizer_trains(tmp_path: Path, name: str) -> None:
    model = llama()
    before = model.lm_head.weight.detach().clone()
    optimizer = KEEPS_NONE[name](model.parameters())
    trainer = make_trainer(
        tmp_path, model, trainer={"optimizers": (optimizer, None)}, fsam_rho=0.1, fsam_precondition=False
    )
    trainer.train()
    assert trainer.state.log_history[0]["fsam/radius"] == pytest.approx(0.1, rel=1e-3)
    assert not torch.equal(model.lm_head.weight, before)


def test_the_trainer_works_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = FSAMTrainer(model=llama())
    assert trainer.args.fsam_variant == "functional"
