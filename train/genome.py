"""This module reads what the genome says of features: where they lie, which bases are there, which motifs and genes.

A feature lies where a BED file says (a gene, by symbol or id), or where its own id says (a peak: ``chr1:100-200``).

Shape letters used in this module:
    F  features of all measurements, from 1      W  bases of a window
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from store.errors import InputRefused, MissingError

BASES = "ACGT"
UPSTREAM = 2000
"""Bases before a gene's start that count as its own: a peak there inherits from it."""
FALSE_HITS = 1e-4
"""Chance that a random place is taken for a motif's."""
COMPLEMENT = np.array([0, 4, 3, 2, 1], np.uint8)


@dataclass(frozen=True)
class Region:
    """A stretch of a chromosome: ``start`` counts from 0, ``end`` is behind the last base."""

    chromosome: str
    start: int
    end: int
    strand: str = "."

    @property
    def middle(self) -> int:
        """Where it is looked at: a gene at its start, on its strand; anything else in the middle."""
        return {"+": self.start, "-": self.end}.get(self.strand, (self.start + self.end) // 2)


def region_of(name: str) -> Region | None:
    """Return the region that an id tells, such as ``chr1:100-200`` or ``chr1-100-200``; None where it tells none."""
    told = re.fullmatch(r"([\w.]+)[:\-_](\d+)[\-_](\d+)", name)
    return Region(told[1], int(told[2]), int(told[3])) if told and int(told[2]) < int(told[3]) else None


def read_regions(path: str | Path) -> dict[str, Region]:
    """Read a BED file with names: chromosome, start, end, name, and perhaps a score and the strand.

    Raises:
        MissingError: No such file.
        InputRefused: A line is no region with a name.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of positions; check the path") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        words = line.rstrip("\n").split("\t")
        if len(words) < 4 or not (words[1].isdigit() and words[2].isdigit()) or int(words[1]) >= int(words[2]):
            raise InputRefused(f"{path}, line {number}: chromosome, start, end and name are needed, between tabs")
        strand = next((word for word in words[4:6] if word in ("+", "-")), ".")
        found[words[3]] = Region(words[0], int(words[1]), int(words[2]), strand)
    return found


def locate(names: Sequence[tuple[str, str]], known: Mapping[str, Region]) -> list[Region | None]:
    """Return where each feature lies, by its id or name, without the id's version too; None where nobody knows."""
    found = []
    for words in names:
        ways = [known[word] for word in (*words, words[0].split(".")[0]) if word in known]
        found.append(ways[0] if ways else region_of(words[0]))
    return found


def neighbours(names: Sequence[tuple[str, str]], genes: Mapping[str, Region]) -> dict[str, tuple[str, ...]]:
    """Return for each feature that is a region the genes that it overlaps, ``UPSTREAM`` bases before them too."""
    by_chromosome: dict[str, list[tuple[int, int, str]]] = {}
    for name, gene in genes.items():
        start = gene.start - UPSTREAM * (gene.strand != "-")
        by_chromosome.setdefault(gene.chromosome, []).append((start, gene.end + UPSTREAM * (gene.strand == "-"), name))
    tables = {
        chromosome: (np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), [row[2] for row in rows])
        for chromosome, rows in by_chromosome.items()
    }
    found = {}
    for feature, _ in names:
        region = region_of(feature)
        if region is not None and region.chromosome in tables:
            starts, ends, own = tables[region.chromosome]
            near = np.flatnonzero((starts < region.end) & (ends > region.start))
            if len(near):
                found[feature] = tuple(own[place] for place in near)
    return found


def read_windows(
    names: Sequence[tuple[str, str]], places: Sequence[Region | None], path: str | Path, width: int
) -> NDArray[np.uint8]:
    """Read the bases of each feature's window, [1 + F, W]: 1 to 4 are A, C, G, T on the feature's strand, 0 is unknown.

    A record of the FASTA file that is named after a feature (a transcript, say) is read from its beginning; else the
    window lies around the feature's middle, on the record of its chromosome.

    Raises:
        MissingError: No such file.
        InputRefused: It is no FASTA file, or no feature has a base.
    """
    if not Path(path).exists():
        raise MissingError(f"{path}: no such FASTA file; check the path")
    with tempfile.TemporaryDirectory() as folder:  # where the file lies may not be written to
        bases_FW = _windows(names, places, _indexed(Path(path), Path(folder)), width)
    if not bases_FW.any():
        raise InputRefused(
            f"{path}: no feature is a record, and none lies on one; name positions in knowledge.positions"
        )
    return bases_FW


