"""This module is the HTTP interface: routes, statuses and problem reports around something that answers like a replica.

The model is any :class:`serve.model.Model`, so the same app runs over a model in this process or over a Ray Serve
deployment. OpenAPI is at ``/openapi.json``; no page loads anything from elsewhere.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import Scope

from serve import encode
from serve.access import Gate, Misdirected, Purse, is_open
from serve.arrow import ARROW
from serve.atlas import Atlas
from serve.body import BodyLimit
from serve.decode import Cells, Decoded, Decoder, Features
from serve.door import BURST, FULL, QUESTIONS, Door, Porter, waited_s
from serve.errors import DeadlineExceeded, FieldRefused, Overloaded, StaleModel, Unavailable
from serve.explore import Offer, add_explore
from serve.foreign import FOREIGN, Readers
from serve.forms import FORM_SCHEMA, FORMS, JSON, form_of, write
from serve.h5ad import FORM
from serve.head_cards import HeadCard
from serve.jobs import Jobs
from serve.lake_messages import NeighborsRequest
from serve.lake_routes import add_lakes, add_neighbors
from serve.messages import (
    AnnotateReply,
    AnnotateRequest,
    EmbedReply,
    EmbedRequest,
    Feature,
    FeaturesReply,
    FieldProblem,
    ForecastReply,
    ForecastRequest,
    GenerateReply,
    GenerateRequest,
    Health,
    ModelCard,
    ModelsReply,
    PerturbationsReply,
    PerturbOptions,
    PerturbReply,
    PerturbRequest,
    Problem,
    PromptsReply,
    SwapReport,
    TranslateReply,
    TranslateRequest,
)
from serve.metrics import Metered, Metrics
from serve.model import (
    Annotate,
    Columns,
    Description,
    Embed,
    Forecast,
    Generate,
    HeadQuestion,
    Model,
    Perturb,
    Translate,
)
from serve.npz import NPZ
from serve.page import add_page
from serve.payload import read_request
from serve.problems import PROBLEM, TITLES, briefly, problem
from serve.settings import Limits
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, StorageError
from train.cells import NUMBERS

log = logging.getLogger("somaflow.serve")
T = TypeVar("T")
R = TypeVar("R")
Q = TypeVar("Q", EmbedRequest, TranslateRequest)

STATUS: dict[type[Exception], int] = {
    Overloaded: 429,
    DeadlineExceeded: 504,
    Unavailable: 503,
    StaleModel: 503,
    ConflictError: 409,
    MissingError: 404,
    StorageError: 503,
    InputRefused: 422,
    SomaflowError: 500,
}
"""The HTTP status of each error; the first class that fits decides, so subclasses stand before their parents."""

RETRY_AFTER_S = {503: 1}
MAX_PROBLEMS = 10
FRESH_S = 1.0
"""Seconds for which nobody asks whether another checkpoint answers now; the one before still answers meanwhile."""
GENERATED_AT_ONCE = 10
"""Drawn values (most of them zeros, which are not sent) for one that may be predicted in a reply."""
Asking = EmbedRequest | AnnotateRequest | TranslateRequest | PerturbRequest | ForecastRequest
"""Requests that hold cells."""


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that answers now, and the decoder made for it."""

    description: Description
    decoder: Decoder

    def under(self, adapter: str) -> Description:
        """Return what a reply that was made with an adapter says of its origin.

        Raises:
            FieldRefused: There is no such adapter, or it cannot be used.
        """
        if adapter and adapter not in self.description.adapters:
            raise _no_such("adapter", adapter, self.description.adapters, self.description.adapters_refused)
        return replace(self.description, adapter=adapter)

    def head(self, request: PerturbRequest) -> HeadCard | None:
        """Return the head that a request names.

        Raises:
            FieldRefused: There is no such head, it cannot be used, or what it answers to is not there.
        """
        name, found = request.head, self.description.heads.get(request.head)
        if not name:
            if request.context:
                raise FieldRefused("context", "only a head takes it; name one in 'head', or say it in 'prompts'")
            return None
        if found is None:
            raise _no_such("head", name, self.description.heads, self.description.heads_refused)
        if request.adapter:
            raise FieldRefused("adapter", "a head answers without the model, so without its adapters; leave one out")
        if found.measurement not in request.counts:
            raise FieldRefused("counts", f"the head {name} answers to {found.measurement}; send counts of it")
        return found

    def asked_of(self, cells: Cells, adapter: str) -> Cells:
        """Say with which adapter cells are to be answered, and how long they waited."""
        self.under(adapter)
        named = (adapter, self.description.adapters[adapter]) if adapter else ("", "")
        return replace(cells, adapter=named, waited_s=waited_s())

    @property
    def sha256(self) -> str:
        """The digest of its weights."""
        return str(self.description.manifest["model_sha256"])


