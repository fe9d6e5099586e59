"""transformers' classes replaced by ones that split the step, for a script that its author wrote without hf_fsam.

Every trainer that is defined on top of them, by the script or by a library that it imports, gets the step of
:class:`~hf_fsam.trainer.FSAMMixin`, and every class of training arguments gets the `fsam_*` fields.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

from hf_fsam.arguments import FSAMArguments, check
from hf_fsam.cleanup import Cleanup
from hf_fsam.trainer import FSAMMixin

TRAINERS = {name: getattr(transformers, name) for name in ("Trainer", "Seq2SeqTrainer")}
ARGUMENTS = {name: getattr(transformers, name) for name in ("TrainingArguments", "Seq2SeqTrainingArguments")}


class _Fronted:
    """A trainer that stands behind FSAMMixin when it is made, whatever classes were put on top of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls if issubclass(cls, FSAMMixin) else with_split_step(cls))  # type: ignore[arg-type]


@functools.cache
def with_split_step(trainer_class: type) -> type:
    """FSAMMixin before `trainer_class`, under that class's name. If the mixin were a base of all trainers, it would not
    see a `training_step` that does not call its parent's."""
    names = {name: getattr(trainer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(trainer_class.__name__, (FSAMMixin, trainer_class), names)


class _Checked:
    """Training arguments whose `fsam_*` fields are checked. FSAMArguments itself is no base of them: a script that puts
    it before one of its own classes would have it twice, which Python refuses."""

    def __post_init__(self) -> None:
        check(self)  # type: ignore[arg-type]
        super().__post_init__()  # type: ignore[misc]


def _names_of(theirs: type) -> dict[str, Any]:
    return {"__module__": __name__, "__doc__": theirs.__doc__}


def _replacements(defaults: FSAMArguments) -> dict[str, type]:
    """Ours, under the names of transformers'. Those for sequences to sequences are subclasses of the others, here as
    there."""
    ours: dict[str, type] = {}
    base: type = _Fronted
    for name, theirs in TRAINERS.items():
        base = ours[name] = type(name, (base, theirs), _names_of(theirs))
    base = _Checked
    fields = []
    for each in dataclasses.fields(FSAMArguments):
        value = dataclasses.field(default=getattr(defaults, each.name), metadata=dict(each.metadata))
        fields.append((each.name, each.type, value))
    for name, theirs in ARGUMENTS.items():  # without a __repr__ of ours, since theirs hides tokens
        made = dataclasses.make_dataclass(name, fields, bases=(base, theirs), namespace=_names_of(theirs), repr=False)
        base = ours[name] = made
    return ours


# training_args.bin names the class of the arguments, and is read where nothing is replaced.
globals().update(_replacements(FSAMArguments()))


@dataclasses.dataclass
class Trainings:
    """What was trained while classes were replaced.

    Attributes:
        begun: how many trainings took a step of FSAMMixin, or had none left to take.
        ended: arguments and state of the trainers that trained. The trainers themselves would keep their models in
            memory.
    """

    begun: int = 0
    ended: list[tuple[transformers.TrainingArguments, transformers.TrainerState]] = dataclasses.field(
        default_factory=list
    )

    def save_states(self) -> None:
        """Leave each trainer's log in its output folder, with what was evaluated after the training."""
        for args, state in self.ended:
            if args.should_save:
                state.save_to_json(str(Path(args.output_dir or ".") / "trainer_state.json"))


@contextmanager
def swapped(cleanup: Cleanup, defaults: FSAMArguments, given: Mapping[str, Any] | None = None) -> Iterator[Trainings]:
    """Inside, transformers' trainers and training arguments are ours, with `defaults` in the `fsam_*` fields.

    Args:
        given: `fsam_*` arguments that the script was given and has to read by itself.

    Raises:
        ValueError: by `train` of a trainer whose class was made before, or that trains without what was `given`.
    """
    trainings = Trainings()
    train, train_plainly = FSAMMixin.train, transformers.Trainer.train

    def noted(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in (given or {}).items():
            if getattr(trainer.args, name) == getattr(defaults, name) != value:
                raise ValueError(
                    f"--{name} {value} did not reach the training arguments: the script does not parse them. Give it "
                    f"before the script: --{name} {value} SCRIPT."
                )
        try:
            return train(trainer, *args, **kwargs)
        finally:  # a script may catch Ctrl-C and save
            # One whose last step lies behind it takes none. One with a loop of its own takes none that is split.
            trainings.begun += trainer.fsam.entered or bool(args or kwargs.get("resume_from_checkpoint"))
            trainings.ended.append((trainer.args, trainer.state))

    def train_if_split(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(trainer, FSAMMixin):
            return train_plainly(trainer, *args, **kwargs)
        name = type(trainer).__name__
        raise ValueError(
            f"{name} was defined before hf_fsam replaced transformers.Trainer, so it would train plainly. Put "
            f"FSAMMixin before it in your script: class My{name}(FSAMMixin, {name})."
        )

    with ExitStack() as contexts:
        contexts.enter_context(cleanup.replaced(FSAMMixin, "train", noted))
        contexts.enter_context(cleanup.replaced(transformers.Trainer, "train", train_if_split))
        for name, ours in _replacements(defaults).items():
            for module in _modules_with(name):
                contexts.enter_context(cleanup.replaced(module, name, ours))
        yield trainings


def _modules_with(name: str) -> Iterator[ModuleType]:
    """This module, and those of transformers that have `name`."""
    original = (TRAINERS | ARGUMENTS)[name]
    for path, module in list(sys.modules.items()):
        if path == __name__ or (path.split(".")[0] == "transformers" and vars(module).get(name) is original):
            yield module
