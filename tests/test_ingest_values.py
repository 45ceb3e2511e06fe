"""What a source's values are taken for: stored zeros, large counts, logarithms, words among numbers."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse

from ingest import check
from ingest.dataset import Checked, Inspected, OpenDataset
from ingest.job import SourceSettings
from ingest.obs import map_obs
from ingest.sources import h5mu
from store.errors import InputRefused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mudata")  # mudata, on its own coming defaults


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))


def with_zeros(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Store every third place that is empty as a zero too."""
    places = np.argwhere(counts.toarray() == 0)[::3]
    stored = counts.tocoo()
    row, column = np.append(stored.row, places[:, 0]), np.append(stored.col, places[:, 1])
    data = np.append(stored.data, np.zeros(len(places), stored.dtype))
    made = scipy.sparse.coo_matrix((data, (row, column)), counts.shape).tocsr()
    assert made.nnz == counts.nnz + len(places) > counts.nnz
    return made


def counts_of(shape: tuple[int, int], seed: int = 0) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(np.random.default_rng(seed).poisson(0.4, shape).astype(np.float32))


def mtx_folder(folder: Path, counts: scipy.sparse.csr_matrix) -> Path:
    folder.mkdir(parents=True)
    scipy.io.mmwrite(folder / "matrix.mtx", counts.T.tocoo())
    lines = {"features": counts.shape[1], "barcodes": counts.shape[0]}
    for role, number in lines.items():
        (folder / f"{role}.tsv").write_text("".join(f"{role}-{at}\n" for at in range(number)), encoding="utf-8")
    return folder


def h5ad_file(path: Path, matrix: scipy.sparse.spmatrix) -> Path:
    var = pd.DataFrame(index=[f"g{number}" for number in range(matrix.shape[1])])
    obs = pd.DataFrame(index=[f"c{number}" for number in range(matrix.shape[0])])
    anndata.AnnData(matrix, obs, var).write_h5ad(path)
    return path


def checked(uri: Path, **settings: object) -> Checked:
    opened = OpenDataset(SourceSettings.model_validate({"uri": str(uri), **settings}), "x")
    return opened.check(next(iter(opened.form.parts)), 0, opened.form.n_obs, 2**20)


@pytest.mark.parametrize("form", ["csr", "csc", "mtx", "lognorm"])
def test_a_zero_that_is_stored_is_a_feature_that_was_not_detected(tmp_path: Path, form: str) -> None:
    counts = counts_of((40, 30))
    found = []
    for name, matrix in (("without", counts), ("with", with_zeros(counts))):
        if form == "mtx":
            found.append(checked(mtx_folder(tmp_path / name, matrix)))
            continue
        path = h5ad_file(tmp_path / f"{name}.h5ad", matrix.asformat("csc" if form == "csc" else "csr"))
        found.append(checked(path, values="lognorm" if form == "lognorm" else "counts"))
    assert [one.problems for one in found] == [[], []]
    assert np.array_equal(found[0].nnz_C, np.diff(counts.indptr))
    for figures in ("nnz_C", "sum_C", "digest_C"):
        assert np.array_equal(getattr(found[0], figures), getattr(found[1], figures)), figures


def test_a_zero_among_levels_is_a_value(tmp_path: Path) -> None:
    levels = with_zeros(counts_of((40, 30)))
    path = h5ad_file(tmp_path / "levels.h5ad", levels)
    assert np.array_equal(checked(path, values="value").nnz_C, np.diff(levels.indptr))