def _no_such(field: str, name: str, usable: Iterable[str], refused: Mapping[str, str]) -> FieldRefused:
    """Return the error of a name that this server does not know, or cannot use."""
    if name in refused:
        return FieldRefused(field, f"{name} cannot be used: {refused[name]}")
    return FieldRefused(field, f"this server knows {', '.join(sorted(usable)) or 'none'}")


class Desk:
    """Keeps the decoder in step with the checkpoint that the model has loaded."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.metrics = Metrics()
        self.readers = Readers(limits)
        self.door = Door(limits.inside_bytes, BURST)
        self._loaded: Loaded | None = None
        self._asked = time.monotonic()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """End what reads foreign bodies with the app."""
        yield
        await asyncio.to_thread(self.readers.close)

    async def loaded(self) -> Loaded:
        """Return the present checkpoint, asking the model the first time."""
        if self._loaded is None:
            description = await self.model.describe()
            decoder = Decoder(
                description.vocabulary,
                description.prompts,
                str(description.manifest["model_sha256"]),
                self.limits,
                description.levels,
            )
            self._loaded = Loaded(description, decoder)
        return self._loaded

    def forget(self) -> None:
        """Ask the model again next time: it holds another checkpoint now."""
        self._loaded = None

    async def fresh(self) -> Loaded:
        """Return the checkpoint that answers, as the model said ``FRESH_S`` ago at most."""
        now = time.monotonic()
        if self._loaded is not None and now - self._asked > FRESH_S:
            self._asked = now
            try:
                if self._loaded.sha256 != await self.model.ready():
                    self.forget()
            except Unavailable:
                self._asked = -math.inf  # the next one asks again, rather than to wait for an answer
                raise
        return await self.loaded()

    async def again(self, answer: Callable[[R], Awaitable[T]], request: R) -> T:
        """Answer a request; once more where the checkpoint was changed while it was read."""
        await self.fresh()
        try:
            return await answer(request)
        except StaleModel:
            self.forget()
            return await answer(request)

    async def embed(self, request: EmbedRequest) -> EmbedReply:
        """Answer an embedding request."""
        columns = self._features(await self.loaded(), request)
        loaded, decoded = await self._read(request)
        embedding_CD = await self.model.ask(decoded.cells, Embed())
        features = None
        if columns:
            found = await self.model.vectors(loaded.sha256, columns)
            features = {name: (these, found[name]) for name, these in columns.items()}
        told = loaded.under(request.adapter)
        reply = partial(encode.embed_reply, embedding_CD, features, request.options, decoded, told)
        return await asyncio.to_thread(reply)

    def _features(self, loaded: Loaded, request: EmbedRequest) -> Columns:
        """Return where the features are whose own vectors are asked for."""
        asked, where = request.options.feature_embeddings or {}, "options.feature_embeddings"
        n_values = sum(map(len, asked.values())) * loaded.description.embedding_size
        if n_values > self.limits.values:
            raise FieldRefused(where, f"{n_values:,} values; at most {self.limits.values:,} go into a reply")
        for name in asked:
            if name not in loaded.description.vocabulary:
                known = ", ".join(sorted(loaded.description.vocabulary))
                raise FieldRefused(f"{where}.{name}", f"this model does not know this measurement; it knows {known}")
        return {name: loaded.decoder.columns(name, names, f"{where}.{name}") for name, names in asked.items()}

    async def annotate(self, request: AnnotateRequest) -> AnnotateReply:
        """Answer which types cells are."""
        loaded, decoded = await self._read(request)
        told = await self.model.ask(decoded.cells, Annotate())
        return await asyncio.to_thread(
            encode.annotate_reply, told, request.options, decoded, loaded.under(request.adapter)
        )

    async def translate(self, request: TranslateRequest) -> TranslateReply:
        """Answer what another measurement would have shown."""
        loaded, decoded = await self._read(request)
        name, wanted = request.measurement, request.options.features
        vocabulary = self.measurement(loaded, name)
        columns = None if wanted is None else loaded.decoder.columns(name, wanted, "options.features")
        n_values = decoded.cells.n_cells * (len(vocabulary.feature_id) if columns is None else len(columns))
        if n_values > self.limits.values:
            raise FieldRefused(
                "options.features",
                f"{n_values:,} values; at most {self.limits.values:,} go into a reply: name features, or send fewer "
                "cells at a time",
            )
        asked = Translate(name, columns)
        found = await self.model.ask(decoded.cells, asked)
        return await asyncio.to_thread(
            encode.translate_reply, found, asked, request.options, decoded, loaded.under(request.adapter)
        )

    async def perturb(self, request: PerturbRequest) -> PerturbReply:
        """Answer a perturbation request."""
        if "perturbation" in request.prompts:
            raise FieldRefused("prompts.perturbation", "name perturbations in 'perturbations'; the cells are controls")
        card = (await self.loaded()).head(request)
        asked = await self.targets(request.perturbations, card)
        await self._check_vectors(request.options, len(asked), card)
        loaded, decoded = await self._read(request)
        head = None
        if card is not None:
            if card.measurement not in decoded.cells.counts:
                why = (
                    f"the head {request.head} answers to {card.measurement}, of which the model understands too little"
                )
                raise FieldRefused(f"counts.{card.measurement}", why)
            head = HeadQuestion(request.head, card.context(request.context), request.options.level)
        shifts = await self.model.ask(decoded.cells, Perturb(asked, head))
        if card is not None and head is not None:
            bounded = shifts[0][card.measurement].low_G is not None
            told = card.doubts(head.context, head.level, bounded=bounded)
            decoded = replace(decoded, warnings=[*decoded.warnings, *told])
        about = loaded.under(request.adapter)
        return await asyncio.to_thread(
            encode.perturb_reply, asked, request.perturbations, shifts, request.options, decoded, about, request.head
        )

    async def _check_vectors(self, options: PerturbOptions, n_effects: int, head: HeadCard | None = None) -> None:
        """Refuse effects with vectors that are more than a reply may hold: each has three, those of heads two more."""
        vocabulary = (await self.loaded()).description.vocabulary
        n_each = 5 * len(head.positions) if head else 3 * sum(len(part.feature_id) for part in vocabulary.values())
        if options.vectors and n_effects * n_each > self.limits.values:
            raise FieldRefused(
                "options.vectors",
                f"{n_effects * n_each:,} values; at most {self.limits.values:,} go into a reply: "
                f"{'name fewer perturbations at a time, or ' if n_effects > 1 else ''}leave the vectors out",
            )

    async def targets(
        self, perturbations: Sequence[str | list[str]], head: HeadCard | None = None
    ) -> tuple[tuple[str, ...], ...]:
        """Check the names of perturbations, as the model or a head knows them; return the targets of each."""
        loaded = await self.loaded()
        if len(perturbations) > self.limits.perturbations:
            raise FieldRefused("perturbations", f"send at most {self.limits.perturbations} in a request")
        return tuple(tuple(_targets(item, position, loaded, head)) for position, item in enumerate(perturbations))

    async def forecast(self, request: ForecastRequest) -> ForecastReply:
        """Answer what becomes of cells."""
        await self._check_vectors(request.options, 1)
        loaded, decoded = await self._read(request)
        shifts = await self.model.ask(decoded.cells, Forecast(request.elapsed))
        return await asyncio.to_thread(
            encode.forecast_reply, shifts, request.options, decoded, loaded.under(request.adapter)
        )

    async def generate(self, request: GenerateRequest) -> GenerateReply:
        """Draw cells."""
        loaded = await self.loaded()
        vocabulary = self.measurement(loaded, request.measurement)
        n_values = request.cells * len(vocabulary.feature_id)
        if n_values > GENERATED_AT_ONCE * self.limits.values:
            raise FieldRefused("cells", f"{request.cells:,} cells are too many at a time; ask several times")
        cells = loaded.asked_of(loaded.decoder.said(request.prompts, request.cells), request.adapter)
        counts_CG = await self.model.ask(cells, Generate(request.measurement, request.depth, request.seed))
        return await asyncio.to_thread(
            encode.generate_reply, counts_CG, request.measurement, loaded.under(request.adapter)
        )

    async def _read(self, request: Asking) -> tuple[Loaded, Decoded]:
        loaded = await self.loaded()
        decoded = await self.decoded(loaded, request)
        return loaded, replace(decoded, cells=loaded.asked_of(decoded.cells, request.adapter))

    async def decoded(self, loaded: Loaded, request: Asking | NeighborsRequest) -> Decoded:
        """Decode a request's cells when it is its turn, and count them."""
        least = request.options.min_coverage
        decode = partial(loaded.decoder.decode, request.counts, request.prompts, min_coverage=least)
        async with self.door.reading():
            decoded = await asyncio.to_thread(decode)
        self.metrics.read(decoded)
        return replace(decoded, cells=replace(decoded.cells, waited_s=waited_s()))

    def measurement(self, loaded: Loaded, name: str) -> Features:
        """Return the features of a measurement; one that the model does not know is refused."""
        if name not in loaded.description.vocabulary:
            known = ", ".join(sorted(loaded.description.vocabulary))
            raise FieldRefused("measurement", f"this model does not know {name!r}; it knows {known}")
        return loaded.description.vocabulary[name]


