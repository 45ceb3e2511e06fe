"""This module brings a source's features into the lake's names: genes to ids, the others as they are.

Shape letters used in this module:
    C  cells      F  features of the source      G  features after mapping
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from store.errors import InputRefused, MissingError
from store.schema import Features

ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$|^(WBGene\d{8}|FBgn\d{7})$")
ID_COLUMNS = ("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl_gene_id", "Accession")
NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_short_name", "symbol", "Gene")


@dataclass(frozen=True)
class FeatureMap:
    """Where each of a source's columns goes.

    Attributes:
        features: Features after mapping, each once.
        column_F: Position among ``features`` of each of the source's columns.
        notes: Sentences about what was not as expected.
        mapped: Share of the source's columns that came to an id of the vocabulary.
    """

    features: Features
    column_F: NDArray[np.int64]
    notes: list[str] = field(default_factory=list)
    mapped: float = 1.0

    def apply(self, counts_CF: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Return counts_CG; columns that map to one feature are summed, those of a narrow type of integers as int64."""
        values = counts_CF.data
        if values.dtype.kind in "biu" and values.dtype.itemsize < 8:
            values = values.astype(np.int64)
        parts = (values, self.column_F[counts_CF.indices], counts_CF.indptr)
        mapped = scipy.sparse.csr_matrix(parts, shape=(counts_CF.shape[0], len(self.features)))
        mapped.sum_duplicates()
        return mapped


@lru_cache(maxsize=4)
def gene_table(path: str) -> pd.DataFrame:
    """Read a gene table (id, name, version, length, type; no header), indexed by id.

    Raises:
        MissingError: It is not there.
        InputRefused: It does not have five columns.
    """
    try:
        table = pd.read_csv(path, header=None, dtype=str)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such gene table") from None
    if table.shape[1] != 5:
        raise InputRefused(
            f"{path}: a gene table has 5 columns (id, name, version, length, type), not {table.shape[1]}"
        )
    table.columns = pd.Index(["id", "name", "version", "length", "type"])
    return table.drop_duplicates("id").set_index("id")


@lru_cache(maxsize=4)
def old_symbols(path: str) -> dict[str, str]:
    """Read HGNC's complete set: symbols, previous ones and aliases to the Ensembl id, if only one gene carries them.

    A gene's previous symbol wins over another gene's alias, as HGNC's own multi-symbol checker has it.

    Raises:
        MissingError: It is not there.
        InputRefused: It lacks the columns ``ensembl_gene_id``, ``symbol``, ``prev_symbol`` and ``alias_symbol``.
    """
    wanted = ["symbol", "prev_symbol", "alias_symbol", "ensembl_gene_id"]
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, usecols=wanted, keep_default_na=False)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such HGNC table") from None
    except ValueError as error:
        raise InputRefused(f"{path}: not HGNC's complete set: {error}") from error
    table = table[table["ensembl_gene_id"] != ""]
    found: dict[str, str] = {}
    for column in ("alias_symbol", "prev_symbol", "symbol"):
        names = table[column].str.split("|").explode()
        pairs = pd.DataFrame({"name": names, "id": table["ensembl_gene_id"].reindex(names.index)})
        pairs = pairs[pairs["name"] != ""].drop_duplicates().drop_duplicates("name", keep=False)
        found |= dict(zip(pairs["name"], pairs["id"], strict=True))
    return found


def map_genes(var: pd.DataFrame, genes: str | None = None, hgnc: str | None = None, *, sums: bool = True) -> FeatureMap:
    """Map genes to Ensembl ids: from the index or a customary column, or from symbols through a gene table.

    Version suffixes go. A symbol that the table lacks is looked up among HGNC's previous symbols and aliases. One that
    several genes carry, or none, stays as its own id, and a note says so. Columns that come to the same id are summed,
    and a note says so; values that do not add up (``sums`` false) keep them apart as ``ID#2``.
    """
    index = var.index.astype(str)
    ids = _ensembl(pd.Series(index))
    if ids.notna().mean() < 0.5:
        texts = [str(column) for column in var if not pd.api.types.is_numeric_dtype(var[column].dtype)]
        ids = next(
            (
                found
                for column in dict.fromkeys([*(name for name in ID_COLUMNS if name in var), *texts])
                if (found := _ensembl(var[column])).notna().mean() >= 0.5
            ),
            ids,
        )
    names = next((var[column].astype(str).tolist() for column in NAME_COLUMNS if column in var), index.tolist())
    table = gene_table(genes) if genes else None
    id_list: list[str] = [name if isinstance(name, str) else "" for name in ids.tolist()]
    if table is not None:
        id_list = _from_symbols(id_list, names, table)
    notes = []
    if hgnc:
        rescued = old_symbols(hgnc)
        before = id_list
        known = None if table is None else set(table.index)
        id_list = [
            found or (old if (old := rescued.get(name, "")) and (known is None or old in known) else "")
            for found, name in zip(before, names, strict=True)
        ]
        renamed = [name for old, new, name in zip(before, id_list, names, strict=True) if new and not old]
        if renamed:
            notes.append(f"{len(renamed):,} genes found by a former or alias symbol ({', '.join(renamed[:3])}, ...)")
    unmapped = [name for name, found in zip(names, id_list, strict=True) if not found]
    id_list = [found or str(name) for found, name in zip(id_list, index, strict=True)]
    if unmapped:
        reason = "set genes=TABLE to map symbols" if table is None else f"not in {genes}"
        notes.append(
            f"{len(unmapped):,} of {len(names):,} genes have no Ensembl id ({', '.join(unmapped[:3])}, ...): {reason}; "
            "their symbols stand as ids"
        )
    made = _unique(id_list, names, _known(id_list, table, var), notes, sums)
    return replace(made, mapped=1 - len(unmapped) / max(1, len(names)))


