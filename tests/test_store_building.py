"""Building snapshots: what a build does when others come, go and die at the wrong moment."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pytest
import scipy.sparse
import tiledb
from encoded import add_dataset, numbered
from typer.testing import CliRunner

from store import records, snapshot
from store.__main__ import app
from store.build import builder_lock
from store.cluster import Tasks, in_this_process
from store.errors import ConflictError, MissingError, SettingsError, StorageError, UsageError, VerificationError
from store.lake import Lake, open_lake
from store.part import manifest_digest
from store.schema import DatasetPlan
from store.settings import parse_settings
from store.shuffle import LABELS, _labels
from store.snapshot import (
    SnapshotSettings,
    begun_snapshots,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    open_snapshot,
    refresh_snapshot,
)
from store.upkeep import collect, vacuum
from store.validate import validate
from store.writer import LakeWriter, write_counts


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A lake of one dataset of 60 cells, for one test."""
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
    return uri


class Stopped(BaseException):
    """A process that dies."""


def stopping_before(stage: str, n_tasks: int = 0) -> Tasks:
    """Run tasks here, and die when so many of a stage were run."""

    def tasks(function: Any, common: Any, items: Any) -> Iterator[None]:
        of_stage = function.__name__ == stage
        yield from in_this_process(function, common, items[:n_tasks] if of_stage else items)
        if of_stage:
            raise Stopped

    return tasks


def test_of_two_that_make_one_name_the_second_leaves_the_first_ones_snapshot(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[snapshot.Snapshot] = []

    def slow(*args: Any) -> Lake:
        """Open the lake, while another makes the same snapshot from beginning to end."""
        if not made:
            made.append(None)  # type: ignore[arg-type]
            made[0] = create_snapshot(uri, "s", SnapshotSettings())
        return open_lake(*args)

    monkeypatch.setattr("store.snapshot.open_lake", slow)
    with pytest.raises(UsageError, match="there is a snapshot 's'; snapshots never change"):
        create_snapshot(uri, "s", SnapshotSettings(where="cell_type == 'even'"))
    assert open_snapshot(uri, "s").id == made[0].id
    made[0].verify()


@contextmanager
def crumbling(n_files: int, *, last_first: bool = False) -> Iterator[None]:
    """Let removals take file by file, and die when so many are gone."""
    numbers, whole = count(), records.remove

    def remove(uri: str) -> None:
        if "building-locks" in uri:
            whole(uri)
            return
        files = sorted((path for path in Path(uri).rglob("*") if path.is_file()), reverse=last_first)
        for file in files or [path for path in [Path(uri)] if path.is_file()]:
            if next(numbers) == n_files:
                raise Stopped
            file.unlink()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "remove", remove)
        yield


@pytest.mark.parametrize("last_first", [False, True])
def test_a_delete_killed_at_any_file_leaves_nothing_that_another_build_takes_for_done(
    uri: str, monkeypatch: pytest.MonkeyPatch, last_first: bool
) -> None:
    monkeypatch.setattr("store.build.ELEMENTS", 1500)
    asked: list[int] = []

    def none_runs(function: Any, common: Any, items: Any) -> Iterator[None]:
        asked.append(len(items))
        raise Stopped
        yield

    for n_files in range(5):  # two spill files, two records and the plan
        name = f"s{n_files}"
        with pytest.raises(Stopped):
            create_snapshot(uri, name, SnapshotSettings(), tasks=stopping_before("gather"))
        with crumbling(n_files, last_first=last_first), pytest.raises(Stopped):
            delete_snapshot(uri, name)
        with pytest.raises(Stopped):
            create_snapshot(uri, name, SnapshotSettings(seed=1), tasks=none_runs)
    assert asked == [2] * 5


