"""Triton kernel bodies. Only `triton_kernels` and `triton_selection` import this file, and only when they launch.

Rules that make results reproducible: no atomics; every output element is written by one program; sums are
float32 (counts int32) in an order that the shapes alone decide. Pointers come first, then sizes, then tiles.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------- sparse products


@triton.jit
def gather_sum(
    first_S,
    last_S,
    index_N,
    weight_N,
    src,
    out,
    weight2_N,
    src2,
    out2,
    total_S,
    D,
    LONG: tl.constexpr,
    K: tl.constexpr,
    BOTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out[s] = sum over pairs i of segment s of weight[i] * src[index[i]]`, for a block of columns.

    Grid (segments, column blocks): segments run fastest, so that the whole GPU works on the same columns and
    the gathered block of `src` stays in L2. Segments of more than LONG pairs are left to `merge_parts`.
    BOTH: a second weighted sum over the same pairs, and the sum of the first weights. K: segments of K pairs.
    """
    segment = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < D
    if K > 0:
        first = (segment * K).to(tl.int32)
        last = first + K
    else:
        first = tl.load(first_S + segment).to(tl.int32)
        last = tl.load(last_S + segment).to(tl.int32)
    if last - first <= LONG:
        acc = tl.zeros([BLOCK_D], tl.float32)
        acc2 = tl.zeros([BLOCK_D], tl.float32)
        weights = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            pair = start + tl.arange(0, PAIRS)
            live = pair < last
            row = tl.load(index_N + pair, mask=live, other=0).to(tl.int64)
            weight = tl.load(weight_N + pair, mask=live, other=0.0).to(tl.float32)
            at = row[:, None] * D + col[None, :]
            mask = live[:, None] & inside[None, :]
            acc += tl.sum(weight[:, None] * tl.load(src + at, mask=mask, other=0.0).to(tl.float32), 0)
            if BOTH:
                weight2 = tl.load(weight2_N + pair, mask=live, other=0.0).to(tl.float32)
                acc2 += tl.sum(weight2[:, None] * tl.load(src2 + at, mask=mask, other=0.0).to(tl.float32), 0)
                weights += weight
        tl.store(out + segment * D + col, acc.to(out.dtype.element_ty), mask=inside)
        if BOTH:
            tl.store(out2 + segment * D + col, acc2.to(out2.dtype.element_ty), mask=inside)
            if tl.program_id(1) == 0:
                tl.store(total_S + segment, tl.sum(weights, 0).to(total_S.dtype.element_ty))


