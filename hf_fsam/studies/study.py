"""A study: one recipe, several arms that differ in settings, several seeds, written down in one YAML file.

    question: Does Functional-SAM train to a lower validation loss than AdamW?
    recipe: ../pretrain.py                # a script; this path and the next are relative to this file
    config: ../configs/pretrain_tiny.yaml # settings of all arms, and
    settings: {max_steps: 500}            # more of them, which win
    metrics: [eval_loss, best_eval_loss]  # the first one decides; lower is better,
    greater_is_better: false              # unless this is true, as for eval_accuracy
    baseline: AdamW
    seeds: [0, 1, 2]
    tuning_seeds: [100]                   # others than those of the table
    arms:
      AdamW:
        fsam_variant: none
        learning_rate: [2e-3, 4e-3]       # a list is tuned: the best on the tuning seeds goes on to the seeds
      Functional-SAM:
        like: AdamW                       # begins with the settings that arm ended with, the tuned ones too
        fsam_variant: functional
        fsam_rho: [0.02, 0.1]

An arm may also have keys that are no settings, which `like` does not hand on: `longer: 2`, twice the steps, epochs and
warmup; `recipe`, another script; `passes`, its cost, where that is not what its `fsam_*` settings say.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_fsam.arguments import FSAMArguments, plain_passes
from hf_fsam.studies.masking import is_secret

Settings = dict[str, Any]

HIGHER = ("accuracy", "f1", "precision", "recall", "matthews", "bleu", "rouge", "auc", "exact_match")


@dataclass
class Arm:
    """
    Attributes:
        settings: of the recipe; a list holds candidates to tune over.
        like: the arm whose settings this one begins with.
        longer: times the steps, epochs and warmup that the settings say.
        recipe: another script than the study's.
        passes: cost of a step in passes of plain training; None: as the `fsam_*` settings have it.
    """

    name: str
    settings: Settings
    like: str | None = None
    longer: float = 1
    recipe: Path | None = None
    passes: float | None = None

    def candidates(self, begin: Settings) -> list[Settings]:
        """Every combination of the listed values, on top of `begin`.

        Raises:
            ValueError: the arm is `longer` than what says no length.
        """
        lists = {name: value for name, value in self.settings.items() if isinstance(value, list)}
        fixed = {**begin, **{name: value for name, value in self.settings.items() if name not in lists}}
        if self.longer != 1:
            if not training_length(fixed):
                raise ValueError(f"{self.name}: longer={self.longer} needs max_steps or num_train_epochs.")
            if fixed.get("max_steps", -1) > 0:
                fixed["max_steps"] = round(fixed["max_steps"] * self.longer)
            else:  # a float to the Trainer
                fixed["num_train_epochs"] *= self.longer
            if fixed.get("warmup_steps", 0) >= 1:  # below it is a share of the whole
                fixed["warmup_steps"] = round(fixed["warmup_steps"] * self.longer)
        return [{**fixed, **dict(zip(lists, values, strict=True))} for values in itertools.product(*lists.values())]

    @property
    def tuned(self) -> list[str]:
        return [name for name, value in self.settings.items() if isinstance(value, list) and len(value) > 1]


@dataclass
class Study:
    """
    Attributes:
        path: its YAML file.
        metrics: the first decides.
        greater_is_better: of the first.
    """

    name: str
    path: Path
    question: str
    recipe: Path
    settings: Settings
    metrics: list[str]
    baseline: str
    seeds: list[int]
    tuning_seeds: list[int]
    greater_is_better: bool = False
    arms: dict[str, Arm] = field(default_factory=dict)

    def tuning_order(self) -> list[list[Arm]]:
        """The arms in rounds: each after the one that it is `like`."""
        rounds: list[list[Arm]] = []
        placed: set[str] = set()
        while len(placed) < len(self.arms):
            ready = [arm for arm in self.arms.values() if arm.name not in placed and arm.like in {None, *placed}]
            if not ready:
                raise ValueError(f"{self.name}: {sorted(set(self.arms) - placed)} are `like` each other in a circle.")
            rounds.append(ready)
            placed |= {arm.name for arm in ready}
        return rounds

    def passes(self, arm: Arm, settings: Settings) -> float:
        """Cost of a step of the arm, in passes of plain training.

        Raises:
            ValueError: an `fsam_*` setting is unknown, or its value is not one of it.
        """
        known = {each.name for each in fields(FSAMArguments)}
        own = {name: value for name, value in settings.items() if name.startswith("fsam_")}
        for name in own:
            if name not in known:
                raise ValueError(f"{self.path}: {arm.name}: {name!r} is none of {', '.join(sorted(known))}.")
        return arm.passes if arm.passes is not None else plain_passes(FSAMArguments(**own))


def load_studies(
    path: Path, overrides: Settings | None = None, seeds: list[int] | None = None, baseline: str | None = None
) -> Iterator[Study]:
    """The study of a YAML file, or those of the files that it lists under `studies`.

    Args:
        overrides: settings of all arms, which win over the file's.
        seeds, baseline: in place of the file's.

    Raises:
        FileNotFoundError: the file, the recipe or its configuration does not exist.
        ValueError: a key is unknown or missing, its value is not of its kind, or an override is set by an arm itself;
            the message names it.
    """
    raw = read_yaml(path)
    if "studies" in raw:
        if set(raw) != {"studies"} or not isinstance(raw["studies"], list):
            raise ValueError(f"{path}: `studies` is a list of YAML files, and stands alone.")
        for name in raw["studies"]:
            yield from load_studies(path.parent / name, overrides, seeds, baseline)
        return
    known = {"question", "recipe", "config", "settings", "metrics", "greater_is_better", "baseline"}
    known |= {"seeds", "tuning_seeds", "arms"}
    _check_keys(path, "the study", raw, known, required={"recipe", "arms"})
    for name, kind, what in (
        ("settings", dict, "a mapping of names to values"),
        ("arms", dict, "a mapping of names to settings"),
        ("metrics", list, "a list of names"),
        ("greater_is_better", bool, "true or false"),
    ):
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            # Settings may hold a password.
            given = f" is {type(raw[name]).__name__}, not" if kind is dict else f"={raw[name]!r} is not"
            raise ValueError(f"{path}: {name}{given} {what}.")
    settings = read_yaml(path.parent / raw["config"]) if raw.get("config") else {}
    settings |= numbers(raw.get("settings") or {}) | (overrides or {})
    arms = {str(name): _arm(path, str(name), own) for name, own in raw["arms"].items()}
    for name, cure in (("seed", "list them under `seeds`, or use --seeds"), ("output_dir", "use --out")):
        if name in (overrides or {}) or any(name in arm.settings for arm in arms.values()):
            raise ValueError(f"{path}: {name!r} is `compare`'s own to set: {cure}.")
    for name in overrides or {}:
        if owners := [arm.name for arm in arms.values() if name in arm.settings]:
            raise ValueError(f"{path}: --{name} is for all arms, but {', '.join(owners)} set it: change the file.")
    study = Study(
        name=path.stem,
        path=path.resolve(),
        question=raw.get("question", ""),
        recipe=_existing(path.parent / raw["recipe"], f"{path}: recipe"),
        settings=settings,
        metrics=raw.get("metrics") or ["eval_loss"],
        greater_is_better=raw.get("greater_is_better") or False,
        baseline=baseline or raw.get("baseline") or next(iter(arms)),
        seeds=seeds or raw.get("seeds") or [0, 1, 2],
        tuning_seeds=raw.get("tuning_seeds") or [100],
        arms=arms,
    )
    for what, name in [("baseline", study.baseline), *((f"{arm.name}: like", arm.like) for arm in arms.values())]:
        if name is not None and name not in arms:
            raise ValueError(f"{path}: {what}: {name!r} is not an arm; there are {', '.join(map(repr, arms))}.")
    for what in ("seeds", "tuning_seeds"):
        values = getattr(study, what)
        if not (isinstance(values, list) and all(isinstance(seed, int) for seed in values)):
            raise ValueError(f"{path}: {what}={values!r} is not a list of whole numbers.")
    if set(study.seeds) & set(study.tuning_seeds) and any(arm.tuned for arm in arms.values()):
        raise ValueError(f"{path}: tuning_seeds must be others than seeds: what was tuned on a seed is at home there.")
    decides = study.metrics[0]
    if "greater_is_better" not in raw and any(part in decides.lower() for part in HIGHER):
        raise ValueError(
            f"{path}: metrics: {decides!r} decides, and lower would be better: say `greater_is_better: true`, or false."
        )
    study.tuning_order()
    for arm in arms.values():  # wrong values are found before the first run
        for candidate in arm.candidates(settings):
            study.passes(arm, candidate)
    yield study


def _arm(path: Path, name: str, own: Any) -> Arm:
    if not isinstance(own, dict | None):
        raise ValueError(f"{path}: {name} is {type(own).__name__}, not a mapping of settings to values.")
    own = dict(own or {})
    recipe = own.pop("recipe", None)
    like, longer, passes = own.pop("like", None), own.pop("longer", 1), own.pop("passes", None)
    for key, value in (("longer", longer), ("passes", 1 if passes is None else passes)):
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {name}: {key}={value!r} is not a number above 0.")
    empty = [key for key, value in own.items() if value == []]
    if empty:
        raise ValueError(f"{path}: {name}: {empty[0]} has no candidates.")
    found = _existing(path.parent / recipe, f"{path}: {name}: recipe") if recipe else None
    return Arm(name, numbers(own), like, longer, found, passes)


def training_length(settings: Settings) -> float:
    """Optimizer steps, or epochs where no steps are said; 0 where neither is: the script's own default."""
    steps = settings.get("max_steps") or 0
    return float(steps if steps > 0 else settings.get("num_train_epochs") or 0)


def _check_keys(path: Path, where: str, raw: Settings, known: set[str], required: set[str]) -> None:
    for name in raw:
        if name not in known:
            raise ValueError(f"{path}: {name!r} is not a key of {where}; these are: {', '.join(sorted(known))}.")
    for name in sorted(required):
        if not raw.get(name):
            raise ValueError(f"{path}: {where} needs {name!r}.")


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} does not exist.")
    return path.resolve()


def read_yaml(path: Path) -> Settings:
    text = _existing(path, "The YAML file").read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:  # its own message repeats the line, in which a password may stand
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path} can't be read as YAML: {error.problem}, in line {line}. Mend that line.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not `name: value` lines.")
    return numbers(values)


def numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text: as a number again, in lists and mappings too."""
    if isinstance(value, dict):
        return {name: each if is_secret(str(name)) else numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def fingerprint(script: Path) -> str:
    return hashlib.sha256(script.read_bytes()).hexdigest()[:16]