def test_a_deletion_that_was_stopped_is_told_and_the_same_again_ends_it(uri: str) -> None:
    create_snapshot(uri, "s", SnapshotSettings())
    folder = Path(uri, "snapshots/s")
    n_files = sum(path.is_file() for path in folder.rglob("*"))
    for step, killed in enumerate((1, n_files // 2)):  # the manifest alone, and then half of the others
        with crumbling(killed, last_first=bool(step)), pytest.raises(Stopped):
            delete_snapshot(uri, "s")
        assert list_snapshots(uri) == []
        assert begun_snapshots(uri) == ["s"]
        shown = CliRunner().invoke(app, ["snapshot", "list", "--lake", uri], catch_exceptions=False)
        assert "s: half-made or half-deleted" in shown.stderr
    lock = builder_lock(uri, "s")
    lock.acquire()
    with pytest.raises(ConflictError, match="snapshot 's' is being written"):
        delete_snapshot(uri, "s")
    lock.release()
    delete_snapshot(uri, "s")
    assert not folder.exists()
    assert begun_snapshots(uri) == []
    with pytest.raises(MissingError, match="no snapshot 's'"):
        delete_snapshot(uri, "s")


def test_what_is_half_deleted_stands_in_the_way_of_no_other_and_can_be_made_again(uri: str) -> None:
    for name in ("base", "s"):
        create_snapshot(uri, name, SnapshotSettings())
    with crumbling(9), pytest.raises(Stopped):
        delete_snapshot(uri, "s")
    delete_snapshot(uri, "base")
    create_snapshot(uri, "s", SnapshotSettings(seed=1)).verify()
    assert begun_snapshots(uri) == []


def test_records_without_a_plan_are_not_a_builds(uri: str) -> None:
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 50, {"RNA": 30})
    with pytest.raises(Stopped):
        create_snapshot(uri, "s", SnapshotSettings(where="dataset_id == 'a'"), tasks=stopping_before("gather"))
    Path(uri, "somaflow/building/s/plan.json").unlink()
    assert begun_snapshots(uri) == ["s"]
    made = create_snapshot(uri, "s", SnapshotSettings(where="dataset_id == 'b'"))
    made.verify()
    assert made.datasets == ("b",)
    assert begun_snapshots(uri) == []


def test_a_damaged_plan_of_one_build_stops_no_other_and_can_be_deleted_or_begun_anew(uri: str) -> None:
    create_snapshot(uri, "whole", SnapshotSettings())
    for name in ("s", "t"):
        with pytest.raises(Stopped):
            create_snapshot(uri, name, SnapshotSettings(), tasks=stopping_before("gather"))
        Path(uri, f"somaflow/building/{name}/plan.json").write_text('{"wanted"')
    delete_snapshot(uri, "whole")
    delete_snapshot(uri, "s")
    assert begun_snapshots(uri) == ["t"]
    create_snapshot(uri, "t", SnapshotSettings()).verify()
    assert begun_snapshots(uri) == []


def test_a_build_killed_while_it_cleans_up_has_made_a_whole_snapshot(uri: str) -> None:
    with crumbling(1), pytest.raises(Stopped):
        create_snapshot(uri, "s", SnapshotSettings())
    assert Path(uri, "somaflow/building/s/plan.json").exists()
    open_snapshot(uri, "s").verify()
    assert begun_snapshots(uri) == []
    delete_snapshot(uri, "s")
    assert not Path(uri, "somaflow/building/s").exists()


def test_what_a_build_could_not_remove_is_noted_and_is_garbage(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = records.remove

    def refuse(uri: str) -> None:
        if "/building/" in uri and Path(uri).exists():
            raise StorageError(f"{uri}: cannot be removed: 403")
        whole(uri)

    with monkeypatch.context() as patched:
        patched.setattr(records, "remove", refuse)
        create_snapshot(uri, "s", SnapshotSettings()).verify()
    assert "snapshot 's' is whole; what its build left stays until `store gc`: " in caplog.text
    with pytest.raises(Stopped):
        create_snapshot(uri, "begun", SnapshotSettings(), tasks=stopping_before("gather"))
    left = {name: Path(uri, "somaflow/building", name) for name in ("s", "begun")}
    lock = builder_lock(uri, "s")
    lock.acquire()
    assert collect(uri).builds == 0
    assert left["s"].exists()
    lock.release()
    assert collect(uri).builds == 1
    assert not left["s"].exists()
    assert left["begun"].exists()
    assert collect(uri).builds == 0


@pytest.mark.parametrize("stage", ["scatter", "gather"])
def test_a_builder_that_lost_its_lock_stops_and_leaves_the_others_snapshot(
    uri: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.build.CHECKED_EVERY_S", 0)
    made: list[snapshot.Snapshot] = []

    def taken_over(function: Any, common: Any, items: Any) -> Iterator[None]:
        if function.__name__ == stage:
            folder = builder_lock(uri, "s").folder
            held = records.names(folder)[-1].partition(".")[0]
            records.create(records.join(folder, f"{held}.released"), {})
            made.append(create_snapshot(uri, "s", SnapshotSettings()))
        yield from in_this_process(function, common, items)

    with pytest.raises(ConflictError, match="another driver holds snapshot 's' now"):
        create_snapshot(uri, "s", SnapshotSettings(), tasks=taken_over)
    assert open_snapshot(uri, "s").id == made[0].id
    made[0].verify()


@pytest.fixture
def begun_like(uri: str, monkeypatch: pytest.MonkeyPatch) -> SnapshotSettings:
    """The settings of a build "s", killed after the first of its buckets, with the vocabulary of a snapshot."""
    monkeypatch.setattr("store.build.ELEMENTS", 1000)
    few = tuple(f"RNA{number:04d}" for number in range(20, 30))
    create_snapshot(uri, "words", SnapshotSettings(features={"RNA": few}))
    settings = SnapshotSettings(seed=1, like="words")
    with pytest.raises(Stopped):
        create_snapshot(uri, "s", settings, tasks=stopping_before("gather", 1))
    return settings


def test_a_build_goes_on_with_no_other_vocabulary_than_it_began_with(uri: str, begun_like: SnapshotSettings) -> None:
    shutil.rmtree(Path(uri, "snapshots/words"))
    create_snapshot(uri, "words", SnapshotSettings(features={"RNA": ("RNA0003", "RNA0001")}))
    with pytest.raises(UsageError, match="begun with other settings, from another snapshot"):
        create_snapshot(uri, "s", begun_like)


def test_a_build_compares_its_features_with_those_that_the_arrays_were_made_for(
    uri: str, begun_like: SnapshotSettings
) -> None:
    (path,) = Path(uri, "somaflow/building/s").glob("*/arrays.json")
    path.write_text(json.dumps({"vocabulary": {"RNA": "another"}}))
    with pytest.raises(VerificationError, match="features are not those with which it was begun"):
        create_snapshot(uri, "s", begun_like)


def test_what_a_snapshot_is_built_from_is_not_deleted_meanwhile(uri: str, begun_like: SnapshotSettings) -> None:
    with pytest.raises(UsageError, match="snapshot 's' is being built from it"):
        delete_snapshot(uri, "words")
    create_snapshot(uri, "s", begun_like).verify()
    delete_snapshot(uri, "words")
    create_snapshot(uri, "base", SnapshotSettings())
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 50, {"RNA": 30})
    with pytest.raises(Stopped):
        refresh_snapshot(uri, "base", "fresh", tasks=stopping_before("gather"))
    with pytest.raises(UsageError, match="snapshot 'fresh' is being built from it; let that end, or delete 'fresh'"):
        delete_snapshot(uri, "base")
    refresh_snapshot(uri, "base", "fresh").verify()
    with pytest.raises(UsageError, match="'fresh' was refreshed from it"):
        delete_snapshot(uri, "base")
    delete_snapshot(uri, "fresh")
    with pytest.raises(Stopped):
        refresh_snapshot(uri, "base", "fresh", tasks=stopping_before("gather"))
    delete_snapshot(uri, "fresh")
    delete_snapshot(uri, "base")


def test_a_build_whose_commit_a_vacuum_let_go_says_how_to_begin_anew(uri: str) -> None:
    create_snapshot(uri, "s", SnapshotSettings())
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 20, {"RNA": 30})
    with pytest.raises(Stopped):
        refresh_snapshot(uri, "s", "s2", tasks=stopping_before("gather"))
    with LakeWriter(uri) as writer:
        add_dataset(writer, "c", 10, {"RNA": 30})
    vacuum(uri)
    with pytest.raises(
        MissingError, match=r"'s2' was begun with commit 2, which a vacuum .* snapshot delete s2 --lake"
    ):
        refresh_snapshot(uri, "s", "s2")
    delete_snapshot(uri, "s2")
    assert refresh_snapshot(uri, "s", "s2").n_rows == 90


def test_a_refresh_of_a_lake_without_cells_says_so(uri: str) -> None:
    create_snapshot(uri, "s", SnapshotSettings())
    with LakeWriter(uri) as writer:
        writer.remove("a")
    with pytest.raises(UsageError, match="there are no cells in the lake; see: python -m store info --lake"):
        refresh_snapshot(uri, "s", "s2")


def test_a_refresh_whose_base_went_all_the_same_makes_nothing(uri: str) -> None:
    create_snapshot(uri, "base", SnapshotSettings())
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 50, {"RNA": 30})

    def base_goes(function: Any, common: Any, items: Any) -> Iterator[None]:
        if function.__name__ == "gather":
            Path(uri, "snapshots/base/snapshot.json").unlink()
        yield from in_this_process(function, common, items)

    with pytest.raises(ConflictError, match="snapshots/base: was deleted or made anew since 'fresh' is built from it"):
        refresh_snapshot(uri, "base", "fresh", tasks=base_goes)
    assert list_snapshots(uri) == []


