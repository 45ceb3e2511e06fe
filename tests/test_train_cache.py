"""The cache of decoded blocks: same values, bounded size, nothing half-written, damage found, shared by processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from encoded import add_dataset

from store.part import Part
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.cache import BlockCache
from train.stream import Stream

ROOT = Path(__file__).parent.parent
PART = "5" * 32


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 300, {"RNA": 50, "protein": 6})
    return create_snapshot(uri, "s", SnapshotSettings(seed=2))


def content(snapshot: Snapshot, cache: BlockCache | Path | None) -> list[list[object]]:
    stream = Stream(snapshot, batch=32, block=25, window=3, cache=cache)
    return [
        [
            cells.row.tolist(),
            *((p.indptr.tolist(), p.features.tolist(), p.counts.tolist()) for p in cells.counts.values()),
        ]
        for cells in stream.epoch(0)
    ]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_warm_cache_gives_the_same_batches_and_reads_nothing(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(snapshot, None)
    assert content(snapshot, tmp_path) == expected

    def unwanted(self: Part, *words: object) -> None:
        raise AssertionError("the store was asked")

    for name in ("read_into", "indptr", "codes", "numbers"):
        monkeypatch.setattr(Part, name, unwanted)
    cache = BlockCache(tmp_path, 2**30)
    assert content(snapshot, cache) == expected
    assert cache.misses == 0
    assert cache.hits >= len(files(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_block_is_decoded_again(snapshot: Snapshot, tmp_path: Path, damage: str) -> None:
    expected = content(snapshot, tmp_path)
    victim = files(tmp_path)[3]
    good = victim.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    victim.write_bytes({"flip": bytes(flipped), "cut": good[:-3], "empty": b"", "foreign": b"x" * 99}[damage])
    assert content(snapshot, tmp_path) == expected
    assert victim.read_bytes() == good


def test_the_folder_stays_within_its_size_and_the_oldest_go_first(snapshot: Snapshot, tmp_path: Path) -> None:
    content(snapshot, tmp_path / "all")
    size = sum(path.stat().st_size for path in files(tmp_path / "all"))
    cache = BlockCache(tmp_path / "small", size // 2)
    assert content(snapshot, cache) == content(snapshot, None)
    assert size // 4 < sum(path.stat().st_size for path in files(tmp_path / "small")) <= size // 2
    room = BlockCache(tmp_path / "order", 3000)
    blocks = [np.full(300, number, np.uint16) for number in range(4)]
    for number, block in enumerate(blocks):
        room.store((PART, number), np.array([300]), block, block)
        os.utime(tmp_path / "order" / PART / str(number), (number, number))
    assert [path.name for path in files(tmp_path / "order")] == ["2", "3"]
    many = BlockCache(tmp_path / "many", 1_000_000)
    with mock.patch.object(many, "_files", side_effect=many._files) as looked:
        for number in range(1600):
            many.store((PART, number), np.array([300]), blocks[0], blocks[0])
    assert 690 < len(files(tmp_path / "many")) < 790
    assert looked.call_count < 240  # not once for each file
    room.store((PART, "huge"), np.array([9000]), np.zeros(9000, np.uint16), np.zeros(9000, np.uint16))
    assert len(files(tmp_path / "order")) == 2


def test_what_others_keep_in_the_folder_stays(snapshot: Snapshot, tmp_path: Path) -> None:
    theirs = [tmp_path / "thesis/only_copy.h5ad", tmp_path / "thesis/.download.part", tmp_path / "notes.txt"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100_000)
        os.utime(path, (1, 1))
    cache = BlockCache(tmp_path, 20_000)
    assert content(snapshot, cache) == content(snapshot, None)
    assert all(path.exists() for path in theirs)
    held = sum(path.stat().st_size for path in files(tmp_path)) - 300_000
    assert 10_000 < held <= 20_000, "others' files do not count"


def test_processes_that_write_side_by_side_stay_within_the_size_together(tmp_path: Path) -> None:
    caches = [BlockCache(tmp_path, 1_000_000) for _ in range(4)]  # each counts its own writes, as a process does
    block = np.zeros(1000, np.uint16)
    for number in range(500):
        for who, cache in enumerate(caches):
            cache.store((PART, who, number), np.array([1000]), block, block)
        if number % 25 == 24:
            assert sum(path.stat().st_size for path in files(tmp_path)) <= 1_040_000
    assert sum(path.stat().st_size for path in files(tmp_path)) > 850_000


def test_a_disk_that_takes_nothing_is_no_error(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.cache.os.replace", full)
    assert content(snapshot, tmp_path) == content(snapshot, None)
    assert files(tmp_path) == []


def test_a_shared_cache_that_one_may_only_read_is_read(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(snapshot, tmp_path)
    held = {path: path.read_bytes() for path in files(tmp_path)}

    def refused(*words: object, **more: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(f"train.cache.os.{name}", refused)
    cache = BlockCache(tmp_path, 2**30)
    assert content(snapshot, cache) == expected
    assert (cache.hits > 0, cache.misses) == (True, 0)
    assert {path: path.read_bytes() for path in files(tmp_path)} == held


def test_blocks_in_a_folder_that_is_closed_to_one_are_decoded(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, inside = content(snapshot, tmp_path), files(tmp_path)[0].parent

    def closed(function: Any) -> Any:
        def asked(path: Any, *words: Any, **more: Any) -> Any:
            if not isinstance(path, int) and Path(path).parent == inside:
                raise PermissionError(13, "Permission denied")
            return function(path, *words, **more)

        return asked

    monkeypatch.setattr("os.stat", closed(os.stat))
    monkeypatch.setattr("io.open", closed(io.open))
    assert content(snapshot, tmp_path) == expected


def test_processes_share_a_folder_and_a_killed_one_leaves_it_valid(snapshot: Snapshot, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        from store.snapshot import open_snapshot
        from train.stream import Stream
        snapshot = open_snapshot({snapshot.lake_uri!r}, "s")
        stream = Stream(snapshot, batch=32, block=25, window=3, cache={str(tmp_path)!r})
        while True:
            for _ in stream.epoch(0):
                pass
            for left in stream.cache.folder.glob("*/*"):
                left.unlink(missing_ok=True)
            stream.cache._open.clear()
    """)
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    try:
        while not files(tmp_path):
            time.sleep(0.05)
        expected = content(snapshot, None)
        for _ in range(5):
            assert content(snapshot, tmp_path) == expected
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    assert content(snapshot, tmp_path) == expected
    for path in files(tmp_path):
        os.utime(path, (1, 1))
    BlockCache(tmp_path, 2**30)
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]
