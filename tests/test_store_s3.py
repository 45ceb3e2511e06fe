"""The same lake on S3: a local S3 server on loopback stands in for the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata
import boto3
import cellxgene_census
import httpx
import numpy as np
import pytest
import s3fs
import tiledbsoma
from botocore.exceptions import ClientError
from encoded import add_dataset, encoded_counts
from fault_proxy import fault_proxy
from known_cells import add_cells, make_lake, open_index
from local_s3 import failing, forget_endpoint, s3_bucket
from ports import free_port
from small_checkpoint import write_checkpoint

from ingest.dataset import OpenDataset
from ingest.job import SourceSettings
from ingest.sandbox import Reader
from serve import index
from serve.bulk import Asked, Bulk, Outcome, in_this_process
from store import context, records
from store.cluster import in_this_process as one_after_the_other
from store.errors import ConflictError, InterruptedRun, MissingError, StorageError, UsageError
from store.lake import open_lake
from store.settings import parse_settings
from store.snapshot import (
    SnapshotSettings,
    begun_snapshots,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    open_snapshot,
)
from store.upkeep import collect, consolidate, vacuum
from store.validate import validate
from store.writer import LakeWriter
from train.loop import Run
from train.record import read_metrics
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.s3,
    pytest.mark.filterwarnings("ignore:Transforming to str index"),  # anndata, on the Census client's obs
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),  # anndata, on 10x symbols; we use the ids
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # aiobotocore, sockets left at exit
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a moto server of its own process; the environment points at it meanwhile."""
    with s3_bucket() as uri:
        yield uri


def test_a_lake_on_s3_is_written_read_proved_and_opens_in_the_census_client(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/one"
    monkeypatch.setattr("store.writer.MERGED_EVERY", 1)
    monkeypatch.setattr("store.fragments.READERS_S", -1)  # what the first merge made needless goes before the second
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40, "protein": 6})
        with pytest.raises(ConflictError, match="being written by process"):
            LakeWriter(uri).__enter__()
        add_dataset(writer, "second", 30, {"RNA": 50})
    lake = open_lake(uri)
    assert lake.commit.number == 2
    counts = lake.counts("homo_sapiens", "RNA", np.arange(70, 100))
    assert (counts != encoded_counts(0, 30, 50)).nnz == 0
    assert all(not check.problem for check in validate(lake))
    client = tiledbsoma.SOMATileDBContext(tiledb_config=context.tiledb_config())
    with tiledbsoma.open(uri, context=client) as census:
        cells = cellxgene_census.get_anndata(census, "Homo sapiens", obs_value_filter="dataset_id == 'first'")
    assert (cells.X[:, :40] != encoded_counts(0, 70, 40)).nnz == 0
    with Reader(SourceSettings(uri=uri), "homo_sapiens/second", memory_mb=1024, timeout_s=60) as opened:
        assert opened.names() == ["homo_sapiens/first", "homo_sapiens/second"]
        values, plan, _ = opened.inspect()
        rows = opened.rows("RNA", 0, 30, len(plan.features["RNA"]), values["fingerprint"])
    assert (rows[:, :50] != encoded_counts(0, 30, 50)).nnz == 0


def test_snapshots_on_s3_come_and_go_whole(bucket: str) -> None:
    uri = f"{bucket}/two"
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
    made = create_snapshot(uri, "s", SnapshotSettings(seed=1))
    made.verify()
    assert list_snapshots(uri) == ["s"]
    assert len(open_snapshot(uri, "s").block("RNA", 10, 30).indptr) == 21
    records.remove(f"{made.uri}/snapshot.json")  # where a deletion was stopped
    assert (list_snapshots(uri), begun_snapshots(uri)) == ([], ["s"])
    delete_snapshot(uri, "s")
    assert (list_snapshots(uri), begun_snapshots(uri)) == ([], [])
    assert not records.exists(made.uri)
    with pytest.raises(MissingError, match="no lake here"):
        open_lake(f"{bucket}/none")


def test_a_build_that_died_on_s3_goes_on_or_goes_away(bucket: str) -> None:
    uri = f"{bucket}/begun"
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
    create_snapshot(uri, "words", SnapshotSettings())

    def none_is_gathered(function: Any, common: Any, items: Any) -> Iterator[None]:
        if function.__name__ == "gather":
            raise InterruptedRun("killed")
        yield from one_after_the_other(function, common, items)

    for seed in (1, 2):
        with pytest.raises(InterruptedRun):
            create_snapshot(uri, "s", SnapshotSettings(seed=seed, like="words"), tasks=none_is_gathered)
        assert begun_snapshots(uri) == ["s"]
        with pytest.raises(UsageError, match="snapshot 's' is being built from it"):
            delete_snapshot(uri, "words")
        if seed == 1:
            delete_snapshot(uri, "s")
            assert begun_snapshots(uri) == []
    create_snapshot(uri, "s", SnapshotSettings(seed=2, like="words")).verify()
    assert records.names(f"{uri}/somaflow/building") == []
    delete_snapshot(uri, "words")
    assert list_snapshots(uri) == ["s"]


