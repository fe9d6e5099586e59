"""The checks, in order of value. Expected values were written before any of them had run on a GPU.

Each check yields one :class:`Row` after the other; `toy` asks for a size that a CPU takes seconds for. The device is
that of the tests (HF_FSAM_TEST_DEVICE, which the runner sets). What is trained here is compared with plain PyTorch,
with the plain Trainer or, where an engine holds the weights, with one plain process.
"""

import gc
import importlib.util
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from benchmarks import step_cost
from benchmarks.gpu.check import Check, Row
from benchmarks.peak_memory import PeakMemory
from hf_fsam import FSAMTrainer, perturbation
from hf_fsam.engines.deepspeed_internals import gathering_stream
from hf_fsam.heads import deferred_logits
from hf_fsam.heads.fused_loss import FusedLoss, Gradients, LogitTransform, cross_entropy_sum, vjp
from tests.toys import DEVICE, WIDE, distance, llama, make_trainer, same_bits, weights_of

ROOT = Path(__file__).parents[2]
PARITY, COMPATIBILITY = "tests/parity/test_parity.py", "tests/parity/test_compatibility.py"
RHO = 0.03
ACTIVE = ("sam", "functional", "logit")
Rows = Iterator[Row]


# Helpers --------------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, **arguments: Any) -> FSAMTrainer:
    """A Trainer that has trained `model` for six steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, model, **({"logging_steps": 1, "fsam_rho": RHO} | arguments))
        trainer.train()
    return trainer


def steps(trainer: FSAMTrainer) -> list[dict[str, float]]:
    """A log line for each step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def below(what: str, measured: float, limit: float) -> Row:
    return Row(what, f"{measured:.2e}", f"< {limit:.0e}", measured < limit)


def module() -> Any:
    return torch.get_device_module(DEVICE)


def synchronize() -> None:
    if DEVICE.type != "cpu":
        module().synchronize()


def peak_of(work: Callable[[], Any]) -> int:
    """The peak of the bytes in memory while `work` runs, beyond those before."""
    gc.collect()
    if DEVICE.type == "cpu":
        with PeakMemory() as memory:
            work()
        return memory.peak
    module().reset_peak_memory_stats()
    before = module().memory_allocated()
    work()
    synchronize()
    return module().max_memory_allocated() - before


def seconds_of(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


# The fused head's numbers ---------------------------------------------------------------------------------------------


def linear_and_targets(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(v, d, device=DEVICE)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), device=DEVICE)


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[FusedLoss, Gradients]:
    fused = FusedLoss(hidden.detach(), weight.detach(), None, hidden.dtype, LogitTransform(), targets=targets)
    gradients = cross_entropy_sum(fused, (True, True, False))
    assert gradients is not None
    return fused, gradients


def head(toy: bool) -> Rows:
    """Compares the fused head with float64: its loss, its gradients, and those of the second pass, column by column."""
    n, d, v = (64, 32, 512) if toy else (2048, 2048, 32_768)
    for dtype, limit in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)):
        hidden, weight, targets = linear_and_targets(n, d, v, dtype)
        fused, ours = fused_loss(hidden, weight, targets)
        again, _ = vjp(fused, None, hidden.detach(), weight.detach(), None, (True, False))
        h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
        exact = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for some in torch.arange(n, device=DEVICE).split(256):  # all logits in float64 would be large
            part = F.cross_entropy(h[some] @ w.t(), targets[some], reduction="sum")
            part.backward()
            exact += part.detach()
        for what, found, wanted in (
            ("loss", fused.value, exact),
            ("∂/∂h", ours.hidden, h.grad),
            ("∂/∂W", ours.weight, w.grad),
            ("second pass ∂/∂h", again.hidden, h.grad),
            ("second pass ∂/∂W", again.weight, w.grad),
        ):
            error = (found.detach().double() - wanted).norm() / wanted.norm()
            yield below(f"{str(dtype)[6:]}: {what}, relative error", float(error), limit)


