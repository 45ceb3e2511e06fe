"""Check the Dockerfile and its context without Docker: ``python infra/image/dockerfile.py``.

Prints what is wrong, a line each, and ends with 1; or with 0. ``--tag cpu`` prints the image's name instead, from the
project's version and the lock's Ray, as the manifests want it. Only what our Dockerfile uses is understood: FROM, ARG,
ENV, COPY, RUN, USER, WORKDIR, HEALTHCHECK, CMD, and of a .dockerignore ``*``, ``**`` and ``!``. ``prove.py`` runs what
is read here. Where hadolint is installed, its rules are asked too.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra" / "image" / "Dockerfile"
TARGETS = ("cpu", "gpu")
WORDS = {"FROM", "ARG", "ENV", "COPY", "RUN", "USER", "WORKDIR", "HEALTHCHECK", "CMD"}
LARGEST_CONTEXT = 4 * 2**20
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
SECRET_FILE = re.compile(r"^(\.env.*|.*\.(pem|key|p12)|id_(rsa|ed25519).*|credentials.*|pip\.conf|\.netrc)$")
STEP = re.compile(r"^(?:--mount=type=secret,\S+ )?sh /build/install\.sh ([a-z]+)( cpu| gpu)?$")


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it begins, its word in capitals, the rest with continued lines joined."""

    line: int
    word: str
    rest: str


@dataclass
class Stage:
    """What begins with a FROM.

    Attributes:
        name: After AS.
        base: Another stage's name, or an image, with ARGs as they are without ``--build-arg``.
        instructions: In order, without the FROM.
    """

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def instructions(text: str) -> Iterator[Instruction]:
    """Read the instructions of a Dockerfile.

    Raises:
        ValueError: There is one that is not understood here.
    """
    held, begin = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begin = begin if held else number
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1].rstrip() + " "
            continue
        word, _, rest = held.partition(" ")
        if word.upper() not in WORDS:
            raise ValueError(f"line {begin}: {word} is none of {', '.join(sorted(WORDS))}")
        yield Instruction(begin, word.upper(), rest.strip())
        held = ""


def expand(text: str, values: dict[str, str]) -> str:
    """Put values into ``$NAME``, ``${NAME}`` and ``${NAME:+word}``."""

    def one(found: re.Match[str]) -> str:
        name, word = found["braced"] or found["bare"], found["word"]
        value = values.get(name, "")
        return value if word is None else expand(word, values) * bool(value)

    return re.sub(r"\$(?:\{(?P<braced>\w+)(?::\+(?P<word>[^}]*))?\}|(?P<bare>\w+))", one, text)


def stages(text: str, arguments: dict[str, str] | None = None) -> dict[str, Stage]:
    """Read the stages of a Dockerfile, with the values of ARGs that stand before the first.

    Raises:
        ValueError: Something is not understood, or a stage has no name.
    """
    values, found = dict(arguments or {}), dict[str, Stage]()
    stage = None
    for one in instructions(text):
        if one.word == "FROM":
            match = re.fullmatch(r"(\S+) AS ([a-z][a-z-]*)", one.rest)
            if match is None:
                raise ValueError(f"line {one.line}: a stage needs a name: FROM IMAGE AS NAME")
            stage = found[match[2]] = Stage(match[2], expand(match[1], values))
        elif stage is not None:
            stage.instructions.append(one)
        elif one.word == "ARG":
            name, _, value = one.rest.partition("=")
            values.setdefault(name, value)
        else:
            raise ValueError(f"line {one.line}: {one.word} before the first FROM")
    return found


def chain(found: dict[str, Stage], name: str) -> list[Stage]:
    """Return a stage with those that it begins with, the first one first."""
    stage = found[name]
    return [*chain(found, stage.base), stage] if stage.base in found else [stage]


def sources(one: Instruction) -> tuple[str | None, list[str], str]:
    """Return of a COPY the stage that it copies from (None: the context), what, and where to."""
    words = shlex.split(one.rest)
    flags = [word for word in words if word.startswith("--")]
    *what, where = [word for word in words if not word.startswith("--")]
    return next((flag.removeprefix("--from=") for flag in flags if flag.startswith("--from=")), None), what, where


def environment(found: dict[str, Stage], name: str) -> dict[str, str]:
    """Return the variables that a container of a stage begins with."""
    values: dict[str, str] = {}
    for stage in chain(found, name):
        for one in stage.instructions:
            if one.word == "ENV":
                values |= dict(word.split("=", 1) for word in shlex.split(one.rest))
    return values


def last(found: dict[str, Stage], name: str, word: str) -> str:
    """Return what an instruction of this word said last on the way to a stage; empty where none does."""
    said = [one.rest for stage in chain(found, name) for one in stage.instructions if one.word == word]
    return said[-1] if said else ""


# ---------------------------------------------------------------------------------------------------- the context
def _pattern(line: str) -> re.Pattern[str]:
    """Return what a line of a .dockerignore matches; a folder's match holds for what is in it."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", line.strip("/"))
    return re.compile("".join(parts.get(word, re.escape(word)) for word in words) + r"(?:/.*)?")


def context(root: Path) -> list[Path]:
    """Return the files that a .dockerignore lets through, below ``root``; the last line that matches decides."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    rules = [(line.startswith("!"), _pattern(line.removeprefix("!"))) for line in kept]
    tops = {line[1:].split("/")[0] for line in kept if line.startswith("!")}
    at = [root / top for top in sorted(tops)] if kept and kept[0] == "*" else [root]
    files = [path for top in at for path in (sorted(top.rglob("*")) if top.is_dir() else [top]) if path.is_file()]
    found = []
    for path in files:
        name, there = path.relative_to(root).as_posix(), True
        for allowed, pattern in rules:
            if pattern.fullmatch(name):
                there = allowed
        if there:
            found.append(path)
    return found


