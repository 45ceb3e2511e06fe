"""This module is the lake's schema: the names, types and create options that every array is made with.

The layout is that of the CELLxGENE Census schema 2.4.0, so that Census clients open a lake unchanged; what we add
stands in columns and members that those clients ignore. Text columns are plain strings, not enumerations: an append
then never evolves a schema, and a process killed in the middle of one cannot leave an array that nobody can open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from store.errors import InputRefused

CENSUS_SCHEMA_VERSION = "2.4.0"
DATASET_SCHEMA_VERSION = "7.0.0"

MEASUREMENTS = (
    "RNA",
    "protein",
    "ATAC",
    "guide",
    "peptide",
    "metabolite",
    "methylation",
    "miRNA",
    "methylation_coverage",
)
"""The measurements that a lake knows; the first is the Census's own.

``methylation_coverage`` counts the reads over each site, of which ``methylation`` is the methylated fraction.
"""

LAYERS = {
    "raw": "counts: whole numbers; a feature that was measured and is not stored is zero",
    "lognorm": "log1p of normalised counts, as the source made them; not stored is zero",
    "value": "levels (intensities, fractions, ...) in the source's unit; not stored is missing, zero is stored",
}
"""What ``X[layer]`` of a measurement may hold; a dataset fills one layer of each of its measurements."""

MEASUREMENT_OF_MODALITY = {
    "rna": "RNA",
    "gex": "RNA",
    "gene expression": "RNA",
    "mrna": "RNA",
    "prot": "protein",
    "protein": "protein",
    "adt": "protein",
    "atac": "ATAC",
    "peaks": "ATAC",
    "guide": "guide",
    "crispr": "guide",
    "grna": "guide",
    "rppa": "protein",
    "met": "methylation",
    "meth": "methylation",
    "dna_methylation": "methylation",
    "metabolite": "metabolite",
    "mirna": "miRNA",
    "methylation": "methylation",
    "methylation_coverage": "methylation_coverage",
    "coverage": "methylation_coverage",
    "cov": "methylation_coverage",
    "metabolites": "metabolite",
}
"""What MuData's customary names of modalities (in lower case) stand for."""

CELL_CAPACITY = 2**31 - 2
"""Cells that one organism of a lake can hold: the domain is fixed at creation, so that appends never resize."""

DATASET_CAPACITY = 2**16
FEATURE_CAPACITY = dict.fromkeys(MEASUREMENTS, 2**17) | dict.fromkeys(
    ("ATAC", "methylation", "methylation_coverage"), 2**22
)

ROW_TILE = dict.fromkeys(MEASUREMENTS, 512) | dict.fromkeys(("ATAC", "methylation", "methylation_coverage"), 256)
"""Cells in one space tile of X: rows are written tile by tile, so this bounds what a writer holds in memory."""

COLUMN_TILE = 2048

UNKNOWN = "unknown"

OBS_DEFAULTS: dict[str, Any] = {
    "assay": UNKNOWN,
    "assay_ontology_term_id": UNKNOWN,
    "cell_type": UNKNOWN,
    "cell_type_ontology_term_id": UNKNOWN,
    "development_stage": UNKNOWN,
    "development_stage_ontology_term_id": UNKNOWN,
    "disease": UNKNOWN,
    "disease_ontology_term_id": UNKNOWN,
    "donor_id": UNKNOWN,
    "is_primary_data": True,
    "observation_joinid": "",
    "self_reported_ethnicity": UNKNOWN,
    "self_reported_ethnicity_ontology_term_id": UNKNOWN,
    "sex": UNKNOWN,
    "sex_ontology_term_id": UNKNOWN,
    "suspension_type": UNKNOWN,
    "tissue": UNKNOWN,
    "tissue_ontology_term_id": UNKNOWN,
    "tissue_type": UNKNOWN,
    "tissue_general": UNKNOWN,
    "tissue_general_ontology_term_id": UNKNOWN,
    "cell_id": "",
    "sample_id": UNKNOWN,
    "batch": UNKNOWN,
    "perturbation_type": "none",
    "perturbation": "",
    "perturbation_id": "",
    "dose": math.nan,
    "dose_unit": "",
    "time": math.nan,
    "time_unit": "",
    "x": math.nan,
    "y": math.nan,
}
"""Every obs column that a source may give, with the value that stands where it does not.

Beyond the Census's columns: ``cell_id`` is the source's own name of the cell; ``perturbation`` is empty for a cell
that nobody perturbed, ``control`` for a non-targeting guide or a vehicle, else the targets, sorted and joined by ``+``;
``perturbation_type`` is ``none``, ``genetic``, ``activation``, ``drug`` or ``stimulation``; ``perturbation_id`` names
the guide or compound; ``dose`` and ``time`` carry their units beside them; ``x`` and ``y`` are positions in space.
"""

