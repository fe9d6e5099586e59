"""What each process of a distributed test runs: `python -m tests.engines.worker FOLDER` trains the cases that
FOLDER/cases.json lists."""

import gc
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from benchmarks.collectives import Collectives
from benchmarks.peak_memory import PeakMemory
from hf_fsam import FSAMTrainer, perturbation
from hf_fsam.heads import fused_loss
from tests.engines.distributed import gated, normed, without_labels
from tests.toys import WIDE, adapted, gpt2, llama, make_trainer, sentences

KEPT = fused_loss._KEPT["cpu"]


def shard_on_cpu() -> None:
    """Accelerate turns FSDP on CPU processes into DDP without a word (1.15): have it do what it was asked for."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def start_anew() -> None:
    """A training in this process must not see what the one before it set up."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def whole(model: nn.Module, deepspeed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and their float32 masters, gathered."""
    parameters = dict(model.named_parameters())
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    gathered: Any = nullcontext()
    masters = {}
    if deepspeed:
        import deepspeed as ds
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = ds.zero.GatheredParameters(sharded) if sharded else nullcontext()
        for name, parameter in parameters.items():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None:
                masters[name] = master.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    with gathered:
        weights = {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
            for name, parameter in parameters.items()
        }
    return weights, weights | masters


def strike(trainer: Any, kind: str, step: int, rank: int | None = None) -> None:
    """In the second pass of `step` (from 0), on one process or on all: "kill" and "terminate" send that signal,
    "hang" waits for ever, "raise" raises between forward and backward, and "memory" what auto_find_batch_size takes for
    too little memory. "write" changes the logits in place in the clean
    pass before."""
    compute_loss, calls = trainer.compute_loss, 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if kind == "write":
            if calls == 2 * step + 1 and rank in (None, trainer.args.process_index):
                loss, outputs = compute_loss(*args, return_outputs=True, **kwargs)
                outputs.logits[..., 0] = 0.0
                return loss
        elif calls == 2 * step + 2 and rank in (None, trainer.args.process_index):
            if kind == "raise":
                compute_loss(*args, **kwargs)
                raise RuntimeError("struck in the second pass")
            if kind == "memory":
                compute_loss(*args, **kwargs)
                raise RuntimeError("CUDA out of memory.")
            if kind == "hang":
                time.sleep(10_000)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[kind])
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = struck


def save_at_once(trainer: Any) -> None:
    """On SIGTERM, with `enable_jit_checkpoint`; by itself it waits three seconds."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback) and callback.jit_manager is not None:
            callback.jit_manager.kill_wait = 0


class Progress(TrainerCallback):
    """Tells in a file named after each process which step that has begun."""

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / str(os.getpid())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_text(str(state.global_step))


class Measured(TrainerCallback):
    """What the third step takes: bytes at once, and what passes between the processes."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory, self.collectives = memory, Collectives()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            gc.collect()
            self.memory.peak = self.memory.current
            self.collectives.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.collectives.__exit__(None, None, None)
            self.peak = self.memory.peak


def seams(piece: str, adaptive: bool, first: int) -> type[FSAMTrainer]:
    """A trainer that perturbs the weights with `piece` in their name and, if it is adaptive, in proportion to their
    squares. "attn on one": in the first process alone. It ascends on the first so many tokens; 0: on all."""

    class Seams(FSAMTrainer):
        def fsam_perturbs(self, name: str, weight: Tensor) -> bool:
            if piece == "attn on one":
                return not PartialState().is_main_process or "attn" in name
            return piece in name

        def fsam_ascent_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[:, :first] for name, value in inputs.items()} if first else inputs

        def fsam_direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
            if adaptive:
                for weight, gradient in zip(weights, gradients, strict=True):
                    gradient.mul_(weight.to(gradient.device).square())

    return Seams


@torch.no_grad()
def assert_finite(logits: Any) -> None:
    assert logits.exp().isfinite().all()


