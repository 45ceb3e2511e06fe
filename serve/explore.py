"""This module answers what the page at ``/`` asks: cells on a plane, what selected ones are, what would change them.

The routes are for anybody, the page is one of their clients. Cells come as in any request, as an h5ad file, or are
offered by the server under names: a request never holds a path.

Shape letters used in this module:
    C  cells      G  features      S  selected cells      Y  cell types
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from serve import encode
from serve.decode import Cells, Features, too_little
from serve.errors import FieldRefused
from serve.explored import (
    H5AD_BODY,
    Called,
    CellAnnotation,
    Dataset,
    DatasetsReply,
    ExploreDataset,
    ExploreReply,
    ExploreRequest,
    ExpressionReply,
    FoundFeature,
    FoundFeaturesReply,
    Label,
    MeasurementShift,
    PerturbationShift,
    SelectionReply,
    SelectRequest,
    ShiftReply,
    ShiftRequest,
    View,
)
from serve.forms import CELLS_BODY
from serve.messages import AnnotateOptions, Name, TypeProbability
from serve.model import Description, Perturb, Shift
from serve.projection import FEWEST
from serve.sessions import Session, Sessions
from serve.settings import Explore, ServeSettings
from serve.sources import NAMES, Read, explored, read_h5ad_cells, read_h5ad_file, read_snapshot_cells
from store.errors import InputRefused, MissingError
from train.ontology import covering_type, type_id

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from serve.desk import Desk

H5AD = ("application/x-hdf5", "application/octet-stream")
DETAILED = 12
"""Cells of a selection that are described one by one."""
Accept = Annotated[str, Header(include_in_schema=False)]
WORDS = 2**15
"""Most words of a label: so many codes has an int16."""
PER = 10_000
"""Expression is log1p of counts per so many."""


@dataclass(frozen=True)
class Offer:
    """What the server lets people look at: names of h5ad files and of snapshots, and how much at a time."""

    cells: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, str] = field(default_factory=dict)
    explore: Explore = Explore()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, settings: ServeSettings) -> Offer:
        """Return what a server's settings offer."""
        return cls(settings.cells, settings.snapshots, settings.explore)


def add_explore(app: FastAPI, desk: Desk, offer: Offer, forms: type[APIRoute]) -> None:
    """Add the routes; ``forms`` is a route that takes its message as npz too."""
    sessions = Sessions(desk, offer.explore)

    @contextlib.asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(sessions.close)

    router = APIRouter(tags=["look at cells"], lifespan=closing)
    _add_openings(router, forms, desk, sessions, offer)
    _add_questions(router, desk, sessions, offer)
    app.include_router(router)


