"""This module is the inner loops of the stream on CPU: rows gathered and cells written as tokens, compiled by numba.

``train.tokens`` says what tokens are and does the same in torch on any device; here is only the fast way. Loops have no
branch that data decides and no division, so that the compiler makes vector instructions of most. All release the GIL.

Shape letters used in this module:
    C  cells      L  tokens of a cell, padded      M  measurements      N  non-zeros
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from train.lanes import LANES, LINE, SMALL, WIDE, compact, look_up, part, put_row, wait_for_stores

U32 = np.uint32
GUESSES = 16
"""Guesses of a border before it is found byte by byte; evenly spread draws take four or five, 1 cell in 700 more."""
TABLE = 256
"""Counts below this have their bin from a table that is made once for each cell, and their logarithm if that pays."""
AROUND_BYTES = 2**22
"""Tokens of this many bytes are written around the caches, which do not hold them until they are read."""


def compiled(function: Any) -> Any:
    """Compile a loop that releases the GIL; the result is kept on disk where a cache can be written."""
    words = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **words)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder
        return numba.njit(**words)(function)


@part
def _longest(lengths_C: Any) -> Any:
    """Return the greatest of some lengths, and at least 1."""
    longest = 1
    for cell in range(len(lengths_C)):
        longest = max(longest, lengths_C[cell])
    return longest


@part
def draw_of(feature: Any, key: Any) -> Any:
    """Hash a feature's number and a cell's key to 32 bits; the constants are Wellons's (2018, lowbias32)."""
    # numba's products of 32 bits have 64: each is cut back
    x = U32(U32(feature) * U32(0x9E3779B1)) ^ U32(key)
    x = U32(x ^ (x >> U32(16)))
    x = U32(x * U32(0x7FEB352D))
    x = U32(x ^ (x >> U32(15)))
    x = U32(x * U32(0x846CA68B))
    return U32(x ^ (x >> U32(16)))


@part
def _border(draws: Any, n: int, low: Any, below: Any, dropped: Any) -> Any:
    """Return a number that ``dropped`` of the draws are smaller than; -1 when none is found in a few guesses.

    Draws are spread evenly, so that their number below any border is nearly known: each guess is counted, which vector
    instructions do, and the next lies between the nearest two by their counts. ``below`` draws are less than ``low``.
    """
    high, above = np.int64(1 << 32), np.int64(n)
    for guesses in range(GUESSES):
        if high - low < 2:
            break
        border = low + (high - low) * (dropped - below) // (above - below)
        if guesses >= GUESSES // 2:
            border = (low + high) // 2
        border = min(max(border, low + 1), high - 1)
        under = U32(0)
        for i in range(n):
            under = U32(under + U32(draws[i] < U32(border)))
        if under == dropped:
            return border
        if under < dropped:
            low, below = border, np.int64(under)
        else:
            high, above = border, np.int64(under)
    return np.int64(-1)


@part
def _lowest_kept(draws: Any, n: int, low: Any, most: Any, budget: int, even: bool, hist: Any) -> Any:
    """Return a border that the ``budget`` greatest draws reach, or ``low`` when no more than those reach it.

    Also say whether another draw, which is not among them, reaches it too. None is above ``most``; ``even`` says that
    they are spread evenly.
    """
    reach = 0
    for i in range(n):
        reach += draws[i] >= low
    if reach <= budget:
        return low, False
    if even:
        border = _border(draws, n, np.int64(low), np.int64(n - reach), np.int64(n - budget))
        if border >= 0:
            return U32(border), False
    # byte by byte: where the border's is, among those whose bytes before are the border's
    need, lowest, known, bucket = budget, U32(0), U32(0), 0
    for shift in (U32(24), U32(16), U32(8), U32(0)):
        if most >> shift == 0:
            known = U32(known | U32(U32(255) << shift))
            continue
        hist[:] = 0
        for i in range(n):
            hist[(draws[i] >> shift) & U32(255)] += U32(draws[i] & known) == lowest
        bucket = 255
        while hist[bucket] < need:
            need -= hist[bucket]
            bucket -= 1
        lowest = U32(lowest | U32(U32(bucket) << shift))
        known = U32(known | U32(U32(255) << shift))
    return lowest, hist[bucket] > need


