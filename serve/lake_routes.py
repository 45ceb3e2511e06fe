"""This module answers about lakes over HTTP: nearest cells, and bulk jobs; ``serve/app.py`` puts it beside the rest.

Shape letters used in this module:
    C  cells of the request      K  neighbours      D  width of an embedding
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from fastapi import APIRouter, Header, Path, Response
from numpy.typing import NDArray

from serve import encode, jobs
from serve.atlas import Atlas, Named
from serve.bulk import Asked, default_key, job_id, organism_of
from serve.decode import Decoded, Decoder
from serve.errors import FieldRefused
from serve.index import VectorIndex
from serve.jobs import Jobs
from serve.lake_messages import (
    CellNeighbors,
    IndexCard,
    IndexesReply,
    JobReply,
    JobRequest,
    JobsReply,
    Neighbor,
    NeighborsReply,
    NeighborsRequest,
    TypeShare,
)
from serve.model import Description, Embed, Model
from serve.settings import Limits
from store.errors import ConflictError, MissingError, SomaflowError
from store.lake import open_lake, utc_now
from store.schema import UNKNOWN

T = TypeVar("T")
R = TypeVar("R")
TYPE, TYPE_ID = "cell_type", "cell_type_ontology_term_id"
Unused = Annotated[str, Header(include_in_schema=False)]
"""Replies hold no large array, and are JSON whatever is accepted."""
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]


class Loaded(Protocol):
    """The checkpoint that answers now: ``serve.desk.Loaded``."""

    @property
    def description(self) -> Description: ...  # noqa: D102
    @property
    def decoder(self) -> Decoder: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102


class Desk(Protocol):
    """What is needed of ``serve.desk.Desk``."""

    limits: Limits
    model: Model

    async def loaded(self) -> Loaded: ...  # noqa: D102
    async def fresh(self) -> Loaded: ...  # noqa: D102
    async def decoded(self, loaded: Any, request: NeighborsRequest) -> Decoded: ...  # noqa: D102
    async def again(self, answer: Callable[[R], Awaitable[T]], request: R) -> T: ...  # noqa: D102


def add_neighbors(router: APIRouter, desk: Desk, atlas: Atlas, extra: dict[str, Any]) -> None:
    """Add the question about nearest cells to a router whose routes take npz too; ``extra`` says so in OpenAPI."""

    @router.post("/v1/neighbors", response_model=NeighborsReply, openapi_extra=extra)
    async def neighbors(request: NeighborsRequest, accept: Unused = "") -> Response:
        """Find the cells of a lake that are nearest in the model's space, and what most of them are."""

        async def answer(request: NeighborsRequest) -> NeighborsReply:
            return await find_neighbors(desk, atlas, request)

        with shown(atlas):
            return _json(await desk.again(answer, request))


async def find_neighbors(desk: Desk, atlas: Atlas, request: NeighborsRequest) -> NeighborsReply:
    """Answer which cells are nearest."""
    loaded = await desk.loaded()
    named, index = await asyncio.to_thread(atlas.find, request.index, loaded.sha256)
    decoded = await desk.decoded(loaded, request)
    n_values = decoded.cells.n_cells * request.k * (2 + len(request.options.columns))
    if n_values > desk.limits.values:
        raise FieldRefused(
            "k", f"{n_values:,} values in the reply; {desk.limits.values:,} fit: send fewer cells at a time"
        )
    prompts = {name: values for name, values in decoded.cells.prompts.items() if name == "organism"}
    embedding_CD = await desk.model.ask(replace(decoded.cells, prompts=prompts), Embed())
    about = (request, decoded, loaded.description)
    return await asyncio.get_running_loop().run_in_executor(
        atlas.searcher, _neighbors_reply, embedding_CD, named, index, *about
    )


def _neighbors_reply(
    embedding_CD: NDArray[np.float32],
    named: Named,
    index: VectorIndex,
    request: NeighborsRequest,
    decoded: Decoded,
    description: Description,
) -> NeighborsReply:
    columns = request.options.columns
    joinid_CK, distance_CK = index.search(embedding_CD, request.k)
    obs = index.labels(joinid_CK.ravel(), list(dict.fromkeys([*columns, TYPE, TYPE_ID])))
    cells = []
    for cell, (joinid_K, distance_K) in enumerate(zip(joinid_CK.tolist(), distance_CK.tolist(), strict=True)):
        rows = obs[cell * len(joinid_K) : (cell + 1) * len(joinid_K)]
        found = [
            Neighbor.model_construct(soma_joinid=joinid, distance=distance, obs={name: row[name] for name in columns})
            for joinid, distance, row in zip(joinid_K, distance_K, rows, strict=True)
        ]
        cells.append(CellNeighbors.model_construct(neighbors=found, types=vote(rows)))
    unused = sorted(set(decoded.cells.prompts) - {"organism"})
    warnings = [f"not used here: {', '.join(unused)}; only the organism is said of the lake's cells"] if unused else []
    return NeighborsReply.model_construct(
        index=named.name,
        organism=named.known.generation.organism,
        commit=int(named.known.manifest["commit"]),
        cells=cells,
        coverage=decoded.coverage,
        warnings=decoded.warnings + warnings,
        provenance=encode.provenance(description),
    )


def vote(rows: list[dict[str, str]]) -> list[TypeShare]:
    """Count types, those that are not known left out; most votes first, then the one that is nearer."""
    votes = Counter((row[TYPE], row[TYPE_ID]) for row in rows if row[TYPE] != UNKNOWN)
    return [
        TypeShare(cell_type=name, cell_type_ontology_term_id=term, share=count / votes.total())
        for (name, term), count in votes.most_common()
    ]


