"""Checkpoints: what is loaded is what was saved, or it is refused; answers do not depend on company."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from store.errors import InputRefused, MissingError
from train import checkpoint
from train.cells import PROMPTS
from train.checkpoint import Vocabulary
from train.config import ModelConfig
from train.model import CellModel
from train.predictor import Predictor
from train.tokens import TokenSettings

ROOT = Path(__file__).parent.parent
WORDS = {name: ["", "one", "two"] for name in PROMPTS} | {
    "organism": ["", "homo_sapiens", "mus_musculus"],
    "perturbation": ["", "control", "STAT1", "STAT2", "IRF1"],
}


def export(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    organisms = ["homo_sapiens"] * 8 + ["mus_musculus"] * 4
    vocabulary = {
        "RNA": Vocabulary([f"ENSG{n:011d}" for n in range(12)], [f"g{n}" for n in range(12)], organisms),
        "protein": Vocabulary(["CD3", "CD4"], ["CD3", "CD4"], ["homo_sapiens"] * 2),
    }
    config = ModelConfig({"RNA": 12, "protein": 2}, {name: len(WORDS[name]) for name in PROMPTS}, 5, 2, 16, 1, 2)
    model = CellModel(config)
    torch.nn.init.normal_(model.target.weight)
    provenance = {
        "measurements": ["RNA", "protein"],
        "prompt_fields": list(PROMPTS),
        "global_step": seed,
        "snapshot": {},
    }
    return checkpoint.export(folder, model, TokenSettings(budget=8), vocabulary, WORDS, provenance, "# card")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(tmp_path / "checkpoint")


def counts(n_cells: int = 9, seed: int = 0) -> dict[str, csr_matrix]:
    rng = np.random.default_rng(seed)
    rna = rng.poisson(2.0, (n_cells, 12)).astype(np.float32)
    rna[:, 8:] = 0
    return {"RNA": csr_matrix(rna), "protein": csr_matrix(rng.poisson(5.0, (n_cells, 2)).astype(np.float32))}


def test_a_loaded_checkpoint_answers_as_the_saved_one(folder: Path, tmp_path: Path) -> None:
    first, second = Predictor.load(folder), Predictor.load(export(tmp_path / "again"))
    cells = first.cells(counts())
    assert np.array_equal(first.embed(cells), second.embed(cells))
    assert first.manifest["model_sha256"] == second.manifest["model_sha256"]
    assert first.vocabulary["RNA"].feature_name[3] == "g3"
    other = Predictor.load(export(tmp_path / "other", seed=1))
    assert not np.array_equal(first.embed(cells), other.embed(cells))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json", "README.md"])
def test_a_changed_byte_in_any_file_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputRefused, match=rf"{name}: its SHA-256 differs"):
        Predictor.load(folder)


def test_without_a_manifest_there_is_no_checkpoint_and_a_missing_file_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputRefused, match=r"config.json: named in the manifest and not there"):
        Predictor.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(MissingError, match="no checkpoint here"):
        Predictor.load(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder.parent / "secret").write_text("x")
    manifest["files"]["../secret"] = {"sha256": checkpoint.sha256(folder.parent / "secret"), "bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputRefused, match="secret"):
        Predictor.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "model_sha256 is not that of model.safetensors"),
        ({"files": {}}, "does not name README.md"),
        ({"files": {"README.md": "text"}}, "damaged"),
        ({"files": [1, 2]}, "damaged"),
        ({"format": 99}, "format 99; this version reads format 1"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(InputRefused, match=message):
        Predictor.load(folder)


def test_weights_that_are_none_are_refused_though_every_digest_fits(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"x" * 100)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_sha256"] = manifest["files"]["model.safetensors"]["sha256"] = checkpoint.sha256(weights)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputRefused, match="not a checkpoint of this version"):
        Predictor.load(folder)


def test_an_export_replaces_the_one_before_whole(folder: Path) -> None:
    export(folder, seed=3)
    assert Predictor.load(folder).manifest["global_step"] == 3
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("renames", "swaps"), [(1, True), (2, True), (2, False)])
def test_a_kill_leaves_the_checkpoint_before_or_the_next_export_mends_it(
    folder: Path, tmp_path: Path, renames: int, swaps: bool
) -> None:
    pair = [tmp_path / "pair" / name for name in ("one", "other")]
    for part in pair:
        part.mkdir(parents=True)
    if swaps and not checkpoint._exchanged(*pair):
        pytest.skip("this file system cannot swap folders")
    shutil.rmtree(tmp_path / "pair")
    script = textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from test_train_checkpoint import checkpoint, export

        rename, left = os.replace, {renames}

        def killed(*words):
            global left
            rename(*words)
            left -= 1
            if left == 0:
                os._exit(9)

        os.replace = killed
        if not {swaps}:
            checkpoint._exchanged = lambda one, other: False
        export(Path({str(folder)!r}), seed=3)
    """)
    ended = subprocess.run([sys.executable, "-c", script], check=False).returncode
    assert ended == (0 if (renames, swaps) == (2, True) else 9)
    if swaps:
        assert Predictor.load(folder).manifest["global_step"] == (3 if ended == 0 else 0)
    beside = folder.with_name(".checkpoint.notes")
    beside.touch()
    export(folder, seed=4)
    assert Predictor.load(folder).manifest["global_step"] == 4
    assert sorted(path.name for path in folder.parent.iterdir()) == [beside.name, "checkpoint"]


