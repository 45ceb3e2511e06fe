"""This module sums up what the tasks of the first pass left, in a dozen bytes for each bucket's share of a spill file.

There are as many shares as there are chunks times buckets: that grows with the square of the snapshot.

Shape letters used in this module:
    K  chunks      B  buckets      F  joinids of one measurement, organisms side by side
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from store.part import CODED


class Spilled:
    """Where each bucket's cells lie, and what is in all of them.

    Attributes:
        nnz_B: Measurement to the values of each bucket.
        used_F: Measurement to whether some cell has a value of a feature.
        largest: Measurement to its greatest count.
        integral: Measurement to whether all counts are whole numbers.
        labels: Field to value to split to cells.
    """

    def __init__(self, n_chunks: int, n_buckets: int, n_features: dict[str, int]) -> None:
        """Expect so many records; ``n_features`` is how many joinids a measurement has."""
        self.nnz_B = {name: np.zeros(n_buckets, np.int64) for name in n_features}
        self.used_F = {name: np.zeros(length, dtype=bool) for name, length in n_features.items()}
        self.largest = dict.fromkeys(n_features, 0.0)
        self.integral = dict.fromkeys(n_features, True)
        self.labels: dict[str, dict[str, dict[str, int]]] = {field: {} for field in CODED}
        self._files: list[str] = []
        self._ends_BK = np.zeros((n_buckets + 1, n_chunks), np.int64)  # bytes up to the end of the bucket before
        self._crc_BK = np.zeros((n_buckets, n_chunks), np.uint32)

    def add(self, record: dict[str, Any]) -> None:
        """Take the record of the next chunk."""
        chunk, buckets = len(self._files), np.array(record["buckets"], np.int64)
        self._files.append(record["file"])
        if len(buckets):
            where = np.array(record["where"], np.int64)
            self._ends_BK[buckets + 1, chunk] = where[:, 1]
            self._crc_BK[buckets, chunk] = where[:, 2]
        np.cumsum(self._ends_BK[:, chunk], out=self._ends_BK[:, chunk])
        for name, counted in record["nnz"].items():
            self.nnz_B[name][buckets] += np.array(counted, np.int64)
            bits = np.unpackbits(np.frombuffer(base64.b64decode(record["used"][name]), np.uint8))
            used_F = self.used_F[name]
            used_F[: len(bits)] |= bits[: len(used_F)].astype(bool)
            self.largest[name] = max(self.largest[name], record["largest"][name])
            self.integral[name] &= record["integral"][name]
        for field, by in record["labels"].items():
            for value, of in by.items():
                add_cells(self.labels[field].setdefault(value, {}), of)

    def shares(self, bucket: int) -> list[tuple[str, int, int, int]]:
        """Return file, first byte, bytes and CRC-32 of each share of a bucket."""
        first_K, size_K = self._ends_BK[bucket], self._ends_BK[bucket + 1] - self._ends_BK[bucket]
        chunks = np.flatnonzero(size_K)
        numbers = (values_K[chunks].tolist() for values_K in (first_K, size_K, self._crc_BK[bucket]))
        return list(zip([self._files[chunk] for chunk in chunks], *numbers, strict=True))


def add_cells(held: dict[str, int], more: dict[str, int]) -> None:
    """Add cells of each split to those that are held."""
    for split, n_cells in more.items():
        held[split] = held.get(split, 0) + n_cells
