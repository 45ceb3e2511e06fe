"""Embedding a lake: the vectors that /v1/embed answers, whole or not at all, and only what is left after a kill."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cellxgene_census
import numpy as np
import pytest
import tiledbsoma
from known_cells import add_cells, make_lake, open_index
from small_checkpoint import write_checkpoint
from starlette.testclient import TestClient

from serve import bulk, index
from serve.app import make_app
from serve.bulk import Asked, Bulk, Common, Crew, Outcome, in_this_process
from serve.index import VectorIndex, list_indexes
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from store import context, embeddings
from store.embeddings import BLOCK_CELLS, block_starts, list_embeddings, open_embeddings
from store.errors import ConflictError, InputRefused, InterruptedRun, MissingError, UsageError, VerificationError
from store.lake import open_lake
from store.validate import validate
from store.writer import LakeWriter

HUMAN = "homo_sapiens"
N_CELLS = 1_400
pytestmark = [
    pytest.mark.filterwarnings("ignore:Transforming to str index"),  # anndata, on the Census client's obs
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),  # anndata; we use the ids
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "two", seed=1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake; read-only."""
    return make_lake(tmp_path_factory.mktemp("lakes") / "plain")


@pytest.fixture
def lake(tmp_path: Path, plain: str) -> str:
    """A lake of one's own."""
    return str(shutil.copytree(plain, tmp_path / "lake"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, checkpoint: str, plain: str) -> str:
    """A lake that is embedded; read-only."""
    lake = str(shutil.copytree(plain, tmp_path_factory.mktemp("lakes") / "embedded"))
    embed(Asked(checkpoint, lake, key="cells", block_cells=512))
    return lake


def embed(
    asked: Asked,
    stop: Callable[[], bool] = lambda: False,
    hire: bulk.Hire = in_this_process,
    progress: bulk.Progress = lambda what, done, total: None,
) -> Outcome:
    with Bulk(asked) as run:
        return run.run(hire, progress, stop)


def seen_by_others(lake: str, key: str = "cells", measurement: str = "RNA") -> np.ndarray:
    """What the Census's own client reads."""
    client = tiledbsoma.SOMATileDBContext(tiledb_config=context.tiledb_config())
    with tiledbsoma.open(lake, context=client) as census:
        return np.asarray(cellxgene_census.get_anndata(census, "Homo sapiens", obsm_layers=[key]).obsm[key])


def test_the_vectors_are_those_of_v1_embed_and_any_census_client_reads_them(embedded: str, checkpoint: str) -> None:
    opened = open_lake(embedded)
    joinids = opened.obs(HUMAN)["soma_joinid"].to_numpy()
    found, held = open_embeddings(embedded, HUMAN, "cells").read(joinids)
    assert held.all()
    np.testing.assert_array_equal(seen_by_others(embedded), found)
    replica = Replica(ServeSettings(checkpoint=checkpoint))
    try:
        with TestClient(make_app(replica, Limits())) as client:
            for rows, measurements in ((np.arange(500, 560), ["RNA"]), (np.arange(1_100, 1_180), ["RNA", "protein"])):
                counts = {name: as_csr(opened, name, joinids[rows]) for name in measurements}
                request = {"counts": counts, "prompts": {"organism": HUMAN}}
                answer = client.post("/v1/embed", json=request).json()
                np.testing.assert_allclose(answer["embeddings"], found[rows], atol=1e-5)
    finally:
        replica.close()
    assert all(not check.problem for check in validate(opened))


def as_csr(lake: object, measurement: str, joinids: np.ndarray) -> dict[str, list]:
    counts = lake.counts(HUMAN, measurement, joinids)  # type: ignore[attr-defined]
    names = lake.var(HUMAN, measurement)["feature_id"].to_pylist()  # type: ignore[attr-defined]
    parts = {"indptr": counts.indptr, "indices": counts.indices, "data": counts.data.astype(float)}
    return {"features": names} | {name: part.tolist() for name, part in parts.items()}


def test_the_array_says_what_it_holds(embedded: str, checkpoint: str) -> None:
    generation = open_embeddings(embedded, HUMAN, "cells")
    with tiledbsoma.SparseNDArray.open(generation.array_uri) as array:
        said = array.metadata[embeddings.MANIFEST]
    manifest = generation.manifest
    assert manifest is not None
    words = bulk.read_words(checkpoint)
    assert manifest["model_sha256"] == words.model_sha256
    assert manifest["vocabulary_hash"] == words.manifest["vocabulary_hash"]
    assert (manifest["commit_id"], manifest["n_cells"]) == (open_lake(embedded).commit.id, N_CELLS)
    assert (manifest["dimension"], manifest["where"], manifest["n_empty"]) == (16, "", 0)
    assert 0.9 < manifest["share_of_counts"] < 1, "one gene of the lake is not the model's"
    assert manifest["digest"] in said


def test_cells_that_a_filter_leaves_out_have_no_vector(lake: str, checkpoint: str, tmp_path: Path) -> None:
    outcome = embed(Asked(checkpoint, lake, "tissue == 'lung'"))
    assert outcome.key == bulk.default_key(outcome.manifest["model_sha256"])
    lungs = open_lake(lake).obs(HUMAN, "tissue == 'lung'")["soma_joinid"].to_numpy()
    _, held = open_embeddings(lake, HUMAN, outcome.key).read(np.arange(N_CELLS))
    np.testing.assert_array_equal(np.flatnonzero(held), lungs)
    assert outcome.index["n_cells"] == len(lungs) == outcome.n_cells


class Broken(Exception):
    """What a test raises where a process would die."""


def stop_after(n_blocks: int) -> Callable[[], bool]:
    left = [n_blocks]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    return stop


def test_a_stopped_run_shows_nothing_and_the_same_again_does_only_what_is_left(lake: str, checkpoint: str) -> None:
    asked = Asked(checkpoint, lake, key="cells", block_cells=512)
    with pytest.raises(InterruptedRun, match="ask again"):
        embed(asked, stop_after(2))
    assert list_embeddings(lake) == []
    with pytest.raises(ValueError, match="cells"):
        seen_by_others(lake)
    told: list[tuple[str, int, int]] = []
    outcome = embed(asked, progress=lambda *what: told.append(what))
    assert told[:2] == [(bulk.CELLS, 1_024, N_CELLS), (bulk.CELLS, N_CELLS, N_CELLS)]
    assert told[2:] == [(bulk.PARTS, 0, 1), (bulk.PARTS, 1, 1)]
    assert (outcome.n_embedded, outcome.n_blocks) == (N_CELLS - 1_024, 1)
    assert (embed(asked).n_embedded, embed(asked).n_blocks) == (0, 0)
    assert np.isfinite(seen_by_others(lake)).all()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (embeddings, "_ensure_obsm"),
        (embeddings.records, "create"),
        (embeddings, "read_back"),
        (embeddings, "remove_fragments"),
        (embeddings, "merge_footers"),
        (embeddings, "_enter"),
        (embeddings, "forget_old"),
        (index, "_put"),
    ],
)
def test_killed_at_any_step_readers_see_all_or_nothing_and_the_same_again_ends_right(
    lake: str, checkpoint: str, embedded: str, module: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = open_embeddings(embedded, HUMAN, "cells").read(np.arange(N_CELLS))
    asked = Asked(checkpoint, lake, key="cells", block_cells=512)
    real, dead = getattr(module, name), True
    for dies_at in itertools.count(1):
        calls, dead = itertools.count(1), False

        def dies(*words: object, calls: Iterator[int] = calls, dies_at: int = dies_at, **named: object) -> object:
            nonlocal dead
            if str(words[0]).endswith(".released"):  # a dead process has no lock
                return real(*words, **named)
            dead = dead or next(calls) == dies_at
            if dead:
                raise Broken
            return real(*words, **named)

        monkeypatch.setattr(module, name, dies)
        with suppress(Broken):
            embed(asked)
        monkeypatch.undo()
        for generation in list_embeddings(lake):
            np.testing.assert_array_equal(generation.read(np.arange(N_CELLS))[0], expected)
            np.testing.assert_array_equal(seen_by_others(lake), expected)
        for known in list_indexes(lake):
            assert len(VectorIndex(known)) == N_CELLS
        if not dead:
            break
    assert dies_at > 1, "it was never called"
    np.testing.assert_array_equal(seen_by_others(lake), expected)
    assert len(open_index(lake, "cells")) == N_CELLS


def test_a_name_belongs_to_a_model_and_a_filter_unless_it_is_taken_over(lake: str, checkpoint: str, other: str) -> None:
    embed(Asked(checkpoint, lake, key="cells"))
    first = seen_by_others(lake)
    with pytest.raises(ConflictError, match=r"are of model \w{12}, and this is model"):
        embed(Asked(other, lake, key="cells"))
    with pytest.raises(ConflictError, match="not where \"tissue == 'lung'\""):
        embed(Asked(checkpoint, lake, "tissue == 'lung'", key="cells"))
    with pytest.raises(InterruptedRun):
        embed(Asked(other, lake, key="cells", replace=True, block_cells=512), stop_after(1))
    np.testing.assert_array_equal(seen_by_others(lake), first)
    outcome = embed(Asked(other, lake, key="cells", replace=True, block_cells=512))
    assert (outcome.n_embedded, outcome.n_taken_over) == (N_CELLS - 512, 0)
    assert np.abs(seen_by_others(lake) - first).max() > 1e-3
    assert open_index(lake, "cells").known.manifest["model_sha256"] == outcome.manifest["model_sha256"]


def test_a_filter_that_selects_nothing_holds_no_name(lake: str, checkpoint: str) -> None:
    def nothing(where: str, replace: bool = False) -> None:
        with pytest.raises(UsageError, match="no cell of homo_sapiens where"):
            embed(Asked(checkpoint, lake, where, key="cells", replace=replace))

    nothing("tissue == 'Blood'")
    nothing("tissue == 'BLOOD'")
    blood = embed(Asked(checkpoint, lake, "tissue == 'blood'", key="cells"))
    assert blood.n_embedded == blood.n_cells > 0
    nothing("tissue == 'Lung'", replace=True)
    assert embed(Asked(checkpoint, lake, "tissue == 'blood'", key="cells")).n_embedded == 0
    with pytest.raises(ConflictError, match="not where \"tissue == 'lung'\""):
        embed(Asked(checkpoint, lake, "tissue == 'lung'", key="cells"))


def test_when_the_lake_has_grown_only_what_came_since_is_embedded(lake: str, checkpoint: str) -> None:
    asked = Asked(checkpoint, lake, key="cells")
    embed(asked)
    first = seen_by_others(lake)
    with LakeWriter(lake) as writer:
        add_cells(writer, "third", 100, seed=2)
        writer.remove("second")
    outcome = embed(asked)
    assert (outcome.n_cells, outcome.n_embedded, outcome.n_taken_over) == (1_200, 100, 1_100)
    again = seen_by_others(lake)
    np.testing.assert_array_equal(again[:1_100], first[:1_100])
    assert len(again) == 1_200
    assert len(open_index(lake, "cells")) == 1_200
    with LakeWriter(lake) as writer:
        add_cells(writer, "fourth", 20, seed=3)
    embed(asked)
    numbers = [one.number for one in embeddings.generations(lake, HUMAN, "cells")]
    assert numbers == [1, 2], "the one before stays for its readers, older ones go"


def test_cells_without_a_commit_are_not_embedded(lake: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*words: object) -> None:
        raise Broken

    monkeypatch.setattr(LakeWriter, "_enter", lambda *words, **values: dies())
    with LakeWriter(lake) as writer, pytest.raises(Broken):
        add_cells(writer, "third", 100, seed=2)
    monkeypatch.undo()
    assert embed(Asked(checkpoint, lake)).n_cells == N_CELLS


def test_a_vacuum_in_the_middle_begins_anew(lake: str, checkpoint: str) -> None:
    from store.upkeep import collect, vacuum

    asked = Asked(checkpoint, lake, key="cells", block_cells=512)
    with pytest.raises(InterruptedRun):
        embed(asked, stop_after(1))
    with LakeWriter(lake) as writer:
        writer.remove("second")
    vacuum(lake)
    assert embed(asked).n_cells == 1_100
    before = seen_by_others(lake)
    collect(lake)
    np.testing.assert_array_equal(seen_by_others(lake), before)


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    lake: str, checkpoint: str, tiny_lake: Path, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], match: str, asked: Asked) -> None:
        with pytest.raises(kind, match=match):
            embed(asked)

    refused(MissingError, "no lake here", Asked(checkpoint, str(tmp_path / "none")))
    refused(
        UsageError,
        "say of which organism; organisms here: homo_sapiens, mus_musculus",
        Asked(checkpoint, str(tiny_lake)),
    )
    refused(InputRefused, "no feature of homo_sapiens is one of", Asked(checkpoint, str(tiny_lake), organism=HUMAN))
    refused(UsageError, "columns: soma_joinid", Asked(checkpoint, lake, "tisue == 'lung'"))
    refused(UsageError, "names no embeddings", Asked(checkpoint, lake, key="../x"))
    assert not Path(lake, "somaflow", "embeddings").exists()
    refused(UsageError, "no cell of homo_sapiens where", Asked(checkpoint, lake, "tissue == 'liver'"))
    with (
        Bulk(Asked(checkpoint, lake, key="cells")),
        pytest.raises(ConflictError, match="an embedding is being written"),
    ):
        embed(Asked(checkpoint, lake, key="others"))


