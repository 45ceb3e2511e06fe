"""This module asks a somaflow server from Python: AnnData or counts in, numpy out, retries included.

>>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
...     vectors = client.embed(adata, prompts={"organism": "homo_sapiens"}).values
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
import numpy as np
from scipy.sparse import csr_matrix

from serve.answer import (
    Answers,
    Effect,
    Embeddings,
    Job,
    Message,
    Neighbors,
    Predicted,
    Report,
    TooLarge,
    effect_of,
    error_of,
    is_asked_again,
    job_of,
    read,
    vectors_of,
)
from serve.arrow import ARROW
from serve.errors import Overloaded, Unavailable
from serve.given import listed, read_cells
from serve.npz import NPZ
from serve.question import (
    Body,
    Piece,
    Said,
    as_request,
    body_of,
    check_said,
    cut_into_pieces,
    file_of,
    said_of,
    whole_body,
)
from store.errors import ConflictError, InputRefused, SomaflowError, UsageError

__all__ = ["Client", "Effect", "Embeddings", "Job", "Neighbors", "Predicted", "Report"]

CHUNK_EFFECTS = 64
CHUNK_CELLS = 1_000
CHUNK_COUNTS = 500_000
PAGE = 10_000
"""Most features that the server lists at a time."""
HUNG = 2
"""How often a server that takes a request and does not answer in time is asked."""
LONGEST_WAIT_S = 60
"""A busy server that asks to be left alone for longer is not waited for, where one answer may not take as long."""
AGAIN = 2
"""How often parts are asked about again, of which another model told than of the others."""

_Answered = list[tuple[Piece, dict[str, Any]]]
_Targets = list[str | list[str]]
P = TypeVar("P")
"""Pieces and the replies about them."""


class Client:
    """A connection to one server; close it, or use it in a ``with`` block. Pickled, it is a new one to the same server.

    Args:
        url: Where the server listens, as in ``http://127.0.0.1:8000``.
        token: What lets in; where it is left out, that of the environment's ``SOMAFLOW_TOKEN``.
        adapter: The adapter that is to answer, by its name at the server; empty is none.
        timeout_s: Longest wait for one answer.
        tries: How often a request is sent before a busy or absent server becomes an error. One that asks to be left
            alone for longer than ``timeout_s``, and a minute, becomes one at once.
        transport: For tests.
        sleep: For tests.

    Raises:
        UsageError: The address or the token can be none.

    Attributes:
        last: What the server said beside its last answer about cells; where several threads ask, of any of them.
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
        said = token
        token = (os.environ.get("SOMAFLOW_TOKEN", "") if token is None else token).strip()
        if not (token.isascii() and token.isprintable()):
            raise UsageError("the token holds what no token may, letters beyond ASCII or line breaks; copy it anew")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=timeout_s, transport=transport, trust_env=False
            )
        except httpx.InvalidURL as error:
            raise UsageError(f"{url!r} is no address of a server: {error}") from None
        self._anew = partial(
            Client, url, token=said, adapter=adapter, timeout_s=timeout_s, tries=tries, transport=transport, sleep=sleep
        )
        self._adapter = {"adapter": adapter} if adapter else {}
        self._model = _Model(self)
        self.last = Report()
        self._tries = tries
        self._sleep = sleep

    def __enter__(self) -> Client:
        return self

    def __reduce__(self) -> tuple[Callable[[], Client], tuple[()]]:
        return self._anew, ()

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
        name = measurement or _Model(self).measurements[0]
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
            return not self._http.is_closed and self._http.get("/v1/health/ready").status_code == 200
        except httpx.RequestError:
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
            options["feature_embeddings"] = {
                name: listed(names, f"features.{name}") for name, names in features.items()
            }
        media = ARROW if encoding == "arrow" else NPZ
        answers = self._in_chunks("/v1/embed", cells, prompts, {"options": options}, media)
        replies = answers.replies
        named = {
            name: (part["features"], vectors_of(replies[0], name))
            for name, part in replies[0].get("feature_embeddings", {}).items()
        }
        return Embeddings(answers.array("embeddings"), **vars(answers.report()), features=named)

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
            perturbations: Targets; several targets in a list are hit together. A text is one target.
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
        options: dict[str, Any] = {"vectors": True, "encoding": "base64", "top": top}
        asked: dict[str, Any] = {"options": options} | self._adapter
        if head:
            asked["head"], options["level"] = head, level
        if context:
            asked["context"] = dict(context)

        def ask(some: _Targets) -> list[tuple[_Targets, dict[str, Any]]]:
            body = whole_body(cells, prompts, asked | {"perturbations": some}, self._model)
            return [(some, self._ask("POST", "/v1/perturb", body))]

        targets = _targets(perturbations)
        at_once = self._model.effects(head=bool(head)) if len(targets) > 1 else 1
        parts = [targets[first : first + at_once] for first in range(0, len(targets), at_once)]
        answered = _of_one_model(ask, [one for some in parts or [[]] for one in ask(some)])
        replies = self._noted(Answers([reply for _, reply in answered])).replies
        return [
            effect_of(item["perturbation"], name, part, reply)
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
        answers = self._in_chunks("/v1/annotate", cells, prompts, {"options": options})
        for warning in answers.report().warnings:
            warnings.warn(warning, stacklevel=2)
        return answers.cells()

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
            features: Ids or symbols that are wanted, or one of them; all when left out.
            prompts: What is known about the cells.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        options: dict[str, Any] = {} if features is None else {"features": listed(features, "features")}
        asked: dict[str, Any] = {"measurement": measurement, "options": options}
        values = self._model.size(measurement) if features is None else len(asked["options"]["features"])
        answers = self._in_chunks("/v1/translate", cells, prompts, asked, values=values)
        first = answers.replies[0]
        return Predicted(
            measurement, first["features"], answers.array("values"), first["unit"], **vars(answers.report())
        )

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
        reply = self._about("/v1/forecast", whole_body(cells, prompts, asked | self._adapter, self._model))
        return {name: effect_of("", name, part, reply) for name, part in reply["effects"].items()}

    def generate(
        self,
        n_cells: int,
        measurement: str = "RNA",
        *,
        prompts: Mapping[str, Said] | None = None,
        depth: float = 5_000.0,
        seed: int = 0,
    ) -> tuple[csr_matrix, list[str]]:
        """Draw cells of which nothing is known but what is said; return counts_CF and the ids of its F features.

        These are the features that some cell has; where nothing was drawn, as of a tiny ``depth``, there are none.

        Args:
            n_cells: How many.
            measurement: Of counts.
            prompts: What is said of them, one value for all or one per cell.
            depth: Counts of a cell, on average.
            seed: The same seed draws the same.

        Raises:
            InputRefused, Overloaded, Unavailable: As for :meth:`embed`.
        """
        check_said(prompts, n_cells)
        body = {"cells": n_cells, "measurement": measurement, "prompts": said_of(prompts), "depth": depth, "seed": seed}
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
        options = {} if columns is None else {"columns": listed(columns, "columns")}
        answers = self._in_chunks("/v1/neighbors", cells, prompts, {"k": k, "index": index, "options": options})
        found = answers.cells()
        rows = [cell["neighbors"] for cell in found]
        return Neighbors(
            index=answers.replies[0]["index"],
            joinid=np.array([[one["soma_joinid"] for one in row] for row in rows], np.int64),
            distance=np.array([[one["distance"] for one in row] for row in rows], np.float32),
            obs=[[one["obs"] for one in row] for row in rows],
            types=[cell["types"] for cell in found],
            **vars(answers.report()),
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
        return job_of(self._ask("POST", "/v1/jobs", body))

    def jobs(self) -> list[Job]:
        """List all jobs."""
        return [job_of(job) for job in self._ask("GET", "/v1/jobs")["jobs"]]

    def job_state(self, job: str) -> Job:
        """Say how far a job is."""
        return job_of(self._ask("GET", f"/v1/jobs/{quote(job, safe='')}"))

    def cancel_job(self, job: str) -> Job:
        """End a job; what is done stays done."""
        return job_of(self._ask("DELETE", f"/v1/jobs/{quote(job, safe='')}"))

    def _in_chunks(
        self,
        path: str,
        cells: Any,
        prompts: Mapping[str, Said] | None,
        asked: Mapping[str, Any],
        media: str = NPZ,
        values: int = 0,
    ) -> Answers:
        """Ask about cells in chunks that the server accepts; of each so many values are wanted as its limits count."""
        asked = dict(asked) | self._adapter
        if isinstance(cells, str | os.PathLike):
            return self._noted(Answers([self._ask("POST", path, file_of(cells, prompts, asked))]))
        given = read_cells(cells, self._model)
        check_said(prompts, given.n_cells)

        def ask(piece: Piece) -> _Answered:
            try:
                return [(piece, self._ask("POST", path, body_of(piece, prompts, asked, media)))]
            except InputRefused as error:
                if isinstance(error, TooLarge) and len(piece.rows) > 1:
                    return [one for half in piece.dealt(2) for one in ask(half)]
                if len(piece.rows) == given.n_cells:
                    raise
                raise InputRefused(f"{error}; so of the part with your {piece.named()}") from None

        most_cells, most_counts = self._model.room(values)
        pieces = cut_into_pieces(given, min(CHUNK_CELLS, most_cells), min(CHUNK_COUNTS, most_counts))
        answered = _of_one_model(ask, [one for piece in pieces for one in ask(piece)])
        rows = np.concatenate([piece.rows for piece, _ in answered])
        return self._noted(Answers([reply for _, reply in answered], rows))

    def _about(self, path: str, body: dict[str, Any] | Body) -> dict[str, Any]:
        """Ask one question in one request."""
        return self._noted(Answers([self._ask("POST", path, body)])).replies[0]

    def _noted(self, answers: Answers) -> Answers:
        """Keep what the server says beside its answer."""
        self.last = report = answers.report()
        if self._model.is_another(report.provenance):
            self._model = _Model(self)
        return answers

    def _ask(self, method: str, path: str, body: dict[str, Any] | Body | None = None) -> dict[str, Any]:
        """Send a message, as JSON or in the form that it has; return the reply, with its array if there is one."""
        last: SomaflowError = Unavailable(f"{self._http.base_url}: not asked")
        if self._http.is_closed:
            raise UsageError("this client is closed; make another one")
        headers, sent = as_request(body)
        hung = 0
        for attempt in range(self._tries):
            if attempt:
                self._sleep(_pause_s(attempt, last))
            try:
                response = self._http.request(method, path, headers=headers, **sent)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:  # nothing was sent, nor ever is
                why = f"{self._http.base_url}: a request cannot be sent so ({type(error).__name__})"
                raise UsageError(f"{why}; look at the address and the token") from None
            except httpx.TransportError as error:
                last = self._silent(error)
                hung += isinstance(error, httpx.ReadTimeout)
                if hung == HUNG:
                    break
                continue
            if response.is_success:
                return read(response)
            last = error_of(response)
            too_long = _asked_to_wait_s(last) > max(LONGEST_WAIT_S, self._http.timeout.read or 0)
            if too_long or not is_asked_again(response):
                break
        raise last

    def _silent(self, error: httpx.TransportError) -> Unavailable:
        where = self._http.base_url
        if isinstance(error, httpx.ReadTimeout):
            waited = f"{where} did not answer within {self._http.timeout.read:g} s"
            return Unavailable(f"{waited}; ask for less at a time, or give the client a larger timeout_s")
        return Unavailable(
            f"{where} does not answer ({type(error).__name__}); is the server running? "
            "start one with: python -m serve run CHECKPOINT"
        )


class _Model:
    """What a server tells of its model and of its limits; it is asked when something is wanted, once."""

    def __init__(self, client: Client) -> None:
        self._client = client

        self._names: dict[str, frozenset[str]] = {}

    @cached_property
    def _card(self) -> Message:
        card: Any = next(iter(self._client.models()), None)
        return Message(card if isinstance(card, dict) else {}, self._client._http.base_url)

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


def _targets(perturbations: Any) -> _Targets:
    """Return perturbations as a list of texts and lists of texts; a text is one.

    Raises:
        InputRefused: They are no list.
    """
    if isinstance(perturbations, str) or not isinstance(perturbations, Iterable):
        return [*listed(perturbations, "perturbations")]
    return [item if isinstance(item, str) else listed(item, "perturbations") for item in perturbations]


def _pause_s(attempt: int, last: SomaflowError) -> float:
    """Wait at least as long as the server asks, plus a random share that doubles each time."""
    return _asked_to_wait_s(last) + random.uniform(0, min(8.0, 0.25 * 2**attempt))


def _asked_to_wait_s(last: SomaflowError) -> int:
    return last.retry_after_s if isinstance(last, Overloaded) else 0


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