@pytest.mark.parametrize("form", ["csr", "csc", "mtx", "loom"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2**24 + 1, ["1 of 4 values are larger than 16,777,216, such as 16777217 (cell 1, feature"]),
        (1.00000001, ["1 of 4 values are not a whole number, such as 1 (cell 1, feature"]),
        (2**24, []),
    ],
)
def test_what_is_no_count_is_none_in_whichever_order_it_is_stored(
    tmp_path: Path, form: str, value: float, said: list[str]
) -> None:
    counts = np.array([[1, 0, 2], [0, value, 0], [0, 0, 3]], np.float64)
    if form == "mtx":
        mtx_folder(tmp_path / "one", scipy.sparse.csr_matrix(counts))
        path = tmp_path / "one"
    elif form == "loom":
        path = tmp_path / "one.loom"
        with h5py.File(path, "w") as file:
            file["matrix"], file["row_attrs/Gene"], file["col_attrs/CellID"] = counts.T, list("abc"), list("def")
    else:
        path = h5ad_file(tmp_path / "one.h5ad", scipy.sparse.csr_matrix(counts).asformat(form))
    found = checked(path).problems
    assert [one[: len(want)] for one, want in zip(found, said, strict=False)] == said
    assert bool(found) == bool(said)


@pytest.mark.parametrize("values", ["counts", "value"])
def test_a_modality_in_another_order_is_read_once_and_block_by_block_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    cells, rng = [f"c{number}" for number in range(900)], np.random.default_rng(0)
    order = rng.permutation(800)  # the last 100 cells are in the other modality alone
    counts = with_zeros(counts_of((800, 20)))
    names = pd.DataFrame(index=[f"g{number}" for number in range(20)])
    shuffled = anndata.AnnData(counts[order], pd.DataFrame(index=[cells[at] for at in order]), names)
    whole = anndata.AnnData(counts_of((900, 3)), pd.DataFrame(index=cells), pd.DataFrame(index=["p0", "p1", "p2"]))
    mudata.MuData({"adt": whole, "rna": shuffled}).write(tmp_path / "one.h5mu")
    read, named = [], h5mu.named_matrix

    def counted(group: h5py.Group, where: str, layer: str, identity: list[str]) -> tuple[pd.DataFrame, object]:
        var, rows_if = named(group, where, layer, identity)

        def rows(start: int, stop: int) -> scipy.sparse.csr_matrix:
            read.append((where[-3:], stop - start))
            return rows_if(values == "value")(start, stop)

        return var, lambda levels: rows

    monkeypatch.setattr(h5mu, "named_matrix", counted)
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5mu"), values={"RNA": values}), "x")
    assert list(opened.form.obs.index) == cells
    blocks = [opened.form.parts["RNA"].rows(start, start + 100) for start in range(0, 900, 100)]
    assert sum(many for modality, many in read if modality == "rna") == 800
    found = scipy.sparse.vstack(blocks)
    assert np.array_equal(found[:800].toarray(), counts.toarray())
    assert found.nnz == counts.nnz
    assert np.array_equal(opened.form.parts["RNA"].measured_C, np.arange(900) < 800)


def test_a_cell_that_stands_twice_in_a_modality_is_named(tmp_path: Path) -> None:
    counts, names = counts_of((3, 2)), pd.DataFrame(index=["g0", "g1"])
    rna = anndata.AnnData(counts, pd.DataFrame(index=["a", "b", "c"]), names)
    mudata.MuData({"rna": rna}).write(tmp_path / "one.h5mu")
    with h5py.File(tmp_path / "one.h5mu", "a") as file:
        file["mod/rna/obs/_index"][2] = "a"
    with pytest.raises(InputRefused, match=r"one\.h5mu: mod/rna: cell 'a' stands more than once"):
        OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5mu")), "x")


def table_of(path: Path, text: str, **settings: object) -> pd.DataFrame:
    """Read a table of levels as the lake would, missing values as NaN."""
    path.write_text(text, encoding="utf-8")
    told = {"uri": str(path), "kind": "table", "values": "value", "measurement": "protein", **settings}
    opened = OpenDataset(SourceSettings.model_validate(told), "x")
    stored = opened.form.parts["protein"].rows(0, opened.form.n_obs).tocoo()
    levels = np.full(stored.shape, np.nan)
    levels[stored.row, stored.col] = stored.data
    obs = opened.form.obs
    return pd.DataFrame(levels, index=obs.index, columns=opened.form.parts["protein"].var.index).join(obs)