def head_cost(toy: bool) -> Rows:
    """Compares the fused head's loss with Liger's and with logits in memory: time, and peak memory."""
    n, d, v = (128, 32, 4096) if toy else (8192, 2048, 131_072)
    hidden, weight, targets = linear_and_targets(n, d, v, torch.bfloat16)

    def logits() -> None:
        F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum").backward()

    def fused() -> None:
        fused_loss(hidden, weight, targets)

    arms: dict[str, Callable[[], None]] = {"logits in memory": logits, "fused head": fused}
    if importlib.util.find_spec("liger_kernel") is not None and DEVICE.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        arms["Liger"] = lambda: liger(weight, hidden, targets).backward()
    else:
        yield Row("Liger's loss", "not installed" if DEVICE.type == "cuda" else "not on this device")

    peaks, seconds = {}, {name: [] for name in arms}
    for name, arm in arms.items():
        arm()  # so that everything is compiled and tuned before it is measured
        hidden.grad = weight.grad = None
        peaks[name] = peak_of(arm)
    for _ in range(3 if toy else 20):  # in turn, so that other work on the machine slows all of them alike
        for name, arm in arms.items():
            hidden.grad = weight.grad = None
            seconds[name].append(seconds_of(arm))
    gradient = weight.numel() * weight.itemsize
    for name in arms:
        low, middle, high = step_cost.quartiles(seconds[name])
        spread = f"{1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})"
        yield Row(name, f"{spread}, {peaks[name] / 2**20:.0f} MiB, {gradient / 2**20:.0f} of them W's gradient")
    share = peaks["fused head"] / peaks["logits in memory"]
    # At toy size the head's tile is as large as the logits.
    yield Row("fused head's peak / logits'", f"{share:.2f}", "<= 0.25", None if toy else share <= 0.25)
    if "Liger" in arms:
        share = peaks["fused head"] / peaks["Liger"]
        yield Row("fused head's peak / Liger's", f"{share:.2f}", "<= 1.3", share <= 1.3)
        ratio = statistics.median(a / b for a, b in zip(seconds["fused head"], seconds["Liger"], strict=True))
        yield Row("fused head's time / Liger's", f"{ratio:.2f}", "<= 1.3", ratio <= 1.3)


# The step -------------------------------------------------------------------------------------------------------------


def theta(toy: bool) -> Rows:
    """With a learning rate of 0 the weights return bit for bit, and the radius is ρ."""
    for dtype, share in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        for variant in ACTIVE:
            model = llama(hidden_size=64, intermediate_size=256).to(dtype)
            before = weights_of(model)
            trainer = trained(model, fsam_variant=variant, learning_rate=0.0, weight_decay=0.0)
            alike = same_bits(weights_of(trainer.model), before)
            yield Row(f"{str(dtype)[6:]}, {variant}: θ, bit for bit", alike, "True", alike)
            radius = statistics.mean(line["fsam/radius"] for line in steps(trainer))
            off = abs(radius / RHO - 1)
            yield Row(f"{str(dtype)[6:]}, {variant}: radius / ρ", f"{radius / RHO:.4f}", f"1 ± {share}", off < share)


