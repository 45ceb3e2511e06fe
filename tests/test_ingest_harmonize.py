"""Names: genes to ids, obs to the lake's columns, perturbations to one way of writing; and what counts must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from ingest import check
from ingest.harmonize import map_genes, map_obs, map_plain, perturbation_name
from store.errors import InputRefused, MissingError

TABLE = """\
ENSG00000000001,AAA,1,1000,protein_coding
ENSG00000000002,BBB,2,2000,protein_coding
ENSG00000000003,CCC,3,3000,lncRNA
ENSG00000000004,CCC,4,4000,lncRNA
"""
MOUSE = "ENSMUSG00000000001,Actb,5,1500,protein_coding\n"


@pytest.fixture
def genes(tmp_path: Path) -> str:
    (tmp_path / "genes.csv").write_text(TABLE)
    return str(tmp_path / "genes.csv")


def var(*names: str, **columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=list(names))


def test_ensembl_ids_lose_their_version_and_keep_their_names() -> None:
    mapped = map_genes(var("ENSG00000000001.12", "ENSG00000000002", feature_name=["AAA", "BBB"]))
    assert mapped.features.feature_id == ["ENSG00000000001", "ENSG00000000002"]
    assert mapped.features.feature_name == ["AAA", "BBB"]
    assert mapped.notes == []


def test_ids_are_found_in_a_customary_column() -> None:
    mapped = map_genes(var("AAA", "BBB", gene_ids=["ENSG00000000001", "ENSG00000000002"]))
    assert mapped.features.feature_id == ["ENSG00000000001", "ENSG00000000002"]
    assert mapped.features.feature_name == ["AAA", "BBB"]


def test_symbols_become_ids_through_a_gene_table_unless_two_genes_share_them(genes: str) -> None:
    mapped = map_genes(var("BBB", "CCC", "novel", "AAA"), genes)
    assert mapped.features.feature_id == ["ENSG00000000002", "CCC", "novel", "ENSG00000000001"]
    assert mapped.features.feature_length == [2000, 0, 0, 1000]
    assert mapped.features.feature_type[0] == "protein_coding"
    assert "2 of 4 genes have no Ensembl id (CCC, novel, ...)" in mapped.notes[0]


def test_the_case_of_a_mouse_symbol_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "mouse.csv").write_text(MOUSE)
    assert map_genes(var("ACTB"), str(tmp_path / "mouse.csv")).features.feature_id == ["ENSMUSG00000000001"]


def test_columns_of_one_gene_are_summed_and_it_is_said(genes: str) -> None:
    mapped = map_genes(var("AAA", "BBB", "ENSG00000000001"), genes)
    assert len(mapped.features) == 2
    assert "1 features stand more than once" in mapped.notes[-1]
    counts = scipy.sparse.csr_matrix(np.array([[1, 2, 4], [0, 0, 8]], dtype=np.float32))
    assert mapped.apply(counts).toarray().tolist() == [[5, 2], [8, 0]]


def test_a_gene_table_that_is_missing_or_of_another_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such gene table"):
        map_genes(var("A"), str(tmp_path / "none.csv"))
    (tmp_path / "short.csv").write_text("a,b\n")
    with pytest.raises(InputRefused, match="5 columns"):
        map_genes(var("A"), str(tmp_path / "short.csv"))


def test_antibodies_and_peaks_keep_the_names_of_the_source() -> None:
    mapped = map_plain(var("CD3", "CD4"), "protein")
    assert mapped.features.feature_id == ["CD3", "CD4"]
    assert mapped.features.feature_type == ["protein", "protein"]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("STAT1", "STAT1"),
        ("STAT2+STAT1", "STAT1+STAT2"),
        ("STAT1+ctrl", "STAT1"),
        ("ctrl+ctrl", "control"),
        ("NT", "control"),
        ("NTg4", "control"),
        ("non-targeting", "control"),
        ("Non_Targeting", "control"),
        ("vehicle", "control"),
        ("", ""),
        (None, ""),
        (float("nan"), ""),
        ("unperturbed", ""),
        ("NTRK1", "NTRK1"),
        ("CTRL1", "control"),
    ],
)
def test_perturbations_are_written_in_one_way(given: object, written: str) -> None:
    assert perturbation_name(given) == written


def test_obs_columns_are_recognised_mapped_and_kept_aside() -> None:
    obs = pd.DataFrame(
        {
            "CellType": ["T", "B"],
            "bio_rep": ["r1", "r2"],
            "target_gene": ["NT", "STAT1"],
            "n_umi": [1, 2],
            "hours": [0, 6],
        },
        index=["c1", "c2"],
    )
    mapped, aside = map_obs(obs, {"time": "hours", "tissue": "=blood"})
    assert mapped["cell_id"].tolist() == ["c1", "c2"]
    assert mapped["cell_type"].tolist() == ["T", "B"]
    assert mapped["batch"].tolist() == ["r1", "r2"]
    assert mapped["perturbation"].tolist() == ["control", "STAT1"]
    assert mapped["perturbation_type"].tolist() == ["genetic", "genetic"]
    assert mapped["time"].tolist() == [0.0, 6.0]
    assert mapped["tissue"].tolist() == ["blood", "blood"]
    assert list(aside) == ["n_umi"]


def test_a_mapping_that_names_nothing_is_refused_with_what_there_is() -> None:
    obs = pd.DataFrame({"a": ["x"]}, index=["c"])
    with pytest.raises(InputRefused, match=r"obs.tisue: not a column of the lake"):
        map_obs(obs, {"tisue": "a"})
    with pytest.raises(InputRefused, match=r"no such column; columns: a"):
        map_obs(obs, {"tissue": "b"})
    with pytest.raises(InputRefused, match=r"obs.time: not numbers"):
        map_obs(obs, {"time": "a"})


def matrix(*rows: list[float]) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(np.array(rows, dtype=np.float64))


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite"), (-2.0, "negative"), (1.5, "not a whole number")]
)
def test_values_that_are_no_counts_are_shown_with_cell_and_feature(value: float, said: str) -> None:
    found = check.problems(matrix([1, 0, 2], [0, value, 0]), ["g0", "g1", "g2"], first_cell=10)
    assert len(found) == (2 if np.isfinite(value) else 1)  # and a guess at what the values are
    assert f"1 of 3 values are {said}" in found[0]
    assert "(cell 11, feature 'g1')" in found[0]


def test_whole_numbers_are_counts() -> None:
    assert check.problems(matrix([1, 0, 2], [0, 0, 300]), ["a", "b", "c"], 0) == []


def test_log1p_is_undone_where_that_is_exact() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (20, 50)).astype(float)
    counts[3] *= 2  # a cell whose smallest count is 2
    counts[:, 0] = rng.integers(1, 200, 20)
    scaled = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).round(3)
    restored = check.counts_from_log1p(scipy.sparse.csr_matrix(scaled), 0).toarray()
    even = counts.min(axis=1, where=counts > 0, initial=np.inf)
    halved = np.where((even == 2)[:, None] & (np.all(counts % 2 == 0, axis=1))[:, None], counts / 2, counts)
    assert np.array_equal(restored, halved)


def test_values_that_are_not_log1p_of_counts_are_refused() -> None:
    with pytest.raises(InputRefused, match="cell 7 holds no scaled counts"):
        check.counts_from_log1p(matrix([0.3, 0.41, 0.77, 1.13]), 7)
    with pytest.raises(InputRefused, match="negative or not finite"):
        check.counts_from_log1p(matrix([0.3, -0.4]), 0)
