"""This module writes X as TileDB fragments in global order, and lists and removes fragments of any array.

A fragment is what one write leaves: a folder ``__fragments/__T1_T2_UUID_V``, visible when its file in ``__commits``
stands, which is written last. Rows that arrive in order are streamed into one fragment, whatever their number; only
one space tile of them is in memory. SOMA's own writer sorts each batch and makes one fragment of each.

Shape letters used in this module:
    C  cells of a block      G  features, by joinid
"""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import scipy.sparse
import tiledb
import tiledb.libtiledb
from numpy.typing import NDArray

from store import records
from store.context import ORDER_TILES, tiledb_context

log = logging.getLogger("somaflow.store")

NAME = re.compile(r"__(\d+)_(\d+)_[0-9a-f]+_\d+")
SMALL_ROWS = 2**18
"""A fragment of a table with as many rows is left as it is."""
RUN = 64
"""Fragments that are merged into one at most: what a merge takes has a bound also in a lake that never had one."""
MERGE_BYTES = 2**21
"""Buffer of a merge for each column (texts have two): with TileDB's own 50 MB those of obs are 6 GB, all written to."""
READERS_S = 600
"""Seconds that a reader may go on with an array as it was when it was opened, before merged fragments are removed."""


class FragmentWriter:
    """A context manager that writes rows of a sparse matrix, tile by tile, into as few fragments as their order allows.

    Nothing is visible before the block ends; when it ends with an error, nothing ever is.

    Attributes:
        row_tile: Rows in a tile of the array, known inside the block.
        names: Names of the fragments made, known after the block.
    """

    def __init__(self, uri: str, timestamp_ms: int) -> None:
        self.uri, self.timestamp_ms = uri, timestamp_ms
        self.names: list[str] = []

    def __enter__(self) -> FragmentWriter:
        self._context = tiledb_context()
        self._array = tiledb.open(self.uri, "w", timestamp=self.timestamp_ms, ctx=self._context)
        domain = self._array.schema.domain
        self.row_tile, self._column_tile = (int(domain.dim(number).tile) for number in range(2))
        self._query: tiledb.libtiledb.Query | None = None
        self._buffers: dict[str, NDArray[Any]] = {}
        self._tile = -1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._query = None
            self._array.close()

    def write(self, first: int, counts_CG: scipy.sparse.csr_matrix) -> None:
        """Write the rows from joinid ``first`` on; columns are joinids, ascending in each row and without repeats.

        Rows must follow those of the call before. A call that begins inside the tile in which the last one ended
        begins another fragment, so end calls where a tile ends if memory allows.
        """
        start, n_rows = 0, counts_CG.shape[0]
        while start < n_rows:
            tile = (first + start) // self.row_tile
            stop = min(n_rows, (tile + 1) * self.row_tile - first)
            if tile == self._tile:
                self._finish()
            self._tile = tile
            self._submit(first + start, counts_CG[start:stop] if stop - start < n_rows else counts_CG)
            start = stop

    def _submit(self, first: int, counts_CG: scipy.sparse.csr_matrix) -> None:
        size = counts_CG.nnz
        if size == 0:
            return
        rows = np.repeat(np.arange(first, first + counts_CG.shape[0], dtype=np.int64), np.diff(counts_CG.indptr))
        column_tile = counts_CG.indices // self._column_tile
        # a stable sort of 16-bit numbers is a radix sort: linear
        order = np.argsort(column_tile.astype(np.uint16), kind="stable")
        self._reserve(size)
        np.take(rows, order, out=self._buffers["soma_dim_0"][:size])
        self._buffers["soma_dim_1"][:size] = counts_CG.indices[order]
        self._buffers["soma_data"][:size] = counts_CG.data[order]
        if self._query is None:
            self._query = tiledb.libtiledb.Query(self._context, tiledb.libtiledb.Array(self._context, self._array))
            self._query.layout = tiledb.libtiledb.LayoutType.GLOBAL_ORDER
        for name, values in self._buffers.items():
            self._query.set_data_buffer(name, values, size)
        self._query._submit()

    def _reserve(self, size: int) -> None:
        """Make room for ``size`` values; the same room is used again, for a query keeps all that it was ever given."""
        if size > len(self._buffers.get("soma_data", ())):
            room = 2 ** (size - 1).bit_length()
            kinds = {"soma_dim_0": np.int64, "soma_dim_1": np.int64, "soma_data": np.float32}
            self._buffers = {name: np.empty(room, kind) for name, kind in kinds.items()}

    def _finish(self) -> None:
        if self._query is not None:
            self._query.finalize()
            self.names.append(_name(self._query.fragment_uri(0)))
            self._query = None


