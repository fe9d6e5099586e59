"""A study: one recipe, several arms that differ in settings, several seeds, written down in one YAML file.

    question: Does Functional-SAM train to a lower validation loss than AdamW?
    recipe: ../pretrain.py                # the script; this path and the next are relative to this file
    config: ../configs/pretrain_tiny.yaml # settings of all arms
    settings: {max_steps: 500}            # more settings of all arms, which win over the file's
    metrics: [eval_loss, best_eval_loss]  # the first one decides between settings and between arms; lower is better,
    greater_is_better: false              # unless this is true, as it should be for eval_accuracy
    tune_on: eval_loss                    # the metric that tuning looks at, where it is not the first one
    baseline: AdamW                       # the arm to which the others are compared
    seeds: [0, 1, 2]
    tuning_seeds: [100]                   # the seeds to tune on; none of them may be among `seeds`
    arms:
      AdamW:
        fsam_variant: none
        learning_rate: [2e-3, 4e-3]       # a list is tuned: the value that is best on the tuning seeds is used
      Functional-SAM:
        like: AdamW                       # starts from the settings that were used for that arm, tuned ones included
        fsam_variant: functional
        fsam_rho: [0.02, 0.1]

Some keys of an arm are not settings: `longer: 2` multiplies steps, epochs and warmup, and `like` hands on what comes of
that. It does not hand on `recipe`, another script, and `passes`, the cost of a step, where the `fsam_*` settings do not
give it.

`extends: other.yaml` takes all keys of another study beside the file, and changes those that follow it; `settings` are
added to the other's. Then `arms` can be a list, which keeps those of the other's arms alone.

A recipe that has a variable SETTINGS, the dataclasses of its settings, and METRICS, the names of its metrics, has the
names in the file checked before its first run.

In place of `recipe` there can be `script: train.py`, or `script: -m trl.scripts.sft`, for a script that was written
without hf_fsam. It is run by `hf-fsam run`, with every setting as an argument, `--name value`.
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

import hf_fsam
from hf_fsam.arguments import FSAMArguments, plain_passes
from hf_fsam.cleanup import Cleanup
from hf_fsam.mistakes import did_you_mean
from hf_fsam.studies.masking import is_secret

Settings = dict[str, Any]

HIGHER = ("accurac", "f1", "precision", "recall", "matthews", "bleu", "rouge", "auc", "exact_match")
LOWER = ("loss", "perplexity", "error", "forgotten", "memorized")
COMMON = ("eval_loss", "best_eval_loss", "eval_accuracy", "eval_perplexity")


@dataclass(frozen=True)
class Recipe:
    """What trains.

    Attributes:
        path: the file, also that of a module.
        unedited: it knows nothing of hf_fsam, so `hf-fsam run` runs it.
        module: the name to run it by, as for `python -m`.
    """

    path: Path
    unedited: bool = False
    module: str | None = None

    def command(self, settings: Path, launch: list[str] | None) -> list[str]:
        """What runs it with the JSON file `settings`.

        launch: the command in front of a script's path; None: Python.
        """
        start = launch or [sys.executable]
        if not self.unedited:
            return [*start, str(self.path), str(settings)]
        target = ["-m", self.module] if self.module else [str(self.path)]
        # Launchers differ in how they are told of a module, so they get a file.
        main = [str(Path(hf_fsam.__file__).with_name("__main__.py"))] if launch else ["-m", "hf_fsam"]
        return [*start, *main, "run", "--settings", str(settings), *target]


@dataclass
class Arm:
    """
    Attributes:
        settings: of the recipe; a list holds the candidates to tune over.
        recipe: what trains.
        like: the arm from whose settings this one starts.
        longer: the factor on the steps, epochs and warmup of the settings.
        passes: the cost of a step in passes of plain training; None: as the `fsam_*` settings have it.
    """

    name: str
    settings: Settings
    recipe: Recipe
    like: str | None = None
    longer: float = 1
    passes: float | None = None

    def candidates(self, begin: Settings) -> list[Settings]:
        """Every combination of the listed values, on top of the settings `begin`.

        Raises:
            ValueError: the arm is `longer`, and no setting says how long it trains, or such a setting is tuned.
        """
        lists = {name: value for name, value in self.settings.items() if isinstance(value, list)}
        fixed = {**begin, **{name: value for name, value in self.settings.items() if name not in lists}}
        if self.longer != 1:
            for name in ("max_steps", "num_train_epochs", "warmup_steps"):
                if name in lists:
                    raise ValueError(
                        f"{self.name}: longer={self.longer} does not multiply the values of {name}={lists[name]}, "
                        "which are tuned: write them as they should be, and leave `longer` out."
                    )
            if not training_length(fixed):
                raise ValueError(f"{self.name}: longer={self.longer} needs max_steps or num_train_epochs.")
            if (fixed.get("max_steps") or -1) > 0:
                fixed["max_steps"] = round(fixed["max_steps"] * self.longer)
            else:  # the Trainer takes a fraction of an epoch
                fixed["num_train_epochs"] *= self.longer
            if (fixed.get("warmup_steps") or 0) >= 1:  # a value below 1 is a share of the training, which grows with it
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
        settings: of all arms.
        metrics: the first decides.
        greater_is_better: of the first, and of `tune_on`.
        tune_on: the metric that chooses among candidates, such as one on validation data where the first is on test
            data.
    """

    name: str
    path: Path
    question: str
    settings: Settings
    metrics: list[str]
    greater_is_better: bool
    tune_on: str
    baseline: str
    seeds: list[int]
    tuning_seeds: list[int]
    arms: dict[str, Arm]

    @property
    def measured(self) -> list[str]:
        """The metrics that every run has to have."""
        return list(dict.fromkeys([*self.metrics, self.tune_on]))

    def tuning_order(self) -> list[list[Arm]]:
        """The arms in rounds: an arm comes in a later round than the one that it is `like`."""
        rounds: list[list[Arm]] = []
        placed: set[str] = set()
        while len(placed) < len(self.arms):
            ready = [arm for arm in self.arms.values() if arm.name not in placed and arm.like in {None, *placed}]
            if not ready:
                raise ValueError(
                    f"{self.name}: {sorted(set(self.arms) - placed)} are `like` each other in a circle. Let one of "
                    "them be `like` none."
                )
            rounds.append(ready)
            placed |= {arm.name for arm in ready}
        return rounds

    def passes(self, arm: Arm, settings: Settings) -> float:
        """The cost of a step of the arm, in passes of plain training.

        Raises:
            ValueError: an `fsam_*` setting is unknown, or its value is not allowed.
        """
        known = {each.name for each in fields(FSAMArguments)}
        given = {name: value for name, value in settings.items() if name.startswith("fsam_")}
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"{self.path}: {arm.name}: {name!r} is none of {', '.join(sorted(known))}.{hint}")
        return arm.passes if arm.passes is not None else plain_passes(FSAMArguments(**given))

    def weight(self, arm: Arm, settings: Settings) -> float:
        """The duration of a run in relation to the study's others, to estimate the time that is left."""
        return self.passes(arm, settings) * (training_length(settings) or 1.0)

    def total_weight(self) -> float:
        """Of all runs. Every arm counts with its first candidate, since the choice makes no great difference."""
        total = 0.0
        begin: dict[str, Settings] = {}
        for arms in self.tuning_order():
            for arm in arms:
                candidates = arm.candidates(begin[arm.like] if arm.like else self.settings)
                begin[arm.name] = candidates[0]
                weights = [self.weight(arm, each) for each in candidates]
                total += weights[0] * len(self.seeds)
                if len(candidates) > 1:
                    total += sum(weights) * len(self.tuning_seeds)
        return total