def _targets(item: str | list[str], position: int, loaded: Loaded, head: HeadCard | None) -> list[str]:
    where = f"perturbations.{position}"
    targets = sorted({target for part in ([item] if isinstance(item, str) else item) for target in part.split("+")})
    if not targets:
        raise FieldRefused(where, "a combined perturbation needs at least one target")
    for target in targets:
        if not target:
            raise FieldRefused(where, "an empty name is no target; see GET /v1/perturbations")
        if head is None:
            loaded.decoder.check_prompt("perturbation", target, where)
        else:
            head.check(target, where)
    return targets


def make_app(
    model: Model,
    limits: Limits,
    purses: dict[str, Purse] | None = None,
    atlas: Atlas | None = None,
    jobs: Jobs | None = None,
    offer: Offer | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """Build the HTTP interface over ``model``; with ``purses``, for owners of tokens only.

    ``atlas`` holds the lakes that can be asked about, and ``jobs`` embeds them;
    ``offer`` says which cells the page at ``/`` has to show, ``origins`` which other pages' scripts may ask.
    ``hosts`` are the names, beside this machine's own, under which it may be asked; without, under any.
    """
    desk = Desk(model, limits)
    app = FastAPI(
        title="somaflow",
        summary="Questions about cells, answered by a multimodal cell foundation model.",
        version="1",
        lifespan=desk.lifespan,
        docs_url=None,
        redoc_url=None,
        responses={code: {"model": Problem, "description": title} for code, title in TITLES.items()},
    )
    app.add_middleware(
        BodyLimit,
        max_bytes=limits.body_bytes,
        timeout_s=limits.timeout_s,
        problem=problem,
        takes=lambda scope: scope.get("method") == "POST" and _answers(app, scope),
    )
    app.add_middleware(Porter, door=desk.door, undeclared=limits.body_bytes)
    if purses:  # outermost: a stranger's body is not read
        app.add_middleware(Gate, purses=purses, problem=briefly)
    if hosts is not None:
        app.add_middleware(Misdirected, hosts=hosts, problem=briefly)
    app.add_middleware(Metered, metrics=desk.metrics, known=QUESTIONS)
    if origins:  # outermost: a browser asks without a token first, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "Location", COUNTS_FROM],
        )
    app.state.readers = desk.readers
    _add_problems(app, desk)
    atlas = atlas or Atlas({})
    _add_questions(app, desk, atlas)
    lakes = APIRouter(tags=["lakes"])
    add_lakes(lakes, desk, atlas, jobs)
    app.include_router(lakes)
    _add_catalog(app, desk)
    add_explore(app, desk, offer or Offer(), type("Forms", (Forms,), {"desk": desk}))
    add_page(app)
    described = app.openapi
    guarded = bool(purses)
    app.openapi = lambda: _as_served(described(), guarded)  # type: ignore[method-assign]
    return app