@part
def _choose(draws: Any, n: int, lowest: Any, budget: int, keep: Any) -> int:
    """Note which draws reach ``lowest``; of those that tie with it, the first, so that it is ``budget`` at most."""
    kept = 0
    for i in range(n):
        keep[kept] = i
        kept += draws[i] >= lowest
    if kept <= budget:
        return kept
    above = 0
    for i in range(n):
        above += draws[i] > lowest
    ties, kept = budget - above, 0
    for i in range(n):
        keep[kept] = i
        tie = draws[i] == lowest
        kept += (draws[i] > lowest) | (tie & (ties > 0))
        ties -= tie
    return kept


@part
def _log1p(number: Any, factor: Any) -> Any:
    """Return log1p(number * factor) as ``train.tokens.log1p`` does: the product is single, its logarithm double."""
    return np.float32(np.log1p(np.float64(np.float32(number) * factor)))


@part
def _tabulate(table: Any, first: int, stop: int, factor: Any) -> None:
    """Write log1p(number * factor) of the numbers from ``first`` to behind the last."""
    for number in range(first, stop):
        table[number] = _log1p(number, factor)


@part
def _log1p_plain(count: Any, n: int, most: int, factor: Any, table: Any, value: Any, large: Any) -> None:
    """Write log1p(count * factor) for each of ``n`` counts, none above ``most``."""
    _tabulate(table, 0, min(TABLE, most + 1), factor)
    for i in range(n):
        value[i] = table[min(np.int64(count[i]), np.int64(TABLE - 1))]
    for i in range(n if most >= TABLE else 0):
        if count[i] >= TABLE:
            value[i] = _log1p(count[i], factor)


@part
def _log1p_wide(count: Any, n: int, most: int, factor: Any, table: Any, value: Any, large: Any) -> None:
    """Do what :func:`_log1p_plain` does; large counts are few in most cells."""
    made = min(SMALL, most + 1)
    _tabulate(table, 0, made, factor)
    n_large = look_up(count, n, table, value, large)
    if n_large > TABLE:
        _tabulate(table, SMALL, TABLE, factor)
        made = TABLE
    for j in range(n_large):
        whole = count[large[j]]
        value[large[j]] = table[whole] if whole < made else _log1p(whole, factor)


@part
def _keep_plain(
    draws: Any, feature: Any, count: Any, n: int, lowest: Any, offset: int, most: int, factor: Any, room: Any
) -> Any:
    """Write the tokens of those of ``n`` features whose draws reach ``lowest`` into ``room``; return how many."""
    number, whole, log, table, _ = room
    _tabulate(table, 0, min(TABLE, most + 1), factor)
    kept = np.uintp(0)
    for i in range(n):
        number[kept] = np.int32(feature[i]) + np.int32(offset)
        log[kept] = table[min(np.int64(count[i]), np.int64(TABLE - 1))]
        kept += np.uintp(draws[i] >= lowest)
    if most >= TABLE:
        kept = np.uintp(0)
        for i in range(n):
            whole[kept] = count[i]
            kept += np.uintp(draws[i] >= lowest)
        for j in range(kept):
            if whole[j] >= TABLE:
                log[j] = _log1p(whole[j], factor)
    return np.int64(kept)


@part
def _keep_wide(
    draws: Any, feature: Any, count: Any, n: int, lowest: Any, offset: int, most: int, factor: Any, room: Any
) -> Any:
    """Do what :func:`_keep_plain` does."""
    number, whole, log, table, large = room
    kept = compact(draws, feature, count, n, lowest, offset, number, whole)
    _log1p_wide(whole, kept, most, factor, table, log, large)
    return kept