def test_a_store_that_fails_now_and_then_changes_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{bucket}/failing"
    kinds = ("500", "reset", "lost reply", "half body")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], 0.03, kinds=kinds, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        forget_endpoint()
        try:
            with LakeWriter(uri) as writer:
                add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6}, origin="a")
                add_dataset(writer, "first", 120, {"RNA": 40}, origin="a", version=1)
            lake = open_lake(uri)
            assert [check for check in validate(lake) if check.problem] == []
            assert (lake.counts("homo_sapiens", "RNA", np.arange(150, 270)) != encoded_counts(1000, 120, 40)).nnz == 0
            collect(uri)
            faults = httpx.get(f"{proxy}/faults").json()
        finally:
            monkeypatch.undo()
            forget_endpoint()
    assert sum(faults.values()) >= 4, faults
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_training_from_a_slow_store_takes_the_same_steps_and_says_that_it_waited(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/slow"
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 600, {"RNA": 40, "protein": 6})
    create_snapshot(uri, "s", SnapshotSettings(seed=2))

    def trained(name: str) -> list[dict[str, float]]:
        told = {"snapshot": "s", "lake": uri, "output": str(tmp_path), "name": name, "steps": 24, "trackers": []}
        model = {"width": 16, "layers": 1, "heads": 2}
        data = {"global_batch": 24, "block": 32, "window": 1, "tokens": 32, "test_split": ""}
        values = told | {"model": model, "data": data, "optim": {"warmup_steps": 2}}
        Run(parse_settings(RunSettings, values, where="test"), 1).train()
        return read_metrics(tmp_path / name / "metrics.jsonl")

    quick = trained("quick")
    kinds = ("slow",) * 99 + ("stalled",)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], 1.0, kinds=kinds, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        forget_endpoint()
        try:
            slow = trained("slow")
            late = httpx.get(f"{proxy}/faults").json()
        finally:
            monkeypatch.undo()
            forget_endpoint()
    assert late["slow"] > 20, late
    assert [row["loss"] for row in slow] == [row["loss"] for row in quick]
    waited = [sum(row["data_wait_s"] for row in rows) for rows in (quick, slow)]
    assert waited[1] > waited[0] + 0.2, waited


def test_a_store_that_refuses_says_so_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(StorageError) as caught:
        open_lake("s3://no-such-bucket/lake")
    assert "no-such-bucket" in str(caught.value)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("trouble", ["nobody answers", "no credentials", "no rights"])
