"""This module keeps decoded blocks of snapshots in a local folder, so that they need no decoding the next time.

A block is one file: a header, the lengths of its rows, features, counts. It is written under another name and renamed,
so that a process that dies leaves no half of one, and several processes may share a folder. Its checksum is proved the
first time a process opens it; a file that fails is removed and decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import struct
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<8sqqq32s")  # magic, rows, bytes of features, bytes of counts, SHA-256 of what follows
MAGIC = b"somaflo1"
STALE_S = 3600.0
"""Files that are being written are left alone for so long."""

OURS = re.compile("[0-9a-f]{32}")
"""Names of the folders of blocks: the beginning of a part's id."""
OPEN_FILES = 1024
"""Blocks that a process keeps mapped; the kernel allows some ten thousand maps."""
SPARE = 0.1
"""Share of the cache that is emptied when it is full: all files are looked at to find the oldest."""
UNSEEN = 0.01
"""Share of the cache that a process writes before it looks at all files again: others write there too."""


class BlockCache:
    """Decoded blocks in a folder of bounded size; the least recently opened ones go first.

    Args:
        folder: Where; made if it is not there. Fastest on a local NVMe disk or in shared memory. What else lies there
            stays, and does not count.
        max_bytes: What the folder may hold, over all snapshots and processes; while several write, for a moment a
            hundredth more for each of them.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._open: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._proved: set[tuple[Path, int]] = set()
        self._lock = threading.Lock()
        for left in (path for folder in self._folders() for path in folder.glob(".*.part")):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink()
        self._bytes = sum(size for _, size, _ in self._files())
        self._look_at = self._bytes + UNSEEN * max_bytes
        self._writing = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (BlockCache, (self.folder, self.max_bytes))

    def lengths(self, key: Sequence[str | int]) -> NDArray[np.int64] | None:
        """Return how long the rows of a block are; None when it is not here."""
        content = self._content(self._path(key))
        if content is None:
            return None
        _, n_rows, *_ = HEADER.unpack_from(content)
        return np.frombuffer(content, np.int64, n_rows, HEADER.size)

    def load(self, key: Sequence[str | int], features: NDArray[Any], counts: NDArray[Any]) -> bool:
        """Fill both arrays with a block's values; False when it is not here."""
        content = self._content(self._path(key))
        found = False
        if content is not None:
            _, n_rows, n_features, n_counts, _ = HEADER.unpack_from(content)
            found = (n_features, n_counts) == (features.nbytes, counts.nbytes)
        if content is None or not found:
            self.misses += 1
            return False
        start = HEADER.size + 8 * n_rows
        features[:] = np.frombuffer(content, features.dtype, len(features), start)
        counts[:] = np.frombuffer(content, counts.dtype, len(counts), start + n_features)
        self.hits += 1
        return True

    def store(
        self, key: Sequence[str | int], lengths: NDArray[np.int64], features: NDArray[Any], counts: NDArray[Any]
    ) -> None:
        """Keep a block; a disk that is full or read-only keeps nothing more, and nobody is told."""
        parts = [np.ascontiguousarray(part).data.cast("B") for part in (lengths, features, counts)]
        size = HEADER.size + sum(part.nbytes for part in parts)
        path = self._path(key)
        if size > self.max_bytes or os.path.exists(path):  # Path.exists raises where the folder is closed
            return
        self._make_room(size)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        head = HEADER.pack(MAGIC, len(lengths), features.nbytes, counts.nbytes, digest.digest())
        part_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with part_path.open("wb") as file:
                file.write(head)
                file.writelines(parts)
            os.replace(part_path, path)
        except OSError:
            with contextlib.suppress(OSError):
                part_path.unlink()
            written = 0
        else:
            written = size
        with self._lock:
            self._writing -= size
            self._bytes += written

    def _path(self, key: Sequence[str | int]) -> Path:
        snapshot_id, *rest = key
        return self.folder / str(snapshot_id)[:32] / "-".join(map(str, rest))

    def _content(self, path: Path) -> mmap.mmap | None:
        with self._lock:
            known = self._open.get(path)
        if known is not None:
            return known
        try:
            with path.open("rb") as file:
                mark = (path, os.fstat(file.fileno()).st_ino)
                content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            with contextlib.suppress(OSError):  # it may only be read
                os.utime(path)
        except OSError:
            return None
        except ValueError:  # nothing is in it
            content = None
        if content is None or (mark not in self._proved and not _whole(content)):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with self._lock:
            self._proved.add(mark)
            self._open[path] = content
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return content

    def _folders(self) -> list[Path]:
        """Return the folders that blocks lie in; others beside them are somebody else's."""
        return [path for path in self.folder.iterdir() if OURS.fullmatch(path.name) and path.is_dir()]

    def _files(self) -> list[tuple[float, int, str]]:
        """Return when each block was opened last, its size and its path."""
        found = []
        for folder in self._folders():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with contextlib.suppress(OSError):
                            state = entry.stat()
                            found.append((state.st_mtime, state.st_size, entry.path))
        return found

    def _make_room(self, size: int) -> None:
        """Count a file that is about to be written; where it does not fit, remove the oldest, and some room beside."""
        with self._lock:
            self._writing += size
            room = self.max_bytes - self._writing
            if self._bytes <= min(room, self._look_at):
                return
            files = self._files()
            self._bytes = sum(held for _, held, _ in files)
            full, gone = self._bytes > room, set()
            for _, held, name in sorted(files) if full else ():
                if self._bytes <= room - SPARE * self.max_bytes:
                    break
                path = Path(name)
                gone.add(path)
                self._open.pop(path, None)
                with contextlib.suppress(OSError):
                    path.unlink()
                self._bytes -= held
            self._look_at = self._bytes + UNSEEN * self.max_bytes
            if gone:
                self._proved = {mark for mark in self._proved if mark[0] not in gone}


def _whole(content: mmap.mmap) -> bool:
    """Say whether a file is all that was written; a killed machine may leave zeros or less."""
    if len(content) < HEADER.size:
        return False
    magic, n_rows, n_features, n_counts, digest = HEADER.unpack_from(content)
    if magic != MAGIC or min(n_rows, n_features, n_counts) < 0:
        return False
    if len(content) != HEADER.size + 8 * n_rows + n_features + n_counts:
        return False
    return hashlib.sha256(memoryview(content)[HEADER.size :]).digest() == digest
