"""Build the image's steps without Docker, and run what it is for: ``sudo python infra/image/prove.py [--target cpu]``.

Makes a clean Debian root by debootstrap, copies into it what the .dockerignore lets through, and carries out the
instructions of the Dockerfile stage by stage, each RUN in a chroot with namespaces of its own: the steps are those of
``install.sh``, as Docker would call them. Then the target's root is made read-only, its network taken away, and
``smoke.sh`` run in it as the container's user; the HEALTHCHECK is asked. What pip is told on this machine it is told
in the chroot, in the place of the build's secret; none of it stays. Mounts live in a mount namespace and processes in
a process namespace: both are gone when a command ends. Needs Linux, root, debootstrap, unshare, ip, and some minutes
the first time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dockerfile import FILE, ROOT, Instruction, Stage, chain, context, environment, expand, last, sources, stages

HERE = Path(__file__).parent
NEEDED = ("debootstrap", "unshare", "chroot", "ip", "mount")
PLAIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SUITE = "bookworm"
WRITABLE = ("/tmp", "/dev/shm")  # noqa: S108 - paths in the container


def pip_here() -> tuple[dict[str, str], list[Path]]:
    """Return what pip is told on this machine, as variables, and the local files and folders that they name."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    variables, paths = dict[str, str](), set[Path]()
    for line in sorted(told.splitlines(), key=lambda line: line.startswith(":env:")):  # as in pip, variables win
        name, _, value = line.partition("=")
        words = value.strip("'\"").replace("\\n", " ")
        key = name.lstrip(":").split(".", 1)[1].upper().replace("-", "_").strip("_")
        variables[f"PIP_{key}"] = words
        for word in words.split():  # the files of an index lie beside it
            path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
            paths |= {path} if path.is_absolute() and path.exists() else set()
    return variables, sorted(paths)