def test_a_lake_that_cannot_be_reached_says_so_whatever_asks_for_it(
    bucket: str, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    expected, endpoint = "Access Denied|AccessDenied|Forbidden", os.environ["AWS_ENDPOINT_URL"]
    with fault_proxy(endpoint, 1.0, kinds=("403",)) if trouble == "no rights" else nullcontext(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        if trouble == "nobody answers":
            expected = "Could not connect"
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        if trouble == "no credentials":
            expected = "Unable to locate credentials"
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        forget_endpoint()
        try:
            for ask in (
                lambda: open_lake(f"{bucket}/shut"),
                lambda: LakeWriter(f"{bucket}/shut").__enter__(),
                lambda: records.read_each([f"{bucket}/shut/somaflow/lake.json"]),
                lambda: records.remove(f"{bucket}/shut"),
            ):
                with pytest.raises(
                    StorageError, match=rf"shut.*: cannot be (read|removed): .*({expected}).*; check the"
                ):
                    ask()
        finally:
            monkeypatch.undo()
            forget_endpoint()


def test_versions_gc_vacuum_and_consolidation_work_on_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{bucket}/kept"
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 100, {"RNA": 40}, origin="a")
        add_dataset(writer, "a", 70, {"RNA": 30}, origin="a", version=1)
    boto3.client("s3").create_multipart_upload(Bucket="lakes", Key="kept/census_data/left")
    boto3.client("s3").create_multipart_upload(Bucket="lakes", Key="kept-2/census_data/of-another-lake")
    left = collect(uri)
    assert (left.writes, left.fragments, left.uploads) == (0, 0, 1)
    others = boto3.client("s3").list_multipart_uploads(Bucket="lakes")["Uploads"]
    assert [upload["Key"] for upload in others] == ["kept-2/census_data/of-another-lake"]
    gone = boto3.client("s3").create_multipart_upload(Bucket="lakes", Key="kept/census_data/gone")
    boto3.client("s3").abort_multipart_upload(Bucket="lakes", Key="kept/census_data/gone", UploadId=gone["UploadId"])
    told = {"Uploads": [{"Key": "kept/census_data/gone", "UploadId": gone["UploadId"]}]}
    call = s3fs.S3FileSystem.call_s3
    with monkeypatch.context() as patched:  # as after a reply that was lost: it is gone, and tried again
        patched.setattr(
            s3fs.S3FileSystem,
            "call_s3",
            lambda self, name, **words: told if name == "list_multipart_uploads" else call(self, name, **words),
        )
        assert collect(uri).uploads == 1
    assert open_lake(uri, 1).obs("homo_sapiens").num_rows == 100
    consolidate(uri)
    assert open_lake(uri, 1).obs("homo_sapiens").num_rows == 100
    assert vacuum(uri) == (2, 2)
    assert open_lake(uri).obs("homo_sapiens").num_rows == 70
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_record_on_s3_is_created_once(bucket: str) -> None:
    assert records.create(f"{bucket}/r/1.json", {"a": 1})
    assert not records.create(f"{bucket}/r/1.json", {"a": 2})
    assert records.read(f"{bucket}/r/1.json") == {"a": 1}
    assert records.read(f"{bucket}/r/2.json") is None


def test_what_is_removed_on_s3_is_what_was_named_though_its_name_be_a_pattern_or_begin_another(bucket: str) -> None:
    for name in ("a*b", "aXb", "a*bc", "a[1]b", "a1b"):
        for part in range(3):
            records.create(f"{bucket}/named/{name}/in/{part}.json", {})

    def left() -> dict[str, list[str]]:
        found = {name: records.names(f"{bucket}/named/{name}/in") for name in records.folders(f"{bucket}/named")}
        return {name: parts for name, parts in found.items() if parts}

    all_three = ["0.json", "1.json", "2.json"]
    records.remove_each([f"{bucket}/named/a*b/in/{part}.json" for part in (0, 1, 7)], files=True)
    assert left() == dict.fromkeys(("a*bc", "a1b", "aXb", "a[1]b"), all_three) | {"a*b": ["2.json"]}
    records.remove_each([f"{bucket}/named/{name}" for name in ("a*b", "a[1]b", "none")], files=False)
    assert left() == dict.fromkeys(("a*bc", "a1b", "aXb"), all_three)
    records.remove(f"{bucket}/named/a*bc/in/0.json")
    records.remove(f"{bucket}/named/a")
    assert left() == {"a*bc": ["1.json", "2.json"], "a1b": all_three, "aXb": all_three}


def test_many_objects_of_s3_are_removed_in_several_requests_and_a_refused_one_is_told(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "REMOVED_AT_ONCE", 2)
    for part in range(5):
        records.create(f"{bucket}/many/{part}.json", {})
    real, asked = s3fs.S3FileSystem.call_s3, list[int]()

    def refuse_one(self: Any, method: str, **words: Any) -> Any:
        asked.append(len(words["Delete"]["Objects"]))
        refused = {"Errors": [{"Key": "many/4.json", "Code": "AccessDenied", "Message": "Access Denied"}]}
        return refused if asked[-1] == 1 else real(self, method, **words)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "call_s3", refuse_one)
        with pytest.raises(StorageError, match=r"many: cannot be removed: many/4\.json: Access Denied; check"):
            records.remove(f"{bucket}/many")
    assert sorted(asked) == [1, 2, 2]
    assert records.names(f"{bucket}/many") == ["4.json"]


def test_a_lake_on_s3_may_look_like_a_pattern_and_goes_by_any_spelling_of_its_scheme(bucket: str) -> None:
    uri = f"{bucket}/l[1]"
    with LakeWriter(f"s3a{uri.removeprefix('s3')}") as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
    create_snapshot(f"S3{uri.removeprefix('s3')}/", "s", SnapshotSettings(seed=1))
    assert list_snapshots(uri) == ["s"]
    delete_snapshot(uri, "s")
    assert (list_snapshots(uri), begun_snapshots(uri)) == ([], [])
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_two_that_create_one_record_at_the_same_moment_try_again(bucket: str) -> None:
    with failing("409", "PUT .*/r/both.json", most=2) as proxy:
        assert records.create(f"{bucket}/r/both.json", {"a": 1})
        assert httpx.get(f"{proxy}/faults").json() == {"409": 2}
    with failing("409", "PUT .*/r/both.json", most=2):
        assert not records.create(f"{bucket}/r/both.json", {"a": 2})
    assert records.read(f"{bucket}/r/both.json") == {"a": 1}


