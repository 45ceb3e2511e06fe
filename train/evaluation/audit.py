"""This module audits a fold before any number is made with it: what a method could know of the cells that judge it.

It fails closed: what cannot be checked is a finding, not a pass.

Shape letters used in this module:
    C  cells      G  features      H  hash functions      N  non-zeros      P  pairs of cells      W  words of 64 bits
    R, O  cells that are compared with each other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray
from pandas.util import hash_array
from scipy.sparse import csr_matrix

from store.errors import VerificationError
from train.evaluation.folds import TARGET, UNPERTURBED, Fold, FoldSettings
from train.evaluation.study import Study

HASHES, BAND = 32, 4
NEAR = 0.9
"""Cells whose (feature, count) pairs agree to this Jaccard index are near-duplicates."""
ALIKE = 22
"""Of so many hashes of ``HASHES`` two cells that are near-duplicates share at least; 1 in 10,000 pairs does not."""
COMPARED, CANDIDATES = 10**9, 10**7
"""Pairs of cells that are compared by their hashes, and by their counts, at most; each takes a minute or two."""
AT_ONCE = 2**18
"""Pairs that are compared in one step."""
FEWEST = 20
"""Non-zeros below which cells agree by chance; they are compared exactly only."""


@dataclass(frozen=True)
class Finding:
    """One leak, or one thing that could not be checked.

    Attributes:
        check: What was looked at.
        fold: In which fold; empty for all.
        message: What is wrong, with which cells, and what to do.
    """

    check: str
    fold: str
    message: str


def audit(
    study: Study,
    folds: list[Fold],
    settings: FoldSettings,
    *,
    knowledge: Sequence[tuple[str, str]] = (),
    pretrained_C: NDArray[np.bool_] | None = None,
    chosen_by_C: NDArray[np.bool_] | None = None,
    chosen: tuple[str, ...] = (),
) -> list[Finding]:
    """Look for leaks between what methods are fitted on (training and calibration) and what judges them.

    Args:
        study: The cells.
        folds: The folds.
        settings: What the folds were made from.
        knowledge: Knowledge files, each with the day (YYYY-MM-DD) of its newest source; empty text is not known.
        pretrained_C: Cells that a checkpoint saw before; None where there is no checkpoint.
        chosen_by_C: Cells by which a checkpoint was chosen among others; None where it was not.
        chosen: Measurements of which the snapshot holds chosen features only.

    Returns:
        The findings; none is a pass.
    """
    findings = _selection(settings, chosen) + _knowledge(settings, knowledge) + _primary(study, folds)
    for name, part in study.counts.items():
        exact_C, near = _hashes(part), _near_pairs(part)
        if near is None:
            what = f"too many cells are too much alike in {name} for near-duplicates to be looked for"
            findings.append(Finding("near-duplicates", "", f"{what}; judge by fewer cells, or by more features"))
            near = np.empty((0, 2), np.int64)
        for fold in folds:
            findings += _duplicates(name, fold, exact_C, near)
    for fold in folds:
        findings += _groups(study, fold, settings)
        for check, used_C, how in (
            ("pretraining", pretrained_C, "trained on"),
            ("choice of checkpoint", chosen_by_C, "chosen, as the best of its run, by"),
        ):
            n_cells = 0 if used_C is None else int((used_C & fold.test_C).sum())
            if n_cells:
                said = f"the checkpoint was {how} {n_cells:,} of {int(fold.test_C.sum()):,} cells that judge it"
                findings.append(Finding(check, fold.name, f"{said}; hold out what it has not seen, or take another"))
    return findings


def refuse_leaks(findings: list[Finding]) -> None:
    """Stop where there is a finding.

    Raises:
        VerificationError: With all findings.
    """
    if findings:
        lines = [f"{one.check}{f' ({one.fold})' if one.fold else ''}: {one.message}" for one in findings[:20]]
        more = f"\n... and {len(findings) - 20} more" if len(findings) > 20 else ""
        raise VerificationError("the audit found leaks; no number is made:\n" + "\n".join(lines) + more)


def _selection(settings: FoldSettings, chosen: tuple[str, ...]) -> list[Finding]:
    if settings.selection == "none" and chosen:
        what = f"the snapshot holds chosen features of {', '.join(chosen)}, and nobody says by which cells"
        return [Finding("selection", "", f"{what}; say --set selection=train, or all")]
    if settings.selection != "all":
        return []
    return [Finding("selection", "", "features were chosen on all cells; choose them on training cells only")]


def _knowledge(settings: FoldSettings, knowledge: Sequence[tuple[str, str]]) -> list[Finding]:
    if not settings.knowledge_until:
        return []
    until, findings = date.fromisoformat(settings.knowledge_until), []
    for name, day in knowledge:
        if not day:
            how = "give its day (--set 'days={\"FILE\" = 2024-05-01}'; of a run: knowledge.days), or leave it out"
            findings.append(Finding("knowledge", "", f"nobody knows from when {name} is; {how}"))
        elif date.fromisoformat(day) > until:
            findings.append(Finding("knowledge", "", f"{name} is from {day}, after {until}; use an older release"))
    return findings


def _primary(study: Study, folds: list[Fold]) -> list[Finding]:
    if "is_primary_data" not in study.obs:
        return [Finding("primary", "", "obs has no is_primary_data: copies of cells cannot be told; add the column")]
    copy_C = ~study.obs["is_primary_data"].to_numpy(dtype=bool)
    used_C = np.any([fold.train_C | fold.test_C | fold.calibrate_C for fold in folds], axis=0)
    n_copies = int((copy_C & used_C).sum())
    if not n_copies:
        return []
    return [Finding("primary", "", f"{n_copies:,} cells are copies (is_primary_data is false); leave them out")]


def _groups(study: Study, fold: Fold, settings: FoldSettings) -> list[Finding]:
    value_C = study.label("perturbation" if settings.by == TARGET else settings.by)
    fitted_C = fold.train_C | fold.calibrate_C
    findings = []
    if (fold.test_C & fitted_C).any():
        findings.append(Finding("cells", fold.name, f"{int((fold.test_C & fitted_C).sum()):,} cells are on both sides"))
    if settings.where:
        return findings  # the group's other cells stay in training, as was asked for
    judged = {str(value) for value in value_C[fold.test_C]}
    learned = {str(value) for value in value_C[fitted_C]}
    if settings.by in (TARGET, "perturbation"):
        judged, learned = judged - {*UNPERTURBED}, learned - {*UNPERTURBED}
    if settings.by == TARGET:
        shared = {name for name in learned if set(fold.held) & set(name.split("+"))}
    else:
        shared = judged & learned
    if shared:
        findings.append(
            Finding("groups", fold.name, f"{settings.by} {', '.join(sorted(shared)[:5])} are on both sides")
        )
    return findings


def _duplicates(measurement: str, fold: Fold, exact_C: NDArray[np.uint64], near: NDArray[np.int64]) -> list[Finding]:
    fitted_C = fold.train_C | fold.calibrate_C
    filled_C = exact_C != 0
    same = np.isin(exact_C[fold.test_C & filled_C], exact_C[fitted_C & filled_C])
    findings = []
    if same.any():
        first = int(np.flatnonzero(fold.test_C & filled_C)[np.argmax(same)])
        findings.append(
            Finding(
                "duplicates",
                fold.name,
                f"{int(same.sum()):,} held-out cells have the very counts of {measurement} of a training cell, such as "
                f"row {first:,}; they are copies, or too shallow to be told apart: leave them out",
            )
        )
    one, other = near.T if len(near) else np.empty((2, 0), np.int64)
    crosses = (fold.test_C[one] & fitted_C[other]) | (fold.test_C[other] & fitted_C[one])
    if crosses.any():
        pair = near[np.argmax(crosses)]
        findings.append(
            Finding(
                "near-duplicates",
                fold.name,
                f"{int(crosses.sum()):,} pairs of a held-out and a training cell agree in {NEAR:.0%} of their counts "
                f"of {measurement}, such as rows {pair[0]:,} and {pair[1]:,}; leave one of each out",
            )
        )
    return findings


# ------------------------------------------------------------------------------------------------------ hashing
def _mixed(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """Hash integers, differently with each salt."""
    return hash_array(values ^ np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64))


def _pairs(counts_CG: csr_matrix) -> NDArray[np.uint64]:
    """Hash each non-zero's feature and count."""
    counts_CG.sum_duplicates()
    bits = counts_CG.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    return _mixed(bits | (counts_CG.indices.astype(np.uint64) << np.uint64(32)), 1)