class _Overflowing(FSAMTrainer):
    """Trains with a loss scale that is too high at first."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**22)


def half(toy: bool) -> Rows:
    """In fp16, steps whose loss scale is too high are skipped and counted, and all others have the radius ρ."""
    for name, settings in {
        "functional": {},
        "sam": {"fsam_variant": "sam"},
        "preconditioned, fused AdamW": {"fsam_precondition": True, "optim": "adamw_torch_fused"},
        "preconditioned, for-loop AdamW": {"fsam_precondition": True, "optim": "adamw_torch"},
        "accumulation 2": {"gradient_accumulation_steps": 2},
    }.items():
        trainer = trained(llama(), trainer_class=_Overflowing, fp16=True, max_steps=12, **settings)
        lines = steps(trainer)
        finite = [torch.tensor(line["grad_norm"]).isfinite().item() for line in lines]
        counted = [line["fsam/skipped"] == 0 for line in lines]
        yield Row(f"{name}: steps that overflow", finite.count(False), ">= 1, and < 12", 0 < finite.count(False) < 12)
        yield Row(f"{name}: these are the skipped ones", counted == finite, "True", counted == finite)
        radii = [line["fsam/radius"] / RHO for line, ok in zip(lines, finite, strict=True) if ok]
        worst = max((abs(radius - 1) for radius in radii), default=1.0)
        yield Row(f"{name}: radius / ρ of the others, at most off by", f"{worst:.1e}", "< 0.01", worst < 0.01)


def dropout(toy: bool) -> Rows:
    """With dropout and ρ → 0, both passes draw the same masks in each attention, and the random streams end alike."""
    # Relative to what dropout changes, since a backward pass that adds in no fixed order differs between any two runs.
    # In bfloat16 with the logits in memory: the fused head rounds otherwise than the model's head.
    narrow = {"bf16": True, "fsam_fused_head": False}
    backends: dict[SDPBackend, tuple[dict[str, Any], float]] = {
        SDPBackend.MATH: ({}, 1e-4),
        SDPBackend.EFFICIENT_ATTENTION: ({}, 1e-3),
        SDPBackend.FLASH_ATTENTION: (narrow, 1e-3),
        SDPBackend.CUDNN_ATTENTION: (narrow, 1e-3),
    }

    def end(dropout: float, **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
        model = llama(dropout, hidden_size=64, num_attention_heads=2)
        trainer = trained(model, optim="sgd", learning_rate=0.3, **settings)
        return weights_of(trainer.model), torch.get_rng_state() if DEVICE.type == "cpu" else module().get_rng_state()

    for backend, (precision, limit) in backends.items():
        with sdpa_kernel(backend):
            try:
                plain, stream = end(0.2, fsam_variant="none", **precision)
            except RuntimeError as error:
                yield Row(backend.name, f"not here: {str(error).splitlines()[0][:80]}")
                continue
            changes = distance(end(0.0, fsam_variant="none", **precision)[0], plain)
            for variant in ACTIVE:
                weights, after = end(0.2, fsam_variant=variant, fsam_rho=1e-9, **precision)
                yield below(f"{backend.name}: {variant} from plain", distance(weights, plain) / changes, limit)
                alike = torch.equal(after, stream)
                yield Row(f"{backend.name}: {variant}, random stream as plain's", alike, "True", alike)


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator, by operation and by the line that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.own: Counter[str] = Counter()  # at lines of the package
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(tensor.device.type == DEVICE.type for tensor in tensors)
        masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors)
        # A copy to the host makes it wait; from the CPU none does.
        home = name in ("_to_copy", "copy_") and DEVICE.type != "cpu" and result.device.type == "cpu"
        asks = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        if there and (masked or home or asks):
            frame: Any = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            # A backward pass runs in a thread of the device's own, where an operation of autograd's has no caller.
            file = Path(frame.f_code.co_filename if frame is not None else "")
            if "hf_fsam" in file.parts:
                self.own[f"{name} at {file.name}:{frame.f_lineno}"] += 1
            else:
                self.others += 1
        return result


class _Around(TrainerCallback):
    """Enters a context for the fourth step alone, in which nothing happens for the first time."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.context.__exit__(None, None, None)


WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def waits(toy: bool) -> Rows:
    """Compares the host's waits for the device in a step with the plain Trainer's, by operation and by profiler."""

    def count(settings: dict[str, Any]) -> tuple[_Waits, int]:
        quiet = {"logging_strategy": "no"} | settings
        trained(llama(), trainer={"callbacks": [_Around(seen := _Waits())]}, **quiet)
        if DEVICE.type != "cuda":
            return seen, 0
        profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        trained(llama(), trainer={"callbacks": [_Around(profiler)]}, **quiet)
        return seen, sum(event.count for event in profiler.key_averages() if event.key in WAITING_CALLS)

    if DEVICE.type == "cpu":  # as it would on a device that the host can wait for
        deferred_logits.leaving_out_is_free = lambda device: False
    plain, plain_calls = count({"fsam_variant": "none"})
    yield Row("plain Trainer", f"{plain.others} ops, {plain_calls} calls")
    for name, settings in {
        "functional": {},
        "logits in memory": {"fsam_fused_head": False},
        "sam": {"fsam_variant": "sam"},
        "logit": {"fsam_variant": "logit"},
        "preconditioned": {"fsam_precondition": True},
        "momentum": {"fsam_ascent_direction": "momentum"},
        "label smoothing": {"label_smoothing_factor": 0.1},
        "hidden states offloaded": {"fsam_offload_hidden_states": True},
    }.items():
        found, calls = count(settings)
        own = ", ".join(f"{number} {what}" for what, number in found.own.items()) or "none"
        # A model that waits in its forward pass does so in every pass.
        again = found.others - plain.others
        ok = not found.own and calls - plain_calls <= max(0, again)
        if "fsam_offload_hidden_states" in settings:  # the copy to the host has to arrive
            ok = None
        yield Row(
            name, f"{own}; {calls - plain_calls} calls more, {again} ops more elsewhere", "none; 0, or as ops", ok
        )


