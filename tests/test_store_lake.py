"""The lake: what other people's clients see, what a crash leaves, what a second driver is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import tiledbsoma
from encoded import add_dataset, encoded_counts, numbered

from store import context, schema
from store.cluster import RayMetrics
from store.errors import (
    ConflictError,
    InputRefused,
    MissingError,
    SettingsError,
    StorageError,
    UsageError,
    VerificationError,
)
from store.export import export
from store.lake import Lake, create_lake, open_lake
from store.schema import DatasetPlan, Features
from store.validate import validate
from store.writer import LakeWriter, write_counts

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Transforming to str index")  # anndata, on the Census client's obs


def plan(dataset_id: str = "x", n_cells: int = 10, key: str = "k") -> DatasetPlan:
    return DatasetPlan(dataset_id, "homo_sapiens", key, n_cells, {"RNA": numbered("RNA", 8)})


def test_the_census_client_reads_exactly_the_ingested_counts(tiny_lake: Path) -> None:
    with cellxgene_census.open_soma(uri=str(tiny_lake)) as census:
        cells = cellxgene_census.get_anndata(
            census, "Homo sapiens", obs_value_filter="dataset_id == 'second' and cell_type == 'odd'"
        )
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens")
        mouse = cellxgene_census.get_obs(census, "mus_musculus", value_filter="is_primary_data == True")
    expected = encoded_counts(0, 90, 60)[1::2]
    assert (scipy.sparse.csr_matrix(cells.X) != expected).nnz == 0
    assert list(cells.var["feature_id"]) == numbered("RNA", 60).feature_id
    assert cells.obs["raw_sum"].tolist() == expected.sum(axis=1).ravel().tolist()[0]
    assert [presence[row].nnz for row in range(4)] == [40, 60, 0, 0]
    assert len(mouse) == 63


def test_reading_counts_keeps_the_order_asked_and_repeats(tiny_lake: Path) -> None:
    joinids = np.array([152, 3, 149, 3])
    counts = open_lake(str(tiny_lake)).counts("homo_sapiens", "RNA", joinids)
    first, second = encoded_counts(0, 150, 40), encoded_counts(0, 90, 60)
    assert (counts[0] != second[2]).nnz == 0
    for row, cell in ((1, 3), (2, 149), (3, 3)):
        assert (counts[row, :40] != first[cell]).nnz == 0
        assert counts[row, 40:].nnz == 0


def test_totals_of_the_lake_are_those_of_its_datasets(tiny_lake: Path) -> None:
    lake = open_lake(str(tiny_lake))
    var = lake.var("homo_sapiens", "RNA").to_pandas()
    assert var["n_measured_obs"].tolist() == [240] * 40 + [90] * 20
    assert var["nnz"].sum() == encoded_counts(0, 150, 40).nnz + encoded_counts(0, 90, 60).nnz
    summary = lake.root["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert summary["total_cell_count"] == "310"
    assert summary["unique_cell_count"] == str(135 + 81 + 63)
    assert all(not check.problem for check in validate(lake))


def test_a_cell_without_a_measurement_is_marked_not_zero(tiny_lake: Path) -> None:
    obs = open_lake(str(tiny_lake)).obs("homo_sapiens", columns=["dataset_id", "measured_protein"]).to_pandas()
    assert obs.groupby("dataset_id")["measured_protein"].agg(["all", "any"]).loc["first"].all()
    assert not obs.loc[obs["dataset_id"] == "second", "measured_protein"].any()


def test_an_earlier_commit_stays_what_it_was(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 30, {"RNA": 10})
        before = open_lake(uri)
        add_dataset(writer, "b", 20, {"RNA": 12})
    assert before.obs("homo_sapiens").num_rows == 30
    assert open_lake(uri, 1).var("homo_sapiens", "RNA").num_rows == 10
    assert open_lake(uri).obs("homo_sapiens").num_rows == 50
    assert open_lake(uri).commit.parent == before.commit.id


def test_the_same_content_twice_adds_nothing_and_another_origin_needs_another_name(tmp_path: Path) -> None:
    with LakeWriter(str(tmp_path / "lake")) as writer:
        add_dataset(writer, "x", 10, {"RNA": 8}, origin="here")
        same = DatasetPlan("x", "homo_sapiens", "key-x-0", 10, {"RNA": numbered("RNA", 8)})
        assert writer.committed(same)
        with pytest.raises(ConflictError, match=r"comes from here .*dataset_id=NAME"):
            writer.reserve(plan("x", key="other"))


@pytest.mark.parametrize("sign", ["#", "?", ";"])
def test_a_path_that_soma_would_cut_is_refused_before_anything_is_written(tmp_path: Path, sign: str) -> None:
    uri = str(tmp_path / f"one{sign}two")
    for make in (create_lake, lambda uri: LakeWriter(uri).__enter__()):
        with pytest.raises(UsageError, match=rf"one\{sign}two: a lake cannot stand where the path has a '\{sign}'"):
            make(uri)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://bucket//lake", "two slashes together"),
        ("s3://", "names no bucket; say s3://BUCKET/PATH"),
        ("s3:///lake", "names no bucket"),
        ("strange://bucket/lake", "no such kind of place: Protocol not known: strange; say a folder or s3://"),
        ("s3://bucket/a::b", "'::'"),
        ("a::b", "'::'"),
    ],
)
def test_a_place_where_no_lake_can_stand_is_refused_for_reading_and_writing_alike(
    place: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (open_lake, create_lake, lambda uri: LakeWriter(uri).__enter__()):
        with pytest.raises(UsageError, match=told):
            ask(place)
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_s3_without_a_scheme_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1:9000", "localhost:9000", "https://"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(SettingsError, match=f"AWS_ENDPOINT_URL='{address}': .* begins with http:// or https://"):
            open_lake("s3://bucket/lake")


def test_metrics_of_a_lake_whose_path_is_not_ascii_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    told: list[dict[str, str]] = []

    class AsRay:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
            pass

        def inc(self, number: float, labels: dict[str, str]) -> None:
            told.append({key: value.encode("ascii").decode() for key, value in labels.items()})  # as Ray does

        set = inc

    monkeypatch.setattr(ray.util.metrics, "Gauge", AsRay)
    monkeypatch.setattr(ray.util.metrics, "Counter", AsRay)
    metrics = RayMetrics({"left": ("gauge", "Left.", ("lake",)), "seen": ("counter", "Seen.", ("lake",))})
    metrics.set("left", 3, lake="/data/Zürich")
    metrics.count("seen", 2, lake="/data/Zürich")
    metrics.close()
    assert told == [{"lake": r"/data/Z\xfcrich"}] * 2


def test_an_export_to_no_place_is_refused_before_anything_is_read(
    tiny_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.h5ad").mkdir()
    lake = open_lake(str(tiny_lake))
    with monkeypatch.context() as unread:
        unread.setattr(Lake, "obs", None)
        with pytest.raises(StorageError, match=r"x\.h5ad: is a folder"):
            export(lake, tmp_path / "x.h5ad", "homo_sapiens", ["RNA"])
        with pytest.raises(StorageError, match=r"nowhere/y\.h5ad: its folder does not exist"):
            export(lake, tmp_path / "nowhere/y.h5ad", "homo_sapiens", ["RNA"])

    def full(part: object, path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("anndata.AnnData.write_h5ad", full)
    with pytest.raises(StorageError, match=r"y\.h5ad: cannot be written: no space left"):
        export(lake, tmp_path / "y.h5ad", "homo_sapiens", ["RNA"])


@pytest.mark.parametrize(
    "where",
    ["nnz >= 6.5", "6.5 <= nnz", "tissue == 'blood' and not (nnz in [3, 6.5])", 'attr("soma_joinid") < -0.5'],
)
def test_whole_numbers_are_compared_with_no_fraction(tiny_lake: Path, where: str) -> None:
    with pytest.raises(UsageError, match=r"(nnz|soma_joinid) holds whole numbers, and SOMA would cut (6\.5|0\.5) to"):
        open_lake(str(tiny_lake)).obs("homo_sapiens", where)


def test_other_numbers_are_compared_as_ever(tiny_lake: Path) -> None:
    lake = open_lake(str(tiny_lake))
    obs = lake.obs("homo_sapiens").to_pandas()
    median = float(obs["raw_mean_nnz"].median())
    assert lake.obs("homo_sapiens", f"raw_mean_nnz >= {median!r}").num_rows == (obs["raw_mean_nnz"] >= median).sum()
    assert lake.obs("homo_sapiens", "nnz >= 14.0").num_rows == (obs["nnz"] >= 14).sum() > 0
    both = lake.obs("homo_sapiens", f"nnz >= 14 and raw_mean_nnz >= {median!r}")
    assert both.num_rows == ((obs["nnz"] >= 14) & (obs["raw_mean_nnz"] >= median)).sum()


def test_a_second_driver_is_told_to_wait(tmp_path: Path) -> None:
    with LakeWriter(str(tmp_path / "lake")), pytest.raises(ConflictError, match="being written by process"):
        LakeWriter(str(tmp_path / "lake")).__enter__()


def test_the_lock_of_a_dead_driver_is_swept_away(tmp_path: Path) -> None:
    script = "import os, sys; from store.writer import LakeWriter; LakeWriter(sys.argv[1]).__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "lake")], cwd=ROOT, check=False)
    assert (tmp_path / "lake/somaflow/locks/000000000000.json").exists()
    with LakeWriter(str(tmp_path / "lake")) as writer:
        assert writer.lake().commit.number == 0


def test_blocks_that_do_not_cover_the_dataset_are_not_committed(tmp_path: Path) -> None:
    with LakeWriter(str(tmp_path / "lake")) as writer:
        reservation = writer.reserve(plan())
        block = write_counts(reservation, "RNA", 0, encoded_counts(0, 6, 8))
        with pytest.raises(InputRefused, match="cover rows 0 to 6 of 10"):
            writer.commit(reservation, pd.DataFrame(index=range(10)), [block])
    assert open_lake(str(tmp_path / "lake")).organisms == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 2.0**24 + 2])
def test_impossible_counts_are_refused_with_cell_and_feature(tmp_path: Path, value: float) -> None:
    counts = encoded_counts(0, 10, 8)
    counts.data[:] = 1
    at = int(counts.indptr[4])
    counts.data[at] = value
    with LakeWriter(str(tmp_path / "lake")) as writer:
        reservation = writer.reserve(plan())
        with pytest.raises(InputRefused, match=rf"cell 4, feature 'RNA000{counts.indices[at]}'"):
            write_counts(reservation, "RNA", 0, counts)


def test_unknown_things_are_named_with_the_known_ones(tiny_lake: Path, tmp_path: Path) -> None:
    lake = open_lake(str(tiny_lake))
    with pytest.raises(UsageError, match="organisms here: homo_sapiens, mus_musculus"):
        lake.obs("rattus_norvegicus")
    with pytest.raises(UsageError, match="Column tisue does not exist"):
        lake.obs("homo_sapiens", "tisue == 'blood'")
    with pytest.raises(MissingError, match="commits 0 to 3"):
        open_lake(str(tiny_lake), 9)
    with pytest.raises(MissingError, match="python -m ingest run"):
        open_lake(str(tmp_path / "nothing"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConflictError, match="not a lake"):
        create_lake(str(tmp_path / "full"))


def test_features_with_the_same_id_are_refused() -> None:
    with pytest.raises(InputRefused, match="'g' stands twice"):
        Features(["g", "g"], ["a", "b"], ["gene"] * 2, [1, 2])


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tiledb
import tiledbsoma
from store import records
from encoded import add_dataset
from store.fragments import FragmentWriter
from store.writer import LakeWriter

steps = int(sys.argv[1])
def counted(function):
    def wrapper(*args, **kwargs):
        global steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
for owner, name in ((tiledbsoma.DataFrame, "write"), (tiledbsoma.SparseNDArray, "write"), (records, "create"),
                    (FragmentWriter, "_submit"), (FragmentWriter, "_finish"),
                    (tiledb.Group, "add"), (tiledbsoma.Collection, "add_new_dataframe")):
    setattr(owner, name, counted(getattr(owner, name)))
with LakeWriter({uri!r}) as writer:
    add_dataset(writer, "second", 90, {{"RNA": 60, "protein": 5}})
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    uri = str(tmp_path_factory.mktemp("lakes") / "unbroken")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
        add_dataset(writer, "second", 90, {"RNA": 60, "protein": 5})
    return open_lake(uri)


@pytest.mark.parametrize("step", [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22])
def test_a_killed_ingest_run_again_equals_an_unbroken_one_and_is_never_half_seen(
    tmp_path: Path, unbroken: Lake, step: int
) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
    script = textwrap.dedent(KILLED.format(tests=str(ROOT / "tests"), uri=uri))
    died = subprocess.run([sys.executable, "-c", script, str(step)], cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    seen = open_lake(uri)
    assert seen.commit.number == 1
    assert seen.obs("homo_sapiens").num_rows == 70
    assert all(not check.problem for check in validate(seen))
    with LakeWriter(uri) as writer:
        add_dataset(writer, "second", 90, {"RNA": 60, "protein": 5})
    lake = open_lake(uri)
    assert [c.content for c in lake.history] == [c.content for c in unbroken.history]
    assert lake.obs("homo_sapiens").to_pandas().equals(unbroken.obs("homo_sapiens").to_pandas())
    assert lake.var("homo_sapiens", "RNA").equals(unbroken.var("homo_sapiens", "RNA"))
    assert all(not check.problem for check in validate(lake))


def test_a_flipped_bit_in_counts_is_found_not_read(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    with LakeWriter(str(uri)) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
    data = next((uri / "census_data/homo_sapiens/ms/RNA/X/raw/__fragments").glob("*/a0.tdb"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    problems = [check for check in validate(open_lake(str(uri))) if check.problem]
    assert [(check.name, check.subject) for check in problems] == [("counts", "a/RNA")]


@pytest.mark.parametrize(
    ("joinid", "dataset_id", "expected"),
    [
        (59, None, [("obs rows", "-1 cells"), ("obs of dataset", "cells lack")]),
        (59, "b", [("obs of dataset", "cells lack or are another's")]),
        (500, "b", [("obs rows", "+1 cells beside the 130")]),
    ],
)
def test_cells_that_lack_stray_or_are_of_another_dataset_are_found(
    tmp_path: Path, joinid: int, dataset_id: str | None, expected: list[tuple[str, str]]
) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
        add_dataset(writer, "b", 70, {"RNA": 30})
    lake = open_lake(uri)
    obs, at = lake.experiment("homo_sapiens").obs, lake.commit.timestamp_ms
    rows = obs.read((slice(59, 59),)).concat().to_pandas().assign(soma_joinid=joinid, dataset_id=dataset_id)
    with tiledbsoma.DataFrame.open(obs.uri, "d" if dataset_id is None else "w", tiledb_timestamp=at) as frame:
        if dataset_id is None:
            frame.delete_cells((slice(joinid, joinid),))
        else:
            frame.write(pa.Table.from_pandas(rows, schema=schema.OBS_SCHEMA, preserve_index=False))
    problems = [(check.name, check.problem) for check in validate(open_lake(uri)) if check.problem]
    assert [name for name, _ in problems] == [name for name, _ in expected]
    for (_, problem), (_, words) in zip(problems, expected, strict=True):
        assert words in problem


def test_obs_that_comes_in_many_parts_is_the_same_with_texts_as_dictionaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        for name, n_cells in (("a", 160), ("b", 90), ("c", 70)):
            add_dataset(writer, name, n_cells, {"RNA": 9})
    whole = open_lake(uri).obs("homo_sapiens", columns=["dataset_id", "donor_id", "time"])
    monkeypatch.setattr(context, "BUFFER_BYTES", 1024)
    context.tiledb_config.cache_clear()
    try:
        lake = open_lake(uri)
        assert sum(1 for _ in lake.experiment("homo_sapiens").obs.read()) > 2
        texts = ["dataset_id", "donor_id"]
        coded = lake.obs("homo_sapiens", columns=["dataset_id", "donor_id", "time"], coded=texts)
        assert all(pa.types.is_dictionary(coded[name].type) for name in texts)
        assert coded.to_pylist() == whole.to_pylist()
        assert [check for check in validate(lake) if check.problem] == []
    finally:
        context.tiledb_config.cache_clear()


def test_locks_that_were_given_back_are_removed_by_the_next_driver(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    for _ in range(4):
        with LakeWriter(uri):
            pass
    assert {path.stem for path in (tmp_path / "lake/somaflow/locks").iterdir()} == {"000000000003"}


def test_a_damaged_read_back_stops_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LakeWriter(str(tmp_path / "lake")) as writer:
        reservation = writer.reserve(plan())
        monkeypatch.setattr("store.fragments.FragmentWriter._submit", lambda *args: None)
        with pytest.raises(VerificationError, match="read back differ"):
            write_counts(reservation, "RNA", 0, encoded_counts(0, 10, 8))


def test_paths_are_absolute_wherever_the_command_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_lake("lake")
    lake = open_lake("lake")
    os.chdir("/")
    assert lake.uri == str(tmp_path / "lake")
    assert lake.datasets().num_rows == 0


def test_counts_of_joinids_that_come_twice_or_out_of_order_are_each_rows_own(tiny_lake: Path) -> None:
    lake = open_lake(str(tiny_lake))
    whole = lake.counts("homo_sapiens", "RNA", np.arange(240))
    for asked in ([1, 1, 3], [7, 5, 6], [200, 3, 3, 90, 200], [4, 5, 6, 7]):
        assert (lake.counts("homo_sapiens", "RNA", np.array(asked)) != whole[asked]).nnz == 0


def test_obs_that_is_written_in_parts_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, rows in (("whole", 2**18), ("parts", 7)):
        monkeypatch.setattr("store.tables.OBS_ROWS", rows)
        with LakeWriter(str(tmp_path / name)) as writer:
            add_dataset(writer, "first", 60, {"RNA": 40, "protein": 6}, origin="a")
            add_dataset(writer, "second", 30, {"RNA": 50})
            add_dataset(writer, "first", 45, {"RNA": 40}, origin="a", version=1)
        lake = open_lake(str(tmp_path / name))
        assert [check for check in validate(lake) if check.problem] == []
        counts = lake.root["census_info"]["summary_cell_counts"].read().concat()
        obs = lake.obs("homo_sapiens").sort_by("soma_joinid")
        found.append((obs.to_pandas(), counts.to_pandas()))
    pd.testing.assert_frame_equal(found[0][0], found[1][0])
    pd.testing.assert_frame_equal(found[0][1], found[1][1])


def test_what_the_first_dataset_does_not_say_of_a_feature_a_later_one_does(tmp_path: Path) -> None:
    ids = [f"ENSG{number:011d}" for number in range(5)]
    said = [
        # names, types, lengths of the same genes
        ([ids[0], f"{ids[1]}.7", "", "DDD", ids[4]], ["gene", "gene", "", "lncRNA", "gene"], [0, 0, 0, 40, 0]),
        (["AAA", "BBB", "CCC", "other", ids[4]], ["protein_coding"] * 4 + ["gene"], [10, 20, 30, 41, 0]),
        (["late", "late", "late", "late", "EEE"], ["miRNA"] * 5, [1, 1, 1, 1, 50]),
    ]
    with LakeWriter(str(tmp_path)) as writer:
        for number, told in enumerate(said):
            features = {"RNA": Features(ids, *told)}
            plan = DatasetPlan(f"d{number}", "homo_sapiens", f"key{number}", 4, features)
            reservation = writer.reserve(plan)
            blocks = [write_counts(reservation, "RNA", 0, encoded_counts(0, 4, 5))]
            writer.commit(reservation, pd.DataFrame({"cell_id": [f"{number}-{cell}" for cell in range(4)]}), blocks)
    var = open_lake(str(tmp_path)).var("homo_sapiens", "RNA").to_pandas()
    assert var["feature_name"].tolist() == ["AAA", "BBB", "CCC", "DDD", "EEE"]
    assert var["feature_type"].tolist() == [*["protein_coding"] * 3, "lncRNA", "miRNA"]
    assert var["feature_length"].tolist() == [10, 20, 30, 40, 50]
    assert var["nnz"].tolist() == (3 * np.diff(encoded_counts(0, 4, 5).tocsc().indptr)).tolist()
