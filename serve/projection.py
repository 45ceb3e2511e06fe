"""This module lays cells out on a plane by UMAP of their embeddings, in a process of its own.

UMAP's libraries take seconds to load and compile, and hold the interpreter while they work. The child (``python -m
serve.projection``) can be started before it is needed, and stays for a while.

Shape letters used in this module:
    C  cells      D  size of an embedding      S  cells that UMAP is fitted to
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import threading
import warnings
from typing import IO

import numpy as np
from numpy.typing import NDArray

from serve.errors import DeadlineExceeded, Unavailable

SEED = 0
FEWEST = 15
"""Fewer cells have no neighbourhoods worth the name: they are shown on their principal components."""
NEIGHBOURS, MIN_DIST, PARTS = 15, 0.3, 30


class Projector:
    """A child that lays cells out, one set after the other; started when it is first needed, or before.

    Args:
        fitted: Most cells that UMAP is fitted to; the others are placed among them.
        idle_s: A child that nobody needed for so long ends; the next set starts another.
    """

    def __init__(self, fitted: int, idle_s: float) -> None:
        self._fitted, self._idle_s = fitted, idle_s
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def warm(self) -> None:
        """Start the child, unless it runs: it is ready some ten seconds later, and nobody waits for it."""
        if self._turn.acquire(blocking=False):
            try:
                self._running()
            finally:
                self._turn.release()

    def place(self, embedding_CD: NDArray[np.float32], timeout_s: float) -> NDArray[np.float32]:
        """Return position_C2; waits for it, so call it in a thread.

        Raises:
            DeadlineExceeded: It took too long.
            Unavailable: The child died.
        """
        late = threading.Event()
        with self._turn:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None

            def end() -> None:
                late.set()
                child.kill()

            clock = threading.Timer(timeout_s, end)
            clock.start()
            try:
                _write(child.stdin, embedding_CD)
                return _read(child.stdout)
            except (OSError, EOFError, ValueError):
                self._stop()
                if late.is_set():
                    raise DeadlineExceeded(f"the cells could not be laid out within {timeout_s:g} s") from None
                raise Unavailable("the process that lays cells out has died; try again, with fewer cells") from None
            finally:
                clock.cancel()

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._child is not None:
            self._child.kill()
        with self._turn:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._stop()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "serve.projection", str(self._fitted), str(self._idle_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _write(pipe: IO[bytes], values: NDArray[np.float32]) -> None:
    pipe.write(struct.pack("<qq", *values.shape))
    pipe.write(values.astype("<f4").tobytes())
    pipe.flush()


def _read(pipe: IO[bytes]) -> NDArray[np.float32]:
    head = pipe.read(16)
    if len(head) < 16:
        raise EOFError
    n_rows, n_columns = struct.unpack("<qq", head)
    return np.frombuffer(pipe.read(4 * n_rows * n_columns), "<f4").reshape(n_rows, n_columns)


def project(embedding_CD: NDArray[np.float32], *, fitted: int) -> NDArray[np.float32]:
    """Return position_C2; the same embeddings have the same positions on one machine.

    Where there are more cells than ``fitted``, UMAP is fitted to so many of them, drawn at random, and each other cell
    is placed among those that it is like. Fewer than ``FEWEST`` cells lie on their first two principal components.
    """
    if len(embedding_CD) < FEWEST:
        return principal(embedding_CD, 2)
    from sklearn.neighbors import NearestNeighbors
    from umap import UMAP

    reduced_CD = principal(embedding_CD, PARTS) if embedding_CD.shape[1] > PARTS else embedding_CD
    chosen_S = np.arange(len(reduced_CD))
    if len(reduced_CD) > fitted:
        chosen_S = np.sort(np.random.default_rng(SEED).choice(len(reduced_CD), fitted, replace=False))
    fitted_SD = reduced_CD[chosen_S]
    neighbours = min(NEIGHBOURS, len(chosen_S))
    distance_SK, nearest_SK = (
        NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(fitted_SD).kneighbors(fitted_SD)
    )
    known = (nearest_SK, distance_SK.astype(np.float32))
    model = UMAP(n_neighbors=neighbours, min_dist=MIN_DIST, init="pca", random_state=SEED, precomputed_knn=known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a seed means one thread, and neighbours no transform
        placed_S2 = model.fit_transform(fitted_SD).astype(np.float32)
    position_C2 = np.empty((len(reduced_CD), 2), np.float32)
    position_C2[chosen_S] = placed_S2
    others = np.ones(len(reduced_CD), dtype=bool)
    others[chosen_S] = False
    if others.any():
        position_C2[others] = _among(reduced_CD[others], fitted_SD, placed_S2)
    return position_C2


def _among(
    embedding_CD: NDArray[np.float32], fitted_SD: NDArray[np.float32], placed_S2: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Place cells at the weighted mean of their nearest fitted cells; weights fall with distance."""
    from sklearn.neighbors import NearestNeighbors

    distance_CK, nearest_CK = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(fitted_SD).kneighbors(embedding_CD)
    scale_C1 = np.maximum(distance_CK.mean(axis=1, keepdims=True), 1e-12)
    weight_CK = np.exp(-4 * distance_CK / scale_C1)
    weight_CK /= weight_CK.sum(axis=1, keepdims=True)
    return np.einsum("ck,ckx->cx", weight_CK, placed_S2[nearest_CK]).astype(np.float32)


def principal(embedding_CD: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Return the cells' first principal components, zeros where there are fewer; signs by the largest weight."""
    centred_CD = embedding_CD.astype(np.float64) - embedding_CD.mean(axis=0, dtype=np.float64)
    _, vectors_DD = np.linalg.eigh(centred_CD.T @ centred_CD)
    main_DK = vectors_DD[:, ::-1][:, :parts]
    largest_K = main_DK[np.abs(main_DK).argmax(axis=0), np.arange(main_DK.shape[1])]
    found_CK = centred_CD @ (main_DK * np.sign(largest_K))
    missing = parts - found_CK.shape[1]
    return np.pad(found_CK, ((0, 0), (0, max(missing, 0)))).astype(np.float32)


def main(words: list[str]) -> None:
    """Load and compile what is needed, then lay out what comes by stdin, until nothing comes for a while."""
    fitted, idle_s = int(words[0]), float(words[1])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    project(np.random.default_rng(SEED).normal(size=(64, 8)).astype(np.float32), fitted=32)
    while select.select([sys.stdin.buffer], [], [], idle_s)[0]:
        try:
            embedding_CD = _read(sys.stdin.buffer)
        except EOFError:
            return
        _write(out, project(embedding_CD, fitted=fitted))


if __name__ == "__main__":
    main(sys.argv[1:])
