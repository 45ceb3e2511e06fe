"""Snapshots of lakes in which some datasets hold counts of a measurement and others its levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from encoded import add_dataset, encoded_counts, numbered

from store.errors import UsageError
from store.lake import open_lake
from store.schema import DatasetPlan
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot, read_card, refresh_snapshot
from store.writer import LakeWriter, write_counts


def add_levels(writer: LakeWriter, dataset_id: str, n_cells: int, sizes: dict[str, int], organism: str) -> None:
    """Ingest a dataset with counts of RNA and levels of all else."""
    features = {name: numbered(name, n) for name, n in sizes.items()}
    layers = {name: "value" for name in sizes if name != "RNA"}
    reservation = writer.reserve(DatasetPlan(dataset_id, organism, dataset_id, n_cells, features, layers=layers))
    blocks = [write_counts(reservation, name, 0, encoded_counts(0, n_cells, n)) for name, n in sizes.items()]
    writer.commit(reservation, pd.DataFrame({"cell_id": [str(cell) for cell in range(n_cells)]}), blocks)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with proteins counted in human cells and measured as levels in those of mice."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "h", 60, {"RNA": 30, "protein": 6})
        add_levels(writer, "m", 40, {"RNA": 30, "protein": 7}, "mus_musculus")
    return uri


@pytest.mark.parametrize(("levels", "taken", "n_taken"), [((), "homo_sapiens", 60), (("protein",), "mus_musculus", 40)])
def test_cells_that_have_a_measurement_in_another_layer_are_not_measured_never_zero(
    mixed: str, levels: tuple[str, ...], taken: str, n_taken: int
) -> None:
    made = create_snapshot(mixed, f"from_{taken}", SnapshotSettings(levels=levels))
    made.verify()
    assert made.levels == levels
    cells = made.cells(["organism", "soma_joinid", "measured_protein", "measured_RNA"]).to_pandas()
    assert (cells["measured_protein"] == (cells["organism"] == taken)).all()
    assert cells["measured_RNA"].all()
    assert set(made.vocabulary("protein")["organism"].to_pylist()) == {taken}
    datasets, measured_DG = made.presence("protein")
    assert dict(zip(datasets, measured_DG.any(axis=1).tolist(), strict=True)) == {
        "h": taken == "homo_sapiens",
        "m": taken == "mus_musculus",
    }
    block = made.block("protein", 0, made.n_rows)
    counts = [dict(zip(block.features[a:b], block.counts[a:b], strict=True)) for a, b in rows_of(block.indptr)]
    layer = "value" if levels else "raw"
    expected = open_lake(mixed).counts(taken, "protein", np.arange(n_taken), layer)
    for row, (organism, joinid) in enumerate(zip(cells["organism"], cells["soma_joinid"], strict=True)):
        line = expected[joinid] if organism == taken else expected[:0]
        assert counts[row] == dict(zip(line.indices, line.data, strict=True))


def rows_of(indptr: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))


def test_a_refresh_takes_levels_of_what_its_base_lacks_and_keeps_the_layers_that_it_has(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "h", 60, {"RNA": 30, "protein": 6})
        create_snapshot(uri, "base", SnapshotSettings())
        add_levels(writer, "later", 40, {"RNA": 30, "metabolite": 6, "protein": 6}, "homo_sapiens")
    fresh = refresh_snapshot(uri, "base", "fresh")
    anew = create_snapshot(uri, "anew", SnapshotSettings())
    for made in (fresh, anew):
        made.verify()
        assert made.measurements == ("RNA", "protein", "metabolite")
        assert made.levels == ("metabolite",)
        columns = ["dataset_id", "measured_protein", "measured_metabolite"]
        cells = made.cells(columns).to_pandas().groupby("dataset_id")[columns[1:]].agg(["min", "max"])
        assert cells.loc["h"].tolist() == [True, True, False, False]
        assert cells.loc["later"].tolist() == [False, False, True, True]
    assert values(fresh, "metabolite") == values(anew, "metabolite")


def values(made: Snapshot, measurement: str) -> list[float]:
    return sorted(made.block(measurement, 0, made.n_rows).counts.tolist())


def add_normalised(writer: LakeWriter, dataset_id: str, n_cells: int) -> None:
    """Ingest a dataset whose RNA is normalised."""
    plan = DatasetPlan(dataset_id, "homo_sapiens", dataset_id, n_cells, {"RNA": numbered("RNA", 30)})
    reservation = writer.reserve(replace(plan, layers={"RNA": "lognorm"}))
    obs = pd.DataFrame({"cell_id": [str(cell) for cell in range(n_cells)]})
    writer.commit(reservation, obs, [write_counts(reservation, "RNA", 0, encoded_counts(0, n_cells, 30))])


def test_cells_without_any_value_are_counted_and_no_snapshot_is_made_of_them_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_normalised(writer, "n", 50)
    with pytest.raises(UsageError, match="none of the 50 chosen cells has counts or levels; normalised values"):
        create_snapshot(uri, "none", SnapshotSettings())
    with LakeWriter(uri) as writer:
        add_dataset(writer, "h", 60, {"RNA": 30})
        add_levels(writer, "p", 20, {"peptide": 5}, "homo_sapiens")
    made = create_snapshot(uri, "both", SnapshotSettings())
    assert made.manifest["n_without"] == 50
    assert "50 cells have no value here" in read_card(uri, "both")
    counted = create_snapshot(uri, "counted", SnapshotSettings(where="measured_RNA == True"))
    assert (counted.n_cells, counted.manifest["n_without"]) == (60, 0)
    assert "have no value" not in read_card(uri, "counted")
