"""This module brings a source's names into the lake's: genes to ids, obs to the lake's columns. It reads no counts.

Shape letters used in this module:
    C  cells      F  features of the source      G  features after mapping
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse
from numpy.typing import NDArray

from ingest import distinct
from store.errors import InputRefused, MissingError
from store.schema import OBS_DEFAULTS, Features

ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$|^(WBGene\d{8}|FBgn\d{7})$")
ID_COLUMNS = ("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl_gene_id", "Accession")
NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_short_name", "symbol", "Gene")

OBS_ALIASES = {
    "cell_type": ("celltype", "cell_types", "CellType", "cell.type", "cell_ontology_class", "bulk_labels"),
    "donor_id": ("donor", "individual", "patient", "patient_id", "ind"),
    "sample_id": ("sample", "orig.ident", "library_id"),
    "batch": ("bio_rep", "replicate", "batch_id"),
    "perturbation": ("target_gene", "perturbed_gene", "gene_target"),
    "perturbation_id": ("guide_max", "guide_id", "guide_identity"),
    "dose": ("dose_value",),
    "time": ("time_point", "timepoint"),
}
"""Customary names of columns, used where the source has no column of the lake's own name."""

CONTROL = re.compile(
    r"^(\d+(\.\d+)? ?% )?"
    r"(((sg|g|si|sh)[-_ ]?)?(ntc?|non[-_ ]?target(ing)?|control|ctrl|neg(ative)?[-_ ]?c(on)?tr(o)?l|"
    r"safe[-_ ]?(targeting|harbou?r)|scrambled?)|"
    r"intergenic|mock|un(treated|stimulated|stim)|no[-_ ]?treatment|vehicle|dmso|dimethyl[-_ ]?sulfoxide|pbs|medium|"
    r"wild[-_ ]?type|wt(?![-_ ]?\d))"
    r"([-_ ](control|ctrl|human|mouse|guide|s?g?rna|s[ih]rna|tf))*([-_ ]?g?\d+)*([-_ ]?\d+(\.\d+)? ?%)?$",
    re.IGNORECASE,
)
"""Names of controls, numbered or not: ``NT``, ``NTg4``, ``non-targeting_2``, ``sgNTC``, ``DMSO 0.1%``, ``untreated``;
``NTRK1`` and ``WT1`` are genes."""
SAYS_WHAT_WAS_DONE = (
    "condition",
    "perturb",
    "gene",
    "guide",
    "compound",
    "drug",
    "treatment",
    "stim",
    "stimulation",
    "cytokine",
)
"""Columns that may hold perturbations, or other things: nobody is asked to guess, but told."""


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
        """Return counts_CG; columns that map to one feature are summed."""
        parts = (counts_CF.data, self.column_F[counts_CF.indices], counts_CF.indptr)
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


@dataclass(frozen=True)
class MappedObs:
    """A source's obs in the lake's columns.

    Attributes:
        frame: The lake's columns.
        aside: The columns that have no place among them, or lost words on the way (for the side table).
        notes: What people should know.
    """

    frame: pd.DataFrame
    aside: pd.DataFrame
    notes: list[str]


