"""What each process of a test of streams runs: `python -m tests.engines.streams FOLDER` trains the cases that
FOLDER/cases.json lists under ZeRO-3, on a CPU that DeepSpeed takes for a device with streams.

Every stream keeps a vector clock: for each stream, up to which of its operations this one comes after. An operation on
a weight's shard ticks the clock of the stream that is current. On an accelerator a read that does not come after the
last write may see what was there before, and one that the next write does not come after may see what follows.
"""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
from accelerate.state import PartialState
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_fsam.engines import deepspeed_internals as internals
from tests.engines.worker import start_anew
from tests.toys import llama, make_trainer, sentences

Clock = Counter  # stream → the number of its last operation that comes before


def join(clock: Clock, other: Clock) -> None:
    clock |= other  # in place: the larger of both, for each stream


HOST: Clock = Counter()  # what the host has waited for
STREAMS: list["Stream"] = []


class Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock: Clock = Counter()
        STREAMS.append(self)

    def tick(self) -> int:
        """One more operation, launched by the host, whose number is returned."""
        join(self.clock, HOST)
        self.clock[self] += 1
        return self.clock[self]

    def wait_stream(self, other: "Stream") -> None:
        join(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        join(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        join(HOST, self.clock)

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock: Clock = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter((stream or CURRENT[-1]).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or CURRENT[-1]).wait_event(self)

    def synchronize(self) -> None:
        join(HOST, self.clock)

    def query(self) -> bool:
        return True


DEFAULT = Stream()
CURRENT = [DEFAULT]  # a stack; on the CPU autograd calls hooks in the thread that began the backward pass


@contextlib.contextmanager
def on(stream: Stream | None) -> Iterator[None]:
    CURRENT.append(stream or DEFAULT)
    try:
        yield
    finally:
        CURRENT.pop()


def synchronize(*args: Any) -> None:
    for stream in STREAMS:
        stream.synchronize()


def have_streams() -> None:
    kind: Any = type(get_accelerator())
    kind.is_synchronized_device = kind.resolves_data_dependency = kind.handles_memory_backpressure = lambda self: False
    kind.Stream, kind.Event = property(lambda self: Stream), property(lambda self: Event)
    kind.stream = lambda self, stream: on(stream)
    kind.current_stream = lambda self, *args: CURRENT[-1]
    kind.default_stream = lambda self, *args: DEFAULT
    kind.synchronize = lambda self, *args: synchronize()
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]


class Watch(TorchDispatchMode):
    """Takes down what happens to the shards that it was told of, by the address of their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shards: set[int] = set()
        self.reads = 0
        self.races: Counter[str] = Counter()
        self._written: dict[int, tuple[Stream, int, str]] = {}
        self._read: dict[int, dict[Stream, int]] = {}

    def read(self, address: int) -> None:
        stream, number = CURRENT[-1], CURRENT[-1].tick()
        self.reads += 1
        self._read.setdefault(address, {})[stream] = number
        if address in self._written:
            writer, when, where = self._written[address]
            if stream.clock[writer] < when:
                self.races[f"read at {place()}, written at {where}"] += 1

    def write(self, address: int) -> None:
        stream, number = CURRENT[-1], CURRENT[-1].tick()
        for reader, when in self._read.pop(address, {}).items():
            if stream.clock[reader] < when:
                self.races[f"written at {place()} while it is read"] += 1
        self._written[address] = stream, number, place()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):  # the host reads the answer
            CURRENT[-1].tick()
            CURRENT[-1].synchronize()
        result = func(*args, **kwargs)
        if not func.is_view:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(value):
                    self.touched(tensor, self.write if written else self.read)
            for name, value in kwargs.items():
                self.touched(value, self.write if name == "out" else self.read)
        return result

    def touched(self, tensor: Any, how: Callable[[int], None]) -> None:
        if isinstance(tensor, Tensor) and tensor.numel():
            address = tensor.untyped_storage().data_ptr()
            if address in self.shards:
                how(address)


def place() -> str:
    """The innermost line of hf_fsam's or of ZeRO's."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "hf_fsam" in file or "/zero/" in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def watch_gathers(watch: Watch) -> None:
    """Collectives go past Python's dispatch here."""
    allgather = deepspeed.comm.allgather_fn

    def watched(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch.touched(input, watch.read)
        return allgather(output, input, *args, **kwargs)

    deepspeed.comm.allgather_fn = watched


class Shards(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for parameter in model.parameters():
            self.watch.shards.add(parameter.ds_tensor.untyped_storage().data_ptr())


def train(folder: Path, cured: bool = True, **settings: Any) -> dict[str, Any]:
    """Reads of the shards, and those among them and the writes that nothing orders.

    Args:
        cured: as hf_fsam does it; else its own ordering is left out.
    """
    watch = Watch()
    original = deepspeed.comm.allgather_fn
    watch_gathers(watch)
    wait_stream = Stream.wait_stream
    if not cured:

        def wait(self: Stream, other: Stream) -> None:
            if sys._getframe(1).f_globals is not vars(internals):
                wait_stream(self, other)

        Stream.wait_stream = wait  # type: ignore[method-assign]
    try:
        data = {"train_dataset": sentences(), "callbacks": [Shards(watch)]}
        trainer = make_trainer(folder, llama(), train_sampling_strategy="sequential", trainer=data, **settings)
        with watch:
            trainer.train()
    finally:
        deepspeed.comm.allgather_fn, Stream.wait_stream = original, wait_stream  # type: ignore[method-assign]
    return {"reads": watch.reads, "races": dict(watch.races)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    have_streams()
    results = []
    for case in json.loads((folder / "cases.json").read_text()):
        start_anew()
        results.append(train(folder, **case))
    if PartialState().is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in worker.py
