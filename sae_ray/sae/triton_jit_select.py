"""Triton kernel bodies of the exact selections; see `triton_selection` for how they fit together.

Values are compared by their float32 bit patterns: positive floats sort like integers, everything else counts as
0 and is never selected. bfloat16 and float16 widen exactly. "GATHER" kernels look only at chosen groups of GROUP
neighbouring latents instead of whole rows. No atomics: a histogram is one row per program, summed by the caller.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits(x):
    """0 for everything that is not positive, else an integer that sorts like the float."""
    return tl.maximum(x.to(tl.float32).to(tl.int32, bitcast=True), 0)


@triton.jit
def group_max(
    values,
    bias_m,
    out,
    m,
    n_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """`out[row, g]` = the largest of the row's GROUP values of group g. BIAS: adds the bias in place first."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(values + row * m + col, mask=col < m, other=-float("inf"))
    if BIAS:
        bias = tl.load(bias_m + col, mask=col < m, other=0.0)
        x = (x.to(tl.float32) + bias.to(tl.float32)).to(values.dtype.element_ty)
        tl.store(values + row * m + col, x, mask=col < m)
    largest = tl.max(x.to(tl.float32), 1)
    tl.store(out + row * n_groups + group, largest.to(out.dtype.element_ty), mask=group < n_groups)


@triton.jit
def row_topk(
    values,
    group_Bk,
    col_Bk,
    value_Bk,
    width,
    K,
    LOW_BIT: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    PAD_K: tl.constexpr,
):
    """The K largest positive values of a row in order of column, ties by column; -1 and 0 where fewer are positive.

    The whole row (or its K chosen groups) lies in registers; the K-th value is found bit by bit from the top.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    if GATHER:
        which = slot // GROUP
        group = tl.load(group_Bk + row * K + which, mask=which < K, other=-1).to(tl.int32)
        col = group * GROUP + slot % GROUP
        exists = (group >= 0) & (col < width)
    else:
        col = slot
        exists = slot < width
    x = tl.load(values + row * width + col, mask=exists, other=0.0)
    bits = _bits(x)
    cut = 0
    for step in range(31 - LOW_BIT):
        higher = cut + (1 << (30 - step))
        count = tl.sum((bits >= higher).to(tl.int32), 0)
        cut = tl.where(count >= K, higher, cut)
    tie = (bits == cut) & (bits > 0)
    need = K - tl.sum((bits > cut).to(tl.int32), 0)
    keep = (bits > cut) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= need))
    at = row * K + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(col_Bk + at, col.to(col_Bk.dtype.element_ty), mask=keep)
    tl.store(value_Bk + at, x.to(value_Bk.dtype.element_ty), mask=keep)
    rest = tl.arange(0, PAD_K)
    empty = (rest >= tl.sum(keep.to(tl.int32), 0)) & (rest < K)
    tl.store(col_Bk + row * K + rest, tl.full([PAD_K], -1, tl.int32).to(col_Bk.dtype.element_ty), mask=empty)
    tl.store(value_Bk + row * K + rest, tl.zeros([PAD_K], tl.float32).to(value_Bk.dtype.element_ty), mask=empty)


@triton.jit
def digit_histogram(
    values,
    row_C,
    group_C,
    chosen,
    state,
    out,
    size,
    width,
    SHIFT: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """Counts the next eight bits of the positive values whose higher bits equal those found so far."""
    program = tl.program_id(0)
    prefix = tl.load(state).to(tl.int32)
    counts = tl.zeros([256], tl.int32)
    for step in range(REPEATS):
        slot = (program.to(tl.int64) * REPEATS + step) * BLOCK + tl.arange(0, BLOCK)
        if GATHER:
            which = slot // GROUP
            exists = which < tl.minimum(tl.load(chosen), size)
            row = tl.load(row_C + which, mask=exists, other=0).to(tl.int64)
            col = tl.load(group_C + which, mask=exists, other=0).to(tl.int64) * GROUP + slot % GROUP
            exists = exists & (col < width)
            x = tl.load(values + row * width + col, mask=exists, other=0.0)
        else:
            x = tl.load(values + slot, mask=slot < size, other=0.0)
        bits = _bits(x)
        counted = bits > 0
        if SHIFT < 24:
            counted = counted & ((bits >> (SHIFT + 8)) == (prefix >> (SHIFT + 8)))
        counts += tl.histogram((bits >> SHIFT) & 255, 256, mask=counted)
    tl.store(out + program.to(tl.int64) * 256 + tl.arange(0, 256), counts)


@triton.jit
def pick_digit(histogram, state, SHIFT: tl.constexpr):
    """Extends `state` = (bits found so far, how many values are still to be placed at or below them)."""
    digit = tl.arange(0, 256)
    count = tl.load(histogram + digit).to(tl.int64)
    at_or_above = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    need = tl.load(state + 1)
    chosen = tl.max(tl.where(at_or_above >= need, digit, 0), 0)
    above = tl.sum(tl.where(digit > chosen, count, 0), 0)
    tl.store(state, tl.load(state) + (chosen.to(tl.int64) << SHIFT))
    tl.store(state + 1, need - above)


@triton.jit
def count_rows(
    values,
    start_B1,
    group_C,
    cut,
    above_B,
    tie_B,
    width,
    MODE: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of each row above the cut, and at it. MODE as in `_passes`."""
    row = tl.program_id(0).to(tl.int64)
    first, last = _slots(start_B1, row, width, GATHER, GROUP)
    above = tl.zeros([BLOCK], tl.int32)
    tie = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        col, exists = _columns(group_C, start, last, width, GATHER, GROUP, BLOCK)
        x = tl.load(values + row * width + col, mask=exists, other=0.0)
        is_above, is_tie = _passes(x, cut, col, exists, MODE)
        above += is_above.to(tl.int32)
        tie += is_tie.to(tl.int32)
    tl.store(above_B + row, tl.sum(above, 0).to(tl.int64))
    tl.store(tie_B + row, tl.sum(tie, 0).to(tl.int64))