_log1p_of, _keep = (_log1p_wide, _keep_wide) if WIDE else (_log1p_plain, _keep_plain)


@part
def _goes_around(feature_CL: Any, value_CL: Any) -> bool:
    """Say whether tokens are many, and rows whole lines of memory, so that they are written around the caches."""
    around = 2 * feature_CL.nbytes >= AROUND_BYTES and feature_CL.shape[1] % LANES == 0
    return around and feature_CL.ctypes.data % LINE == 0 and value_CL.ctypes.data % LINE == 0


@compiled
def tokens_of_one(  # noqa: C901  stages of one loop; each is short
    starts_C: Any,
    lengths_C: Any,
    features_N: Any,
    counts_N: Any,
    keys_C: Any,
    hide_C: Any,
    by_chance: bool,
    offset: int,
    scale: Any,
    place_C: Any,
    feature_CL: Any,
    value_CL: Any,
    width_C: Any,
    depth_C: Any,
) -> None:
    """Write cells of one measurement of whole counts as tokens, in the order of their features.

    Args:
        starts_C: Where a cell's non-zeros begin.
        lengths_C: How many they are.
        features_N: Features, uint16 or uint32.
        counts_N: Counts, unsigned.
        keys_C: uint32 from which a cell's chances come.
        hide_C: Draws below are hidden, uint32.
        by_chance: Choose by draws; else the greatest counts are chosen.
        offset: Added to features.
        scale: Values are log1p of counts per this many.
        place_C: The row of each cell in the answer.
        feature_CL: Answer, int32, 0 where padded; as wide as the budget.
        value_CL: Answer, float32.
        width_C: Answer: tokens of each cell.
        depth_C: Answer: sum of each cell's counts, float32.
    """
    longest = _longest(lengths_C)
    draws = np.empty(longest, np.uint32)
    keep, large = np.empty(longest + 1, np.int32), np.empty(longest + LANES, np.int32)
    hist, table = np.empty(256, np.int32), np.zeros(TABLE, np.float32)
    # a cell's tokens, before they go where they belong
    number, whole = np.empty(longest + LANES, np.int32), np.empty(longest + LANES, np.uint32)
    log = np.empty(longest + LANES, np.float32)
    room = number, whole, log, table, large
    budget = feature_CL.shape[1]
    around = _goes_around(feature_CL, value_CL)
    for cell in range(len(lengths_C)):
        start, n, key = starts_C[cell], lengths_C[cell], keys_C[cell]
        feature, count = features_N[start : start + n], counts_N[start : start + n]
        depth, most = np.int64(0), U32(0)
        for i in range(n):
            depth += np.int64(count[i])
            most = max(most, U32(count[i]))
        row = place_C[cell]
        depth_C[row] = depth
        factor = np.float32(scale) / np.float32(max(depth, np.int64(1)))
        kept, tied = np.int64(n), False
        every = n <= budget and (not by_chance or hide_C[cell] == 0)
        if every:
            for j in range(n):
                number[j] = np.int32(feature[j]) + np.int32(offset)
            _log1p_of(count, n, np.int64(most), factor, table, log, large)
        elif by_chance:
            for i in range(n):
                draws[i] = draw_of(U32(U32(feature[i]) + U32(offset)), key)
            lowest, tied = _lowest_kept(draws, n, hide_C[cell], U32(0xFFFFFFFF), budget, True, hist)
        else:
            for i in range(n):
                draws[i] = U32(count[i])
            lowest, tied = _lowest_kept(draws, n, U32(0), most, budget, False, hist)
        if tied:
            kept = np.int64(_choose(draws, n, lowest, budget, keep))
            for j in range(kept):
                number[j] = np.int32(feature[keep[j]]) + np.int32(offset)
            for j in range(kept):
                whole[j] = count[keep[j]]
            _log1p_of(whole, kept, np.int64(most), factor, table, log, large)
        elif not every:
            kept = _keep(draws, feature, count, n, lowest, offset, np.int64(most), factor, room)
        put_row(number, kept, feature_CL[row], around)
        put_row(log, kept, value_CL[row], around)
        width_C[row] = kept
    if around:
        wait_for_stores()


