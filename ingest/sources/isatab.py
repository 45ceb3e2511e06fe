"""This module reads a metabolomics study as MetaboLights publishes it: ISA-Tab (i_, s_, a_ files) and MAF (m_ files).

Each assay is a dataset: samples are its cells, the metabolites of its assignment file (MAF) the features.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ingest import distinct
from ingest.job import SourceSettings
from ingest.preflight import refuse_links_out
from ingest.sources.form import Part, SourceDataset, content_digest, level_rows
from store.errors import InputRefused
from store.schema import ORGANISMS

LINKS = ("Sample Name", "MS Assay Name", "NMR Assay Name", "Extract Name", "Labeled Extract Name")
"""Columns of an assay whose values name the MAF's columns."""

NOBODY = re.compile(
    r"\W*|(.*\W)?(blank|qc|quality control|solvent|standard|reference|pool(ed)?|not applicable|n/?a|none|unknown)s?"
    r"(\W.*)?",
    re.IGNORECASE,
)
"""What stands for the organism of samples that are of none."""
PLACES = ("chemical_shift", "mass_to_charge", "retention_time")


def names(source: SourceSettings) -> list[str]:
    """Name the study's assays, each a dataset."""
    found = [name for name in _files(source.uri) if re.fullmatch(r"a_.*\.txt", name)]
    if source.assay_file:
        if source.assay_file not in found:
            raise InputRefused(f"{source.uri}: has no assay {source.assay_file!r}; assays: {', '.join(found)}")
        found = [source.assay_file]
    if not found:
        raise InputRefused(f"{source.uri}: an ISA-Tab study has assays in a_*.txt; there are none")
    if source.dataset_id and len(found) == 1:
        return [source.dataset_id]
    study = source.uri.rstrip("/").rsplit("/", 1)[-1]
    return [f"{study}-{name.removeprefix('a_').removesuffix('.txt')}" for name in found]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Read one assay with its samples' characteristics and factors.

    A metabolite is named by its database identifier; where that is missing, by its name; one that stands more than once
    (several peaks of it) by its place in the spectrum too.

    Raises:
        InputRefused: The files do not fit together.
    """
    files = _files(source.uri)
    assays = [item for item in files if re.fullmatch(r"a_.*\.txt", item)]
    assay_name = source.assay_file or next((item for item in assays if name.endswith(item[2:-4])), assays[0])
    assay = _table(files[assay_name])
    if "Metabolite Assignment File" not in assay or "Sample Name" not in assay:
        raise InputRefused(f"{source.uri}: {assay_name} lacks 'Sample Name' or 'Metabolite Assignment File'")
    maf_names = [item for item in assay["Metabolite Assignment File"].dropna().unique() if item in files]
    if len(maf_names) != 1:
        raise InputRefused(
            f"{source.uri}: {assay_name} names {len(maf_names)} assignment files that are there, not one"
        )
    maf = _table(files[maf_names[0]])
    rows, column_of = _columns(assay, maf)
    if not column_of:
        raise InputRefused(f"{source.uri}: no column of {maf_names[0]} is a sample of {assay_name}")
    levels, said = _levels(maf[column_of], f"{source.uri}: {maf_names[0]}")
    obs = _samples(files).reindex(assay["Sample Name"].iloc[rows])
    obs.index = pd.Index(column_of)
    obs["sample_id"] = assay["Sample Name"].iloc[rows].to_numpy()
    identity = maf.get("database_identifier", pd.Series("", index=maf.index)).fillna("")
    var = pd.DataFrame({"gene_symbols": maf["metabolite_identification"].fillna("").to_numpy()})
    var.index = pd.Index(_unique(maf, identity))
    missing = int(np.isnan(levels).sum())
    return SourceDataset(
        dataset_id=name,
        organism=_organism(obs, source),
        read_obs=lambda: obs,
        n_obs=len(obs),
        parts={"metabolite": Part(var, level_rows(levels), layer="value")},
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title, "collection_name": source.uri.rstrip("/").rsplit("/", 1)[-1]},
        notes=(f"{missing:,} of {levels.size:,} levels are missing", *said),
    )


def _files(uri: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(uri)
    wanted = [item for item in filesystem.ls(path, detail=False) if re.search(r"/[isam]_[^/]*\.(txt|tsv)$", item)]
    refuse_links_out(uri, wanted)
    return {item.rsplit("/", 1)[-1]: filesystem.cat_file(item) for item in sorted(wanted)}


def _table(content: bytes) -> pd.DataFrame:
    try:
        return pd.read_csv(BytesIO(content), sep="\t", dtype=str, encoding="utf-8", encoding_errors="replace")
    except ValueError as error:
        raise InputRefused(f"not a readable ISA-Tab table: {error}") from error


def _levels(table: pd.DataFrame, where: str) -> tuple[NDArray[np.float64], list[str]]:
    """Read the levels of samples x metabolites, NaN where a word stands, and say which words.

    Raises:
        InputRefused: Most of what is given are words, or some are numbers with a decimal comma.
    """
    numbers = table.apply(pd.to_numeric, errors="coerce")
    row, column = np.nonzero((table.notna() & numbers.isna()).to_numpy())
    words = pd.Series(table.to_numpy(object)[row, column], dtype=object).astype(str).value_counts()
    shown = ", ".join(f"{distinct.shown(word)} ({many:,})" for word, many in words.iloc[:4].items())
    told = f"{len(row):,} of {int(table.notna().sum().sum()):,} given levels are no numbers: {shown}"
    comma = words.index.str.fullmatch(r"[-+]?\d+,\d+([eE][-+]?\d+)?")
    if comma.any() or len(row) > int(numbers.notna().sum().sum()):
        way = "write numbers with a decimal point, and leave a field empty where a level is missing"
        first = f"; {distinct.shown(words.index[comma][0])} has a decimal comma" if comma.any() else ""
        raise InputRefused(f"{where}: {told}{first}; {way}")
    return numbers.to_numpy(np.float64).T, [f"{told}; they are taken for missing"] if len(row) else []


def _columns(assay: pd.DataFrame, maf: pd.DataFrame) -> tuple[list[int], list[str]]:
    """Match rows of the assay with columns of the MAF, by the link that matches most."""
    best: tuple[list[int], list[str]] = ([], [])
    for link in LINKS:
        if link in assay:
            named = assay[link].astype(str)
            rows = [row for row, name in enumerate(named) if name in maf and name not in set(named.iloc[:row])]
            if len(rows) > len(best[0]):
                best = (rows, named.iloc[rows].tolist())
    return best


def _samples(files: dict[str, bytes]) -> pd.DataFrame:
    """Read all samples: characteristics and factors as columns of plain names, with their units beside."""
    tables = [_table(content) for name, content in files.items() if name.startswith("s_")]
    if not tables:
        return pd.DataFrame()
    samples = pd.concat(tables).drop_duplicates("Sample Name").set_index("Sample Name")
    columns: dict[str, Any] = {}
    for position, column in enumerate(samples.columns):
        match = re.fullmatch(r"(?:Characteristics|Factor Value) ?\[(.+)\]", column)
        if match:
            name = re.sub(r"\W+", "_", match[1]).strip("_").lower()
            columns[name] = samples.iloc[:, position]
            after = str(samples.columns[position + 1]) if position + 1 < samples.shape[1] else ""
            if re.fullmatch(r"Unit(\.\d+)?", after):
                columns[f"{name}_unit"] = samples.iloc[:, position + 1]
    obs = pd.DataFrame(columns)
    renamed = {"organism_part": "tissue", "gender": "sex"}
    return obs.rename(columns={old: new for old, new in renamed.items() if old in obs and new not in obs})


def _unique(maf: pd.DataFrame, identity: pd.Series) -> list[str]:
    plain = [
        found or str(name)
        for found, name in zip(identity, maf["metabolite_identification"].fillna("unknown"), strict=True)
    ]
    places = [
        "/".join(str(value) for place in PLACES if place in maf and (value := row[place]) == value and value != "")
        for _, row in maf.iterrows()
    ]
    counts = pd.Series(plain).value_counts()
    named = [
        f"{name}@{place}" if counts[name] > 1 and place else name for name, place in zip(plain, places, strict=True)
    ]
    seen: dict[str, int] = {}
    result = []
    for name in named:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _organism(obs: pd.DataFrame, source: SourceSettings) -> str:
    if "organism" in source.model_fields_set or "organism" not in obs:
        return source.organism
    words = sorted({" ".join(str(word).split()) for word in obs["organism"].dropna()})
    said = {word.casefold(): word for word in words if not NOBODY.fullmatch(word)}
    if not said:
        return source.organism
    known = {label.casefold(): name for name, (_, label) in ORGANISMS.items()}
    if len(said) > 1 or not said.keys() <= known.keys():
        raise InputRefused(
            f"{source.uri}: its samples are of {', '.join(map(repr, said.values()))}, not of one organism that a lake "
            f"can hold ({', '.join(ORGANISMS)}); organism=NAME says as which one all of them come in"
        )
    return known[next(iter(said))]
