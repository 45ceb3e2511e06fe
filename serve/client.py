"""This module asks a somaflow server from Python: AnnData or counts in, numpy out, retries included.

>>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
...     vectors = client.embed(adata, prompts={"organism": "homo_sapiens"}).values
"""

from __future__ import annotations

import io
import json
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.arrow import ARROW, read_reply, write_request
from serve.errors import Overloaded, Unavailable
from serve.given import Given, Measurements, chunks, read_cells
from serve.h5ad import FORM
from serve.npz import NPZ, REPLY, REQUEST, unpacked, write_npz
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, UsageError

RETRIED = frozenset({429, 503})
TROUBLE = frozenset({408, 500, 502, 503, 504})
"""Asked again where no report says why: they come from what stands between, or from a server that died."""
CHUNK_EFFECTS = 64
CHUNK_CELLS = 1_000
CHUNK_COUNTS = 500_000
FEWER = "send fewer"
"""What the server says, besides its status, of a request that is too large."""
SAID = 200
"""Characters of an answer that is no report, in errors."""
PAGE = 10_000
"""Most features that the server lists at a time."""
AGAIN = 2
"""How often parts are asked about again, of which another model told than of the others."""

Said = str | float | np.generic | Sequence[str] | Sequence[float] | NDArray[Any]
ONE = (str, int, float, np.generic)
"""One value of a prompt, for all cells."""


@dataclass(frozen=True)
class Report:
    """What the server says of a question beside its answer.

    Attributes:
        coverage: Measurement to how much of it was understood, of the part of the cells in which that was least.
        warnings: Of all parts, each once.
        provenance: Which model answered, and what it learned from.
    """

    coverage: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Embeddings:
    """One row per cell, all of one model; the rest is as in :class:`Report`."""

    values: NDArray[np.floating]
    coverage: dict[str, Any]
    warnings: list[str]
    provenance: dict[str, Any]
    features: dict[str, tuple[list[str], NDArray[np.floating]]] = field(default_factory=dict)
    """Measurement to the ids of features and their vectors, where they were asked for."""


@dataclass(frozen=True)
class Body:
    """A body that is no JSON, and its content type; of a form, its other part."""

    media: str
    content: bytes
    request: str = ""


@dataclass(frozen=True)
class _Piece:
    """Some of the cells, of which the same was measured, and where they are among all."""

    rows: NDArray[np.int64]
    measurements: Measurements

    def part(self, span: slice) -> _Piece:
        """Return some of them."""
        parts = {name: (counts_CF[span], features) for name, (counts_CF, features) in self.measurements.items()}
        return _Piece(self.rows[span], parts)

    def halves(self) -> tuple[_Piece, _Piece]:
        """Return the first half and the rest."""
        middle = len(self.rows) // 2
        return self.part(slice(0, middle)), self.part(slice(middle, None))


class _TooLarge(InputRefused):
    """The server takes no request of this size; it may take a smaller one."""


_Answered = list[tuple[_Piece, dict[str, Any]]]
_Targets = list[str | list[str]]
P = TypeVar("P")
"""Pieces and the replies about them."""


@dataclass(frozen=True)
class _Answers:
    """Replies about pieces; ``rows`` says which cell each of their entries is about, None that they are in order."""

    replies: list[dict[str, Any]]
    rows: NDArray[np.int64] | None = None

    def report(self) -> Report:
        """Return what the replies say beside the answer."""
        coverage: dict[str, Any] = {}
        for reply in self.replies:
            for name, part in reply.get("coverage", {}).items():
                coverage[name] = min(coverage.get(name, part), part, key=lambda one: one["share_of_counts"])
        told = dict.fromkeys(warning for reply in self.replies for warning in reply.get("warnings", ()))
        return Report(coverage, list(told), self.replies[-1]["provenance"])

    def array(self, field: str) -> NDArray[Any]:
        """Return an array of the replies, a row for each cell."""
        values = np.concatenate([reply[field] for reply in self.replies])
        return values if self.rows is None else values[np.argsort(self.rows)]

    def cells(self) -> list[dict[str, Any]]:
        """Return what the replies say of each cell."""
        told = [cell for reply in self.replies for cell in reply["cells"]]
        return told if self.rows is None else [told[place] for place in np.argsort(self.rows)]