def _hashes(counts_CG: csr_matrix) -> NDArray[np.uint64]:
    """Return a hash of each cell's counts; 0 of a cell without any."""
    total_N1 = np.concatenate([[np.uint64(0)], np.cumsum(_pairs(counts_CG), dtype=np.uint64)])
    with np.errstate(over="ignore"):
        return total_N1[counts_CG.indptr[1:]] - total_N1[counts_CG.indptr[:-1]]


def _near_pairs(counts_CG: csr_matrix) -> NDArray[np.int64] | None:
    """Return pairs of rows [P, 2] that agree to ``NEAR`` and are not equal (MinHash in bands; Broder 1997).

    Cells that share all least hashes of a band are compared, first by four bits of each of their hashes. None where so
    many cells are so much alike that this would take too long.
    """
    rows = np.flatnonzero(np.diff(counts_CG.indptr) >= FEWEST)
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    part = counts_CG[rows]
    pair_N, starts = _pairs(part), part.indptr[:-1]
    least_HC = np.stack([np.minimum.reduceat(_mixed(pair_N, salt + 2), starts) for salt in range(HASHES)])
    groups = [group for band in range(0, HASHES, BAND) for group in _alike(least_HC[band : band + BAND])]
    found = _candidates(groups, _packed(least_HC))
    if found is None:
        return None
    one_P, other_P = found
    whole_C = _hashes(part)
    near_P = whole_C[one_P] != whole_C[other_P]
    near_P[near_P] = _agree(part, pair_N, one_P[near_P], other_P[near_P])
    return rows[np.stack([one_P[near_P], other_P[near_P]], axis=1)]