@pytest.mark.parametrize(
    ("name", "sign"), [("a.txt", "\t"), ("a.txt", ","), ("a.tsv", "\t"), ("a.csv", ","), ("a", "\t")]
)
def test_empty_fields_of_a_table_stay_where_they_are(tmp_path: Path, name: str, sign: str) -> None:
    rng = np.random.default_rng(0)
    levels = rng.normal(20, 2, (30, 8)).round(3)
    levels[rng.random((30, 8)) < 0.3] = np.nan
    features = [f"P{number}, chain {number}" if sign == "\t" else f"P {number}" for number in range(8)]
    expected = pd.DataFrame(levels, index=[f"cell {number}" for number in range(30)], columns=features)
    lines = [["sample", *features], *([cell, *row] for cell, row in zip(expected.index, levels.tolist(), strict=True))]
    text = "\n".join(sign.join("" if field != field else str(field) for field in line) for line in lines)
    found = table_of(tmp_path / name, text + "\n")
    assert list(found.index) == list(expected.index)
    pd.testing.assert_frame_equal(found, expected, check_names=False)


def test_blanks_part_fields_where_the_first_line_has_neither_tabs_nor_commas(tmp_path: Path) -> None:
    found = table_of(tmp_path / "a.txt", '  cell A   "B b"\n c0 1.5  2\n\n c1 3 NA\n')
    expected = pd.DataFrame([[1.5, 2], [3, np.nan]], index=["c0", "c1"], columns=["A", "B b"])
    pd.testing.assert_frame_equal(found, expected, check_names=False)


@pytest.mark.parametrize(
    "text", ["cell\tA\tB\nc0\t1\t2\nc1\t3\n", "cell A B\nc0 1 2\nc1 3\n", "cell,A,B\nc0,1,2\nc1,3\n"]
)
def test_a_line_that_is_shorter_than_the_first_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputRefused, match=r"a\.txt: line 3 has 2 fields, and the first 3"):
        table_of(tmp_path / "a.txt", text)


@pytest.mark.parametrize("sign", ["\t", " ", ","])
def test_a_first_line_without_a_corner_names_the_columns_as_r_writes_them(tmp_path: Path, sign: str) -> None:
    lines = [["A", "B"], ["c0", "1.5", "2"], ["c1", "3", "NA"]]
    found = table_of(tmp_path / "a.txt", "\n".join(sign.join(f'"{field}"' for field in line) for line in lines))
    expected = pd.DataFrame([[1.5, 2], [3, np.nan]], index=["c0", "c1"], columns=["A", "B"])
    pd.testing.assert_frame_equal(found, expected, check_names=False)
    with pytest.raises(InputRefused, match=r"line 3 has 2 fields, and the first 2"):
        table_of(tmp_path / "a.txt", "\n".join(sign.join(line) for line in [*lines[:2], ["c1", "3"]]))


def test_a_word_among_numbers_is_refused_and_text_becomes_obs(tmp_path: Path) -> None:
    lines = ["cell\tA\tB\tsite", "c0\t1.5\t2\t4", "c1\t2\t\tlung", "c2\tFiltered\t1\tliver", "c3\t2\t1\tliver"]
    said = (
        r"1 fields among numbers are none, such as 'Filtered' \(cell 'c2', column 'A'\); leave a field empty or .* NA"
    )
    with pytest.raises(InputRefused, match=said):
        table_of(tmp_path / "a.tsv", "\n".join(lines))
    with pytest.raises(InputRefused, match=r"2 fields among numbers are none, such as '1,5'"):
        table_of(tmp_path / "a.tsv", "\n".join(lines).replace("1.5", "1,5"))
    found = table_of(tmp_path / "a.tsv", "\n".join(lines).replace("Filtered", "NA"))
    assert found["A"].tolist()[:2] == [1.5, 2]
    assert np.isnan(found.loc["c2", "A"])
    assert np.isnan(found.loc["c1", "B"])
    assert found["site"].tolist() == ["4", "lung", "liver", "liver"]
    asked = table_of(tmp_path / "a.tsv", "\n".join(lines), obs={"batch": "A"})
    assert asked["A"].tolist() == ["1.5", "2", "Filtered", "2"]


