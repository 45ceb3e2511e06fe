"""This module embeds all cells of a lake that a filter selects: what is to be done is decided here, workers do it.

A cell gets the vector that ``/v1/embed`` answers for its counts and organism; nothing else is said of it, as with
novelty, so that lake and question can be compared. The driver holds the lock, the plan and 9 bytes of each cell; a
block of cells is embedded, written, read back and recorded by one worker, again if it dies. Nothing here knows Ray.

Shape letters used in this module:
    C  cells      D  width of an embedding      F  features of the lake      G  features of the vocabulary
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.decode import FeatureIndex
from serve.index import complete_index, make_part, part_numbers, usable_index
from store import embeddings
from store.embeddings import BLOCK_CELLS, Generation
from store.errors import ConflictError, InputRefused, InterruptedRun, UsageError
from store.lake import Lake, open_lake
from store.schema import measured_column
from train.checkpoint import Vocabulary, read_manifest
from train.predictor import Predictor

Progress = Callable[[str, int, int], None]
"""Told what is being made, ``CELLS`` or ``PARTS``, how much of it is done, and of how much."""
CELLS, PARTS = "cells", "parts of the index"


@dataclass(frozen=True)
class Asked:
    """What to embed, with what.

    Attributes:
        checkpoint: Its directory, on every machine with a worker.
        lake: The lake.
        where: A value filter on obs; empty takes all cells.
        organism: Whose cells; may be left out where the lake holds one.
        key: Name of the embeddings; empty takes one from the model's digest.
        replace: Let these take the name over from another model or filter.
        device: Torch device of a worker.
        block_cells: Cells of a block, about.
        model_sha256: The model that is meant; empty takes the one that lies there.
    """

    checkpoint: str
    lake: str
    where: str = ""
    organism: str = ""
    key: str = ""
    replace: bool = False
    device: str = "cpu"
    block_cells: int = BLOCK_CELLS
    model_sha256: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        organism: Whose cells.
        key: Name of the embeddings.
        n_cells: All of them.
        n_embedded: By this run, with the model.
        n_taken_over: By this run, from the generation before.
        n_blocks: Blocks that this run did.
        manifest: Of the embeddings.
        index: Manifest of their index.
    """

    organism: str
    key: str
    n_cells: int
    n_embedded: int
    n_taken_over: int
    n_blocks: int
    manifest: dict[str, Any]
    index: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Cells that are embedded together.

    Attributes:
        number: The block's.
        joinid_C: The cells, ascending.
        kind_C: Which measurements each has: bit i stands for the i-th of the plan's.
    """

    number: int
    joinid_C: NDArray[np.int64]
    kind_C: NDArray[np.uint16]


@dataclass(frozen=True)
class IndexPart:
    """A part of the index of what was embedded."""

    number: int


Task = Block | IndexPart
Done = dict[str, Any]
"""What a task came to."""


@dataclass(frozen=True)
class Common:
    """What every worker is told."""

    checkpoint: str
    device: str
    generation: Generation
    threads: int = 1


class Crew(Protocol):
    """Workers, for as long as a run needs them."""

    def do(self, tasks: Sequence[Task]) -> Iterator[Done | None]:
        """Do all tasks, in any order and place; yield what :meth:`Worker.do` returns as each one ends.

        None comes now and then while none has ended.
        """
        ...


Hire = Callable[[Common], AbstractContextManager[Crew]]


@dataclass(frozen=True)
class Words:
    """What is read of a checkpoint without loading its weights."""

    manifest: dict[str, Any]
    width: int
    vocabulary: dict[str, Vocabulary]
    organisms: list[str]

    @property
    def model_sha256(self) -> str:
        """The digest of its weights."""
        return str(self.manifest["model_sha256"])


def read_words(checkpoint: str) -> Words:
    """Read a checkpoint's words, every file compared with its manifest; measurements of levels are left out.

    Raises:
        MissingError: No checkpoint there.
        InputRefused: It is damaged.
    """
    manifest, folder = read_manifest(checkpoint), Path(checkpoint)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
        words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        vocabulary = {
            name: Vocabulary(**words["features"][name])
            for name in manifest["measurements"]
            if name not in config["levels"]
        }
        return Words(manifest, int(config["width"]), vocabulary, list(words["prompts"]["organism"]))
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{checkpoint}: not a checkpoint of this version: {error}") from error


def default_key(model_sha256: str) -> str:
    """Name embeddings after their model."""
    return f"somaflow_{model_sha256[:8]}"


def job_id(lake: str, organism: str, key: str, where: str, model_sha256: str) -> str:
    """Return what stands for a job: the same question has the same."""
    return hashlib.sha256(json.dumps([lake, organism, key, where, model_sha256]).encode()).hexdigest()[:16]


def organism_of(lake: Lake, wanted: str) -> str:
    """Return the organism that is wanted, or the only one that there is.

    Raises:
        UsageError: None is said and there are several, or the lake is empty.
    """
    if wanted:
        return wanted
    if len(lake.organisms) != 1:
        known = ", ".join(lake.organisms) or "none yet"
        raise UsageError(f"{lake.uri}: say of which organism; organisms here: {known}")
    return lake.organisms[0]


class Bulk:
    """One run. Use it in a ``with`` block: it holds the lake's lock on embeddings meanwhile.

    Attributes:
        generation: What is worked on, known inside the block.
    """

    def __init__(self, asked: Asked) -> None:
        """Check what is asked, cheaply; nothing is written.

        Raises:
            UsageError: An organism that the lake does not hold, a bad name or filter.
            InputRefused: The checkpoint is damaged, or knows no feature of the lake's, or not the organism.
            MissingError: No checkpoint or no lake there.
            ConflictError: The checkpoint is not the one that is meant.
        """
        self.asked, self.words = asked, read_words(asked.checkpoint)
        if asked.model_sha256 not in ("", self.words.model_sha256):
            raise ConflictError("another checkpoint was written in the place of the one that answers; ask again")
        self._newest = open_lake(asked.lake)
        self.organism = organism_of(self._newest, asked.organism)
        self.key = embeddings.check_key(asked.key or default_key(self.words.model_sha256))
        self._newest.obs(self.organism, asked.where or None, ["soma_joinid"], (0, 0))
        known = [name for name in self._newest.measurements(self.organism) if name in self.words.vocabulary]
        self.measurements = [name for name in known if (self._columns(name) >= 0).any()]
        if not self.measurements:
            raise InputRefused(
                f"{asked.lake}: no feature of {self.organism} is one of the model's, which knows "
                f"{', '.join(self.words.vocabulary)}; features are found by id, or by a symbol that is one feature's"
            )
        if self.organism not in self.words.organisms:
            known_names = ", ".join(filter(None, self.words.organisms))
            raise InputRefused(
                f"{asked.lake}: the model has not seen organism {self.organism!r}; it knows {known_names}"
            )
        self._lock = embeddings.writer_lock(asked.lake)

    def _columns(self, measurement: str) -> NDArray[np.int64]:
        return columns_of(self._newest, self.organism, measurement, FeatureIndex(self.words.vocabulary[measurement]))

    def __enter__(self) -> Bulk:
        """Take the lock and find out what was begun.

        Raises:
            ConflictError: Somebody embeds this lake now, or the name belongs to another model or filter.
        """
        self._lock.acquire()
        try:
            wanted = {
                "model_sha256": self.words.model_sha256,
                "vocabulary_hash": str(self.words.manifest["vocabulary_hash"]),
                "snapshot": dict(self.words.manifest.get("snapshot", {})),
                "dimension": self.words.width,
                "where": self.asked.where,
                "measurement": self._newest.measurements(self.organism)[0],
                "measurements": self.measurements,
                "block_cells": self.asked.block_cells,
            }
            replace = self.asked.replace
            self.generation = embeddings.begin(self._newest, self.organism, self.key, wanted, replace=replace)
            embeddings.make_array(self.generation)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks, the same whenever the generation is asked.

        Raises:
            UsageError: The filter selects no cell that has a measurement of the model's.
        """
        plan = self.generation.plan
        lake = open_lake(self.generation.lake_uri, int(plan["commit"]))
        flags = [measured_column(name) for name in plan["measurements"]]
        obs = lake.obs(self.organism, plan["where"] or None, flags)
        kind_C = np.zeros(obs.num_rows, np.uint16)
        for bit, flag in enumerate(flags):
            kind_C |= obs[flag].to_numpy().astype(np.uint16) << np.uint16(bit)
        joinid_C = obs["soma_joinid"].to_numpy()[kind_C > 0]
        kind_C = kind_C[kind_C > 0]
        if len(joinid_C) == 0:
            raise UsageError(
                f"{self.asked.lake}: no cell of {self.organism} where {plan['where'] or 'nothing is asked'!r} has "
                f"counts of {', '.join(plan['measurements'])}"
            )
        starts = embeddings.block_starts(joinid_C, int(plan["block_cells"]))
        return [
            Block(number, joinid_C[start:stop], kind_C[start:stop])
            for number, (start, stop) in enumerate(pairwise(starts))
        ]

    def run(self, hire: Hire, progress: Progress, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Do what is left, then let readers see the embeddings, then build their index.

        Args:
            hire: Gives the workers.
            progress: Told after each block of cells and each part of the index.
            stop: Asked after each of them; True ends the run, which the same question resumes.

        Raises:
            InterruptedRun: It was stopped.
            SomaflowError: What a worker raised.
        """
        generation, before = self.generation, embeddings.done(self.generation)
        left = [block for block in self.blocks if block.number not in before]
        total = sum(len(block.joinid_C) for block in self.blocks)
        n_done = total - sum(len(block.joinid_C) for block in left)
        new: list[Done] = []
        progress(CELLS, n_done, total)
        with hire(Common(self.asked.checkpoint, self.asked.device, generation)) as crew:
            for record in crew.do(left):
                if record is not None:
                    new.append(record)
                    n_done += record["cells"]
                    progress(CELLS, n_done, total)
                if stop() and n_done < total:
                    raise InterruptedRun(
                        f"{self.asked.lake}: stopped at {n_done:,} of {total:,} cells; ask again to go on"
                    )
            self._lock.check()
            manifest = embeddings.complete(generation, self._said())
            index = usable_index(generation) or self._index(crew, progress, stop)
            embeddings.forget_old(generation)
        return Outcome(
            organism=self.organism,
            key=self.key,
            n_cells=total,
            n_embedded=sum(record["embedded"] for record in new),
            n_taken_over=sum(record["taken_over"] for record in new),
            n_blocks=len(new),
            manifest=manifest,
            index=index,
        )

    def _index(self, crew: Crew, progress: Progress, stop: Callable[[], bool]) -> dict[str, Any]:
        """Have the index made, part by part; return its manifest."""
        numbers = sorted({number for block in self.blocks for number in part_numbers(block.joinid_C)})
        n_done = 0
        progress(PARTS, n_done, len(numbers))
        for record in crew.do([IndexPart(number) for number in numbers]):
            if record is not None:
                n_done += 1
                progress(PARTS, n_done, len(numbers))
            if stop() and n_done < len(numbers):
                raise InterruptedRun(
                    f"{self.asked.lake}: all cells are embedded; stopped at {n_done:,} of {len(numbers):,} parts of "
                    "their index; ask again to go on"
                )
        self._lock.check()
        return complete_index(self.generation, numbers)

    def _said(self) -> dict[str, Any]:
        """Sum up what blocks say of their cells."""
        blocks = embeddings.done(self.generation).values()
        counts, understood = (sum(block[name] for block in blocks) for name in ("counts", "understood"))
        return {
            "n_empty": sum(block["empty"] for block in blocks),
            "share_of_counts": round(understood / counts, 6) if counts else 0.0,
        }


def columns_of(lake: Lake, organism: str, measurement: str, index: FeatureIndex) -> NDArray[np.int64]:
    """Return column_F: where in the vocabulary each of the lake's features stands, by joinid; negative if nowhere."""
    var = lake.var(organism, measurement)
    column_F = np.full(lake.n_features(organism, measurement), -1, np.int64)
    column_F[var["soma_joinid"].to_numpy()] = index.positions(var["feature_id"].to_pylist(), organism)
    return column_F


class Worker:
    """Embeds blocks of one generation, in any process; threads may do tasks together.

    The model works on one block at a time; another thread reads the next one meanwhile, or writes the last.
    """

    def __init__(self, common: Common) -> None:
        """Load the model.

        Raises:
            InputRefused: The checkpoint is damaged, or another one was written in its place.
        """
        self.common = common
        self._turn = threading.Lock()
        self.generation = common.generation
        self.predictor = Predictor.load(common.checkpoint, device=common.device)
        found, planned = self.predictor.manifest["model_sha256"], self.generation.plan["model_sha256"]
        if found != planned:
            raise InputRefused(
                f"{common.checkpoint}: holds model {str(found)[:12]} now, and {str(planned)[:12]} was to embed; name "
                "the checkpoint that is meant and ask again"
            )
        self.lake = open_lake(self.generation.lake_uri, int(self.generation.plan["commit"]))
        self.before = embeddings.previous(self.generation)
        self._columns = {
            name: columns_of(self.lake, self.generation.organism, name, FeatureIndex(self.predictor.vocabulary[name]))
            for name in self.generation.plan["measurements"]
        }

    @property
    def _width(self) -> int:
        return int(self.generation.plan["dimension"])

    def do(self, task: Task) -> Done:
        """Do one task; return what is to be known of it."""
        if isinstance(task, Block):
            return self.embed(task)
        with self._turn:
            return make_part(self.generation, task.number, threads=self.common.threads)

    def embed(self, block: Block) -> Done:
        """Embed a block and write it; vectors of the generation before are taken over."""
        n_cells = len(block.joinid_C)
        embedding_CD, found_C = np.empty((n_cells, self._width), np.float32), np.zeros(n_cells, bool)
        if self.before is not None:
            embedding_CD, found_C = self.before.read(block.joinid_C)
        said = {"counts": 0.0, "understood": 0.0, "empty": 0, "taken_over": int(found_C.sum())}
        for kind in np.unique(block.kind_C[~found_C]):
            rows = np.flatnonzero((block.kind_C == kind) & ~found_C)
            counts = self._counts(block.joinid_C[rows], int(kind), said)
            said["empty"] += int((np.sum([np.diff(part.indptr) for part in counts.values()], axis=0) == 0).sum())
            embedding_CD[rows] = self._embed(counts, len(rows))
        said["embedded"] = n_cells - said["taken_over"]
        embeddings.write_block(self.generation, block.number, block.joinid_C, embedding_CD, said)
        return {**said, "cells": n_cells}

    def _counts(self, joinid_C: NDArray[np.int64], kind: int, said: Done) -> dict[str, csr_matrix]:
        """Read the cells' counts, columns in the vocabulary's order."""
        found = {}
        for bit, (name, column_F) in enumerate(self._columns.items()):
            if not kind & 1 << bit:
                continue
            counts_CF = self.lake.counts(self.generation.organism, name, joinid_C)
            column_N = column_F[counts_CF.indices]
            kept_N = column_N >= 0
            indptr = np.concatenate([[0], np.cumsum(kept_N)])[counts_CF.indptr]
            shape = (len(joinid_C), len(self.predictor.vocabulary[name].feature_id))
            found[name] = csr_matrix((counts_CF.data[kept_N], column_N[kept_N], indptr), shape=shape)
            found[name].sum_duplicates()
            said["counts"] += float(counts_CF.data.sum(dtype=np.float64))
            said["understood"] += float(found[name].data.sum(dtype=np.float64))
        return found

    def _embed(self, counts: dict[str, csr_matrix], n_cells: int) -> NDArray[np.float32]:
        """Embed cells, those of like length together, so that little is padded."""
        prompts = {"organism": [self.generation.organism] * n_cells}
        cells = self.predictor.cells(counts, prompts)
        order = np.argsort(self.predictor.n_tokens(cells), kind="stable")
        embedding_CD, sorted_cells = np.empty((n_cells, self._width), np.float32), cells.take(order)
        with self._turn:
            embedding_CD[order] = self.predictor.embed(sorted_cells)
        return embedding_CD


class Here:
    """A crew of one, in this process."""

    def __init__(self, common: Common) -> None:
        self._common = common

    @cached_property
    def _worker(self) -> Worker:
        return Worker(self._common)

    def do(self, tasks: Sequence[Task]) -> Iterator[Done | None]:
        """See :class:`Crew`."""
        for task in tasks:
            yield self._worker.do(task)


@contextmanager
def in_this_process(common: Common) -> Iterator[Crew]:
    """Hire nobody."""
    yield Here(common)