def _answers(app: FastAPI, scope: Scope) -> bool:
    """Say whether a route is there for the address and the method."""
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def _as_served(description: dict[str, Any], guarded: bool) -> dict[str, Any]:
    """Say in the API's description that errors come as problem details, and which paths need a token."""
    if guarded:
        description.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    for name, path in description["paths"].items():
        for operation in path.values():
            if guarded and is_open(name):
                operation["security"] = []
            for status, reply in operation["responses"].items():
                if status >= "400" and "application/json" in reply.get("content", {}):
                    reply["content"][PROBLEM] = reply["content"].pop("application/json")
    return description


class Forms(APIRoute):
    """A route that takes its message in other forms too."""

    desk: Desk
    limits = Limits()
    permit: Callable[[], AbstractContextManager[None]] = nullcontext
    """Held while a request is read: what its reading takes is not taken for more at once than there may be."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers: as FastAPI does, but for bodies that are no JSON."""
        plain = super().get_route_handler()

        async def answer(request: Request) -> Response:
            with self.permit():
                return await read_and_answer(request)

        async def read_and_answer(request: Request) -> Response:
            media, body, chosen = _media(request), b"", ""
            if media in FOREIGN:
                foreign = await self.desk.readers.read(request.headers["content-type"], await request.body())
                body, chosen = foreign.npz, foreign.chosen
            elif media == NPZ:
                body = await request.body()
            else:
                return await plain(request)
            message = get_type_hints(self.endpoint)["request"]
            async with self.desk.door.reading():
                read = await asyncio.to_thread(read_request, body, message, self.limits, WHERE.get(media, ""))
            response: Response = await self.endpoint(read, request.headers.get("accept", ""))
            if chosen:
                response.headers[COUNTS_FROM] = quote(chosen)
            return response

        return answer


