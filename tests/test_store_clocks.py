"""Machines whose clocks differ: what one wrote is neither lost nor unseen by another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma
from encoded import add_dataset, encoded_counts

import store.build
from ingest.job import SourceSettings
from ingest.sources import census
from store import embeddings, records
from store.embeddings import Generation, open_embeddings
from store.errors import StorageError
from store.fragments import fragments
from store.lake import Lake, open_lake
from store.snapshot import create_snapshot, open_snapshot
from store.snapshot_arrays import tidy
from store.splits import SnapshotSettings
from store.upkeep import recover
from store.validate import validate
from store.writer import LakeWriter

HOUR_MS = 3_600_000
STAMPED = {"__group", "__meta", "__commits", "__fragments"}
"""Folders in which names begin with the moment at which TileDB wrote."""
MOUSE = "mus_musculus"


def shift_ahead(folder: Path) -> None:
    """Make all that stands in a folder look as if a machine had written it whose clock is an hour ahead of ours."""
    later = r"__(\d{13})_(\d{13})_"

    def ahead(text: str) -> str:
        return re.sub(later, lambda found: "__{}_{}_".format(*(int(ms) + HOUR_MS for ms in found.groups())), text)

    stamped = [path for path in folder.rglob("__*_*_*") if path.parent.name in STAMPED]
    for path in sorted(stamped, key=lambda path: len(path.parts), reverse=True):
        path.rename(path.with_name(ahead(path.name)))
    for path in [*folder.glob("somaflow/commits/*.json"), *folder.glob("somaflow/embeddings/*/*/*/done/*.json")]:
        values = json.loads(ahead(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps({**values, "timestamp_ms": values["timestamp_ms"] + HOUR_MS}), encoding="utf-8")


def problems(lake: Lake) -> list[str]:
    return [f"{check.name} {check.subject}: {check.problem}" for check in validate(lake) if check.problem]


def add(uri: str, name: str, organism: str = "homo_sapiens", sizes: dict[str, int] | None = None) -> None:
    with LakeWriter(uri) as writer:
        add_dataset(writer, name, 70, sizes or {"RNA": 40}, organism=organism)


def cells(uri: str) -> dict[str, int]:
    lake = open_lake(uri)
    assert problems(lake) == []
    return {organism: lake.obs(organism).num_rows for organism in lake.organisms}


@pytest.fixture
def ahead(tmp_path: Path) -> str:
    """A lake with cells of mouse, written by a clock that is an hour ahead."""
    add(str(tmp_path / "lake"), "mouse1", MOUSE)
    shift_ahead(tmp_path / "lake")
    return str(tmp_path / "lake")


def test_what_a_clock_ahead_committed_stays_when_others_write_beside_it(ahead: str) -> None:
    add(ahead, "mouse2", MOUSE)
    add(ahead, "human1", sizes={"RNA": 40, "protein": 5})
    assert cells(ahead) == {"homo_sapiens": 70, MOUSE: 140}
    lake = open_lake(ahead)
    assert np.array_equal(lake.counts(MOUSE, "RNA", np.arange(70)).todense(), encoded_counts(0, 70, 40).todense())


def test_an_organism_that_a_clock_ahead_began_is_seen_by_the_commit_that_goes_on(ahead: str, tmp_path: Path) -> None:
    (tmp_path / "lake" / "somaflow" / "commits" / "000000000001.json").unlink()  # the driver died before
    first = tmp_path / "lake" / "somaflow" / "commits" / "000000000000.json"
    values = json.loads(first.read_text(encoding="utf-8"))
    first.write_text(json.dumps({**values, "timestamp_ms": values["timestamp_ms"] - HOUR_MS}), encoding="utf-8")
    assert recover(ahead).writes > 0
    add(ahead, "mouse1", MOUSE)
    assert cells(ahead) == {MOUSE: 70}


def test_what_is_made_under_a_clock_behind_is_not_seen_by_earlier_commits(ahead: str) -> None:
    add(ahead, "mouse2", MOUSE, {"RNA": 40, "protein": 5})
    assert open_lake(ahead).measurements(MOUSE) == ["RNA", "protein"]
    assert open_lake(ahead, 1).measurements(MOUSE) == ["RNA"]


@pytest.mark.parametrize("group", ["census_data", f"census_data/{MOUSE}/ms", f"census_data/{MOUSE}/ms/RNA/X"])
def test_a_member_that_its_group_lost_is_refused_and_not_removed(tmp_path: Path, group: str) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "mouse1", MOUSE)
    kept = {path.relative_to(uri) for path in (uri / "census_data").rglob("*") if "__group" not in path.parts}
    for path in (uri / group / "__group").iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="nothing was removed"):
        add(str(uri), "mouse2", MOUSE)
    assert kept <= {path.relative_to(uri) for path in (uri / "census_data").rglob("*")}


def test_a_planned_organism_that_its_group_lost_is_refused_too(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "mouse1", MOUSE)
    (uri / "somaflow" / "commits" / "000000000001.json").unlink()
    for path in (uri / "census_data" / "__group").iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="nothing was removed"):
        add(str(uri), "mouse1", MOUSE)
    assert fragments(records.join(str(uri), "census_data", MOUSE, "ms", "RNA", "X", "raw"))


def test_a_lake_whose_marker_is_lost_keeps_its_cells(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "mouse1", MOUSE)
    (uri / "somaflow" / "lake.json").unlink()
    add(str(uri), "mouse2", MOUSE)
    assert cells(str(uri)) == {MOUSE: 140}


def test_a_lake_of_a_clock_ahead_is_a_census_with_all_its_cells(ahead: str) -> None:
    add(ahead, "human1")
    source = SourceSettings(uri=ahead)
    assert sorted(census.names(source)) == ["homo_sapiens/human1", f"{MOUSE}/mouse1"]


def test_a_snapshot_of_a_clock_ahead_is_read_whole(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "one", sizes={"RNA": 40, "protein": 5})
    create_snapshot(str(uri), "s", SnapshotSettings(seed=5))
    shift_ahead(uri)
    snapshot = open_snapshot(str(uri), "s")
    snapshot.verify()
    assert snapshot.presence("RNA")[1].sum() == 40


def test_workers_whose_clock_is_behind_write_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, real = tmp_path / "lake", store.build.create_arrays

    def made_ahead(lake: Lake, place: str, *args: Any) -> dict[str, str]:
        made = real(lake, place, *args)
        shift_ahead(Path(place))
        return made

    add(str(uri), "one", sizes={"RNA": 40, "protein": 5})
    monkeypatch.setattr(store.build, "create_arrays", made_ahead)
    create_snapshot(str(uri), "s", SnapshotSettings(seed=5)).verify()


def test_what_workers_wrote_whose_clock_is_ahead_is_not_tidied_away(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "one")
    place = Path(create_snapshot(str(uri), "s", SnapshotSettings(seed=5)).uri)
    shift_ahead(place)
    for member in ("codes", "cells", "RNA/counts"):
        tidy(str(place / member))
    open_snapshot(str(uri), "s").verify()


@pytest.mark.parametrize("skewed", ["array", "blocks", "complete"])
def test_embeddings_are_whole_whichever_clock_wrote_which_part(tmp_path: Path, skewed: str) -> None:
    uri = str(tmp_path / "lake")
    add(uri, "one")
    wanted = {"where": "", "model_sha256": "a" * 64, "dimension": 8, "measurement": "RNA", "measurements": ["RNA"]}

    def after(step: str, do: Callable[[], object]) -> None:
        do()
        if step == skewed:
            shift_ahead(tmp_path / "lake")

    def made(sha256: str) -> Generation:
        values = np.arange(70 * 8, dtype=np.float32).reshape(70, 8) + int(sha256[0], 16)
        begun = embeddings.begin(open_lake(uri), "homo_sapiens", "k", wanted | {"model_sha256": sha256}, replace=True)
        after("array", lambda: embeddings.make_array(begun))
        after("blocks", lambda: embeddings.write_block(begun, 0, np.arange(70), values, {}))
        after("complete", lambda: embeddings.complete(begun, {}))
        found, held = open_embeddings(uri, "homo_sapiens", "k").read(np.arange(70))
        assert held.all()
        assert np.array_equal(found, values)
        return begun

    made("a" * 64)
    second = made("b" * 64)
    at = tiledbsoma.SOMATileDBContext(timestamp=2**61)
    with tiledbsoma.Collection.open(second.obsm_uri, context=at) as obsm:
        assert list(obsm) == ["k"]
        assert obsm["k"].uri.endswith("/k.1")
        assert json.loads(obsm["k"].metadata[embeddings.MANIFEST])["generation"] == 1


def test_an_obsm_that_its_measurement_lost_is_refused_and_not_removed(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    add(str(uri), "one")
    wanted = {"where": "", "model_sha256": "a" * 64, "dimension": 8, "measurement": "RNA", "measurements": ["RNA"]}
    first = embeddings.begin(open_lake(str(uri)), "homo_sapiens", "k", wanted)
    embeddings.make_array(first)
    embeddings.write_block(first, 0, np.arange(70), np.ones((70, 8), np.float32), {})
    for path in (Path(first.obsm_uri).parent / "__group").iterdir():
        path.unlink()
    second = embeddings.begin(open_lake(str(uri)), "homo_sapiens", "other", wanted)
    with pytest.raises(StorageError, match="nothing was removed"):
        embeddings.make_array(second)
    assert fragments(first.array_uri)
