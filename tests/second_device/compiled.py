"""`device.cpp` as a library that torch loads, compiled once for each version of it and of torch."""

import hashlib
import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")


def missing() -> str | None:
    """What this machine lacks to compile the device, and the cure; None where it lacks nothing."""
    compiler, *_ = shlex.split(os.environ.get("CXX", "c++"))
    for program, cure in ((compiler, "install g++, or name a compiler in CXX"), ("ninja", "pip install ninja")):
        if shutil.which(program, path=_path()) is None:
            return f"there is no {program!r} to compile a second device with: {cure}"
    return None


def load() -> None:
    """Compile the device, which takes about half a minute, or find it in the user's cache; load it into torch."""
    version = "-".join([torch.__version__, platform.machine(), hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]])
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cpp_extension.get_default_build_root()))
    library = root / "hf_fsam_second_device" / version / "second_device.so"
    if library.exists():
        torch.ops.load_library(library)
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    # Each build has a folder of its own. In a common one, torch would wait for ever for the lock of a killed build.
    with TemporaryDirectory(dir=library.parent) as folder:
        path, os.environ["PATH"] = os.environ.get("PATH"), _path()
        try:
            cpp_extension.load(
                "second_device", str(SOURCE), extra_cflags=["-O0"], build_directory=folder, is_python_module=False
            )
        finally:
            os.environ["PATH"] = path or os.defpath
        os.replace(Path(folder) / library.name, library)


def _path() -> str:
    """The search path with pip's programs beside this Python, whether its environment is activated or not."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
