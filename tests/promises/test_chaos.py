"""Interrupted at any line, by an error or a signal: the weights are θ, nothing of a step is left, and the next run is
undisturbed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root
from transformers import Trainer, TrainerCallback

import hf_fsam
from tests.engines.distributed import ROOT
from tests.engines.test_checkpoints import settings_of, weights_in
from tests.toys import distance, llama, make_trainer, same_bits, weights_of

PACKAGE = str(Path(hf_fsam.__file__).parent)
OF_TRL = "_ChunkedLogProbFunction"


class Struck(Exception):
    """An error that nobody expects."""


class Expected(Exception):
    """An error that a run may end with."""


class Strike(TrainerCallback):
    """Raises `error` at one of the lines that the package runs from the beginning of `step` to the end of the training.

    The entries and exits of its context managers count as lines, too: Python also raises Ctrl-C where a function
    begins, and the exit of a `with` block is a function of the standard library.

    Attributes:
        at: which line, counted from 0; None records the lines and raises nothing.
        lines: file and number of each line that was run.
        in_step: whether the line that raised was part of a step.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.at: int | None = None
        self.error: type[BaseException] = Struck
        self.lines: list[str] = []
        self.in_step = self._live = False

    @contextlib.contextmanager
    def armed(self, at: int | None = None, error: type[BaseException] = Struck) -> Iterator[None]:
        self.at, self.error, self.lines, self._live = at, error, [], True
        try:
            yield
        finally:
            self._live = False
            sys.settrace(None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live and state.global_step == self.step:
            for frame in _stack(sys._getframe()):  # the functions that are running, up to `train`
                if _is_ours(frame):
                    frame.f_trace = self._see
            sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._see if _is_ours(frame) else None

    def _see(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append(_name(frame))
            if len(self.lines) - 1 == self.at:
                self.in_step = any(each.f_code.co_name == "training_step" for each in _stack(frame))
                raise self.error  # which also ends the tracing
        return self._see


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    """Whether this is a function of the package, or contextlib as it enters or leaves one that is a context manager."""
    code = frame.f_code
    if code.co_filename == contextlib.__file__:
        code = getattr(getattr(frame.f_locals.get("self"), "gen", None), "gi_code", code)
    return code.co_filename.startswith(PACKAGE)


def _name(frame: FrameType) -> str:
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    if frame.f_code.co_filename == contextlib.__file__:
        where += f" of {frame.f_locals['self'].gen.__qualname__}"
    return where


class Witness:
    """How a trainer and its model look from outside, and what of that has changed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights = weights_of(trainer.model)
        self.outside = self._outside()

    def _outside(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "trainer.compute_loss": vars(self.trainer).get("compute_loss"),
            "trl.trainer.utils": vars(trl.trainer.utils)[OF_TRL],
            "grad mode": torch.is_grad_enabled(),
        }
        for name, module in self.trainer.model.named_modules():
            found[f"{name}.forward"] = vars(module).get("forward")
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                found[f"{name}.{kind}"] = list(vars(module)[kind].values())
        return found

    def left_behind(self) -> list[str]:
        outside = self._outside()
        return [name for name, was in self.outside.items() if outside[name] != was]

    def perturbed(self) -> list[str]:
        return [] if same_bits(weights_of(self.trainer.model), self.weights) else ["the weights"]


class Gradients(TrainerCallback):
    """`.grad` as it was before a micro-batch. It is not known once the step's own backward pass has begun."""

    def __init__(self, trainer: Trainer) -> None:
        self.parameters = list(trainer.model.parameters())
        self.before: list[Tensor | None] | None = None
        self.on_backward: Callable[[], None] = lambda: None
        backward = trainer.accelerator.backward

        def begun(*args: Any, **kwargs: Any) -> None:
            self.before = None
            self.on_backward()
            backward(*args, **kwargs)

        trainer.accelerator.backward = begun

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = [None if each.grad is None else each.grad.clone() for each in self.parameters]

    on_substep_end = on_step_begin

    def changed(self) -> list[str]:
        def same(now: Tensor | None, before: Tensor | None) -> bool:
            return now is before is None or (now is not None and before is not None and torch.equal(now, before))

        pairs = zip(self.parameters, self.before or [], strict=False)
        return [] if all(same(each.grad, before) for each, before in pairs) else [".grad"]


class Subject:
    """A trainer that is struck again and again.

    Args:
        first: strike in the first step, in which the package looks up some things once; else in the second.
        fails: that step's backward pass raises, so that a strike may hit the package while it cleans up.
    """

    def __init__(self, folder: Path, first: bool = False, fails: bool = False, **settings: Any) -> None:
        self.trainer = make_trainer(
            folder,
            llama(num_hidden_layers=1),
            max_steps=2,
            logging_steps=1,
            train_sampling_strategy="sequential",
            fsam_rho=0.3,
            **settings,
        )
        self.fails = fails
        self.strike, self.gradients = Strike(step=0 if first else 1), Gradients(self.trainer)
        self.trainer.add_callback(self.gradients)
        self.trainer.add_callback(self.strike)
        self.witness = Witness(self.trainer)
        self.raised: BaseException | None = None
        self.undisturbed = self.end()

    def run(self, learning_rate: float) -> None:
        """Train as if for the first time."""
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        self.trainer.args.learning_rate = learning_rate
        torch.manual_seed(0)
        self.trainer.train()

    def end(self) -> dict[str, Tensor]:
        """The weights after a run that nothing disturbs, except that frames which were alive until now are freed in the
        middle of a step."""
        self.gradients.on_backward = self._forget
        self.run(learning_rate=1e-2)
        result = weights_of(self.trainer.model)
        self.trainer.model.load_state_dict(self.witness.weights)
        return result

    def _forget(self) -> None:
        self.raised = None

    def _fail(self) -> None:
        if self.trainer.state.global_step == self.strike.step:
            raise Expected

    def struck_run(self, at: int | None = None, error: type[BaseException] = Struck) -> None:
        if self.fails:
            self.gradients.on_backward = self._fail
        with self.strike.armed(at, error):
            try:
                self.run(learning_rate=0.0)
            except (error, Expected) as caught:
                self.raised = caught  # its traceback keeps all frames alive, as in a notebook

    def lines(self) -> list[str]:
        self.struck_run()
        self._forget()
        return self.strike.lines

    def wrong(self, at: int, error: type[BaseException]) -> list[str]:
        """What is wrong after a run that is struck at this line, and after the next one."""
        self.struck_run(at, error)
        left = self.witness.perturbed() + self.gradients.changed()
        if self.strike.in_step and not self.fails:
            left += self.witness.left_behind()
        try:
            again = self.end()
        except Exception as failed:
            left.append(f"the next train() raises {type(failed).__name__}: {failed}")
        else:
            if not same_bits(again, self.undisturbed):
                left.append(f"the next train() ends {distance(again, self.undisturbed):.1e} away")
            left += [f"{each} after the next train()" for each in self.witness.left_behind()]
        return [f"{self.strike.lines[-1]}, {error.__name__}: {each}" for each in left]


WINDOW = {"fsam_ascent_scope": "optimizer_step", "gradient_accumulation_steps": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "functional": {},
    "first_step": {"first": True},
    "failing": {"fails": True},
    "logits": {"fsam_fused_head": False},
    "sam": {"fsam_variant": "sam", "fsam_precondition": True},
    "logit": {"fsam_variant": "logit", "gradient_accumulation_steps": 2},
    "logit_logits": {"fsam_variant": "logit", "fsam_fused_head": False},
    "window": WINDOW | {"fsam_precondition": True, "label_smoothing_factor": 0.1},
    "momentum": {"fsam_ascent_direction": "momentum", "fsam_offload_hidden_states": True},
    "diagnosed": {"fsam_diagnostics_steps": 1},
}


def strike_lines(folder: Path, setting: str, error: type[BaseException], every: int, offset: int = 0) -> None:
    """Strike at every `every`-th of the lines that a step runs, each line when it is run first."""
    subject = Subject(folder, **SETTINGS[setting])
    subject.struck_run()  # the package has now looked up what it looks up only once
    lines = subject.lines()
    places = [index for index, line in enumerate(lines) if line not in lines[:index]]
    assert len(places) > 100
    wrong: list[str] = []
    for at in places[offset::every]:
        found = subject.wrong(at, error)
        if found:
            wrong += found
            subject = Subject(folder, **SETTINGS[setting])
    assert not wrong, "\n".join(["", *wrong])


@pytest.mark.parametrize(("setting", "error", "every"), [("functional", KeyboardInterrupt, 8), ("window", Struck, 16)])
def test_a_strike_at_some_lines_of_a_step_leaves_nothing_behind(
    tmp_path: Path, setting: str, error: type[BaseException], every: int
) -> None:
    strike_lines(tmp_path, setting, error, every, offset=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Struck])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_strike_at_any_line_of_a_step_leaves_nothing_behind(
    tmp_path: Path, setting: str, error: type[BaseException]
) -> None:
    strike_lines(tmp_path, setting, error, every=1)


# By signals -----------------------------------------------------------------------------------------------------------

STEPS, SAVED_EVERY, PATIENCE = 16, 4, 300  # steps, steps, seconds
COMPILED = Path(
    os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
)  # where DeepSpeed puts what it compiles in its first run


class Running:
    """A training of :mod:`tests.engines.worker` in one process or in two."""

    def __init__(self, folder: Path, processes: int, **case: Any) -> None:
        self.folder, self.processes = folder, processes
        self.progress = folder / "progress"
        self.progress.mkdir(parents=True)
        (folder / "cases.json").write_text(json.dumps([case | {"progress": str(self.progress)}]))
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        self.said = (folder / "said").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *(launcher if processes > 1 else []), "tests.engines.worker", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stdout=self.said,
            stderr=self.said,
            start_new_session=True,  # so that Ctrl-C goes to all of its processes
        )

    def pids(self) -> list[int]:
        return [int(path.name) for path in self.progress.iterdir()]

    def wait_for(self, step: int) -> None:
        """Until all processes have begun `step`, or the run is over."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            begun = [path.read_text() for path in self.progress.iterdir()]
            if len(begun) == self.processes and all(each and int(each) >= step for each in begun):
                return
            if time.monotonic() > deadline:
                self.end(patience=0)  # raises
            time.sleep(0.002)

    def end(self, patience: float = PATIENCE) -> str:
        """What it printed. A run that does not end is a failure."""
        try:
            self.process.wait(patience)
        finally:
            if self.process.poll() is None:
                self.process.terminate()  # not kill: the launcher takes its processes with it
                self.process.wait(60)
        self.said.seek(0)
        return self.said.read()[-20_000:]


def complete(run: Path) -> dict[int, Path]:
    """Complete checkpoints by step: the Trainer writes its own state last."""
    found = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*")}
    return {step: path for step, path in sorted(found.items()) if (path / "trainer_state.json").is_file()}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "zero3", "fsdp2"])
def test_a_run_struck_by_signals_and_resumed_ends_where_an_undisturbed_one_does(engine: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10_000))
    print(f"CHAOS_SEED={seed}")
    chance = random.Random(seed)
    processes = 1 if engine == "single" else 2
    settings = settings_of("ddp" if engine == "single" else engine) | {"max_steps": STEPS, "save_strategy": "steps"}
    run = tmp_path / "run"

    def start(name: str, **case: Any) -> Running:
        return Running(tmp_path / name, processes, **(settings | {"save_steps": SAVED_EVERY} | case))

    whole = start("whole", output_dir=str(tmp_path / "undisturbed"), save_steps=1)
    said = whole.end()
    assert whole.process.returncode == 0, said
    path = {step: weights_in(saved, engine) for step, saved in complete(tmp_path / "undisturbed").items()}
    assert list(path) == list(range(1, STEPS + 1))

    def survivor() -> tuple[int, str | None]:
        """The last step to resume from. Each checkpoint must hold the weights of the undisturbed run at its step."""
        for each in set(run.glob("checkpoint-*")) - set(complete(run).values()):
            shutil.rmtree(each)  # killed while it was written
        for step, saved in complete(run).items():
            weights = weights_in(saved, engine)
            # On SIGTERM the Trainer saves before the optimizer's step, which DeepSpeed has taken by then (0.19.8). From
            # such a checkpoint, a plain Trainer can't resume bit for bit, either.
            if engine.startswith("zero") and not same_bits(weights, path[step]):
                assert terminated
                assert same_bits(weights, path[step + 1])
                shutil.rmtree(saved)
            else:
                assert same_bits(weights, path[step]), f"{saved.name} holds other weights"
        last = max(complete(run), default=0)
        return last, str(run / f"checkpoint-{last}") if last else None

    strikes = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    chance.shuffle(strikes)
    terminated = False
    for index, kind in enumerate(strikes):
        done, resume = survivor()
        if done == STEPS:
            break
        at = chance.randint(done, min(done + 5, STEPS - 1))
        terminated = kind == signal.SIGTERM
        # Several processes save in the same step only if the signal reaches them at the same place of that step.
        case = {"struck": {"kind": "terminate", "step": at - done}} if terminated and processes > 1 else {}
        struck = start(f"struck-{index}", output_dir=str(run), resume=resume, enable_jit_checkpoint=terminated, **case)
        struck.wait_for(at)
        time.sleep(chance.uniform(0, 0.1))
        print(f"{kind.name} at step {at}, resumed from {done}")
        if not case and struck.process.poll() is None:
            if kind == signal.SIGINT:
                os.killpg(struck.process.pid, kind)
            else:
                os.kill(chance.choice(sorted(struck.pids())), kind)
        said = struck.end()
        assert (struck.process.returncode == 0) <= (terminated or STEPS in complete(run)), said
        assert terminated <= (struck.process.returncode == 0), said
        assert not list(COMPILED.glob("*/deepspeed*/lock"))  # a run that finds it would wait for ever

    done, resume = survivor()
    if done == STEPS:
        # The run with SIGTERM came to its end. The Trainer would go on from there to step 17 (transformers 5.23).
        return
    last = start("last", output_dir=str(run), resume=resume)
    said = last.end()
    assert last.process.returncode == 0, said
    wanted, ended = (torch.load(each.folder / "0.pt", weights_only=False) for each in (whole, last))
    assert same_bits(ended[0], wanted[0])
    assert same_bits(ended[1], wanted[1])
