"""Nearest cells and bulk jobs over HTTP, asked of a real model in this process; jobs run on the session's cluster."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from known_cells import known_counts, make_lake
from small_checkpoint import GENES, write_checkpoint
from starlette.testclient import TestClient

from serve import atlas as atlas_module
from serve import jobs
from serve.app import make_app
from serve.atlas import Atlas
from serve.bulk import Asked, Bulk, in_this_process
from serve.client import Client
from serve.lake_routes import vote
from serve.replica import Replica
from serve.settings import JobSettings, Limits, ServeSettings
from store import embeddings, records
from store.embeddings import open_embeddings
from store.errors import ConflictError, InputRefused, MissingError, SettingsError, StorageError
from store.settings import load_settings

HUMAN = "homo_sapiens"


class Served:
    """A server in this process, asked by our own client."""

    def __init__(
        self, checkpoint: str, lakes: dict[str, str], runner: Any = None, limits: Limits | None = None
    ) -> None:
        self.replica = Replica(ServeSettings(checkpoint=checkpoint))
        self.http = TestClient(make_app(self.replica, limits or Limits(), None, Atlas(lakes), runner))
        self.http.__enter__()
        self.client = Client("http://test", transport=httpx.MockTransport(self._pass_on), tries=1)

    def _pass_on(self, request: httpx.Request) -> httpx.Response:
        headers = {key: value for key, value in request.headers.items() if key in ("content-type", "accept")}
        found = self.http.request(request.method, str(request.url), content=request.content, headers=headers)
        return httpx.Response(found.status_code, content=found.content, headers=found.headers)

    def close(self) -> None:
        self.client.close()
        self.http.__exit__(None, None, None)
        self.replica.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "one"))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory, checkpoint: str) -> str:
    """A lake that is embedded; read-only."""
    folder = make_lake(tmp_path_factory.mktemp("lakes") / "lake", 900)
    with Bulk(Asked(checkpoint, folder, key="cells")) as run:
        run.run(in_this_process, lambda what, done, total: None)
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: str, lake: str) -> Iterator[Served]:
    server = Served(checkpoint, {"atlas": lake})
    yield server
    server.close()


def of_lake(rows: list[int]) -> dict[str, Any]:
    """Cells of the first dataset, as a client has them."""
    return {"RNA": (known_counts(600, 0)["RNA"][rows][:, : len(GENES)], GENES)}


def test_a_cell_of_the_lake_is_its_own_nearest_and_its_kind_wins_the_vote(served: Served) -> None:
    rows = [4, 11, 17]
    found = served.client.neighbors(of_lake(rows), k=15, prompts={"organism": HUMAN})
    assert found.index == "atlas/homo_sapiens/cells"
    assert found.joinid.shape == found.distance.shape == (3, 15)
    assert found.joinid[:, 0].tolist() == rows
    assert found.distance[:, 0].max() < 0.05, "vectors are kept in half precision"
    assert (np.diff(found.distance) >= 0).all()
    assert [row[0]["cell_type"] for row in found.obs] == ["B cell", "T cell", "T cell"]
    assert found.obs[0][0] == {
        "cell_type": "B cell",
        "cell_type_ontology_term_id": "CL:0000236",
        "tissue": "blood",
        "disease": "unknown",
        "dataset_id": "first",
        "donor_id": "donor4",
    }
    for row, types in zip(found.obs, found.types, strict=True):
        known = [one["cell_type"] for one in row if one["cell_type"] != "unknown"]
        assert {one["cell_type"]: pytest.approx(one["share"]) for one in types} == {
            name: known.count(name) / len(known) for name in known
        }


def test_cells_whose_neighbours_are_asked_are_counted_and_wait_for_their_turn(served: Served) -> None:
    def counted() -> float:
        lines = served.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("somaflow_serve_cells_total ")).split()[1])

    before = counted()
    served.client.neighbors(of_lake([4, 11, 17]), k=2)
    assert counted() == before + 3


def test_votes_leave_out_what_is_not_known() -> None:
    rows = [{"cell_type": name, "cell_type_ontology_term_id": name[:1]} for name in ("T", "unknown", "B", "B")]
    assert [(one.cell_type, round(one.share, 3)) for one in vote(rows)] == [("B", 0.667), ("T", 0.333)]
    assert vote(rows[1:2]) == []


def test_the_question_may_come_as_json_and_choose_columns(served: Served) -> None:
    request = {
        "counts": {"RNA": [{"G0": 3, "G1": 2}]},
        "prompts": {"tissue": "blood"},
        "k": 2,
        "index": "atlas/homo_sapiens",
        "options": {"columns": ["cell_id", "tissue"]},
    }
    reply = served.http.post("/v1/neighbors", json=request).json()
    assert [set(one["obs"]) for one in reply["cells"][0]["neighbors"]] == [{"cell_id", "tissue"}] * 2
    assert (reply["organism"], reply["commit"]) == (HUMAN, 2)
    assert "not used here: tissue" in reply["warnings"][-1]
    silent = served.http.post("/v1/neighbors", json=request | {"prompts": {}}).json()
    assert silent["cells"] == reply["cells"]
    (card,) = served.http.get("/v1/indexes").json()["indexes"]
    assert (card["index"], card["n_cells"], card["answers"]) == ("atlas/homo_sapiens/cells", 900, True)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"index": "nowhere"}, 404, "no lake 'nowhere' here; lakes: atlas"),
        ({"index": "atlas/homo_sapiens/none"}, 404, "indexes: atlas/homo_sapiens/cells"),
        ({"index": "../../etc"}, 404, "lakes: atlas"),
        ({"k": 0}, 422, "k:"),
        ({"k": 10_000}, 422, "k:"),
        ({"options": {"columns": ["raw_sum"]}}, 422, "options.columns.0"),
        ({"counts": {"RNA": [{"NOPE": 1}]}}, 422, "counts.RNA"),
        ({"prompts": {"organism": "martian"}}, 422, "prompts.organism"),
    ],
)
def test_what_is_wrong_is_said(served: Served, lake: str, change: dict[str, Any], status: int, said: str) -> None:
    response = served.http.post("/v1/neighbors", json={"counts": {"RNA": [{"G0": 3}]}} | change)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert said in response.json()["detail"]
    assert lake not in response.text


def test_an_index_of_another_model_is_refused_with_the_way_on(lake: str, tmp_path: Path) -> None:
    other = Served(str(write_checkpoint(tmp_path / "two", seed=1)), {"atlas": lake}, limits=Limits(values=50))
    try:
        response = other.http.post("/v1/neighbors", json={"counts": {"RNA": [{"G0": 3}]}})
        assert response.status_code == 409
        assert "POST /v1/jobs, or python -m serve embed-lake" in response.json()["detail"]
        assert not other.http.get("/v1/indexes").json()["indexes"][0]["answers"]
    finally:
        other.close()


def test_more_than_a_reply_may_hold_is_refused_and_several_indexes_have_to_be_named(checkpoint: str, lake: str) -> None:
    server = Served(checkpoint, {"atlas": lake, "again": lake}, limits=Limits(values=50))
    try:
        request = {"counts": {"RNA": [{"G0": 3}]}, "index": "again"}
        assert "80 values" in server.http.post("/v1/neighbors", json=request).json()["detail"]
        assert server.http.post("/v1/neighbors", json=request | {"k": 2}).status_code == 200
        with pytest.raises(InputRefused, match="index: several fit; say which: atlas/homo_sapiens/cells, again/"):
            server.client.neighbors(of_lake([1]), k=2)
    finally:
        server.close()


def test_a_server_without_lakes_says_how_to_name_them(checkpoint: str) -> None:
    server = Served(checkpoint, {})
    try:
        with pytest.raises(MissingError, match="no index '' here; indexes: none"):
            server.client.neighbors(of_lake([1]))
        with pytest.raises(MissingError, match=r"start the server with --set lakes\.NAME=LAKE"):
            server.client.job("atlas")
        assert server.client.jobs() == []
    finally:
        server.close()
    assert load_settings(ServeSettings, overrides=["checkpoint=c", "lakes.a-1=/x"]).lakes == {"a-1": "/x"}
    with pytest.raises(SettingsError, match="lakes"):
        load_settings(ServeSettings, overrides=["checkpoint=c", "lakes.a/b=/x"])


def wait(client: Client, job: str, *states: str) -> Any:
    end = time.monotonic() + 60
    while (found := client.job_state(job)).state not in states:
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


class ThreadJobs:
    """Jobs in threads of this process, where those of Ray are actors."""

    def __init__(self) -> None:
        self.stops: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    async def start(self, asked: Asked, record: jobs.Record) -> None:
        stack, stop = ExitStack(), threading.Event()
        run = stack.enter_context(Bulk(asked))

        def work() -> None:
            done = record
            try:
                with stack:
                    run.run(in_this_process, lambda what, done, total: None, stop.is_set)
                done = record.now(state="done", done=900, total=900)
            finally:
                jobs.write(asked.lake, done)
                self.stops.pop(record.id)

        self.stops[record.id] = stop
        jobs.write(asked.lake, record)
        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    async def alive(self, job: str) -> bool:
        return job in self.stops

    async def cancel(self, job: str) -> None:
        self.stops[job].set()


def test_what_is_asked_of_jobs_over_http(
    checkpoint: str, lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas_module, "FRESH_S", 0.0)
    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    runner = ThreadJobs()
    server = Served(checkpoint, {"atlas": lake}, runner)
    client = server.client
    try:
        with held(lake), pytest.raises(ConflictError, match="lake atlas: an embedding is being written"):
            client.job("atlas")
        wrong = ({"where": "tisue == 'x'"}, "columns: soma_joinid"), ({"organism": "mus_musculus"}, "organisms here")
        for words, match in wrong:
            with pytest.raises(InputRefused, match=match) as refused:
                client.job("atlas", **words)
            assert lake not in str(refused.value)
        response = server.http.post("/v1/jobs", json={"lake": "atlas"})
        started = response.json()
        assert (response.status_code, response.headers["location"]) == (202, f"/v1/jobs/{started['id']}")
        found = wait(client, started["id"], "done", "interrupted")
        assert (found.state, found.done, found.name[:9]) == ("done", 900, "somaflow_")
        near = client.neighbors(of_lake([4]), index=f"atlas/homo_sapiens/{found.name}")
        assert near.joinid[0, 0] == 4
        assert client.job("atlas").id == started["id"]
        for thread in runner.threads:
            thread.join()
        jobs.write(lake, jobs.Record(**{**vars(jobs.read(lake, started["id"])), "state": "running"}))
        assert client.cancel_job(started["id"]).state == "interrupted", "nobody works on it"
        assert [one.state for one in client.jobs()] == ["interrupted"]
        with pytest.raises(MissingError, match="no job"):
            client.job_state("0" * 16)
        assert server.http.get("/v1/jobs/etc").status_code == 422
    finally:
        server.close()


def test_jobs_of_a_lake_that_is_served_under_other_names_are_listed_once_and_under_these(
    checkpoint: str, tmp_path: Path
) -> None:
    lake, job = str(tmp_path / "lake"), "0123456789abcdef"
    jobs.write(lake, jobs.Record(job, "before", HUMAN, "cells", "", "a" * 64, created="2026-01-01"))
    server = Served(checkpoint, {"now": lake, "also": lake}, ThreadJobs())
    try:
        told = [*server.client.jobs(), server.client.job_state(job), server.client.cancel_job(job)]
        assert [(one.id, one.lake, one.state) for one in told] == [(job, "now", "interrupted")] * 3
        jobs.write(lake, jobs.Record(job, "also", HUMAN, "cells", "", "a" * 64, state="done"))
        assert [one.lake for one in server.client.jobs()] == ["also"]
    finally:
        server.close()


@pytest.mark.ray
def test_a_job_outlives_the_request_and_is_done_once_however_often_it_is_asked_for(
    checkpoint: str, lake: str, tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    from serve.workers import NAMESPACE, RayJobs

    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    server = Served(checkpoint, {"atlas": lake}, RayJobs(JobSettings()))
    client = server.client
    try:
        with held(lake), pytest.raises(ConflictError, match="lake atlas: an embedding is being written"):
            client.job("atlas")
        job = client.job("atlas").id
        assert client.job("atlas").id == job
        found = wait(client, job, "done", "failed", "interrupted")
        assert (found.state, found.done, found.message) == ("done", 900, "900 embedded, 0 taken over"), found
        assert open_embeddings(lake, HUMAN, found.name).manifest is not None

        other = client.job("atlas", name="lungs", where="tissue == 'lung'").id
        assert other != job
        ray.kill(ray.get_actor(f"somaflow-job-{other}", NAMESPACE))
        assert wait(client, other, "interrupted", "done").state == "interrupted"
    finally:
        server.close()


@contextmanager
def held(lake: str) -> Iterator[None]:
    """Hold a lake's lock on embeddings as another driver would."""
    lock = embeddings.writer_lock(lake)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def test_a_job_is_the_same_for_the_same_question_and_its_record_survives(tmp_path: Path) -> None:
    from serve.bulk import job_id

    asked = ("atlas", HUMAN, "cells", "", "a" * 64)
    assert job_id(*asked) == job_id(*asked)
    assert len({job_id(*asked[:i], "other", *asked[i + 1 :]) for i in range(5)} | {job_id(*asked)}) == 6
    record = jobs.Record(job_id(*asked), *asked, created="2026-01-01")
    jobs.write(str(tmp_path), record)
    jobs.write(str(tmp_path), record.now(state="done", done=5))
    (found,) = jobs.read_all(str(tmp_path))
    assert (found.state, found.done, found.created) == ("done", 5, "2026-01-01")


