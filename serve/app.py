"""This module is the HTTP interface: routes, statuses and problem reports around something that answers like a replica.

The model is any :class:`serve.model.Model`, so the same app runs over a model in this process or over a Ray Serve
deployment. OpenAPI is at ``/openapi.json``; no page loads anything from elsewhere.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
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
from serve.body import BodyLimit, WithoutBody
from serve.desk import CONTROL, Desk
from serve.door import FULL, QUESTIONS, Porter
from serve.errors import DeadlineExceeded, FieldRefused, Overloaded, StaleModel, Unavailable
from serve.explore import Offer, add_explore
from serve.foreign import FOREIGN
from serve.forms import BINARY, CELLS_BODY, FORMS, JSON, form_of, write
from serve.jobs import Jobs
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
    PerturbReply,
    PerturbRequest,
    Problem,
    PromptsReply,
    SwapReport,
    TranslateReply,
    TranslateRequest,
)
from serve.metrics import Metered
from serve.model import (
    Description,
    Model,
)
from serve.npz import NPZ
from serve.page import add_page
from serve.payload import read_request
from serve.problems import PROBLEM, TITLES, briefly, problem
from serve.settings import Limits
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, StorageError
from train.cells import NUMBERS

log = logging.getLogger("somaflow.serve")
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
        redirect_slashes=False,
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
    app.add_middleware(WithoutBody)
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


def _methods(app: FastAPI, scope: Scope) -> list[str]:
    """List the methods that an address takes, over all routes that are there for it."""
    found = [
        method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if _answers(app, {**scope, "method": method})
    ]
    return sorted([*found, "HEAD"] if "GET" in found else found)


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
                kind, body = request.headers["content-type"], await request.body()
                foreign = await self.desk.readers.read(kind, body, self.limits)
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
_NPZ_REPLY: dict[int | str, dict[str, Any]] = {200: {"content": {NPZ: BINARY, ARROW: BINARY}}}


def _add_questions(app: FastAPI, desk: Desk, atlas: Atlas) -> None:
    """Add what is asked about cells; in every form; answers are JSON, or arrays where there is a large one."""
    forms = type("Forms", (Forms,), {"desk": desk, "limits": desk.limits})
    router = APIRouter(route_class=forms, tags=["ask the model"])

    @router.post("/v1/embed", response_model=EmbedReply, openapi_extra=CELLS_BODY, responses=_NPZ_REPLY)
    async def embed(request: EmbedRequest, accept: Accept = "") -> Response:
        """Embed cells: one vector per cell, in the order of the request."""
        return _reply(await desk.again(desk.embed, _packed(request, accept)), accept, "embeddings")

    @router.post("/v1/annotate", response_model=AnnotateReply, openapi_extra=CELLS_BODY)
    async def annotate(request: AnnotateRequest, accept: Accept = "") -> Response:
        """Tell the type of each cell, how likely it is, and the ontology's type above those that are likely."""
        return _json(await desk.again(desk.annotate, request))

    @router.post("/v1/translate", response_model=TranslateReply, openapi_extra=CELLS_BODY, responses=_NPZ_REPLY)
    async def translate(request: TranslateRequest, accept: Accept = "") -> Response:
        """Predict what a measurement that the cells do not have, or have in part, would show of each of them."""
        return _reply(await desk.again(desk.translate, _packed(request, accept)), accept, "values")

    @router.post("/v1/forecast", response_model=ForecastReply, openapi_extra=CELLS_BODY)
    async def forecast(request: ForecastRequest, accept: Accept = "") -> Response:
        """Predict the mean expression of the cells after a while, beside the present one."""
        return _json(await desk.again(desk.forecast, request))

    @router.post("/v1/perturb", response_model=PerturbReply, openapi_extra=CELLS_BODY)
    async def perturb(request: PerturbRequest, accept: Accept = "") -> Response:
        """Predict the mean expression of control cells with and without each perturbation."""
        return _json(await desk.again(desk.perturb, request))

    @app.post("/v1/generate", response_model=GenerateReply, tags=["ask the model"])
    async def generate(request: GenerateRequest) -> Response:
        """Draw counts of cells of which nothing is known but what is said."""
        return _json(await desk.again(desk.generate, request))

    add_neighbors(router, desk, atlas, CELLS_BODY)
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
        names = [name for name in description.prompts.get("perturbation", []) if name not in ("", CONTROL)]
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
        headers = error.headers
        if error.status_code == 405:  # the first route of several at the address has told its own
            headers = {"Allow": ", ".join(_methods(app, request.scope))}
        return problem(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
        return problem(500, "internal error")


def _field(item: Any) -> FieldProblem:
    whole = enumerate(item["loc"])  # after the first two, "csr" and "cells" are forms of counts, not names of fields
    skipped = (("body", "query"), (), ("csr", "cells"))
    path = ".".join(str(part) for place, part in whole if part not in skipped[min(place, 2)])
    return FieldProblem(field=path[:200] or "body", message=str(item["msg"])[:300])
