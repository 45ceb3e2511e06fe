"""This module says what a bulk job is to those who ask for it: its record, and what starts and stops one.

A record lies in the lake (``<lake>/somaflow/jobs/<id>.json``) and is rewritten whole as the job goes on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from store import records
from store.lake import utc_now

if TYPE_CHECKING:
    from serve.bulk import Asked

ENDING = "ends after the cells at hand; ask for the same again when it has, to go on from there"

State = Literal["running", "done", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Record:
    """What is known of a job.

    Attributes:
        id: Follows from the lake, the filter, the model and the name: the same question is the same job.
        lake: The lake's name at this server.
        organism: Whose cells.
        name: Of the embeddings.
        where: The filter; empty takes all cells.
        model_sha256: The model.
        state: ``interrupted`` means that its process is gone: the same question goes on from there.
        done: Cells that are done.
        total: Cells in all; 0 while that is not known.
        message: What there is to say.
        created: When it was asked for.
        updated: When this was written.
    """

    id: str
    lake: str
    organism: str
    name: str
    where: str
    model_sha256: str
    state: State = "running"
    done: int = 0
    total: int = 0
    message: str = ""
    created: str = ""
    updated: str = ""

    def now(self, **values: Any) -> Record:
        """Return the record with some values changed."""
        return replace(self, **values, updated=utc_now())


class Jobs(Protocol):
    """Where jobs run."""

    async def start(self, asked: Asked, record: Record) -> None:
        """Start a job unless it runs; it has the lake's lock when this returns.

        Raises:
            SomaflowError: What :class:`serve.bulk.Bulk` raises.
        """
        ...

    async def alive(self, job: str) -> bool:
        """Say whether somebody works on a job."""
        ...

    async def cancel(self, job: str) -> None:
        """End a job after the block at hand; nothing happens where none runs."""
        ...


def _folder(lake: str) -> str:
    return records.join(records.absolute(lake), records.FOLDER, "jobs")


def write(lake: str, record: Record) -> None:
    """Write a job's record over what stands there."""
    records.replace(records.join(_folder(lake), f"{record.id}.json"), asdict(record))


def read(lake: str, job: str) -> Record | None:
    """Read a job's record.

    Raises:
        StorageError: A newer version of somaflow made it.
    """
    values = records.read(records.join(_folder(lake), f"{job}.json"))
    return None if values is None else _record(lake, values)


def read_all(lake: str) -> list[Record]:
    """Read the records of all jobs of a lake, oldest first.

    Raises:
        StorageError: A newer version of somaflow made one.
    """
    return sorted((_record(lake, values) for values in records.read_all(_folder(lake))), key=lambda one: one.created)


def _record(lake: str, values: dict[str, Any]) -> Record:
    return records.typed(Record, values, f"{lake}: job {values.get('id')}")