@pytest.mark.parametrize("measurement", ["RNA", "protein"])
def test_tasks_are_as_large_as_the_chosen_cells_are_not_as_their_dataset_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurement: str
) -> None:
    monkeypatch.setattr("store.build.ELEMENTS", 1000)
    uri, n_cells, n_features = str(tmp_path / "lake"), 3000, 200
    filled_C = np.arange(n_cells) % 100 == 3
    counts_CG = scipy.sparse.csr_matrix(np.outer(filled_C, np.ones(n_features)).astype(np.float32))
    with LakeWriter(uri) as writer:
        plan = DatasetPlan("a", "homo_sapiens", "a", n_cells, {measurement: numbered("f", n_features)})
        reservation = writer.reserve(plan)
        names = [str(cell) for cell in range(n_cells)]
        obs = pd.DataFrame({"cell_id": names, f"measured_{measurement}": filled_C})
        writer.commit(reservation, obs, [write_counts(reservation, measurement, 0, counts_CG)])
    sizes: list[int] = []

    def noted(function: Any, common: Any, items: Any) -> Iterator[None]:
        if function.__name__ == "scatter":
            sizes.extend(len(item.joinids_C) * n_features for item in items)
        yield from in_this_process(function, common, items)

    made = create_snapshot(uri, "s", SnapshotSettings(where=f"measured_{measurement} == True"), tasks=noted)
    made.verify()
    assert sum(sizes) == 30 * n_features
    assert max(sizes) <= 1000


