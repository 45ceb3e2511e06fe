"""Requests become matrices in vocabulary order, or are refused with the path of the field."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from fake_predictor import FakePredictor, FakeVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.sparse import csr_matrix

from serve.decode import Decoded, Decoder, FeatureIndex, Features
from serve.errors import CoverageTooLow, FieldRefused
from serve.messages import Counts, CsrCounts
from serve.settings import Limits

FAKE = FakePredictor()
PARSE = TypeAdapter(Counts)


def decode(counts: Any, prompts: Any = None, *, min_coverage: float | None = None, **limits: Any) -> Decoded:
    decoder = Decoder(FAKE.vocabulary, FAKE.prompts, "b" * 64, Limits(**limits))
    return decoder.decode(PARSE.validate_python(counts), prompts or {}, min_coverage=min_coverage)


def csr(features: list[str], indptr: list[int], indices: list[int], data: list[float]) -> dict[str, Any]:
    return {"RNA": {"features": features, "indptr": indptr, "indices": indices, "data": data}}


def test_symbols_ids_and_versioned_ids_reach_the_same_columns() -> None:
    for names in (["G3", "G0"], ["ENSG00000000003", "ENSG00000000000"], ["ENSG00000000003.12", "G0"]):
        counts = decode(csr(names, [0, 1, 3], [0, 0, 1], [5, 1, 2])).cells.counts["RNA"]
        assert counts.shape == (2, 10)
        assert counts.toarray()[:, [0, 3]].tolist() == [[0, 5], [2, 1]]
        assert counts.sum() == 8


def test_both_forms_of_a_request_give_the_same_matrix() -> None:
    by_cell = decode({"RNA": [{"G3": 5}, {}, {"G3": 1, "G0": 2}]}).cells.counts["RNA"]
    by_csr = decode(csr(["G3", "G0"], [0, 1, 1, 3], [0, 0, 1], [5, 1, 2])).cells.counts["RNA"]
    assert (by_cell != by_csr).nnz == 0


def test_two_names_of_one_feature_are_summed() -> None:
    assert decode({"RNA": [{"G1": 2, "ENSG00000000001": 3}]}).cells.counts["RNA"][0, 1] == 5


def test_a_symbol_of_two_organisms_is_ambiguous_until_the_organism_is_said() -> None:
    counts = {"RNA": [{"TWIN": 1, "G1": 3}]}
    report = decode(counts).coverage["RNA"]
    assert (report.ambiguous, report.share_of_counts) == (["TWIN"], 0.75)
    mouse = decode(counts, {"organism": "mus_musculus"})
    assert mouse.cells.counts["RNA"][0, 9] == 1
    assert mouse.coverage["RNA"].share_of_counts == 1


@pytest.mark.parametrize(
    "counts",
    [
        {"RNA": [{"TWIN": 1}, {"TWIN": 2, "G1": 3}, {}, {"TWIN": 4}]},
        csr(["G1", "TWIN"], [0, 1, 3, 3, 4], [1, 1, 0, 1], [1, 2, 3, 4]),
    ],
)
def test_a_shared_symbol_is_the_gene_of_each_cells_own_organism(counts: Any) -> None:
    said = ["mus_musculus", "homo_sapiens", "mus_musculus", "mus_musculus"]
    whole = decode(counts, {"organism": said})
    assert whole.cells.counts["RNA"].toarray()[:, [1, 8, 9]].tolist() == [[0, 0, 1], [3, 2, 0], [0, 0, 0], [0, 0, 4]]
    report = whole.coverage["RNA"]
    assert (report.mapped, report.share_of_counts, report.ambiguous, report.unmapped) == (2, 1, [], [])
    unsaid = decode(counts, {"organism": ["", *said[1:]]})
    assert unsaid.cells.counts["RNA"].toarray()[:, [1, 8, 9]].tolist() == [[0, 0, 0], [3, 2, 0], [0, 0, 0], [0, 0, 4]]
    report = unsaid.coverage["RNA"]
    assert (report.share_of_counts, report.ambiguous, report.unmapped) == (0.9, ["TWIN"], [])


def test_counts_of_another_organisms_features_are_said_to_be_by_their_share() -> None:
    counts = {"RNA": [{"G1": 6}, {"G2": 2, "ENSMUSG00000000099": 1, "NOPE": 1}], "protein": [{"CD4": 3}, {"CD4": 1}]}
    for organism, rna in {"mus_musculus": "80.0%", "homo_sapiens": "10.0%"}.items():
        told = [one for one in decode(counts, {"organism": organism}).warnings if one.startswith("RNA")]
        assert [one[: one.index(";")] for one in told] == [
            f"RNA: {rna} of the counts are of features of another organism than the prompts say"
        ]
    said = decode(counts, {"organism": ["", "mus_musculus"]}).warnings
    assert [one[:12] for one in said] == ["RNA: 20.0% o", "protein: 25."]
    assert decode(counts).warnings == []
    strange = levels({"protein": [{"CD4": -2, "NOPE": 1}]}, {"organism": "mus_musculus"}).warnings
    assert strange[0].startswith("protein: 50.0% of the levels are of features of another organism")


def test_an_id_that_two_organisms_have_is_each_ones_own() -> None:
    twice = FakeVocabulary(["CD4", "CD4"], ["CD4", "Cd4"], ["homo_sapiens", "mus_musculus"])
    decoder = Decoder({"protein": twice}, FAKE.prompts, "b", Limits())
    counts = PARSE.validate_python({"protein": [{"CD4": 1}, {"CD4": 2}]})
    decoded = decoder.decode(counts, {"organism": ["mus_musculus", "homo_sapiens"]})
    assert (decoded.cells.counts["protein"].toarray().tolist(), decoded.warnings) == ([[0, 1], [2, 0]], [])
    with pytest.raises(CoverageTooLow, match="not known: CD4"):
        decoder.decode(counts, {})


def test_a_shared_id_is_the_feature_of_each_cells_own_organism() -> None:
    index = FeatureIndex(
        Features(["GFP", "ENSG1", "GFP"], ["gfp"] * 3, ["homo_sapiens", "mus_musculus", "mus_musculus"])
    )
    for organism, found in (("homo_sapiens", [0, 1]), ("mus_musculus", [2, 1]), ("", [-2, 1])):
        assert index.positions(["GFP", "ENSG1.4"], organism).tolist() == found


def test_coverage_counts_what_was_lost_and_names_it() -> None:
    decoded = decode({"RNA": [{"G1": 3, "NOPE": 1}, {"NADA": 4}], "protein": [{"CD4": 1}, {"CD8": 1}]})
    report = decoded.coverage["RNA"]
    assert (report.features, report.mapped, report.share_of_counts) == (3, 1, 0.375)
    assert report.unmapped == ["NOPE", "NADA"]
    assert decoded.coverage["protein"].share_of_counts == 1
    assert decoded.warnings == ["RNA: 1 cells have no counts that the model knows"]


def test_too_little_coverage_is_refused_and_a_request_can_only_raise_the_limit() -> None:
    counts = {"RNA": [{"G1": 1, "NOPE": 3}]}
    assert decode(counts).coverage["RNA"].share_of_counts == 0.25
    with pytest.raises(CoverageTooLow, match=r"counts.RNA: only 25.0% .* not known: NOPE"):
        decode(counts, min_coverage=0.5)
    decoder = Decoder(FAKE.vocabulary, FAKE.prompts, "b", Limits(min_coverage=0.9))
    with pytest.raises(CoverageTooLow, match=r"90.0% are needed"):
        decoder.decode(counts, {}, min_coverage=0.0)


def test_values_that_are_no_whole_numbers_are_said_to_be_wrong() -> None:
    assert "50.0% of the values are no whole numbers" in decode({"RNA": [{"G1": 1.5, "G2": 2}]}).warnings[0]


@pytest.mark.parametrize(
    ("counts", "field"),
    [
        ({"smell": [{"G1": 1}]}, "counts.smell"),
        ({"RNA": []}, "counts"),
        ({"RNA": [{"G1": 1}], "protein": [{"CD4": 1}, {}]}, "counts"),
        ({"RNA": [{"G1": 1}, {"G2": -1}]}, "counts.RNA.1.G2"),
        ({"RNA": [{"G1": float("nan")}]}, "counts.RNA.0.G1"),
        ({"RNA": [{"G1": 1e39}]}, "counts.RNA.0.G1"),
        (csr(["G1"], [0, 1], [0], [float("inf")]), "counts.RNA.data.0"),
        (csr(["G1"], [], [], []), "counts"),
        (csr(["G1"], [0], [], []), "counts"),
        (csr(["G1"], [1, 1], [0], [1]), "counts.RNA.indptr"),
        (csr(["G1"], [0, 2], [0], [1]), "counts.RNA.indptr"),
        (csr(["G1"], [0, 2, 1, 2], [0, 0], [1, 1]), "counts.RNA.indptr.2"),
        (csr(["G1"], [0, 2**70, 1], [0], [1]), "counts.RNA.indptr"),
        (csr(["G1"], [0, 2**63 - 1, -5, 2], [0, 0], [1, 1]), "counts.RNA.indptr.2"),
        (csr(["G1"], [0, -(2**63), 2**63 - 1, 2], [0, 0], [1, 1]), "counts.RNA.indptr.1"),
        (csr(["G1"], [0, 1], [1], [1]), "counts.RNA.indices.0"),
        (csr(["G1"], [0, 1], [-1], [1]), "counts.RNA.indices.0"),
        (csr(["G1"], [0, 1], [0, 0], [1]), "counts.RNA.data"),
    ],
)
def test_a_wrong_field_is_named(counts: Any, field: str) -> None:
    with pytest.raises(FieldRefused) as refused:
        decode(counts)
    assert refused.value.field == field


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    with pytest.raises(FieldRefused, match="send at most 2 in a request"):
        decode({"RNA": [{}, {}, {}]}, cells=2)
    with pytest.raises(FieldRefused, match="more than 2 counts"):
        decode(csr(["G1"], [0, 1], [0], [1, 1, 1]), nonzeros=2)
    with pytest.raises(FieldRefused, match="2 features; send at most 1"):
        decode(csr(["G1", "G2"], [0, 1], [0], [1]), features=1)
    with pytest.raises(FieldRefused, match="2 features; send at most 1"):
        decode({"RNA": [{"G1": 1, "G2": 1}]}, features=1)


def test_prompts_are_one_value_for_all_cells_or_one_per_cell() -> None:
    counts = {"RNA": [{"G1": 1}, {"G1": 1}]}
    said = {"organism": "homo_sapiens", "tissue": ["lung", ""], "perturbation": "G1+G2", "time": [1, 2.5], "dose": 3}
    assert decode(counts, said).cells.prompts == {
        "organism": ["homo_sapiens"] * 2,
        "tissue": ["lung", ""],
        "perturbation": ["G1+G2"] * 2,
        "time": ["1.0", "2.5"],
        "dose": ["3.0", "3.0"],
    }


@pytest.mark.parametrize(
    ("prompts", "field", "message"),
    [
        ({"mood": "good"}, "prompts.mood", "it knows cell_type, dose, organism"),
        ({"tissue": "Lung"}, "prompts.tissue", "did you mean 'lung'"),
        ({"tissue": ["blood", "lugn"]}, "prompts.tissue.1", "did you mean 'lung'"),
        ({"tissue": ["blood"]}, "prompts.tissue", "1 values for 2 cells"),
        ({"tissue": 3}, "prompts.tissue", "3 is not a text"),
        ({"perturbation": "G1+G9"}, "prompts.perturbation", "has not seen perturbation 'G9'"),
        ({"time": ["1", "2"]}, "prompts.time.0", "'1' is not a finite number"),
        ({"time": [1.0, float("nan")]}, "prompts.time.1", "not a finite number"),
    ],
)
def test_a_wrong_prompt_is_named_with_the_nearest_known_one(prompts: Any, field: str, message: str) -> None:
    with pytest.raises(FieldRefused, match=message) as refused:
        decode({"RNA": [{"G1": 1}, {"G1": 1}]}, prompts)
    assert refused.value.field == field


@given(
    cells=st.lists(
        st.dictionaries(st.sampled_from(["G0", "G5", "ENSG00000000007", "NOPE"]), st.integers(0, 9), max_size=4),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_no_known_count_is_lost_moved_or_invented(cells: list[dict[str, int]]) -> None:
    column = {"G0": 0, "G5": 5, "ENSG00000000007": 7}
    expected = np.zeros((len(cells), 10))
    for row, cell in enumerate(cells):
        for name in cell.keys() & column.keys():
            expected[row, column[name]] = cell[name]
    try:
        decoded = decode({"RNA": cells}, min_coverage=0.0)
    except CoverageTooLow:
        total = sum(sum(cell.values()) for cell in cells)
        assert expected.sum() <= 0.05 * total
        return
    matrix = decoded.cells.counts["RNA"]
    assert isinstance(matrix, csr_matrix)
    assert matrix.toarray().tolist() == expected.tolist()


# ------------------------------------------------------------------ levels
def levels(counts: Any, prompts: Any = None) -> Decoded:
    """Decode where proteins are levels."""
    decoder = Decoder(FAKE.vocabulary, FAKE.prompts, "b" * 64, Limits(), levels={"protein"})
    return decoder.decode(PARSE.validate_python(counts), prompts or {})


def test_a_level_of_zero_is_measured_and_one_that_is_not_sent_is_missing() -> None:
    sent = {"features": ["CD4", "CD8"], "indptr": [0, 2, 3], "indices": [0, 1, 1], "data": [0, -1.5, 0.25]}
    for counts in (sent, [{"CD4": 0, "CD8": -1.5}, {"CD4": None, "CD8": 0.25}]):
        decoded = levels({"protein": counts})
        found = decoded.cells.counts["protein"]
        assert (found.indptr.tolist(), found.indices.tolist()) == ([0, 2, 3], [1, 2, 2])
        assert found.data.tolist() == [0, -1.5, 0.25]
        assert not decoded.warnings


def test_levels_that_are_understood_are_counted_whatever_their_sign() -> None:
    report = levels({"protein": [{"CD4": -2, "NOPE": 2, "NADA": 0, "CD8": 0}]}).coverage["protein"]
    assert (report.share_of_counts, report.unmapped) == (0.5, ["NOPE", "NADA"])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"CD4": 1e39}, r"cell 0, CD4: 1e\+39 is no level; leave out what was not measured, or send NaN"),
        ({"CD4": 1, "P1": 1}, "several names of one feature"),
    ],
)
def test_what_is_no_level_is_refused(cell: dict[str, float], message: str) -> None:
    with pytest.raises(FieldRefused, match=message):
        levels({"protein": [cell]})


def test_a_level_that_is_no_number_was_not_measured() -> None:
    nan = float("nan")
    found = levels({"protein": [{"CD4": nan, "CD8": 2}, {"CD4": 0, "CD8": nan}]}).cells.counts["protein"]
    assert (np.diff(found.indptr).tolist(), found.data.tolist()) == ([1, 1], [2, 0])


EMPTY = CsrCounts(features=["CD4", "CD8"], indptr=[0, 0], indices=[], data=[])


@pytest.mark.parametrize(
    ("decoding", "empty", "kind"),
    [
        (decode, [{}], "counts"),
        (decode, [{"CD4": 0}], "counts"),
        (decode, EMPTY, "counts"),
        (levels, [{}], "levels"),
        (levels, [{"CD4": None}], "levels"),
        (levels, EMPTY, "levels"),
    ],
)
def test_a_cell_in_which_nothing_was_found_is_measured_whatever_is_beside_it(
    decoding: Any, empty: Any, kind: str
) -> None:
    told = [f"protein: 1 cells have no {kind} that the model knows"]
    for beside in ({}, {"RNA": [{"G1": 3}]}):
        decoded = decoding(beside | {"protein": empty})
        assert decoded.cells.counts["protein"].shape == (1, 3)
        assert decoded.warnings == told
    if empty is not EMPTY:
        beside = decoding({"RNA": [{"G1": 3}, {"G2": 1}], "protein": [*empty, {"CD8": 1}]})
        assert (beside.cells.counts["protein"].toarray().tolist(), beside.warnings) == ([[0, 0, 0], [0, 0, 1]], told)


def test_cells_that_were_not_measured_are_told_apart_from_those_in_which_nothing_was_found() -> None:
    counts = PARSE.validate_python({"RNA": [{"G1": 1}] * 4, "protein": [{"CD4": 1}, {}, {}, {}]})
    decoder = Decoder(FAKE.vocabulary, FAKE.prompts, "b" * 64, Limits())
    decoded = decoder.decode(counts, {}, measured={"protein": np.array([True, True, False, False])})
    assert decoded.warnings == [
        "protein: 1 cells have no counts that the model knows",
        "2 cells were not measured for protein",
    ]


def test_a_count_of_zero_is_as_one_that_is_not_sent_and_null_is_no_count() -> None:
    assert levels({"RNA": [{"G1": 0, "G2": 1}]}).cells.counts["RNA"].nnz == 1
    with pytest.raises(FieldRefused, match=r"counts\.RNA\.1\.G1: null is no count"):
        decode({"RNA": [{"G1": 1}, {"G1": None}]})


def test_counts_larger_than_the_lake_takes_are_refused_with_cell_and_feature() -> None:
    from ingest import check
    from serve.decode import LARGEST_COUNT
    from store import writer

    assert LARGEST_COUNT == writer.LARGEST_COUNT == check.LARGEST_COUNT
    assert decode({"RNA": [{"G1": 2**24}]}).cells.counts["RNA"].max() == 2**24
    large: Any = np.array([1, 3e38], np.float64)
    for counts in ({"RNA": [{"G1": 1}, {"G2": 3e38}]}, csr(["G1", "G2"], [0, 1, 2], [0, 1], large.tolist())):
        with pytest.raises(FieldRefused, match=r"cell 1, G2: 3e\+38 is not a count; counts are at most 16,777,216"):
            decode(counts)


def test_a_number_that_float32_cannot_hold_is_no_prompt() -> None:
    with pytest.raises(FieldRefused, match="not a finite number"):
        decode({"RNA": [{"G1": 1}]}, {"time": 1e39})


# ------------------------------------------------------------------ measurements that are not understood
@pytest.mark.parametrize(
    ("name", "cell", "warning"),
    [
        ("protein", {"CD3_TotalSeqB": 4}, "protein is taken as not measured: only 0.0% of the counts .*CD3_TotalSeqB"),
        ("protein", {"CD3_TotalSeqB": 0}, "protein is taken as not measured: the model knows none of the features"),
        ("peaks", {"chr1:1-2": 1}, "peaks is left out: the model does not know this"),
    ],
)
def test_what_is_not_understood_beside_what_is_counts_as_not_measured(name: str, cell: Any, warning: str) -> None:
    decoded = decode({name: [cell], "RNA": [{"G1": 4}]})
    assert list(decoded.cells.counts) == ["RNA"]
    (said,) = decoded.warnings
    assert re.match(warning, said), said


def test_where_no_measurement_is_understood_all_are_refused() -> None:
    with pytest.raises(CoverageTooLow, match=r"counts\.RNA: only 0\.0%"):
        decode({"RNA": [{"NOPE": 4}], "protein": [{"NADA": 1}]})
    with pytest.raises(CoverageTooLow, match=r"counts\.RNA: only 0\.0%"):
        decode({"RNA": [{"NOPE": 4}], "protein": [{}]})
    with pytest.raises(CoverageTooLow, match="the model knows none of the features") as refused:
        decode({"RNA": [{"NOPE": 0}]})
    assert "use ids from" in str(refused.value)


def test_a_share_that_the_request_asks_for_is_asked_of_every_measurement() -> None:
    counts = {"RNA": [{"G1": 4}], "protein": [{"NADA": 1}]}
    assert list(decode(counts, min_coverage=0.0).cells.counts) == ["RNA"]
    with pytest.raises(CoverageTooLow, match=r"counts\.protein"):
        decode(counts, min_coverage=0.5)
    assert list(decode({"RNA": [{"G1": 4}], "protein": [{}]}, min_coverage=0.5).cells.counts) == ["RNA", "protein"]
