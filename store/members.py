"""This module says what stands in the lake's groups and enters members in them, whatever this machine's clock says.

TileDB looks at a group or an array as it was at a moment, by default now by the local clock. What a machine wrote whose
clock is ahead, or this one before its clock was set back, is not there then. So here everything is looked at, and each
write comes after all that it builds on.
"""

from __future__ import annotations

import re
import time

import tiledb

from store import records
from store.context import EVER, tiledb_context

STAMPED = re.compile(r"__\d+_(\d+)_")


def members(group_uri: str) -> dict[str, str]:
    """Return the members of a group, whenever they were entered: name to address."""
    with _group(group_uri, "r", EVER) as group:
        return {str(member.name): str(member.uri) for member in group}


def enter(group_uri: str, name: str, folder: str, timestamp_ms: int) -> None:
    """Make a folder of a group its member ``name`` at a timestamp, in place of one that had the name."""
    standing = name in members(group_uri)
    with _group(group_uri, "w", timestamp_ms) as group:
        if standing:
            group.remove(name)
        group.add(folder, name=name, relative=True)


def _group(uri: str, mode: str, timestamp_ms: int) -> tiledb.Group:
    # SOMA opens no group for writing that was made later than the local clock says
    context = tiledb_context()
    config = tiledb.Config({**context.config().dict(), "sm.group.timestamp_end": str(timestamp_ms)})
    return tiledb.Group(uri, mode, config=config, ctx=context)


def newest_stamp(uri: str) -> int:
    """Return the timestamp from which on a group is whole, or an array can be written to; 0 where none says one."""
    names = [name for folder in ("__meta", "__group") for name in records.names(records.join(uri, folder))]
    return max((int(match[1]) for name in names if (match := STAMPED.match(name))), default=0)


def write_time(uri: str, after_ms: int = 0) -> int:
    """Return a timestamp to write to a group or an array at: now, but after what it builds on and ``after_ms``."""
    return max(int(time.time() * 1000), newest_stamp(uri) + 1, after_ms + 1)