# ------------------------------------------------------------------------------------------------------ the rules
def check(text: str, root: Path = ROOT) -> Iterator[str]:
    """Tell what is wrong with a Dockerfile and the context below ``root``."""
    try:
        found = stages(text)
    except ValueError as error:
        yield str(error)
        return
    files = context(root)
    yield from _bases(text, found)
    yield from _context(root, files)
    steps = set(re.findall(r"(?m)^([a-z]+)\)$", (root / "infra/image/install.sh").read_text(encoding="utf-8")))
    names = {path.relative_to(root).as_posix() for path in files}
    for stage in found.values():
        for one in stage.instructions:
            yield from (f"line {one.line}: {what}" for what in _instruction(one, found, names, steps))
    for target in TARGETS:
        if target not in found:
            yield f"there is no target {target}; there are {', '.join(found)}"
        else:
            yield from (f"target {target}: {what}" for what in _target(found, target))
    if found and list(found)[-1] != "cpu":
        yield f"the last stage, which docker build takes by itself, is {list(found)[-1]}, not cpu"


def _bases(text: str, found: dict[str, Stage]) -> Iterator[str]:
    pinned = stages(text, {"BASE_DIGEST": "sha256:" + "0" * 64})
    for name, stage in found.items():
        if stage.base in found:
            continue
        if not re.fullmatch(r"[a-z/]+:\S*\d\S*", stage.base):
            yield f"stage {name}: {stage.base} is no image of one version: IMAGE:TAG, with the version in the tag"
        if "@sha256:" not in pinned[name].base:
            yield f"stage {name}: BASE_DIGEST does not reach {stage.base}"


def _context(root: Path, files: list[Path]) -> Iterator[str]:
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST_CONTEXT:
        yield f"context: {size:,} bytes, more than {LARGEST_CONTEXT:,}; .dockerignore lets through too much"
    for path in files:
        if SECRET_FILE.match(path.name):
            yield f"context: {path.relative_to(root)} may hold a secret"


def _instruction(one: Instruction, found: dict[str, Stage], names: set[str], steps: set[str]) -> Iterator[str]:
    if one.word == "RUN":
        step = STEP.match(one.rest)
        if step is None:
            yield f"RUN {one.rest}: steps that can be proved are in install.sh: RUN sh /build/install.sh STEP"
        elif step[1] not in steps:
            yield f"install.sh has no step {step[1]}; it has {', '.join(sorted(steps))}"
    elif one.word == "COPY":
        stage, what, _ = sources(one)
        if stage is not None and stage not in found:
            yield f"COPY --from={stage}: there is no such stage"
        missing = [path for path in what if not any(name == path or name.startswith(f"{path}/") for name in names)]
        if stage is None:
            yield from (f"COPY {path}: not in the context; see .dockerignore" for path in missing)
    elif one.word in ("ENV", "ARG"):
        for word in shlex.split(one.rest):
            name, _, value = word.partition("=")
            if SECRET.search(name):
                yield f"{one.word} {name}: whoever has the image can read it; take RUN --mount=type=secret"
            if re.search(r"://[^/\s]*@", value):
                yield f"{one.word} {name}: there is a password in the address"


def _target(found: dict[str, Stage], target: str) -> Iterator[str]:
    user = last(found, target, "USER").split(":")[0]
    if not user.isdigit() or int(user) == 0:
        yield f"runs as {user or 'root'}; a number other than 0 is needed, for runAsNonRoot looks at numbers"
    if not last(found, target, "HEALTHCHECK"):
        yield "has no HEALTHCHECK"
    if environment(found, target).get("RAY_USAGE_STATS_ENABLED") != "0":
        yield "Ray would report its use: RAY_USAGE_STATS_ENABLED is not 0"
    ran = [one.rest for stage in chain(found, target) for one in stage.instructions if one.word == "RUN"]
    for step in ran:
        if not step.endswith(" system"):
            yield f"RUN {step} leaves what builds in the image; copy what is made --from another stage"
    copied = [sources(one) for one in found[target].instructions if one.word == "COPY"]
    if not any(stage == f"venv-{target}" for stage, _, _ in copied):
        yield f"does not take its environment from venv-{target}"


def tag(target: str, root: Path = ROOT) -> str:
    """Return the name of a target's image."""
    ray = re.search(r"(?m)^ray==(\S+)$", (root / "requirements.lock").read_text(encoding="utf-8"))
    project = re.search(r'(?m)^version = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"))
    if ray is None or project is None:
        raise ValueError("requirements.lock has no ray==, or pyproject.toml no version")
    return f"somaflow:{project[1]}-ray{ray[1]}-{target}"


def main() -> int:
    """Check, or print a tag; return the status to end with."""
    parser = argparse.ArgumentParser(description="Check the Dockerfile and its context without Docker.")
    parser.add_argument("--tag", choices=TARGETS, help="print the name of a target's image, and check nothing")
    options = parser.parse_args()
    if options.tag:
        print(tag(options.tag))
        return 0
    wrong = list(check(FILE.read_text(encoding="utf-8")))
    hadolint = Path(sys.executable).parent / "hadolint"
    if hadolint.exists():
        said = subprocess.run([hadolint, FILE], capture_output=True, text=True, check=False)
        wrong += (said.stdout + said.stderr).splitlines()
    for line in wrong:
        print(line)
    if not wrong:
        files = context(ROOT)
        size = sum(path.stat().st_size for path in files)
        by = "" if hadolint.exists() else "; hadolint is not installed, its rules were not asked"
        print(f"the Dockerfile is as it should be; its context is {len(files)} files, {size:,} bytes{by}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