def map_obs(obs: pd.DataFrame, given: Mapping[str, str], controls: Sequence[str] = ()) -> MappedObs:
    """Bring obs into the lake's columns.

    Args:
        obs: As the source has it, indexed by its names of the cells.
        given: Column of the lake to a column of the source or ``=text``; wins over what is recognised.
        controls: Words of perturbations that mean a control, beside :data:`CONTROL`.

    Raises:
        InputRefused: ``given`` names a column that one of the two does not have, or values do not fit.
    """
    unknown = sorted(set(given) - set(OBS_DEFAULTS))
    if unknown:
        raise InputRefused(f"obs.{unknown[0]}: not a column of the lake; columns: {', '.join(OBS_DEFAULTS)}")
    names, notes = obs.index, list[str]()
    mapped: dict[str, Any] = {"cell_id": names.array if _in_arrow(names) else names.astype(str).to_numpy()}
    used: set[str] = set()
    for column, default in OBS_DEFAULTS.items():
        source = given.get(column) or _recognised(column, obs)
        if not source:
            continue
        if source.startswith("="):
            mapped[column] = distinct.same(source[1:], len(obs))
            continue
        if source not in obs:
            raise InputRefused(
                f"obs.{column} = {source!r}: the source has no such column; columns: {', '.join(obs.columns)}"
            )
        if isinstance(default, float):
            quantity, note = _quantity(column, obs[source])
            if quantity is None and column not in given:
                notes.append(note)  # a column that only looks like it by name stays in the side table
                continue
            if quantity is not None:
                mapped[column] = quantity[0]
                notes += [note] if note else []
                unit = f"{column}_unit"
                if quantity[1] is not None and unit in OBS_DEFAULTS and unit not in given and unit not in obs:
                    mapped[unit] = quantity[1]
                used.add(source)
                continue
        mapped[column] = _compact(obs[source], column)
        used.add(source)
    frame = pd.DataFrame(mapped)
    if "perturbation" not in frame and "perturbation_id" in frame:
        frame["perturbation"] = distinct.changed(frame["perturbation_id"], guide_target)
    kinds = frame.get("perturbation_type")
    notes += _said_of_controls(frame, obs, controls)
    _normalise(frame, controls)
    if not _same_words(kinds, frame.get("perturbation_type")):
        used.discard(given.get("perturbation_type") or "perturbation_type")
    return MappedObs(frame, obs[[column for column in obs if column not in used]], notes)


def _same_words(before: pd.Series | None, after: pd.Series | None) -> bool:
    if before is None or after is None:
        return True
    (_, old), (_, new) = distinct.coded(before), distinct.coded(after)
    return {str(value) for value in old} <= {str(value) for value in new}


def _said_of_controls(frame: pd.DataFrame, obs: pd.DataFrame, controls: Sequence[str]) -> list[str]:
    """Say what is taken for a control, that nothing is, or that nothing is taken for a perturbation."""
    if "perturbation" not in frame:
        likely = [str(name) for name in obs if str(name).lower() in SAYS_WHAT_WAS_DONE and obs[name].nunique() > 1]
        hint = "perturbation: none is known; if column {0!r} holds them, say obs.perturbation={0}"
        return [hint.format(name) for name in likely[:1]]
    _, words = distinct.coded(frame["perturbation"])
    named = {str(word): perturbation_name(word, controls) for word in words}
    taken = sorted(word for word, name in named.items() if name == "control" and word != "control")
    others = sorted(word for word, name in named.items() if name not in ("", "control"))
    if others and "control" not in named.values():
        return [f'perturbation: none of {_some(others)} is a control; if one is, say controls=["WORD"]']
    return [f"perturbation: taken for controls: {_some(taken)}"] if taken else []


def _some(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:4])) + (" ..." if len(words) > 4 else "")


def _compact(values: pd.Series, column: str) -> Any:
    """Return a column's values, texts as a categorical; names of cells differ from each other and stay."""
    text = isinstance(OBS_DEFAULTS[column], str) and column not in ("cell_id", "observation_joinid")
    if text and (isinstance(values.dtype, pd.CategoricalDtype) or values.dtype == object):
        return values.astype("category").array
    return values.array if _in_arrow(values) else values.to_numpy()


def _in_arrow(values: pd.Series | pd.Index) -> bool:
    """Say whether texts lie in Arrow's memory, where they stay: they take a third of Python's."""
    return isinstance(values.dtype, pd.ArrowDtype) and pa.types.is_large_string(values.dtype.pyarrow_dtype)


def _recognised(column: str, obs: pd.DataFrame) -> str | None:
    if column == "cell_id" and column in obs and obs[column].duplicated().any():
        return None  # its cells have better names
    return next((name for name in (column, *OBS_ALIASES.get(column, ())) if name in obs), None)


