"""This module turns a request's cells into count matrices in vocabulary order, and says what got lost.

Sizes are checked against the limits first, values before they are used as positions, so that a request that lies about
itself is refused with the path of the field, and never allocates what it claims.

A count that is zero is as one that is not sent. A level (an intensity, a fraction) that is zero was measured, and may
be negative; what is not sent of it was not found.

Shape letters used in this module:
    C  cells      F  features of the request      G  features of the vocabulary      N  stored counts
    O  organisms of the request
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.errors import CoverageTooLow, FieldRefused
from serve.messages import Coverage, CsrCounts
from serve.settings import Limits
from train.cells import NUMBERS

EXAMPLES = 20
LEAST_SAID = 0.0005
"""Smallest share that is warned of."""
LARGEST_COUNT = 2**24
"""Largest count, as the lake has it: float32 holds every whole number up to here, and sums of them stay finite."""
_UNKNOWN, _AMBIGUOUS = -1, -2
_LARGEST = float(np.finfo(np.float32).max)


Said = str | float | list[str] | list[float]
ByCell = list[dict[str, float | None]]
"""One {feature: value} for each cell; None is as one that is left out, where values are levels."""


class Vocabulary(Protocol):
    """The features of one measurement; a feature's position is its column."""

    @property
    def feature_id(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def feature_name(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def organism(self) -> Sequence[str]: ...  # noqa: D102


@dataclass(frozen=True)
class Features:
    """A vocabulary that can be sent to another process."""

    feature_id: list[str]
    feature_name: list[str]
    organism: list[str]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Features:
        """Copy any vocabulary."""
        return cls(list(vocabulary.feature_id), list(vocabulary.feature_name), list(vocabulary.organism))


class FeatureIndex:
    """Finds a vocabulary's features by id, id with a version, or symbol."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.size = len(vocabulary.feature_id)
        self.organism_G = np.array(vocabulary.organism, dtype=object)
        self._by_id: dict[str, list[int]] = {}
        self._by_name: dict[str, list[int]] = {}
        for position, (name, symbol) in enumerate(zip(vocabulary.feature_id, vocabulary.feature_name, strict=True)):
            self._by_id.setdefault(name, []).append(position)
            self._by_name.setdefault(symbol, []).append(position)

    def positions(self, names: Sequence[str], organism: str = "") -> NDArray[np.int64]:
        """Return each name's column, -1 for an unknown name and -2 for one that several features carry.

        ``organism`` (empty: any) decides between features of the same id or symbol.
        """
        return np.fromiter((self._position(name, organism) for name in names), dtype=np.int64, count=len(names))

    def strange(self, position_F: NDArray[np.integer], organism: str) -> NDArray[np.bool_]:
        """Say which features are another organism's; none where nobody says of which organism a cell is."""
        if not organism:
            return np.zeros(len(position_F), bool)
        its_F = self.organism_G[position_F]
        return (position_F >= 0) & (its_F != organism) & (its_F != "")

    def _position(self, name: str, organism: str) -> int:
        named = self._by_id.get(name, [])
        if not named and name.startswith("ENS"):
            named = self._by_id.get(name.partition(".")[0], [])
        named = named or self._by_name.get(name, [])
        if organism and len(named) > 1:
            named = [position for position in named if self.organism_G[position] == organism]
        if len(named) == 1:
            return named[0]
        return _AMBIGUOUS if named else _UNKNOWN


@dataclass(frozen=True)
class Cells:
    """A request's cells, ready for the model.

    Attributes:
        counts: Measurement to counts_CG, float32, columns in vocabulary order.
        prompts: Prompt field to one value per cell.
        model_sha256: The checkpoint that they were decoded for: columns follow its vocabulary.
        adapter: Name and SHA-256 of the adapter that is to answer; empty is none.
        waited_s: Seconds since the request came in.
    """

    counts: dict[str, csr_matrix]
    prompts: dict[str, list[str]]
    n_cells: int
    model_sha256: str
    adapter: tuple[str, str] = ("", "")
    waited_s: float = 0.0

    @property
    def organism(self) -> str:
        """The one that all cells are said to be of; empty where there is none."""
        return organism_of(self.prompts.get("organism", [""]))


def organism_of(organism_C: Sequence[str]) -> str:
    """Return the organism that all cells are said to be of, empty where there is no such."""
    said = set(organism_C)
    return said.pop() if len(said) == 1 else ""


@dataclass(frozen=True)
class Decoded:
    """Cells with the report on what could be used of them."""

    cells: Cells
    coverage: dict[str, Coverage]
    warnings: list[str]


class Decoder:
    """Decodes requests for one checkpoint."""

    def __init__(
        self,
        vocabulary: Mapping[str, Vocabulary],
        prompts: Mapping[str, Sequence[str]],
        model_sha256: str,
        limits: Limits,
        levels: Collection[str] = (),
    ) -> None:
        """Prepare the look-up of names.

        Args:
            vocabulary: Measurement to its features.
            prompts: Field to the values that the model has seen.
            model_sha256: The checkpoint.
            limits: What a request may hold.
            levels: Measurements whose values are levels, not counts.
        """
        self._levels = frozenset(levels)
        self._indices = {name: FeatureIndex(part) for name, part in vocabulary.items()}
        self._prompts = {name: list(values) for name, values in prompts.items()}
        self._known = {name: frozenset(values) for name, values in prompts.items()}
        self._model_sha256 = model_sha256
        self._limits = limits

    def decode(
        self,
        counts: Mapping[str, CsrCounts | ByCell],
        prompts: Mapping[str, Said],
        *,
        min_coverage: float | None = None,
        measured: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> Decoded:
        """Check a request and write its counts in vocabulary order.

        Args:
            counts: Measurement to counts in one of the two forms.
            prompts: One value for all cells, or one per cell.
            min_coverage: Raises the server's own limit; cannot lower it. A measurement below it is refused; one below
                the server's alone is left out, with a warning, where others are understood. One in which nothing was
                counted is below neither: it was measured, whatever cells are beside it.
            measured: Measurement to [C], which cells have it; of one that is not named here, all.

        Raises:
            FieldRefused: A field is wrong; the error names it.
            CoverageTooLow: Too small a share of the counts belongs to known features, wherever there are counts.
        """
        counts, warnings = self._known_of(counts)
        n_cells = self._n_cells(counts)
        full_prompts = self._decode_prompts(prompts, n_cells)
        organism_C = full_prompts.get("organism", [""] * n_cells)
        least = max(self._limits.min_coverage, min_coverage or 0.0)
        matrices: dict[str, csr_matrix] = {}
        coverage: dict[str, Coverage] = {}
        left_out: list[CoverageTooLow] = []
        understood = False
        for name, part in counts.items():
            where, levels = f"counts.{name}", name in self._levels
            named = _known_best(part, self._indices[name], organism_of(organism_C))
            entries = _entries(named, where, self._limits, levels=levels)
            fractional = _fractional(entries.data_N)
            has_any = bool(len(entries.data_N) if levels else entries.data_N.any())
            matrix, coverage[name], strange = _map(entries, self._indices[name], organism_C, where, levels=levels)
            share = coverage[name].share_of_counts
            silent = not has_any and (coverage[name].mapped or not entries.given.features)
            understood |= not silent and share >= least
            if share < least and not silent:
                left_out.append(too_little(coverage[name], least, where, has_any=has_any))
                if has_any and share < (min_coverage or 0.0):
                    raise left_out[-1]
                continue
            matrices[name] = matrix
            there_C = (measured or {}).get(name)
            warnings += _warn(name, 0.0 if levels else fractional, strange, matrix, there_C, levels=levels)
        if left_out and not understood:
            raise left_out[0]
        lacking = {why.field.removeprefix("counts."): why.message for why in left_out}
        warnings += [f"{name} is taken as not measured: {why}" for name, why in lacking.items()]
        return Decoded(Cells(matrices, full_prompts, n_cells, self._model_sha256), coverage, warnings)

    def said(self, prompts: Mapping[str, Said], n_cells: int) -> Cells:
        """Check what is said of cells that nobody measured.

        Raises:
            FieldRefused: A field is wrong; the error names it.
        """
        if n_cells > self._limits.cells:
            raise FieldRefused("cells", f"{n_cells:,} cells; ask for at most {self._limits.cells:,} in a request")
        full = {"organism": [""] * n_cells} | self._decode_prompts(prompts, n_cells)
        return Cells({}, full, n_cells, self._model_sha256)

    def columns(self, measurement: str, names: Sequence[str], where: str, organism: str = "") -> tuple[int, ...]:
        """Return the positions of features of a measurement; ``organism`` decides between those of the same symbol.

        Raises:
            FieldRefused: One is not known, or several features carry the name.
        """
        found = self._indices[measurement].positions(names, organism)
        if (found < 0).any():
            first = int(np.argmax(found < 0))
            why = "several features carry this name" if found[first] == _AMBIGUOUS else "this model does not know it"
            remedy = "use ids from GET /v1/features"
            if found[first] == _AMBIGUOUS and not organism:
                remedy += ", or say one organism of all cells"
            raise FieldRefused(f"{where}.{first}", f"{names[first]!r}: {why}; {remedy}")
        return tuple(found.tolist())

    def check_prompt(self, field: str, value: str, where: str) -> None:
        """Refuse a prompt value that the model has not seen; of targets joined by "+", each must be known.

        Raises:
            FieldRefused: The message holds the nearest known values.
        """
        for part in value.split("+") if field == "perturbation" else [value]:
            if part not in self._known.get(field, ()):
                near = difflib.get_close_matches(part, self._prompts.get(field, []), n=3)
                remedy = f"did you mean {', '.join(map(repr, near))}?" if near else "see GET /v1/prompts"
                raise FieldRefused(where, f"this model has not seen {field} {part!r}; {remedy}")

    def _known_of(self, counts: Mapping[str, CsrCounts | ByCell]) -> tuple[dict[str, CsrCounts | ByCell], list[str]]:
        """Return the measurements that the model knows, and what is to be said of the others."""
        known = {name: part for name, part in counts.items() if name in self._indices}
        if not known:
            name, knows = next(iter(counts)), ", ".join(sorted(self._indices))
            raise FieldRefused(f"counts.{name}", f"this model does not know this measurement; it knows {knows}")
        return known, [f"{name} is left out: the model does not know this" for name in counts if name not in known]

    def _n_cells(self, counts: Mapping[str, CsrCounts | ByCell]) -> int:
        """Check sizes only: nothing is converted yet."""
        limits, total, cells = self._limits, 0, {}
        for name, part in counts.items():
            cells[name] = len(part) if isinstance(part, list) else len(part.indptr) - 1
            total += sum(map(len, part)) if isinstance(part, list) else len(part.data)
            if total > limits.nonzeros:
                raise FieldRefused(
                    f"counts.{name}", f"more than {limits.nonzeros:,} counts in the request; send fewer cells at a time"
                )
            if cells[name] > limits.cells:
                raise FieldRefused(
                    f"counts.{name}", f"{cells[name]:,} cells; send at most {limits.cells:,} in a request"
                )
        if len(set(cells.values())) > 1:
            raise FieldRefused("counts", f"the measurements differ in their number of cells: {cells}")
        n_cells = next(iter(cells.values()))
        if n_cells < 1:
            raise FieldRefused("counts", "there are no cells; send at least one")
        return n_cells

    def _decode_prompts(self, prompts: Mapping[str, Said], n_cells: int) -> dict[str, list[str]]:
        full: dict[str, list[str]] = {}
        for field, said in prompts.items():
            where = f"prompts.{field}"
            if field not in self._known and field not in NUMBERS:
                known = ", ".join(sorted([*self._known, *NUMBERS]))
                raise FieldRefused(where, f"this model does not know this prompt; it knows {known}")
            values = said if isinstance(said, list) else [said] * n_cells
            if len(values) != n_cells:
                raise FieldRefused(where, f"{len(values)} values for {n_cells} cells; send one, or one per cell")
            path = f"{where}.{{}}" if isinstance(said, list) else where
            full[field] = self._numbers(values, path) if field in NUMBERS else self._words(field, values, path)
        return full

    def _words(self, field: str, values: Sequence[str | float], path: str) -> list[str]:
        for value in dict.fromkeys(values):
            where = path.format(values.index(value))
            if not isinstance(value, str):
                raise FieldRefused(where, f"{value:g} is not a text; {field} is said in words, see GET /v1/prompts")
            self.check_prompt(field, value, where)
        return [str(value) for value in values]

    def _numbers(self, values: Sequence[str | float], path: str) -> list[str]:
        for position, value in enumerate(values):
            if isinstance(value, str) or not abs(value) <= _LARGEST:
                raise FieldRefused(path.format(position), f"{value!r} is not a finite number")
        return [repr(float(value)) for value in values]


@dataclass(frozen=True)
class _Given:
    """Where values are in a request."""

    features: list[str]
    indptr: NDArray[np.int64]
    indices_N: NDArray[np.integer]

    def cell(self, entry: int) -> int:
        return int(np.searchsorted(self.indptr, entry, side="right")) - 1

    def feature(self, entry: int) -> str:
        return self.features[int(self.indices_N[entry])]

    def only(self, kept_N: NDArray[np.bool_]) -> _Given:
        """Return some of the values' places."""
        before = np.concatenate([[0], np.cumsum(kept_N)])
        return _Given(self.features, before[self.indptr], self.indices_N[kept_N])


@dataclass(frozen=True)
class _Entries:
    given: _Given
    data_N: NDArray[np.float32]


def _known_best(part: CsrCounts | ByCell, index: FeatureIndex, organism: str) -> CsrCounts | ByCell:
    """Return counts whose features have those of a file's names that the model knows most of."""
    if isinstance(part, list) or not part.others:
        return part
    names = max([part.features, *part.others], key=lambda names: int((index.positions(names, organism) >= 0).sum()))
    return part.model_copy(update={"features": names})


def _entries(part: CsrCounts | ByCell, where: str, limits: Limits, *, levels: bool) -> _Entries:
    if isinstance(part, list):
        return _entries_of_cells(part, where, limits, levels=levels)
    if len(part.features) > limits.features:
        raise FieldRefused(f"{where}.features", f"{len(part.features):,} features; send at most {limits.features:,}")
    indptr = _integers(part.indptr, f"{where}.indptr").astype(np.int64)
    indices_N = _integers(part.indices, f"{where}.indices")
    if len(part.data) != len(indices_N):
        raise FieldRefused(f"{where}.data", f"{len(part.data)} counts for {len(indices_N)} indices; send as many")
    if len(indptr) < 1 or indptr[0] != 0 or indptr[-1] != len(indices_N):
        raise FieldRefused(f"{where}.indptr", f"must start with 0 and end with the number of counts, {len(indices_N)}")
    falls = indptr[1:] < indptr[:-1]  # a difference of two may be beyond 64 bits
    if np.any(falls):
        cell = int(np.argmax(falls))
        raise FieldRefused(f"{where}.indptr.{cell + 1}", "falls; a cell cannot have fewer than no counts")
    outside = (indices_N < 0) | (indices_N >= len(part.features))
    if np.any(outside):
        entry = int(np.argmax(outside))
        raise FieldRefused(
            f"{where}.indices.{entry}", f"{indices_N[entry]} is not a position among {len(part.features)} features"
        )
    given = _Given(part.features, indptr, indices_N)
    return _values(part.data, given, lambda entry: f"{where}.data.{entry}", levels=levels)


def _entries_of_cells(cells: ByCell, where: str, limits: Limits, *, levels: bool) -> _Entries:
    column = {name: position for position, name in enumerate(dict.fromkeys(name for cell in cells for name in cell))}
    if len(column) > limits.features:
        raise FieldRefused(where, f"{len(column):,} features; send at most {limits.features:,}")
    for number, cell in enumerate(cells if not levels else ()):
        if None in cell.values():
            name = next(name for name, value in cell.items() if value is None)
            raise FieldRefused(f"{where}.{number}.{name}", "null is no count; leave it out")
    features = list(column)
    indptr = np.zeros(len(cells) + 1, dtype=np.int64)
    np.cumsum([sum(value is not None for value in cell.values()) for cell in cells], out=indptr[1:])
    found = [(column[name], value) for cell in cells for name, value in cell.items() if value is not None]
    given = _Given(features, indptr, np.array([position for position, _ in found], dtype=np.int64))

    def path(entry: int) -> str:
        return f"{where}.{given.cell(entry)}.{given.feature(entry)}"

    return _values([value for _, value in found], given, path, levels=levels)


def _integers(values: Any, where: str) -> NDArray[np.integer]:
    """Return whole numbers as they came, where they are an array."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.dtype != np.uint64:
        return values
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise FieldRefused(where, "holds a number beyond 64 bits") from None


def _values(values: Any, given: _Given, path: Callable[[int], str], *, levels: bool) -> _Entries:
    """Write values as float32 and check them; of an array no other copy is made."""
    said_N = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        data_N = said_N.astype(np.float32)
    if levels and np.isnan(data_N).any():  # as tables have what was not measured
        there_N = ~np.isnan(data_N)
        given, said_N, data_N = given.only(there_N), said_N[there_N], data_N[there_N]
    least, most = (-_LARGEST, _LARGEST) if levels else (0, LARGEST_COUNT)
    bad = ~((data_N >= least) & (data_N <= most))  # of what is no number, no comparison is true
    if np.any(bad):
        entry = int(np.argmax(bad))
        whose = f"cell {given.cell(entry)}, {given.feature(entry)}: "
        if levels:
            why = "leave out what was not measured, or send NaN"
            raise FieldRefused(path(entry), f"{whose}{said_N[entry]:g} is no level; {why}")
        why = f"counts are at most {LARGEST_COUNT:,}" if said_N[entry] > most else "counts are finite and not negative"
        raise FieldRefused(path(entry), f"{whose}{said_N[entry]:g} is not a count; {why}")
    return _Entries(given, data_N)


def _map(
    entries: _Entries, index: FeatureIndex, organism_C: Sequence[str], where: str, *, levels: bool
) -> tuple[csr_matrix, Coverage, float]:
    """Return counts_CG, what became of them, and the share that is of features of other organisms than the cells'.

    The entries' values are used up. A symbol that several organisms have is the feature of each cell's own.
    """
    given, data_N = entries.given, entries.data_N
    organisms = {organism: number for number, organism in enumerate(dict.fromkeys(organism_C))}
    position_OF = np.stack([index.positions(given.features, organism) for organism in organisms]).astype(np.int32)
    strange_OF = np.stack([index.strange(*pair) for pair in zip(position_OF, organisms, strict=True)])
    which_N: Any = 0
    if len(organisms) > 1:
        number_C = np.array([organisms[organism] for organism in organism_C], np.int16)
        which_N = np.repeat(number_C, np.diff(given.indptr))
    column_N = position_OF[which_N, given.indices_N]
    strange_N = strange_OF[which_N, given.indices_N] if strange_OF.any() else np.zeros(0, bool)
    kept_N = column_N >= 0
    indptr: NDArray[np.integer] = given.indptr
    total = kept = _amount(data_N, levels=levels)
    strange = _amount(data_N[strange_N], levels=levels) / total if total and strange_N.any() else 0.0
    if not kept_N.all():
        before = np.zeros(len(kept_N) + 1, dtype=np.int32 if len(kept_N) < 2**31 else np.int64)
        np.cumsum(kept_N, out=before[1:])
        indptr, data_N, column_N = before[indptr], data_N[kept_N], column_N[kept_N]
        kept = _amount(data_N, levels=levels)
    n_kept = len(data_N)
    counts_CG = csr_matrix((data_N, column_N, indptr), shape=(len(given.indptr) - 1, index.size))
    counts_CG.sum_duplicates()
    if levels and counts_CG.nnz < n_kept:
        raise FieldRefused(where, "several names of one feature have levels in the same cell; send each level once")
    if not levels:
        counts_CG.eliminate_zeros()
    return (
        counts_CG,
        Coverage(
            features=len(given.features),
            mapped=int((position_OF >= 0).any(axis=0).sum()),
            share_of_counts=round(float(kept / total), 6) if total else 0.0,
            unmapped=_named(given.features, (position_OF == _UNKNOWN).all(axis=0)),
            ambiguous=_named(given.features, (position_OF == _AMBIGUOUS).any(axis=0)),
        ),
        strange,
    )


def _amount(data_N: NDArray[np.float32], *, levels: bool) -> float:
    """Return the sum of counts, or the number of levels."""
    return float(len(data_N) if levels else data_N.sum(dtype=np.float64))


def _named(features: list[str], chosen_F: NDArray[np.bool_]) -> list[str]:
    return [features[position] for position in np.flatnonzero(chosen_F)[:EXAMPLES]]


def too_little(coverage: Coverage, least: float, where: str, *, has_any: bool) -> CoverageTooLow:
    """Return why a measurement cannot be used."""
    if not has_any:
        return CoverageTooLow(where, "the model knows none of the features; use ids from GET /v1/features")
    lost = ", ".join([*coverage.unmapped, *coverage.ambiguous][:3])
    return CoverageTooLow(
        where,
        f"only {coverage.share_of_counts:.1%} of the counts belong to features of this model, {least:.1%} are needed; "
        f"not known: {lost or 'nothing'}; use ids from GET /v1/features, or name the organism",
    )


def _fractional(data_N: NDArray[np.float32]) -> float:
    """Return the share of values that are no whole numbers."""
    return float(np.mean(data_N != np.floor(data_N))) if len(data_N) else 0.0


def _warn(
    name: str,
    fractional: float,
    strange: float,
    counts_CG: csr_matrix,
    there_C: NDArray[np.bool_] | None,
    *,
    levels: bool,
) -> list[str]:
    kind, warnings = "levels" if levels else "counts", []
    if fractional:
        warnings.append(f"{name}: {fractional:.1%} of the values are no whole numbers; the model expects raw counts")
    if strange >= LEAST_SAID:
        said = f"{strange:.1%} of the {kind} are of features of another organism than the prompts say"
        warnings.append(f"{name}: {said}; they count as they are")
    empty_C = np.diff(counts_CG.indptr) == 0
    empty = int((empty_C if there_C is None else empty_C & there_C).sum())
    if empty:
        warnings.append(f"{name}: {empty:,} cells have no {kind} that the model knows")
    lacking = 0 if there_C is None else int((~there_C).sum())
    if lacking:
        warnings.append(f"{lacking:,} cells were not measured for {name}")
    return warnings