def load_studies(
    path: Path, overrides: Settings | None = None, seeds: list[int] | None = None, baseline: str | None = None
) -> Iterator[Study]:
    """Yields the study of a YAML file, or the studies of the files that it lists under `studies`.

    Args:
        overrides: settings of all arms, which win over the file's.
        seeds, baseline: used instead of the file's.

    Raises:
        FileNotFoundError: the file, the recipe or its configuration does not exist.
        ValueError: a key is unknown or missing, a value is of the wrong kind, or an arm itself sets what is overridden.
            The message names it.
    """
    raw = _extended(path)
    if "studies" in raw:
        if set(raw) != {"studies"} or not isinstance(raw["studies"], list):
            raise ValueError(f"{path}: `studies` is a list of YAML files and cannot be combined with other keys.")
        for name in raw["studies"]:
            yield from load_studies(path.parent / name, overrides, seeds, baseline)
        return
    known = {"question", "recipe", "script", "config", "settings", "metrics", "greater_is_better", "baseline"}
    known |= {"seeds", "tuning_seeds", "tune_on", "arms"}
    for name in raw:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"{path}: {name!r} is not a key of a study; these are: {', '.join(sorted(known))}.{hint}")
    if not raw.get("arms"):
        raise ValueError(f"{path}: the study needs the key 'arms'.")
    for name, kind, what in (
        ("settings", dict, "a mapping of names to values"),
        ("arms", dict, "a mapping of names to settings"),
        ("metrics", list, "a list of names"),
        ("greater_is_better", bool, "true or false"),
        ("tune_on", str, "the name of a metric"),
    ):
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            # A mapping is not shown, since settings may hold a password.
            given = f" is {type(raw[name]).__name__}, not" if kind is dict else f"={raw[name]!r} is not"
            raise ValueError(f"{path}: {name}{given} {what}.")
    settings = read_yaml(path.parent / raw["config"]) if raw.get("config") else {}
    settings |= numbers(raw.get("settings") or {}) | (overrides or {})
    recipe = _recipe(path, str(path), raw)
    if recipe is None:
        raise ValueError(f"{path}: the study needs the key 'recipe' or 'script'.")
    arms = {str(name): _arm(path, str(name), keys, recipe) for name, keys in raw["arms"].items()}
    for name, cure in (("seed", "list them under `seeds`, or use --seeds"), ("output_dir", "use --out")):
        if name in (overrides or {}) or any(name in arm.settings for arm in arms.values()):
            raise ValueError(f"{path}: {name!r} is set by `compare` for every run: {cure}.")
    for name in overrides or {}:
        if owners := [arm.name for arm in arms.values() if name in arm.settings]:
            raise ValueError(
                f"{path}: --{name} would apply to all arms, but {', '.join(owners)} set it: change the file."
            )
    metrics = raw.get("metrics") or ["eval_loss"]
    study = Study(
        name=path.stem,
        path=path.resolve(),
        question=raw.get("question", ""),
        settings=settings,
        metrics=metrics,
        greater_is_better=raw.get("greater_is_better") or False,
        tune_on=raw.get("tune_on") or metrics[0],
        baseline=baseline or raw.get("baseline") or next(iter(arms)),
        seeds=seeds or raw.get("seeds") or [0, 1, 2],
        tuning_seeds=raw.get("tuning_seeds") or [100],
        arms=arms,
    )
    for what, name in [("baseline", study.baseline), *((f"{arm.name}: like", arm.like) for arm in arms.values())]:
        if name is not None and name not in arms:
            hint = did_you_mean(name, arms)
            raise ValueError(f"{path}: {what}: {name!r} is not an arm; there are {', '.join(map(repr, arms))}.{hint}")
    for what in ("seeds", "tuning_seeds"):
        values = getattr(study, what)
        if not (isinstance(values, list) and all(isinstance(seed, int) for seed in values)):
            raise ValueError(f"{path}: {what}={values!r} is not a list of whole numbers.")
    if set(study.seeds) & set(study.tuning_seeds) and any(arm.tuned for arm in arms.values()):
        raise ValueError(
            f"{path}: tuning_seeds={study.tuning_seeds} and seeds={study.seeds} overlap. Settings do better on the "
            "seeds that they were tuned on, so tune on seeds that are not in the table."
        )
    decides = study.metrics[0]
    if "greater_is_better" not in raw and is_higher_better(decides) is not False:
        raise ValueError(
            f"{path}: metrics: {decides!r} decides, and lower counts as better unless the file says otherwise: add "
            f"`greater_is_better: true`, or false.{did_you_mean(decides, COMMON)}"
        )
    if study.tune_on != decides and is_higher_better(study.tune_on) not in (None, study.greater_is_better):
        raise ValueError(
            f"{path}: tune_on={study.tune_on!r} and {decides!r}, the first of `metrics`, are not better in the same "
            "direction, and greater_is_better is for both. Choose two that are: two losses, or two accuracies."
        )
    study.tuning_order()
    for arm in arms.values():  # so that a wrong value is found before the first run
        for candidate in arm.candidates(settings):
            study.passes(arm, candidate)
    yield study