def _name(fragment_uri: str) -> str:
    return fragment_uri.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Fragment:
    """A fragment that stands in an array's folder.

    Attributes:
        name: Its folder's name.
        first_ms: Timestamp of its first write.
        last_ms: Timestamp of its last write; differs from the first only after consolidation.
    """

    name: str
    first_ms: int
    last_ms: int


def fragments(array_uri: str) -> list[Fragment]:
    """List an array's fragments, visible or not, oldest first."""
    found = [_fragment(name) for name in records.folders(records.join(array_uri, "__fragments"))]
    return sorted((item for item in found if item), key=lambda item: (item.first_ms, item.name))


def written_files(array_uri: str, config: dict[str, Any]) -> list[str]:
    """Name what stands in any array's folder and in that of its commits: as long as that is the same, so are its cells.

    ``config`` is TileDB's, for arrays that are not ours: a public bucket is read without keys.
    """
    files = tiledb.VFS(ctx=tiledb.Ctx(config))
    folders = [folder for folder in (array_uri, records.join(array_uri, "__commits")) if files.is_dir(folder)]
    return sorted(path.removeprefix(array_uri) for folder in folders for path in files.ls(folder))


def _fragment(name: str) -> Fragment | None:
    match = NAME.match(name)
    return Fragment(name, int(match[1]), int(match[2])) if match else None


def remove_fragments(array_uri: str, names: list[str]) -> None:
    """Remove fragments of an array for good; those that are gone already do not matter."""
    there = {item.name for item in fragments(array_uri)}
    names = [name for name in names if name in there]
    # the commit files first: a fragment without one is invisible, the other way round would be an error
    records.remove_each([records.join(array_uri, "__commits", f"{name}.wrt") for name in names], files=True)
    records.remove_each([records.join(array_uri, "__fragments", name) for name in names], files=False)


def take_back(array_uri: str, unwanted: Callable[[Fragment], bool]) -> int:
    """Remove what single writes and deletes left in an array, where it is ``unwanted``; return how many.

    Other writers must be held off. What consolidation wrote is kept: it never reaches past a commit.
    """
    extra = [item.name for item in fragments(array_uri) if item.first_ms == item.last_ms and unwanted(item)]
    remove_fragments(array_uri, extra)
    commits_uri = records.join(array_uri, "__commits")
    deletes = [
        name
        for name in records.names(commits_uri)
        if name.endswith(".del") and (found := _fragment(name)) and unwanted(found)
    ]
    for name in deletes:
        records.remove(records.join(commits_uri, name))
    return len(extra) + len(deletes)


def consolidate(array_uri: str, modes: tuple[str, ...]) -> None:
    """Merge an array's small files (TileDB's consolidation, then vacuum, mode by mode); what is read stays the same.

    Every earlier timestamp still reads as it did. Readers that have the array open may have to open it again.
    """
    for mode in modes:
        config, context = _merging(mode)
        tiledb.consolidate(array_uri, config=config, ctx=context)
        tiledb.vacuum(array_uri, config=config, ctx=context)


def _merging(mode: str) -> tuple[tiledb.Config, tiledb.Ctx]:
    # it reads many fragments at a time: TileDB's own way is the one whose budget is enough
    as_usual = {ORDER_TILES: tiledb.Config()[ORDER_TILES]}
    settings = {"sm.consolidation.mode": mode, "sm.vacuum.mode": mode, "sm.consolidation.buffer_size": MERGE_BYTES}
    config = tiledb.Config({**tiledb_context().config().dict(), **settings, **as_usual})
    return config, tiledb.Ctx(config)