def test_spill_files_count_values_in_64_bits(uri: str) -> None:
    with pytest.raises(Stopped):
        create_snapshot(uri, "s", SnapshotSettings(), tasks=stopping_before("gather"))
    (file,) = Path(uri, "somaflow/building/s/spill").iterdir()
    spilled = pa.ipc.open_stream(file.read_bytes()).read_all().schema
    assert pa.types.is_large_list(spilled.field("RNA.features").type)
    assert pa.types.is_large_list(spilled.field("RNA.counts").type)


SCATTERED = (
    [3, 4, 40, 102, 103, 950, 1400, 1401, 1499, 1500],
    [[3, 102], [103] * 2, [950] * 2, [1400, 1499], [1500] * 2],
)
CLOSE = (list(range(500, 1000, 2)), [[500, 998]])


@pytest.mark.parametrize(("joinids", "stretches"), [SCATTERED, CLOSE])
def test_labels_are_read_at_once_where_cells_lie_close_and_a_stretch_at_a_time_where_they_do_not(
    joinids: list[int], stretches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.shuffle.READ_CELLS", 100)
    everything = pa.table({"soma_joinid": np.arange(2000)})
    asked: list[list[int]] = []

    def read(rows: tuple[slice], column_names: list[str]) -> Any:
        assert set(LABELS) < set(column_names)
        asked.append([rows[0].start, rows[0].stop])
        return SimpleNamespace(concat=lambda: everything.slice(rows[0].start, rows[0].stop - rows[0].start + 1))

    lake: Any = SimpleNamespace(uri="/lake", experiment=lambda _: SimpleNamespace(obs=SimpleNamespace(read=read)))
    chunk: Any = SimpleNamespace(organism="homo_sapiens", joinids_C=np.array(joinids))
    assert _labels(lake, chunk)["soma_joinid"].to_pylist() == joinids
    assert asked == stretches


def test_scattered_cells_keep_their_labels(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.shuffle.READ_CELLS", 7)
    made = create_snapshot(uri, "s", SnapshotSettings(where="donor_id == 'donor3'"))
    cells = made.cells(["soma_joinid", "cell_id", "donor_id"]).to_pandas()
    assert sorted(cells["soma_joinid"]) == list(range(3, 60, 5))
    assert (cells["cell_id"] == [f"a-{joinid}" for joinid in cells["soma_joinid"]]).all()
    assert set(cells["donor_id"]) == {"donor3"}


@pytest.mark.parametrize(
    ("array", "named"),
    [
        ("homo_sapiens/ms/RNA/X/raw", "census_data/homo_sapiens/ms/RNA/X/raw"),
        ("homo_sapiens/ms/RNA/feature_dataset_presence_matrix", "RNA/feature_dataset_presence_matrix"),
        ("homo_sapiens/ms/RNA/var", "lake: var"),
        ("homo_sapiens/obs_measurement_presence", "lake: measurement_presence"),
    ],
)
def test_damage_of_the_lake_is_called_damage_and_named(uri: str, array: str, named: str) -> None:
    damage(Path(uri, "census_data", array), "a*.tdb")
    with pytest.raises(VerificationError, match=f"{named}: cannot be read: .*; the stored bytes are damaged"):
        create_snapshot(uri, "s", SnapshotSettings())


def test_a_damaged_label_is_called_damage_and_its_array_is_named(uri: str) -> None:
    obs = Path(uri, "census_data/homo_sapiens/obs")
    with tiledb.open(str(obs)) as array:
        number = [array.schema.attr(number).name for number in range(array.schema.nattr)].index("cell_id")
    damage(obs, f"a{number}_var.tdb")  # tasks read it, the driver does not
    with pytest.raises(VerificationError, match=r"census_data/homo_sapiens/obs: cannot be read: .*Checksum"):
        create_snapshot(uri, "s", SnapshotSettings())


@pytest.mark.parametrize(
    ("array", "folder", "pattern"),
    [
        ("cells", "__fragments", "a5.tdb"),
        ("labels", "__fragments", "a1.tdb"),
        ("RNA/presence", "__fragments", "d0.tdb"),
        ("dead", "__fragments", "a0.tdb"),
        ("codes", "__schema", "__1*"),
        ("labels", "__schema", "__1*"),
    ],
)
def test_damage_of_any_array_of_a_snapshot_is_called_damage_and_named(
    uri: str, array: str, folder: str, pattern: str
) -> None:
    create_snapshot(uri, "base", SnapshotSettings())
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 50, {"RNA": 30})
        writer.remove("a", "homo_sapiens")
    made = refresh_snapshot(uri, "base", "s")
    damage(Path(made.uri, array), pattern, folder)
    with pytest.raises(
        VerificationError, match=rf"s/{array}: cannot be read: .*damaged: delete the snapshot and make it again"
    ):
        open_snapshot(uri, "s").verify()


def test_a_snapshot_that_cannot_be_read_at_all_is_a_finding_beside_those_of_the_others(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        create_snapshot(uri, name, SnapshotSettings())

    def verify(self: snapshot.Snapshot) -> None:
        if self.name == "one":
            raise RuntimeError("no such attribute")

    monkeypatch.setattr(snapshot.Snapshot, "verify", verify)
    found = {check.subject: check.problem for check in validate(open_lake(uri)) if check.name == "snapshot"}
    assert found == {"one": "cannot be read: RuntimeError: no such attribute", "other": ""}


def test_a_snapshot_whose_manifest_was_cut_off_is_told_and_deleted_and_stands_in_nobodys_way(uri: str) -> None:
    for name in ("base", "cut", "other"):
        create_snapshot(uri, name, SnapshotSettings())
    manifest = Path(uri, "snapshots/cut/snapshot.json")
    manifest.write_bytes(manifest.read_bytes()[:300])
    with pytest.raises(VerificationError, match=r"cut/snapshot.json: is not whole: .* snapshot delete cut --lake"):
        open_snapshot(uri, "cut")
    with pytest.raises(UsageError, match="there is a snapshot 'cut'"):
        create_snapshot(uri, "cut", SnapshotSettings())

    def told(*words: str) -> dict[str, Any]:
        answer = CliRunner().invoke(app, [*words, "--lake", uri, "--json"], catch_exceptions=False)
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    assert (told("info")["snapshots"], told("info")["damaged"]) == (["base", "cut", "other"], ["cut"])
    listed = told("snapshot", "list")
    assert ([one["name"] for one in listed["snapshots"]], listed["damaged"]) == (["base", "other"], ["cut"])
    for words in (["info"], ["snapshot", "list"]):
        shown = CliRunner().invoke(app, [*words, "--lake", uri], catch_exceptions=False)
        assert "cut: its snapshot.json is damaged" in shown.stderr
    found = {check.subject: check.problem for check in validate(open_lake(uri)) if check.name == "snapshot"}
    assert [name for name, problem in found.items() if problem] == ["cut"]
    delete_snapshot(uri, "other")
    delete_snapshot(uri, "cut")
    assert list_snapshots(uri) == ["base"]
    assert not Path(uri, "snapshots/cut").exists()


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"null", b"\xff{}"])
def test_a_record_that_is_not_whole_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.json").write_bytes(content)
    for read in (lambda: records.read(f"{tmp_path}/1.json"), lambda: records.read_all(str(tmp_path))):
        with pytest.raises(VerificationError, match=r"1.json: is not whole: .*; put the file back"):
            read()