WHERE = {NPZ: " as bytes (uint8)", ARROW: " in the schema's metadata"}
"""How a message is written beside counts, where it is not in a part of a form."""


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


Accept = Annotated[
    str, Header(description=f"`{NPZ}` or `{ARROW}` gives the large array of the reply as one, beside the rest.")
]
_IN_ALL_FORMS = QUESTIONS - {"/v1/generate"} | {"/v1/explore"}
"""Where cells are sent, in any form; whatever else is sent is JSON."""
COUNTS_FROM = "Somaflow-Counts-From"
"""Header that says which matrix of an h5ad file was read."""
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_NPZ_BODY: dict[str, Any] = {"requestBody": {"content": {NPZ: _BINARY, ARROW: _BINARY, FORM: FORM_SCHEMA}}}
_NPZ_REPLY: dict[int | str, dict[str, Any]] = {200: {"content": {NPZ: _BINARY, ARROW: _BINARY}}}


def _add_questions(app: FastAPI, desk: Desk, atlas: Atlas) -> None:
    """Add what is asked about cells; in every form; answers are JSON, or arrays where there is a large one."""
    forms = type("Forms", (Forms,), {"desk": desk, "limits": desk.limits})
    router = APIRouter(route_class=forms, tags=["ask the model"])

    @router.post("/v1/embed", response_model=EmbedReply, openapi_extra=_NPZ_BODY, responses=_NPZ_REPLY)
    async def embed(request: EmbedRequest, accept: Accept = "") -> Response:
        """Embed cells: one vector per cell, in the order of the request."""
        return _reply(await desk.again(desk.embed, _packed(request, accept)), accept, "embeddings")

    @router.post("/v1/annotate", response_model=AnnotateReply, openapi_extra=_NPZ_BODY)
    async def annotate(request: AnnotateRequest, accept: Accept = "") -> Response:
        """Tell the type of each cell, how likely it is, and the ontology's type above those that are likely."""
        return _json(await desk.again(desk.annotate, request))

    @router.post("/v1/translate", response_model=TranslateReply, openapi_extra=_NPZ_BODY, responses=_NPZ_REPLY)
    async def translate(request: TranslateRequest, accept: Accept = "") -> Response:
        """Predict what a measurement that the cells do not have, or have in part, would show of each of them."""
        return _reply(await desk.again(desk.translate, _packed(request, accept)), accept, "values")

    @router.post("/v1/forecast", response_model=ForecastReply, openapi_extra=_NPZ_BODY)
    async def forecast(request: ForecastRequest, accept: Accept = "") -> Response:
        """Predict the mean expression of the cells after a while, beside the present one."""
        return _json(await desk.again(desk.forecast, request))

    @router.post("/v1/perturb", response_model=PerturbReply, openapi_extra=_NPZ_BODY)
    async def perturb(request: PerturbRequest, accept: Accept = "") -> Response:
        """Predict the mean expression of control cells with and without each perturbation."""
        return _json(await desk.again(desk.perturb, request))

    @app.post("/v1/generate", response_model=GenerateReply, tags=["ask the model"])
    async def generate(request: GenerateRequest) -> Response:
        """Draw counts of cells of which nothing is known but what is said."""
        return _json(await desk.again(desk.generate, request))

    add_neighbors(router, desk, atlas, _NPZ_BODY)
    app.include_router(router)


