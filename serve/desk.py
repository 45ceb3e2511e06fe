"""This module answers questions that were read: it decodes them for the checkpoint of now, asks the model, and replies.

It knows no HTTP: :mod:`serve.app` puts it behind routes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from serve import encode
from serve.decode import Cells, Decoded, Decoder, Features
from serve.door import BURST, Door, waited_s
from serve.errors import FieldRefused, StaleModel, Unavailable
from serve.foreign import Readers
from serve.head_cards import HeadCard
from serve.lake_messages import NeighborsRequest
from serve.messages import (
    AnnotateReply,
    AnnotateRequest,
    EmbedReply,
    EmbedRequest,
    ForecastReply,
    ForecastRequest,
    GenerateReply,
    GenerateRequest,
    PerturbOptions,
    PerturbReply,
    PerturbRequest,
    TranslateReply,
    TranslateRequest,
)
from serve.metrics import Metrics
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
from serve.settings import Limits

CONTROL = "control"
NO_LEVEL = "options.level has no effect: only heads give intervals"
T = TypeVar("T")
R = TypeVar("R")

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
    async def lifespan(self, app: object) -> AsyncIterator[None]:
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
        loaded, decoded = await self._read(request)
        columns = self._features(loaded, request, decoded.cells.organism)
        embedding_CD = await self.model.ask(decoded.cells, Embed())
        features = None
        if columns:
            found = await self.model.vectors(loaded.sha256, columns)
            features = {name: (these, found[name]) for name, these in columns.items()}
        told = loaded.under(request.adapter)
        reply = partial(encode.embed_reply, embedding_CD, features, request.options, decoded, told)
        return await asyncio.to_thread(reply)

    def _features(self, loaded: Loaded, request: EmbedRequest, organism: str) -> Columns:
        """Return where the features are whose own vectors are asked for."""
        asked, where = request.options.feature_embeddings or {}, "options.feature_embeddings"
        n_values = sum(map(len, asked.values())) * loaded.description.embedding_size
        if n_values > self.limits.values:
            raise FieldRefused(where, f"{n_values:,} values; at most {self.limits.values:,} go into a reply")
        for name in asked:
            if name not in loaded.description.vocabulary:
                known = ", ".join(sorted(loaded.description.vocabulary))
                raise FieldRefused(f"{where}.{name}", f"this model does not know this measurement; it knows {known}")
        return {name: loaded.decoder.columns(name, names, f"{where}.{name}", organism) for name, names in asked.items()}

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
        columns = None
        if wanted is not None:
            columns = loaded.decoder.columns(name, wanted, "options.features", decoded.cells.organism)
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
        head, told = None, _of_level(request.options) if card is None else []
        if card is not None:
            if card.measurement not in decoded.cells.counts:
                why = (
                    f"the head {request.head} answers to {card.measurement}, of which the model understands too little"
                )
                raise FieldRefused(f"counts.{card.measurement}", why)
            head = HeadQuestion(request.head, card.context(request.context), request.options.level)
            given = request.options.min_coverage
            least = self.limits.min_coverage if given is None else given
            told = await asyncio.to_thread(card.unread, request.prompts, decoded.cells.counts, least)
        shifts = await self.model.ask(decoded.cells, Perturb(asked, head))
        if card is not None and head is not None:
            bounded = shifts[0][card.measurement].low_G is not None
            told += card.doubts(head.context, head.level, bounded=bounded)
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
        decoded = replace(decoded, warnings=[*decoded.warnings, *_of_level(request.options)])
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


def _of_level(options: PerturbOptions) -> list[str]:
    """Return what to tell somebody who says a level to the model, which gives no intervals."""
    return [NO_LEVEL] if "level" in options.model_fields_set else []


def _targets(item: str | list[str], position: int, loaded: Loaded, head: HeadCard | None) -> list[str]:
    where = f"perturbations.{position}"
    targets = sorted({target for part in ([item] if isinstance(item, str) else item) for target in part.split("+")})
    if not targets:
        raise FieldRefused(where, "a combined perturbation needs at least one target")
    for target in targets:
        if not target:
            raise FieldRefused(where, "an empty name is no target; see GET /v1/perturbations")
        if target == CONTROL:
            raise FieldRefused(where, f"{CONTROL!r} is no target: the cells that are sent are the controls")
        if head is None:
            loaded.decoder.check_prompt("perturbation", target, where)
        else:
            head.check(target, where)
    return targets