QUANTITY = re.compile(r"^\s*([A-Za-z]*)\s*([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*([A-Za-zµμ%][A-Za-zµμ%/]*)?\s*$")
TIMES = {"e": "day", "d": "day", "day": "day", "days": "day", "h": "hour", "hr": "hour", "hrs": "hour", "hour": "hour"}
TIMES |= {"hours": "hour", "m": "minute", "min": "minute", "mins": "minute", "w": "week", "wk": "week", "weeks": "week"}
TIMES |= {"minute": "minute", "minutes": "minute", "week": "week", "p": "day", "mo": "month", "months": "month"}
TIMES |= {"month": "month", "y": "year", "yr": "year", "yrs": "year", "year": "year", "years": "year"}
"""Units of time in lower case, ``E`` and ``P`` of development among them; a capital ``M`` may be months."""


Quantities = tuple[NDArray[np.float64], NDArray[np.object_] | None]


def read_quantity(values: pd.Series, units: Mapping[str, str] = TIMES) -> Quantities | None:
    """Read numbers, with a unit before or behind them or without one: ``10``, ``50 uM``, ``6 HR``, ``d8``, ``E3.5``.

    Args:
        values: As the source has them.
        units: How units, in lower case, are written here; others stay as they are.

    Returns:
        The numbers (NaN where there is nothing), and their units where any has one; none when some value is neither.
    """
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values.to_numpy(np.float64), None
    codes, found = distinct.coded(values)
    read = _quantities(pd.Series(found, dtype=object), units)
    return read and (read[0][codes], None if read[1] is None else read[1][codes])


def _quantities(values: pd.Series, units: Mapping[str, str]) -> Quantities | None:
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    empty = values.isna() | values.astype(str).map(_no_number)
    if (numbers.notna() | empty).all():
        return np.asarray(numbers, dtype=np.float64), None
    found = values.astype(str).str.extract(QUANTITY)
    if not (found[1].notna() | empty).all():
        return None
    unit = found[2].fillna(found[0]).fillna("")
    known = unit.where(unit == "M", unit.str.lower()).map(dict(units))
    return found[1].where(~empty).to_numpy(np.float64), known.fillna(unit).to_numpy(np.object_)


def _no_number(text: str) -> bool:
    """Say whether a text stands where a quantity is not said: of a control, or before the first time."""
    plain = text.strip().lower()
    return plain in ("", "nan", "na", "none", "unknown", "baseline") or bool(CONTROL.match(plain))


def _quantity(column: str, values: pd.Series) -> tuple[Quantities | None, str]:
    """Return a column's quantities, and what people should know of them."""
    found = read_quantity(values, TIMES if column == "time" else {})
    if found is None:
        _, words = distinct.coded(values)
        odd = next(repr(str(word)) for word in words if _quantities(pd.Series([word], dtype=object), {}) is None)
        return None, f"{column}: column {values.name!r} is left aside: {odd} is no quantity"
    units = [] if found[1] is None or column != "time" else sorted(set(found[1].tolist()) - {"", *TIMES.values()})
    if units:
        return found, f"time: units kept as they are: {', '.join(units)}; say obs.time_unit==day, or what it is"
    return found, ""


def guide_target(value: Any) -> str:
    """Name the targets of a guide or of several (``a+b``): ``ATF2g1``, ``STAT1_sg2`` and ``ATF2_1`` name genes.

    Genes' own names end in digits too (``CD4``, ``NKX2-1``): only a mark (``g``, ``sg``, ``guide``, ``grna``), an
    underscore or a full stop before the number makes it a guide's.
    """
    parts = [part.strip() for part in re.split(r"[+,|;]", str(value)) if part.strip()]
    pairs = [part.split("_") for part in parts]  # KLF1_NegCtrl0: one of two guides is a control
    parts = [one for part, pair in zip(parts, pairs, strict=True) for one in (pair if _with_control(pair) else [part])]
    return "+".join(part if CONTROL.match(part) else _target(part) for part in parts)


def _with_control(pair: list[str]) -> bool:
    return len(pair) == 2 and any(re.fullmatch(r"(?i)neg(ative)?c(on)?tr(o)?l\d*|ctrl\d*", one) for one in pair)


def _target(guide: str) -> str:
    found = re.fullmatch(r"(.+?)(?:[-_.]?(?:sg|g|guide|grna|sgrna)[-_]?\d+|[_.]\d+)", guide)
    return found[1] if found else guide