def test_a_disk_that_is_full_keeps_the_checkpoint_before_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        export(folder, seed=3)
    assert Predictor.load(folder).manifest["global_step"] == 0
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_an_answer_does_not_depend_on_the_company_of_a_cell(folder: Path) -> None:
    predictor = Predictor.load(folder)
    together = predictor.embed(predictor.cells(counts(300)))
    for cell in (0, 255, 256, 299):
        alone = predictor.embed(predictor.cells({name: part[[cell]] for name, part in counts(300).items()}))
        np.testing.assert_allclose(alone[0], together[cell], rtol=1e-4, atol=1e-5)


def test_the_organism_is_taken_from_the_features_cell_by_cell(folder: Path) -> None:
    predictor = Predictor.load(folder)
    rna = np.zeros((3, 12), np.float32)
    rna[0, 1], rna[1, 9], rna[2, 2] = 5, 5, 5
    given = {"organism": ["", "", "mus_musculus"]}
    assert predictor.cells({"RNA": csr_matrix(rna)}, given).prompts["organism"].tolist() == [1, 2, 2]


def test_effects_are_of_the_cells_organism_and_combine_targets(folder: Path) -> None:
    predictor = Predictor.load(folder)
    cells = predictor.cells(counts())
    one, two = predictor.perturb(cells, ["STAT1"]), predictor.perturb(cells, ["STAT2", "STAT1"])
    assert one["RNA"].delta_G.shape == (12,)
    assert not one["RNA"].control_G[8:].any()
    assert np.abs(one["RNA"].delta_G[:8]).max() > 0
    assert np.isfinite(two["RNA"].delta_G).all()
    assert not np.allclose(one["RNA"].delta_G, two["RNA"].delta_G)
    np.testing.assert_allclose(one["RNA"].perturbed_G - one["RNA"].control_G, one["RNA"].delta_G)


def test_a_dose_is_the_perturbations_and_not_that_of_cells_without_it(folder: Path) -> None:
    predictor = Predictor.load(folder)
    unsaid, low, high = (
        predictor.perturb(predictor.cells(counts(), {"dose": [dose] * 9}), ["STAT1"])["RNA"]
        for dose in ("", "1", "1000")
    )
    np.testing.assert_array_equal(low.control_G, unsaid.control_G)
    np.testing.assert_array_equal(high.control_G, unsaid.control_G)
    assert not np.allclose(low.perturbed_G, high.perturbed_G)


def test_cells_of_before_are_not_drawn(folder: Path) -> None:
    predictor = Predictor.load(folder)
    with pytest.raises(InputRefused, match=r"by a span of 0 or more; got -1\.0"):
        predictor.draw(predictor.cells(counts()), "RNA", 100.0, elapsed=-1.0)