@dataclass(frozen=True)
class Effect:
    """What one perturbation is predicted to do to one measurement; vectors follow ``feature_id``."""

    perturbation: str
    measurement: str
    feature_id: list[str]
    control: NDArray[np.float32]
    perturbed: NDArray[np.float32]
    delta: NDArray[np.float32]
    top: list[dict[str, Any]]
    low: NDArray[np.float32] | None = None
    high: NDArray[np.float32] | None = None
    """The interval of ``delta``, of a head."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Predicted:
    """Expected values of a measurement, [cells, features]; ``unit`` says what they are, :class:`Report` the rest."""

    measurement: str
    feature_id: list[str]
    values: NDArray[np.float32]
    unit: str
    coverage: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Neighbors:
    """The nearest cells of a lake, [cells, k], nearest first.

    Attributes:
        index: Which index was searched.
        joinid: The neighbours' soma_joinid.
        distance: Euclidean, between embeddings.
        obs: Of each neighbour, what the lake says of it.
        types: Of each cell, its neighbours' types with their shares, largest first.
        coverage, warnings, provenance: As in :class:`Report`.
    """

    index: str
    joinid: NDArray[np.int64]
    distance: NDArray[np.float32]
    obs: list[list[dict[str, Any]]]
    types: list[list[dict[str, Any]]]
    coverage: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A bulk job; ``state`` is running, done, failed, cancelled or interrupted (ask again to go on)."""

    id: str
    lake: str
    organism: str
    name: str
    where: str
    model_sha256: str
    state: str
    done: int
    total: int
    message: str
    created: str
    updated: str