OBS_STATISTICS: dict[str, pa.DataType] = {
    "raw_sum": pa.float64(),
    "nnz": pa.int64(),
    "raw_mean_nnz": pa.float64(),
    "raw_variance_nnz": pa.float64(),
    "n_measured_vars": pa.int64(),
}
"""Computed from the RNA counts at ingestion, as the Census does; zero for a dataset without RNA."""


def measured_column(measurement: str) -> str:
    """Name the boolean obs column that says whether ``X["raw"]`` of ``measurement`` holds the cell's counts.

    Values in other layers are told by ``obs_measurement_presence``.
    """
    return f"measured_{measurement}"


def _column_type(default: Any) -> pa.DataType:
    if isinstance(default, bool):
        return pa.bool_()
    return pa.float64() if isinstance(default, float) else pa.large_string()


OBS_SCHEMA = pa.schema(
    [("soma_joinid", pa.int64()), ("dataset_id", pa.large_string())]
    + [(name, _column_type(default)) for name, default in OBS_DEFAULTS.items()]
    + list(OBS_STATISTICS.items())
    + [(measured_column(name), pa.bool_()) for name in MEASUREMENTS]
)

VAR_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("feature_id", pa.large_string()),
        ("feature_name", pa.large_string()),
        ("feature_type", pa.large_string()),
        ("feature_length", pa.int64()),
        ("nnz", pa.int64()),
        ("n_measured_obs", pa.int64()),
    ]
)

DATASET_INFO = (
    "citation",
    "collection_id",
    "collection_name",
    "collection_doi",
    "collection_doi_label",
    "dataset_version_id",
    "dataset_title",
    "dataset_h5ad_path",
)
"""The Census's provenance of a dataset, all text; a source that does not know one leaves it empty."""

INFO_SCHEMAS: dict[str, pa.Schema] = {
    "summary": pa.schema([("soma_joinid", pa.int64()), ("label", pa.large_string()), ("value", pa.large_string())]),
    "datasets": pa.schema(
        [("soma_joinid", pa.int64()), ("dataset_id", pa.large_string())]
        + [(name, pa.large_string()) for name in DATASET_INFO]
        + [
            ("dataset_total_cell_count", pa.int64()),
            ("organism", pa.large_string()),
            ("source_uri", pa.large_string()),
            ("source_kind", pa.large_string()),
            ("obs_start", pa.int64()),
            ("measurements", pa.large_string()),
        ]
    ),
    "summary_cell_counts": pa.schema(
        [
            ("soma_joinid", pa.int64()),
            ("organism", pa.large_string()),
            ("category", pa.large_string()),
            ("label", pa.large_string()),
            ("ontology_term_id", pa.large_string()),
            ("total_cell_count", pa.int64()),
            ("unique_cell_count", pa.int64()),
        ]
    ),
    "organisms": pa.schema(
        [
            ("soma_joinid", pa.int64()),
            ("organism_ontology_term_id", pa.large_string()),
            ("organism_label", pa.large_string()),
            ("organism", pa.large_string()),
        ]
    ),
}