GENE_IDS = {
    "homo_sapiens": "ENSG0",
    "mus_musculus": "ENSMUSG",
    "callithrix_jacchus": "ENSCJAG",
    "macaca_mulatta": "ENSMMUG",
    "pan_troglodytes": "ENSPTRG",
    "caenorhabditis_elegans": "WBGene",
    "danio_rerio": "ENSDARG",
    "drosophila_melanogaster": "FBgn",
    "rattus_norvegicus": "ENSRNOG",
}
"""How Ensembl's ids of an organism's genes begin."""


def other_organism(features: Features, organism: str, *, said: bool) -> str:
    """Say why genes are not of an organism, by most of their Ensembl ids; nothing if they may be.

    Where nobody ``said`` which organism it is, names count too: symbols of mice and rats have one capital, the first
    (``Sox17``; guidelines of MGI and RGD), human ones have capitals alone (HGNC's, Bruford et al. 2020).
    """
    ids = pd.Series(features.feature_id, dtype=object).astype(str)
    if organism not in GENE_IDS:
        return ""
    for other, prefix in GENE_IDS.items():
        theirs = ids.str.startswith(prefix)
        if other != organism and 2 * int(theirs.sum()) > len(ids):
            example = ids[theirs].iloc[0]
            told = f"most genes are of {other} by their ids ({example}, ...), not of {organism}"
            return f"{told}; they are kept under {organism}" if said else f"{told}; say organism={other}"
    if said or organism != "homo_sapiens":
        return ""
    murine = ids[ids.str.match(r"[A-Z][a-z][A-Za-z]*\d*[a-z]?$")]
    stems = murine.str.extract("([A-Za-z]+)")[0].nunique()  # Gene1, Gene2, ... has one
    if 2 * len(murine) <= len(ids) or 10 * stems <= len(murine):
        return ""
    return (
        f"most genes' names ({', '.join(murine[:3])}, ...) are written as those of mice and rats are; say "
        "organism=mus_musculus or whose they are, organism=homo_sapiens where they are human"
    )


def _ensembl(values: pd.Series) -> pd.Series:
    found = values.astype(str).str.extract(ENSEMBL)
    return found[0].where(found[0].notna(), found[3])


def _from_symbols(ids: list[str], names: list[str], table: pd.DataFrame) -> list[str]:
    by_name = table.reset_index().drop_duplicates("name", keep=False).set_index("name")["id"]
    exact = by_name.to_dict()
    folded = {str(name).casefold(): found for name, found in exact.items()} if _mouse(table) else {}
    return [
        found or str(exact.get(name) or folded.get(name.casefold()) or "")
        for found, name in zip(ids, names, strict=True)
    ]


def _mouse(table: pd.DataFrame) -> bool:
    return bool(str(table.index[0]).startswith(GENE_IDS["mus_musculus"]))


def _known(ids: list[str], table: pd.DataFrame | None, var: pd.DataFrame) -> tuple[list[str], list[int]]:
    if table is not None:
        rows = table.reindex(ids)
        return rows["type"].fillna("gene").tolist(), pd.to_numeric(rows["length"]).fillna(0).astype(int).tolist()
    types = var["feature_type"] if "feature_type" in var else pd.Series(["gene"] * len(ids))
    lengths = var["feature_length"] if "feature_length" in var else pd.Series([0] * len(ids))
    return types.astype(str).tolist(), pd.to_numeric(lengths, errors="coerce").fillna(0).astype(int).tolist()


def map_plain(var: pd.DataFrame, kind: str, *, sums: bool = True) -> FeatureMap:
    """Take features by the names that the source gives them (antibodies, peaks, guides)."""
    ids = [str(name) for name in var.index]
    names = var["gene_symbols"].astype(str).tolist() if "gene_symbols" in var else ids
    return _unique(ids, names, ([kind] * len(ids), [0] * len(ids)), [], sums)


def _unique(
    ids: list[str], names: list[str], known: tuple[list[str], list[int]], notes: list[str], sums: bool
) -> FeatureMap:
    if not sums and len(set(ids)) < len(ids):
        again = pd.Series(ids).groupby(ids).cumcount()
        notes = [*notes, f"{int((again > 0).sum()):,} features stand more than once and are kept apart as ID#2, ..."]
        ids = [f"{name}#{count + 1}" if count else name for name, count in zip(ids, again, strict=True)]
    position: dict[str, int] = {}
    first: list[int] = []
    for column, name in enumerate(ids):
        if name not in position:
            position[name] = len(first)
            first.append(column)
    if len(first) < len(ids):
        twice = next(name for column, name in enumerate(ids) if first[position[name]] != column)
        notes = [
            *notes,
            f"{len(ids) - len(first):,} features stand more than once (such as {twice}): their counts are summed",
        ]
    types, lengths = known
    features = Features(
        [ids[c] for c in first], [names[c] for c in first], [types[c] for c in first], [lengths[c] for c in first]
    )
    return FeatureMap(features, np.array([position[name] for name in ids], dtype=np.int64), notes)