class Client:
    """A connection to one server; close it, or use it in a ``with`` block.

    Args:
        url: Where the server listens, as in ``http://127.0.0.1:8000``.
        token: What lets in; where it is left out, that of the environment's ``SOMAFLOW_TOKEN``.
        adapter: The adapter that is to answer, by its name at the server; empty is none.
        timeout_s: Longest wait for one answer.
        tries: How often a request is sent before a busy or absent server becomes an error.
        transport: For tests.
        sleep: For tests.

    Raises:
        UsageError: The address or the token can be none.

    Attributes:
        last: What the server said beside its last answer about cells.
    """

    last: Report

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        adapter: str = "",
        timeout_s: float = 120.0,
        tries: int = 6,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.lower().startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of a server; begin it with http:// or https://")
        token = (os.environ.get("SOMAFLOW_TOKEN", "") if token is None else token).strip()
        if not (token.isascii() and token.isprintable()):
            raise UsageError("the token holds what no token may, letters beyond ASCII or line breaks; copy it anew")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport, trust_env=False
        )
        self._adapter = {"adapter": adapter} if adapter else {}
        self._model = _Model(self)
        self.last = Report()
        self._tries = tries
        self._sleep = sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """List the models that answer."""
        return cast("list[dict[str, Any]]", self._ask("GET", "/v1/models")["models"])

    def perturbations(self) -> list[str]:
        """List the perturbations that the model has seen."""
        return cast("list[str]", self._ask("GET", "/v1/perturbations")["perturbations"])

    def prompts(self) -> dict[str, list[str]]:
        """List prompt fields and their values."""
        return cast("dict[str, list[str]]", self._ask("GET", "/v1/prompts")["prompts"])

    def features(self, measurement: str = "", at_most: int | None = None) -> tuple[str, list[str]]:
        """List the feature ids of one measurement (empty: the model's first), which is named beside them."""
        name = measurement or next(iter(self.models()[0]["measurements"]))
        return name, [feature["feature_id"] for feature in self._features(name, at_most)]

    def _features(self, measurement: str, at_most: int | None = None) -> list[dict[str, Any]]:
        """Ask for the features of one measurement, page by page."""
        found: list[dict[str, Any]] = []
        while at_most is None or len(found) < at_most:
            size = PAGE if at_most is None else min(PAGE, at_most - len(found))
            asked = f"measurement={quote(measurement, safe='')}&offset={len(found)}&limit={size}"
            page = self._ask("GET", f"/v1/features?{asked}")["features"]
            if not page:
                break
            found += page
        return found

    def ready(self) -> bool:
        """Say whether a model answers now; never raises, never retries."""
        try:
            return self._http.get("/v1/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def embed(
        self,
        cells: Any,
        *,
        prompts: Mapping[str, Said] | None = None,
        normalize: bool = False,
        dtype: str = "float32",
        encoding: str = "npz",
        features: Mapping[str, Sequence[str]] | None = None,
    ) -> Embeddings:
        """Embed cells, sent in chunks that the server accepts.

        Args:
            cells: AnnData, MuData or {measurement: AnnData} with raw counts in ``X``; {measurement: (csr, features)};
                or a DataFrame of cells x features or a list of {feature: count}, both taken as RNA. Measurements are
                paired by obs_names, in the order of MuData's or of the first; only cells of MuData may lack some. Of
                measurements that the model knows as levels all that a sparse matrix stores is sent, and all but NaN of
                a dense one. The path of an h5ad file is sent as the file that it is, in one request; the server finds
                the raw counts in it.
            prompts: What is known about the cells, one value for all or one per cell, in the order of the answer.
            normalize: Scale each embedding to length 1.
            dtype: ``float32`` or ``float16``.
            encoding: How bodies are sent: ``npz``, or ``arrow`` (a stream); the answer is the same.
            features: Measurement to features whose own vectors are wanted too.

        Raises:
            InputRefused: The server cannot use the request; the message names the field.
            Overloaded: The server stays busy.
            Unavailable: Nobody answers, or no model is ready.
            ConflictError: The server changed its model while it answered, again and again.
        """
        if encoding not in ("npz", "arrow"):
            raise InputRefused(f"encoding: {encoding!r} is not known; bodies are sent as npz or arrow")
        options: dict[str, Any] = {"normalize": normalize, "dtype": dtype}
        if features:
            options["feature_embeddings"] = {name: list(names) for name, names in features.items()}
        media = ARROW if encoding == "arrow" else NPZ
        answers = self._in_chunks("/v1/embed", cells, prompts, {"options": options}, media)
        replies = answers.replies
        named = {
            name: (part["features"], _vectors(replies[0], name))
            for name, part in replies[0].get("feature_embeddings", {}).items()
        }
        return Embeddings(answers.array("embeddings"), **vars(self.last), features=named)

    def perturb(
        self,
        cells: Any,
        perturbations: Sequence[str | Sequence[str]],
        *,
        prompts: Mapping[str, Said] | None = None,
        top: int = 20,
        head: str = "",
        context: Mapping[str, str] | None = None,
        level: float = 0.9,
    ) -> list[Effect]:
        """Predict the effect of each perturbation on control cells, as many in a request as the server answers at once.

        Args:
            cells: As for :meth:`embed`.
            perturbations: Targets; several targets in a list are hit together.
            prompts: What is known about the cells.
            top: Features with the largest change to list.
            head: The head that is to answer, with intervals; empty is the model. It predicts one measurement.
            context: What the head takes for the cells' context, by column.
            level: Share of features' effects that its intervals hold on average.

        Returns:
            One effect per perturbation and measurement.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        options = {"vectors": True, "encoding": "base64", "top": top, "level": level}
        asked: dict[str, Any] = {"options": options} | self._adapter
        if head:
            asked |= {"head": head, "context": dict(context or {})}

        def ask(some: _Targets) -> list[tuple[_Targets, dict[str, Any]]]:
            body = _whole(cells, prompts, asked | {"perturbations": some}, self._model)
            return [(some, self._ask("POST", "/v1/perturb", body))]

        targets: _Targets = [item if isinstance(item, str) else list(item) for item in perturbations]
        at_once = self._model.effects(head=bool(head)) if len(targets) > 1 else 1
        parts = [targets[first : first + at_once] for first in range(0, len(targets), at_once)]
        answered = _of_one_model(ask, [one for some in parts or [[]] for one in ask(some)])
        replies = self._noted(_Answers([reply for _, reply in answered])).replies
        return [
            _effect(item["perturbation"], name, part, reply)
            for reply in replies
            for item in reply["perturbations"]
            for name, part in item["effects"].items()
        ]

    def annotate(
        self,
        cells: Any,
        *,
        prompts: Mapping[str, Said] | None = None,
        top: int = 3,
        cover: float = 0.9,
        min_probability: float = 0.0,
        min_novelty_p: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Tell the type of each cell: ``cell_type``, ``types`` with probabilities and ontology ids, ``covering``.

        ``novelty_p`` is how likely a cell of a known kind is to look so strange. What the server warns of is a warning
        of Python's; coverage and provenance are in ``client.last``.

        Args:
            cells: As for :meth:`embed`.
            prompts: What is known about the cells.
            top: Types to list.
            cover: Probability that the types under ``covering`` have together.
            min_probability: A cell whose likeliest type is less likely is "unknown".
            min_novelty_p: So is a cell whose ``novelty_p`` is smaller.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        options = {"top": top, "cover": cover, "min_probability": min_probability, "min_novelty_p": min_novelty_p}
        told = self._in_chunks("/v1/annotate", cells, prompts, {"options": options}).cells()
        for warning in self.last.warnings:
            warnings.warn(warning, stacklevel=2)
        return told

    def translate(
        self,
        cells: Any,
        measurement: str,
        *,
        features: Sequence[str] | None = None,
        prompts: Mapping[str, Said] | None = None,
    ) -> Predicted:
        """Predict what a measurement would show of each cell.

        Args:
            cells: As for :meth:`embed`.
            measurement: What is predicted.
            features: Ids or symbols that are wanted; all when left out.
            prompts: What is known about the cells.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        options: dict[str, Any] = {} if features is None else {"features": list(features)}
        asked: dict[str, Any] = {"measurement": measurement, "options": options}
        values = self._model.size(measurement) if features is None else len(asked["options"]["features"])
        answers = self._in_chunks("/v1/translate", cells, prompts, asked, values=values)
        first = answers.replies[0]
        return Predicted(measurement, first["features"], answers.array("values"), first["unit"], **vars(self.last))

    def forecast(
        self, cells: Any, elapsed: float, *, prompts: Mapping[str, Said] | None = None, top: int = 20
    ) -> dict[str, Effect]:
        """Predict what becomes of cells after a while, on average, in one request; measurement to effect.

        Args:
            cells: As for :meth:`embed`.
            elapsed: How much later, in the unit of the model's time.
            prompts: What is known about the cells.
            top: Features with the largest change to list.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        asked = {"elapsed": elapsed, "options": {"vectors": True, "encoding": "base64", "top": top}}
        reply = self._about("/v1/forecast", _whole(cells, prompts, asked | self._adapter, self._model))
        return {name: _effect("", name, part, reply) for name, part in reply["effects"].items()}

    def generate(
        self,
        n_cells: int,
        measurement: str = "RNA",
        *,
        prompts: Mapping[str, Said] | None = None,
        depth: float = 5_000.0,
        seed: int = 0,
    ) -> tuple[csr_matrix, list[str]]:
        """Draw cells of which nothing is known but what is said; return their counts and the features' ids.

        Args:
            n_cells: How many.
            measurement: Of counts.
            prompts: What is said of them, one value for all or one per cell.
            depth: Counts of a cell, on average.
            seed: The same seed draws the same.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        _check_said(prompts, n_cells)
        body = {"cells": n_cells, "measurement": measurement, "prompts": _said(prompts), "depth": depth, "seed": seed}
        body |= self._adapter
        counts = self._about("/v1/generate", body)["counts"]
        shape = (n_cells, len(counts["features"]))
        return csr_matrix((counts["data"], counts["indices"], counts["indptr"]), shape=shape), counts["features"]

    def neighbors(
        self,
        cells: Any,
        k: int = 10,
        *,
        index: str = "",
        columns: Sequence[str] | None = None,
        prompts: Mapping[str, Said] | None = None,
    ) -> Neighbors:
        """Find the cells of a lake that are nearest in the model's space, and what most of them are.

        Args:
            cells: As for :meth:`embed`.
            k: Neighbours of each cell.
            index: ``LAKE/ORGANISM/NAME`` or the beginning of it; may be left out where there is one of the model's.
            columns: Of the lake's obs, to be told of each neighbour; the usual ones when left out.
            prompts: As for :meth:`embed`; only the organism counts.

        Raises:
            UsageError: This client asks an adapter, which puts cells elsewhere than the index has them.
            MissingError: There is no such index.
            ConflictError: Another model made it.
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        if self._adapter:
            raise UsageError("an index holds where the checkpoint itself puts cells; ask with a client without adapter")
        options = {} if columns is None else {"columns": list(columns)}
        answers = self._in_chunks("/v1/neighbors", cells, prompts, {"k": k, "index": index, "options": options})
        found = answers.cells()
        rows = [cell["neighbors"] for cell in found]
        return Neighbors(
            index=answers.replies[0]["index"],
            joinid=np.array([[one["soma_joinid"] for one in row] for row in rows], np.int64),
            distance=np.array([[one["distance"] for one in row] for row in rows], np.float32),
            obs=[[one["obs"] for one in row] for row in rows],
            types=[cell["types"] for cell in found],
            **vars(self.last),
        )

    def job(self, lake: str, *, where: str = "", organism: str = "", name: str = "", replace: bool = False) -> Job:
        """Have a lake embedded with the model that answers, and indexed; the same question resumes.

        Args:
            lake: Its name at the server.
            where: A value filter on obs; empty takes all cells.
            organism: Whose cells; may be left out where the lake holds one.
            name: Of the embeddings.
            replace: Take the name over from another model or filter.

        Raises:
            MissingError: The server knows no such lake.
            InputRefused: Something is wrong with the question.
            ConflictError: Somebody else embeds the lake now, or the name is another model's.
        """
        body = {"lake": lake, "where": where, "organism": organism, "name": name, "replace": replace}
        return Job(**self._ask("POST", "/v1/jobs", body))

    def jobs(self) -> list[Job]:
        """List all jobs."""
        return [Job(**job) for job in self._ask("GET", "/v1/jobs")["jobs"]]

    def job_state(self, job: str) -> Job:
        """Say how far a job is."""
        return Job(**self._ask("GET", f"/v1/jobs/{job}"))

    def cancel_job(self, job: str) -> Job:
        """End a job; what is done stays done."""
        return Job(**self._ask("DELETE", f"/v1/jobs/{job}"))

    def _in_chunks(
        self,
        path: str,
        cells: Any,
        prompts: Mapping[str, Said] | None,
        asked: Mapping[str, Any],
        media: str = NPZ,
        values: int = 0,
    ) -> _Answers:
        """Ask about cells in chunks that the server accepts; of each so many values are wanted as its limits count."""
        asked = dict(asked) | self._adapter
        if isinstance(cells, str | os.PathLike):
            return self._noted(_Answers([self._ask("POST", path, _file(cells, prompts, asked))]))
        given = read_cells(cells, self._model)
        _check_said(prompts, given.n_cells)

        def ask(piece: _Piece) -> _Answered:
            try:
                return [(piece, self._ask("POST", path, _body(piece, prompts, asked, media)))]
            except _TooLarge:
                if len(piece.rows) == 1:
                    raise
                return [one for half in piece.halves() for one in ask(half)]

        most_cells, most_counts = self._model.room(values)
        pieces = _pieces(given, min(CHUNK_CELLS, most_cells), min(CHUNK_COUNTS, most_counts))
        answered = _of_one_model(ask, [one for piece in pieces for one in ask(piece)])
        rows = np.concatenate([piece.rows for piece, _ in answered])
        return self._noted(_Answers([reply for _, reply in answered], rows))

    def _about(self, path: str, body: dict[str, Any] | Body) -> dict[str, Any]:
        """Ask one question in one request."""
        return self._noted(_Answers([self._ask("POST", path, body)])).replies[0]

    def _noted(self, answers: _Answers) -> _Answers:
        """Keep what the server says beside its answer."""
        self.last = answers.report()
        if self._model.is_another(self.last.provenance):
            self._model = _Model(self)
        return answers

    def _ask(self, method: str, path: str, body: dict[str, Any] | Body | None = None) -> dict[str, Any]:
        """Send a message, as JSON or in the form that it has; return the reply, with its array if there is one."""
        last: SomaflowError = Unavailable(f"{self._http.base_url}: not asked")
        headers, sent = _sent(body)
        for attempt in range(self._tries):
            if attempt:
                self._sleep(_pause_s(attempt, last))
            try:
                response = self._http.request(method, path, headers=headers, **sent)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:  # nothing was sent, nor ever is
                why = f"{self._http.base_url}: a request cannot be sent so ({type(error).__name__})"
                raise UsageError(f"{why}; look at the address and the token") from None
            except httpx.TransportError as error:
                last = Unavailable(
                    f"{self._http.base_url} does not answer ({type(error).__name__}); is the server running? "
                    "start one with: python -m serve run CHECKPOINT"
                )
                continue
            if response.is_success:
                return _reply(response)
            last = _error(response)
            if response.status_code not in (RETRIED if _detail(response) else RETRIED | TROUBLE):
                break
        raise last


class _Model:
    """What a server tells of its model and of its limits; it is asked when something is wanted, once."""

    def __init__(self, client: Client) -> None:
        self._client = client

        self._names: dict[str, frozenset[str]] = {}

    @cached_property
    def _card(self) -> dict[str, Any]:
        return self._client.models()[0]

    def is_another(self, provenance: Mapping[str, Any]) -> bool:
        """Say whether a reply is of another model than what was told."""
        told = self.__dict__.get("_card", {}).get("provenance", {}).get("model_sha256")
        return told not in (None, provenance.get("model_sha256"))

    def known(self, measurement: str, names: Sequence[str]) -> int:
        """Count the ids and symbols among some names by which it knows a feature of a measurement."""
        if measurement not in self._names:
            features = self._client._features(measurement) if self.size(measurement) else []
            symbols = Counter(feature["feature_name"] for feature in features)
            alone = {name for name, n in symbols.items() if n == 1}
            self._names[measurement] = frozenset(alone | {feature["feature_id"] for feature in features})
        mine = self._names[measurement]
        return sum(name in mine or (name.startswith("ENS") and name.partition(".")[0] in mine) for name in names)

    @property
    def measurements(self) -> list[str]:
        """Those that it knows."""
        return list(self._card["measurements"])

    @property
    def levels(self) -> list[str]:
        """Those of them whose values are levels."""
        return list(self._card.get("levels", ()))

    def size(self, measurement: str) -> int:
        """Return how many features it knows of a measurement, 0 where it does not know that."""
        return int(self._card["measurements"].get(measurement, 0))

    def effects(self, *, head: bool) -> int:
        """Return most effects, with their vectors, of a request: each has three vectors, one of a head five."""
        limits, sizes = self._card.get("limits", {}), list(self._card["measurements"].values())
        n_each = 5 * max(sizes, default=1) if head else 3 * sum(sizes)
        most = int(limits.get("perturbations", CHUNK_EFFECTS))
        return max(1, min(most, int(limits.get("values", n_each * most)) // max(1, n_each)))

    def room(self, values: int) -> tuple[int, int]:
        """Return most cells and most counts of a request, where so many values are wanted of each cell."""
        limits = self._card.get("limits", {})
        most_cells = int(limits.get("cells", CHUNK_CELLS))
        if values:
            most_cells = min(most_cells, int(limits.get("values", values * most_cells)) // values)
        return max(1, most_cells), max(1, int(limits.get("nonzeros", CHUNK_COUNTS)))


def _sent(body: dict[str, Any] | Body | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the headers of a request and what httpx is told to send."""
    if body is None:
        return {}, {}
    if not isinstance(body, Body):
        return {"Content-Type": "application/json"}, {"content": _json(body)}
    if body.media == FORM:
        parts = {"file": ("cells.h5ad", body.content, "application/x-hdf5"), "request": (None, body.request)}
        return {"Accept": f"{NPZ}, application/json"}, {"files": parts}
    return {"Content-Type": body.media, "Accept": f"{body.media}, application/json"}, {"content": body.content}