def test_a_job_that_a_newer_version_recorded_is_told_as_such(tmp_path: Path) -> None:
    lake = str(tmp_path)
    job = {"id": "j", "lake": "atlas", "organism": HUMAN, "name": "cells", "where": "", "model_sha256": "a" * 64}
    records.replace(str(tmp_path / "somaflow" / "jobs" / "j.json"), job | {"speed": 5})
    for look in (lambda: jobs.read(lake, "j"), lambda: jobs.read_all(lake)):
        with pytest.raises(StorageError, match="job j tells 'speed': a newer version of somaflow made it"):
            look()


def test_others_take_what_is_known_while_one_request_looks_for_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_module, "FRESH_S", 0.0)
    asked, answered, there = threading.Event(), threading.Event(), ["first"]

    def afar(uri: str) -> list[Any]:
        found = [SimpleNamespace(id=name) for name in there]
        asked.set()
        assert answered.wait(30)
        return found

    monkeypatch.setattr(atlas_module, "list_indexes", afar)
    atlas = Atlas({"atlas": "s3://lakes/atlas"})

    def ids() -> list[str]:
        return [str(one.known.id) for one in atlas.indexes()]

    with ThreadPoolExecutor(3) as threads:
        first = [threads.submit(ids) for _ in range(2)]
        assert asked.wait(30)
        assert not any(one.done() for one in first), "nothing is known yet"
        answered.set()
        assert [one.result(30) for one in first] == [["first"], ["first"]]
        asked.clear()
        answered.clear()
        there.append("second")
        looking = threads.submit(ids)
        assert asked.wait(30)
        assert ids() == ["first"]
        answered.set()
        assert looking.result(30) == ids() == ["first", "second"]
        answered.clear()
        monkeypatch.setattr(atlas_module, "list_indexes", lambda uri: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ids()
        monkeypatch.setattr(atlas_module, "list_indexes", lambda uri: [])
        assert ids() == []


def test_what_a_lock_says_of_its_holder_is_said_without_places_processes_and_commands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = str(tmp_path / "lake")
    lock = embeddings.writer_lock(lake)
    lock.acquire()
    with pytest.raises(ConflictError) as held:
        embeddings.writer_lock(lake).acquire()
    lock.release()
    told = str(Atlas({"atlas": lake}).told(held.value))
    assert told.startswith("lake atlas: an embedding is being written since 20")
    assert told.endswith("; wait until it has finished and ask again")
    assert str(held.value) in caplog.text


def test_a_job_that_is_ending_is_not_taken_up_and_no_answer_says_where_a_lake_lies(
    checkpoint: str, lake: str, tmp_path: Path
) -> None:
    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    runner = ThreadJobs()
    server = Served(checkpoint, {"atlas": lake}, runner)
    try:
        job = server.client.job("atlas").id
        for thread in runner.threads:
            thread.join()
        runner.stops[job] = threading.Event()
        known = vars(jobs.read(lake, job))
        jobs.write(lake, jobs.Record(**{**known, "state": "running", "message": jobs.ENDING}))
        with pytest.raises(ConflictError, match="was cancelled and is just ending; ask again"):
            server.client.job("atlas")
        records.replace(f"{lake}/somaflow/jobs/{job}.json", known | {"newer": 1})
        for method, path in (("GET", ""), ("GET", f"/{job}"), ("DELETE", f"/{job}")):
            reply = server.http.request(method, f"/v1/jobs{path}")
            assert reply.status_code == 503
            assert "atlas: job" in reply.text, reply.text
            assert str(tmp_path) not in reply.text
    finally:
        server.close()
