"""What all commands have in common."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from encoded import add_dataset
from typer.testing import CliRunner

from store import command
from store.__main__ import app
from store.settings import load_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot, read_card
from store.writer import LakeWriter
from train.card import describe
from train.evaluation.folds import FoldSettings


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each command of a program with its words."""
    if not hasattr(command, "commands"):
        yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


@pytest.mark.parametrize("program", ["ingest", "store", "train", "serve"])
def test_every_command_answers_programs_too(program: str) -> None:
    main = importlib.import_module(f"{program}.__main__")
    found = dict(commands(typer.main.get_command(main.app), program))
    assert found
    assert [name for name, one in found.items() if not any("--json" in part.opts for part in one.params)] == []


def test_days_may_stand_as_toml_writes_them(tmp_path: Path) -> None:
    (tmp_path / "folds.toml").write_text(
        'by = "donor_id"\nknowledge_until = 2024-12-31\n[days]\n"go.gmt" = 2024-05-01\n'
    )
    settings = load_settings(FoldSettings, tmp_path / "folds.toml", ["knowledge_until=2023-01-02", "held=[2020-01-01]"])
    assert (settings.knowledge_until, settings.days, settings.held) == (
        "2023-01-02",
        {"go.gmt": "2024-05-01"},
        ("2020-01-01",),
    )


def test_what_is_looked_at_and_taken_away_is_told_as_json(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 60, {"RNA": 30})
    create_snapshot(uri, "s", SnapshotSettings())

    def told(*words: str) -> dict[str, Any]:
        answer = CliRunner().invoke(app, [*words, "--lake", uri, "--json"], catch_exceptions=False)
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    assert "60 cells of 1 datasets" in told("snapshot", "card", "s")["card"]
    assert told("snapshot", "verify", "s") == {"schema": "store-snapshot-verify/v1", "snapshot": "s", "ok": True}
    assert told("snapshot", "delete", "s")["snapshot"] == "s"
    assert told("remove", "first") == {"schema": "store-remove/v1", "dataset_id": "first", "commit": 2}


def test_a_split_that_got_no_cell_is_said(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "one", 60, {"RNA": 20})
    words = ["snapshot", "create", "s", "--lake", uri, "--workers", "0", "--set", 'split_by="dataset_id"']
    said = " ".join(CliRunner().invoke(app, words).output.split())
    assert "split 'test' has no cell, of 10% wanted: whole values of 'dataset_id' are drawn, and few there are" in said


def test_units_that_differ_are_said_where_a_snapshot_is_made_of_them(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "one", 60, {"RNA": 20}, time_unit="hour")
        add_dataset(writer, "two", 40, {"RNA": 20}, time_unit="day")

    def made(name: str, *words: str) -> str:
        base = ["snapshot", "create", name, "--lake", uri, "--workers", "0"]
        return " ".join(CliRunner().invoke(app, [*base, *words]).output.split())

    assert "time has several units (60 cells in 'hour', 40 cells in 'day'), and training takes" in made("s")
    assert "Unit of time: hour (60 cells), day (40 cells)." in read_card(uri, "s")
    assert "several units" not in made("t", "--where", "time_unit == 'day'")
    assert open_snapshot(uri, "t").manifest["units"] == {"time": {"day": 40}, "dose": {}}
    assert describe(open_snapshot(uri, "t"), "train")["units"] == {"time": ["day"]}


def test_what_nobody_foresaw_does_not_end_as_if_some_inputs_were_refused(capsys: pytest.CaptureFixture[str]) -> None:
    broken = typer.Typer()

    @broken.command()
    def only() -> None:
        raise KeyError("soma_joinid")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["broken"])
        with pytest.raises(SystemExit) as ended:
            command.run(broken, "broken")
    assert ended.value.code == 70
    assert "KeyError: 'soma_joinid'" in capsys.readouterr().err
