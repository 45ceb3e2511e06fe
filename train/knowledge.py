"""This module reads curated knowledge: which genes belong to which set, and vectors that were learned elsewhere.

Shape letters used in this module:
    F  features of all measurements, from 1      E  memberships      K  width of a vector      W  bases of a window
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.errors import InputRefused, MissingError
from train.genome import Region

SMALLEST, LARGEST = 10, 200
"""Sets of fewer members say little that a gene does not say itself; larger ones say what most genes share."""


def read_sets(
    paths: Sequence[str | Path], smallest: int = SMALLEST, largest: int = LARGEST
) -> dict[str, tuple[str, ...]]:
    """Read gene sets from GMT files: a line is a name, a description and the members, separated by tabs.

    Args:
        paths: The files; sets of the same name are told apart by the file's name, and where that is the same too by a
            number.
        smallest: Members of a set at least.
        largest: Members of a set at most.

    Returns:
        Set to its members, each once, in the file's order.

    Raises:
        MissingError: No such file.
        InputRefused: A line is no set, or no set of a wanted size is left.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingError(f"{path}: no such file of gene sets; check the path") from None
        except UnicodeDecodeError as error:
            raise InputRefused(f"{path}: not a text file: {error}") from None
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            name, *rest = line.split("\t")
            members = tuple(dict.fromkeys(word.strip().split(",")[0] for word in rest[1:] if word.strip()))
            if not name or len(rest) < 2:
                raise InputRefused(f"{path}, line {number}: a set is a name, a description and members, between tabs")
            if smallest <= len(members) <= largest:
                names = (f"{path.stem}{f' {n}' * (n > 1)}: {name}" for n in itertools.count(1))
                found[next(one for one in names if one not in found) if name in found else name] = members
    if paths and not found:
        raise InputRefused(f"{', '.join(map(str, paths))}: no set has {smallest} to {largest} members")
    return found


@dataclass(frozen=True)
class Knowledge:
    """What is known of a model's features.

    Attributes:
        sets: Names of the sets, in the order of their numbers.
        feature_E: The feature of each membership, numbered over all measurements from 1.
        set_E: Its set.
        vectors: Kind ("sequence", "text") to float32 [1 + F, K]; zeros for features that nothing is known of.
        chromosomes: Names of chromosomes, in the order of their numbers from 1.
        chromosome_F: The chromosome of each feature; 0 where nobody knows.
        base_F: Where it is looked at, in bases; NaN where nobody knows.
        bases_FW: The bases of its window, as :func:`train.genome.read_windows` has them; W is 0 without a genome.
    """

    sets: tuple[str, ...]
    feature_E: NDArray[np.int64]
    set_E: NDArray[np.int64]
    vectors: dict[str, NDArray[np.float32]]
    chromosomes: tuple[str, ...] = ()
    chromosome_F: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    base_F: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    bases_FW: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))

    def placed(self, places: Sequence[Region | None], bases_FW: NDArray[np.uint8] | None = None) -> Knowledge:
        """Return the same, with where features lie and which bases are there."""
        chromosomes = tuple(sorted({place.chromosome for place in places if place is not None}))
        number = {name: place for place, name in enumerate(chromosomes, start=1)}
        return replace(
            self,
            chromosomes=chromosomes,
            chromosome_F=np.array([0, *(number[at.chromosome] if at else 0 for at in places)], np.int64),
            base_F=np.array([np.nan, *(at.middle if at else np.nan for at in places)], np.float32),
            bases_FW=self.bases_FW if bases_FW is None else bases_FW,
        )


def gather_knowledge(
    names: Sequence[tuple[str, str]],
    sets: Mapping[str, Sequence[str]],
    vectors: Mapping[str, Mapping[str, NDArray[np.float32]]],
    aliases: Mapping[str, Sequence[str]] | None = None,
    permute: int | None = None,
) -> Knowledge:
    """Match knowledge with features by id, name or alias; the version of an id (``.5``) does not matter.

    Args:
        names: Id and name of each feature, measurement by measurement: what a model numbers from 1.
        sets: Set to members; those that match no feature are left out, and sets of fewer than two matched features.
        vectors: Kind to id or name to a vector; a feature that has several (those of the genes that it inherits from)
            gets their mean.
        aliases: Id or name to the genes that it inherits from: a protein from its gene, a peak from those it overlaps.
        permute: A seed: memberships are dealt anew, each feature and each set keeping how many it has; the null arm.

    Raises:
        InputRefused: Knowledge was given, and none of it matches a feature.
    """
    places: dict[str, list[int]] = {}
    for number, words in enumerate(names, start=1):
        inherited = [one for word in words if aliases for one in aliases.get(word, ())]
        for word in dict.fromkeys([*words, words[0].split(".")[0], *inherited]):
            if word:
                places.setdefault(word, []).append(number)
    matched = {
        name: sorted({number for member in members for number in places.get(member, ())})
        for name, members in sets.items()
    }
    kept = {name: numbers for name, numbers in matched.items() if len(numbers) > 1}
    if sets and not kept:
        raise InputRefused(f"knowledge.sets: no set has two members among the {len(names):,} features; ids or symbols?")
    feature_E = np.array([number for numbers in kept.values() for number in numbers], dtype=np.int64)
    size_S = np.array([len(numbers) for numbers in kept.values()], dtype=np.int64)
    set_E = np.repeat(np.arange(len(kept)), size_S)
    if permute is not None:
        feature_E = np.random.default_rng([permute, 5]).permutation(feature_E)
    order = np.argsort(feature_E, kind="stable")
    found = {}
    for kind, known in vectors.items():
        width = len(next(iter(known.values())))
        table, n_F = np.zeros((1 + len(names), width), np.float32), np.zeros(1 + len(names), np.float32)
        for word, vector in known.items():
            for number in places.get(word, ()):
                table[number] += vector
                n_F[number] += 1
        table /= np.maximum(n_F, 1)[:, None]
        if not table.any():
            raise InputRefused(f"knowledge.{kind}: none of {len(known):,} vectors is of a feature; ids or symbols?")
        found[kind] = table
    return Knowledge(tuple(kept), feature_E[order], set_E[order], found)


def read_vectors(path: str | Path) -> dict[str, NDArray[np.float32]]:
    """Read frozen vectors from an npz file with ``ids`` (text) and ``vectors`` ([N, K] numbers); no pickle is opened.

    Raises:
        MissingError: No such file.
        InputRefused: It is no such npz, the lengths differ, or there are values that are no numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, vectors = file["ids"].astype(str), file["vectors"].astype(np.float32)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of vectors; check the path") from None
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise InputRefused(f"{path}: not an npz with ids and vectors: {error}") from None
    if vectors.ndim != 2 or len(ids) != len(vectors) or not len(ids) or not np.isfinite(vectors).all():
        raise InputRefused(
            f"{path}: {ids.shape} ids and {vectors.shape} vectors; one finite vector for each id is needed"
        )
    return dict(zip(ids.tolist(), vectors, strict=True))


def read_aliases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a table of two columns between tabs: a feature (a protein, say), and a gene that it inherits from.

    A feature that has several lines inherits from all of their genes.

    Raises:
        MissingError: No such file.
        InputRefused: A line has other than two columns.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of aliases; check the path") from None
    pairs = [line.split("\t") for line in lines if line.strip()]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise InputRefused(f"{path}, line {number}: {len(pair)} columns; two are needed, between tabs")
    found: dict[str, tuple[str, ...]] = {}
    for feature, gene in pairs:
        found[feature.strip()] = (*found.get(feature.strip(), ()), gene.strip())
    return found
