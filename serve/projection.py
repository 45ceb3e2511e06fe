"""This module lays cells out on a plane by UMAP of their embeddings, in a process of its own.

UMAP's libraries take seconds to load and hold the interpreter while they work. The child (``python -m
serve.projection``) is started before it is needed, loads them meanwhile, and then waits for the embeddings.

Shape letters used in this module:
    C  cells      D  size of an embedding      S  cells that UMAP is fitted to
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import DeadlineExceeded, Unavailable

SEED = 0
FEWEST = 15
"""Fewer cells have no neighbourhoods worth the name: they are shown on their principal components."""
NEIGHBOURS, MIN_DIST, PARTS = 15, 0.3, 30


class Projector:
    """A child that waits for embeddings; give it some once, or close it.

    Args:
        fitted: Most cells that UMAP is fitted to; the others are placed among them.
    """

    def __init__(self, fitted: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "serve.projection", str(fitted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def place(self, embedding_CD: NDArray[np.float32], timeout_s: float) -> NDArray[np.float32]:
        """Return position_C2; waits for it, so call it in a thread.

        Raises:
            DeadlineExceeded: It took too long.
            Unavailable: The child died.
        """
        file = io.BytesIO()
        np.save(file, embedding_CD, allow_pickle=False)
        try:
            answer, _ = self._child.communicate(file.getvalue(), timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise DeadlineExceeded(f"the cells could not be laid out within {timeout_s:g} s") from None
        if self._child.returncode or not answer:
            raise Unavailable("the process that lays cells out has died; try again, with fewer cells")
        return np.asarray(np.load(io.BytesIO(answer), allow_pickle=False))

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def project(embedding_CD: NDArray[np.float32], *, fitted: int) -> NDArray[np.float32]:
    """Return position_C2; the same embeddings have the same positions on one machine.

    Where there are more cells than ``fitted``, UMAP is fitted to so many of them, drawn at random, and each other cell
    is placed among those that it is like. Fewer than ``FEWEST`` cells lie on their first two principal components.
    """
    if len(embedding_CD) < FEWEST:
        return principal(embedding_CD, 2)
    import umap

    reduced_CD = principal(embedding_CD, PARTS) if embedding_CD.shape[1] > PARTS else embedding_CD
    chosen_S = np.arange(len(reduced_CD))
    if len(reduced_CD) > fitted:
        chosen_S = np.sort(np.random.default_rng(SEED).choice(len(reduced_CD), fitted, replace=False))
    model = umap.UMAP(n_neighbors=min(NEIGHBOURS, len(chosen_S) - 1), min_dist=MIN_DIST, init="pca", random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a seed means one thread
        placed_S2 = model.fit_transform(reduced_CD[chosen_S])
        position_C2 = np.empty((len(reduced_CD), 2), np.float32)
        position_C2[chosen_S] = placed_S2
        others = np.ones(len(reduced_CD), dtype=bool)
        others[chosen_S] = False
        if others.any():
            position_C2[others] = _among(reduced_CD[others], reduced_CD[chosen_S], placed_S2)
    return position_C2


def _among(
    embedding_CD: NDArray[np.float32], fitted_SD: NDArray[np.float32], placed_S2: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Place cells at the weighted mean of their nearest fitted cells; weights fall with distance."""
    from sklearn.neighbors import NearestNeighbors

    distance_CK, nearest_CK = NearestNeighbors(n_neighbors=5).fit(fitted_SD).kneighbors(embedding_CD)
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
    """Load the libraries, read embeddings from stdin, write positions to stdout."""
    out: Any = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    import sklearn.neighbors  # noqa: F401 - loaded while nobody waits
    import umap  # noqa: F401

    body = sys.stdin.buffer.read()
    if not body:
        return  # nobody needs it any more
    np.save(out, project(np.load(io.BytesIO(body), allow_pickle=False), fitted=int(words[0])), allow_pickle=False)
    out.close()


if __name__ == "__main__":
    main(sys.argv[1:])