MEASUREMENT_PRESENCE = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.large_string()),
        ("measurement", pa.large_string()),
        ("layer", pa.large_string()),
        ("obs_start", pa.int64()),
        ("obs_stop", pa.int64()),
        ("n_measured_obs", pa.int64()),
    ]
)
"""``obs_measurement_presence`` of an experiment: which dataset's cells have which measurement, in which layer of X.

Cells are the joinids ``obs_start`` to ``obs_stop`` (exclusive); ``n_measured_obs`` of them have the measurement, and
where that is not all of them the column ``measured_<measurement>`` of obs, or the absence of any value, says which.
"""

SUMMARY_CATEGORIES = (
    "assay",
    "cell_type",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "suspension_type",
    "tissue",
    "tissue_general",
)

ORGANISMS = {
    "homo_sapiens": ("NCBITaxon:9606", "Homo sapiens"),
    "mus_musculus": ("NCBITaxon:10090", "Mus musculus"),
    "callithrix_jacchus": ("NCBITaxon:9483", "Callithrix jacchus"),
    "macaca_mulatta": ("NCBITaxon:9544", "Macaca mulatta"),
    "pan_troglodytes": ("NCBITaxon:9598", "Pan troglodytes"),
    "caenorhabditis_elegans": ("NCBITaxon:6239", "Caenorhabditis elegans"),
    "danio_rerio": ("NCBITaxon:7955", "Danio rerio"),
    "drosophila_melanogaster": ("NCBITaxon:7227", "Drosophila melanogaster"),
    "rattus_norvegicus": ("NCBITaxon:10116", "Rattus norvegicus"),
    "synthetic_construct": ("NCBITaxon:32630", "synthetic construct"),
}
"""Organisms that a lake can hold, under their Census name: (NCBI Taxonomy id, scientific name)."""


@dataclass(frozen=True)
class Features:
    """One measurement's features in the order of the source's columns."""

    feature_id: list[str]
    feature_name: list[str]
    feature_type: list[str]
    feature_length: list[int]

    def __post_init__(self) -> None:
        lengths = {len(self.feature_name), len(self.feature_type), len(self.feature_length), len(self.feature_id)}
        if len(lengths) != 1:
            raise InputRefused(f"features: the four columns differ in length ({sorted(lengths)})")
        if len(set(self.feature_id)) != len(self.feature_id):
            twice = next(name for name in self.feature_id if self.feature_id.count(name) > 1)
            raise InputRefused(f"features: {twice!r} stands twice; sum duplicate features before planning")

    def __len__(self) -> int:
        return len(self.feature_id)


@dataclass(frozen=True)
class DatasetPlan:
    """What one dataset will add to a lake, known before anything is written.

    Attributes:
        dataset_id: The dataset's name; one name stands for one dataset for ever.
        organism: A key of ``ORGANISMS``.
        key: SHA-256 (hex) over the content and every setting that changes what is written: same key, same data.
        n_obs: Cells.
        features: Measurement to features; what is not listed was not measured.
        info: Provenance; any of ``DATASET_INFO`` and ``source_uri``, ``source_kind``.
        layers: Measurement to its layer of ``LAYERS``; what is not listed is ``raw``.
        origin: Where it comes from: other content of the same name and origin is a new version of it.
    """

    dataset_id: str
    organism: str
    key: str
    n_obs: int
    features: dict[str, Features]
    info: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    origin: str = ""

    def layer(self, measurement: str) -> str:
        """Return the layer of X that holds ``measurement``."""
        return self.layers.get(measurement, "raw")

    def __post_init__(self) -> None:
        if self.organism not in ORGANISMS:
            raise InputRefused(
                f"dataset {self.dataset_id!r}: unknown organism {self.organism!r}; known: {', '.join(ORGANISMS)}"
            )
        unknown = [name for name in self.features if name not in MEASUREMENTS]
        if unknown:
            raise InputRefused(
                f"dataset {self.dataset_id!r}: unknown measurement {unknown[0]!r}; known: {', '.join(MEASUREMENTS)}"
            )
        for layer in self.layers.values():
            if layer not in LAYERS:
                raise InputRefused(f"dataset {self.dataset_id!r}: unknown layer {layer!r}; known: {', '.join(LAYERS)}")
        if self.n_obs <= 0:
            raise InputRefused(f"dataset {self.dataset_id!r} has no cells")
        for name, features in self.features.items():
            if not len(features):
                raise InputRefused(
                    f"dataset {self.dataset_id!r}: {name} has no features; leave out what was not measured"
                )
            if len(features) > FEATURE_CAPACITY[name]:
                raise InputRefused(
                    f"dataset {self.dataset_id!r}: {len(features):,} {name} features exceed the lake's "
                    f"{FEATURE_CAPACITY[name]:,}"
                )


