"""This module keeps to foreign archives and folders, which write and read where they please when they are let."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from store.errors import InputRefused
from store.records import is_local


def refuse_links_out(uri: str, places: Iterable[str] | None = None) -> None:
    """Refuse a folder on this machine of which a part lies elsewhere: whoever made it could name any file here.

    The folder itself may be reached through links, and links within it are followed.

    Args:
        uri: The folder; one that lies elsewhere than on this machine has no links.
        places: Files of it that are to be read; all of it when left out.

    Raises:
        InputRefused: One is a link to a place outside, or lies below one.
    """
    if not is_local(uri):
        return
    folder = uri.removeprefix("file://")
    inside = os.path.realpath(folder)
    for place in _links(folder) if places is None else places:
        if os.path.commonpath([inside, os.path.realpath(place)]) != inside:
            raise InputRefused(f"{place}: is a link out of {folder}; put the file itself there, if it belongs there")


def _links(folder: str) -> Iterator[str]:
    for above, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if os.path.islink(path := os.path.join(above, name)))


def members(
    archive: Path, into: Path, *, budget_bytes: int = 2**35, max_members: int = 10_000, max_ratio: float = 200.0
) -> list[tuple[str, Path]]:
    """Take the regular files out of a .tar(.gz) or .zip, one by one, under names of our own.

    Folders and the junk of desktop systems (``._*``, ``__MACOSX``) are left where they are.

    Returns:
        The name in the archive, and where the file is now.

    Raises:
        InputRefused: It is no archive, names places outside, holds links or devices, or unpacks to more than
            ``budget_bytes`` or ``max_ratio`` times its size; nothing stays in ``into`` then.
    """
    taken: list[tuple[str, Path]] = []
    limit = min(budget_bytes, int(max_ratio * archive.stat().st_size) + 2**20)
    try:
        for number, (name, opened) in enumerate(_files(archive)):
            if number >= max_members:
                raise InputRefused(f"{archive}: holds more than {max_members:,} files")
            placed = into / f"{number:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name.rsplit('/', 1)[-1])[-80:]}"
            taken.append((name, placed))
            with placed.open("wb") as out:
                while part := opened.read(2**20):
                    limit -= len(part)
                    if limit < 0:
                        raise InputRefused(f"{archive}: {name} unpacks to more than an honest archive would")
                    out.write(part)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        for _, placed in taken:
            placed.unlink(missing_ok=True)
        if isinstance(error, InputRefused):
            raise
        raise InputRefused(f"{archive}: not a readable archive: {error}") from error
    except InputRefused:
        for _, placed in taken:
            placed.unlink(missing_ok=True)
        raise
    return taken


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if _wanted(archive, info.filename, info.is_dir(), link):
                    with zipped.open(info) as opened:
                        yield info.filename, opened
        return
    with tarfile.open(archive, "r|*") as packed:
        for number, member in enumerate(packed):
            if number > 100_000:
                raise InputRefused(f"{archive}: holds more than 100,000 entries")
            special = not (member.isreg() or member.isdir())
            if _wanted(archive, member.name, member.isdir(), special):
                content = packed.extractfile(member)
                assert content is not None
                yield member.name, content


def _wanted(archive: Path, name: str, folder: bool, special: bool) -> bool:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise InputRefused(f"{archive}: {name!r} names a place outside the archive")
    if special:
        raise InputRefused(f"{archive}: {name!r} is a link or a device")
    return not (folder or parts[-1].startswith("._") or "__MACOSX" in parts)
