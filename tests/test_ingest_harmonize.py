"""Names: genes to ids, obs to the lake's columns, perturbations to one way of writing; and what counts must be."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from ingest import check, distinct
from ingest.harmonize import map_genes, map_plain, other_organism
from ingest.obs import map_obs
from ingest.perturbations import guide_target, perturbation_name
from ingest.quantities import read_quantity
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
    nameless = map_genes(var("ENSG00000000001.12", "ENSG00000000002", "MADE.UP.1"))
    assert nameless.features.feature_name == ["ENSG00000000001", "ENSG00000000002", "MADE.UP.1"]


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


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int8, np.uint16, np.int32])
def test_sums_of_one_genes_columns_do_not_wrap_in_the_files_own_type(kind: type) -> None:
    largest = 1 if kind is np.bool_ else int(np.iinfo(kind).max)
    mapped = map_genes(var("ENSG00000000001", "ENSG00000000002", "ENSG00000000001.7"))
    counts = scipy.sparse.csr_matrix(np.array([[largest, 1, largest], [0, 1, 1]], dtype=kind))
    assert mapped.apply(counts).toarray().tolist() == [[2 * largest, 1], [1, 1]]


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
        ("KLF1, CEBPA", "CEBPA+KLF1"),
        ("KLF1|CEBPA", "CEBPA+KLF1"),
        ("2,4-dinitrophenol", "2,4-dinitrophenol"),
        ("N,N-dimethyltryptamine+DMSO", "N,N-dimethyltryptamine"),
        ("1,25-dihydroxyvitamin D3", "1,25-dihydroxyvitamin D3"),
        ("NKX2-1,T1R3", "NKX2-1+T1R3"),
        ("STAT1,ctrl", "STAT1"),
        ("T,ctrl", "T"),
        ("3-MA,DMSO", "3-MA"),
        ("Hydroxyzine, dihydrochloride", "Hydroxyzine, dihydrochloride"),
        ("TNF, alpha", "TNF, alpha"),
        ("WT1", "WT1"),
        ("GPBS", "GPBS"),
        ("SIX1", "SIX1"),
        ("MOCKS1", "MOCKS1"),
        *(
            (word, "control")
            for word in (
                "NTC",
                "NTC_12",
                "sgNTC",
                "sgNT-1",
                "non-targeting control",
                "Non-Targeting-Human-0012",
                "scramble",
                "untreated",
                "unstimulated",
                "mock",
                "PBS",
                "Medium",
                "no_treatment",
                "WT",
                "vehicle control",
                "DMSO 0.1%",
                "0.1% DMSO",
                "DMSO_TF",
                "Dimethyl Sulfoxide",
                "safe-harbor",
                "intergenic",
                "Control siRNA",
                "NegCtrl0",
            )
        ),
        ("(+)-JQ1", "(plus)-JQ1"),
        ("STAT1+(+)-JQ1|DMSO", "(plus)-JQ1+STAT1"),
        ("(+/-)-verapamil", "(\u00b1)-verapamil"),
        ("(-)-nutlin-3+(+-)-nutlin-3", "(-)-nutlin-3+(\u00b1)-nutlin-3"),
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
    found = map_obs(obs, {"time": "hours", "tissue": "=blood"})
    mapped, aside = found.frame, found.aside
    assert found.notes == ["perturbation: taken for controls: 'NT'"]
    assert mapped["cell_id"].tolist() == ["c1", "c2"]
    assert mapped["cell_type"].tolist() == ["T", "B"]
    assert mapped["batch"].tolist() == ["r1", "r2"]
    assert mapped["perturbation"].tolist() == ["control", "STAT1"]
    assert mapped["perturbation_type"].tolist() == ["genetic", "genetic"]
    assert mapped["time"].tolist() == [0.0, 6.0]
    assert mapped["tissue"].tolist() == ["blood", "blood"]
    assert list(aside) == ["target_gene", "n_umi"]


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


HGNC = """\
symbol\tprev_symbol\talias_symbol\tensembl_gene_id
AAA\tOLDA\tAKA|SHARED\tENSG00000000001
BBB\tOLDB|AKA\tSHARED\tENSG00000000002
NONE\tOLDN\t\t
"""


def test_former_symbols_and_aliases_are_found_unless_two_genes_share_them(genes: str, tmp_path: Path) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    mapped = map_genes(var("OLDA", "AKA", "SHARED", "OLDN"), genes, str(tmp_path / "hgnc.txt"))
    # AKA was the name of BBB and is an alias of AAA: a former name wins
    assert mapped.features.feature_id == ["ENSG00000000001", "ENSG00000000002", "SHARED", "OLDN"]
    assert "2 genes found by a former or alias symbol (OLDA, AKA, ...)" in mapped.notes[0]
    assert mapped.mapped == 0.5
    with pytest.raises(InputRefused, match="not HGNC's complete set"):
        map_genes(var("x"), None, genes)


def test_a_former_symbol_stays_apart_where_the_source_has_the_present_one_too(genes: str, tmp_path: Path) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    mapped = map_genes(var("OLDA", "AAA", "OLDB"), genes, str(tmp_path / "hgnc.txt"))
    assert mapped.features.feature_id == ["OLDA", "ENSG00000000001", "ENSG00000000002"]
    assert "1 former or alias symbols kept apart: OLDA beside AAA" in mapped.notes
    assert not any("summed" in note for note in mapped.notes)


def test_symbols_that_several_genes_carry_are_said_to_be_and_hgnc_says_which_is_meant(
    genes: str, tmp_path: Path
) -> None:
    (note,) = map_genes(var("AAA", "CCC"), genes).notes
    assert f"several genes of {genes} carry their symbols; hgnc=FILE says which is meant" in note
    assert "or 1 carried by several genes there (CCC, ...)" in map_genes(var("CCC", "novel"), genes).notes[0]
    (tmp_path / "hgnc.txt").write_text(f"{HGNC}CCC\t\t\tENSG00000000003\n")
    found = map_genes(var("AAA", "CCC"), genes, str(tmp_path / "hgnc.txt"))
    assert found.features.feature_id == ["ENSG00000000001", "ENSG00000000003"]
    assert found.notes == ["1 genes whose symbol several carry found by HGNC (CCC, ...)"]


def test_genes_that_are_summed_are_all_named_up_to_ten(genes: str) -> None:
    note = map_genes(var("AAA", "ENSG00000000001", "BBB", "ENSG00000000002.3", "AAA"), genes).notes[-1]
    assert note == (
        "3 features stand more than once, their counts are summed: ENSG00000000001 (AAA + ENSG00000000001), "
        "ENSG00000000002 (BBB + ENSG00000000002.3)"
    )
    many = var(*[f"g{number // 2}" for number in range(30)])
    assert "g9 (g9) and 5 more" in map_genes(many).notes[-1]


def test_genes_that_are_only_numbered_go_by_the_column_that_names_them_and_are_refused_without(genes: str) -> None:
    for column in ("gene_name", "index"):
        mapped = map_genes(var("0", "1", "2", **{column: ["G1", "AAA", "BBB"]}), genes)
        assert mapped.features.feature_id == ["G1", "ENSG00000000001", "ENSG00000000002"]
        assert f"called by its column {column!r}" in mapped.notes[0]
    mapped = map_genes(pd.DataFrame({"gene_name": ["A", None, np.nan, ""]}, index=["4", "5", "6", "7"]))
    assert mapped.features.feature_id == mapped.features.feature_name == ["A", "5", "6", "7"]
    assert "3 without a name stand as their number" in mapped.notes[0]
    with pytest.raises(InputRefused, match=r"only numbered \(0 to 2\), and no column of var names them"):
        map_genes(var("0", "1", "2"))
    assert map_genes(var("7157", "672")).features.feature_id == ["7157", "672"], "Entrez ids"


def test_what_stands_for_an_id_is_told_from_a_symbol() -> None:
    mapped = map_genes(var("probe1", "probe2", gene_symbol=["A", "A"]))
    assert mapped.features.feature_id == ["probe1", "probe2"]
    assert "the names that var's index gives them stand as ids" in mapped.notes[0]


def test_a_genomes_name_before_genes_goes_where_all_have_it_and_tells_organisms_apart_where_not(genes: str) -> None:
    one = map_genes(var("hg19_AAA", "hg19_ENSG00000000002.4", "hg19_novel"), genes)
    assert one.features.feature_id == ["ENSG00000000001", "ENSG00000000002", "novel"]
    two = map_genes(var(*[f"GRCh38_ENSG{n:011d}" for n in range(9)], *[f"mm10___Gene{n}" for n in range(9)]))
    assert two.features.feature_id[0] == "ENSG00000000000"
    told = other_organism(two.features, "homo_sapiens", said=False)
    assert "9 of 18 genes are of mus_musculus by their ids (mm10___Gene0, ...), not of homo_sapiens; give each" in told
    assert "they are kept under homo_sapiens" in other_organism(two.features, "homo_sapiens", said=True)
    few = map_genes(var(*[f"ENSG{n:011d}" for n in range(95)], *[f"ENSMUSG{n:011d}" for n in range(5)]))
    assert other_organism(few.features, "homo_sapiens", said=False) == ""


def test_published_old_symbols_are_rescued(shared_data: Path) -> None:
    reference = shared_data / "ref/gencode"
    table, hgnc = str(reference / "genes_homo_sapiens.csv.gz"), str(reference / "hgnc_complete_set.txt.gz")
    genes = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad", backed="r").var
    before, after = map_genes(genes, table), map_genes(genes, table, hgnc)
    assert after.mapped > before.mapped + 0.03
    found = dict(zip(after.features.feature_name, after.features.feature_id, strict=True))
    assert found["ATPIF1"] == "ENSG00000130770"


def test_values_that_do_not_add_up_keep_twice_named_features_apart() -> None:
    mapped = map_plain(var("p", "q", "p"), "peptide", sums=False)
    assert mapped.features.feature_id == ["p", "q", "p#2"]


@pytest.mark.parametrize(
    ("given", "numbers", "unit"),
    [
        (["1", "2.5", ""], [1.0, 2.5, np.nan], None),
        (["50 uM", "10nM"], [50.0, 10.0], ["uM", "nM"]),
        (["d8", "E3.5", "6 HR"], [8.0, 3.5, 6.0], ["day", "day", "hour"]),
        ([0.5, None], [0.5, np.nan], None),
    ],
)
def test_quantities_are_read_with_their_units(
    given: list[object], numbers: list[float], unit: list[str] | None
) -> None:
    found = read_quantity(pd.Series(given))
    assert found is not None
    assert np.array_equal(found[0], numbers, equal_nan=True)
    assert (None if found[1] is None else found[1].tolist()) == unit


def test_what_is_no_quantity_stays_beside_and_a_column_asked_for_must_be_one() -> None:
    assert read_quantity(pd.Series(["1+1", "x"])) is None
    found = map_obs(pd.DataFrame({"dose": ["1+1", "2"]}), {})
    assert "dose" not in found.frame
    assert list(found.aside) == ["dose"]
    assert found.notes == ["dose: column 'dose' is left aside: '1+1' is no quantity"]
    found = map_obs(pd.DataFrame({"dose": ["10 M", "1 m", "vehicle"], "time": ["10 M", "1 d", "baseline"]}), {})
    assert found.frame["dose_unit"].tolist()[:2] == ["M", "m"]
    assert found.frame["dose"].isna().tolist() == [False, False, True]
    assert found.frame["time_unit"].tolist()[:2] == ["M", "day"], "months, or minutes"
    assert "time: units kept as they are: M; say obs.time_unit==day" in found.notes[0]
    found = map_obs(pd.DataFrame({"dose": [".5", "1. uM", "DMSO 0.1%"]}), {})
    assert found.frame["dose"].tolist()[:2] == [0.5, 1.0]
    assert found.frame["dose_unit"].tolist() == ["", "uM", ""]
    assert "'inf' is no quantity" in map_obs(pd.DataFrame({"dose": ["inf", "1 uM"]}), {}).notes[0]
    found = map_obs(pd.DataFrame({"time": ["6 mo", "P7", "3 weeks", "2 min"]}), {})
    assert found.frame["time_unit"].tolist() == ["month", "day", "week", "minute"]
    with pytest.raises(InputRefused, match="not numbers"):
        map_obs(pd.DataFrame({"amount": ["low", "high"]}), {"dose": "amount"})


def test_units_are_written_in_one_way_whether_a_column_of_their_own_or_the_number_says_them() -> None:
    micro, mu = "\N{MICRO SIGN}M", "\N{GREEK SMALL LETTER MU}M"
    own = pd.DataFrame({"dose": [1.0] * 6, "dose_unit": ["um", micro, mu, "NM", "ug/ml", None], "time": [2.0] * 6})
    own["time_unit"] = ["h", "Hours", "hr ", "d", "passages", "M"]
    found = map_obs(own, {})
    assert found.notes == ["time: units kept as they are: M, passages; say obs.time_unit==day, or what it is"]
    frame = found.frame
    assert frame["dose_unit"].tolist()[:5] == ["uM", "uM", "uM", "nM", "ug/mL"]
    assert frame["dose_unit"].isna().tolist() == [False] * 5 + [True]
    assert frame["time_unit"].tolist() == ["hour", "hour", "hour", "day", "passages", "M"]
    frame = map_obs(pd.DataFrame({"dose": [f"1 {micro}", f"2{mu}", "3 um", "4 mM"]}), {}).frame
    assert frame["dose_unit"].tolist() == ["uM", "uM", "uM", "mM"]
    for doses in ({"dose": ["1 U/mL", "2 uM"]}, {"dose": [1.0, 2.0], "dose_unit": ["U/mL", "unknown"]}):
        notes = map_obs(pd.DataFrame(doses), {}).notes
        assert notes == ["dose: units kept as they are: U/mL; say obs.dose_unit==uM, or what it is"]
    assert set(map_obs(pd.DataFrame({"time": [1.0, 2.0]}), {"time_unit": "=h"}).frame["time_unit"]) == {"hour"}


@pytest.mark.parametrize(
    ("names", "organism", "said", "found"),
    [
        ([f"ENSMUSG{number:011d}" for number in range(9)], "homo_sapiens", False, "say organism=mus_musculus"),
        ([f"ENSG{number:011d}" for number in range(9)], "mus_musculus", True, "are of homo_sapiens"),
        ([f"ENSG{number:011d}" for number in range(9)], "homo_sapiens", False, ""),
        ([f"WBGene{number:08d}" for number in range(9)], "homo_sapiens", False, "say organism=caenorhabditis_elegans"),
        (
            ["Sox17", "Xkr4", "Rp1", "Actb", "H2-K1", "mt-Co1", "ENSG00000139618"],
            "homo_sapiens",
            False,
            "mice and rats",
        ),
        (["Sox17", "Xkr4", "Rp1", "Actb"], "homo_sapiens", True, ""),
        (["Sox17", "Xkr4", "Rp1", "Actb"], "rattus_norvegicus", True, ""),
        (["SOX17", "XKR4", "C1orf112", "ACTB", "Xkr4"], "homo_sapiens", False, ""),
        ([f"Gene{number}" for number in range(90)], "homo_sapiens", False, ""),
        ([f"gene{number}" for number in range(90)], "homo_sapiens", False, ""),
    ],
)
def test_genes_of_another_organism_are_known_by_ids_and_names(
    names: list[str], organism: str, said: bool, found: str
) -> None:
    told = other_organism(map_plain(var(*names), "gene").features, organism, said=said)
    assert found in told
    assert bool(found) == bool(told)


def test_guides_name_their_targets_and_genes_with_numbers_stay_genes() -> None:
    guides = ["ATF2g1", "STAT1_sg2", "CD4", "NKX2-1", "ATF2g1+CD4_2", "NTg4", "non-targeting_3", "HLA-A"]
    targets = ["ATF2", "STAT1", "CD4", "NKX2-1", "ATF2+CD4", "control", "control", "HLA-A"]
    assert [perturbation_name(guide_target(guide)) for guide in guides] == targets
    assert perturbation_name(guide_target("KLF1_NegCtrl0")) == "KLF1"
    assert perturbation_name(guide_target("NegCtrl0_NegCtrl1")) == "control"
    frame = map_obs(pd.DataFrame({"guide_id": ["ATF2g1", "NTg4"]}), {}).frame
    assert frame["perturbation"].tolist() == ["ATF2", "control"]
    assert frame["perturbation_id"].tolist() == ["ATF2g1", "NTg4"]


def test_kinds_of_perturbation_come_to_the_lakes_words() -> None:
    given = {
        "perturbation": ["A", "imatinib", "IFNB", "x", "A", "A"],
        "perturbation_type": ["CRISPRi", "Drug", "cytokine stimulation", "heat", "CRISPRa", "overexpression"],
    }
    found = map_obs(pd.DataFrame(given), {})
    kinds = ["genetic", "drug", "stimulation", "heat", "activation", "activation"]
    assert found.frame["perturbation_type"].tolist() == kinds
    assert found.aside["perturbation_type"].tolist() == given["perturbation_type"], "words that were changed are kept"
    same = map_obs(pd.DataFrame({"perturbation": ["A"], "perturbation_type": ["genetic"]}), {})
    assert list(same.aside) == []


def test_it_is_said_what_is_taken_for_a_control_and_when_nothing_is() -> None:
    treated = pd.DataFrame({"treatment": ["rest", "IFNb", "rest"]})
    assert map_obs(treated, {}).notes == [
        "perturbation: none is known; if column 'treatment' holds them, say obs.perturbation=treatment"
    ]
    found = map_obs(treated, {"perturbation": "treatment"})
    assert found.frame["perturbation"].tolist() == ["rest", "IFNb", "rest"]
    assert "none of 'IFNb', 'rest' is a control; if one is, say controls=" in found.notes[0]
    found = map_obs(treated, {"perturbation": "treatment"}, ["rest"])
    assert found.frame["perturbation"].tolist() == ["control", "IFNb", "control"]
    assert found.notes == ["perturbation: taken for controls: 'rest'"]
    assert perturbation_name("none, or PBS", ["none, or PBS"]) == "control"


def test_cells_of_a_screen_whose_guide_nobody_found_are_no_controls() -> None:
    lost = [None, np.nan, "nan", "unassigned", "Doublet", "negative", "ambiguous", "A+Doublet"]
    words = ["STAT1", "non-targeting", *lost, "none", "unperturbed"]
    found = map_obs(pd.DataFrame({"perturbation": words}), {})
    assert list(found.frame["perturbation"]) == ["STAT1", "control", *["unknown"] * 8, "", ""]
    assert list(found.frame["perturbation_type"]) == ["genetic", "genetic", *["unknown"] * 8, "none", "none"]
    assert any("not known of 8 cells" in note and 'controls=["' in note for note in found.notes)
    assert list(found.aside) == ["perturbation"]
    plain = map_obs(pd.DataFrame({"perturbation": ["ctrl", None, "unassigned"]}), {})
    assert list(plain.frame["perturbation"]) == ["control", "", ""], "where nothing was perturbed, nothing is lost"
    meant = map_obs(pd.DataFrame({"perturbation": ["STAT1", None, "negative"]}), {}, ["nan", "negative"])
    assert list(meant.frame["perturbation"]) == ["STAT1", "control", "control"]


def test_a_condition_is_taken_where_it_is_written_as_gears_writes_it() -> None:
    written = map_obs(pd.DataFrame({"condition": ["ctrl", "KLF1+ctrl", "ctrl+CEBPA", "KLF1+CEBPA"]}), {})
    assert list(written.frame["perturbation"]) == ["control", "KLF1", "CEBPA", "CEBPA+KLF1"]
    assert list(written.aside) == ["condition"], "words that were changed are kept"
    for words in (["ctrl", "IFNB"], ["ctrl", "ctrl"], ["A+ctrl", "B+ctrl"]):
        other = map_obs(pd.DataFrame({"condition": words}), {})
        assert "perturbation" not in other.frame
        assert list(other.aside) == ["condition"]


def test_doses_of_what_is_called_genetic_are_pointed_out() -> None:
    screen = {"perturbation": ["DMSO", "JQ1"], "dose": ["vehicle", "1 uM"]}
    assert "if it is drugs, say obs.perturbation_type==drug" in map_obs(pd.DataFrame(screen), {}).notes[0]
    said = map_obs(pd.DataFrame(screen), {"perturbation_type": "=drug"})
    assert said.notes == ["perturbation: taken for controls: 'DMSO'"]
    assert said.frame["perturbation_type"].tolist() == ["drug", "drug"]


def test_names_of_cells_that_do_not_tell_them_apart_do_not_replace_those_that_do() -> None:
    obs = pd.DataFrame({"cell_id": ["1", "1"]}, index=["a", "b"])
    assert map_obs(obs, {}).frame["cell_id"].tolist() == ["a", "b"]
    assert list(map_obs(obs, {}).aside) == ["cell_id"]


def test_ids_are_found_in_whichever_column_has_them() -> None:
    frame = pd.DataFrame({"n": [1, 2], "Ensembl_ID": [f"ENSG{number:011d}.4" for number in (1, 2)]}, index=["A", "B"])
    assert map_genes(frame).features.feature_id == ["ENSG00000000001", "ENSG00000000002"]


@pytest.mark.parametrize(
    ("values", "guess"),
    [
        ([[0.5, 0.7], [1.2, 0.1], [0.3, 0.4]], "no value reaches 40"),
        (
            [[999_999.5, 0.5], [400_000.25, 599_999.75], [0.5, 999_999.5]],
            "every cell sums to 1,000,000: CPM, TPM or RPKM",
        ),
        ([[-1.0, 0.5], [0.3, 0.2], [0.1, 0.1]], "scaled or centred"),
    ],
)
def test_the_guess_at_what_values_are_instead_of_counts(values: list[list[float]], guess: str) -> None:
    assert guess in check.looks_like(scipy.sparse.csr_matrix(np.array(values)))


def test_counts_are_not_kept_as_logarithms() -> None:
    counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (60, 40)).astype(np.float32))
    names = [str(number) for number in range(40)]
    assert "whole numbers up to" in check.lognorm_problems(counts, names, 0)[0]
    assert check.lognorm_problems(counts.log1p(), names, 0) == []
    assert check.lognorm_problems(counts[:2], names, 0) == [], "too few to tell"


def test_log_normalised_counts_are_recognised_by_their_sums() -> None:
    counts = np.array([[1, 4, 5], [2, 2, 6], [7, 1, 1], [3, 3, 4]])
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    assert "exp(x)-1 sums to 10,000 in every cell" in check.looks_like(scipy.sparse.csr_matrix(values))


def test_a_cells_digest_depends_on_names_and_counts_only() -> None:
    digests = np.array([11, 22, 33], np.uint64)
    counts = scipy.sparse.csr_matrix(np.array([[1, 0, 2], [0, 3, 0], [0, 0, 0]], np.float32))
    found = check.cell_digests(counts, digests)
    turned_round = check.cell_digests(scipy.sparse.csr_matrix(counts[:, ::-1]), digests[::-1].copy())
    assert np.array_equal(found, turned_round)
    assert found[2] == 0
    assert len(set(found.tolist())) == 3
    other = counts.copy()
    other.data[0] = 2
    assert check.cell_digests(other, digests)[0] != found[0]


def test_work_on_distinct_values_gives_what_work_on_cells_gives() -> None:
    values = pd.Series(["NTg1", None, "ctrl", "B+A", "A+B", "NTg1"], dtype=object)
    expected = [perturbation_name(value) for value in values]
    for given in (values, values.astype("category")):
        changed = distinct.changed(given, perturbation_name)
        assert list(changed) == expected == ["control", "", "control", "A+B", "A+B", "control"]
        assert changed.categories.is_unique


def test_a_category_that_no_cell_has_is_not_looked_at() -> None:
    primary = pd.Categorical(["True", "False"], categories=["True", "False", "perhaps"])
    time = pd.Categorical(["6 HR", "2 HR"], categories=["6 HR", "2 HR", "late"])
    frame = map_obs(pd.DataFrame({"is_primary_data": primary, "time": time}, index=["a", "b"]), {}).frame
    assert list(frame["is_primary_data"]) == [True, False]
    assert list(frame["time"]) == [6, 2]
    assert list(frame["time_unit"]) == ["hour", "hour"]


@pytest.mark.parametrize(
    "donors",
    [
        pd.array([1, 2, None], dtype="Int64"),
        np.array([1.0, 2.0, np.nan]),
        pd.Categorical([1.0, 2.0, np.nan]),
        pd.Categorical(["1", "2", None]),
    ],
)
def test_a_number_that_names_a_donor_is_written_alike_whether_others_are_missing_or_not(donors: object) -> None:
    index = ["a", "b", "c"]
    some = map_obs(pd.DataFrame({"donor_id": donors}, index=index), {}).frame["donor_id"]
    assert some.tolist()[:2] == ["1", "2"]
    assert pd.isna(some[2])
    whole = map_obs(pd.DataFrame({"donor_id": [1, 2, 3], "cell_type": [0.5, 1, 2]}, index=index), {}).frame
    assert whole["donor_id"].tolist() == ["1", "2", "3"]
    assert whole["cell_type"].tolist() == ["0.5", "1", "2"]


@pytest.mark.parametrize("primary", [pd.array([True, None, False], dtype="boolean"), ["true", None, "False"]])
def test_cells_of_which_nobody_said_whether_they_are_primary_are_counted(primary: object) -> None:
    found = map_obs(pd.DataFrame({"is_primary_data": primary}, index=["a", "b", "c"]), {})
    assert found.frame["is_primary_data"].tolist() == [True, True, False]
    assert found.notes == ["is_primary_data: not said of 1 cells, which count as primary"]


@pytest.mark.parametrize(
    ("given", "days", "said"),
    [
        (["day-0", "day-8"], [0, 8], "'day-8' is read as 8, for every word has a hyphen"),
        (["day-8", "baseline"], [8, np.nan], "'day-8' is read as 8"),
        (["D-7", "D0", "D7"], [-7, 0, 7], "'D-7' is read as -7, for a hyphen behind a word is a sign where"),
        (["day -8", "day 0"], [-8, 0], ""),
        (["-8 days", "3 days"], [-8, 3], ""),
    ],
)
def test_a_hyphen_behind_a_word_joins_where_all_words_have_it_and_is_a_sign_elsewhere(
    given: list[str], days: list[float], said: str
) -> None:
    found = map_obs(pd.DataFrame({"time": given}), {})
    assert np.array_equal(found.frame["time"], days, equal_nan=True)
    assert len(found.notes) == bool(said)
    assert said in "".join(found.notes)


def test_a_number_without_a_unit_beside_those_with_one_is_noted() -> None:
    (note,) = map_obs(pd.DataFrame({"time": ["E14.5", "0"]}), {}).notes
    assert note.startswith("time: 1 cells have a number without a unit (such as 0), others day; ")
    assert map_obs(pd.DataFrame({"time": ["E14.5", "0"]}), {"time_unit": "=day"}).notes == []