def _normalise(frame: pd.DataFrame, controls: Sequence[str] = ()) -> None:
    for column, default in OBS_DEFAULTS.items():
        if column not in frame:
            continue
        if isinstance(default, float):
            try:
                frame[column] = pd.to_numeric(frame[column]).astype(float)
            except (ValueError, TypeError) as error:
                raise InputRefused(
                    f"obs.{column}: not numbers: {error}; map another column with obs.{column}=NAME"
                ) from None
        elif isinstance(default, bool):
            frame[column] = np.asarray(distinct.changed(frame[column], _truth), dtype=bool)
    if "perturbation" in frame:
        frame["perturbation"] = distinct.changed(
            frame["perturbation"], lambda value: perturbation_name(value, controls)
        )
        if "perturbation_type" not in frame:
            kinds = distinct.changed(frame["perturbation"], lambda name: "genetic" if name else "none")
            frame["perturbation_type"] = kinds
        else:
            frame["perturbation_type"] = distinct.changed(frame["perturbation_type"], perturbation_kind)


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise InputRefused(f"obs.is_primary_data holds {value!r}; it is true or false")
        return value.lower() == "true"
    return bool(value)


PERTURBATION_KINDS = (
    (r"crispr[-_ ]?a(ct.*)?$|over[-_ ]?express|^oe$|^orf$", "activation"),
    (r"crispr|cas9|knock|sirna|shrna|genetic|^ko$", "genetic"),
    (r"drug|compound|chemical|small.?molecule", "drug"),
    (r"stimul|cytokine|ligand|growth.?factor|infect", "stimulation"),
)


def perturbation_kind(value: Any) -> str:
    """Bring a kind of perturbation to the lake's words, where it is one of the customary ones."""
    text = "none" if value is None or value != value else str(value)
    if text.strip().lower() in ("", "nan", "none", "na", "unknown"):
        return "none"
    return next((kind for pattern, kind in PERTURBATION_KINDS if re.search(pattern, text, re.IGNORECASE)), text)


NAME = re.compile(r"[A-Za-z][^,\s'-]{1,}")
"""How a name begins that stands alone: ``KLF1``; locants of a compound (``2``, ``N``, ``3'``) do not."""


ROTATION = re.compile(r"\((\+/?[-\u2212]|[-\u2212]/?\+|\+)\)")
"""Which way a compound turns light, or that it is both: ``(+)-JQ1``, ``(+/-)-verapamil``."""


def _rotation(found: re.Match[str]) -> str:
    return "(plus)" if found[1] == "+" else "(±)"


def _names(text: str) -> list[str]:
    """Return the names between commas; the whole where commas belong to one name, as in ``N,N-dimethyltryptamine``."""
    parts = [part.strip() for part in text.split(",")]
    if re.search(r",\s+[a-z]", text):  # a salt, a form: ``Hydroxyzine, dihydrochloride``, ``TNF, alpha``
        return [text.strip()]
    apart = any(CONTROL.match(part) for part in parts) or all(NAME.match(part) for part in parts if part)
    return parts if apart else [text.strip()]


def perturbation_name(value: Any, controls: Sequence[str] = ()) -> str:
    """Write a perturbation the lake's way: ``""``, ``control``, or targets sorted and joined by ``+``.

    Non-targeting guides and vehicles come under many names; each is ``control``. ``A+ctrl`` is ``A``. A comma stands
    between targets where each side is a name (``CEBPA,KLF1``), and within one elsewhere (``2,4-dinitrophenol``). As a
    plus is between targets, ``(+)-JQ1`` is written ``(plus)-JQ1``, and ``(+/-)-verapamil`` ``(±)-verapamil``.

    Args:
        value: As the source has it.
        controls: Words that mean a control here, beside the customary ones.
    """
    if value is None or value != value or str(value).strip().lower() in ("", "nan", "none", "na", "unperturbed"):
        return ""
    parts = [name for part in re.split(r"[+|]", ROTATION.sub(_rotation, str(value))) for name in _names(part) if name]
    targets = sorted({part for part in parts if not CONTROL.match(part) and part not in controls})
    return "+".join(targets) or "control"
