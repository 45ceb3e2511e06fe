"""The image: its Dockerfile is right as it is, and an error planted of each kind is found."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "infra" / "image"
TEXT = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dockerfile() -> ModuleType:
    return importlib.import_module("infra.image.dockerfile")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with a little of everything, and things that must not get into an image."""
    for name in ("ingest", "store", "train", "serve"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "__pycache__" / "x.pyc").write_text("")
    for name in (
        "requirements.lock",
        "pyproject.toml",
        "README.md",
        "lake.bin",
        "infra/image/Dockerfile",
        ".git/config",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("infra/image/install.sh", "infra/image/health.py", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "serve" / "page").mkdir()
    (tmp_path / "serve" / "page" / "index.html").write_text("")
    (tmp_path / "train" / ".env").write_text("")
    return tmp_path


def test_the_dockerfile_is_as_it_should_be(dockerfile: ModuleType) -> None:
    assert list(dockerfile.check(TEXT)) == []


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed here; the lock has it")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_context_is_what_the_image_needs_and_no_more(dockerfile: ModuleType, tree: Path) -> None:
    found = {path.relative_to(tree).as_posix() for path in dockerfile.context(tree)}
    assert found == {
        *("requirements.lock", "pyproject.toml", "README.md", "infra/image/install.sh", "infra/image/health.py"),
        *(f"{name}/__init__.py" for name in ("ingest", "store", "train", "serve")),
        "serve/page/index.html",
    }


def test_the_context_of_this_checkout_is_small_and_has_nothing_that_git_does_not_know(dockerfile: ModuleType) -> None:
    files = dockerfile.context(ROOT)
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        ignored = subprocess.run(
            ["git", "check-ignore", *[path.relative_to(ROOT).as_posix() for path in files]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ignored.stdout == ""


@pytest.mark.parametrize(
    ("line", "path", "matches"),
    [
        ("*", "lake/x", True),
        ("ingest", "ingest/a/b.py", True),
        ("ingest", "ingestion", False),
        ("**/__pycache__", "__pycache__/x.pyc", True),
        ("**/__pycache__", "a/b/__pycache__/x.pyc", True),
        ("**/.*", "serve/.env", True),
        ("**/.*", "serve/env", False),
        ("*.py", "a/b.py", False),
        ("a?c", "abc", True),
    ],
)
def test_patterns_match_as_dockers_do(dockerfile: ModuleType, line: str, path: str, matches: bool) -> None:
    assert bool(dockerfile._pattern(line).fullmatch(path)) is matches


def test_arguments_are_put_in_as_docker_does(dockerfile: ModuleType) -> None:
    assert dockerfile.expand("a:1${D:+@$D}-$E-${F}", {"D": "", "E": "e", "F": "f"}) == "a:1-e-f"
    assert dockerfile.expand("a:1${D:+@$D}", {"D": "sha256:0"}) == "a:1@sha256:0"


def test_a_digest_reaches_the_base(dockerfile: ModuleType) -> None:
    found = dockerfile.stages(TEXT, {"BASE_DIGEST": "sha256:12"})
    assert found["base"].base.endswith("-slim@sha256:12")
    assert [stage.name for stage in dockerfile.chain(found, "gpu")] == ["base", "node", "gpu"]


PLANTED = {
    "a base of any version": (
        "debian:bookworm-20250520-slim",
        "debian:latest",
        "debian:latest is no image of one version",
    ),
    "a base without a tag": ("debian:bookworm-20250520-slim", "debian", "is no image of one version"),
    "a digest that goes nowhere": ("${BASE_DIGEST:+@$BASE_DIGEST}", "", "BASE_DIGEST does not reach"),
    "root": ("USER 1000:1000", "USER root", "target cpu: runs as root"),
    "root by number": ("USER 1000:1000", "USER 0", "target gpu: runs as 0"),
    "a user by name": ("USER 1000:1000", "USER somaflow", "runAsNonRoot looks at numbers"),
    "nobody said who": ("USER 1000:1000\n", "", "target cpu: runs as root"),
    "no health check": ("HEALTHCHECK ", "# HEALTHCHECK ", "target cpu: has no HEALTHCHECK"),
    "something from the net": ("COPY infra/image/health.py", "ADD https://example.org/health.py", "ADD is none of"),
    "a file that is not there": ("COPY ingest /build/ingest", "COPY ingestion /build/ingest", "COPY ingestion: not in"),
    "a file that is left out": ("COPY ingest /build/ingest", "COPY docs /build/docs", "COPY docs: not in the context"),
    "a stage that is not there": ("--from=venv-cpu", "--from=venv-tpu", "there is no such stage"),
    "the other stage's environment": ("--from=venv-gpu", "--from=venv-cpu", "not take its environment from venv-gpu"),
    "a step outside the script": (
        "RUN sh /build/install.sh tools",
        "RUN apt-get install gcc",
        "steps that can be proved are in install.sh",
    ),
    "a step that is not there": ("install.sh tools", "install.sh tool", "install.sh has no step tool"),
    "tools in the image": ("FROM base AS node", "FROM build AS node", "leaves what builds in the image"),
    "a secret among the variables": ("LANG=C.UTF-8", "AWS_SECRET_ACCESS_KEY=x", "whoever has the image can read it"),
    "a secret among the arguments": ("ARG TORCH_INDEX=", "ARG API_KEY=", "take RUN --mount=type=secret"),
    "a password in an address": ("ARG TORCH_INDEX=", "ARG TORCH_INDEX=https://me:it@example.org", "password"),
    "reports of use": ("RAY_USAGE_STATS_ENABLED=0", "RAY_USAGE_STATS_ENABLED=1", "Ray would report its use"),
    "a stage without a name": ("FROM node AS gpu", "FROM node", "a stage needs a name"),
    "a target that is missing": ("FROM node AS gpu", "FROM node AS cuda", "there is no target gpu"),
    "another last stage": ("FROM node AS cpu", "FROM node AS small", "the last stage"),
    "an instruction that is not understood": ('CMD ["bash"]', "VOLUME /tmp", "VOLUME is none of"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(dockerfile: ModuleType, planted: str) -> None:
    right, wrong, expected = PLANTED[planted]
    assert right in TEXT
    found = list(dockerfile.check(TEXT.replace(right, wrong)))
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("name", ["id_rsa", "pip.conf", "server.pem", "credentials.json"])
def test_a_file_that_may_hold_a_secret_is_found(dockerfile: ModuleType, tree: Path, name: str) -> None:
    (tree / "serve" / name).write_text("")
    assert any(f"serve/{name} may hold a secret" in line for line in dockerfile.check(TEXT, tree))


def test_a_context_that_is_too_large_is_found(dockerfile: ModuleType, tree: Path) -> None:
    (tree / "serve" / "weights.bin").write_bytes(bytes(5 * 2**20))
    assert any("lets through too much" in line for line in dockerfile.check(TEXT, tree))


def test_the_manifests_name_the_images_that_are_built(dockerfile: ModuleType) -> None:
    folder = ROOT / "infra" / "kubernetes"
    named = set(re.findall(r"somaflow:[\w.-]+", "\n".join(path.read_text() for path in sorted(folder.rglob("*.yaml")))))
    assert named == {dockerfile.tag("cpu"), dockerfile.tag("gpu")}


def test_pods_run_as_the_user_of_the_image(dockerfile: ModuleType) -> None:
    user, group = dockerfile.last(dockerfile.stages(TEXT), "cpu", "USER").split(":")
    found = []
    for path in sorted((ROOT / "infra" / "kubernetes" / "base").glob("*.yaml")):
        found += re.findall(r"runAsUser: (\d+)\s+runAsGroup: (\d+)", path.read_text())
    assert set(found) == {(user, group)}


def test_the_environment_sets_what_the_manifests_set(dockerfile: ModuleType) -> None:
    told = dockerfile.environment(dockerfile.stages(TEXT), "gpu")
    (cluster,) = yaml.safe_load_all((ROOT / "infra/kubernetes/base/cluster.yaml").read_text())
    for one in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]:
        assert told.get(one["name"], one["value"]) == one["value"]


@pytest.mark.parametrize(
    ("words", "expected"), [(["sistem"], "is none of"), (["dependencies", "tpu"], "say cpu or gpu")]
)
def test_the_script_refuses_a_step_that_it_does_not_know(tmp_path: Path, words: list[str], expected: str) -> None:
    text = (FOLDER / "install.sh").read_text().replace("cd /build", f"cd {tmp_path}")
    (tmp_path / "install.sh").write_text(text)
    done = subprocess.run(["sh", tmp_path / "install.sh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert expected in done.stderr


def test_the_health_check_says_who_does_not_answer() -> None:
    command = [sys.executable, FOLDER / "health.py"]
    done = subprocess.run(
        command, env={"SOMAFLOW_HEALTH_URL": "http://127.0.0.1:9/x"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "127.0.0.1:9/x" in done.stderr
    wrong = subprocess.run(
        command, env={"SOMAFLOW_HEALTH_URL": "file:///x"}, capture_output=True, text=True, check=False
    )
    assert "begins with http" in wrong.stderr
