"""What features, cells, their columns and files are called, as people and tools write it."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from ingest.dataset import OpenDataset
from ingest.expand import expand
from ingest.job import SourceSettings
from ingest.obs import map_obs
from store.errors import InputRefused
from store.schema import ORGANISMS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:mudata"),  # mudata, on its own coming defaults
]


@pytest.mark.parametrize("pulled", [True, False])
def test_labels_of_modalities_fill_each_other_in_and_what_differs_is_kept_apart(tmp_path: Path, pulled: bool) -> None:
    def modality(cells: list[str], n_features: int, **obs: list[str]) -> anndata.AnnData:
        return anndata.AnnData(
            scipy.sparse.csr_matrix(np.ones((len(cells), n_features), np.float32)),
            obs=pd.DataFrame({name: pd.Categorical(values) for name, values in obs.items()}, index=cells),
            var=pd.DataFrame(index=[f"f{n_features}{number}" for number in range(n_features)]),
        )

    # those of fewer cells come first by name, and clusters of one are not those of the other
    atac = modality(list("bcdx"), 2, donor_id=["B", "C", "!", "X"], leiden=["1", "2", "3", "4"])
    rna = modality(list("abcde"), 3, donor_id=list("ABCDE"), leiden=["7", "8", "9", "7", "8"])
    both = mudata.MuData({"rna": rna, "atac": atac})
    if not pulled:  # as other tools write it, and MuData from 0.4 on
        both.obs = both.obs.drop(columns=list(both.obs))
    both.write(tmp_path / "a.h5mu")
    found = OpenDataset(SourceSettings(uri=str(tmp_path / "a.h5mu")), "x").inspect()
    assert found.obs.set_index("cell_id")["donor_id"].to_dict() == {cell: cell.upper() for cell in "abcex"} | {"d": "!"}
    side = found.sides["obs"].set_index(found.obs["cell_id"].to_numpy())
    assert side["rna:donor_id"].dropna().to_dict() == dict(zip("abcde", "ABCDE", strict=True))
    assert side["leiden"].dropna().to_dict() == dict(zip("bcdx", "1234", strict=True))
    assert side["rna:leiden"].dropna().to_dict() == dict(zip("abcde", "78978", strict=True))
    assert "kept apart: rna:donor_id (1 cells), rna:leiden (3 cells)" in " ".join(found.notes)


def _study(folder: Path, *organisms: str) -> SourceSettings:
    """Write an ISA-Tab study of one metabolite, and of a sample of each organism."""
    folder.mkdir()
    samples = [f"s{number}" for number in range(len(organisms))]
    said = [f"{sample}\t{organism}" for sample, organism in zip(samples, organisms, strict=True)]
    assay = [f"{sample}\tm_x_maf.tsv" for sample in samples]
    levels = ["\t".join(["metabolite_identification", *samples]), "\t".join(["m0", *("1.5" for _ in samples)])]
    for name, lines in (
        ("i_Investigation.txt", ["ONTOLOGY SOURCE REFERENCE"]),
        ("s_x.txt", ["Sample Name\tCharacteristics[Organism]", *said]),
        ("a_x.txt", ["Sample Name\tMetabolite Assignment File", *assay]),
        ("m_x_maf.tsv", levels),
    ):
        (folder / name).write_text("\n".join(lines))
    return SourceSettings(uri=str(folder))


@pytest.mark.parametrize(
    ("organisms", "organism"),
    [
        (("Mus musculus", "Mus musculus"), "mus_musculus"),
        (("mus musculus ", "blank", "", "Pooled QC", "experimental blank", "N/A", "quality control"), "mus_musculus"),
        (("blank", ""), "homo_sapiens"),
        (("", ""), "homo_sapiens"),
        (("Homo sapiens", "Mus musculus"), "'Homo sapiens', 'Mus musculus'"),
        (("Homo sapiens", "Arabidopsis thaliana", "blank"), "'Arabidopsis thaliana', 'Homo sapiens'"),
        (("Escherichia coli", "Escherichia coli"), "'Escherichia coli'"),
        (("Plasmodium falciparum",), "'Plasmodium falciparum'"),
    ],
)
def test_a_study_is_of_the_organism_that_its_samples_name_or_refused(
    tmp_path: Path, organisms: tuple[str, ...], organism: str
) -> None:
    source = _study(tmp_path / "a", *organisms)
    if organism in ORGANISMS:
        assert OpenDataset(source, "x").inspect().plan.organism == organism
        return
    with pytest.raises(InputRefused, match=f"its samples are of {organism}, not of one organism that a lake"):
        OpenDataset(source, "x")
    named = source.model_copy(update={"organism": "rattus_norvegicus"})
    assert OpenDataset(named, "x").inspect().plan.organism == "rattus_norvegicus"


def _columns(path: Path, names: list[str], **var: list[str]) -> SourceSettings:
    """Write a cell with one count in the first feature, two in the second, four in the third, ..."""
    counts = np.array([[2**number for number in range(len(names))]], np.float32)
    table = anndata.AnnData(scipy.sparse.csr_matrix(counts), pd.DataFrame(index=["a"]), pd.DataFrame(var, index=names))
    table.write_h5ad(path)
    return SourceSettings(uri=str(path))


def _found(source: SourceSettings) -> dict[str, float]:
    opened = OpenDataset(source, "x")
    ((measurement, features),) = opened.inspect().plan.features.items()
    return dict(zip(features.feature_id, opened.block(measurement, 0, 1).toarray()[0].tolist(), strict=True))


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("measurement", ["RNA", "protein"])
def test_features_without_an_id_go_by_their_names_and_without_either_are_refused(
    tmp_path: Path, measurement: str
) -> None:
    def found(names: list[str], **var: list[str]) -> dict[str, float]:
        return _found(_columns(tmp_path / "a.h5ad", names, **var).model_copy(update={"measurement": measurement}))

    assert found(["nan", "", "x", "C"], gene_symbols=["A", "B", "nan", "D"]) == {"A": 1, "B": 2, "x": 4, "C": 8}
    assert found(["nan", "NA", "NULL"]) == {"nan": 1, "NA": 2, "NULL": 4}  # nanchung of Drosophila
    with pytest.raises(InputRefused, match=r"2 of 4 features have no name \(number 2, 4, called 'nan'\)"):
        found(["A", "nan", "C", "nan"])
    with pytest.raises(InputRefused, match=r"2 of 3 features have no name \(number 1, 3, called '(None|nan)'\)"):
        found(["nan", "B", ""], gene_symbols=["None", "B", ""])
    with pytest.raises(InputRefused, match=r"1 of 2 features have no name \(number 2, called ''\)"):
        found(["A", ""])


@pytest.mark.parametrize("measurement", ["RNA", "ATAC"])
def test_an_empty_accession_of_a_loom_is_filled_in_by_the_genes_name(tmp_path: Path, measurement: str) -> None:
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = np.array([[1], [2], [4]], np.float32)
        file["col_attrs/CellID"] = [b"a"]
        file["row_attrs/Accession"] = [b"", b"P1", b"nan"]
        file["row_attrs/Gene"] = [b"A", b"B", b"C"]
    source = SourceSettings(uri=str(tmp_path / "a.loom"), measurement=measurement)
    assert _found(source) == {"A": 1, "P1": 2, "C": 4}


def _table(path: Path, text: str, **settings: object) -> OpenDataset:
    path.write_text(text, encoding="utf-8")
    told = {"uri": str(path), "kind": "table", "measurement": "protein", **settings}
    return OpenDataset(SourceSettings.model_validate(told), "x")


def _counts(opened: OpenDataset) -> dict[str, list[float]]:
    plan = opened.inspect().plan
    counts = opened.block("protein", 0, plan.n_obs).toarray()
    return dict(zip(plan.features["protein"].feature_id, counts.T.tolist(), strict=True))


def test_columns_of_one_name_of_a_table_are_summed_and_those_of_levels_kept_apart(tmp_path: Path) -> None:
    text = "cell,A,B,A,site,site\nc0,1,2,4,x,p\nc1,8,16,32,y,q\n"
    opened = _table(tmp_path / "a.csv", text)
    assert opened.form.obs.to_dict("list") == {"site": ["x", "y"], "site#2": ["p", "q"]}
    assert "their counts are summed: A (A)" in " ".join(opened.inspect().notes)
    assert _counts(opened) == {"A": [5, 40], "B": [2, 16]}
    assert _counts(_table(tmp_path / "a.csv", text, values="value")) == {"A": [1, 8], "B": [2, 16], "A#2": [4, 32]}
    lying = "gene\tc0\tc1\nA\t1\t8\nB\t2\t16\nA\t4\t32\n"
    assert _counts(_table(tmp_path / "a.tsv", lying, transposed=True)) == {"A": [5, 40], "B": [2, 16]}
    with pytest.raises(InputRefused, match=r"1 fields among numbers are none, such as 'q' \(cell 'c1', column 'A'\)"):
        _table(tmp_path / "a.csv", text.replace("32", "q").replace("c0", "c2,1,1,1,x,p\nc0"))


def test_features_and_cells_of_a_table_may_be_called_na_and_values_that_are_missing_too(tmp_path: Path) -> None:
    lines = "gene\tNA\tc1\nNA\t1\t8\nNULL\t2\tnull\nnan\t4\tNA\n"
    opened = _table(tmp_path / "a.tsv", lines, transposed=True, values="value")
    assert list(opened.form.obs.index) == ["NA", "c1"]
    assert list(opened.form.parts["protein"].var.index) == ["NA", "NULL", "nan"]
    assert opened.form.parts["protein"].rows(0, 2).toarray().tolist() == [[1, 2, 4], [8, 0, 0]]
    assert opened.form.parts["protein"].rows(0, 2).nnz == 4
    for text in ("c0 1 NA\nc1 3 4\n", "c0 NA 1\nc1 3 4\n"):  # no names, of which NA would be one
        assert list(_table(tmp_path / "a.txt", text, values="value").form.obs.index) == ["c0", "c1"]


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_semicolons_part_the_fields_of_a_table(tmp_path: Path, name: str) -> None:
    assert _counts(_table(tmp_path / name, "cell;A;B\nc0;1;2\nc1;4;8\n")) == {
        "A": [1, 4],
        "B": [2, 8],
    }
    with pytest.raises(InputRefused, match=r"such as '1,5' .* write numbers with a decimal point"):
        _table(tmp_path / name, "cell;A\nc0;1,5\nc1;4\nc2;3\n", values="value")


@pytest.mark.parametrize("kind", ["S", "O"])
def test_words_of_an_old_h5ad_are_words_also_where_they_are_no_categories(tmp_path: Path, kind: str) -> None:
    text = "S9" if kind == "S" else h5py.string_dtype()
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        obs = [("a", "donör" if kind == "O" else b"donor", "x", 1), ("b", "", "y", 2)]
        file["obs"] = np.array(obs, [("index", text), ("donor", text), ("else", text), ("n", "i4")])
        file["var"] = np.array([("A", "ENSG00000141510")], [("index", "S2"), ("gene_ids", h5py.string_dtype())])
        file["X"] = np.array([[1], [2]], np.float32)
    found = OpenDataset(SourceSettings(uri=str(tmp_path / "a.h5ad")), "x").inspect()
    assert found.obs["donor_id"].tolist() == ["donör" if kind == "O" else "donor", ""]
    assert found.sides["obs"].to_dict("list") == {"else": ["x", "y"], "n": [1, 2]}
    assert found.plan.features["RNA"].feature_id == ["ENSG00000141510"]


TENX = {"matrix.mtx": "%%MatrixMarket matrix coordinate integer general\n2 1 2\n1 1 1\n2 1 2\n"}
TENX |= {"genes.tsv": "A\tA\nB\tB\n", "barcodes.tsv": "a\n"}


def _folder(path: Path, **changed: str) -> SourceSettings:
    """Write a 10x folder of one cell with 1 of A and 2 of B, and other texts in the place of some of its files."""
    path.mkdir(parents=True)
    for name, text in (
        TENX | {f"{stem}.{'mtx' if stem == 'matrix' else 'tsv'}": changed[stem] for stem in changed}
    ).items():
        (path / name).write_text(text, encoding="utf-8")
    return SourceSettings(uri=str(path))


def _tenx_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        texts = {"features/id": [b"A", b"B"], "features/name": [b"A", b"B"], "barcodes": [b"a"]}
        for name, values in (texts | {"data": [1, 2], "indices": [0, 1], "indptr": [0, 2], "shape": [2, 1]}).items():
            file[f"matrix/{name}"] = values


def _zarr(path: Path) -> None:
    counts = scipy.sparse.csr_matrix(np.array([[1, 2]], np.float32))
    anndata.AnnData(counts, pd.DataFrame(index=["a"]), pd.DataFrame(index=["A", "B"])).write_zarr(path)


@pytest.mark.filterwarnings("ignore:.*zarr v2:UserWarning")  # anndata, on the format it writes by itself
@pytest.mark.parametrize("name", ["M.H5", "A.TAR.GZ", "A.TGZ", "Z.ZARR", "B.Zarr.ZIP", "S1_FRAGMENTS.TSV.GZ"])
def test_endings_of_names_are_read_in_capitals_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    path, made = tmp_path / name, {"A": 1.0, "B": 2.0}
    if name == "M.H5":
        _tenx_h5(path)
    elif name in ("A.TAR.GZ", "A.TGZ"):
        _folder(tmp_path / "10x")
        shutil.move(shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "10x"), path)
    elif name == "Z.ZARR":
        _zarr(path)
    elif name == "B.Zarr.ZIP":
        _zarr(tmp_path / "z.zarr")
        shutil.move(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "z.zarr"), path)
    else:
        path.write_bytes(gzip.compress(b"chr1\t0\t9\ta\t1\n"))
        made = {"chr1:0-5000": 2.0}
    (source,) = expand(SourceSettings(uri=str(path)), ("file",)).sources
    assert _found(source) == made


@pytest.mark.parametrize(
    "changed",
    [
        {"barcodes": "a\tx\n"},
        {"barcodes": "\ufeffa\r\n\r\n\n"},
        {"genes": "\ufeffA\tA\nB\tB\n\n\n"},
        {"barcodes": "a\n \n", "genes": "\ufeffA\r\nB\r\n\r\n"},
    ],
)
def test_marks_and_empty_lines_and_more_columns_are_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    source = _folder(tmp_path / "10x", **changed)
    assert OpenDataset(source, "x").inspect().obs["cell_id"].tolist() == ["a"]
    assert _found(source) == {"A": 1, "B": 2}
    (tmp_path / "fragments.tsv").write_text("chr1\t0\t9\ta\t1\nchr1\t0\t9\tb\t1\n")
    barcodes = str(tmp_path / "10x/barcodes.tsv")
    told = OpenDataset(SourceSettings(uri=str(tmp_path / "fragments.tsv"), barcodes=barcodes), "x")
    assert list(told.form.obs.index) == ["a"]


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ("real skew-symmetric\n2 1 1\n1 1 1\n", "says that it is skew-symmetric"),
        ("integer general\n2 1 1\n1  1   1\n", "not all lines are 3 numbers with one blank between them: Row #1"),
        ("integer general\n2 1 1\n1 1 x\n", "not all lines are 3 numbers with one blank between them"),
        ("pattern general\n2 1 1\n1 1 1\n", "not all lines are 2 numbers with one blank between them"),
        ("pattern general\n2 1 2\n1 1\n2 1\n", ""),
    ],
)
def test_a_matrix_market_text_of_another_form_is_read_or_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str, said: str
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    source = _folder(tmp_path / "10x", matrix=f"%%MatrixMarket matrix coordinate {matrix}")
    if not said:
        assert _found(source) == {"A": 1, "B": 1}
        return
    with pytest.raises(InputRefused, match=f"10x: matrix.mtx:? {said}"):
        OpenDataset(source, "x")


@pytest.mark.parametrize("pair", [("x_centroid", "y_centroid"), ("center_x", "center_y")])
def test_places_of_xenium_and_merscope_are_pointed_at_unless_they_are_taken(pair: tuple[str, str]) -> None:
    obs = pd.DataFrame({pair[0]: [1.0, 2.0], pair[1]: [3.0, 4.0]}, index=["a", "b"])
    (note,) = map_obs(obs, {}).notes
    assert f"say obs.x={pair[0]} and obs.y={pair[1]}" in note
    taken = map_obs(obs, {"x": pair[0], "y": pair[1]})
    assert (taken.notes, taken.frame["y"].tolist()) == ([], [3.0, 4.0])
    assert map_obs(obs.assign(x=0.0, y=0.0), {}).notes == []


def test_the_half_that_a_symmetric_matrix_does_not_write_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    matrix = "%%MatrixMarket matrix coordinate integer symmetric\n2 2 2\n1 1 3\n2 1 4\n"  # as scipy writes one
    opened = OpenDataset(_folder(tmp_path / "10x", matrix=matrix, barcodes="a\nb\n"), "x")
    assert opened.block("RNA", 0, 2).toarray().tolist() == [[3, 4], [4, 0]]
