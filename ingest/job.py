"""This module is what a user may ask of an ingestion: the sources, and how each is to be understood."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ingest.simulate import SimulationSettings
from store.settings import Settings

Kind = Literal["census", "h5ad", "h5mu", "10x", "simulated"]


class SourceSettings(Settings):
    """One source: a file, folder, Census or simulation, and what its content cannot say itself."""

    uri: str
    """Path or URI; ``simulated:`` makes cells; a Census is given by its folder, URI, release date or ``stable``."""
    kind: Kind | None = None
    """What the source is; recognised from its name and content when left out."""
    dataset_id: str | None = None
    """The dataset's name in the lake; made from the file's name when left out. A Census names its own."""
    title: str = ""
    """A title for people."""
    organism: str = "homo_sapiens"
    """Census name of the organism (``mus_musculus``, ...). A Census and a simulation know their own."""
    measurement: str = "RNA"
    """What the matrix of an h5ad measures; other kinds say it themselves."""
    layer: str = ""
    """Matrix of an h5ad that holds the counts: empty for X, ``raw`` for raw.X, else a layer's name."""
    values: Literal["counts", "log1p"] = "counts"
    """What the matrix holds. ``log1p``: log1p of scaled counts; counts are restored where that is provably exact."""
    genes: str | None = None
    """A table (csv, csv.gz; id, name, chromosome, length, type; no header) that maps symbols to Ensembl ids."""
    where: str | None = None
    """For a Census: a value filter on obs."""
    obs: dict[str, str] = Field(default_factory=dict)
    """Column of the lake to a column of the source, or to ``=text`` for the same text in every cell."""
    obs_table: str | None = None
    """A tab-separated table with more columns of obs; its first column names the cells."""
    simulation: SimulationSettings = SimulationSettings()
    """Sizes of a simulation."""
    truth: str | None = None
    """For a simulation: a folder to write ``truth.json`` to."""


class JobSettings(Settings):
    """A JOB.toml: where to, and from what."""

    lake: str = "lake"
    """The lake: a folder or an ``s3://`` URI; made when it is missing."""
    workers: int = Field(default=2, ge=1)
    """Ray tasks at a time, when this command starts its own Ray."""
    address: str | None = None
    """A running Ray cluster to use, such as ``auto``; left out, Ray is started here and stopped at the end."""
    source: tuple[SourceSettings, ...] = ()
    """The sources, as ``[[source]]`` sections."""
