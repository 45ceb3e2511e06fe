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

GENOME = re.compile(r"^(hg(?:18|19|38)|GRCh3[678]|mm(?:9|10|39)|GRCm3[89]|rn[4-7])_+(?=.)")
"""What Cell Ranger writes before genes of a reference of several genomes: ``hg19_TP53``, ``mm10___Xkr4``."""
ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$|^(WBGene\d{8}|FBgn\d{7})$")
NO_NAME = ("", "nan", "NaN", "None", "<NA>")
"""What becomes of a name that is missing on its way through pandas; ``NA`` and ``NULL`` may be features."""
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
        """Return counts_CG; columns that map to one feature are summed, those of a narrow type of integers as int64.

        Raises:
            ValueError: A value stands in no column of the source.
        """
        values, last = counts_CF.data, len(self.column_F) - 1
        if len(values) and not 0 <= counts_CF.indices.min() <= counts_CF.indices.max() <= last:
            first, furthest = counts_CF.indices.min(), counts_CF.indices.max()
            raise ValueError(f"values stand in columns {first} to {furthest}, and the source's are 0 to {last}")
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

    Version suffixes go. A symbol that the table lacks is looked up among HGNC's previous symbols and aliases, unless
    the gene has its present name in the source too. One that several genes carry, or none, stays as its own id, and a
    note says so. Columns that come to the same id are summed, and a note names them; values that do not add up
    (``sums`` false) keep them apart as ``ID#2``.

    Raises:
        InputRefused: Genes are numbered and nothing names them, or some have no name.
    """
    ids, notes = _ids(var), list[str]()
    names, standing = _names(var, notes)
    table = gene_table(genes) if genes else None
    if table is not None:
        ids = _from_symbols(ids, names, table)
    if hgnc:
        ids = _rescued(ids, names, old_symbols(hgnc), table, notes)
    unmapped = [name for name, found in zip(names, ids, strict=True) if not found]
    if unmapped:
        notes.append(_unmapped_note(unmapped, len(names), table, genes, named=standing == names))
    id_list = _named([found or name for found, name in zip(ids, standing, strict=True)], names)
    made = _unique(id_list, names, _known(id_list, table, var), notes, sums)
    features = replace(made.features, feature_name=_without_version(made.features))
    return replace(made, features=features, mapped=1 - len(unmapped) / max(1, len(names)))


def _without_version(features: Features) -> list[str]:
    """Return features' names; one that is the gene's own id has no version either."""
    own = _ensembl(pd.Series(features.feature_name, dtype=object))
    return [
        known if found == known else name
        for name, known, found in zip(features.feature_name, features.feature_id, own, strict=True)
    ]


def _ids(var: pd.DataFrame) -> list[str]:
    """Return each gene's Ensembl id, from the index or whichever column has most of them; empty where it has none."""
    ids = _ensembl(pd.Series(var.index.astype(str)))
    if ids.notna().mean() < 0.5:
        columns = dict.fromkeys([*(name for name in ID_COLUMNS if name in var), *_texts(var)])
        ids = next((found for column in columns if (found := _ensembl(var[column])).notna().mean() >= 0.5), ids)
    return [name if isinstance(name, str) else "" for name in ids.tolist()]


def _texts(var: pd.DataFrame) -> list[str]:
    return [str(column) for column in var if not pd.api.types.is_numeric_dtype(var[column].dtype)]


def _names(var: pd.DataFrame, notes: list[str]) -> tuple[list[str], list[str]]:
    """Return what genes are called, and what stands for the id of one that has none.

    That is the index, whose names differ from each other, unless it only numbers the genes: another source's number 0
    is another gene.
    """
    index = var.index.astype(str)
    numbered = len(index) > 0 and bool(index.str.fullmatch(r"\d+").all())
    column = next((column for column in NAME_COLUMNS if column in var), "")
    if numbered and not column:  # as reset_index leaves them
        column = next((name for name in _texts(var) if var[name].notna().all() and var[name].is_unique), "")
    if numbered and not column and index.tolist() == [str(number) for number in range(len(index))]:
        raise InputRefused(
            f"RNA: genes are only numbered (0 to {len(index) - 1:,}), and no column of var names them; other sources' "
            "numbers are other genes: put the genes' names into var's index"
        )
    if not column:
        names = _without_genome(index.tolist())
        return names, names
    given = var[column].astype(object)
    missing = (given.isna() | given.astype(str).str.strip().isin(NO_NAME)).to_numpy()
    names = _without_genome(np.where(missing, index.to_numpy(object), given.astype(str).to_numpy(object)).tolist())
    if not numbered:
        return names, index.tolist()
    nameless = f"; {int(missing.sum()):,} without a name stand as their number" if missing.any() else ""
    notes.append(f"genes are numbered in var's index, and called by its column {column!r}{nameless}")
    return names, names


def _without_genome(names: list[str]) -> list[str]:
    """Cut the genome's name off genes that all have the same; among those of several it tells whose a gene is."""
    genomes = pd.Series(names, dtype=object).str.extract(GENOME)[0]
    if genomes.nunique() != 1 or genomes.notna().mean() < 0.5:
        return names
    return [GENOME.sub("", name) for name in names]