def _json(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Return what numpy has as JSON has it.

    Raises:
        InputRefused: JSON has nothing like it.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise InputRefused(f"a request holds texts, numbers and lists, not {type(value).__name__}")


def _reply(response: httpx.Response) -> dict[str, Any]:
    if response.headers.get("content-type", "") == ARROW:
        return read_reply(response.content)
    if response.headers.get("content-type", "") != NPZ:
        return _message(response)
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        reply: dict[str, Any] = json.loads(arrays[REPLY].tobytes())
        return reply | {name: arrays[name] for name in arrays.files if name != REPLY}


def _message(response: httpx.Response) -> dict[str, Any]:
    """Return an answer that is JSON.

    Raises:
        UsageError: It is something else, as a page of a proxy is that asks people to log in.
    """
    try:
        message = response.json()
    except ValueError:
        message = None
    if isinstance(message, dict):
        return message
    said = " ".join(response.text.split())[:SAID]
    raise UsageError(
        f"{response.request.url}: what answers there is no somaflow server, or a proxy answers in its place"
        f"{f': {said}' if said else ''}; look at the address"
    )


def _vectors(reply: dict[str, Any], name: str) -> NDArray[np.floating]:
    """Return features' own vectors, which an npz has as arrays and other replies as they can."""
    found = reply.get(f"feature_embeddings/{name}")
    return unpacked(reply["feature_embeddings"][name]["embeddings"]) if found is None else found


def _effect(perturbation: str, name: str, part: dict[str, Any], reply: dict[str, Any]) -> Effect:
    control, perturbed, delta = (unpacked(part[which]) for which in ("control", "perturbed", "delta"))
    low, high = (unpacked(part[which]) if which in part else None for which in ("low", "high"))
    names = reply["features"][name]
    return Effect(perturbation, name, names, control, perturbed, delta, part["top"], low, high, reply["warnings"])


def _pause_s(attempt: int, last: SomaflowError) -> float:
    """Wait at least as long as the server asks, plus a random share that doubles each time."""
    asked = last.retry_after_s if isinstance(last, Overloaded) else 0
    return asked + random.uniform(0, min(8.0, 0.25 * 2**attempt))


def _detail(response: httpx.Response) -> str:
    """Return what a report says; empty where it is none of ours."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return ""


def _unreported(response: httpx.Response) -> str:
    """Say what came in the place of a report."""
    said = " ".join(response.text.split())[:SAID]
    where = f"status {response.status_code} without a report{f': {said}' if said else ''}"
    if response.status_code in TROUBLE:
        return f"{where}; the server or a proxy before it died or took too long; try again"
    return where


def _error(response: httpx.Response) -> SomaflowError:
    detail = _detail(response)
    where = f"{response.request.url}: {detail or _unreported(response)}"
    status = response.status_code
    if status in RETRIED and "retry-after" in response.headers:
        asked = response.headers["retry-after"]
        return Overloaded(where, int(asked) if asked.isdigit() else 1)
    if status in RETRIED or status == 504 or (status in TROUBLE and not detail):
        return Unavailable(where)
    if status == 413 or (status == 422 and FEWER in detail):
        return _TooLarge(where)
    if status == 404:
        return MissingError(where)
    if status == 409:
        return ConflictError(where)
    return InputRefused(where) if 400 <= status < 500 else SomaflowError(where)


def _whole(cells: Any, prompts: Mapping[str, Said] | None, asked: Mapping[str, Any], model: _Model) -> Body:
    """Write all cells and what is asked of them."""
    if isinstance(cells, str | os.PathLike):
        return _file(cells, prompts, asked)
    given = read_cells(cells, model)
    if given.measured:
        partly = ", ".join(given.measured)
        raise InputRefused(
            f"{partly} was not measured in all cells, whose mean is asked; give cells with all, or leave it out"
        )
    _check_said(prompts, given.n_cells)
    return _body(_Piece(np.arange(given.n_cells), given.measurements), prompts, asked)


def _pieces(given: Given, most_cells: int, most_counts: int) -> Iterator[_Piece]:
    """Cut cells into pieces of which the same was measured."""
    for rows, measurements in given.groups():
        whole = _Piece(rows, measurements)
        for span in chunks(measurements, most_cells, most_counts):
            yield whole.part(span)


def _of_one_model(
    ask: Callable[[P], list[tuple[P, dict[str, Any]]]], answered: list[tuple[P, dict[str, Any]]]
) -> list[tuple[P, dict[str, Any]]]:
    """Ask again about the pieces that another model answered than the last, so that one answers about all.

    Raises:
        ConflictError: The model changed again and again meanwhile.
    """
    last = _origin(answered[-1][1])
    for _ in range(AGAIN):
        fresh: list[tuple[P, dict[str, Any]]] = []
        latest = last
        for piece, reply in answered:
            told = [(piece, reply)] if _origin(reply) == last else ask(piece)
            latest = latest if told[0][1] is reply else _origin(told[-1][1])
            fresh += told
        answered, last = fresh, latest
    if all(_origin(reply) == last for _, reply in answered):
        return answered
    raise ConflictError("the server changed its model while it answered, several times; ask again when it stays")


def _origin(reply: dict[str, Any]) -> tuple[str, ...]:
    """Return what made a reply; the numbers of two replies are to be compared only where it is the same."""
    return tuple(str(reply["provenance"].get(name, "")) for name in ("model_sha256", "adapter_sha256"))


def _body(piece: _Piece, prompts: Mapping[str, Said] | None, asked: Mapping[str, Any], media: str = NPZ) -> Body:
    """Write some cells and what is asked of them."""
    message = _json({"prompts": _said(prompts, piece.rows), **asked})
    parts: Measurements = {}
    arrays: dict[str, NDArray[Any] | bytes] = {REQUEST: message}
    for name, (part, features) in piece.measurements.items():
        used, indices = np.unique(part.indices, return_inverse=True)
        names = [features[column] for column in used] or features[:1]
        parts[name] = csr_matrix((part.data, indices, part.indptr), shape=(part.shape[0], len(names))), names
        arrays |= {
            f"{name}/features": np.array([one.encode() for one in names]),
            f"{name}/indptr": part.indptr,
            f"{name}/indices": indices.astype(np.int32),
            f"{name}/data": part.data,
        }
    return Body(media, write_request(message, parts) if media == ARROW else write_npz(arrays))


def _file(path: str | os.PathLike[str], prompts: Mapping[str, Said] | None, asked: Mapping[str, Any]) -> Body:
    """Write what is asked of an h5ad file's cells, beside the file."""
    _check_said(prompts)
    message = {"prompts": _said(prompts), **asked}
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}; give the path of an h5ad file") from None
    return Body(FORM, content, _json(message).decode())


