"""Labels and ontology ids: what is filled in, what is a problem, what is only said."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd
import pytest

from ingest.ontology import COLUMNS, resolve

KNOWN = [*COLUMNS, *(f"{name}_ontology_term_id" for name in COLUMNS)]


def obs(**columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def test_labels_get_ids_by_name_by_exact_synonym_and_blind_to_case() -> None:
    found = resolve(obs(cell_type=["B cell", "b lymphocyte", "unknown", "na"]), "homo_sapiens")
    assert found.obs["cell_type_ontology_term_id"].tolist() == ["CL:0000236", "CL:0000236", "unknown", "unknown"]
    assert found.obs["cell_type"].tolist() == ["B cell", "B cell", "unknown", "unknown"]
    assert (found.problems, found.notes) == (
        [],
        ["cell_type: labels written as their terms are: 'b lymphocyte' is 'B cell'"],
    )


def test_ids_get_labels_and_the_input_stays_as_it_was() -> None:
    given = obs(tissue_ontology_term_id=["UBERON:0000178", "UBERON:0002048"])
    found = resolve(given, "homo_sapiens")
    assert found.obs["tissue"].tolist() == ["blood", "lung"]
    assert found.obs["tissue_general"].tolist() == ["blood", "lung"]
    assert list(given.columns) == ["tissue_ontology_term_id"]


def test_words_that_everybody_uses_are_understood() -> None:
    found = resolve(obs(sex=["F", "male"], disease=["healthy", "lung cancer"]), "homo_sapiens")
    assert found.obs["sex_ontology_term_id"].tolist() == ["PATO:0000383", "PATO:0000384"]
    assert found.obs["disease"].tolist() == ["normal", "lung cancer"]
    assert found.obs["disease_ontology_term_id"].tolist() == ["PATO:0000461", "MONDO:0008903"]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("disease", ["HF", "MM", "EAE", "DS", "LN", "old", "young", "female", "mixed", "red", "p"]),
        ("tissue", ["T1", "SP", "PFC", "RA", "N", "LI", "MB", "AT", "P1", "S1", "DG", "20", "HeLa"]),
        ("cell_type", ["VEC", "PD"]),
        ("sex", ["normal", "p", "red"]),
        ("assay", ["A", "control", "HeLa", "RBC"]),
    ],
)
def test_abbreviations_and_words_of_other_things_are_taken_for_no_term(column: str, labels: list[str]) -> None:
    found = resolve(obs(**{column: labels}), "homo_sapiens")
    assert found.obs[column].tolist() == labels
    assert set(found.obs[f"{column}_ontology_term_id"]) == {"unknown"}
    assert len(found.notes) == 1
    assert "no ontology term for" in found.notes[0]


def test_a_label_that_a_synonym_replaces_is_named_and_short_ones_count_where_they_mean_one_thing() -> None:
    found = resolve(obs(cell_type=["Treg", "pDC"], disease=["COPD", "T2D"], tissue=["CSF", "fat"]), "homo_sapiens")
    assert found.obs["cell_type"].tolist() == ["regulatory T cell", "plasmacytoid dendritic cell"]
    assert found.obs["disease"].tolist() == ["chronic obstructive pulmonary disease", "type 2 diabetes mellitus"]
    assert found.obs["tissue"].tolist() == ["cerebrospinal fluid", "adipose tissue"]
    assert [note.split(":")[0] for note in found.notes] == ["cell_type", "disease", "tissue"]
    assert all("labels written as their terms are" in note for note in found.notes)
    assert "'fat' is 'adipose tissue'" in found.notes[2]


def test_a_label_is_a_cell_lines_where_its_cells_are_said_to_be_of_lines() -> None:
    said = obs(tissue=["HeLa", "PFC", "PFC", "lung"], tissue_type=["cell line", "tissue", "cell line", "tissue"])
    found = resolve(said, "homo_sapiens")
    assert found.obs["tissue_ontology_term_id"].tolist() == ["CVCL_0030", "unknown", "unknown", "UBERON:0002048"]
    silent = resolve(obs(tissue=["HeLa"]), "homo_sapiens")
    assert silent.notes[0].endswith("where they are names of cell lines, say obs.tissue_type==cell line")


def test_what_older_schemas_say_behind_an_id_of_a_tissue_is_its_kind() -> None:
    terms = ["UBERON:0002048 (organoid)", "CL:0000084 (cell culture)", "UBERON:0002048"]
    given = obs(tissue_ontology_term_id=terms, tissue=["lung (organoid)", "T cell (cell culture)", "lung"])
    found = resolve(given, "homo_sapiens")
    assert found.problems == []
    assert found.obs["tissue_ontology_term_id"].tolist() == ["UBERON:0002048", "CL:0000084", "UBERON:0002048"]
    assert found.obs["tissue"].tolist() == ["lung", "T cell", "lung"]
    assert found.obs["tissue_type"].tolist() == ["organoid", "cell culture", "tissue"]
    assert found.respelt == ["tissue"]
    assert "is read as tissue_type" in found.notes[0]


def test_a_long_label_is_cut_in_messages() -> None:
    found = resolve(obs(cell_type=["\u00e9" * 5000], sex_ontology_term_id=["x" * 5000]), "homo_sapiens")
    assert max(map(len, [*found.notes, *found.problems])) < 300


def test_a_typing_error_is_kept_and_the_nearest_term_offered() -> None:
    found = resolve(obs(cell_type=["classical monocite"] * 3), "homo_sapiens")
    assert found.obs["cell_type"].tolist() == ["classical monocite"] * 3
    assert found.obs["cell_type_ontology_term_id"].tolist() == ["unknown"] * 3
    assert "'classical monocite' (3 cells, did you mean 'classical monocyte'?)" in found.notes[0]


@pytest.mark.parametrize(
    ("label", "term"),
    [
        ("B cells", "B cell"),
        ("Fibroblasts", "fibroblast"),
        ("NK", "natural killer cell"),
        ("Dendritic", "dendritic cell"),
        ("plasma_cells", "plasma cell"),
        ("Memory B", "memory B cell"),
        ("CD14+ Monocytes", "CD14-positive monocyte"),
        ("CD14+/CD16+ monocyte", "CD14-positive, CD16-positive monocyte"),
        ("CD4+ T", "CD4-positive, alpha-beta T cell"),
        ("CD8 T cells", "CD8-positive, alpha-beta T cell"),
        ("EC", ""),
        ("ECs", ""),
        ("B", ""),
        ("Alpha", ""),
        ("alpha cell", ""),
        ("alpha cells", ""),
        ("K cells", ""),
        ("VIP", ""),
        ("Heart", ""),
        ("Stalk", ""),
        ("Double negative T", ""),
        ("Motile", ""),
        ("Cells", ""),
        ("CD16+ Monocytes", "CD14-positive, CD16-positive monocyte"),
        ("CD4 T cell", "CD4-positive, alpha-beta T cell"),
        ("19", ""),
        ("CD4+/CD45RA+/CD25- Naive T", ""),
        ("FCGR3A+ Monocytes", ""),
    ],
)
def test_cell_types_are_understood_as_people_spell_them_and_abbreviations_left_alone(label: str, term: str) -> None:
    found = resolve(obs(cell_type=[label] * 2), "homo_sapiens")
    assert found.obs["cell_type"].tolist() == [term or label] * 2
    assert (found.obs["cell_type_ontology_term_id"] != "unknown").all() == bool(term)
    said = f"labels written as their terms are: {label!r} is {term!r}" if term else f"no ontology term for {label!r}"
    assert len(found.notes) == 1
    assert said in found.notes[0]
    if label == "19":
        assert "did you mean" not in found.notes[0]


@pytest.mark.parametrize(
    ("label", "organism", "term"),
    [
        ("45 years", "homo_sapiens", "45-year-old stage"),
        ("45 yr old", "homo_sapiens", "45-year-old stage"),
        ("45y", "homo_sapiens", "45-year-old stage"),
        ("6 months", "homo_sapiens", "6-month-old stage"),
        ("8 weeks", "mus_musculus", "8-week-old stage"),
        ("Fetal", "homo_sapiens", "fetal stage"),
        ("24 w", "homo_sapiens", ""),
        ("45", "homo_sapiens", ""),
    ],
)
def test_ages_are_understood_as_people_write_them(label: str, organism: str, term: str) -> None:
    found = resolve(obs(development_stage=[label]), organism)
    assert found.obs["development_stage"].tolist() == [term or label]
    assert (found.obs["development_stage_ontology_term_id"][0] != "unknown") == bool(term)


@pytest.mark.parametrize("organism", ["mus_musculus", "homo_sapiens"])
def test_terms_of_some_organisms_go_by_their_whole_name_alone(organism: str) -> None:
    labels = ["alpha cell", "VIP", "Lamp5", "Neuroblasts", "alpha retinal ganglion cell (Mmus)"]
    found = resolve(obs(cell_type=labels), organism).obs["cell_type_ontology_term_id"].tolist()
    assert found[:4] == ["unknown"] * 4
    assert found[4] != "unknown"


def test_a_worms_cells_are_looked_for_in_its_own_anatomy_first() -> None:
    found = resolve(obs(cell_type=["B cell", "Ciliated sensory neurons", "P cells"]), "caenorhabditis_elegans")
    assert found.obs["cell_type_ontology_term_id"].tolist()[0].startswith("WBbt:")
    assert found.obs["cell_type"].tolist()[1:] == ["Ciliated sensory neurons", "P cells"]


@pytest.mark.parametrize(
    ("column", "term", "organism", "said"),
    [
        ("cell_type", "CL:9999999", "homo_sapiens", "is no term of CL"),
        ("cell_type", "UBERON:0000178", "homo_sapiens", "is not of CL"),
        ("development_stage", "MmusDv:0000003", "homo_sapiens", "is not of HsapDv"),
        ("development_stage", "HsapDv:0000087", "homo_sapiens", "is obsolete; use HsapDv:0000226"),
        ("sex", "female", "homo_sapiens", "is not of PATO"),
        ("sex", "PATO:0000461", "homo_sapiens", "is 'normal', not PATO:0000383 (female) or"),
        ("sex", "PATO:0000001", "homo_sapiens", "is 'quality', not"),
        ("disease", "PATO:0000383", "homo_sapiens", "is 'female', not PATO:0000461 (normal)"),
        ("assay", "EFO:0001185", "homo_sapiens", "is 'HeLa', not EFO:0002772"),
        ("tissue", "UBERON:9999999", "homo_sapiens", "is no term of UBERON"),
        ("development_stage", "HsapDv:0000139 || HsapDv:0000140", "homo_sapiens", "is 2 terms, and"),
    ],
)
def test_a_wrong_id_is_a_problem_with_its_cells(column: str, term: str, organism: str, said: str) -> None:
    found = resolve(pd.DataFrame({f"{column}_ontology_term_id": [term, term]}), organism)
    assert len(found.problems) == 1
    assert f"{column}_ontology_term_id: {term!r} (2 cells) {said}" in found.problems[0]


def test_a_label_beside_a_wrong_id_helps() -> None:
    found = resolve(obs(cell_type=["B cell"], cell_type_ontology_term_id=["CL:9999999"]), "homo_sapiens")
    assert "'B cell' is CL:0000236" in found.problems[0]


def test_several_terms_in_one_value_are_looked_up_one_by_one() -> None:
    both = "MONDO:0008903 || MONDO:0005148"
    found = resolve(obs(disease_ontology_term_id=[both]), "homo_sapiens")
    assert found.obs["disease"].tolist() == ["lung cancer || type 2 diabetes mellitus"]
    assert found.problems == []


def test_stages_and_anatomy_are_those_of_the_organism() -> None:
    mouse = resolve(obs(development_stage_ontology_term_id=["MmusDv:0000003"]), "mus_musculus")
    assert mouse.problems == []
    worm = resolve(obs(cell_type_ontology_term_id=["WBbt:0005062"]), "caenorhabditis_elegans")
    assert worm.problems == []


def test_published_files_are_judged_rightly(shared_data: Path) -> None:
    def judged(path: Path) -> list[str]:
        frame = anndata.read_h5ad(path, backed="r").obs.reset_index(drop=True)
        organism = "mus_musculus" if "mouse" in path.name else "homo_sapiens"
        return resolve(frame[[name for name in KNOWN if name in frame]], organism).problems

    for path in [*(shared_data / "census-mini/h5ads").glob("*.h5ad"), shared_data / "cxg/example_valid.h5ad"]:
        assert judged(path) == [], path.name
    wrong = judged(shared_data / "cxg/example_invalid_CL.h5ad")
    assert any("'CL:12312'" in problem for problem in wrong)
    assert any("'EFO:0009922 (sci-plex)'" in problem for problem in wrong)
    assert any("'PATO:0000461'" in problem and "is not of CL" in problem for problem in wrong)