def _rescued(
    ids: list[str], names: list[str], old: dict[str, str], table: pd.DataFrame | None, notes: list[str]
) -> list[str]:
    """Find genes by HGNC; one whose present symbol or id the source has beside it was measured apart, and stays so."""
    here, shared = set(ids), set() if table is None else _shared(table)
    found, by_hgnc, former, apart = [], list[str](), list[str](), list[str]()
    for known, name in zip(ids, names, strict=True):
        new = "" if known else old.get(name, "")
        if table is not None and new not in table.index:
            new = ""
        if new and new in here:
            apart.append(f"{name} beside {new if table is None else str(table.at[new, 'name'])}")
            new = ""
        if new:
            (by_hgnc if name in shared else former).append(name)
        found.append(known or new)
    if former:
        notes.append(f"{len(former):,} genes found by a former or alias symbol ({', '.join(former[:3])}, ...)")
    if by_hgnc:
        notes.append(f"{len(by_hgnc):,} genes whose symbol several carry found by HGNC ({', '.join(by_hgnc[:3])}, ...)")
    if apart:
        more = f" and {len(apart) - 10:,} more" if len(apart) > 10 else ""
        notes.append(f"{len(apart):,} former or alias symbols kept apart: {', '.join(apart[:10])}{more}")
    return found


def _unmapped_note(unmapped: list[str], n: int, table: pd.DataFrame | None, genes: str | None, *, named: bool) -> str:
    shared = set() if table is None else _shared(table)
    several = [name for name in unmapped if name in shared]
    reason = "set genes=TABLE to map symbols" if table is None else f"not in {genes}"
    if len(several) == len(unmapped):
        reason = f"several genes of {genes} carry their symbols; hgnc=FILE says which is meant"
    elif several:
        reason += f", or {len(several):,} carried by several genes there ({', '.join(several[:3])}, ...)"
    stands = "their symbols" if named else "the names that var's index gives them"
    shown = ", ".join(unmapped[:3])
    return f"{len(unmapped):,} of {n:,} genes have no Ensembl id ({shown}, ...): {reason}; {stands} stand as ids"


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
GENOMES = {"hg": "homo_sapiens", "GRCh": "homo_sapiens", "mm": "mus_musculus", "GRCm": "mus_musculus"}
GENOMES |= {"rn": "rattus_norvegicus"}
"""Whose the genomes of ``GENOME`` are."""


def other_organism(features: Features, organism: str, *, said: bool) -> str:
    """Say why genes are not of an organism, by a tenth of their Ensembl ids; nothing if they may be.

    Where nobody ``said`` which organism it is, names count too: symbols of mice and rats have one capital, the first
    (``Sox17``; guidelines of MGI and RGD), human ones have capitals alone (HGNC's, Bruford et al. 2020).
    """
    ids = pd.Series(features.feature_id, dtype=object).astype(str)
    if organism not in GENE_IDS:
        return ""
    genome = ids.str.extract(GENOME)[0].str.extract("([A-Za-z]+)")[0].map(GENOMES)
    for other, prefix in GENE_IDS.items():
        theirs = ids.str.startswith(prefix) | (genome == other)
        if other == organism or 10 * int(theirs.sum()) < max(1, len(ids)):
            continue
        most = 2 * int(theirs.sum()) > len(ids)
        told = f"{'most' if most else f'{int(theirs.sum()):,} of {len(ids):,}'} genes are of {other} by their ids"
        told = f"{told} ({ids[theirs].iloc[0]}, ...), not of {organism}"
        way = f"say organism={other}" if most else "give each organism's cells and genes as a source of their own"
        return f"{told}; they are kept under {organism}" if said else f"{told}; {way}"
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
    found = values.astype(str).str.replace(GENOME, "", regex=True).str.extract(ENSEMBL)
    return found[0].where(found[0].notna(), found[3])


def _shared(table: pd.DataFrame) -> set[str]:
    """Return the symbols that several genes of a table carry."""
    return set(table["name"][table["name"].duplicated()])


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
    """Take features by the names that the source gives them (antibodies, peaks, guides).

    Raises:
        InputRefused: Some have no name.
    """
    ids = [str(name) for name in var.index]
    names = var["gene_symbols"].astype(str).tolist() if "gene_symbols" in var else ids
    ids = _named(ids, names)
    return _unique(ids, names, ([kind] * len(ids), [0] * len(ids)), [], sums)


def _named(ids: list[str], names: list[str]) -> list[str]:
    """Return ids, names in the place of those that only say that there is none.

    Raises:
        InputRefused: Features have no name either: of several nobody knows that they are one. (A single ``nan`` may be
            called so: nanchung of Drosophila.)
    """
    found = [name if known.strip() in NO_NAME else known for known, name in zip(ids, names, strict=True)]
    none = [number for number, name in enumerate(found, 1) if name.strip() in NO_NAME]
    if not none or (len(none) == 1 and found[none[0] - 1].strip()):
        return found
    shown = ", ".join(str(number) for number in none[:5]) + (", ..." if len(none) > 5 else "")
    raise InputRefused(
        f"{len(none):,} of {len(found):,} features have no name (number {shown}, called {found[none[0] - 1]!r}); give "
        "each one of its own, or take them out"
    )


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
        groups: dict[str, list[str]] = {}
        for name, called in zip(ids, names, strict=True):
            groups.setdefault(name, []).append(called)
        sums_of = [
            f"{name} ({' + '.join(dict.fromkeys(called))})" for name, called in groups.items() if len(called) > 1
        ]
        shown = f"{', '.join(sums_of[:10])}{f' and {len(sums_of) - 10:,} more' if len(sums_of) > 10 else ''}"
        notes = [*notes, f"{len(ids) - len(first):,} features stand more than once, their counts are summed: {shown}"]
    types, lengths = known
    features = Features(
        [ids[c] for c in first], [names[c] for c in first], [types[c] for c in first], [lengths[c] for c in first]
    )
    return FeatureMap(features, np.array([position[name] for name in ids], dtype=np.int64), notes)