def optimizers(toy: bool) -> Rows:
    """Preconditioning with for-loop, foreach, fused and capturable AdamW agrees with plain PyTorch."""
    from tests import reference
    from tests.parity.test_parity import Setting, expected, train_with_trainer
    from tests.zoo import CASES

    setting, case = Setting("functional", precondition=True, accumulation=3), CASES["gpt2"]
    wanted = expected("gpt2", setting)
    kinds = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    if DEVICE.type == "cuda":
        kinds |= {"capturable": {"capturable": True}, "fused, capturable": {"fused": True, "capturable": True}}
    for name, kind in kinds.items():

        def factory(model: nn.Module, kind: dict[str, Any] = kind) -> torch.optim.Optimizer:
            weights = reference.trainable(model).values()
            return torch.optim.AdamW(weights, lr=0.005, betas=(0.9, 0.95), eps=1e-3, **kind)

        model = case.model()
        with tempfile.TemporaryDirectory() as folder:
            train_with_trainer(model, case.examples(setting.examples), setting, factory, Path(folder))
        weights = {key: weight.detach().cpu() for key, weight in reference.trainable(model).items()}
        yield below(f"{name}: weights from the formulas'", distance(weights, wanted), 1e-5)


def determinism(toy: bool) -> Rows:
    """With full_determinism, two trainings in bf16 and with dropout end on the same bits."""
    for variant in ACTIVE:
        ends = [
            weights_of(trained(llama(0.1), fsam_variant=variant, bf16=True, full_determinism=True).model)
            for _ in range(2)
        ]
        yield Row(f"{variant}: the same bits", alike := same_bits(*ends), "True", alike)