@pytest.mark.parametrize(
    "settings",
    [
        SnapshotSettings(measurements=("RNA", "protein")),
        SnapshotSettings(assign={"test": {"dataset_id": ("going", "a")}}),
        SnapshotSettings(features={"protein": ("protein0001",)}),
        SnapshotSettings(features={"RNA": ("RNA0003", "RNA0055")}),
        SnapshotSettings(organisms=("homo_sapiens", "mus_musculus")),
    ],
)
def test_a_snapshot_is_refreshed_also_where_the_lake_no_longer_has_all_that_its_settings_name(
    uri: str, settings: SnapshotSettings
) -> None:
    with LakeWriter(uri) as writer:
        add_dataset(writer, "going", 40, {"RNA": 40, "protein": 5})
        add_dataset(writer, "mouse", 40, {"RNA": 60}, organism="mus_musculus")
        old = create_snapshot(uri, "s", settings)
        writer.remove("going")
        writer.remove("mouse")
        add_dataset(writer, "b", 50, {"RNA": 30})
    with pytest.raises(UsageError, match=r"no chosen cell has|are in no chosen organism|no cells of organism"):
        create_snapshot(uri, "new", settings)
    second = refresh_snapshot(uri, "s", "s2")
    second.verify()
    assert (second.n_cells, second.measurements) == (110, ("RNA",))
    split = {row["soma_joinid"]: row["split"] for row in second.cells().to_pylist() if row["dataset_id"] == "a"}
    assert split == {row["soma_joinid"]: row["split"] for row in old.cells().to_pylist() if row["dataset_id"] == "a"}
    with LakeWriter(uri) as writer:
        add_dataset(writer, "c", 20, {"RNA": 30})
    third = refresh_snapshot(uri, "s2", "s3")
    third.verify()
    assert third.n_cells == 130