def test_a_store_that_is_busy_is_asked_as_often_as_its_client_asks_and_no_more(bucket: str) -> None:
    with failing("503", "PUT .*/r/busy.json") as proxy:
        with pytest.raises(StorageError, match=r"busy\.json: cannot write: HTTP 503 SlowDown: "):
            records.create(f"{bucket}/r/busy.json", {})
        assert httpx.get(f"{proxy}/faults").json() == {"503": s3fs.S3FileSystem.retries}


def test_what_a_store_says_is_told_by_its_status_and_name_not_by_an_errno(bucket: str) -> None:
    records.create(f"{bucket}/r/told.json", {})
    for kind, name in (("503", "503 SlowDown"), ("403", "403 AccessDenied")):
        with (
            failing(kind, r"POST .*\?delete"),
            pytest.raises(StorageError, match=f"cannot be removed: HTTP {name}: ") as caught,
        ):
            records.remove(f"{bucket}/r/told.json")
        assert "Errno" not in str(caught.value)
    bare = {"Error": {"Code": "403", "Message": "Forbidden"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert records.told(ClientError(bare, "HeadObject")).startswith("HTTP 403: An error occurred")


def test_a_record_is_made_though_no_answer_says_so(bucket: str) -> None:
    with failing("lost reply", "PUT .*/r/lost.json") as proxy:
        assert records.create(f"{bucket}/r/lost.json", {"a": 1})
        assert httpx.get(f"{proxy}/faults").json()["lost reply"] > 0
    with failing("reset", "PUT .*/r/lost.json"):
        assert not records.create(f"{bucket}/r/lost.json", {"a": 2}), "another's stands there"
        with pytest.raises(StorageError, match="cannot write"), failing("reset", "PUT .*/r/not.json"):
            records.create(f"{bucket}/r/not.json", {})
    assert records.read(f"{bucket}/r/lost.json") == {"a": 1}


def test_files_on_s3_are_sources_like_local_ones(bucket: str, shared_data: Path) -> None:
    filesystem = s3fs.S3FileSystem()
    given = {
        "cells.h5ad": shared_data / "derived/pbmc68k_reduced_counts.h5ad",
        "matrix.h5": shared_data / "rna/10x_v3_scanpy/filtered_feature_bc_matrix.h5",
    }
    for name, path in given.items():
        filesystem.put_file(str(path), f"lakes/sources/{name}")
        here = OpenDataset(SourceSettings(uri=str(path)), "x")
        there = OpenDataset(SourceSettings(uri=f"{bucket}/sources/{name}"), "x")
        assert there.form.digest == here.form.digest
        assert (there.block("RNA", 5, 60) != here.block("RNA", 5, 60)).nnz == 0
        assert there.form.obs.index.equals(here.form.obs.index)


def test_an_ingestion_reads_from_s3_and_writes_to_s3(bucket: str, shared_data: Path) -> None:
    source = f"{bucket}/atlas/cells.h5ad"
    s3fs.S3FileSystem().put_file(str(shared_data / "derived/pbmc68k_reduced_counts.h5ad"), source)
    command = [sys.executable, "-m", "ingest", "run", f"{bucket}/atlas", "--lake", f"{bucket}/filled", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (dataset,) = json.loads(done.stdout)["datasets"]
    assert (dataset["source"], dataset["state"], dataset["cells"]) == (source, "committed", 700)
    lake = open_lake(f"{bucket}/filled")
    assert [check for check in validate(lake) if check.problem] == []
    expected = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad").X
    assert lake.counts("homo_sapiens", "RNA", np.arange(700)).sum() == expected.sum()


def test_a_lake_is_embedded_there_and_its_index_is_searched_and_gone_on_with(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART_CELLS", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = make_lake(f"{bucket}/embedded", 400)
    asked = Asked(str(write_checkpoint(tmp_path / "model")), uri, key="cells", block_cells=512)

    def embed() -> Outcome:
        with Bulk(asked) as run:
            return run.run(in_this_process, lambda what, done, total: None)

    assert [one["n_taken_over"] for one in embed().index["parts"]] == [0, 0]
    with LakeWriter(uri) as writer:
        add_cells(writer, "third", 50, seed=2)
    grown = embed()
    assert (grown.n_embedded, grown.n_taken_over) == (50, 400)
    assert [(one["n_cells"], one["n_taken_over"]) for one in grown.index["parts"]] == [(300, 300), (150, 100)]
    opened = open_index(uri, "cells")
    values, held = opened.known.generation.read(np.arange(450))
    assert held.all()
    found, distances = opened.search(values, 1)
    np.testing.assert_allclose(distances, 0, atol=0.05)
    assert (found[:, 0] == np.arange(450)).mean() > 0.9, "cells that are alike may stand for each other"
    assert opened.labels(np.array([449, 0]), ["dataset_id"]) == [{"dataset_id": "third"}, {"dataset_id": "first"}]
    del opened
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("somaflow-index-")]