@part
def _bins_of(count: Any, n: int, largest: int, bins: int, below: Any, large: Any, table: Any, value: Any) -> None:
    """Write 1 + floor(bins * share of the counts that are smaller) for each of ``n`` counts."""
    below[:] = 0
    for i in range(n):
        below[min(np.int64(count[i]), np.int64(TABLE - 1)) + 1] += 1
    for number in range(min(TABLE, largest + 1)):
        below[number + 1] += below[number]
        table[number] = np.float32(1 + bins * below[number] // max(n, 1))
    for i in range(n):
        value[i] = table[min(np.int64(count[i]), np.int64(TABLE - 1))]
    if largest < TABLE:
        return
    n_large = 0
    for i in range(n):
        large[n_large] = count[i]
        n_large += count[i] >= TABLE - 1
    ascending = np.sort(large[:n_large])
    for i in range(n):
        if count[i] >= TABLE - 1:
            smaller = below[TABLE - 1] + np.searchsorted(ascending, U32(count[i]))
            value[i] = np.float32(1 + bins * smaller // n)


LOG1P, BINS, RANK, COUNT = 0, 1, 2, 3
"""Kinds of values; ``COUNT`` ranks by counts themselves, whose order is that of shares in one measurement."""


@compiled
def candidates(  # noqa: C901  stages of one loop; each is short
    starts_C: Any,
    lengths_C: Any,
    features_N: Any,
    counts_N: Any,
    keys_C: Any,
    hide_C: Any,
    by_chance: bool,
    offset: int,
    scale: Any,
    kind: int,
    bins: int,
    factors: Any,
    place_C: Any,
    fill_C: Any,
    feature_K: Any,
    value_K: Any,
    priority_K: Any,
    depth_C: Any,
) -> None:
    """Append the visible non-zeros of one measurement of whole counts to their cells' candidates for tokens.

    Args:
        starts_C: Where a cell's non-zeros begin.
        lengths_C: How many they are.
        features_N: Features, uint16 or uint32.
        counts_N: Counts, unsigned.
        keys_C: uint32 from which a cell's chances come.
        hide_C: Draws below are hidden, uint32.
        by_chance: Hide by draws and, but for ranks, let draws decide what is kept; else the greatest shares are kept.
        offset: Added to features.
        scale: Shares are counts per this many.
        kind: ``LOG1P``, ``BINS``, ``RANK`` or ``COUNT``.
        bins: Bins of a cell.
        factors: For ranks: what shares are divided by, by feature with offset, float32; of length 0 for ones.
        place_C: The place of each cell in the batch.
        fill_C: Where the next candidate of each place goes; moved on.
        feature_K: Answer, int32.
        value_K: Answer, float32.
        priority_K: Answer, uint32: the greatest are kept.
        depth_C: Answer: sum of each place's counts, float32.
    """
    longest = _longest(lengths_C)
    share, value = np.empty(longest, np.float32), np.empty(longest, np.float32)
    bits = share.view(np.uint32)  # of numbers that are not negative the bits have the same order
    draws, large = np.empty(longest, np.uint32), np.empty(longest + 1, np.uint32)
    below, table, places = (
        np.empty(TABLE + 1, np.int64),
        np.zeros(TABLE, np.float32),
        np.empty(longest + LANES, np.int32),
    )
    value[:] = 0
    value_bits = value.view(np.uint32)
    # what is seen of a cell, before it goes where it belongs: _reach writes more than that
    number, number_seen = np.empty(longest, np.int32), np.empty(longest + LANES, np.int32)
    value_seen = np.empty(longest + LANES, np.uint32)
    value_seen_log = value_seen.view(np.float32)
    for cell in range(len(lengths_C)):
        start, n, key, row = starts_C[cell], lengths_C[cell], keys_C[cell], place_C[cell]
        feature, count = features_N[start : start + n], counts_N[start : start + n]
        depth, most = np.int64(0), U32(0)
        for i in range(n):
            depth += np.int64(count[i])
            most = max(most, U32(count[i]))
        largest = np.int64(most)
        depth_C[row] = depth
        factor = np.float32(scale) / np.float32(max(depth, np.int64(1)))
        if kind == COUNT:
            for i in range(n):
                bits[i] = U32(count[i])
        else:
            for i in range(n):
                share[i] = np.float32(count[i]) * factor
        if kind == BINS:
            _bins_of(count, n, largest, bins, below, large, table, value)
        elif kind == LOG1P:
            _log1p_of(count, n, largest, factor, table, value, places)
        elif kind == RANK and len(factors) > 0:
            for i in range(n):
                share[i] /= factors[np.int64(feature[i]) + offset]
        low = hide_C[cell] if by_chance else U32(0)
        by_draw = by_chance and kind < RANK
        if by_draw or low > 0:
            for i in range(n):
                draws[i] = draw_of(U32(U32(feature[i]) + U32(offset)), key)
        priority = draws if by_draw else bits
        fill = fill_C[row]
        feature_out, value_out, priority_out = feature_K[fill:], value_K[fill:], priority_K[fill:]
        if low == 0:
            for i in range(n):
                feature_out[i] = np.int32(feature[i]) + np.int32(offset)
            for i in range(n):
                value_out[i] = value[i]
            for i in range(n):
                priority_out[i] = priority[i]
            fill_C[row] = fill + n
        else:
            for i in range(n):
                number[i] = np.int32(feature[i]) + np.int32(offset)
            seen = _reach(draws, number, value_bits, n, low, number_seen, value_seen)
            for i in range(seen):
                feature_out[i] = number_seen[i]
            for i in range(seen):
                value_out[i] = value_seen_log[i]
            _reach(draws, number, priority, n, low, number_seen, value_seen)
            for i in range(seen):
                priority_out[i] = value_seen[i]
            fill_C[row] = fill + seen


DIGIT_BITS = 11
"""Bits that a pass of the sort by priority looks at, at most, of those in which priorities differ."""


@part
def _by_priority(priority: Any, n: int, keep: Any, pairs: Any, spare: Any, hist: Any) -> None:
    """Write the indices of ``n`` priorities, greatest first, equal ones as they are: a radix sort.

    Priority and index travel in one word.
    """
    lowest, highest = U32(0xFFFFFFFF), U32(0)
    for j in range(n):
        lowest, highest = min(lowest, priority[j]), max(highest, priority[j])
    bits = 1
    while bits < 32 and (np.uint64(highest) - np.uint64(min(lowest, highest))) >> np.uint64(bits):
        bits += 1
    digits = (bits + DIGIT_BITS - 1) // DIGIT_BITS
    width = np.uint64((bits + digits - 1) // digits)
    size = 1 << np.int64(width)
    mask = np.uint64(size - 1)
    for j in range(n):
        pairs[j] = ((np.uint64(highest) - np.uint64(priority[j])) << np.uint64(32)) | np.uint64(j)
    ordered, free = pairs, spare
    for digit in range(digits):
        shift = np.uint64(32) + np.uint64(digit) * width
        hist[:size] = 0
        for j in range(n):
            hist[(ordered[j] >> shift) & mask] += 1
        place = 0
        for number in range(size):
            held = hist[number]
            hist[number] = place
            place += held
        for j in range(n):
            number = (ordered[j] >> shift) & mask
            free[hist[number]] = ordered[j]
            hist[number] += 1
        ordered, free = free, ordered
    for j in range(n):
        keep[j] = ordered[j] & np.uint64(0xFFFFFFFF)


@part
def _reach_plain(priority: Any, feature: Any, value: Any, n: int, lowest: Any, number: Any, bits: Any) -> Any:
    """Write those of ``n`` features whose priorities reach ``lowest``, and their values' bits; return how many."""
    kept = np.uintp(0)
    for i in range(n):
        number[kept] = feature[i]
        bits[kept] = value[i]
        kept += np.uintp(priority[i] >= lowest)
    return np.int64(kept)


@part
def _reach_wide(priority: Any, feature: Any, value: Any, n: int, lowest: Any, number: Any, bits: Any) -> Any:
    """Do what :func:`_reach_plain` does."""
    return compact(priority, feature, value, n, lowest, 0, number, bits)


_reach = _reach_wide if WIDE else _reach_plain


@compiled
def choose_tokens(
    first_C: Any,
    fill_C: Any,
    feature_K: Any,
    value_K: Any,
    priority_K: Any,
    by_chance: bool,
    ranked: bool,
    tokens: Any,
) -> None:
    """Keep each cell's candidates of highest priority, ties to the earlier one, in their order or by rank.

    Args:
        first_C: Where each cell's candidates begin.
        fill_C: Where they end.
        feature_K: int32.
        value_K: float32.
        priority_K: uint32.
        by_chance: Priorities are draws.
        ranked: Order them by priority, and let the value be the place.
        tokens: Answer: feature_CL (int32, 0 where padded; as wide as the budget), value_CL (float32), width_C.
    """
    feature_CL, value_CL, width_C = tokens
    budget, longest = feature_CL.shape[1], _longest(fill_C - first_C)
    keep, hist = np.empty(longest + 1, np.int32), np.empty(1 << DIGIT_BITS, np.int32)
    pairs, spare = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    # a cell's tokens, before they go where they belong
    number, log = np.empty(longest + LANES, np.int32), np.empty(longest + LANES, np.float32)
    bits, value_bits_K = log.view(np.uint32), value_K.view(np.uint32)
    around = _goes_around(feature_CL, value_CL)
    for cell in range(len(first_C)):
        first, n = first_C[cell], fill_C[cell] - first_C[cell]
        feature, value = feature_K[first : first + n], value_bits_K[first : first + n]
        priority = priority_K[first : first + n]
        kept = np.int64(min(n, budget))
        if ranked:
            _by_priority(priority, n, keep, pairs, spare, hist)
            for j in range(kept):
                number[j] = feature[keep[j]]
            for j in range(kept):
                log[j] = np.float32(j)
        elif n > budget:
            lowest, tied = _lowest_kept(priority, n, U32(0), U32(0xFFFFFFFF), budget, by_chance, hist[:256])
            if tied:
                kept = np.int64(_choose(priority, n, lowest, budget, keep))
                for j in range(kept):
                    number[j] = feature[keep[j]]
                    bits[j] = value[keep[j]]
            else:
                kept = _reach(priority, feature, value, n, lowest, number, bits)
        else:
            for j in range(n):
                number[j] = feature[j]
            for j in range(n):
                bits[j] = value[j]
        put_row(number, kept, feature_CL[cell], around)
        put_row(log, kept, value_CL[cell], around)
        width_C[cell] = kept
    if around:
        wait_for_stores()


@compiled
def gather(
    starts_C: Any, lengths_C: Any, features_N: Any, counts_N: Any, to_C: Any, features_out: Any, counts_out: Any
) -> None:
    """Copy cells' non-zeros to where ``to_C`` says."""
    for cell in range(len(lengths_C)):
        start, n, to = starts_C[cell], lengths_C[cell], to_C[cell]
        feature, count = features_N[start : start + n], counts_N[start : start + n]
        feature_out, count_out = features_out[to : to + n], counts_out[to : to + n]
        for i in range(n):  # a slice that is assigned takes numba 2.5 times as long
            feature_out[i] = feature[i]
        for i in range(n):
            count_out[i] = count[i]