def test_a_checkpoint_that_changed_under_a_run_is_noticed(lake: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    with Bulk(Asked(str(folder), lake)) as run:
        write_checkpoint(tmp_path / "model", seed=5)
        with pytest.raises(InputRefused, match="was to embed"):
            run.run(in_this_process, lambda what, done, total: None)


def test_numbers_that_are_none_are_never_written(lake: str, checkpoint: str) -> None:
    with Bulk(Asked(checkpoint, lake)) as run:
        values = np.full((5, 16), np.nan, np.float32)
        with pytest.raises(VerificationError, match="cell 0 holds what is no number"):
            embeddings.write_block(run.generation, 0, np.arange(5), values, {})


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_blocks_hold_every_cell_once_and_whole_row_tiles(share: float) -> None:
    random = np.random.default_rng(3)
    joinids = np.flatnonzero(random.random(60_000) < share)
    starts = block_starts(joinids)
    assert (starts[0], starts[-1]) == (0, len(joinids))
    sizes = np.diff(starts)
    assert (sizes > 0).all()
    assert sizes.max() <= BLOCK_CELLS + embeddings.ROW_TILE
    tiles = joinids // embeddings.ROW_TILE
    assert all(tiles[start - 1] != tiles[start] for start in starts[1:-1])
    assert block_starts(joinids[:0]).tolist() == [0]


def clustered(n_cells: int, width: int) -> np.ndarray:
    """Vectors around 30 centres, as embeddings of types are."""
    random = np.random.default_rng(7)
    centres = random.normal(size=(30, width)) * 3
    return (centres[random.integers(30, size=n_cells)] + random.normal(size=(n_cells, width))).astype(np.float32)


@pytest.mark.parametrize(("scale", "part_cells"), [(1.0, index.PART_CELLS), (1e5, index.PART_CELLS), (1.0, 1_000)])
def test_the_index_finds_what_looking_at_every_cell_finds(
    scale: float, part_cells: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART_CELLS", part_cells)
    lake = make_lake(tmp_path / "lake", 4_000)
    values = clustered(4_000, 64) * np.float32(scale)
    wanted = dict.fromkeys(("where", "vocabulary_hash"), "") | {"model_sha256": "a" * 64, "dimension": 64}
    wanted |= {"measurement": "RNA", "measurements": ["RNA"]}
    generation = embeddings.begin(open_lake(lake), HUMAN, "random", wanted)
    embeddings.make_array(generation)
    for number, start in enumerate(range(0, 4_000, 1_024)):
        rows = np.arange(start, min(start + 1_024, 4_000))
        embeddings.write_block(generation, number, rows, values[rows], {})
    embeddings.complete(generation, {})
    numbers = index.part_numbers(np.arange(4_000))
    parts = [index.make_part(generation, number) for number in numbers]
    assert [part["n_cells"] for part in parts] == [min(part_cells, 4_000)] * len(numbers)
    assert {part["dtype"] for part in parts} == {"f16" if scale == 1 else "f32"}
    index.complete_index(generation, numbers)
    opened = open_index(lake, "random")
    queries = clustered(4_500, 64)[4_000:] * np.float32(scale)
    far = np.sqrt(((queries[:, None, :].astype(np.float64) - values[None]) ** 2).sum(-1))
    nearest = np.argsort(far, axis=1)[:, :10]
    joinids, distances = opened.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(joinids.tolist(), nearest.tolist(), strict=True)])
    assert recall >= 0.95, recall
    np.testing.assert_allclose(distances, np.take_along_axis(far, joinids, axis=1), rtol=2e-3)
    assert (np.diff(distances, axis=1) >= 0).all()
    everything, _ = opened.search(queries[:2], 5_000)
    assert sorted(everything[0]) == sorted(everything[1]) == list(range(4_000))
    asked = everything[0][:50]
    names = open_lake(lake).obs(HUMAN, columns=["cell_id"])["cell_id"].to_numpy()
    assert [row["cell_id"] for row in opened.labels(asked, ["cell_id", "tissue"])] == list(names[asked])


