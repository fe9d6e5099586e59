"""Builds the image without Docker and trains with it, by carrying out the Dockerfile in a clean system.

    python docker/check.py    # Linux, as root, with debootstrap (apt-get install debootstrap); takes minutes

Three things stand in for the real ones. Debian bookworm, made by debootstrap, replaces the CUDA image, so that there
is Python 3.11 and no CUDA. The CPU pins of constraints.txt replace docker/constraints-gpu.txt. chroot replaces a
container: users and files are separate, but network and processes are those of the machine. So this shows that every
step works from nothing, that nothing is missing in the context, and that the entry point trains as a user who is not
root. It does not use a GPU.
"""

import argparse
import ast
import json
import os
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Docker's default
HOST = "/host"  # where files of this machine that pip is configured with appear in the image
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the recipes that are run here need no network
FEW_STEPS = ["--max_steps", "4", "--eval_steps", "4", "--validation_blocks", "8"]


# ---- Reading the Dockerfile and the .dockerignore ----


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, the rest) of each instruction, without comments and with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(name.upper(), rest.strip()) for name, rest in (line.split(maxsplit=1) for line in joined.splitlines())]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps `path`, relative to the repository, out of the context: the last match decides."""
    absolute = PurePosixPath("/", path)
    verdict = False
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        # An absolute pattern matches the whole path, a relative one its end.
        bare = bare.removeprefix("**/") if bare.startswith("**/") else f"/{bare}"
        if any(part.match(bare) for part in (absolute, *absolute.parents)):
            verdict = not pattern.startswith("!")
    return verdict


def ignore_patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# ---- What pip on this machine is configured with ----


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """This machine's pip configuration as environment variables, and the files and folders it names.

    In the variables those are below HOST already.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings, named = {}, []
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        words = []
        for word in ast.literal_eval(value).split():
            scheme = "file://" if word.startswith("file://") else ""
            path = Path(word.removeprefix(scheme))
            if path.is_absolute() and path.exists():
                named.append(path.parent if scheme else path)  # the pages of an index link to files beside it
                word = f"{scheme}{HOST}{path}"
            words.append(word)
        settings["PIP_" + key.rpartition(".")[2].upper().replace("-", "_")] = " ".join(words)
    return settings, named


# ---- The image ----