def _check_said(prompts: Mapping[str, Said] | None, n_cells: int | None = None) -> None:
    """Refuse prompts that say nothing, of some cells either, or are said of more or fewer cells than there are."""
    for name, value in (prompts or {}).items():
        if isinstance(value, ONE):
            continue
        if not hasattr(value, "__len__") or isinstance(value, Mapping):
            raise InputRefused(
                f"prompts.{name}: cannot use {type(value).__name__}; say a text or a number, one per cell, or nothing"
            )
        if n_cells is not None and len(value) != n_cells:
            raise InputRefused(f"prompts.{name}: {len(value):,} values for {n_cells:,} cells; say one, or one per cell")
        missing = next((cell for cell, one in enumerate(value) if _is_missing(one)), None)
        if missing is not None:
            raise InputRefused(
                f"prompts.{name}: cell {missing:,} has no value; say '' for a text that is not known, and ask apart "
                "about cells of which a number is not"
            )


def _is_missing(value: Any) -> bool:
    """Say whether a value is one that tables hold where there is none: None, NaN or the NA of pandas."""
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ == "NAType"


def _said(prompts: Mapping[str, Said] | None, rows: NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Return what is said of some of the cells, or of all."""
    message: dict[str, Any] = {}
    for name, value in (prompts or {}).items():
        if isinstance(value, ONE):
            message[name] = value
        else:
            values = list(value)
            message[name] = values if rows is None else [values[row] for row in rows]
    return message