def memory(toy: bool) -> Rows:
    """The peak of three steps is that of plain training and one copy of the weights."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    sizes = WIDE if toy else large | {"vocab_size": 8192}
    peaks = {}
    for variant in ("none", "sam", "functional"):
        model = llama(**sizes)
        copy = sum(weight.numel() * weight.itemsize for weight in model.parameters())
        peaks[variant] = peak_of(lambda model=model, variant=variant: trained(model, fsam_variant=variant, max_steps=3))
        del model
    for variant in ("sam", "functional"):
        more = peaks[variant] - peaks["none"]
        # Chunks of numbers and tiles of the head are temporary tensors whose size does not depend on the model.
        room = 1.05 * copy + 2**26
        yield Row(f"{variant}: copies more", f"{more / copy:.3f}", f"<= {room / copy:.2f}", more <= room)


# Time -----------------------------------------------------------------------------------------------------------------


def kernels(toy: bool) -> Rows:
    """Compares the Triton kernels with plain PyTorch: the radius of a perturbation of 0.8B weights, and its time."""
    count, side = (4, 64) if toy else (200, 2048)
    for dtype, passes_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        name = f"{str(dtype)[6:]} weights, passes in {str(passes_dtype)[6:]}"
        weights = [torch.randn(side, side, device=DEVICE).mul_(0.02).to(dtype) for _ in range(count)]
        generator = torch.Generator(DEVICE).manual_seed(0)
        ways = {"kernels": perturbation.kernels_for, "plain": lambda device_type: None}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(3 if toy else 10):
            for way, kernels_for in ways.items():
                gradients = [torch.randn_like(weight) for weight in weights]
                perturbation.kernels_for = kernels_for
                synchronize()
                start = time.perf_counter()
                result = perturbation.perturb(weights, gradients, RHO, generator, passes_dtype=passes_dtype)
                synchronize()
                seconds[way].append(time.perf_counter() - start)
                off = abs(float(result.radius) / RHO - 1)
                del gradients, result
                if off >= 0.01:
                    yield below(f"{name}, {way}: radius / ρ, off by", off, 0.01)
        perturbation.kernels_for = ways["kernels"]
        for way, times in seconds.items():
            yield Row(f"{name}, {way}", f"{1e3 * statistics.median(times):.1f} ms")
        share = statistics.median(a / b for a, b in zip(seconds["kernels"], seconds["plain"], strict=True))
        yield Row(f"{name}: kernels' time / plain's", f"{share:.2f}", "<= 0.3", None if toy else share <= 0.3)


TOY_MODEL = "--hidden 64 --layers 1 --vocabulary 128 --length 32 --batch 2 --rounds 3 --threads 1"
MODELS = {  # each with the goal for the time of a step, as a multiple of the plain step
    "0.5B": (1.85, "--hidden 896 --intermediate 4864 --layers 24 --vocabulary 151936 --tied --batch 8 --length 1024"),
    "1B": (1.95, "--hidden 2048 --intermediate 5632 --layers 22 --vocabulary 32000 --batch 8 --length 512"),
}


def cost(model: str, dtype: str, toy: bool) -> Rows:
    """Compares time and memory of a step with the plain Trainer's, interleaved; a Llama with weights of"""
    goal, sizes = MODELS[model]
    # All models are in memory at once, and in float32 there is room for one beside the plain Trainer's.
    others = ["sam", "functional, preconditioned", "momentum"] if dtype == "bfloat16" and not toy else []
    arms = ["--arms", "functional", *others]
    report = step_cost.main([*(TOY_MODEL if toy else sizes).split(), *arms, "--dtype", dtype])
    copy = report["setting"]["one copy of the weights, MiB"]
    for arm in report["arms"]:
        low, high = arm["ratio_quartiles"]
        name, ratio, more = arm["arm"], arm["ratio_median"], arm["peak_beyond_plain_mib"]
        time_of = f"{1e3 * arm['seconds_median']:.1f} ms, {ratio:.2f} ({low:.2f} to {high:.2f}) of plain's"
        if name != "functional":
            yield Row(name, f"{time_of}, {arm['peak_mib']:.0f} MiB, {more:+.0f}")
        else:
            yield Row(f"{name}: step", time_of, f"<= {goal}", None if toy else ratio <= goal)
            yield Row(
                f"{name}: peak beyond plain's", f"{more:.0f} MiB", f"<= a copy, {copy:.0f}", more <= 1.05 * copy + 64
            )


# Engines --------------------------------------------------------------------------------------------------------------

ENGINES = ("zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_all", "fsdp2")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"fsam_variant": "none"},
    "functional": {},
    "sam": {"fsam_variant": "sam"},
    "preconditioned": {"fsam_precondition": True},
    "momentum": {"fsam_ascent_direction": "momentum"},
    "accumulated, over the window": {"gradient_accumulation_steps": 2, "fsam_ascent_scope": "optimizer_step"},
}


SLOWLY = {"learning_rate": 1e-3}
LATE = 200_000_000  # cycles, a tenth of a second, by which a write is delayed


