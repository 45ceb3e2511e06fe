"""``python -m serve``: what it refuses before anything starts, and that it starts and stops cleanly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_checkpoint import write_checkpoint
from typer.testing import CliRunner

from serve.__main__ import app, check_checkpoint, free_port
from serve.client import Client
from serve.settings import ServeSettings
from store.errors import ConflictError, MissingError, SettingsError, UsageError
from store.settings import parse_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_a_wrong_path_is_refused_with_the_way_on(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(MissingError, match="train one with: python -m train"):
        check_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(MissingError, match=f"did you mean {checkpoint}"):
        check_checkpoint(str(tmp_path / "run"))
    check_checkpoint(str(checkpoint))


def test_a_port_in_use_is_refused_before_anything_starts(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match="choose another with --port"):
            free_port("127.0.0.1", port)
        outcome = subprocess.run(
            [sys.executable, "-m", "serve", "run", str(checkpoint), "--port", str(port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert outcome.returncode == ConflictError.exit_code
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert free_port("127.0.0.1", 0) > 0


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(UsageError, match="check --host"):
        free_port("192.0.2.77", 8000)


def test_a_misspelt_setting_is_named(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'cells'"):
        CliRunner().invoke(app, ["run", str(checkpoint), "--set", "limits.cell=5"], catch_exceptions=False)
    with pytest.raises(SettingsError, match="checkpoint"):
        parse_settings(ServeSettings, {}, where="args")


def test_help_says_what_it_does_and_shows_an_example() -> None:
    text = CliRunner().invoke(app, ["run", "--help"]).output
    assert "Example: python -m serve run" in text
    assert "--port" in text


@pytest.mark.ray
def test_it_serves_a_checkpoint_until_it_is_told_to_stop(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "serve", "run", str(folder), "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            ready = json.loads(server.stdout.readline())
            with Client(ready["url"]) as client:
                answer = client.embed([{"G1": 3, "G2": 1}])
                assert answer.values.shape == (1, ready["model"]["embedding_size"])
                assert answer.provenance["model_sha256"] == ready["model"]["provenance"]["model_sha256"]
                assert client.perturb([{"G1": 3}], ["G1"])[0].perturbation == "G1"
            server.send_signal(signal.SIGTERM)
            rest, said = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, said
    assert rest == ""
    assert said.splitlines()[-1] == "stopped"
    assert "curl" in said
    with Client(ready["url"], tries=1) as client:
        assert not client.ready()


@pytest.mark.ray
def test_it_stops_in_good_order_while_it_starts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "serve", "run", str(folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            started: list[psutil.Process] = []
            deadline = time.monotonic() + 60
            while not any("ServeController" in " ".join(words_of(one)) for one in started):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
                started = psutil.Process(server.pid).children(recursive=True)
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, said) == (0, "stopped\n")
    assert psutil.wait_procs(started, timeout=20)[1] == []


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.ray
def test_a_damaged_checkpoint_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text("{}")
    outcome = subprocess.run(
        [sys.executable, "-m", "serve", "run", str(folder), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 4
    assert outcome.stderr.count("\n") == 1
    assert "config.json" in outcome.stderr
