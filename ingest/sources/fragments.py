"""This module counts ATAC fragments (fragments.tsv, .gz or bgzip) in genome tiles or in given peaks, cell by cell.

Insertions are counted: each of a fragment's two ends adds one to the tile, or to every peak, that contains its base, as
ArchR counts. So a peak's counts do not depend on which others are looked at. Coordinates are BED's (0-based,
half-open); features are named ``chr1:10000-10500``.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import BinaryIO

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset, content_digest, fingerprint, has_ending, read_names
from ingest.turn import Coordinates, turned
from store.errors import InputRefused, MissingError

COLUMNS = {"chrom": pa.string(), "start": pa.int64(), "end": pa.int64(), "barcode": pa.string(), "reads": pa.int64()}
LONGEST_CHROMOSOME = 2**31
Hits = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Which of the places lie in a feature, once for each, and the feature's column."""


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a file: one pass finds barcodes and places, a second one counts; memory does not grow with the fragments.

    Raises:
        InputRefused: Not a fragments file, no barcode is a cell, or peaks are none or on other chromosomes.
        MissingError: The files of peaks or barcodes are not there.
    """
    fragments_B, seen = _survey(source)
    barcodes = _cells(source, fragments_B)
    features = _Peaks(source.peaks) if source.peaks else _Tiles(seen, source.tile_bp)
    if isinstance(features, _Peaks) and not features.chromosomes & set(seen):
        raise InputRefused(
            f"{source.uri}: has no fragment on a chromosome of {source.peaks} ({_some(features.chromosomes)}), but on "
            f"{_some(seen)}; both are to name chromosomes in one way"
        )
    number_of = pd.Index(barcodes)
    settings = [source.peaks or str(source.tile_bp), source.barcodes or str(source.min_fragments)]
    settings += [fingerprint(path) for path in (source.peaks, source.barcodes) if path]

    def parts() -> Iterator[Coordinates]:
        for batch in _batches(source.uri):
            cell = number_of.get_indexer(pd.Index(batch["barcode"]))
            batch = batch[cell >= 0]
            cell = cell[cell >= 0]
            for place in (batch["start"].to_numpy(), batch["end"].to_numpy() - 1):
                which, column = features.columns(batch["chrom"].to_numpy(), place)
                yield cell[which], column, np.ones(len(which), np.float32)

    shape = (len(barcodes), len(features.names))
    rows = turned([source.uri, fingerprint(source.uri), *settings], shape, parts)
    obs = pd.DataFrame({"n_fragments": [fragments_B.get(code, 0) for code in barcodes]}, index=pd.Index(barcodes))
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: obs,
        n_obs=len(barcodes),
        parts={"ATAC": Part(pd.DataFrame(index=pd.Index(features.names)), rows)},
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=(f"insertions counted in {len(features.names):,} {'peaks' if source.peaks else 'tiles'}",),
    )


def _open(uri: str) -> BinaryIO:
    opened = fsspec.open(uri, "rb").open()
    # bgzip is gzip in many members, which the standard library reads on through
    return gzip.open(opened) if has_ending(uri, "gz") else opened  # type: ignore[return-value]


def _batches(uri: str) -> Iterator[pd.DataFrame]:
    try:
        with _open(uri) as file:
            first = file.readline()
            while first.startswith(b"#"):
                first = file.readline()
            width = len(first.rstrip(b"\n").split(b"\t"))
            if width < 4:
                raise InputRefused(
                    f"{uri}: a fragment has chromosome, start, end and barcode; this line has {width} fields"
                )
            names = list(COLUMNS)[: min(width, 5)]
            names += [f"more{number}" for number in range(width - len(names))]
            yield _frame(pa.csv.read_csv(pa.BufferReader(first), **_options(names)), uri)
            try:
                batches = pa.csv.open_csv(file, **_options(names, block=2**23))
            except pa.ArrowInvalid as error:
                if "Empty" in str(error):
                    return
                raise
            for batch in batches:
                yield _frame(batch, uri)
    except (pa.ArrowInvalid, EOFError, OSError) as error:
        if isinstance(error, InputRefused):
            raise
        raise InputRefused(f"{uri}: not a readable fragments file: {str(error).splitlines()[0]}") from error


def _options(names: list[str], block: int | None = None) -> dict[str, object]:
    return {
        "read_options": pa.csv.ReadOptions(column_names=names, block_size=block, use_threads=False),
        "parse_options": pa.csv.ParseOptions(delimiter="\t"),
        "convert_options": pa.csv.ConvertOptions(
            column_types={name: COLUMNS[name] for name in names if name in COLUMNS}, include_columns=names[:4]
        ),
    }


def _frame(batch: pa.RecordBatch | pa.Table, uri: str) -> pd.DataFrame:
    frame = pd.DataFrame(batch.to_pandas())
    wrong = (frame["start"] < 0) | (frame["end"] <= frame["start"]) | (frame["end"] > LONGEST_CHROMOSOME)
    if wrong.any():
        row = frame[wrong].iloc[0]
        raise InputRefused(f"{uri}: a fragment from {row['start']} to {row['end']} on {row['chrom']} is none")
    return frame


def _survey(source: SourceSettings) -> tuple[dict[str, int], dict[str, int]]:
    """Count the fragments of each barcode, and find the last base of each chromosome."""
    barcodes = pd.Series(dtype=np.int64)
    ends = pd.Series(dtype=np.int64)
    for batch in _batches(source.uri):
        barcodes = barcodes.add(batch["barcode"].value_counts(), fill_value=0)
        ends = pd.concat([ends, batch.groupby("chrom")["end"].max()]).groupby(level=0).max()
    totals = {str(code): int(count) for code, count in barcodes.items()}
    return totals, {str(chrom): int(end) for chrom, end in ends.items()}


def _cells(source: SourceSettings, fragments_B: dict[str, int]) -> list[str]:
    if source.barcodes:
        try:
            with _open(source.barcodes) as file:
                cells = [cell for cell in read_names(file) if cell]
        except FileNotFoundError:
            raise MissingError(f"{source.barcodes}: no such file of barcodes") from None
        if twice := next((cell for cell, number in Counter(cells).items() if number > 1), ""):
            raise InputRefused(f"{source.barcodes}: barcode {twice!r} stands more than once; leave one")
        if not any(cell in fragments_B for cell in cells):
            raise InputRefused(f"{source.uri}: none of the {len(cells):,} barcodes of {source.barcodes} has a fragment")
        return cells
    cells = sorted(code for code, count in fragments_B.items() if count >= source.min_fragments)
    if not cells:
        raise InputRefused(f"{source.uri}: no barcode has {source.min_fragments} fragments (min_fragments)")
    return cells


class _Tiles:
    """Tiles of equal width along the chromosomes that have fragments."""

    def __init__(self, ends: dict[str, int], width: int) -> None:
        self.width = width
        self.names: list[str] = []
        self.first: dict[str, int] = {}
        for chrom in sorted(ends):
            self.first[chrom] = len(self.names)
            starts = range(0, ends[chrom], width)
            self.names += [f"{chrom}:{start}-{start + width}" for start in starts]

    def columns(self, chrom: NDArray[np.object_], place: NDArray[np.int64]) -> Hits:
        codes, names = pd.factorize(chrom)
        first = np.array([self.first[name] for name in names], np.int64)
        return np.arange(len(place)), first[codes] + place // self.width


class _Peaks:
    """Peaks of a BED file; of those that overlap, each is counted."""

    def __init__(self, path: str) -> None:
        try:
            with _open(path) as file:
                lines = [line for line in file if not line.startswith((b"#", b"track", b"browser"))]
            text, kinds = BytesIO(b"".join(lines)), {0: str, 1: np.int64, 2: np.int64}
            table = pd.read_csv(text, sep="\t", header=None, usecols=[0, 1, 2], dtype=kinds, quoting=csv.QUOTE_NONE)
        except FileNotFoundError:
            raise MissingError(f"{path}: no such file of peaks") from None
        except (ValueError, OSError) as error:
            raise InputRefused(f"{path}: not a BED file: {error}") from error
        table.columns = pd.Index(["chrom", "start", "end"])
        wrong = (table["start"] < 0) | (table["end"] <= table["start"])
        if wrong.any():
            row = table[wrong].iloc[0]
            raise InputRefused(f"{path}: a peak from {row['start']} to {row['end']} on {row['chrom']} is none")
        table = table.drop_duplicates().sort_values(["chrom", "start", "end"], ignore_index=True)
        self.names = [f"{chrom}:{start}-{end}" for chrom, start, end in table.itertuples(index=False)]
        self._of = {str(chrom): _Pieces(part) for chrom, part in table.groupby("chrom")}
        self.chromosomes = set(self._of)

    def columns(self, chrom: NDArray[np.object_], place: NDArray[np.int64]) -> Hits:
        hits = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for name in self.chromosomes.intersection(pd.unique(chrom)):
            mine = np.flatnonzero(chrom == name)
            which, peak = self._of[name].peaks_at(place[mine])
            hits.append((mine[which], peak))
        which, peak = (np.concatenate(parts) for parts in zip(*hits, strict=True))
        return which, peak


class _Pieces:
    """A chromosome cut where a peak begins or ends, and the peaks that each piece lies in."""

    def __init__(self, peaks: pd.DataFrame) -> None:
        start, end = peaks["start"].to_numpy(), peaks["end"].to_numpy()
        self.cuts = np.unique(np.concatenate([start, end]))
        first = np.searchsorted(self.cuts, start)
        owner, piece = _spread(first, np.searchsorted(self.cuts, end) - first)
        order = np.argsort(piece, kind="stable")
        self.peak = peaks.index.to_numpy()[owner[order]]
        self.begin = np.searchsorted(piece[order], np.arange(len(self.cuts) + 1))

    def peaks_at(self, place: NDArray[np.int64]) -> Hits:
        # before the first cut is no piece, behind the last an empty one
        piece = np.searchsorted(self.cuts, place, side="right") - 1
        begin = np.where(piece < 0, 0, self.begin[piece])
        which, slot = _spread(begin, np.where(piece < 0, 0, self.begin[piece + 1] - begin))
        return which, self.peak[slot]


def _spread(first: NDArray[np.int64], many: NDArray[np.int64]) -> Hits:
    """Return ``first``, ``first + 1``, ... (``many`` of each), and before them whose they are."""
    whose = np.repeat(np.arange(len(first)), many)
    before = np.cumsum(many) - many
    return whose, np.arange(len(whose)) - before[whose] + first[whose]


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
