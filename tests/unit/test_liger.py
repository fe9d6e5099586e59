"""Liger's layers are used and its losses are not, where the step is split at the logits.

Liger's kernels run on an accelerator alone, so a package of its name stands in for it, which takes what the Trainer
tells Liger, and takes over the `forward` of the model where Liger would (liger-kernel 0.8.5).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import is_liger_kernel_available

from hf_fsam import FSAMDiagnosticsCallback
from tests.promises.test_messages import tell_anew
from tests.toys import adapted, gpt2, llama, make_trainer, same_bits, sentences, weights_of

STAND_IN = """
from types import MethodType

TOLD = []


def lce_forward(self, input_ids=None, labels=None, skip_logits=None, **kwargs):
    return type(self).forward(self, input_ids=input_ids, labels=labels, **kwargs)


def _apply_liger_kernel_to_instance(model, **kwargs):
    TOLD.append(kwargs)
    assert not (kwargs.get("cross_entropy") and kwargs.get("fused_linear_cross_entropy", True))
    if kwargs.get("fused_linear_cross_entropy", True):
        model.forward = MethodType(lce_forward, model)
"""
LEFT_OUT = {"fused_linear_cross_entropy": False, "cross_entropy": False}
SPLITS = ("functional", "logit")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What Liger is told, call by call."""
    package = tmp_path / "packages" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.8.5"\n')
    (package / "transformers.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    is_liger_kernel_available.cache_clear()
    import liger_kernel.transformers

    yield liger_kernel.transformers.TOLD
    for name in ("liger_kernel", "liger_kernel.transformers"):
        del sys.modules[name]
    is_liger_kernel_available.cache_clear()


@pytest.mark.parametrize(
    ("variant", "config"), [("functional", None), ("logit", {"rope": False, "fused_linear_cross_entropy": False})]
)
def test_a_split_step_leaves_out_ligers_losses_alone(
    variant: str, config: dict[str, bool] | None, tmp_path: Path, told: Any, caplog: Any
) -> None:
    tell_anew()
    settings: dict[str, Any] = {"fsam_variant": variant, "max_steps": 2}
    plain = make_trainer(tmp_path, **settings)
    plain.train()
    given = dict(config) if config else None
    trainer = make_trainer(tmp_path, use_liger_kernel=True, liger_kernel_config=given, **settings)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert told == [{**(config or {}), **LEFT_OUT}]
    assert f"Its loss is left out for fsam_variant='{variant}'" in caplog.text
    assert trainer.args.liger_kernel_config == config == given  # the user's own
    assert same_bits(weights_of(trainer.model), weights_of(plain.model))
    assert not trainer.fsam.boundary.head.off
    # The Trainer passes `skip_logits=True`, which is for Liger's forward.
    assert trainer.evaluate(sentences(4))["eval_loss"] == plain.evaluate(sentences(4))["eval_loss"]
    trainer.train()
    assert told[1] == told[0]


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("none", None),
        ("sam", None),
        ("none", {"fused_linear_cross_entropy": True}),
        ("none", {"fused_linear_cross_entropy": False, "cross_entropy": True}),
    ],
)
def test_what_needs_no_boundary_leaves_liger_alone(
    variant: str, config: dict[str, bool] | None, tmp_path: Path, told: Any
) -> None:
    settings: dict[str, Any] = {"fsam_variant": variant, "liger_kernel_config": config}
    make_trainer(tmp_path, use_liger_kernel=True, max_steps=1, **settings).train()
    assert told == [config or {}]


@pytest.mark.parametrize("config", [None, {"rope": False}])
def test_a_checkpoint_has_the_users_own_settings(config: dict[str, bool] | None, tmp_path: Path, told: Any) -> None:
    saves: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, use_liger_kernel=True, liger_kernel_config=config, **saves)
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert told == [{**(config or {}), **LEFT_OUT}]
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert args.liger_kernel_config == config
    assert trainer.callback_handler.callbacks == callbacks


def test_settings_are_the_users_own_where_the_training_does_not_begin(tmp_path: Path, told: Any) -> None:
    trainer = make_trainer(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert trainer.args.liger_kernel_config is None


def test_the_model_under_adapters_is_told_too(tmp_path: Path, told: Any) -> None:
    trainer = make_trainer(tmp_path, adapted(gpt2()), use_liger_kernel=True, max_steps=1)
    trainer.train()
    assert told == [LEFT_OUT]


@pytest.mark.parametrize("loss", LEFT_OUT)
@pytest.mark.parametrize("variant", SPLITS)
def test_a_loss_of_ligers_that_is_asked_for_is_refused(variant: str, loss: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fsam_variant": variant, "use_liger_kernel": True, "liger_kernel_config": {loss: True}}
    with pytest.raises(ValueError, match=rf"liger_kernel_config=.'{loss}': True. with fsam_variant='{variant}'"):
        make_trainer(tmp_path, **settings)


def test_a_model_whose_forward_is_ligers_is_refused(tmp_path: Path, told: Any) -> None:
    """As `AutoLigerKernelForCausalLM` and Liger's own functions leave it, and a plain training before this one."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = gpt2()
    _apply_liger_kernel_to_instance(model)
    for each in (model, adapted(model)):
        with pytest.raises(ValueError, match=r"a model whose forward pass is Liger's"):
            make_trainer(tmp_path, each)
        make_trainer(tmp_path, each, fsam_variant="sam")


def test_a_variant_that_begins_to_split_in_the_middle_is_refused(tmp_path: Path, told: Any) -> None:
    trainer = make_trainer(tmp_path, fsam_variant="none", use_liger_kernel=True)
    later = TrainerCallback()
    later.on_step_begin = lambda args, state, control, **_: setattr(args, "fsam_variant", "functional")
    trainer.add_callback(later)
    with pytest.raises(ValueError, match=r"a model whose forward pass is Liger's"):
        trainer.train()


@pytest.mark.parametrize("variant", ["none", pytest.param("sam", marks=pytest.mark.slow)])
def test_diagnostics_of_ligers_loss_are_refused(variant: str, tmp_path: Path, told: Any) -> None:
    settings: dict[str, Any] = {"fsam_variant": variant, "use_liger_kernel": True, "max_steps": 1}
    for by in ({"fsam_diagnostics_steps": 1}, {"trainer": {"callbacks": [FSAMDiagnosticsCallback(every=1)]}}):
        trainer = make_trainer(tmp_path, **settings, **by)
        with pytest.raises(ValueError, match=r"the loss of this LlamaForCausalLM is Liger's"):
            trainer.train()
        assert trainer.state.global_step == 0
    config = {"fused_linear_cross_entropy": False}
    trainer = make_trainer(tmp_path, liger_kernel_config=config, fsam_diagnostics_steps=1, **settings)
    trainer.train()
    assert any("fsam/logit_path" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("variant", ["functional", "none"])
def test_trls_trainers_leave_out_the_loss_by_themselves(variant: str, tmp_path: Path, told: Any) -> None:
    from tests.parity.test_trl import FSAMSFTConfig, FSAMSFTTrainer, conversations
    from tests.parity.test_trl import make_trainer as make_sft_trainer

    trainer = make_sft_trainer(
        tmp_path,
        FSAMSFTTrainer,
        FSAMSFTConfig,
        llama(),
        conversations(),
        fsam_variant=variant,
        fsam_precondition=False,
        use_liger_kernel=True,
    )
    trainer.train()
    assert told == [LEFT_OUT if variant in SPLITS else {"fused_linear_cross_entropy": False}]
