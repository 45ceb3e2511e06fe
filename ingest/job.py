"""This module is what a user may ask of an ingestion: the sources, and how each is to be understood."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ingest.simulate import SimulationSettings
from store.settings import Settings

Kind = Literal["census", "h5ad", "zarr", "h5mu", "10x", "loom", "fragments", "visium", "table", "isatab", "simulated"]
Values = Literal["counts", "log1p", "lognorm", "value"]
FILES = ("genes", "hgnc", "obs_table", "peaks", "barcodes")
"""Keys of a source that name files beside its own; what is in them counts, not where they lie."""


class SourceSettings(Settings):
    """One source: a file, folder, Census or simulation, and what its content cannot say itself."""

    uri: str
    """Path or URI; ``simulated:`` makes cells; a Census is given by its folder, URI, release date or ``stable``."""
    kind: Kind | None = None
    """What the source is; recognised from its name and content when left out."""
    dataset_id: str | None = None
    """The dataset's name in the lake; made from the file's name when left out. A Census names its own."""
    replaces: bool = False
    """Take the place of the dataset of this name although that one came from another address."""
    title: str = ""
    """A title for people."""
    organism: str = "homo_sapiens"
    """Census name of the organism (``mus_musculus``, ...); a Census and a CELLxGENE file know their own."""
    measurement: str = "RNA"
    """What the matrix of an h5ad, zarr, loom or table measures; other kinds say it themselves."""
    layer: str = ""
    """Matrix that holds the values: empty for X (of a CELLxGENE file: its raw counts), ``raw``, or a layer's name."""
    antibodies: str = ""
    """For an h5ad or zarr: the table of ``obsm`` that holds counts of antibodies; customary names are recognised."""
    modalities: dict[str, str] = Field(default_factory=dict)
    """For an h5mu: a modality to what it measures, where its name does not say it; to nothing, and it is left out."""
    values: Values | dict[str, Values] = "counts"
    """What the matrix holds, for all measurements or one by one (``values.RNA``).

    ``counts``: whole numbers. ``log1p``: log1p of scaled counts; the counts are restored if all values
    of a cell are multiples of its smallest, which is taken for one count (or two, or three).
    ``lognorm``: log1p of normalised counts, kept as such in a layer of that name. ``value``: levels such as
    intensities, concentrations or fractions, in a layer of that name.
    """
    transposed: bool = False
    """For a table: cells stand in columns."""
    genome: str = ""
    """Which of several genomes of a 10x file of Cell Ranger 2 is meant."""
    genes: str | None = None
    """A table (csv, csv.gz; id, name, version, length, type; no header) that maps symbols to Ensembl ids."""
    hgnc: str | None = None
    """HGNC's complete set (txt, txt.gz): symbols that ``genes`` lacks are looked up among its previous and aliases."""
    peaks: str | None = None
    """For fragments: a BED file of peaks to count in; tiles of ``tile_bp`` are counted when it is left out."""
    tile_bp: int = Field(default=5000, ge=50)
    """For fragments: width of a genome tile, in base pairs."""
    barcodes: str | None = None
    """For fragments: a text file of the barcodes that are cells; all with ``min_fragments`` when it is left out."""
    min_fragments: int = Field(default=1, ge=1)
    """For fragments without ``barcodes``: fragments a barcode needs to be a cell."""
    assay_file: str | None = None
    """For an ISA-Tab study with several assays: the ``a_*.txt`` that is meant."""
    where: str | None = None
    """For a Census: a value filter on obs."""
    obs: dict[str, str] = Field(default_factory=dict)
    """Column of the lake to a column of the source, or to ``=text`` for the same text in every cell."""
    controls: tuple[str, ...] = ()
    """Words of the perturbation column that mean a control, beside the customary ones."""
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
    worker_memory_mb: int = Field(default=1024, ge=512)
    """Memory that one worker may use, its reading process included, in MiB; blocks are sized by it."""
    timeout_s: float = Field(default=900.0, gt=0)
    """Longest wait for one answer of a process that reads a source; it is then stopped and the dataset refused."""
    schemes: tuple[str, ...] = ("file", "s3", "gs", "https", "census", "simulated")
    """Kinds of addresses that sources may have."""
    address: str | None = None
    """A running Ray cluster, HOST:PORT or ``auto``; left out, ``RAY_ADDRESS``, and without that Ray is started here and
    stopped at the end, as by ``local``."""
    source: tuple[SourceSettings, ...] = ()
    """The sources, as ``[[source]]`` sections; each a file, a folder of files, a glob, or a manifest (TSV, Parquet)."""