def _indexed(path: Path, folder: Path) -> Any:
    from pyfaidx import Fasta, FastaIndexingError, FetchError

    beside = Path(f"{path}.fai")
    index = beside if beside.exists() else folder / "index.fai"
    try:
        return Fasta(str(path), indexname=str(index), rebuild=index != beside)
    except (OSError, ValueError, KeyError, FastaIndexingError, FetchError) as error:
        raise InputRefused(f"{path}: not a FASTA file: {error}") from None


def _windows(
    names: Sequence[tuple[str, str]], places: Sequence[Region | None], records: Any, width: int
) -> NDArray[np.uint8]:
    bases_FW = np.zeros((1 + len(names), width), np.uint8)
    for number, (words, place) in enumerate(zip(names, places, strict=True), start=1):
        own = next((word for word in (*words, words[0].split(".")[0]) if word and word in records), None)
        if own is not None:
            bases_FW[number] = _coded(str(records[own][:width]), width, 0)
        elif place is not None and place.chromosome in records:
            first = place.middle - width // 2
            text = str(records[place.chromosome][max(0, first) : max(0, first + width)])
            bases_FW[number] = _coded(text, width, max(0, -first))
            if place.strand == "-":
                bases_FW[number] = COMPLEMENT[bases_FW[number]][::-1]
    return bases_FW


def _coded(text: str, width: int, skipped: int) -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    for code, base in enumerate(BASES, start=1):
        table[[ord(base), ord(base.lower())]] = code
    coded = np.zeros(width, np.uint8)
    found = table[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]
    coded[skipped : skipped + len(found)] = found[: width - skipped]
    return coded


def read_motifs(path: str | Path) -> list[Any]:
    """Read motifs in JASPAR's or MEME's minimal format, as Biopython has them.

    Raises:
        MissingError: No such file.
        InputRefused: There is no motif in it.
    """
    from Bio import motifs

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of motifs; check the path") from None
    form = "minimal" if text.lstrip().startswith("MEME") else "jaspar"
    with Path(path).open(encoding="utf-8") as file:
        try:
            found = list(motifs.parse(file, form))
        except (ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise InputRefused(f"{path}: not motifs in JASPAR's or MEME's format: {error}") from None
    if not found:
        raise InputRefused(f"{path}: no motif in it; JASPAR's and MEME's minimal format are read")
    return found


def motif_sets(
    names: Sequence[tuple[str, str]], bases_FW: NDArray[np.uint8], motifs: Sequence[Any]
) -> dict[str, tuple[str, ...]]:
    """Return motif to the features in whose window it is, on either strand, and the factors that it is named after.

    A place is taken for a motif's where its log odds are above what about one random place in ten thousand reaches.
    """
    one_hot = torch.from_numpy(
        (bases_FW[1:, None, :] == np.arange(1, 5, dtype=np.uint8)[None, :, None]).astype(np.float32)
    )
    found = {}
    for motif in motifs:
        odds = motif.counts.normalize(pseudocounts=0.5).log_odds()
        least = odds.distribution().threshold_fpr(FALSE_HITS)
        weights = torch.tensor([[odds[base][place] for place in range(len(motif))] for base in BASES])
        if weights.shape[1] > one_hot.shape[2]:
            continue
        both = torch.stack([weights, weights.flip(0, 1)]).float()
        whole = torch.nn.functional.conv1d((one_hot.sum(1, keepdim=True)), torch.ones(1, 1, weights.shape[1]))
        score_F = torch.where(whole > weights.shape[1] - 0.5, torch.nn.functional.conv1d(one_hot, both), -torch.inf)
        hit = (score_F.amax((1, 2)) >= least).numpy()
        factors = re.split(r"::|\(", motif.name or "")
        members = [names[place][0] for place in np.flatnonzero(hit).tolist()] + [
            word.strip().upper() for word in factors if word
        ]
        found[f"motif {motif.matrix_id or ''} {motif.name}".replace("  ", " ")] = tuple(dict.fromkeys(members))
    return found
