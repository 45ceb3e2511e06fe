"""Levels (intensities, fractions) are served as the predictor takes them, in every form of a request."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_matrix
from small_checkpoint import PROTEINS, write_checkpoint
from starlette.testclient import TestClient

from serve.app import make_app
from serve.arrow import ARROW
from serve.npz import NPZ, write_npz
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from store.errors import InputRefused
from train.predictor import Predictor

LEVELS = csr_matrix((np.array([0, -1.5, 2, 0], np.float32), [0, 1, 1, 4], [0, 2, 4]), shape=(2, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "levels", levels=("protein",))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    replica = Replica(ServeSettings(checkpoint=str(folder)))
    with TestClient(make_app(replica, Limits()), raise_server_exceptions=False) as client:
        yield client
    replica.close()


def bodies() -> dict[str, tuple[bytes, str]]:
    rows = [[PROTEINS[i] for i in row] for row in ([0, 1], [1, 4])]
    values = [[0.0, -1.5], [2.0, 0.0]]
    csr = {
        "features": PROTEINS,
        "indptr": LEVELS.indptr.tolist(),
        "indices": LEVELS.indices.tolist(),
        "data": LEVELS.data.tolist(),
    }
    arrays: dict[str, Any] = {f"protein/{name}": np.array(part) for name, part in csr.items()}
    table = pa.table({"protein/features": rows, "protein/counts": values}, metadata={"request": "{}"})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    cells = [dict(zip(*row, strict=True)) for row in zip(rows, values, strict=True)]
    return {
        "cells": (json.dumps({"counts": {"protein": cells}}).encode(), "application/json"),
        "csr": (json.dumps({"counts": {"protein": csr}}).encode(), "application/json"),
        "npz": (write_npz({"request": b"{}", **arrays}), NPZ),
        "arrow": (stream.getvalue(), ARROW),
    }


@pytest.mark.parametrize("form", ["cells", "csr", "npz", "arrow"])
def test_served_levels_are_answered_as_by_the_predictor(client: TestClient, folder: Path, form: str) -> None:
    body, media = bodies()[form]
    response = client.post("/v1/embed", content=body, headers={"Content-Type": media})
    assert response.status_code == 200, response.text
    reply = response.json()
    predictor = Predictor.load(folder)
    expected = predictor.embed(predictor.cells({"protein": LEVELS}))
    np.testing.assert_allclose(np.array(reply["embeddings"]), expected, atol=1e-5)
    without = LEVELS.copy()
    without.eliminate_zeros()
    assert np.abs(predictor.embed(predictor.cells({"protein": without})) - expected).max() > 1e-3
    assert reply["warnings"] == []


def test_the_card_says_which_measurements_are_levels(client: TestClient) -> None:
    assert client.get("/v1/models").json()["models"][0]["levels"] == ["protein"]


def test_a_model_of_levels_alone_says_that_it_can_draw_no_counts(tmp_path: Path) -> None:
    predictor = Predictor.load(write_checkpoint(tmp_path / "all", levels=("RNA", "protein")))
    with pytest.raises(InputRefused, match="'protein' can be drawn; this model knows no measurement of counts"):
        predictor.draw(predictor.cells({}, {"organism": ["homo_sapiens"]}), "protein", 10.0)