def train(
    folder: Path,
    lora: bool = False,
    wide: bool = False,
    untied: bool = False,
    sometimes: bool = False,
    statistics: bool = False,
    reads: bool | str = False,
    measured: bool = False,
    rows: int = 24,
    masked: bool = False,
    unlabelled: Sequence[int] = (),
    ddp: dict[str, Any] | None = None,
    resume: str | None = None,
    save_to: str | None = None,
    evaluated: bool = False,
    struck: dict[str, Any] | None = None,
    progress: str | None = None,
    perturbs: str = "",
    adaptive: bool = False,
    first: int = 0,
    **settings: Any,
) -> tuple[Any, ...]:
    """One case.

    Args:
        lora: train adapters.
        wide: a Llama of a million weights, in place of GPT-2 of seven thousand.
        untied: a Llama of six thousand, whose head is a matrix of its own; no cotangent is kept, as of a large model.
        sometimes: GPT-2 with a weight that not every row uses, :func:`tests.engines.distributed.gated`.
        statistics: GPT-2 with running ones, :func:`tests.engines.distributed.normed`.
        reads: a metric takes the logits; "one": on the first process alone, and not before its fifth pass.
        measured: find out what :class:`Measured` tells.
        rows, masked: of the data, :func:`tests.toys.sentences`.
        unlabelled: which rows have no label.
        ddp: arguments of Accelerate's DistributedDataParallelKwargs, beside the Trainer's own.
        resume: a checkpoint.
        save_to: where the model is saved at the end.
        evaluated: find out the loss on four rows, before that.
        struck: arguments of :func:`strike`.
        progress: where :class:`Progress` tells.
        perturbs, adaptive, first: arguments of :func:`seams`.
    """
    if "ddp_timeout" in settings:  # which the Trainer hands on for every device but the CPU (transformers 5.23)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=settings["ddp_timeout"]))
    model = llama(**WIDE) if wide else llama() if untied else gpt2()
    if reads:
        passes = itertools.count()

        def read(module: nn.Module, args: Any, output: Any) -> None:
            if reads != "one" or (PartialState().is_main_process and next(passes) >= 4):
                assert_finite(output.logits)

        model.register_forward_hook(read)
    if sometimes:
        gated(model)
    if statistics:
        normed(model)
    trainer = make_trainer(
        folder,
        adapted(model) if lora else model,
        seams(perturbs, adaptive, first),
        train_sampling_strategy="sequential",
        trainer={"train_dataset": without_labels(sentences(rows, masked=masked), unlabelled)},
        **settings,
    )
    for name, value in (ddp or {}).items():
        setattr(trainer.accelerator.ddp_handler, name, value)
    fused_loss._KEPT["cpu"] = 0 if untied else KEPT
    save_at_once(trainer)
    if struck is not None:
        strike(trainer, **struck)
    if progress is not None:
        trainer.add_callback(Progress(progress))
    with PeakMemory() if measured else nullcontext() as memory:
        if measured:
            trainer.add_callback(callback := Measured(memory))
            perturbation._CHUNK["cpu"] = 1 << 13  # temporaries as small beside this model as beside a large one
        # A strike at all processes, unlike one at a single one, is an interruption that the caller may survive.
        survives = struck is not None and struck["kind"] == "raise" and "rank" not in struck
        with suppress(RuntimeError) if survives else nullcontext():
            trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate(sentences(4))["eval_loss"] if evaluated else None
    if save_to is not None:
        trainer.save_model(save_to)
    weights, masters = whole(trainer.model, trainer.is_deepspeed_enabled)
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    facts = {
        "processes": trainer.args.world_size,
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        # How many backward passes ZeRO believes to be in (0.19.8).
        "depth": getattr(getattr(trainer.model_wrapped, "optimizer", None), "_backward_active_depth", 0),
        "fused": bool(trainer.fsam.boundary.head and not trainer.fsam.boundary.head.off),
        "ddp": hasattr(trainer.model_wrapped, "no_sync"),
        "loss": loss,
        "statistics": gather_object([buffers]),
    }
    if measured:
        facts |= {"peak": callback.peak, "calls": dict(callback.collectives.calls), "bytes": callback.collectives.bytes}
    return weights, masters, trainer.state.log_history, facts


def main(train: Callable[..., tuple[Any, ...]]) -> None:
    """Run `train` on every case of the folder that the command names, and leave there what it returns."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    shard_on_cpu()
    for index, case in enumerate(json.loads((folder / "cases.json").read_text())):
        start_anew()
        gc.collect()
        gc.freeze()  # what is imported by now: Accelerate has garbage looked for in it after each training
        result = train(folder, **case)
        if PartialState().is_main_process:
            torch.save(result, folder / f"{index}.pt")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo's that hands a tensor back while the interpreter shuts down aborts the process (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(train)