def study(folder: Path, levels: list[list[str]]) -> SourceSettings:
    """Write an ISA-Tab study of one assay, samples s0, s1, ... and metabolites m0, m1, ... (a line of levels each)."""
    folder.mkdir()
    samples = [f"s{number}" for number in range(len(levels[0]))]
    (folder / "i_Investigation.txt").write_text("ONTOLOGY SOURCE REFERENCE\n")
    (folder / "s_x.txt").write_text("\n".join(["Sample Name", *samples]))
    assay = ["Sample Name\tMetabolite Assignment File", *(f"{sample}\tm_x_maf.tsv" for sample in samples)]
    (folder / "a_x.txt").write_text("\n".join(assay))
    lines = ["\t".join(["metabolite_identification", *samples])]
    lines += ["\t".join([f"m{number}", *line]) for number, line in enumerate(levels)]
    (folder / "m_x_maf.tsv").write_text("\n".join(lines))
    return SourceSettings(uri=str(folder))


def test_words_among_levels_of_a_study_are_counted_and_decimal_commas_refused(tmp_path: Path) -> None:
    opened = OpenDataset(
        study(tmp_path / "a", [["1.5", "<LOD", ""], ["2", "3", "<LOD"], ["1e-3", "n.d.", "4"]]), "x"
    ).form
    assert opened.notes == (
        "4 of 9 levels are missing",
        "3 of 8 given levels are no numbers: '<LOD' (2), 'n.d.' (1); they are taken for missing",
    )
    assert opened.parts["metabolite"].rows(0, 3).nnz == 5
    with pytest.raises(InputRefused, match=r"m_x_maf\.tsv: 1 of 6 .* '2,5' has a decimal comma; write numbers with a"):
        OpenDataset(study(tmp_path / "b", [["1.5", "2", "1"], ["2", "2,5", "1"]]), "x")
    with pytest.raises(InputRefused, match=r"4 of 6 given levels are no numbers: '<LOD' \(4\)"):
        OpenDataset(study(tmp_path / "c", [["1.5", "<LOD", "<LOD"], ["2", "<LOD", "<LOD"]]), "x")
    plain = OpenDataset(study(tmp_path / "d", [["1.5", "2"], ["2", "3"]]), "x").form
    assert plain.notes == ("0 of 4 levels are missing",)


def test_the_embedding_of_a_loom_is_no_place_in_space_unless_somebody_says_so(tmp_path: Path) -> None:
    def inspected(name: str, settings: dict[str, str], **columns: object) -> Inspected:
        with h5py.File(tmp_path / name, "w") as file:
            file["matrix"], file["row_attrs/Gene"], file["col_attrs/CellID"] = np.ones((2, 3)), list("ab"), list("def")
            for column, values in columns.items():
                file[f"col_attrs/{column}"] = values
        return OpenDataset(SourceSettings(uri=str(tmp_path / name), obs=settings), "x").inspect()

    embedding = {"_X": [1.0, 2, 3], "_Y": [4.0, 5, 6], "tSNE_coordinates": np.ones((3, 2))}
    found = inspected("a.loom", {}, **embedding)
    assert not {"x", "y"} & set(found.obs)
    assert any("_X and _Y are taken for an embedding; where they are places" in note for note in found.notes)
    said = inspected("b.loom", {"x": "_X", "y": "_Y"}, **embedding)
    assert said.obs[["x", "y"]].to_numpy().tolist() == [[1, 4], [2, 5], [3, 6]]
    assert not any("embedding" in note for note in said.notes)
    places = inspected("c.loom", {}, Spatial_coordinates=np.arange(6.0).reshape(3, 2))
    assert places.obs[["x", "y"]].to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_no_value_between_two_whole_numbers_passes_for_a_large_count() -> None:
    def logged(*units: float) -> scipy.sparse.csr_matrix:
        return scipy.sparse.csr_matrix(np.log1p(np.array([units]) * 0.37))

    assert check.counts_from_log1p(logged(1, 3, 300, 70000), 0).toarray().tolist() == [[1, 3, 300, 70000]]
    single = logged(1, 3, 300, 9000).astype(np.float32)
    assert check.counts_from_log1p(single, 0).toarray().tolist() == [[1, 3, 300, 9000]]
    for units in ((1, 300.5, 310.3), (1, 3, 7, 5000.5, 6000.3), (1, 250.5, 260.3)):
        with pytest.raises(InputRefused, match="cell 4 holds no scaled counts"):
            check.counts_from_log1p(logged(*units), 4)


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("c0 1 2\nc1 3 4\n", ["no line names the columns: they are called 'feature1' to 'feature2'"]),
        (
            "0.5 1 2\n1 3 4\n",
            [
                "no column names the lines: they are called 'cell0' to 'cell1'",
                "no line names the columns: they are called 'feature0' to 'feature2'",
            ],
        ),
    ],
)
def test_features_that_nobody_named_are_called_as_the_note_says(tmp_path: Path, text: str, notes: list[str]) -> None:
    (tmp_path / "a.txt").write_text(text)
    told = {"uri": str(tmp_path / "a.txt"), "kind": "table", "values": "value", "measurement": "protein"}
    form = OpenDataset(SourceSettings.model_validate(told), "x").form
    assert list(form.notes) == notes
    names = form.parts["protein"].var.index
    assert f"they are called {names[0]!r} to {names[-1]!r}" in form.notes[-1]