def _alike(least_HC: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return the groups of two and more cells that share all these hashes, each ascending."""
    code_C = np.zeros(least_HC.shape[1], np.uint64)
    for salt, least_C in enumerate(least_HC):
        code_C = _mixed(code_C ^ least_C, salt)
    order = np.argsort(code_C, kind="stable")
    begins = np.flatnonzero(np.diff(code_C[order])) + 1
    begins, ends = np.append(0, begins), np.append(begins, len(order))
    return [order[begin:end] for begin, end in zip(begins, ends, strict=True) if end - begin > 1]


def _packed(least_HC: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return four bits of each cell's hashes, sixteen of them to a word [W, C]."""
    nibble_HC = (least_HC & np.uint64(15)) << (
        np.arange(HASHES, dtype=np.uint64)[:, None] % np.uint64(16) * np.uint64(4)
    )
    return np.stack([np.bitwise_or.reduce(nibble_HC[first : first + 16], axis=0) for first in range(0, HASHES, 16)])


def _candidates(
    groups: list[NDArray[np.int64]], packed_WC: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the pairs of cells of a group, each once, that share ``ALIKE`` hashes; None where there are too many."""
    if sum(len(group) ** 2 for group in groups) > 2 * COMPARED:
        return None
    n_cells, n_found, codes = packed_WC.shape[1], 0, [np.empty(0, np.int64)]
    for group in groups:
        rows = max(1, AT_ONCE // len(group))
        for first in range(0, len(group), rows):
            one_R, other_O = group[first : first + rows], group[first:]
            apart_RO = np.zeros((len(one_R), len(other_O)), np.uint8)
            for packed_C in packed_WC:
                bits = packed_C[one_R][:, None] ^ packed_C[other_O]
                bits |= bits >> np.uint64(2)
                bits |= bits >> np.uint64(1)
                apart_RO += np.bitwise_count(bits & np.uint64(0x1111111111111111))
            one, other = np.nonzero(np.triu(apart_RO <= HASHES - ALIKE, 1))
            codes.append(one_R[one] * n_cells + other_O[other])
            n_found += len(one)
            if n_found > CANDIDATES:
                return None
    one_P, other_P = np.divmod(np.unique(np.concatenate(codes)), n_cells)
    return one_P, other_P


def _agree(
    part: csr_matrix, pair_N: NDArray[np.uint64], one_P: NDArray[np.int64], other_P: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Say which pairs of rows agree to ``NEAR``, given a hash of each non-zero's feature and count."""
    length_C, agree_P = np.diff(part.indptr), np.zeros(len(one_P), bool)
    keys = csr_matrix(((pair_N >> np.uint64(1)).astype(np.int64) | 1, part.indices, part.indptr), shape=part.shape)
    for first in range(0, len(one_P), 1024):
        one, other = one_P[first : first + 1024], other_P[first : first + 1024]
        here, there = keys[one], keys[other]
        same = np.diff(here.maximum(there).indptr) - np.diff((here - there).indptr)  # features of either, less others
        agree_P[first : first + 1024] = same >= NEAR * (length_C[one] + length_C[other] - same)
    return agree_P