def made_anew(lake: str, joinids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an exact search finds for the vectors of these cells."""
    every = open_lake(lake).obs(HUMAN)["soma_joinid"].to_numpy()
    values, _ = open_embeddings(lake, HUMAN, "cells").read(every)
    queries = values[np.searchsorted(every, joinids)].astype(np.float64)
    far = np.sqrt(((queries[:, None] - values[None].astype(np.float64)) ** 2).sum(-1))
    nearest = np.argsort(far, axis=1, kind="stable")[:, :5]
    return every[nearest], np.take_along_axis(far, nearest, axis=1)


def test_parts_that_lost_no_cell_are_gone_on_with_and_the_index_before_answers_meanwhile(
    lake: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART_CELLS", 600)
    asked = Asked(checkpoint, lake, key="cells")
    first = embed(asked).index
    assert [(one["part"], one["n_cells"], one["n_taken_over"]) for one in first["parts"]] == [
        (0, 600, 0),
        (1, 600, 0),
        (2, 200, 0),
    ]
    with LakeWriter(lake) as writer:
        add_cells(writer, "third", 500, seed=2)
    with pytest.raises(InterruptedRun, match="all cells are embedded; stopped at 1 of 4 parts"):
        embed(asked, stop_after(2))  # blocks, then a part
    assert open_embeddings(lake, HUMAN, "cells").number == 1
    with LakeWriter(lake) as writer:
        add_cells(writer, "fourth", 10, seed=3)
    with pytest.raises(InterruptedRun, match="stopped at 1 of 4 parts"):
        embed(asked, stop_after(2))
    assert (open_index(lake, "cells").known.generation.number, len(list_indexes(lake))) == (0, 1)
    with LakeWriter(lake) as writer:
        writer.remove("fourth")
    second = embed(asked)
    assert second.n_embedded == 0
    assert [(one["n_cells"], one["n_taken_over"]) for one in second.index["parts"]] == [
        (600, 600),
        (600, 600),
        (600, 200),
        (100, 0),
    ]
    with LakeWriter(lake) as writer:
        writer.remove("second")  # 1,100 to 1,399
    third = embed(asked).index
    assert [(one["n_cells"], one["n_taken_over"]) for one in third["parts"]] == [
        (600, 600),
        (500, 0),
        (400, 0),
        (100, 100),
    ]
    opened = open_index(lake, "cells")
    some = np.array([3, 590, 601, 1_099, 1_400, 1_799, 1_801, 1_899])
    (joinids, far), values = made_anew(lake, some), opened.known.generation.read(some)[0]
    found, distances = opened.search(values, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), joinids.tolist(), strict=True)]) > 0.9
    np.testing.assert_allclose(distances, far, atol=0.02)


def file_of(folder: Path, number: int, ending: str) -> Path:
    (found,) = (folder / f"{number:012d}").glob(f"*{ending}")
    return found


def test_cells_that_are_alike_are_all_found_and_what_is_damaged_is_made_again_alone(
    lake: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART_CELLS", 1_000)
    monkeypatch.setattr(index, "FEW", 100)
    asked = Asked(checkpoint, lake, key="cells")
    real = embeddings.write_block

    def alike(generation: object, number: int, joinids: np.ndarray, values: np.ndarray, said: object) -> None:
        values[joinids >= 1_010] = 3.0
        real(generation, number, joinids, values, said)  # type: ignore[arg-type]

    monkeypatch.setattr(embeddings, "write_block", alike)
    embed(asked)
    opened = open_index(lake, "cells")
    for queries in (np.full((1, 16), 3, np.float32), np.zeros((2, 16), np.float32), np.zeros((0, 16), np.float32)):
        for k in (150, 350, 2_000):
            joinids, distances = opened.search(queries, k)
            assert joinids.shape == (len(queries), min(k, N_CELLS))
            assert all(len(set(row)) == len(row) for row in joinids.tolist())
            assert np.isfinite(distances).all()
    folder = Path(index.folder_of(opened.known.generation))
    before = file_of(folder, 1, index.VECTORS).stat().st_mtime_ns
    damaged = file_of(folder, 0, index.VECTORS)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputRefused, match=f"SHA-256 differs from the manifest's; remove {damaged.parent} and embed"):
        open_index(lake, "cells")
    shutil.rmtree(damaged.parent)
    embed(asked)
    assert len(open_index(lake, "cells")) == N_CELLS
    file_of(folder, 0, index.CELLS).unlink()
    embed(asked)
    assert len(open_index(lake, "cells")) == N_CELLS
    assert file_of(folder, 1, index.VECTORS).stat().st_mtime_ns == before
    for number in (0, 1):
        file_of(folder, number, index.CELLS).write_bytes(b"")
    embed(asked)
    assert len(open_index(lake, "cells")) == N_CELLS


def test_two_makers_of_a_part_leave_one_that_is_whole(
    lake: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = index._put, []

    def late(path: Path, uri: str) -> None:
        if not others:
            others.append(uri)
            monkeypatch.setattr(index, "CONNECTIVITY", 8)  # another graph than that of the one that waits
            generation = open_embeddings(lake, HUMAN, "cells")
            index.make_part(generation, 0)
        real(path, uri)

    monkeypatch.setattr(index, "_put", late)
    embed(Asked(checkpoint, lake, key="cells"))
    assert len(open_index(lake, "cells")) == N_CELLS


def test_a_part_before_that_is_damaged_is_made_anew(
    lake: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART_CELLS", 1_000)
    asked = Asked(checkpoint, lake, key="cells")
    embed(asked)
    folder = Path(index.folder_of(open_embeddings(lake, HUMAN, "cells")))
    file_of(folder, 0, index.VECTORS).write_bytes(b"nothing")
    file_of(folder, 1, index.CELLS).unlink()
    with LakeWriter(lake) as writer:
        add_cells(writer, "third", 100, seed=2)
    assert [one["n_taken_over"] for one in embed(asked).index["parts"]] == [0, 0]
    assert len(open_index(lake, "cells")) == 1_500


def test_an_index_that_was_changed_is_refused(lake: str, checkpoint: str) -> None:
    embed(Asked(checkpoint, lake, key="cells"))
    place = file_of(Path(index.folder_of(open_embeddings(lake, HUMAN, "cells"))), 0, index.VECTORS)
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    with pytest.raises(InputRefused, match=r"usearch: its SHA-256 differs"):
        open_index(lake, "cells")
    place.unlink()
    with pytest.raises(MissingError, match="is gone"):
        open_index(lake, "cells")


@pytest.mark.ray
def test_a_worker_that_is_killed_does_its_block_again(
    lake: str, checkpoint: str, embedded: str, ray_cluster: None
) -> None:
    import ray

    from serve.workers import ray_crew

    killed: list[int] = []

    @contextmanager
    def hire(common: Common) -> Iterator[Crew]:
        with ray_crew(common, workers=1, cpus=1) as crew:
            killed.append(ray.get(crew.actors[0].pid.remote()))  # type: ignore[attr-defined]
            yield crew

    def progress(what: str, done: int, total: int) -> None:
        if done == 512:
            os.kill(killed[0], signal.SIGKILL)

    asked = Asked(checkpoint, lake, key="cells", block_cells=512)
    outcome = embed(asked, hire=hire, progress=progress)
    assert outcome.n_embedded == N_CELLS
    expected = open_embeddings(embedded, HUMAN, "cells")
    assert expected.manifest is not None
    np.testing.assert_allclose(seen_by_others(lake), expected.read(np.arange(N_CELLS))[0], atol=1e-5)
