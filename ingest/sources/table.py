"""This module reads a delimited text table of cells x features, as proteomics, methylation and bulk studies have them.

Fields are parted by commas (.csv), tabs (.tsv) or blanks; .gz or not.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset, are_levels, content_digest, level_rows, memory_rows, without_query
from store.errors import InputRefused

BARCODE = re.compile(r"(.*[_:#-])?[ACGT]{10,}([-_.].*)?$")
"""How droplets are called: ``AAACATACAACCAC-1``."""


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Read a table whole.

    The first column names the cells where it is no number, the first line the features where it is none; without them
    they are numbered. With ``transposed`` cells stand in columns. Columns of text beside the numbers become obs. An
    empty field or ``NA`` is missing when the source says that the values are levels (``value``), and refused in counts.

    Raises:
        InputRefused: Not such a table.
    """
    table = _read(source.uri)
    if source.transposed:
        table = table.T
    table.index, table.columns = table.index.astype(str), table.columns.astype(str)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    given, understood = table.notna().sum(), numbers.notna().sum()
    texts = [str(column) for column in table if given[str(column)] > understood[str(column)]]
    features = [str(column) for column in table if column not in set(texts)]
    if not features:
        raise InputRefused(f"{source.uri}: has no column of numbers; are cells in columns? then set transposed=true")
    if np.mean([bool(BARCODE.match(name)) for name in features]) > 0.5:
        turned = str(not source.transposed).lower()
        raise InputRefused(
            f"{source.uri}: its features are called as cells are ({features[0]!r}, ...); set transposed={turned}"
        )
    matrix = numbers[features].to_numpy(np.float64)
    rows = level_rows(matrix) if are_levels(source, source.measurement) else memory_rows(matrix)
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: table[texts].copy(),
        n_obs=len(table),
        parts={source.measurement: Part(pd.DataFrame(index=pd.Index(features)), rows)},
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
    )


def _read(uri: str) -> pd.DataFrame:
    name = without_query(uri).lower().removesuffix(".gz")
    separator = "," if name.endswith(".csv") else "\t" if name.endswith(".tsv") else r"\s+|,|\t"
    missing = ["NA", "NaN", "nan", ""]
    try:
        if len(separator) == 1:
            table = pd.read_csv(uri, sep=separator, header=None, dtype=str, na_values=missing)
        else:
            table = pd.read_csv(uri, sep=separator, engine="python", header=None, dtype=str, na_values=missing)
    except (ValueError, OSError) as error:
        raise InputRefused(f"{uri}: not a readable table: {str(error).splitlines()[0]}") from error
    table = table.dropna(axis=1, how="all")
    if table.empty:
        raise InputRefused(f"{uri}: the table is empty")
    if pd.to_numeric(table.iloc[0, 1:], errors="coerce").notna().sum() == 0:
        header = table.iloc[0].fillna("").tolist()
        table = table.iloc[1:].reset_index(drop=True)
        table.columns = pd.Index(header)
    else:
        table.columns = pd.Index([f"feature{number}" for number in range(table.shape[1])])
    if pd.to_numeric(table.iloc[:, 0], errors="coerce").notna().sum() == 0:
        return table.set_index(table.columns[0])
    table.index = pd.Index([f"cell{number}" for number in range(len(table))])
    return table