@triton.jit
def merge_parts(
    owner_P,
    part,
    out,
    part2,
    out2,
    part_total_P,
    total_S,
    n_parts,
    D,
    BOTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds up, in order, the partial sums of each long segment; the program of its first part does it."""
    mine = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < D
    owner = tl.load(owner_P + mine).to(tl.int64)
    before = tl.load(owner_P + mine - 1, mask=mine > 0, other=-1).to(tl.int64)
    if (owner >= 0) & (owner != before):
        acc = tl.zeros([BLOCK_D], tl.float32)
        acc2 = tl.zeros([BLOCK_D], tl.float32)
        total = 0.0
        at = mine.to(tl.int64)
        same = 1
        while same == 1:
            acc += tl.load(part + at * D + col, mask=inside, other=0.0)
            if BOTH:
                acc2 += tl.load(part2 + at * D + col, mask=inside, other=0.0)
                total += tl.load(part_total_P + at)
            at += 1
            follower = tl.load(owner_P + at, mask=at < n_parts, other=-1).to(tl.int64)
            same = (follower == owner).to(tl.int32)
        tl.store(out + owner * D + col, acc.to(out.dtype.element_ty), mask=inside)
        if BOTH:
            tl.store(out2 + owner * D + col, acc2.to(out2.dtype.element_ty), mask=inside)
            if tl.program_id(1) == 0:
                tl.store(total_S + owner, total.to(total_S.dtype.element_ty))


@triton.jit
def dot_pairs(
    row_N,
    col_N,
    order_N,
    live_count,
    y,
    W,
    out_N,
    N,
    D,
    K: tl.constexpr,
    ORDERED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out[i] = <y[row[i]], W[col[i]]>`; 0 for the padding after `live_count` pairs.

    ORDERED visits the pairs by latent, so that a row of W is read from memory once. K: row i is i // K.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < N
    if ORDERED:
        pair = tl.load(order_N + pair, mask=exists, other=0).to(tl.int64)
    if K > 0:
        live = exists
        row = pair // K
    else:
        live = exists & (pair < tl.load(live_count))
        row = tl.load(row_N + pair, mask=live, other=0).to(tl.int64)
    latent = tl.load(col_N + pair, mask=live, other=0).to(tl.int64)
    acc = tl.zeros([PAIRS, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (col < D)[None, :]
        left = tl.load(y + row[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        right = tl.load(W + latent[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += left * right
    tl.store(out_N + pair, tl.sum(acc, 1).to(out_N.dtype.element_ty), mask=exists)


@triton.jit
def segment_totals(start_S, weight_N, out_S, BLOCK: tl.constexpr):
    """`out[s] = sum of the weights of segment s`."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(start_S + segment).to(tl.int32)
    last = tl.load(start_S + segment + 1).to(tl.int32)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        acc += tl.load(weight_N + pair, mask=pair < last, other=0.0).to(tl.float32)
    tl.store(out_S + segment, tl.sum(acc, 0).to(out_S.dtype.element_ty))


@triton.jit
def latent_gradients(
    first_S,
    last_S,
    row_N,
    value_N,
    W_dec,
    slope,
    centred,
    owner_S,
    d_enc,
    d_dec,
    d_bias_S,
    D,
    LONG: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of one latent in one traversal: the decoder's row stays in registers, so that each pair's
    slope row is read once for both its dot product and the decoder's gradient. BLOCK_D covers all of D.

    OWNED: segments are parts of long latents, and `owner_S` says of which.
    """
    segment = tl.program_id(0).to(tl.int64)
    latent = segment
    if OWNED:
        latent = tl.load(owner_S + segment).to(tl.int64)
    first = tl.load(first_S + segment).to(tl.int32)
    last = tl.load(last_S + segment).to(tl.int32)
    if last - first <= LONG:
        col = tl.arange(0, BLOCK_D)
        inside = col < D
        w = tl.load(W_dec + latent * D + col, mask=inside & (last > first), other=0.0).to(tl.float32)
        enc = tl.zeros([BLOCK_D], tl.float32)
        dec = tl.zeros([BLOCK_D], tl.float32)
        bias = 0.0
        for pair in range(first, last):
            row = tl.load(row_N + pair).to(tl.int64)
            value = tl.load(value_N + pair).to(tl.float32)
            s = tl.load(slope + row * D + col, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(centred + row * D + col, mask=inside, other=0.0).to(tl.float32)
            d_pre = tl.sum(s * w, 0)
            dec += value * s
            enc += d_pre * x
            bias += d_pre
        tl.store(d_enc + segment * D + col, enc.to(d_enc.dtype.element_ty), mask=inside)
        tl.store(d_dec + segment * D + col, dec.to(d_dec.dtype.element_ty), mask=inside)
        tl.store(d_bias_S + segment, bias.to(d_bias_S.dtype.element_ty))


# ---------------------------------------------------------------------- JumpReLU


@triton.jit
def jumprelu_forward(pre, theta_m, out, active_BC, m, n_columns, BLOCK: tl.constexpr):
    """Grid (rows, column blocks): the activations, and how many are active in each block."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < m
    x = tl.load(pre + row * m + col, mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(theta_m + col, mask=inside, other=0.0).to(tl.float32)
    active = inside & (x > theta)
    tl.store(out + row * m + col, tl.where(active, x, 0.0).to(out.dtype.element_ty), mask=inside)
    tl.store(active_BC + row * n_columns + tl.program_id(1), tl.sum(active.to(tl.int32), 0))


@triton.jit
def jumprelu_backward(
    pre,
    theta_m,
    grad,
    grad_l0_B,
    grad_pre,
    part_theta,
    part_bias,
    bandwidth,
    n_rows,
    m,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (column blocks, runs of ROWS rows). Column sums per run; the caller adds the runs up."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < m
    theta = tl.load(theta_m + col, mask=inside, other=0.0).to(tl.float32)
    d_theta = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    run = tl.program_id(1).to(tl.int64)
    for step in range(ROWS):
        row = run * ROWS + step
        exists = inside & (row < n_rows)
        at = row * m + col
        x = tl.load(pre + at, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        l0 = tl.load(grad_l0_B + row, mask=row < n_rows, other=0.0).to(tl.float32)
        d_pre = tl.where(x > theta, g, 0.0)
        near = exists & (tl.abs(x - theta) < bandwidth / 2)
        d_theta -= tl.where(near, (theta * g + l0) / bandwidth, 0.0)
        d_bias += d_pre
        tl.store(grad_pre + at, d_pre.to(grad_pre.dtype.element_ty), mask=exists)
    tl.store(part_theta + run * m + col, d_theta, mask=inside)
    tl.store(part_bias + run * m + col, d_bias, mask=inside)
