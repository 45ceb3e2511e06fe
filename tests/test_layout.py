"""The shape of the project: the README's tree, where packages come from, what a page may say."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


@pytest.mark.parametrize("package", ["ingest", "store", "train", "serve"])
def test_the_packages_come_from_this_checkout(package: str) -> None:
    assert Path(importlib.import_module(package).__file__ or "").parent == ROOT / package


def test_the_readmes_tree_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("## What is where")[1].split("```")[1]
    named = [line.split()[0] for line in block.strip().splitlines()]
    for name in named:
        assert (ROOT / name).is_dir(), f"README names {name}, which is not there"
    top = {path.relative_to(ROOT).parts[0] for path in tracked() if len(path.relative_to(ROOT).parts) > 1}
    assert {name for name in top if not name.startswith(".")} == {name.split("/")[0] for name in named}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_files_that_a_page_names_are_there() -> None:
    for page in tracked():
        if page.suffix != ".md" or "decisions" in page.parts:  # those tell what was
            continue
        named = re.findall(
            r"(?<![\w./-])(?:infra|docs|tests|serve|train|store|ingest)/[\w/-]+\.(?:py|md|yaml|toml|sh|json|png)",
            page.read_text(),
        )
        missing = [name for name in named if not (ROOT / name).exists()]
        assert missing == [], f"{page} names {missing}"


def test_every_module_says_what_it_is() -> None:
    for path in tracked():
        if path.suffix == ".py" and path.parts[-2] in ("ingest", "store", "train", "serve", "sources", "infra"):
            text = path.read_text()
            assert re.match(r'"""', text), f"{path} has no docstring"


def test_no_data_file_is_tracked() -> None:
    heavy = {".h5ad", ".h5mu", ".h5", ".gz", ".npz", ".safetensors", ".loom", ".zip"}
    assert [path for path in tracked() if path.suffix in heavy] == []
