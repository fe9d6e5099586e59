"""What each process of a test of interruptions runs: `python -m tests.engines.interrupts FOLDER` trains the cases that
FOLDER/cases.json lists, and strikes each line of hf_fsam/engines with a KeyboardInterrupt the first time that a step
comes there.

A process that is struck tries the same micro-batch again. Every traceback is kept, as a notebook keeps it, and let go
of in the second pass of the next step.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import hf_fsam.engines
from tests.engines.worker import main, whole
from tests.toys import gpt2, make_trainer, same_bits, sentences

ENGINES = str(Path(hf_fsam.engines.__file__).parent)


class Striker:
    """Raises at the first line of the engines that it has not struck yet, once for each `armed`."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()
        self.struck: tuple[str, int] | None = None

    def __enter__(self) -> "Striker":
        self.struck = None
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.settrace(None)

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ENGINES):
            return None
        line = (Path(frame.f_code.co_filename).name, frame.f_lineno)
        if event == "line" and self.struck is None and line not in self.lines:
            self.lines.add(line)
            self.struck = line
            raise KeyboardInterrupt(line)
        return self.trace


def train(folder: Path, strikes: str, **settings: Any) -> tuple[Any, ...]:
    """The weights in the end, and the lines struck.

    Args:
        strikes: "none"; "clean" strikes until the training's own backward pass begins, after which the next try cannot
            be told from a second step; "all" looks at what is left after each strike alone.
    """
    data = {"train_dataset": sentences()}
    trainer: Any = make_trainer(folder, gpt2(), train_sampling_strategy="sequential", trainer=data, **settings)
    striker, kept, trained = Striker(), [], False
    step, backward, compute_loss = trainer.training_step, trainer.accelerator.backward, trainer.compute_loss

    def back_propagate(*args: Any, **kwargs: Any) -> Any:
        nonlocal trained
        trained = True
        if strikes == "clean":
            sys.settrace(None)
        return backward(*args, **kwargs)

    def compute(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        if kept and trainer.state.global_step == 1 and vars(trainer).get("compute_loss") is not compute:  # second pass
            kept.clear()
            gc.collect()
        return loss

    def struck_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal trained
        while strikes != "none" and trainer.state.global_step == 0:
            trained = False
            before, _ = whole(trainer.model, trainer.is_deepspeed_enabled)
            try:
                with striker:
                    loss = step(model, *args, **kwargs)
            except KeyboardInterrupt as interrupt:
                kept.append(interrupt)
                assert striker.struck is not None
                look(trainer, before, trained, striker.struck)
                if trained:
                    model.zero_grad()
                continue
            return loss
        return step(model, *args, **kwargs)

    trainer.training_step, trainer.accelerator.backward, trainer.compute_loss = struck_step, back_propagate, compute
    trainer.train()
    return *whole(trainer.model, trainer.is_deepspeed_enabled), sorted(striker.lines)


def look(trainer: Any, before: dict[str, Any], trained: bool, line: tuple[str, int]) -> None:
    """Nothing that the step changed for its duration is changed still."""
    engine, wrapped = trainer.fsam.engine, trainer.model_wrapped
    engine.settle()  # as the next step and the next evaluation do
    weights, masters = whole(trainer.model, trainer.is_deepspeed_enabled)
    assert same_bits(weights, masters if trained else before), line
    assert engine._cleanup._due == [], line
    assert vars(wrapped).get("require_backward_grad_sync", True), line
    assert "step" not in vars(wrapped), line
    replaced = {"process_gradients", "reduce_ready_partitions_and_remove_grads"}
    assert not replaced & vars(getattr(wrapped, "optimizer", None) or object).keys(), line
    assert trained or all(parameter.grad is None for parameter in trainer.model.parameters()), line


if __name__ == "__main__":
    main(train)
