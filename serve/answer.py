"""This module reads what a server answers: arrays and words into the client's answers, refusals into errors."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from serve.arrow import ARROW, read_reply
from serve.errors import Overloaded, Unavailable
from serve.npz import NPZ, REPLY, unpacked
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, UsageError

RETRIED = frozenset({429, 503})
TROUBLE = frozenset({408, 500, 502, 503, 504})
"""Asked again where no report says why: they come from what stands between, or from a server that died."""
ROUTES = "/-/routes"
"""What Ray's proxy says, with 404, where it has no application to ask: not yet, or no longer."""
FEWER = "send fewer"
"""What the server says, besides its status, of a request that is too large."""
DIGITS = 9
"""Of a Retry-After; what has more is beyond all patience."""
NUMBERED = re.compile(r"((?:.*?: )?)([\d,]+|[\d.]+)((?: cells |% of ).*)")
"""A warning that counts cells, or says a share: all but the number is the same of every part."""
SAID = 200
"""Characters of an answer that is no report, in errors."""


@dataclass(frozen=True)
class Report:
    """What the server says of a question beside its answer.

    Attributes:
        coverage: Measurement to how much of it was understood, of the part of the cells in which that was least.
        warnings: Of all parts, each once: cells that they count are added, of shares the largest is told.
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
class Answers:
    """Replies about pieces; ``rows`` says which cell each of their entries is about, None that they are in order."""

    replies: list[dict[str, Any]]
    rows: NDArray[np.int64] | None = None

    def report(self) -> Report:
        """Return what the replies say beside the answer."""
        coverage: dict[str, Any] = {}
        for reply in self.replies:
            for name, part in reply.get("coverage", {}).items():
                coverage[name] = min(coverage.get(name, part), part, key=lambda one: one["share_of_counts"])
        told = [warning for reply in self.replies for warning in reply.get("warnings", ())]
        told = list(dict.fromkeys(told)) if self.rows is None else _of_all_parts(told)
        return Report(coverage, told, self.replies[-1]["provenance"])

    def array(self, field: str) -> NDArray[Any]:
        """Return an array of the replies, a row for each cell."""
        values = np.concatenate([reply[field] for reply in self.replies])
        return values if self.rows is None else values[np.argsort(self.rows)]

    def cells(self) -> list[dict[str, Any]]:
        """Return what the replies say of each cell."""
        told = [cell for reply in self.replies for cell in reply["cells"]]
        return told if self.rows is None else [told[place] for place in np.argsort(self.rows)]


def _of_all_parts(told: Sequence[str]) -> list[str]:
    """Return what is told of parts of the cells as it is to be told of all."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for warning in told:
        found = NUMBERED.fullmatch(warning)
        before, number, after = found.groups() if found else (warning, "", "")
        numbers.setdefault((before, after), []).append(number)
    return [f"{before}{_number(parts, after)}{after}" for (before, after), parts in numbers.items()]


def _number(parts: list[str], after: str) -> str:
    """Add numbers of cells; of shares take the largest."""
    if after.startswith(" cells "):
        return f"{sum(int(part.replace(',', '')) for part in parts):,}"
    return max(parts, key=lambda part: float(part or 0))


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


class TooLarge(InputRefused):
    """The server takes no request of this size; it may take a smaller one."""


class Message(dict[str, Any]):
    """What a server answers: who looks for what is not in it is told that no somaflow server has said it."""

    def __init__(self, said: Mapping[str, Any], url: object) -> None:
        super().__init__(said)
        self._url = url

    def __missing__(self, name: str) -> Any:
        raise _strange(self._url, f"its answer holds no {name!r}")


def read(response: httpx.Response) -> Message:
    """Return an answer as a message, its arrays in it.

    Raises:
        UsageError: It is something else, as a page of a proxy is that asks people to log in.
        Unavailable: It is damaged.
    """
    media, url = response.headers.get("content-type", ""), response.request.url
    if media not in (ARROW, NPZ):
        return _message(response)
    try:
        return Message(read_reply(response.content) if media == ARROW else _arrays(response.content), url)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes make parsers raise anything
        raise Unavailable(f"{url}: the answer is damaged ({type(error).__name__}); ask again") from None


def _arrays(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        reply: dict[str, Any] = json.loads(arrays[REPLY].tobytes())
        return reply | {name: arrays[name] for name in arrays.files if name != REPLY}


def _message(response: httpx.Response) -> Message:
    try:
        message = response.json()
    except ValueError:
        message = None
    if isinstance(message, dict):
        return Message(message, response.request.url)
    raise _strange(response.request.url, " ".join(response.text.split())[:SAID])


def _strange(url: object, said: str) -> UsageError:
    return UsageError(
        f"{url}: what answers there is no somaflow server, or a proxy answers in its place"
        f"{f': {said}' if said else ''}; look at the address"
    )


def job_of(message: Mapping[str, Any]) -> Job:
    """Return a job as a message has it."""
    return Job(**{part.name: message[part.name] for part in fields(Job)})


def vectors_of(reply: dict[str, Any], name: str) -> NDArray[np.floating]:
    """Return features' own vectors, which an npz has as arrays and other replies as they can."""
    found = reply.get(f"feature_embeddings/{name}")
    return unpacked(reply["feature_embeddings"][name]["embeddings"]) if found is None else found


def effect_of(perturbation: str, name: str, part: dict[str, Any], reply: dict[str, Any]) -> Effect:
    """Return one perturbation's effect on one measurement."""
    control, perturbed, delta = (unpacked(part[which]) for which in ("control", "perturbed", "delta"))
    low, high = (unpacked(part[which]) if which in part else None for which in ("low", "high"))
    names = reply["features"][name]
    return Effect(perturbation, name, names, control, perturbed, delta, part["top"], low, high, reply["warnings"])


def detail_of(response: httpx.Response) -> str:
    """Return what a report says; empty where it is none of ours."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return ""


def is_asked_again(response: httpx.Response) -> bool:
    """Say whether a refusal passes: it says so, or it is not the server's own but of what stands before it."""
    if detail_of(response):
        return response.status_code in RETRIED
    nothing_there = response.status_code == 404 and ROUTES in response.text
    return nothing_there or response.status_code in RETRIED | TROUBLE


def _unreported(response: httpx.Response) -> str:
    """Say what came in the place of a report."""
    said = " ".join(response.text.split())[:SAID]
    where = f"status {response.status_code} without a report{f': {said}' if said else ''}"
    if response.status_code in TROUBLE:
        return f"{where}; the server or a proxy before it died or took too long; try again"
    return where


def error_of(response: httpx.Response) -> SomaflowError:
    """Return what is to be raised of a refusal."""
    detail = detail_of(response)
    where = f"{response.request.url}: {detail or _unreported(response)}"
    status = response.status_code
    if status in RETRIED and "retry-after" in response.headers:
        asked = response.headers["retry-after"]
        retry_after_s = int(asked[:DIGITS]) if asked.isdecimal() else 1
        return Overloaded(f"{where}; it asks to be asked again in {retry_after_s:,} s", retry_after_s)
    if is_asked_again(response) or status == 504:
        return Unavailable(where)
    if status == 413 or (status == 422 and FEWER in detail):
        return TooLarge(where)
    if status == 404:
        return MissingError(where)
    if status == 409:
        return ConflictError(where)
    return InputRefused(where) if 400 <= status < 500 else SomaflowError(where)