def _add_openings(router: APIRouter, forms: type[APIRoute], desk: Desk, sessions: Sessions, offer: Offer) -> None:
    limits = desk.limits
    wide = type("Wide", (forms,), {"limits": explored(limits, offer.explore), "permit": staticmethod(sessions.permit)})
    cells_router = APIRouter(route_class=wide)

    @router.get("/v1/datasets")
    async def datasets() -> DatasetsReply:
        """List the cells that the server offers to look at."""
        sessions.warm()  # who asks will open some
        files = [Dataset(name=name, form="h5ad") for name in offer.cells]
        snapshots = [Dataset(name=name, form="snapshot") for name in offer.snapshots if name not in offer.cells]
        return DatasetsReply(
            datasets=[*files, *snapshots], body_bytes=limits.body_bytes, limits=offer.explore.model_dump()
        )

    @cells_router.post("/v1/explore", response_model=ExploreReply, openapi_extra=CELLS_BODY)
    async def explore(request: ExploreRequest, accept: Accept = "") -> Response:
        """Read, embed, annotate and lay out cells; ask GET /v1/explore/SESSION until they are ready."""
        obs = _frame(request)

        def read() -> Read:
            return Read(dict(request.counts), obs, [])  # type: ignore[arg-type]

        return _reply(sessions.begin("your cells", read, request.prompts))

    @router.post("/v1/explore/h5ad", response_model=ExploreReply, openapi_extra=H5AD_BODY)
    async def h5ad(request: Request) -> Response:
        """The same for an h5ad file, which is the body."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in H5AD:
            raise HTTPException(415, f"send an h5ad file with Content-Type: {H5AD[0]} (got {media[:80] or 'none'!r})")
        body = await request.body()
        read = partial(read_h5ad_cells, body, offer.explore, limits)
        return _reply(sessions.begin("your file", read))

    @router.post("/v1/explore/dataset", response_model=ExploreReply)
    async def dataset(request: ExploreDataset) -> Response:
        """The same for cells that the server offers."""
        name = request.dataset
        if name in offer.cells:
            read = partial(read_h5ad_file, offer.cells[name], name, offer.explore, limits)
        elif name in offer.snapshots:
            read = partial(read_snapshot_cells, offer.snapshots[name], name, offer.explore, limits)
        else:
            raise MissingError("this server does not offer cells of that name; see GET /v1/datasets")
        return _reply(sessions.begin(name, read))

    router.include_router(cells_router)


def _add_questions(router: APIRouter, desk: Desk, sessions: Sessions, offer: Offer) -> None:
    @router.get("/v1/explore/{session}", response_model=ExploreReply)
    async def look(session: str) -> Response:
        """Say how far the cells are; once they are ready, where they lie and what they are."""
        found = sessions.get(session)
        if found.error is not None:
            raise found.error
        return await asyncio.to_thread(_reply, found)

    @router.delete("/v1/explore/{session}", status_code=204)
    async def close(session: str) -> Response:
        """Let the cells go."""
        sessions.drop(session)
        return Response(status_code=204)

    @router.post("/v1/explore/{session}/annotate")
    async def annotate(session: str, request: SelectRequest) -> SelectionReply:
        """Tell what selected cells are, each for itself and together."""
        found = sessions.get(session)
        found.ready()
        return await asyncio.to_thread(_selection, found, found.chosen(request.cells), request.options)

    @router.post("/v1/explore/{session}/perturb")
    async def perturb(session: str, request: ShiftRequest) -> ShiftReply:
        """Predict the mean expression of selected cells with and without each perturbation."""
        found = sessions.get(session)
        cells, description = found.ready()
        await sessions.check_model(cells)  # names are looked up in the vocabulary of the one that answers
        asked = await desk.targets(request.perturbations)
        rows_S = found.chosen(request.cells)
        averaged_S = _drawn(rows_S, offer.explore.perturbed_cells)
        groups = [part for _, part in await asyncio.to_thread(list, found.alike(averaged_S))]
        wide = sum(
            len(description.vocabulary[name].feature_id) for name in {name for part in groups for name in part.counts}
        )
        if 2 * len(asked) * wide > desk.limits.values:
            most = max(1, desk.limits.values // (2 * wide))
            raise FieldRefused(
                "perturbations", f"of cells with {wide:,} features at most {most} can be asked about at a time"
            )
        answers = [(part, await sessions.ask(part, Perturb(asked))) for part in groups]
        effects = [_over_groups([(part, told[number]) for part, told in answers]) for number in range(len(asked))]
        return ShiftReply(
            shifts=[
                PerturbationShift(
                    perturbation="+".join(targets),
                    asked=encode.as_named(name),
                    effects=_shifts(part, cells, description, request.top),
                )
                for targets, name, part in zip(asked, request.perturbations, effects, strict=True)
            ],
            cells=len(rows_S),
            averaged=len(averaged_S),
            provenance=encode.provenance(description),
        )

    @router.get("/v1/explore/{session}/expression")
    async def expression(session: str, feature: Name, measurement: Name = "RNA") -> ExpressionReply:
        """Give what was measured of one feature in each cell."""
        found = sessions.get(session)
        return await asyncio.to_thread(_expression, found, measurement, feature)

    @router.get("/v1/explore/{session}/features")
    async def features(
        session: str, like: Name = "", measurement: Name = "RNA", limit: int = Query(20, ge=1, le=200)
    ) -> FoundFeaturesReply:
        """Find features of the cells whose symbol or id begins with a text, those of most cells first."""
        found = sessions.get(session)
        return await asyncio.to_thread(_found, found, measurement, like, limit)


def _frame(request: ExploreRequest) -> pd.DataFrame:
    """Put what is said of cells into columns."""
    first = next(iter(request.counts.values()))
    n_cells = len(first) if isinstance(first, list) else len(first.indptr) - 1
    columns: dict[str, Any] = {}
    for name, values in request.labels.items():
        if len(values) != n_cells:
            said = f"{len(values):,} values for {n_cells:,} cells; send one per cell"
            raise FieldRefused(f"labels.{name}", said)
        if all(isinstance(value, str) for value in values):
            columns[name] = pd.Categorical(values)
            n_words = len(columns[name].categories)
            if n_words > WORDS:
                said = f"{n_words:,} different words; at most {WORDS:,} can be told apart: leave it out, or send fewer"
                raise FieldRefused(f"labels.{name}", said)
        else:
            columns[name] = np.array(values, dtype=np.float32)
    return pd.DataFrame(columns)


def _reply(session: Session) -> Response:
    reply = ExploreReply(
        session=session.id,
        name=session.name,
        state=session.state,  # type: ignore[arg-type]
        share=session.share,
        cells=session.n_cells,
        notes=session.notes,
        view=_view(session) if session.state == "ready" else None,
        provenance=encode.provenance(session.description) if session.description else None,
    )
    return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")


def _view(session: Session) -> View:
    cells, description = session.ready()
    assert session.position_C2 is not None
    types: dict[str, Any] = {"types": []}
    if session.told is not None:
        probability_CY = session.told[:, 1:]
        types = {
            "types": description.prompts["cell_type"],
            "type": encode.tensor(probability_CY.argmax(axis=1).astype(np.uint16)),
            "probability": encode.tensor(probability_CY.max(axis=1)),
        }
        if not np.isnan(session.told[:, 0]).all():
            types["novelty_p"] = encode.tensor(session.told[:, 0])
    return View(
        projection="umap" if cells.n_cells >= FEWEST else "principal components",
        fitted=session.fitted,
        positions=encode.tensor(session.position_C2),
        labels=[_label(str(name), session.obs[name]) for name in session.obs if name != NAMES],
        measurements={name: int((counts_CG.getnnz(axis=0) > 0).sum()) for name, counts_CG in cells.counts.items()},
        coverage=session.coverage,
        **types,
    )


def _label(name: str, column: pd.Series[Any]) -> Label:
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = encode.tensor(column.cat.codes.to_numpy(np.int16))
        return Label(name=name, values=[str(value) for value in column.cat.categories], codes=codes)
    return Label(name=name, numbers=encode.tensor(column.to_numpy(np.float32)))


def _selection(session: Session, rows_S: NDArray[np.int64], options: AnnotateOptions) -> SelectionReply:
    cells, description = session.ready()
    if session.told is None:
        raise InputRefused("this model was not trained to tell cell types")
    for name, coverage in session.coverage.items():
        silent = name in cells.counts and cells.counts[name].nnz == 0  # nothing was counted: it was measured
        least = options.min_coverage or 0.0
        if coverage.share_of_counts < least and not silent:
            raise too_little(coverage, least, f"counts.{name}", has_any=True)
    names = description.prompts["cell_type"]
    told = session.told[rows_S]
    novelty_S, probability_SY = told[:, 0], told[:, 1:]
    known_S = (probability_SY.max(axis=1) >= options.min_probability) & ~(novelty_S < options.min_novelty_p)
    counted = np.bincount(probability_SY.argmax(axis=1)[known_S], minlength=len(names))
    called = [(names[code], int(counted[code])) for code in np.flatnonzero(counted)]
    called += [(encode.UNKNOWN, int((~known_S).sum()))] if not known_S.all() else []
    mean_Y = probability_SY.mean(axis=0, dtype=np.float64)
    order_Y = np.argsort(-mean_Y, kind="stable")
    n_likely = int((np.cumsum(mean_Y[order_Y]) < options.cover).sum()) + 1
    above = covering_type(frozenset(names[code] for code in order_Y[:n_likely]))
    cell_names = session.names()
    annotations = encode.what_each_is(told[:DETAILED], options, description)
    return SelectionReply(
        cells=len(rows_S),
        called=[
            Called(cell_type=name, cell_type_id=type_id(name) if name != encode.UNKNOWN else "", cells=n)
            for name, n in sorted(called, key=lambda one: -one[1])
        ],
        types=[
            TypeProbability(cell_type=names[code], cell_type_id=type_id(names[code]), probability=float(mean_Y[code]))
            for code in order_Y[: min(options.top, len(names) - 1)]
        ],
        covering=above,
        covering_id=type_id(above),
        novelty_p=None if np.isnan(novelty_S).all() else float(np.nanmedian(novelty_S)),
        each=[
            CellAnnotation(cell=int(row), name=str(cell_names.iloc[row]), **dict(annotation))
            for row, annotation in zip(rows_S, annotations, strict=False)
        ],
        warnings=[encode.NO_NOVELTY] if encode.unheeded(told, options) else [],
        provenance=encode.provenance(description),
    )


def _drawn(rows_S: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return all rows or, the same each time, so many of them."""
    if len(rows_S) <= most:
        return rows_S
    return np.sort(np.random.default_rng(0).choice(rows_S, most, replace=False))