def test_a_refresh_says_so_where_nothing_is_left_of_the_measurements_that_its_settings_name(uri: str) -> None:
    with LakeWriter(uri) as writer:
        add_dataset(writer, "going", 40, {"RNA": 40, "protein": 5})
        create_snapshot(uri, "s", SnapshotSettings(measurements=("protein",)))
        writer.remove("going")
    with pytest.raises(UsageError, match="no chosen cell has measurement 'protein'; measurements here: RNA"):
        refresh_snapshot(uri, "s", "s2")


def test_measurements_may_be_listed_with_spaces(uri: str) -> None:
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 40, {"RNA": 30, "protein": 5, "ATAC": 9})
    words = ["snapshot", "create", "s", "--lake", uri, "--workers", "0", "--measurements", "RNA, protein "]
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert open_snapshot(uri, "s").measurements == ("RNA", "protein")


def damage(array: Path, pattern: str, folder: str = "__fragments") -> None:
    """Turn one bit of each of an array's files of this pattern."""
    files = list((array / folder).rglob(pattern))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)


def test_what_cannot_be_written_is_still_told_so(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("store.shuffle._spill", full)
    with pytest.raises(StorageError, match=r"cannot be written: .*No space left on device"):
        create_snapshot(uri, "s", SnapshotSettings())


@pytest.mark.parametrize("key", ["organisms", "measurements", "levels", "set_by", "apart"])
def test_a_name_that_stands_twice_in_the_settings_is_refused(key: str) -> None:
    name = {"organisms": "homo_sapiens", "set_by": "tissue", "apart": "tissue"}.get(key, "protein")
    assert getattr(parse_settings(SnapshotSettings, {key: [name]}, where="s.toml"), key) == (name,)
    with pytest.raises(SettingsError, match=f"s.toml: {key}: .*'{name}' stands there more than once"):
        parse_settings(SnapshotSettings, {key: [name, "RNA", name]}, where="s.toml")


def test_a_list_of_no_features_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"s.toml: features: .*no feature of 'RNA' is named; name some"):
        parse_settings(SnapshotSettings, {"features": {"RNA": [], "protein": ["CD3"]}}, where="s.toml")


def test_a_snapshot_whose_settings_name_an_organism_twice_is_not_refreshed(uri: str) -> None:
    made = create_snapshot(uri, "s", SnapshotSettings())
    manifest = made.manifest
    manifest["settings"]["organisms"] = ["homo_sapiens", "homo_sapiens"]
    manifest["id"] = manifest_digest(manifest)
    Path(made.uri, "snapshot.json").write_text(json.dumps(manifest))
    with LakeWriter(uri) as writer:
        add_dataset(writer, "b", 50, {"RNA": 30})
    with pytest.raises(SettingsError, match="'homo_sapiens' stands there more than once"):
        refresh_snapshot(uri, "s", "s2")


def test_a_snapshot_whose_features_are_not_those_of_its_manifest_is_found(uri: str) -> None:
    made = create_snapshot(uri, "s", SnapshotSettings())
    made.verify()
    made.manifest["measurements"]["RNA"]["vocabulary_hash"] = "another"
    made.manifest["id"] = manifest_digest(made.manifest)
    Path(made.uri, "snapshot.json").write_text(json.dumps(made.manifest))
    with pytest.raises(VerificationError, match="RNA/var: its features are not those of the manifest"):
        made.verify()