def _packed(request: Q, accept: str) -> Q:
    """Return the request with its array in bytes, where the reply is npz or Arrow."""
    if not form_of(accept):
        return request
    return request.model_copy(update={"options": request.options.model_copy(update={"encoding": "base64"})})


def _reply(reply: BaseModel, accept: str, field: str) -> Response:
    """Write a reply: all of it as JSON, or its array beside the rest."""
    form = form_of(accept)
    return Response(write(reply, form, field), media_type=form) if form else _json(reply)


def _add_catalog(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/models", tags=["look up"])
    async def models() -> ModelsReply:
        """List the models that answer here, with where they come from and what they accept."""
        desk.forget()  # what came of a swap is said here
        return ModelsReply(models=[_card((await desk.loaded()).description, desk.limits)])

    @app.get("/v1/features", tags=["look up"])
    async def features(
        measurement: str = "RNA", offset: int = Query(0, ge=0), limit: int = Query(1_000, ge=1, le=10_000)
    ) -> FeaturesReply:
        """List the features of one measurement in the order of the model's vocabulary."""
        description = (await desk.fresh()).description
        part = desk.measurement(await desk.fresh(), measurement)
        rows = zip(part.feature_id, part.feature_name, part.organism, strict=True)
        page = list(rows)[offset : offset + limit]
        return FeaturesReply(
            measurement=measurement,
            total=len(part.feature_id),
            offset=offset,
            features=[Feature(feature_id=i, feature_name=n, organism=o) for i, n, o in page],
            vocabulary_hash=description.manifest["vocabulary_hash"],
        )

    @app.get("/v1/perturbations", tags=["look up"])
    async def perturbations() -> PerturbationsReply:
        """List the perturbations that the model has seen."""
        description = (await desk.fresh()).description
        names = [name for name in description.prompts.get("perturbation", []) if name not in ("", "control")]
        return PerturbationsReply(perturbations=names, vocabulary_hash=description.manifest["vocabulary_hash"])

    @app.get("/v1/prompts", tags=["look up"])
    async def prompts() -> PromptsReply:
        """List what can be said about cells, and the values that the model has seen."""
        description = (await desk.fresh()).description
        return PromptsReply(
            prompts={name: [value for value in values if value] for name, values in description.prompts.items()},
            numbers=list(NUMBERS),
            units=description.manifest.get("data", {}).get("units", {}),
            vocabulary_hash=description.manifest["vocabulary_hash"],
        )

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Tell Prometheus what was done here."""
        with suppress(SomaflowError):  # no model is ready: its gauges stay as they were, and are forgotten
            desk.metrics.hear(await desk.model.load())
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/health/live", tags=["health"])
    async def live() -> Health:
        """Say that the server runs."""
        return Health(status="live")

    @app.get("/v1/health/ready", tags=["health"])
    async def ready() -> Health:
        """Say that a model is loaded and answers; 503 otherwise."""
        await desk.model.ready()
        return Health(status="ready")


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")


def _card(description: Description, limits: Limits) -> ModelCard:
    provenance, swap = encode.provenance(description), description.swap
    figures: dict[str, Any] = description.manifest.get("figures", {})
    return ModelCard(
        id=f"{provenance.snapshot_name}-{provenance.model_sha256[:12]}",
        ready=True,
        provenance=provenance,
        created=str(description.manifest.get("created", "")),
        measurements={name: len(part.feature_id) for name, part in description.vocabulary.items()},
        levels=sorted(description.levels),
        embedding_size=description.embedding_size,
        prompts=sorted([*description.prompts, *NUMBERS]),
        limits=limits.model_dump(),
        figures={name: value for name, value in figures.items() if isinstance(value, int | float)},
        swap=None
        if swap is None
        else SwapReport(when=_day(swap.when), model_sha256=swap.model_sha256, error=swap.error),
        adapters=description.adapters,
        adapters_refused=description.adapters_refused,
        heads={name: card.report() for name, card in description.heads.items()},
        heads_refused=description.heads_refused,
    )


def _day(seconds: float) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _add_problems(app: FastAPI, desk: Desk) -> None:
    """Answer every error as RFC 9457 problem details: no stack traces, no payloads."""

    @app.exception_handler(SomaflowError)
    async def ours(request: Request, error: SomaflowError) -> Response:
        if isinstance(error, StaleModel):
            desk.forget()
        status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
        if status == 500:
            log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
            return problem(500, "internal error")
        fields = [FieldProblem(field=error.field, message=error.message)] if isinstance(error, FieldRefused) else []
        response = problem(status, str(error), fields, getattr(error, "retry_after_s", RETRY_AFTER_S.get(status)))
        if isinstance(error, Overloaded) and error.full_s:
            response.headers[FULL] = f"{error.full_s:.3f}"
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        media, forms = _media(request), FORMS if path in _IN_ALL_FORMS else (JSON,)
        if request.method == "POST" and media not in forms:
            return problem(415, f"send Content-Type: {' or '.join(forms)} (got {media[:80] or 'none'!r})")
        for item in error.errors():
            if item["type"] == "json_invalid":
                why = str(item.get("ctx", {}).get("error", item["msg"]))[:200]
                return problem(400, f"the body is not valid JSON at character {item['loc'][-1]}: {why}")
        fields = [_field(item) for item in error.errors()[:MAX_PROBLEMS]]
        return problem(422, "; ".join(f"{item.field}: {item.message}" for item in fields), fields)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
        return problem(500, "internal error")


def _field(item: Any) -> FieldProblem:
    whole = enumerate(item["loc"])  # after the first two, "csr" and "cells" are forms of counts, not names of fields
    skipped = (("body", "query"), (), ("csr", "cells"))
    path = ".".join(str(part) for place, part in whole if part not in skipped[min(place, 2)])
    return FieldProblem(field=path[:200] or "body", message=str(item["msg"])[:300])