def add_lakes(router: APIRouter, desk: Desk, atlas: Atlas, runner: Jobs | None) -> None:
    """Add what can be searched, and jobs that make more of it."""

    @router.get("/v1/indexes")
    async def indexes() -> IndexesReply:
        """List the indexes of cells that can be searched, and the lakes that can be embedded."""
        sha256 = (await desk.fresh()).sha256
        with shown(atlas):
            found = await asyncio.to_thread(atlas.indexes)
        return IndexesReply(indexes=[_card(one, sha256) for one in found], lakes=list(atlas.lakes))

    @router.post("/v1/jobs", status_code=202)
    async def start(request: JobRequest, response: Response) -> JobReply:
        """Embed cells of a lake with the model that answers now, and index them; the same question resumes.

        Bulk work has low priority; there is one job at a time for each lake.
        """
        with shown(atlas):
            found = await start_job(desk, atlas, runner, request)
        response.headers["Location"] = f"/v1/jobs/{found.id}"
        return _job(atlas, atlas.uri(request.lake), found)

    @router.get("/v1/jobs")
    async def list_jobs() -> JobsReply:
        """List the jobs of all lakes."""
        with shown(atlas):
            found = await asyncio.to_thread(_records, atlas)
            return JobsReply(jobs=[_job(atlas, uri, await _present(uri, one, runner)) for uri, one in found])

    @router.get("/v1/jobs/{job}")
    async def one_job(job: JobId) -> JobReply:
        """Say how far a job is."""
        with shown(atlas):
            uri, found = await asyncio.to_thread(_record, atlas, job)
            return _job(atlas, uri, await _present(uri, found, runner))

    @router.delete("/v1/jobs/{job}", status_code=202)
    async def cancel(job: JobId) -> JobReply:
        """End a job after the block of cells at hand; what is done stays done."""
        with shown(atlas):
            uri, found = await asyncio.to_thread(_record, atlas, job)
            found = await _present(uri, found, runner)
            if runner is not None and found.state == "running":
                await runner.cancel(job)
                uri, found = await asyncio.to_thread(_record, atlas, job)
            return _job(atlas, uri, found)


async def start_job(desk: Desk, atlas: Atlas, runner: Jobs | None, request: JobRequest) -> jobs.Record:
    """Start a job, or find the one that does the same.

    Raises:
        MissingError: No such lake, or this server runs no jobs.
        SomaflowError: What :class:`serve.bulk.Bulk` raises.
    """
    uri = atlas.uri(request.lake)
    if runner is None:
        raise MissingError("this server runs no jobs; embed the lake with: python -m serve embed-lake CHECKPOINT")
    loaded = await desk.fresh()
    organism = await asyncio.to_thread(lambda: organism_of(open_lake(uri), request.organism))
    key = request.name or default_key(loaded.sha256)
    number = job_id(request.lake, organism, key, request.where, loaded.sha256)
    standing = await asyncio.to_thread(jobs.read, uri, number)
    if standing is not None and (await _present(uri, standing, runner)).state == "running":
        if standing.message == jobs.ENDING:
            raise ConflictError(f"job {standing.id} was cancelled and is just ending; ask again in a minute")
        return standing
    record = jobs.Record(number, request.lake, organism, key, request.where, loaded.sha256, created=utc_now())
    place = (await desk.model.describe()).checkpoint
    asked = Asked(place, uri, request.where, organism, key, request.replace, model_sha256=loaded.sha256)
    await runner.start(asked, record.now())
    return await asyncio.to_thread(jobs.read, uri, number) or record


def _records(atlas: Atlas) -> list[tuple[str, jobs.Record]]:
    """Return the records of all jobs, each with its lake's place; a lake of several names is read once."""
    return [(uri, one) for uri in dict.fromkeys(atlas.lakes.values()) for one in jobs.read_all(uri)]


def _record(atlas: Atlas, job: str) -> tuple[str, jobs.Record]:
    for uri in atlas.lakes.values():
        found = jobs.read(uri, job)
        if found is not None:
            return uri, found
    raise MissingError(f"no job {job} here; see GET /v1/jobs")


async def _present(uri: str, record: jobs.Record, runner: Jobs | None) -> jobs.Record:
    """Return a record whose state is true now: one that runs has somebody who works on it."""
    if record.state != "running" or (runner is not None and await runner.alive(record.id)):
        return record
    again = await asyncio.to_thread(jobs.read, uri, record.id)
    if again is not None and again.state != "running":  # it ended meanwhile
        return again
    return replace(
        record, state="interrupted", message="its process is gone; ask for the same again to go on from here"
    )


def _job(atlas: Atlas, uri: str, record: jobs.Record) -> JobReply:
    """Write what is known of a job of the lake at ``uri``, under a name that the lake has now."""
    names = [name for name, place in atlas.lakes.items() if place == uri]
    lake = record.lake if record.lake in names else names[0]
    return JobReply(**asdict(replace(record, lake=lake, message=atlas.plain(record.message))))


def _card(one: Named, sha256: str) -> IndexCard:
    manifest, (lake, organism, key) = one.known.manifest, one.path
    return IndexCard(
        index=one.name,
        lake=lake,
        organism=organism,
        name=key,
        model_sha256=one.model_sha256,
        answers=one.model_sha256 == sha256,
        n_cells=manifest["n_cells"],
        dimension=manifest["dimension"],
        commit=manifest["commit"],
        created=manifest["created"],
    )


@contextmanager
def shown(atlas: Atlas) -> Iterator[None]:
    """Let errors about lakes out with names where places were."""
    try:
        yield
    except SomaflowError as error:
        raise atlas.told(error) from None


def _json(reply: NeighborsReply) -> Response:
    return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")