def _extended(path: Path, above: tuple[Path, ...] = ()) -> Settings:
    """Read the keys of a study, and under them those of the study that it extends.

    above: the studies that extend it.
    """
    if path in above:
        raise ValueError(f"{path}: extends: {' → '.join(each.name for each in (*above, path))} is a circle: break it.")
    raw = read_yaml(path)
    if "extends" not in raw:
        return raw
    name = raw.pop("extends")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{path}: extends={name!r} is not the name of a file beside it, from where its paths lead.")
    other = _extended(path.parent / name, (*above, path))
    if isinstance(raw.get("settings") or {}, dict):
        raw["settings"] = {**(other.get("settings") or {}), **(raw.get("settings") or {})}
    chosen, arms = raw.get("arms"), other.get("arms") or {}
    if isinstance(chosen, list):
        if unknown := [arm for arm in chosen if arm not in arms]:
            hint = did_you_mean(unknown[0], arms)
            raise ValueError(
                f"{path}: arms: {unknown[0]!r} is not in {name}, which has {', '.join(map(repr, arms))}.{hint}"
            )
        raw["arms"] = {arm: arms[arm] for arm in chosen}
    return {**other, **raw}


def _recipe(path: Path, owner: str, keys: dict[str, Any]) -> Recipe | None:
    """Take the recipe or script that `keys` of the study at `path` name; None where they name neither."""
    recipe, script = keys.get("recipe"), keys.get("script")
    if recipe and script:
        raise ValueError(f"{owner}: recipe={recipe!r} and script={script!r} are both what to run: leave one out.")
    if recipe:
        return Recipe(_existing(path.parent / recipe, f"{owner}: recipe"))
    if not script:
        return None
    module = str(script).removeprefix("-m ").strip()
    if module == str(script):
        return Recipe(_existing(path.parent / module, f"{owner}: script"), unedited=True)
    try:
        with Cleanup().replaced(sys, "path", [os.getcwd(), *sys.path]):  # where the module is run
            found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or not found.has_location:
        raise ValueError(f"{owner}: script={script!r}: there is no module {module!r}: install it, or give a path.")
    return Recipe(Path(str(found.origin)), unedited=True, module=module)