def test_a_coordinate_outside_a_matrix_is_told_with_the_sources_name(tmp_path: Path) -> None:
    folder = mtx_folder(tmp_path / "one", counts_of((3, 2)))
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2 3 1\n2 4 1\n")
    with pytest.raises(InputRefused, match=r"one: a coordinate lies outside the matrix: rows 3 to 3 of 3"):
        OpenDataset(SourceSettings(uri=str(folder)), "x")


def test_a_sign_of_inches_in_a_name_joins_no_lines(tmp_path: Path) -> None:
    folder = mtx_folder(tmp_path / "one", counts_of((3, 4)))
    (folder / "features.tsv").write_text('g0\t"A\ng1\tB\ng2\t"C\ng3\t5" D\n')
    (folder / "metadata.tsv").write_text(
        'cell\tdonor\tnote\nbarcodes-0\td0\t"a\nbarcodes-1\td1\tb\nbarcodes-2\td2\t"\n'
    )
    form = OpenDataset(SourceSettings(uri=str(folder)), "x").form
    assert form.parts["RNA"].var["gene_symbols"].tolist() == ['"A', "B", '"C', '5" D']
    assert form.obs["donor"].tolist() == ["d0", "d1", "d2"]
    (folder / "metadata.tsv").write_text(
        '"cell"\t"donor"\n"barcodes-0"\t"d\t0"\n"barcodes-1"\t"d1"\n"barcodes-2"\t"d2"\n'
    )
    again = OpenDataset(SourceSettings(uri=str(folder)), "x").form
    assert again.obs["donor"].tolist() == ["d\t0", "d1", "d2"], "proper quotes are none of a word's"


def test_a_dose_may_have_its_thousands_apart() -> None:
    doses = ["1,000 nM", "10,000.5 nM", "50 nM", "2,500,000 nM"]
    found = map_obs(pd.DataFrame({"dose": doses}), {}).frame
    assert found["dose"].tolist() == [1000, 10000.5, 50, 2500000]
    assert set(found["dose_unit"]) == {"nM"}
    for odd in ("1,5 nM", "1,0000 nM", "1000,000 nM"):
        left = map_obs(pd.DataFrame({"dose": ["50 nM", odd]}), {})
        assert "dose" not in left.frame
        assert any(f"'{odd}' is no quantity" in note for note in left.notes)
    plain = map_obs(pd.DataFrame({"dose": ["1,000", "50"]}), {})
    assert plain.frame["dose"].tolist() == [1000, 50]