@dataclass
class Image:
    """A folder that the instructions fill, and the settings that they make."""

    folder: Path
    build_args: dict[str, str]
    args: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "root"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        pip, named = pip_settings()
        proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
        self.machine_env = {**proxies, **pip}
        self.binds = {path: f"{HOST}{path}" for path in named}
        # Docker, too, mounts files of its own over the first two.
        self.binds |= {Path(path): path for path in ("/etc/resolv.conf", "/etc/hosts", "/dev")}

    def apply(self, name: str, rest: str) -> None:
        match name:
            case "FROM":
                subprocess.run(["debootstrap", "--variant=minbase", "bookworm", self.folder], check=True)
                self.run(["useradd", "--create-home", "--uid", "1000", "ubuntu"])  # as in Ubuntu 24.04's image
            case "ARG":
                key, _, default = rest.partition("=")
                self.args[key] = self.build_args.get(key, self.expand(default))
            case "ENV":
                pairs = (word.partition("=") for word in shlex.split(rest))
                self.env |= {key: self.expand(value) for key, _, value in pairs}
            case "WORKDIR":
                self.workdir = str(PurePosixPath(self.workdir, self.expand(rest)))
                self.inside(self.workdir).mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = shlex.split(self.expand(rest))
                for source in sources:
                    self.copy(source, target)
            case "RUN":
                self.run(["/bin/sh", "-c", rest], self.args | self.machine_env)
            case "USER":
                self.user = self.expand(rest)
            case "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            case _:
                raise ValueError(
                    f"docker/check.py does not know the instruction {name}: add it to Image.apply, or leave it out."
                )

    def expand(self, text: str) -> str:
        return string.Template(text).substitute(self.args | self.env)

    def inside(self, path: str) -> Path:
        """Where `path`, relative to WORKDIR, lies on this machine."""
        return self.folder / str(PurePosixPath("/", self.workdir, path)).lstrip("/")

    def copy(self, source: str, target: str) -> None:
        """Copies as Docker does: of a folder its content, and a file into `target/` or as `target`."""
        patterns = ignore_patterns()
        if source.startswith("--") or ignored(source, patterns):
            raise ValueError(f"COPY {source}: an option that docker/check.py does not know, or out of the context.")
        if (ROOT / source).is_dir():
            files = [path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*") if path.is_file()]
            names = [str(path) for path in files if not ignored(f"{source}/{path}", patterns)]
            copies = [(ROOT / source / name, self.inside(target) / name) for name in names]
        else:
            into_folder = target.endswith("/") or self.inside(target).is_dir()
            copies = [(ROOT / source, self.inside(target) / Path(source).name if into_folder else self.inside(target))]
        for origin, destination in copies:
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, destination)

    def run(self, command: list[str], env: dict[str, str] | None = None, capture: bool = False) -> str:
        """`command` in the image as USER in WORKDIR, with the image's environment and `env` and nothing else."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        variables = {"HOME": home} | self.env | (env or {})
        chroot = ["chroot", f"--userspec={self.user}", "--", str(self.folder), "/usr/bin/env", "-i"]
        chroot += [f"--chdir={self.workdir}", *(f"{key}={value}" for key, value in variables.items()), *command]
        # The mounts exist for this command only and end with it, so that removing the folder can't reach through them.
        lines = ["set -e", *self.mounts(), f"exec {shlex.join(chroot)}"]
        unshared = ["unshare", "--mount", "--", "/bin/sh", "-c", "\n".join(lines)]
        done = subprocess.run(unshared, check=True, text=True, stdout=subprocess.PIPE if capture else None)
        return done.stdout or ""

    def mounts(self) -> Iterator[str]:
        yield f"mount -t proc proc {shlex.quote(str(self.inside('/proc')))}"
        for origin, place in self.binds.items():
            target = self.inside(place)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.mkdir() if origin.is_dir() else target.touch()
            yield shlex.join(["mount", "-o", "rbind,ro", str(origin), str(target)])

    def start(self, *arguments: str) -> None:
        """`docker run -e HF_HUB_OFFLINE=1 IMAGE arguments`"""
        print(f"\n== docker run IMAGE {shlex.join(arguments)}", flush=True)
        self.run([*self.entrypoint, *arguments], OFFLINE)


# ---- The check ----


def build(image: Image) -> None:
    steps = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    for number, (name, rest) in enumerate(steps, start=1):
        print(f"\n== {number}/{len(steps)} {name} {rest}", flush=True)
        started = time.monotonic()
        image.apply(name, rest)
        print(f"== {time.monotonic() - started:.1f} s", flush=True)


def check(image: Image) -> None:
    """Asserts what the image is to provide."""
    user = image.run(["whoami"], capture=True).strip()
    assert user == image.user != "root", f"The entry point runs as {user}."
    leftovers = [*image.inside("/var/lib/apt/lists").glob("*Packages*"), *image.inside("/root/.cache").glob("*")]
    assert not leftovers, f"Caches are left in the image: {leftovers}"
    image.run(["pip", "check"], image.machine_env)

    image.start()
    image.start("recipes/configs/pretrain_tiny.yaml", *FEW_STEPS)
    image.start("recipes/configs/finetune_topics.yaml", *FEW_STEPS)
    for name, weights in (("pretrain_tiny", "model"), ("finetune_topics", "adapter_model")):
        results = image.inside(f"outputs/{name}")
        for file in (f"{weights}.safetensors", "results.json", "curves.png", "README.md"):
            assert (results / file).stat().st_size, f"outputs/{name}/{file} is empty."
        steps = json.loads((results / "results.json").read_text(encoding="utf-8"))["steps"]
        assert steps == 4, f"outputs/{name} is the result of {steps} steps in place of 4."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build; may be repeated"
    )
    build_args = {"CONSTRAINTS": "constraints.txt"}
    build_args |= dict(argument.split("=", 1) for argument in parser.parse_args().build_arg)
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit(
            "docker/check.py makes a system of its own: it needs root, and debootstrap (apt-get install debootstrap)."
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hf-fsam-image-") as folder:
        Path(folder).chmod(0o755)  # as / is; a temporary folder is closed to other users
        image = Image(Path(folder), build_args)
        try:
            build(image)
            check(image)
        except subprocess.CalledProcessError as error:
            sys.exit(f"== That ended with exit status {error.returncode}.")
    print(f"\n== The image builds and trains: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