def _arm(path: Path, name: str, keys: Any, recipe: Recipe) -> Arm:
    if not isinstance(keys, dict | None):
        raise ValueError(f"{path}: {name} is {type(keys).__name__}, not a mapping of settings to values.")
    settings = dict(keys or {})
    like, longer, passes = settings.pop("like", None), settings.pop("longer", 1), settings.pop("passes", None)
    recipe = _recipe(path, f"{path}: {name}", settings) or recipe
    for key in ("recipe", "script"):
        settings.pop(key, None)
    for key, value in (("longer", longer), ("passes", 1 if passes is None else passes)):
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {name}: {key}={value!r} is not a number above 0.")
    for key, value in settings.items():
        if value == []:
            raise ValueError(f"{path}: {name}: {key} has no candidates: list the values to tune over.")
    return Arm(name, numbers(settings), recipe, like, longer, passes)


def is_higher_better(metric: str) -> bool | None:
    """Whether the name is that of a metric of which more is better, as far as names tell; None where they don't."""
    if any(part in metric.lower() for part in HIGHER):
        return True
    return False if any(part in metric.lower() for part in LOWER) else None


def training_length(settings: Settings) -> float:
    """Optimizer steps, or epochs where no steps are given; 0 where neither is, and the script's default decides."""
    steps = settings.get("max_steps") or 0
    return float(steps if steps > 0 else settings.get("num_train_epochs") or 0)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        hint = did_you_mean(path.name, (each.name for each in path.parent.glob("*")))
        raise FileNotFoundError(f"{what}: {path} does not exist: give the path of a file.{hint}")
    return path.resolve()


def read_yaml(path: Path) -> Settings:
    return numbers(load_yaml(_existing(path, "The YAML file")))


def load_yaml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is no YAML, or no mapping. The message repeats nothing of it, since it may hold a password.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it is no text in UTF-8"
        line = f", in line {mark.line + 1}. Correct that line" if mark else ". Give a text file"
        raise ValueError(f"{path} can't be read as YAML: {problem}{line}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not `name: value` lines.")
    return values


def numbers(value: Any) -> Any:
    """Turns text such as 1e-3 into numbers, in lists and mappings too: YAML 1.1 reads a number without a point as text.

    Secrets stay text, so that a password of digits stays what it is.
    """
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


def fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
