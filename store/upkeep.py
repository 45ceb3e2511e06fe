"""This module keeps a lake tidy: rolls back, collects garbage, merges small files, lets old versions go.

Everything here holds the lake's lock, and nothing here changes what a commit that can be opened reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from store import catalog, records
from store.build import remove_leavings
from store.context import storage
from store.errors import UsageError
from store.fragments import consolidate as consolidate_array
from store.fragments import fragments, purge, remove_fragments, remove_older
from store.lake import Lake, layer_uris, table_uris
from store.writer import LakeWriter


@dataclass(frozen=True)
class Leavings:
    """What dead drivers left behind.

    Attributes:
        writes: Writes and deletes without a commit that were undone in the tables.
        fragments: Fragments of X that no commit names and no plan can still use.
        uploads: Unfinished S3 multipart uploads below the lake.
        plans: Datasets that were begun and never committed.
        builds: Snapshots that are whole, of whose building something was left.
        note: Why unfinished uploads could not be removed; empty where they could.
    """

    writes: int
    fragments: int
    uploads: int
    plans: tuple[str, ...]
    builds: int = 0
    note: str = ""


@contextmanager
def _open(lake_uri: str) -> Iterator[LakeWriter]:
    with storage(lake_uri, "every commit that can be opened is whole"), LakeWriter(lake_uri, make=False) as writer:
        yield writer


def recover(lake_uri: str) -> Leavings:
    """Bring a lake back to its newest commit; what was begun stays begun, for the same ingest to complete."""
    with _open(lake_uri) as writer:
        return Leavings(writer.undone, 0, 0, tuple(plan.dataset_id for plan in writer.lake().pending()))


def collect(lake_uri: str) -> Leavings:
    """Remove everything that no commit needs, also counts of datasets that were begun and never committed.

    So with what the building of whole snapshots has left.

    The same ingest, run again, begins such a dataset anew.
    """
    with _open(lake_uri) as writer:
        lake = writer.lake()
        needed = _needed(writer, since=0)
        removed = 0
        for uri in layer_uris(lake.uri):
            extra = [item.name for item in fragments(uri) if item.name not in needed]
            remove_fragments(uri, extra)
            removed += len(extra)
        done = {commit.dataset["number"] for commit in lake.history if commit.dataset}
        _remove_sides(lake.uri, {plan.number for plan in catalog.plans(lake.uri)} - done)
        pending = tuple(plan.dataset_id for plan in lake.pending())
        try:
            uploads, note = _abort_uploads(lake.uri), ""
        except records.FAILURES as error:  # some roles may not list them
            reason = records.told(error)
            uploads, note = 0, f"unfinished uploads stay, the store refuses to list or to abort them: {reason}"
        return Leavings(writer.undone, removed, uploads, pending, remove_leavings(lake.uri), note)


def _needed(writer: LakeWriter, since: int) -> set[str]:
    """Name the fragments of X that some commit from ``since`` on reads."""
    history = writer.lake().history
    alive = {commit.number for commit in catalog.current(history[: since + 1])}
    return {
        name
        for commit in history
        if commit.number in alive or commit.number > since
        for content in commit.content.values()
        for name in content.fragments
    }


def _abort_uploads(lake_uri: str) -> int:
    if not records.is_s3(lake_uri):
        return 0
    import s3fs

    filesystem = s3fs.S3FileSystem()
    bucket, _, prefix = lake_uri.removeprefix("s3://").partition("/")
    aborted, more = 0, {"Prefix": f"{prefix.rstrip('/')}/" if prefix else ""}  # not of "lake-2" beside "lake"
    while more:
        found = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, **more)
        for upload in found.get("Uploads", ()):
            with suppress(FileNotFoundError):  # gone: the reply to an earlier try was lost
                filesystem.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
            aborted += 1
        markers = {"KeyMarker": found.get("NextKeyMarker"), "UploadIdMarker": found.get("NextUploadIdMarker")}
        markers = {key: value for key, value in markers.items() if value}
        more = {"Prefix": more["Prefix"], **markers} if found.get("IsTruncated") and markers else {}
    return aborted


def vacuum(lake_uri: str, keep_from: int | None = None) -> tuple[int, int]:
    """Let commits before ``keep_from`` (none: the newest) go, with the counts and side tables that only they read.

    Where no commit but the newest stays, labels in obs go too (see :func:`purge`); readers that have it open may have
    to open the lake again.

    Returns:
        The oldest commit that can be opened from now on, and the number of fragments removed.

    Raises:
        UsageError: No such commit.
    """
    with _open(lake_uri) as writer:
        lake = writer.lake()
        since = lake.commit.number if keep_from is None else keep_from
        if not 0 <= since <= lake.commit.number:
            raise UsageError(f"{lake.uri}: no commit {since}; the lake has commits 0 to {lake.commit.number}")
        first = max(since, catalog.first_openable(lake.uri))
        # the record comes before the removal: a reader of an old commit is refused, never given half of it
        catalog.create_vacuumed(lake.uri, first)
        needed = _needed(writer, first)
        old = {name for commit in lake.history for content in commit.content.values() for name in content.fragments}
        removed = 0
        for uri in layer_uris(lake.uri):
            extra = [item.name for item in fragments(uri) if item.name in old - needed]
            remove_fragments(uri, extra)
            removed += len(extra)
        history = lake.history[: first + 1]
        for table in sorted({name for commit in history for name in commit.whole}):
            remove_older(records.join(lake.uri, table), catalog.last_whole(history, table))
        standing = {commit.dataset["number"] for commit in catalog.current(history)}
        gone = [c.dataset for c in history if c.dataset and c.dataset["number"] not in standing]
        _remove_sides(lake.uri, {dataset["number"] for dataset in gone})
        if first == lake.commit.number:
            _purge_obs(lake, gone)
        return first, removed


def _purge_obs(lake: Lake, gone: list[dict[str, Any]]) -> None:
    """Remove the labels of datasets that the newest commit does not have."""
    standing = [commit.dataset for commit in lake.current]
    for organism in sorted({dataset["organism"] for dataset in gone}):
        uri = records.join(lake.uri, "census_data", organism, "obs")
        purge(uri, *(_spans(datasets, organism) for datasets in (standing, gone)))


def _spans(datasets: list[dict[str, Any]], organism: str) -> list[tuple[int, int]]:
    mine = [dataset for dataset in datasets if dataset["organism"] == organism]
    return [(dataset["obs_start"], dataset["obs_start"] + dataset["n_obs"] - 1) for dataset in mine]


def _remove_sides(lake_uri: str, plans: set[int]) -> None:
    """Remove side tables and figures of quality of datasets, by their plans' numbers."""
    for folder in ("sides", "quality"):
        place = records.join(lake_uri, records.FOLDER, folder)
        names = [name for name in records.names(place) if (number := name[:12]).isdigit() and int(number) in plans]
        records.remove_each([records.join(place, name) for name in names], files=True)


def consolidate(lake_uri: str, progress: Callable[[str], None] = lambda name: None) -> int:
    """Merge the tables' fragments and the footers of all arrays; return the number of arrays.

    Every commit reads as before. Counts themselves stay as they were written: a dataset's fragments are disjoint, so
    that merging them would only copy the lake. So do commit files: TileDB packs deletes with them into one file, and
    packs no second time once one holds a delete.
    """
    with _open(lake_uri) as writer:
        tables, layers = table_uris(writer.uri), layer_uris(writer.uri)
        for uri in tables:
            progress(uri.removeprefix(writer.uri + "/"))
            consolidate_array(uri, ("fragment_meta", "fragments"))
        for uri in layers:
            progress(uri.removeprefix(writer.uri + "/"))
            consolidate_array(uri, ("fragment_meta",))
        return len(tables) + len(layers)
