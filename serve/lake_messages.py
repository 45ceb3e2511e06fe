"""This module holds the requests and replies about lakes: nearest cells, and bulk jobs (see :mod:`serve.messages`)."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from serve.index import LABELS
from serve.messages import _CELLS_EXAMPLE, Counts, Coverage, Name, Prompts, Provenance, Reply, Request

Label = Literal[LABELS]  # type: ignore[valid-type]
DEFAULT_LABELS = ["cell_type", "cell_type_ontology_term_id", "tissue", "disease", "dataset_id", "donor_id"]
MAX_NEIGHBORS = 200


class NeighborsOptions(Request):
    """What is told of the neighbours."""

    columns: list[Label] = Field(
        default=DEFAULT_LABELS,
        max_length=len(LABELS),
        description="Columns of the lake's obs to give of each neighbour.",
    )
    min_coverage: float | None = Field(default=None, ge=0, le=1)


class NeighborsRequest(Request):
    """Cells whose nearest cells in a lake are asked."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"counts": _CELLS_EXAMPLE, "k": 10, "index": "atlas/homo_sapiens"}]}
    )

    counts: Counts
    prompts: Prompts = Field(
        default_factory=dict, description="Only the organism counts, as for the cells of the lake; all are checked."
    )
    k: int = Field(default=10, ge=1, le=MAX_NEIGHBORS, description="Neighbours of each cell.")
    index: Name = Field(
        default="",
        description="`LAKE/ORGANISM/NAME` from GET /v1/indexes, or the beginning of it, where that is enough to find "
        "one that the present model made.",
    )
    options: NeighborsOptions = NeighborsOptions()


class Neighbor(Reply):
    """A cell of the lake."""

    soma_joinid: int
    distance: float = Field(description="Euclidean, between embeddings.")
    obs: dict[str, str | None]


class TypeShare(Reply):
    """A type, and how many of the neighbours are of it."""

    cell_type: str
    cell_type_ontology_term_id: str
    share: float = Field(description="Of the neighbours whose type is known.")


class CellNeighbors(Reply):
    """The neighbours of one cell, nearest first, and their vote on its type, most votes first."""

    neighbors: list[Neighbor]
    types: list[TypeShare]


class NeighborsReply(Reply):
    """One entry per cell, in the order of the request."""

    index: str
    organism: str = Field(description="Of the lake's cells.")
    commit: int = Field(description="The lake's commit that was embedded.")
    cells: list[CellNeighbors]
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class IndexCard(Reply):
    """An index of a lake's cells."""

    index: str
    lake: str
    organism: str
    name: str
    model_sha256: str
    answers: bool = Field(description="Whether the model that made it answers here now.")
    n_cells: int
    dimension: int
    commit: int
    created: str


class IndexesReply(Reply):
    """What can be searched, and the lakes that can be embedded."""

    indexes: list[IndexCard]
    lakes: list[str]


class JobRequest(Request):
    """Cells of a lake to embed with the model that answers now, and to index."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lake": "atlas", "where": "tissue == 'blood'"}]})

    lake: Name = Field(description="One of the `lakes` of GET /v1/indexes.")
    where: str = Field(default="", max_length=4_000, description="Value filter on obs; empty takes all cells.")
    organism: Name = Field(default="", description="Whose cells; may be left out where the lake holds one.")
    name: Name = Field(default="", description="Of the embeddings; empty takes one from the model's digest.")
    replace: bool = Field(default=False, description="Take the name over from another model or filter.")


class JobReply(Reply):
    """A bulk job."""

    id: str
    lake: str
    organism: str
    name: str
    where: str
    model_sha256: str
    state: Literal["running", "done", "failed", "cancelled", "interrupted"] = Field(
        description="`interrupted`: its process is gone; ask for the same again to go on."
    )
    done: int = Field(description="Cells that are done.")
    total: int = Field(description="Cells in all; 0 while that is not known.")
    message: str
    created: str
    updated: str


class JobsReply(Reply):
    """All jobs of this server's lakes, oldest first."""

    jobs: list[JobReply]