_CHECKSUM = {"_type": "ChecksumSHA256Filter"}


def _zstd(level: int, *before: str) -> list[Any]:
    return [*before, {"_type": "ZstdFilter", "level": level}, _CHECKSUM]


def counts_options(row_tile: int = 2048) -> dict[str, Any]:
    """Return the TileDB create options of a sparse matrix; every pipeline ends in a SHA-256 checksum."""
    return {
        "tiledb": {
            "create": {
                "capacity": 65536,
                "cell_order": "row-major",
                "tile_order": "row-major",
                "allows_duplicates": False,
                "dims": {
                    "soma_dim_0": {"tile": row_tile, "filters": _zstd(3, "ByteShuffleFilter")},
                    "soma_dim_1": {"tile": COLUMN_TILE, "filters": _zstd(3, "ByteShuffleFilter")},
                },
                "attrs": {"soma_data": {"filters": _zstd(3, "ByteShuffleFilter")}},
            }
        }
    }


def table_options(schema: pa.Schema, index: str = "soma_joinid") -> dict[str, Any]:
    """Return the TileDB create options of a dataframe with ``schema``, indexed by ``index``."""
    return {
        "tiledb": {
            "create": {
                "capacity": 65536,
                "allows_duplicates": False,
                "offsets_filters": _zstd(3, "DoubleDeltaFilter"),
                "dims": {index: {"filters": _zstd(3, "DoubleDeltaFilter")}},
                "attrs": {name: {"filters": _zstd(3)} for name in schema.names if name != index},
            }
        }
    }


def vector_options(tile: int, bytes_each: int, *, quick: bool = False) -> dict[str, Any]:
    """Return the TileDB create options of a one-dimensional dense array of numbers of so many bytes.

    ``quick`` packs with LZ4, which suits numbers that zstd packs little better and unpacks slower.
    """
    shuffle = ["ByteShuffleFilter"] if bytes_each > 1 else []
    packing = {"_type": "LZ4Filter", "level": -1} if quick else {"_type": "ZstdFilter", "level": 1}
    return {
        "tiledb": {
            "create": {
                "dims": {"soma_dim_0": {"tile": tile, "filters": [_CHECKSUM]}},
                "attrs": {"soma_data": {"filters": [*shuffle, packing, _CHECKSUM]}},
            }
        }
    }


def lines_options(tile: int) -> dict[str, Any]:
    """Return the TileDB create options of a two-dimensional dense array whose lines are read by themselves."""
    return {
        "tiledb": {
            "create": {
                "dims": {
                    "soma_dim_0": {"tile": 1, "filters": [_CHECKSUM]},
                    "soma_dim_1": {"tile": tile, "filters": [_CHECKSUM]},
                },
                "attrs": {"soma_data": {"filters": _zstd(1, "ByteShuffleFilter")}},
            }
        }
    }