@triton.jit
def emit_rows(
    values,
    start_B1,
    group_C,
    cut,
    budget_B,
    out_start_B1,
    row_N,
    col_N,
    capacity,
    width,
    MODE: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each row's selected columns in order, from `out_start[row]` on: all above the cut and the first
    `budget[row]` at it. Nothing is written past `capacity`."""
    row = tl.program_id(0).to(tl.int64)
    budget = tl.load(budget_B + row).to(tl.int32)
    at = tl.load(out_start_B1 + row)
    first, last = _slots(start_B1, row, width, GATHER, GROUP)
    ties = 0
    for start in range(first, last, BLOCK):
        col, exists = _columns(group_C, start, last, width, GATHER, GROUP, BLOCK)
        x = tl.load(values + row * width + col, mask=exists, other=0.0)
        is_above, is_tie = _passes(x, cut, col, exists, MODE)
        tie_count = is_tie.to(tl.int32)
        keep = is_above | (is_tie & (ties + tl.cumsum(tie_count, 0) <= budget))
        kept = keep.to(tl.int32)
        to = at + tl.cumsum(kept, 0) - 1
        fits = keep & (to < capacity)
        tl.store(row_N + to, tl.zeros([BLOCK], tl.int64) + row, mask=fits)
        tl.store(col_N + to, col.to(tl.int64), mask=fits)
        ties += tl.sum(tie_count, 0)
        at += tl.sum(kept, 0).to(tl.int64)


@triton.jit
def _slots(start_B1, row, width, GATHER: tl.constexpr, GROUP: tl.constexpr):
    """The range of slots of a row: its columns, or the members of its chosen groups."""
    if GATHER:
        return (tl.load(start_B1 + row) * GROUP).to(tl.int32), (tl.load(start_B1 + row + 1) * GROUP).to(tl.int32)
    else:
        return row.to(tl.int32) * 0, row.to(tl.int32) * 0 + width


@triton.jit
def _columns(group_C, start, last, width, GATHER: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    slot = start + tl.arange(0, BLOCK)
    exists = slot < last
    col = slot
    if GATHER:
        col = tl.load(group_C + slot // GROUP, mask=exists, other=0).to(tl.int32) * GROUP + slot % GROUP
        exists = exists & (col < width)
    return col, exists


@triton.jit
def _passes(x, cut, col, exists, MODE: tl.constexpr):
    """Which values lie above the cut and which at it. MODE 0: one cut, as bits. 1: value >= cut of its latent
    and positive. 2: value > cut of its latent and positive. Modes 1 and 2 have no ties."""
    bits = _bits(x)
    if MODE == 0:
        limit = tl.load(cut).to(tl.int32)
        above = exists & (bits > limit)
        tie = exists & (bits == limit) & (bits > 0)
    else:
        value = x.to(tl.float32)
        limit = tl.load(cut + col, mask=exists, other=0.0).to(tl.float32)
        above = exists & (bits > 0)
        if MODE == 1:
            above = above & (value >= limit)
        else:
            above = above & (value > limit)
        tie = exists & (bits < 0)
    return above, tie