def inside(
    root: Path,
    command: list[str],
    variables: dict[str, str],
    *,
    user: str = "0:0",
    binds: list[Path] | None = None,
    alone: bool = False,
    script: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a root, in namespaces that end with it.

    Args:
        root: The root.
        command: What to run.
        variables: All that it sees.
        user: Numbers of user and group.
        binds: Paths of this machine that it may read at the same place.
        alone: Without network, and with nothing to write to but memory at /tmp and /dev/shm.
        script: What it reads from its standard input.
    """
    at = shlex.quote(str(root))
    lines = ["set -eu"]
    if alone:
        lines += [f"mount --bind {at} {at}", f"mount -o remount,bind,ro {at}", "ip link set lo up"]
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {at}{WRITABLE[0]}"]
    lines += [f"mount -t proc proc {at}/proc"]
    lines += [f"mkdir -p {at}{WRITABLE[1]}"] * (not alone) + [f"mount -t tmpfs -o mode=1777 tmpfs {at}{WRITABLE[1]}"]
    for path in [Path("/etc/resolv.conf")] * (not alone) + (binds or []):
        there = shlex.quote(f"{root}{path}")
        lines.append(f"mkdir -p {there}" if path.is_dir() else f"mkdir -p $(dirname {there}); touch {there}")
        lines.append(f"mount --bind -o ro {shlex.quote(str(path))} {there}")
    words = [f"{name}={value}" for name, value in variables.items()]
    lines.append(
        shlex.join(["exec", "chroot", f"--userspec={user}", "--groups=", str(root), "env", "-i", *words, *command])
    )
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *["--net"] * alone]
    with open(script or os.devnull, encoding="utf-8") as given:
        return subprocess.run(
            [*unshare, "sh", "-c", "\n".join(lines)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def size(path: Path) -> int:
    """Return the bytes that a folder takes on disk, files with several names once."""
    return int(
        subprocess.run(["du", "-s", "-B1", "-x", path], capture_output=True, text=True, check=True).stdout.split()[0]
    )


class Proof:
    """The stages that were made so far, a root each, and what each step took."""

    def __init__(self, folder: Path, found: dict[str, Stage], arguments: dict[str, str]) -> None:
        self.folder, self.found, self.arguments = folder, found, arguments
        self.seconds: dict[str, float] = {}
        self.pip, self.paths = pip_here()

    def root(self, name: str) -> Path:
        """Return where a stage's root is."""
        return self.folder / "stages" / name

    def base(self) -> Path:
        """Make the root that stands for the base image, once."""
        at = self.folder / f"{SUITE}-minbase"
        if not at.exists():
            making = at.with_suffix(".part")
            shutil.rmtree(making, ignore_errors=True)
            self._timed("debootstrap", ["debootstrap", "--variant=minbase", SUITE, str(making)])
            making.rename(at)
        return at

    def make(self, name: str) -> None:
        """Make a stage, with those that it needs, unless it is made."""
        stage, done = self.found[name], self.root(f"{name}.done")
        if done.exists():
            return
        if stage.base in self.found:
            self.make(stage.base)
        shutil.rmtree(self.root(name), ignore_errors=True)
        self.root(name).parent.mkdir(parents=True, exist_ok=True)
        begin = self.root(stage.base) if stage.base in self.found else self.base()
        subprocess.run(["cp", "-a", "--reflink=auto", begin, self.root(name)], check=True)
        given: dict[str, str] = {}
        for one in stage.instructions:
            self._carry_out(name, one, given)
        done.touch()

    def _carry_out(self, name: str, one: Instruction, given: dict[str, str]) -> None:
        if one.word == "ARG":
            key, _, value = one.rest.partition("=")
            given[key] = self.arguments.get(key, value)
        elif one.word == "WORKDIR":
            (self.root(name) / one.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif one.word == "COPY":
            self._copy(name, one)
        elif one.word == "RUN":
            command = " ".join(word for word in one.rest.split() if not word.startswith("--mount="))
            secret = "--mount=type=secret" in one.rest
            variables = {"PATH": PLAIN_PATH, "HOME": "/root"} | given | (self.pip if secret else {})
            begin = time.perf_counter()
            done = inside(self.root(name), ["sh", "-c", command], variables, binds=self.paths if secret else None)
            self._note(f"{name}: {command}", begin, done)

    def _copy(self, name: str, one: Instruction) -> None:
        stage, what, where = sources(one)
        if stage is not None:
            self.make(stage)
        start = self.folder / "context" if stage is None else self.root(stage)
        for path in what:
            source, to = start / path.lstrip("/"), self.root(name) / where.lstrip("/")
            if source.is_dir():
                shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True)
            else:
                to = to / source.name if where.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, to)

    def _timed(self, what: str, command: list[str]) -> None:
        begin = time.perf_counter()
        self._note(what, begin, subprocess.run(command, capture_output=True, text=True, check=False))

    def _note(self, what: str, begin: float, done: subprocess.CompletedProcess[str]) -> None:
        self.seconds[what] = round(time.perf_counter() - begin, 1)
        print(f"{self.seconds[what]:7.1f} s  {what}", flush=True)
        if done.returncode:
            sys.exit(f"{what} ended with {done.returncode}:\n{done.stdout[-4000:]}")

    def run(self, target: str) -> None:
        """Run what the image is for, as its user, and say what was done."""
        variables = {"HOME": "/home/somaflow"} | environment(self.found, target)
        user = last(self.found, target, "USER")
        begin = time.perf_counter()
        shell = ["bash", "-l", "-s"]
        done = inside(self.root(target), shell, variables, user=user, alone=True, script=HERE / "smoke.sh")
        self._note(f"{target}: smoke.sh", begin, done)
        print(done.stdout, end="")

    def unwell(self, target: str) -> None:
        """See that the HEALTHCHECK, as it stands, says of a container where nothing runs that it is not well."""
        check = last(self.found, target, "HEALTHCHECK").partition(" CMD ")[2]
        variables = environment(self.found, target)
        done = inside(
            self.root(target), json.loads(check), variables, user=last(self.found, target, "USER"), alone=True
        )
        if done.returncode != 1 or "52365" not in done.stdout:
            sys.exit(f"HEALTHCHECK {check} ended with {done.returncode} where nothing runs:\n{done.stdout[-2000:]}")


def main() -> None:
    """Prove a target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "image", help="where the roots are made")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build takes it"
    )
    parser.add_argument("--keep", action="store_true", help="leave the stages there, and go on with those that are")
    options = parser.parse_args()
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        sys.exit(f"the proof needs root and: {', '.join(NEEDED)}; missing here: {', '.join(missing) or 'root'}")
    arguments = dict(word.split("=", 1) for word in options.build_arg)
    found = stages(FILE.read_text(encoding="utf-8"), {key: expand(value, {}) for key, value in arguments.items()})
    folder: Path = options.folder.resolve()
    if not options.keep:
        shutil.rmtree(folder / "stages", ignore_errors=True)
    shutil.rmtree(folder / "context", ignore_errors=True)
    for path in context(ROOT):
        to = folder / "context" / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
    proof = Proof(folder, found, arguments)
    proof.make(options.target)
    proof.unwell(options.target)
    proof.run(options.target)
    sizes = {
        "context": size(folder / "context"),
        "base": size(proof.root("base")),
        "environment": size(proof.root(options.target) / "opt" / "somaflow"),
        "image": size(proof.root(options.target)),
    }
    for name, n_bytes in sizes.items():
        print(f"{n_bytes / 2**20:9,.1f} MiB  {name}")
    answer = {
        "target": options.target,
        "seconds": proof.seconds,
        "bytes": sizes,
        "stages": len(chain(found, options.target)),
    }
    if not options.keep:
        shutil.rmtree(folder / "stages")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