def _over_groups(answers: list[tuple[Cells, Mapping[str, Shift]]]) -> dict[str, Shift]:
    """Average groups' shifts, each measurement's over the cells that have it."""
    found = {}
    for name in dict.fromkeys(name for part, shifts in answers for name in shifts if name in part.counts):
        own = [(part.n_cells, shifts[name]) for part, shifts in answers if name in part.counts]
        weights = [n_cells for n_cells, _ in own]
        stacked = [np.stack([shift.control_G, shift.perturbed_G, shift.delta_G]) for _, shift in own]
        control_G, perturbed_G, delta_G = np.average(stacked, axis=0, weights=weights).astype(np.float32)
        found[name] = own[0][1] if len(own) == 1 else Shift(control_G, perturbed_G, delta_G)
    return found


def _shifts(
    shifts: Mapping[str, Shift], cells: Cells, description: Description, top: int
) -> dict[str, MeasurementShift]:
    """Write the shifts of what was measured; of the rest, nobody could say where it came from."""
    return {
        name: _shift(shift, description.vocabulary[name], top) for name, shift in shifts.items() if name in cells.counts
    }


def _shift(shift: Shift, features: Features, top: int) -> MeasurementShift:
    order_G = np.argsort(shift.delta_G, kind="stable")
    falling_G = order_G[shift.delta_G[order_G] < 0]
    rising_G = order_G[::-1][shift.delta_G[order_G[::-1]] > 0]
    return MeasurementShift(
        up=encode.feature_effects(shift, features, rising_G[:top]),
        down=encode.feature_effects(shift, features, falling_G[:top]),
        size=float(np.sqrt(np.mean(np.square(shift.delta_G, dtype=np.float64)))),
        control=encode.tensor(shift.control_G),
        delta=encode.tensor(shift.delta_G),
    )


