"""A run that is started again: what must be the same is, what is lost does no more harm than it must."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from test_train_loop import lake, settings  # noqa: F401  (lake is a fixture)

from store import records
from store.errors import ConflictError, InputRefused, MissingError, StorageError
from train import checkpoint
from train.folder import knowledge_hashes, valid_states
from train.launch import alone, launch
from train.loop import Run
from train.record import read_metrics, read_summary


@pytest.fixture(scope="module")
def eight(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Where a run of 8 steps lies."""
    output = tmp_path_factory.mktemp("eight")
    Run(settings(lake, output, steps=8), 1).train()
    return output


@pytest.fixture
def again(eight: Path, tmp_path: Path) -> Path:
    """A copy of it, for tests that change it."""
    shutil.copytree(eight, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_does_not_go_on_with_knowledge_whose_contents_changed(lake: str, tmp_path: Path) -> None:  # noqa: F811
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("one\tabout\t" + "\t".join(f"RNA{number:04d}" for number in range(12)) + "\n")
    told = {"steps": 4, "knowledge": {"sets": [str(gmt)]}}
    Run(settings(lake, tmp_path, **told), 1).train()
    assert launch(settings(lake, tmp_path, **told)).steps == 4  # is done
    gmt.write_text("one\tabout\t" + "\t".join(f"RNA{number:04d}" for number in range(12, 30)) + "\n")
    for start in (lambda: Run(settings(lake, tmp_path, **told), 1), lambda: launch(settings(lake, tmp_path, **told))):
        with pytest.raises(ConflictError, match=r"begun with other settings \(.*sets\.gmt.* other contents"):
            start()
    gmt.unlink()
    with pytest.raises(MissingError, match=r"knowledge: .*sets\.gmt: no such file"):
        knowledge_hashes(settings(lake, tmp_path, **told))


def test_a_run_that_died_between_its_exports_is_not_done(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = settings(lake, tmp_path, steps=6, evaluate_every=3, keep_best=True)
    export = Run._export_as

    def dies(self: Run, name: str, *words: object) -> None:
        if name.endswith("-best"):
            raise KeyboardInterrupt
        export(self, name, *words)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_export_as", dies)
        with pytest.raises(KeyboardInterrupt):
            Run(run, 1).train()
    from train.launch import _finished

    folder, wanted = tmp_path / "run", Run(run, 1).fingerprint
    assert not _finished(folder, run, wanted)
    Run(run, 1).train()
    assert (folder / "checkpoint-best/manifest.json").exists()
    assert _finished(folder, run, wanted)


def test_a_run_that_died_before_its_report_has_one_when_it_is_asked_for_again(lake: str, again: Path) -> None:  # noqa: F811
    page = again / "run/report.html"
    assert not page.exists()
    launch(settings(lake, again, steps=8, report=False))
    assert not page.exists()
    launch(settings(lake, again, steps=8, report=True))
    assert "<html" in page.read_text("utf-8")


def test_a_run_is_not_made_shorter_than_it_was_trained(lake: str, again: Path) -> None:  # noqa: F811
    for start in (lambda run: Run(run, 1), launch):
        with pytest.raises(ConflictError, match=r"trained to step 8 already, and steps = 6; say 8 or more"):
            start(settings(lake, again, steps=6))


def test_a_run_whose_summary_is_damaged_or_lost_is_finished_again(lake: str, again: Path) -> None:  # noqa: F811
    from train.launch import _finished

    run, path = settings(lake, again, steps=8), again / "run/summary.json"
    wanted, good = Run(run, 1).fingerprint, path.read_text()
    assert _finished(path.parent, run, wanted)
    for odd in ('{"steps": 8}', "[8]", "{", good.replace("loss_last", "loss")):
        path.write_text(odd)
        with pytest.raises(InputRefused, match=r"summary\.json: no summary of this version: .*start the run again"):
            read_summary(path.parent)
        assert not _finished(path.parent, run, wanted)
    path.unlink()
    with pytest.raises(MissingError, match="a run leaves it when it is finished"):
        read_summary(path.parent)
    assert not _finished(path.parent, run, wanted)
    Run(run, 1).train()
    assert _finished(path.parent, run, wanted)
    assert json.loads(path.read_text()).keys() == json.loads(good).keys()


def test_a_damaged_older_state_stops_no_start_and_the_best_is_taken_of_the_others(
    lake: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    kept = {"evaluate_every": 2, "keep_best": True, "checkpoint_every": 2}
    Run(settings(lake, tmp_path, steps=8, **kept), 1).train()
    manifest = valid_states(tmp_path / "run/state")[0] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    Run(settings(lake, tmp_path, steps=12, **kept), 1).train()
    held = [row["loss_test"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["step"] in (8, 10, 12)]
    best = checkpoint.read_manifest(tmp_path / "run/checkpoint-best")
    assert best["figures"]["loss_test"] == min(held)


def test_lost_metrics_are_no_numbers_and_the_run_goes_on(lake: str, again: Path) -> None:  # noqa: F811
    (again / "run/metrics.jsonl").unlink()
    (again / "run/start.json").unlink()
    (again / "run/checkpoint/manifest.json").unlink()
    same = Run(settings(lake, again, steps=8), 1).train()
    assert (same.steps, math.isfinite(same.loss_test)) == (8, True)
    assert all(map(math.isnan, (same.loss_first, same.loss_last, same.cells_per_s, same.loss_test_first)))
    longer = Run(settings(lake, again, steps=10), 1).train()
    assert (longer.steps, math.isfinite(longer.loss_last)) == (10, True)


def test_a_line_of_metrics_that_is_none_is_named_with_what_to_do(lake: str, again: Path) -> None:  # noqa: F811
    path = again / "run/metrics.jsonl"
    for odd in ("garbage", '["step"]', '{"loss": 1.0}'):
        lines = path.read_text().splitlines()
        lines[3] = odd
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(InputRefused, match=r"metrics\.jsonl: line 4 is not a step's row: .*remove the line"):
            Run(settings(lake, again, steps=10), 1).train()
    path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines[:3] + lines[4:]))
    assert Run(settings(lake, again, steps=10), 1).train().steps == 10


def test_an_error_is_not_hidden_by_a_lock_that_cannot_be_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = records.create

    def full(uri: str, values: dict[str, object]) -> bool:
        if uri.endswith(".released"):
            raise StorageError(f"{uri}: no space left on device")
        return create(uri, values)

    monkeypatch.setattr(records, "create", full)
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "one"):
        _ = 1 / 0
    assert "the run could not be given back" in caplog.text
    with pytest.raises(StorageError, match="no space left"), alone(tmp_path / "other"):
        pass