def merge_small(array_uri: str, before_ms: int) -> None:
    """Merge each run of small fragments written before ``before_ms`` into one, and all footers; what is read stays.

    Small are those of fewer than ``SMALL_ROWS`` rows: no merge writes many more than that again, however large the
    table is. What was merged is removed by a later call, when readers that have it open had time to end.
    """
    _remove_merged(array_uri, "fragments")
    config, context = _merging("fragments")
    for run in _small_runs(tiledb.array_fragments(array_uri, ctx=context), before_ms):
        tiledb.consolidate(array_uri, config=config, ctx=context, fragment_uris=run)
    merge_footers(array_uri)


def _small_runs(infos: Iterable[Any], before_ms: int) -> list[list[str]]:
    """Name the small fragments that follow each other, where there are several, ``RUN`` of them at most."""
    in_order = sorted(infos, key=lambda info: (info.timestamp_range, info.uri))
    small = [info.cell_num < SMALL_ROWS and info.timestamp_range[1] < before_ms for info in in_order]
    runs: list[list[str]] = [[]]
    for info, is_small in zip(in_order, small, strict=True):
        name = _name(info.uri)
        if is_small and len(runs[-1]) < RUN:
            runs[-1].append(name)
        else:
            runs.append([name] if is_small else [])
    return [run for run in runs if len(run) > 1]


def merge_footers(array_uri: str) -> None:
    """Merge the footers of an array's fragments into one file, which opening it reads in place of each."""
    _remove_merged(array_uri, "fragment_meta")
    config, context = _merging("fragment_meta")
    tiledb.consolidate(array_uri, config=config, ctx=context)


def _remove_merged(array_uri: str, mode: str) -> None:
    """Remove what an earlier merge has made needless, if that was long enough ago for all who had it open."""
    folder, ending = ("__fragment_meta", "") if mode == "fragment_meta" else ("__commits", ".vac")
    newest = records.newest(records.join(array_uri, folder), ending)
    if newest is not None and (dt.datetime.now(dt.UTC) - newest).total_seconds() > READERS_S:
        config, context = _merging(mode)
        tiledb.vacuum(array_uri, config=config, ctx=context)


def remove_older(array_uri: str, than_ms: int) -> None:
    """Remove the fragments whose last write is older than ``than_ms``, which later timestamps must not need.

    One that a merge made of older and newer writes stays.
    """
    _remove_merged(array_uri, "fragments")
    tiledb.Array.delete_fragments(array_uri, 0, than_ms - 1, ctx=tiledb_context())


Span = tuple[int, int]
"""First and last joinid."""


def purge(table_uri: str, standing: Sequence[Span], gone: Sequence[Span]) -> None:
    """Remove fragments of a table that hold deleted rows alone, and write those anew that hold others too.

    Every delete counts, however late: only the newest commit reads as before. A fragment that stands alone stays as it
    is, for TileDB merges two at least.

    Args:
        table_uri: A table by joinid, each row written once.
        standing: Rows that are not deleted.
        gone: Rows that are; what holds none of them stays as it is, but for a neighbour.
    """
    infos = sorted(tiledb.array_fragments(table_uri, ctx=tiledb_context()), key=lambda info: info.timestamp_range)
    if sum(info.cell_num for info in infos) <= sum(last - first + 1 for first, last in standing):
        return
    left = []
    for info in infos:
        if _meet(info.nonempty_domain[0], standing):
            left.append(info)
        else:
            tiledb.Array.delete_fragments(table_uri, *info.timestamp_range, ctx=tiledb_context())
    config, _ = _merging("fragments")
    config["sm.consolidation.purge_deleted_cells"] = "true"
    context = tiledb.Ctx(config)
    for run in np.array_split(np.arange(len(left)), max(1, len(left) // 2)):
        if any(_meet(left[number].nonempty_domain[0], gone) for number in run):
            names = [_name(left[number].uri) for number in run]
            try:
                tiledb.consolidate(table_uri, config=config, ctx=context, fragment_uris=names)
            except tiledb.TileDBError as error:
                log.warning("%s: deleted rows stay in %s: %s", table_uri, ", ".join(names), error)
    tiledb.vacuum(table_uri, config=config, ctx=context)


def _meet(span: Span, others: Iterable[Span]) -> bool:
    return any(first <= span[1] and span[0] <= last for first, last in others)