def engine_model(toy: bool) -> nn.Module:
    """A model with matrices of more numbers than one chunk on the host, and fewer than one on a device. The weights are
    as small as usual, so that training does not amplify rounding."""
    sizes = WIDE if toy else {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    return llama(**sizes, initializer_range=0.02)


def as_one_of_one_process() -> None:
    """Puts the Trainers that follow into a process group of one process, with NCCL on a GPU and gloo on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in (names | {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}).items()}
    if DEVICE.type == "cpu":
        from tests.engines.worker import shard_on_cpu

        os.environ["DS_ACCELERATOR"] = "cpu"
        shard_on_cpu()


def engine(name: str, toy: bool) -> Rows:
    """One process under an engine trains to the weights of one plain process, in float32:"""
    from tests.engines.distributed import ENGINES as SETTINGS
    from tests.engines.worker import start_anew, whole

    cases = {case: CASES[case] for case in ("plain", "functional", "momentum")} if toy else CASES
    wanted = {
        case: weights_of(trained(engine_model(toy), **SLOWLY, **settings).model) for case, settings in cases.items()
    }
    as_one_of_one_process()
    for case, settings in cases.items():
        start_anew()
        trainer = trained(engine_model(toy), **SETTINGS[name], **SLOWLY, **settings)
        kind = type(trainer.fsam.engine).__name__
        yield Row(f"{case}: held by", kind, "not LocalEngine", kind != "LocalEngine")
        weights = {key: weight.cpu() for key, weight in whole(trainer.model, trainer.is_deepspeed_enabled)[0].items()}
        one = {key: wanted[case][key] for key in weights}  # without a tied head, which is not a separate parameter
        yield below(f"{case}: weights from one process's", distance(weights, one), 1e-5)
        apart = distance(one, {key: wanted["plain"][key] for key in weights})
        if case != "plain":
            yield Row(f"{case}: of what differs from plain", f"{apart:.1e}", "> 1e-4", apart > 1e-4)


def overlap(toy: bool) -> Rows:
    """ZeRO-3 gathers on a separate stream, and no gather may overtake what is still being written into the shards."""
    as_one_of_one_process()
    for variant in ACTIVE:
        passed = gathers_that_could_pass(variant, toy)
        yield Row(f"{variant}: not ordered", f"{sum(passed)} of {len(passed)}", "0", bool(passed) and not any(passed))


def gathers_that_could_pass(variant: str, toy: bool) -> list[bool]:
    """Each time the weights have moved, notes whether a gather that begins then would read the values before."""
    from tests.engines.distributed import zero
    from tests.engines.worker import start_anew

    start_anew()
    settings = zero(3)
    settings["deepspeed"]["zero_optimization"]["overlap_comm"] = True
    # DeepSpeed's timer makes the host wait for the device in each step, which would hide the race.
    settings["deepspeed"]["timers"] = {"throughput": {"enabled": False}}
    passed: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, engine_model(toy), fsam_variant=variant, **settings)
        perturbed = trainer.fsam.engine.perturbed

        def ask() -> None:
            gathers = torch.cuda.Event()
            gathers.record(gathering_stream(trainer.model_wrapped))
            time.sleep(0.01)
            passed.append(gathers.query() and not torch.cuda.current_stream().query())

        @contextmanager
        def watched(perturbation: Any) -> Iterator[None]:
            torch.cuda._sleep(LATE)
            with perturbed(perturbation):
                ask()
                yield
                torch.cuda._sleep(LATE)
            if variant == "logit":  # a pass follows; with the other variants θ has returned before the optimizer's step
                ask()

        trainer.fsam.engine.perturbed = watched
        trainer.train()
    return passed


# Tests, recipes, studies ----------------------------------------------------------------------------------------------


def suite(arguments: str, toy: bool, toy_arguments: str = "") -> Rows:
    """Runs tests of the package with their Trainers on this device: pytest"""
    chosen = toy_arguments if toy else arguments
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(chosen)]
    cores = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is not None and cores >= 8 and not toy:
        command += ["-n", str(min(8, cores // 2)), "--dist", "worksteal"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    bad = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in bad[:20]:
        yield Row(line.split(" - ")[0], line.split(" - ")[-1][:200], "passes", False)
    last = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
    yield Row(chosen, last, "all pass", done.returncode == 0)


def recipe(toy: bool) -> Rows:
    """In fifty steps of the 24M recipe in bf16 nothing is NaN, and the radius is ρ."""
    import json

    small = ["--corpus_installed", "false", "--vocab_size", "512", "--hidden_size", "32", "--intermediate_size", "32"]
    small += ["--layers", "1", "--heads", "2", "--sequence_length", "64", "--per_device_train_batch_size", "2"]
    small += ["--use_cpu", str(DEVICE.type == "cpu"), "--validation_blocks", "4"]
    count = 4 if toy else 50
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "recipes/pretrain.py", "recipes/configs/packages_24m.yaml", "--output_dir", folder]
        command += ["--max_steps", str(count), "--logging_steps", "1", "--eval_strategy", "no", "--warmup_steps", "5"]
        subprocess.run([*command, *(small if toy else [])], cwd=ROOT, check=True)
        history = json.loads(Path(folder, "results.json").read_text("utf-8"))["history"]
    lines = [line for line in history if "fsam/radius" in line]
    losses = torch.tensor([line["loss"] for line in lines])
    fine = bool(losses.isfinite().all()) and (toy or bool(losses[-1] < losses[0]))  # four steps teach nothing
    yield Row("losses", f"{losses[0]:.3f} to {losses[-1]:.3f}", "finite, falling", fine)
    worst = max(abs(line["fsam/radius"] / RHO - 1) for line in lines)
    yield Row("radius / ρ, at most off by", f"{worst:.1e}", "< 0.01", worst < 0.01)


def studies(toy: bool) -> Rows:
    """Runs the studies at 24M weights (recipes/studies/gpu.yaml), from where they were."""
    out = ROOT / "outputs" / "studies_24m"
    subprocess.run(
        [sys.executable, "-m", "hf_fsam", "compare", "recipes/studies/gpu.yaml", "--out", str(out)],
        cwd=ROOT,
        check=True,
    )
    for report in sorted(out.glob("*.md")):
        yield Row(report.stem, f"{report.relative_to(ROOT)} written")


CHECKS: dict[str, Check] = {
    "head": Check(head, 120),
    "theta": Check(theta, 120),
    "half": Check(half, 120, cpu=False),
    "perturbation": Check(
        partial(
            suite,
            "tests/unit/test_perturbation.py",
            toy_arguments="tests/unit/test_perturbation.py -k 'seed_decides'",
        ),
        120,
        ("pytest",),
    ),
    "parity": Check(
        partial(
            suite,
            "tests/parity/test_parity.py",
            toy_arguments="tests/parity/test_parity.py -k 'weights and gpt2-functional'",
        ),
        480,
        ("pytest",),
    ),
    "half_parity": Check(
        partial(suite, f"{COMPATIBILITY} -k 'fp16 or bfloat16 or loss_scaling'"),
        180,
        ("pytest",),
        cpu=False,
    ),
    "dropout": Check(dropout, 180),
    "waits": Check(waits, 120),
    "memory": Check(memory, 120),
    "cost_0.5B": Check(partial(cost, "0.5B", "bfloat16"), 240, timed=True),
    "cost_1B": Check(partial(cost, "1B", "bfloat16"), 240, timed=True),
    "head_cost": Check(head_cost, 120, timed=True),
    "kernels": Check(kernels, 120, ("triton",), cpu=False, timed=True),
    "optimizers": Check(optimizers, 120),
    **{name: Check(partial(engine, name), 180, ("deepspeed",) if "zero" in name else ()) for name in ENGINES},
    "overlap": Check(overlap, 120, ("deepspeed",), cpu=False),
    "compile": Check(
        partial(suite, f"{COMPATIBILITY} -k compiled -m 'slow or not slow'"),
        300,
        ("pytest",),
        cpu=False,
    ),
    "determinism": Check(determinism, 120),
    "fused_head": Check(partial(suite, "tests/unit/test_fused_head.py"), 480, ("pytest",), cpu=False),
    "cost_0.5B_mixed": Check(partial(cost, "0.5B", "float32"), 300, timed=True),
    "cost_1B_mixed": Check(partial(cost, "1B", "float32"), 300, timed=True),
    "steps": Check(
        partial(suite, f"tests/unit/test_step.py {COMPATIBILITY} -k 'not compiled'"),
        480,
        ("pytest",),
        cpu=False,
    ),
    "trl": Check(partial(suite, "tests/parity/test_trl.py"), 480, ("pytest", "trl", "datasets"), cpu=False),
    "recipe": Check(recipe, 300, ("datasets", "evaluate", "sklearn")),
    "studies": Check(studies, 6 * 3600, ("datasets", "evaluate", "sklearn", "matplotlib", "scipy"), cpu=False),
}