def test_stored_zeros_and_duplicates_are_the_matrix_that_they_stand_for_and_the_input_stays(folder: Path) -> None:
    predictor = Predictor.load(folder)
    plain = csr_matrix(np.array([[0, 3, 0, 2] + [0] * 8], np.float32))
    loose = csr_matrix((np.array([2, 1, 0, 2], np.float32), [3, 1, 5, 1], [0, 4]), shape=(1, 12))
    before = loose.data.tolist(), loose.indices.tolist()
    first, second = (predictor.cells({"RNA": counts}) for counts in (plain, loose))
    assert predictor.n_tokens(first).tolist() == predictor.n_tokens(second).tolist()
    assert np.array_equal(predictor.embed(first), predictor.embed(second))
    assert (loose.data.tolist(), loose.indices.tolist()) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_counts_that_are_none_are_refused(folder: Path, value: float) -> None:
    with pytest.raises(InputRefused, match=r"counts\.protein holds values that are negative or no numbers"):
        Predictor.load(folder).cells({"protein": csr_matrix(np.array([[1.0, value]], np.float32))})


def test_what_cannot_be_drawn_or_told_is_refused(folder: Path) -> None:
    predictor = Predictor.load(folder)
    cells = predictor.cells(counts())
    for depth in (-5, np.nan, np.inf, 1e300, [1.0, 2.0], np.ones((9, 2))):
        with pytest.raises(InputRefused, match="depth: "):
            predictor.draw(cells, "RNA", depth)  # type: ignore[arg-type]
    for seed in (-1, 0.5, "x", [], [1, -2]):
        with pytest.raises(InputRefused, match=r"seed = .*whole number of 0 or more"):
            predictor.draw(cells, "RNA", 10, seed)  # type: ignore[arg-type]
    drawn = [predictor.draw(cells, "RNA", 10, seed) for seed in (3, np.int64(3), [3], np.array([3]))]
    assert all((one != drawn[0]).nnz == 0 for one in drawn)
    assert (predictor.draw(cells, "RNA", 10, (3, 1)) != drawn[0]).nnz > 0
    for ask in (lambda: predictor.shares(cells, "ATAC"), lambda: predictor.vectors("ATAC", [0])):
        with pytest.raises(InputRefused, match="no measurement 'ATAC'; the model knows RNA, protein"):
            ask()
    for odd in ("inf", "-inf", "1e39"):
        with pytest.raises(InputRefused, match=r"prompts\.time: a number is without end"):
            predictor.cells(counts(), {"time": [odd] * 9})
    assert np.isnan(predictor.cells(counts(), {"time": [""] * 9}).numbers["time"]).all()
    with pytest.raises(InputRefused, match=r"counts\.RNA is a ndarray; give a scipy\.sparse\.csr_matrix"):
        predictor.cells({"RNA": counts()["RNA"].toarray()})
    other = {name: part.tocoo() for name, part in counts().items()}
    assert np.array_equal(predictor.embed(predictor.cells(other)), predictor.embed(cells))


def test_the_same_targets_in_any_order_or_number_are_the_same_perturbation(folder: Path) -> None:
    predictor = Predictor.load(folder)
    cells = predictor.cells(counts())
    expected = predictor.perturb(cells, ["STAT1", "STAT2"])["RNA"].delta_G
    for said in (["STAT2", "STAT1"], ["STAT1", "STAT2", "STAT1"], ["STAT2+STAT1"]):
        assert np.array_equal(predictor.perturb(cells, said)["RNA"].delta_G, expected)


def test_what_the_model_never_saw_is_refused_with_what_it_did(folder: Path) -> None:
    predictor = Predictor.load(folder)
    cells = predictor.cells(counts())
    with pytest.raises(InputRefused, match="perturbation 'STAT3' was never seen in training; did you mean 'STAT"):
        predictor.perturb(cells, ["STAT3"])
    with pytest.raises(InputRefused, match="targets with names"):
        predictor.perturb(cells, [""])
    with pytest.raises(InputRefused, match=r"counts\.RNA has 2 columns and the model's vocabulary 12 features"):
        predictor.cells({"RNA": counts()["protein"]})
    with pytest.raises(InputRefused, match="no measurement 'ATAC'; the model knows RNA, protein"):
        predictor.cells({"ATAC": counts()["RNA"]})
    with pytest.raises(InputRefused, match="no field 'tisue'"):
        predictor.cells(counts(), {"tisue": ["one"] * 9})
    with pytest.raises(InputRefused, match="different numbers of cells"):
        predictor.cells(counts(), {"tissue": ["one"]})
    with pytest.raises(InputRefused, match=r"prompts\.time"):
        predictor.cells(counts(), {"time": ["soon"] * 9})