def _measured(session: Session, measurement: str) -> tuple[Any, Any, Description]:
    cells, description = session.ready()
    if measurement not in cells.counts:
        raise FieldRefused("measurement", f"these cells have {', '.join(cells.counts)}, not {measurement!r}")
    return cells.counts[measurement], description.vocabulary[measurement], description


def _expression(session: Session, measurement: str, feature: str) -> ExpressionReply:
    counts_CG, vocabulary, description = _measured(session, measurement)
    column = _column(counts_CG, vocabulary, feature)
    found_CX = counts_CG[:, [column]].tocoo()
    values_C = np.full(counts_CG.shape[0], np.nan if measurement in description.levels else 0, np.float32)
    values_C[found_CX.row] = found_CX.data
    unit = "as measured"
    if "count" in description.units[measurement]:
        total_C = np.maximum(np.asarray(counts_CG.sum(axis=1)).ravel(), 1)
        values_C, unit = np.log1p(values_C / total_C * PER), f"log1p of counts per {PER:,}"
    if measurement in session.measured:
        values_C[~session.measured[measurement]] = np.nan
    return ExpressionReply(
        feature_id=vocabulary.feature_id[column],
        feature_name=vocabulary.feature_name[column],
        measurement=measurement,
        unit=unit,
        values=encode.tensor(values_C.astype(np.float32)),
        provenance=encode.provenance(description),
    )


def _column(counts_CG: csr_matrix, vocabulary: Features, feature: str) -> int:
    """Return the feature that a name means; of several of one symbol, that which most cells have."""
    for names in (vocabulary.feature_id, vocabulary.feature_name):
        for name in (feature, feature.upper()):
            fitting = [column for column, one in enumerate(names) if one == name]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                return max(fitting, key=lambda column: int(counts_CG[:, [column]].nnz))
    raise FieldRefused("feature", f"the model does not know {feature!r}; see GET /v1/explore/SESSION/features")


def _found(session: Session, measurement: str, like: str, limit: int) -> FoundFeaturesReply:
    counts_CG, vocabulary, _ = _measured(session, measurement)
    cells_G, wanted = counts_CG.getnnz(axis=0), like.casefold()
    fitting = [
        column
        for column in np.flatnonzero(cells_G)
        if vocabulary.feature_name[column].casefold().startswith(wanted)
        or vocabulary.feature_id[column].casefold().startswith(wanted)
    ]
    fitting.sort(key=lambda column: (vocabulary.feature_name[column].casefold() != wanted, -cells_G[column]))
    return FoundFeaturesReply(
        features=[
            FoundFeature(
                feature_id=vocabulary.feature_id[column],
                feature_name=vocabulary.feature_name[column],
                cells=int(cells_G[column]),
            )
            for column in fitting[:limit]
        ]
    )
