"""This module is what loops do to sixteen values at a time, in words of LLVM that numba has none for.

Where the processor has AVX-512 (``WIDE``), values that pass a border are put side by side by one instruction, and
numbers below 32 are looked up in registers. Rows that nobody reads before they have left the caches are written around
them, on any processor. ``train.kernels`` keeps what it compiles on disk and looks at its own file alone: touch that one
when this one is changed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Arrays that :func:`compact` and :func:`look_up` append to have room for so many values more."""
SMALL = 32
"""Numbers below this are looked up."""
LINE = 64
"""Bytes to which rows begin that are written around the caches."""
WIDE = (
    numba.config.CPU_NAME is None
    and binding.llvm_version_info >= (20,)
    and bool(binding.get_host_cpu_features().get("avx512f"))
)

I32, I64, BIT = ir.IntType(32), ir.IntType(64), ir.IntType(1)
WORDS, NUMBERS, BITS = (ir.VectorType(kind, LANES) for kind in (I32, ir.FloatType(), BIT))


class _Lanes:
    """Writes what an intrinsic's arguments need: arrays by their place among them."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def _place(self, array: int, index: Any) -> Any:
        made = self.context.make_array(self.signature.args[array])(self.context, self.builder, self.args[array])
        return self.builder.gep(made.data, [index])

    def load(self, array: int, index: Any, kind: Any = None) -> Any:
        """Return sixteen values from an array, whole numbers as 32 bits."""
        item = self.context.get_data_type(self.signature.args[array].dtype)
        place = self.builder.bitcast(self._place(array, index), ir.VectorType(kind or item, LANES).as_pointer())
        found = self.builder.load(place)
        found.align = self.context.get_abi_sizeof(item)
        narrow = isinstance(item, ir.IntType) and item.width < I32.width
        return self.builder.zext(found, WORDS) if narrow else found

    def store(self, values: Any, array: int, index: Any) -> Any:
        """Write sixteen values of 32 bits into an array."""
        place = self.builder.bitcast(self._place(array, index), values.type.as_pointer())
        written = self.builder.store(values, place)
        written.align = 4
        return written

    def all(self, value: Any) -> Any:
        """Return a number of 32 bits sixteen times."""
        nothing = ir.Constant(WORDS, ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(WORDS, [0] * LANES))

    def compress(self, values: Any, chosen: Any) -> Any:
        """Put the chosen values side by side."""
        kind = ir.FunctionType(WORDS, [WORDS, BITS, WORDS])
        name = f"llvm.experimental.vector.compress.v{LANES}i32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [values, chosen, ir.Constant(WORDS, ir.Undefined)])

    def count(self, chosen: Any) -> Any:
        """Say how many are chosen."""
        return self.builder.zext(self.builder.ctpop(self.builder.bitcast(chosen, ir.IntType(LANES))), I64)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _compact_lanes(
    typing: Any, draws: Any, feature: Any, count: Any, i: Any, lowest: Any, offset: Any, to: Any, count_to: Any, n: Any
) -> Any:
    """Do sixteen steps of :func:`compact`, from the ``i``-th, where ``n`` are kept so far; return how many then are."""
    signature = types.int64(draws, feature, count, types.int64, types.uint32, types.int32, to, count_to, types.int64)

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _Lanes(context, builder, signature, args)
        i, lowest, offset, n = args[3], args[4], args[5], args[8]
        chosen = builder.icmp_unsigned(">=", lanes.load(0, i), lanes.all(lowest))
        numbers = builder.add(lanes.load(1, i), lanes.all(offset))
        lanes.store(lanes.compress(numbers, chosen), 6, n)
        lanes.store(lanes.compress(lanes.load(2, i), chosen), 7, n)
        return builder.add(n, lanes.count(chosen))

    return signature, write


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _look_up_lanes(typing: Any, count: Any, i: Any, table: Any, value: Any, large: Any, n: Any) -> Any:
    """Do sixteen steps of :func:`look_up`, from the ``i``-th, where ``n`` were large so far; say how many then are."""
    signature = types.int64(count, types.int64, table, value, large, types.int64)

    def write(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _Lanes(context, builder, signature, args)
        i, n = args[1], args[5]
        counts = lanes.load(0, i)
        within = builder.and_(counts, ir.Constant(WORDS, [LANES - 1] * LANES))
        halves = []
        for half in range(2):
            half_table, found = lanes.load(2, ir.Constant(I64, LANES * half)), ir.Constant(NUMBERS, ir.Undefined)
            for lane in (ir.Constant(I32, number) for number in range(LANES)):  # LLVM makes one permutation of it
                one = builder.extract_element(half_table, builder.extract_element(within, lane))
                found = builder.insert_element(found, one, lane)
            halves.append(found)
        upper = builder.icmp_unsigned(">=", counts, ir.Constant(WORDS, [LANES] * LANES))
        lanes.store(builder.select(upper, halves[1], halves[0]), 3, i)
        beyond = builder.icmp_unsigned(">=", counts, ir.Constant(WORDS, [SMALL] * LANES))
        places = builder.add(lanes.all(builder.trunc(i, I32)), ir.Constant(WORDS, list(range(LANES))))
        lanes.store(lanes.compress(places, beyond), 4, n)
        return builder.add(n, lanes.count(beyond))

    return signature, write


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _store_around(typing: Any, row: Any, i: Any, out: Any, to: Any) -> Any:
    """Write sixteen values of 32 bits of ``row``, from the ``i``-th, into ``out`` around the caches."""
    signature = types.void(row, types.int64, out, types.int64)

    def write(context: Any, builder: Any, signature: Any, args: Any) -> None:
        lanes = _Lanes(context, builder, signature, args)
        written = lanes.store(lanes.load(0, args[1], I32), 2, args[3])
        written.align = LINE
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

    return signature, write


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def wait_for_stores(typing: Any) -> Any:
    """Let what was written around the caches be there before anything that is written from here on."""

    def write(context: Any, builder: Any, signature: Any, args: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), write


part = numba.njit(error_model="numpy")
"""Compiles what loops have in common. Not ``inline="always"``: arrays that are handed on would then be counted
atomically for each cell, which waits for what is being written around the caches."""


@part
def compact(draws: Any, feature: Any, count: Any, n: int, lowest: Any, offset: int, to: Any, count_to: Any) -> Any:
    """Write the features, plus ``offset``, and counts of those of ``n`` whose draws reach ``lowest``; say how many."""
    kept, whole = np.int64(0), n // LANES * LANES
    for i in range(0, whole, LANES):
        kept = _compact_lanes(
            draws, feature, count, np.int64(i), np.uint32(lowest), np.int32(offset), to, count_to, kept
        )
    for i in range(whole, n):
        to[kept] = np.int32(feature[i]) + np.int32(offset)
        count_to[kept] = count[i]
        kept += np.int64(draws[i] >= lowest)
    return kept


@part
def look_up(count: Any, n: int, table: Any, value: Any, large: Any) -> Any:
    """Write the table's value of each of ``n`` counts below ``SMALL``; note where the others are, and how many."""
    n_large, whole = np.int64(0), n // LANES * LANES
    for i in range(0, whole, LANES):
        n_large = _look_up_lanes(count, np.int64(i), table, value, large, n_large)
    for i in range(whole, n):
        value[i] = table[np.int64(count[i]) & np.int64(SMALL - 1)]
        large[n_large] = i
        n_large += np.int64(count[i] >= SMALL)
    return n_large


@part
def put_row(row: Any, kept: int, out: Any, around: bool) -> None:
    """Write the first ``kept`` values of a row, and zeros behind; ``around`` the caches if ``out`` is whole lines.

    Args:
        row: 32 bits each, with room for ``LANES`` more, which are overwritten.
        kept: How many.
        out: Answer.
        around: Its length is a multiple of ``LANES``, and it begins with a line.
    """
    for i in range(kept, kept + LANES):
        row[i] = 0
    whole = min(kept + LANES - 1, len(out)) // LANES * LANES if around else 0
    for i in range(0, whole, LANES):
        _store_around(row, np.int64(i), out, np.int64(i))
    for i in range(whole, len(out) if around else 0, LANES):
        _store_around(row, np.int64(kept), out, np.int64(i))  # the zeros
    for i in range(0 if around else kept):
        out[i] = row[i]
    for i in range(len(out) if around else kept, len(out)):
        out[i] = 0
