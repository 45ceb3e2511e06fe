"""What all commands have in common."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiledb
import tiledbsoma
import typer
from botocore.exceptions import BotoCoreError, ClientError
from encoded import add_dataset
from typer.testing import CliRunner

from infra import demo
from store import cluster, command
from store.__main__ import app
from store.errors import StorageError, UsageError
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


@pytest.mark.parametrize(
    "error",
    [tiledb.TileDBError("S3: no"), tiledbsoma.SOMAError("S3:\n no"), BotoCoreError(), ClientError({}, "ListObjects")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_stores_client_raises_is_told_in_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    broken = typer.Typer(pretty_exceptions_enable=False)

    @broken.command()
    def only() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["broken"])
        with pytest.raises(SystemExit) as ended:
            command.run(broken, "broken")
    assert ended.value.code == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("StorageError: a store failed, or refused: ")


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """Shells let what runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_command_that_is_interrupted_or_asked_to_end_says_so_and_ends_with_7(
    sent: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = typer.Typer()
    before = signal.getsignal(signal.SIGTERM)
    left: list[str] = []

    @long.command()
    def only() -> None:
        try:
            signal.raise_signal(sent)
        finally:
            left.append("in order")

    monkeypatch.setattr("sys.argv", ["long"])
    with pytest.raises(SystemExit) as ended:
        command.run(long, "long")
    assert (ended.value.code, left) == (7, ["in order"])
    assert capsys.readouterr().err == "stopped; the same command goes on, or begins again where nothing was kept\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_that_comes_while_ray_starts_is_held_back_until_it_has(sent: signal.Signals) -> None:
    reached: list[str] = []

    def start(*comes: signal.Signals, ends: int | None = None) -> None:
        reached.clear()
        with cluster._undisturbed():
            for one in comes:
                signal.raise_signal(one)
                reached.append(one.name)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray puts its own in place
            if ends is not None:
                sys.exit(ends)  # as that does

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start()
        for words in ({}, {"ends": int(signal.SIGTERM)}):
            with pytest.raises(KeyboardInterrupt):
                start(sent, **words)
            assert reached == [sent.name]
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            start(sent, sent)
        assert reached == [sent.name], "the second was held back too"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("stream", "goes", "status", "said"),
    [
        ("stdout", "nowhere", command.UNREAD, ""),
        ("stderr", "nowhere", command.UNREAD, ""),
        ("stdout", "full", StorageError.exit_code, "StorageError: stdout cannot be written: No space left on device"),
    ],
)
def test_what_nobody_reads_or_finds_no_room_ends_a_command_without_a_traceback(
    stream: str, goes: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    telling = typer.Typer()

    @telling.command()
    def only() -> None:
        command.console.print("a table")
        command.answer("only/v1")

    read, closed = os.pipe()
    os.close(read)
    monkeypatch.setattr("sys.argv", ["telling"])
    with open("/dev/full", "w") as full, open(closed, "w") as pipe:
        monkeypatch.setattr(f"sys.{stream}", {"nowhere": pipe, "full": full}[goes])
        with pytest.raises(SystemExit) as ended:
            command.run(telling, "telling")
        command.console.quiet = False
        assert ended.value.code == status
        written = capsys.readouterr()
        assert said in written.err
        assert "Traceback" not in written.err


def test_letters_that_stdout_cannot_write_become_their_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as ascii_only:
        monkeypatch.setattr("sys.stdout", ascii_only)
        command.write("Séance\n")
        monkeypatch.undo()
    assert (tmp_path / "out").read_text() == "S\\xe9ance\n"


@pytest.mark.parametrize("told", [b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\x18\4", b""], ids=["web", "gRPC", "hung up"])
def test_a_driver_that_is_sent_to_a_dashboards_port_is_told_so_at_once(told: bytes) -> None:
    def reply() -> None:
        asked, _ = listening.accept()
        with asked:
            asked.recv(100)
            asked.sendall(told)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=reply)
        answering.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        if told.startswith(b"HTTP/"):
            with pytest.raises(UsageError, match=f"'{address}', a dashboard, .* submit --address http://{address} -- "):
                cluster.probe(address)
        else:
            cluster.probe(address)
        answering.join()


def test_a_number_of_workers_below_0_is_refused_before_a_snapshot_is_begun(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 60, {"RNA": 30})
    words = ["snapshot", "create", "s", "--lake", uri, "--workers"]
    assert CliRunner().invoke(app, [*words, "-1"]).exit_code == UsageError.exit_code
    assert CliRunner().invoke(app, [*words, "0"], catch_exceptions=False).exit_code == 0


def test_the_demos_recipes_hold_whatever_its_paths_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lake = tmp_path / 'q"d\\é', tmp_path / 'l"ake'
    monkeypatch.setattr(demo.Road, "run", lambda *_: None)
    road = demo.Road(folder, lake, small=True)
    road.ingest()
    road.train()
    job, run = (tomllib.loads((folder / name).read_text()) for name in ("ingest.toml", "train.toml"))
    assert (job["lake"], job["source"][1]["uri"]) == (str(lake), str(folder / "source/10x"))
    assert (run["lake"], run["output"]) == (str(lake), str(folder / "runs"))
