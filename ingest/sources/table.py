"""This module reads a delimited text table of cells x features, as proteomics, methylation and bulk studies have them.

Fields are parted by commas or semicolons (.csv), tabs (.tsv), or what the first line has: tabs, else commas, else
semicolons, else blanks; .gz or not.
"""

from __future__ import annotations

import csv
import re
from io import StringIO

import fsspec
import numpy as np
import pandas as pd

from ingest import distinct
from ingest.job import SourceSettings
from ingest.obs import OBS_ALIASES
from ingest.sources.form import Part, SourceDataset, are_levels, content_digest, level_rows, memory_rows, without_query
from store.errors import InputRefused
from store.schema import OBS_DEFAULTS

BARCODE = re.compile(r"(.*[_:#-])?[ACGT]{10,}([-_.].*)?$")
"""How droplets are called: ``AAACATACAACCAC-1``."""
CORNER = re.compile(
    r"|unnamed: ?0|index|id|names?|row[._ ]?names?|"
    r"(cell|barcode|sample|gene|feature|protein|peptide|site|peak|probe|symbol|ensembl|entrez)s?([._ ]?(id|name)s?)?",
    re.IGNORECASE,
)
"""What stands over a column of names, and before a line of them: nothing (pandas, R) or a word for what they name."""
MISSING = ("#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "-nan", "-NaN")
"""Words for a value that is missing; cells and features may be called so."""
OF_CELLS = {"age", "plate", "well", "day", "cluster", "passage", "n_counts", "total_counts", "n_genes", *OBS_DEFAULTS}
OF_CELLS |= {alias for aliases in OBS_ALIASES.values() for alias in aliases}
"""Names of columns that say something of cells more often than they are features."""


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Read a table whole.

    The first column names the cells where it is no number, or where the first line says so (by an empty field, or
    ``cell``); the first line names the features where it is no number, or begins in that way. Without them they are
    numbered, and a note says so. With ``transposed`` cells stand in columns. Columns of which most fields are text
    become obs, and those that the source's settings name. An empty field or ``NA`` is missing when the source says that
    the values are levels (``value``), and refused in counts.

    Raises:
        InputRefused: Not such a table, or words stand among numbers.
    """
    table, notes = _read(source.uri)
    if source.transposed:
        table = table.T
    table.index, table.columns = table.index.astype(str), table.columns.astype(str)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    given, understood = table.notna().sum().to_numpy(), numbers.notna().sum().to_numpy()
    is_text = table.columns.isin(list(source.obs.values())) | (given > 2 * understood)
    texts, table, numbers = table.loc[:, is_text], table.loc[:, ~is_text], numbers.loc[:, ~is_text]
    again = pd.Series(texts.columns).groupby(texts.columns).cumcount()
    texts.columns = pd.Index([f"{name}#{n + 1}" if n else name for name, n in zip(texts.columns, again, strict=True)])
    features = list(table.columns)  # one name may stand over several
    if not features:
        raise InputRefused(f"{source.uri}: has no column of numbers; are cells in columns? then set transposed=true")
    _refuse_words(source.uri, table, numbers)
    if np.mean([bool(BARCODE.match(name)) for name in features]) > 0.5:
        turned = str(not source.transposed).lower()
        raise InputRefused(
            f"{source.uri}: its features are called as cells are ({features[0]!r}, ...); set transposed={turned}"
        )
    doubtful = [name for name in dict.fromkeys(features) if name in OF_CELLS]
    if doubtful:
        notes.append(
            f"taken for features: {', '.join(doubtful)}; a column that describes cells comes to obs with "
            f"obs.COLUMN={doubtful[0]}"
        )
    matrix = numbers.to_numpy(np.float64)
    rows = level_rows(matrix) if are_levels(source, source.measurement) else memory_rows(matrix)
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: texts.copy(),
        n_obs=len(table),
        parts={source.measurement: Part(pd.DataFrame(index=pd.Index(features)), rows)},
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=tuple(notes),
    )


def _read(uri: str) -> tuple[pd.DataFrame, list[str]]:
    try:
        with fsspec.open(uri, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
            text = file.read().lstrip("\r\n")
        separator = _separator(uri, text)
        if _lacks_corner(uri, text, separator):
            text = f'""{separator if len(separator) == 1 else " "}{text}'
        table = pd.read_csv(
            StringIO(text),
            sep=separator,
            header=None,
            dtype=str,
            skipinitialspace=separator == ",",
            keep_default_na=False,
            na_values=[""],
        )
    except (ValueError, OSError, csv.Error) as error:
        if isinstance(error, InputRefused):
            raise
        raise InputRefused(f"{uri}: not a readable table: {str(error).splitlines()[0]}") from error
    table = table.dropna(axis=1, how="all")
    if table.empty:
        raise InputRefused(f"{uri}: the table is empty")
    corner = str(table.iloc[:1, 0].fillna("").iloc[0]).strip()
    of_names, notes = bool(CORNER.fullmatch(corner)), list[str]()
    features_named = _names_features(table, of_names)
    if features_named:
        header = table.iloc[0].fillna("").tolist()
        table = table.iloc[1:].reset_index(drop=True)
        table.columns = pd.Index(header)
    else:
        of_names = False
        table.columns = pd.Index([f"feature{number}" for number in range(table.shape[1])])
    first, table = table.iloc[:, 0], table.mask(table.isin(MISSING))
    if pd.to_numeric(first, errors="coerce").notna().sum() == 0 or (
        of_names and first.notna().all() and first.is_unique
    ):
        table = table.iloc[:, 1:].set_axis(pd.Index(first))
    else:
        table.index = pd.Index([f"cell{number}" for number in range(len(table))])
        notes.append(f"no column names the lines: they are called 'cell0' to {table.index[-1]!r}")
    if not features_named and len(table.columns):
        said = f"they are called {table.columns[0]!r} to {table.columns[-1]!r}"
        notes.append(f"no line names the columns: {said}")
    return table, notes


def _refuse_words(uri: str, table: pd.DataFrame, numbers: pd.DataFrame) -> None:
    """Refuse words in columns of numbers, which would take a feature out for one cell's sake, or that cell's value."""
    row, column = np.nonzero((table.notna() & numbers.isna()).to_numpy())
    if len(row):
        name, word = table.columns[column[0]], distinct.shown(table.iat[row[0], column[0]])
        raise InputRefused(
            f"{uri}: {len(row):,} fields among numbers are none, such as {word} (cell {table.index[row[0]]!r}, column "
            f"{name!r}); leave a field empty or write NA where a value is missing, write numbers with a decimal point, "
            f"and say obs.COLUMN={name} where a column describes cells"
        )


def _separator(uri: str, text: str) -> str:
    """Return what parts the fields: what the ending of the name says, or the first line has."""
    name = without_query(uri).lower().removesuffix(".gz")
    known = {".csv": (",", ";"), ".tsv": ("\t",)}.get(name[-4:])
    line = text.split("\n", 1)[0]
    found = next((sign for sign in known or ("\t", ",", ";") if sign in line), "")
    return found or (known[0] if known else r"\s+")


def _lacks_corner(uri: str, text: str, separator: str) -> bool:
    """Say whether the first line is one field shorter than all others, as R writes a table with names of rows.

    Raises:
        InputRefused: Lines have other lengths: nobody knows which field is missing there.
    """
    if len(separator) == 1:
        lines = csv.reader(StringIO(text), delimiter=separator, skipinitialspace=separator == ",")
    else:
        lines = csv.reader((" ".join(line.split()) for line in text.splitlines()), delimiter=" ")
    first = usual = 0
    for line in filter(None, lines):
        usual = usual or (len(line) if first else 0)
        first = first or len(line)
        if usual and (len(line) != usual or usual not in (first, first + 1)):
            raise InputRefused(
                f"{uri}: line {lines.line_num:,} has {len(line):,} fields, and the first {first:,}; leave fields empty "
                "between commas or tabs where a value is missing, or write NA"
            )
    return usual == first + 1


def _names_features(table: pd.DataFrame, of_names: bool) -> bool:
    """Say whether the first line is one of names: words, words over numbers, or whatever follows a corner for names."""
    values = table.mask(table.isin(MISSING))
    line, below = values.iloc[0, 1:], values.iloc[1:, 1:]
    words = line.notna() & pd.to_numeric(line, errors="coerce").isna()
    numbers = below.apply(pd.to_numeric, errors="coerce").notna().sum()
    over_numbers = words & (numbers > 0) & (numbers == below.notna().sum())
    cells_named = bool(table.iloc[1:, 0].notna().all())
    return bool(words.sum() == line.notna().sum() or over_numbers.any() or (of_names and cells_named))
