"""The pieces in which the client asks: every cell once, within the limits, and answered alike wherever it stands."""

from __future__ import annotations

from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from test_serve_client import served, serving  # noqa: F401 - a fixture

from serve import client as client_module
from serve.answer import Answers
from serve.given import Given
from serve.question import cut_into_pieces
from serve.settings import Limits
from store.errors import InputRefused


def test_pieces_hold_every_cell_once_stay_small_and_are_like_all_cells() -> None:
    counts = csr_matrix(np.tril(np.ones((12, 12))))
    parts = list(cut_into_pieces(Given(12, {"RNA": (counts, [])}), 1_000, 10))
    assert sorted(row for part in parts for row in part.rows) == list(range(12))
    for part in parts:
        assert (part.measurements["RNA"][0] != counts[part.rows]).nnz == 0
        assert part.n_counts <= 10 or len(part.rows) == 1
    sorted_cells = csr_matrix(np.repeat([[1.0], [0.0]], [6, 4], axis=0))
    thirds = cut_into_pieces(Given(10, {"RNA": (sorted_cells, ["G0"])}), 4, 1_000)
    assert [(len(part.rows), part.n_counts) for part in thirds] == [(4, 2), (3, 2), (3, 2)]


def foreign_and_empty(at: int) -> anndata.AnnData:
    """Ten cells of G0: the one at a place has only counts of a gene that the model does not know, the next one none."""
    counts = np.tile([1.0, 0.0], (10, 1))
    counts[at], counts[(at + 1) % 10] = [0, 9], 0
    return anndata.AnnData(csr_matrix(counts), var=pd.DataFrame(index=["G0", "NOPE"]))


def test_a_cell_gets_the_same_answer_wherever_it_stands(
    served: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, transport = served
    monkeypatch.setattr(client_module, "CHUNK_CELLS", 3)
    for at in range(10):
        transport.bodies.clear()
        told = client.embed(foreign_and_empty(at))
        assert len(transport.bodies) == 4
        assert told.values[:, 0].tolist() == [0 if cell in (at, (at + 1) % 10) else 1 for cell in range(10)]


def test_a_cell_that_alone_lacks_a_measurement_may_be_empty_and_is_named_where_nothing_of_it_is_known(
    served: Any,  # noqa: F811
) -> None:
    client, _ = served
    rna = foreign_and_empty(3)
    proteins = anndata.AnnData(csr_matrix(np.ones((9, 1))), var=pd.DataFrame(index=["CD4"]))
    proteins.obs_names = [name for name in rna.obs_names if name != "4"]
    told = client.embed(mudata.MuData({"rna": rna, "prot": proteins}))
    assert told.values[:, :2].tolist() == [[1, 1]] * 3 + [[0, 1], [0, 0]] + [[1, 1]] * 5
    proteins.obs_names = [name for name in rna.obs_names if name != "3"]
    with pytest.raises(InputRefused, match=r"only 0\.0% of .*; so of the part with your 1 cells at positions 3$"):
        client.embed(mudata.MuData({"rna": rna, "prot": proteins}))


@pytest.mark.parametrize("unknown", [0, 1])
def test_of_cells_without_counts_the_server_is_told_more_than_one_feature(
    served: Any,  # noqa: F811
    unknown: int,
) -> None:
    client, _ = served
    names = ["G0", "G1"]
    names[unknown] = "NOPE"
    assert client.embed({"RNA": (csr_matrix((2, 2)), names)}).values[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    "limits",
    [{"cells": 4}, {"nonzeros": 8}, {"values": 30}, {"values": 3}, {"body_bytes": 1_600}, {"unpacked_bytes": 1_400}],
)
def test_calls_of_any_size_work_within_the_limits_of_the_server(limits: dict[str, int]) -> None:
    cells = [{"G0": number, "G1": 1} for number in range(1, 101)]
    with serving(Limits(**limits)) as (client, _):
        assert client.translate(cells, "protein").values[:, 0].tolist() == list(range(1, 101))
        assert client.embed(cells).values[:, 3].tolist() == list(range(1, 101))


@pytest.mark.parametrize("limits", [{"cells": 4}, {"nonzeros": 8}, {"values": 12}])
def test_limits_that_the_server_tells_are_kept_from_the_first_request(limits: dict[str, int]) -> None:
    with serving(Limits(**limits)) as (client, transport):
        client.translate([{"G0": 1, "G1": 1}] * 100, "protein")
        assert len(transport.bodies) == 25


@pytest.mark.parametrize("encoding", ["npz", "arrow"])
def test_counts_in_any_order_stay_those_of_their_features_when_a_part_is_sent_again(encoding: str) -> None:
    """A part that the server finds too large is sent once more, in halves."""
    rng, n_cells = np.random.default_rng(0), 400
    orders = np.concatenate([rng.permutation(8)[:4] for _ in range(n_cells)])
    data = rng.integers(1, 100, 4 * n_cells).astype(np.float32)
    counts_CF = csr_matrix((data, orders, np.arange(0, 4 * n_cells + 1, 4)), shape=(n_cells, 8))
    assert not counts_CF.has_sorted_indices
    with serving(Limits(body_bytes=12_000)) as (client, _):
        found = client.embed({"RNA": (counts_CF, [f"G{i}" for i in range(8)])}, encoding=encoding)
    assert found.values[:, 3].tolist() == counts_CF[:, [0]].toarray().ravel().tolist()


def test_one_cell_that_is_too_large_is_refused_as_the_server_does() -> None:
    with serving(Limits(nonzeros=1)) as (client, _), pytest.raises(InputRefused, match="send fewer cells"):
        client.embed([{"G0": 1, "G1": 1}])


def test_what_parts_warn_of_is_told_of_all_cells(
    served: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, _ = served
    counts = np.ones((2_500, 1), np.float32)
    counts[:1_100] = 0
    counts[-3:] = 1.5
    whole = client.embed({"RNA": (csr_matrix(counts), ["G0"])})
    assert len(whole.warnings) == 2
    assert whole.warnings[1] == "RNA: 1,100 cells have no counts that the model knows"
    assert whole.warnings[0].startswith("RNA: 0.2% of the values are no whole numbers")
    effects = client.perturb([{"G0": 1}, {}], ["G1", "G2"])
    assert effects[0].warnings == client.last.warnings == ["RNA: 1 cells have no counts that the model knows"]
    monkeypatch.setattr(client_module._Model, "effects", lambda *_, **__: 1)  # the same cells, asked about twice
    client.perturb([{"G0": 1}, {}], ["G1", "G2"])
    assert client.last.warnings == ["RNA: 1 cells have no counts that the model knows"]


def test_of_shares_that_parts_warn_of_the_largest_is_told_and_other_words_once() -> None:
    share, other = "RNA: {}% of the values are no whole numbers", "protein is taken as not measured: only 3.0% of them"
    replies = [{"warnings": [share.format(one), other], "provenance": {}} for one in ("9.5", "10.2", "0.1")]
    assert Answers(replies, np.arange(3)).report().warnings == [share.format("10.2"), other]
