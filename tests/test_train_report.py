"""A run's report: figures by hand, a page that holds the run's numbers whatever became of it, and no half file."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_train_loop import lake  # noqa: F401  (a fixture)
from test_train_loop import settings as run_settings
from typer.testing import CliRunner

from store.errors import InputRefused, MissingError
from store.snapshot import open_snapshot
from train.__main__ import app
from train.figures import figures
from train.loop import Run
from train.pictures import DRAWN, thin
from train.record import read_metrics, read_summary
from train.report import write_report
from train.settings import RunSettings

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Checks that what is opened is closed; keeps the text, the pictures, and what is fetched from elsewhere."""

    VOID = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.pictures: list[bytes] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        source = dict(attrs).get("src") or dict(attrs).get("href")
        kind, _, data = (source or "").partition("base64,")
        if kind == "data:image/png;":
            self.pictures.append(base64.b64decode(data, validate=True))
        elif source:
            self.fetched.append(source)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def settings(lake: str, output: Path, **changes: object) -> RunSettings:  # noqa: F811
    return run_settings(lake, output, **({"report": True, "optim": {"warmup_steps": 2, "lr": 0.004}} | changes))


@pytest.fixture(scope="module")
def finished(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    output = tmp_path_factory.mktemp("runs")
    Run(settings(lake, output), 1).train()
    return output / "run"


def kill(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die before the step after ``step``, with a row half written."""
    whole = Run._one

    def dies(self: Run, cells: object) -> dict[str, float]:
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, cells)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_one", dies)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')


def row(step: int, time: float, cells: float, **parts: float | None) -> dict[str, float | None]:
    said = {"step": step, "time": time, "cells": cells, "tokens": 10 * cells, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}
    return {**said, **parts}


ROWS = [
    row(1, 100, 10, data_wait_s=1, forward_backward_s=2, optimizer_s=1, checkpoint_s=0),
    row(2, 106, 20, data_wait_s=0.5, h2d_s=0.5, forward_backward_s=3, optimizer_s=1, checkpoint_s=1),
    row(3, 140, 18, data_wait_s=1, h2d_s=None, forward_backward_s=4, optimizer_s=1, checkpoint_s=0),
]
"""Three steps of 4, 6 and 6 s, the first begins at 96; 28 s are lost before the third."""


def test_figures_are_what_one_gets_by_hand() -> None:
    found = figures(ROWS)
    assert found.steps == 3
    assert found.wall_s == 44
    assert found.cells_s == 48 / 16
    assert found.tokens_s == 480 / 16
    assert found.goodput == pytest.approx((3 + 4.5 + 5) / 44)
    assert found.medians == {
        "data_wait_s": 1,
        "h2d_s": 0.5,
        "forward_backward_s": 3,
        "optimizer_s": 1,
        "checkpoint_s": 1,  # of the one step that saved
    }
    assert found.p95["forward_backward_s"] == pytest.approx(3.9)
    assert found.shares == {
        "data_wait_s": 2.5 / 16,
        "h2d_s": 0.5 / 16,
        "forward_backward_s": 9 / 16,
        "optimizer_s": 3 / 16,
        "checkpoint_s": 1 / 16,
    }


def test_goodput_counts_restarts_and_rates_do_not() -> None:
    together = [*ROWS[:2], {**ROWS[2], "time": 112.0}]
    assert figures(together).goodput == pytest.approx(12.5 / 16)
    assert figures(together).cells_s == figures(ROWS).cells_s


def test_figures_name_no_part_that_was_not_measured_and_nothing_has_no_rates() -> None:
    assert set(figures([ROWS[0]]).medians) == {"data_wait_s", "forward_backward_s", "optimizer_s"}
    none = figures([])
    assert (none.steps, none.wall_s, none.medians, none.shares) == (0, 0, {}, {})
    assert all(math.isnan(value) for value in (none.cells_s, none.tokens_s, none.goodput))


def test_the_page_of_a_run_holds_its_numbers_and_fetches_nothing(finished: Path, lake: str) -> None:  # noqa: F811
    before = {path.name for path in finished.iterdir()}
    report = write_report(finished)
    assert {path.name for path in finished.iterdir()} == before | {"report.html", "loss.png"}
    page, summary = Page(report.page), read_summary(finished)
    snapshot = open_snapshot(lake, "s")
    versions = json.loads((finished / "checkpoint/manifest.json").read_text())["versions"]
    for words in (
        "Run run",
        "Finished: 12 steps.",
        f"{summary.loss_test_first:.4f} → {summary.loss_test:.4f}",
        f"{summary.parameters:,}",
        "12 of 12",
        f"Goodput {report.figures.goodput:.1%}",
        snapshot.id,
        str(snapshot.lake_timestamp),
        f"torch {versions['torch']}",
        "forward and backward",
        "optim.lr 0.004 0.003",
        "data.global_batch 24 64",
    ):
        assert words in page.text
    for name, rate in (("cells", report.figures.cells_s), ("tokens", report.figures.tokens_s)):
        said = re.search(rf"{name} a second ([\d,.]+)", page.text)
        assert said is not None
        assert float(said[1].replace(",", "")) == pytest.approx(rate, rel=0.01)
    assert "data.split" not in page.text  # it has its default
    assert page.fetched == []
    assert len(page.pictures) == 5
    assert all(picture.startswith(PNG) for picture in page.pictures)
    assert report.picture == finished / "loss.png"
    assert report.picture.read_bytes() == page.pictures[0]
    assert report.figures == figures(read_metrics(finished / "metrics.jsonl"))
    assert 0 < report.figures.goodput <= 1


def test_a_run_that_was_killed_has_a_page_that_says_so(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kill(Run(settings(lake, tmp_path), 1), 6, monkeypatch)
    report = write_report(tmp_path / "run")
    page = Page(report.page)
    assert not report.finished
    assert "Not finished: stands at step 6 of 12" in page.text
    assert "→ not yet" in page.text
    assert report.figures.steps == 6
    assert report.picture is not None
    assert report.picture.read_bytes().startswith(PNG)


def test_a_killed_run_knows_its_snapshot_and_where_it_goes_on_from_its_saved_state(
    finished: Path,
    lake: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = copy_of(finished, tmp_path, "settings.json", "metrics.jsonl", "start.json")
    page = Page(write_report(folder).page)
    assert "goes on from its start" in page.text
    assert open_snapshot(lake, "s").id not in page.text
    saved = sorted((finished / "state").glob("step_*/manifest.json"))[0]
    (folder / "state/step_000000004_aaaaaaaa").mkdir(parents=True)
    (folder / "state/step_000000004_aaaaaaaa/manifest.json").write_text(
        json.dumps(json.loads(saved.read_text()) | {"global_step": 4})
    )
    page = Page(write_report(folder).page)
    assert "goes on from step 4, its newest saved state" in page.text
    assert open_snapshot(lake, "s").id in page.text


def test_a_run_that_goes_on_beyond_its_summary_is_not_called_finished(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path, "settings.json", "metrics.jsonl", "start.json", "summary.json")
    assert write_report(folder).finished
    longer = json.loads((folder / "settings.json").read_text()) | {"steps": 20}
    (folder / "settings.json").write_text(json.dumps(longer))
    report = write_report(folder)
    assert not report.finished
    assert "stands at step 12 of 20" in report.state


def test_a_run_that_died_before_its_first_step_has_a_page_without_pictures(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path, "settings.json")
    report = write_report(folder)
    page = Page(report.page)
    assert "stands at step 0 of 12" in page.text
    assert "No step has ended yet" in page.text
    assert page.pictures == []
    assert report.picture is None
    assert not (folder / "loss.png").exists()


def test_losses_that_were_tested_on_the_way_are_said_and_unmeasured_ones_too(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path, "settings.json", "metrics.jsonl")
    (folder / "start.json").write_text('{"loss_test": null}')
    rows = read_metrics(folder / "metrics.jsonl")
    rows[5]["loss_test"] = 1.23456
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one | {"entropy_ratio": None}) + "\n" for one in rows))
    page = Page(write_report(folder).page)
    assert "before → so far not measured → 1.2346" in page.text
    assert "There is one dataset only" in page.text
    assert len(page.pictures) == 4


def test_names_and_values_are_text_on_the_page_and_in_the_picture(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path, "settings.json", "metrics.jsonl")
    hostile = json.loads((folder / "settings.json").read_text()) | {"name": "<script>$x_{", "lake": "<b>lake"}
    (folder / "settings.json").write_text(json.dumps(hostile))
    report = write_report(folder)
    assert "<script" not in report.page.read_text(encoding="utf-8")
    page = Page(report.page)
    assert "Run <script>$x_{" in page.text
    assert 'lake "<b>lake" "lake"' in page.text


def test_a_long_run_is_drawn_with_few_points_and_every_spike() -> None:
    step = np.arange(100_000.0)
    loss = np.sin(step)
    loss[[7, 50_000]] = 9, -9
    loss[300] = np.nan
    x, y = thin(step, loss)
    assert len(x) <= 2 * DRAWN
    assert (np.diff(x) > 0).all()
    assert {(7, 9), (50_000, -9)} <= set(zip(x, y, strict=True))
    assert np.isfinite(y).all()
    assert [list(part) for part in thin(step[:5], loss[:5])] == [list(step[:5]), list(loss[:5])]


def test_a_folder_that_is_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", finished / "checkpoint", finished / "metrics.jsonl"):
        with pytest.raises(MissingError, match=r"no training run here .*<output>/<name>"):
            write_report(folder)
    (tmp_path / "settings.json").write_text('{"editor.tabSize": 4}')
    with pytest.raises(MissingError, match="no training run here"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_damaged_file_is_named(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path, "settings.json", "metrics.jsonl")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], '{"step": \n', *lines[2:]]))
    with pytest.raises(InputRefused, match=r"metrics\.jsonl: line 2 is not a step's row"):
        write_report(folder)
    (folder / "settings.json").write_text("[]")
    with pytest.raises(InputRefused, match=r"settings\.json: holds list, not an object"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_command_says_where_the_report_is(finished: Path) -> None:
    said = CliRunner().invoke(app, ["report", str(finished), "--json"], catch_exceptions=False)
    values = json.loads(said.stdout)
    assert values["schema"] == "train-report/v1"
    assert values["page"] == str(finished / "report.html")
    assert values["picture"] == str(finished / "loss.png")
    assert values["finished"] is True
    assert values["figures"]["steps"] == 12
    said = CliRunner().invoke(app, ["report", str(finished)], catch_exceptions=False)
    assert f"report: {finished / 'report.html'}" in said.output


def copy_of(run: Path, parent: Path, *names: str) -> Path:
    """Copy some files of a run, as one that did not come further has them."""
    folder = parent / "copy"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((run / name).read_bytes())
    return folder
