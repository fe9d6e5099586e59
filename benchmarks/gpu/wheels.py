"""Finds the wheels that a machine without a network lacks for the checks, and prints what downloads them."""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

WANTED = ("deepspeed", "datasets", "evaluate", "trl", "tokenizers", "scikit-learn", "pyyaml", "matplotlib", "scipy")
WANTED += ("tqdm", "peft", "pytest", "pytest-timeout", "pytest-xdist", "liger-kernel")
BASE = ("torch", "transformers", "accelerate", "peft")
# The machine that the wheels are for: Python 3.12 on Linux, x86-64.
TARGET = {"python_version": "3.12", "python_full_version": "3.12.3", "platform_machine": "x86_64"}
TARGET |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]
NO_WHEEL = {"deepspeed"}  # published as sources only (0.19.8)


def print_wheels(freeze: str) -> None:
    """Prints what to run here, where there is a network, and there. `freeze`: a file of what is there, or ""."""
    there = set(names_in(Path(freeze))) if freeze else closure(BASE)
    lacking = sorted(closure(WANTED) - there)
    built = [name for name in lacking if name in NO_WHEEL]
    loaded = [name for name in lacking if name not in NO_WHEEL]
    pip = f"{sys.executable} -m pip"
    print(f"# missing there: {', '.join(lacking) or 'nothing'}")
    if loaded:
        platforms = " ".join(f"--platform {platform}" for platform in PLATFORMS)
        print(f"{pip} download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp {platforms} \\")
        print(f"  -d wheels {' '.join(map(pinned, loaded))}")
    for name in built:
        print(f"DS_BUILD_OPS=0 {pip} wheel --no-deps --no-build-isolation -w wheels {pinned(name)}")
    if lacking:
        print("# there, in the repository:")
        print("python3 -m pip install --no-index --no-deps wheels/*.whl && make gpu PYTHON=python3")


def closure(names: Iterable[str]) -> set[str]:
    """The packages and all that they require on the target, as the packages installed here say."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(name), "") for name in names]
    while waiting:
        requirement, extra = waiting.pop()
        name = normal(requirement.name)
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            needed = [Requirement(each) for each in requires(name) or []]
        except PackageNotFoundError:  # liger-kernel, which needs nothing but torch and triton
            continue
        for each in needed:
            if each.marker is None or each.marker.evaluate(TARGET | {"extra": extra}):
                waiting += [(each, wanted) for wanted in ("", *each.extras)]
    return {name for name, _ in found}


def names_in(freeze: Path) -> list[str]:
    """The packages in the output of `pip freeze` or `pip list`."""
    first = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in freeze.read_text("utf-8").splitlines())
    return [normal(match.group()) for match in first if match]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(name: str) -> str:
    """The package in the version that is installed here, with which the tests were run."""
    try:
        return f"{name}=={version(name).split('+')[0]}"
    except PackageNotFoundError:
        return name
