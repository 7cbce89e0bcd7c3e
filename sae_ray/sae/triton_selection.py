"""Exact TopK and BatchTopK on a GPU without a host sync: what `selection` does, with outputs of fixed capacity.

`selection` reads histograms and counts on the host to size its outputs. Here every size is an upper bound known
beforehand, and what is unused is **padding**: pairs after `row_start[-1]` have row 0, column 0 and value 0.

One pass over the pre-activations takes the largest of every GROUP neighbouring latents. The k-th largest of
those maxima is a lower bound of the k-th largest value, so all selected values lie in the k groups with the
largest maxima (ties by position, as for values): everything after the first pass looks at those groups only.
BatchTopK finds its two cuts by radix select, eight bits at a time, with histograms summed over the mesh.

Suffixes: B this process's tokens, m its latents, G groups of latents, N capacity in pairs, C in groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sae_ray.sae.selection import SelectionCollectives, Shard
from sae_ray.sae.sparse import Codes
from sae_ray.sae.triton_kernels import launch

LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # always zero after widening to float32
GROUP = 64
MAX_SLOTS = 16384  # of a row that one program holds in registers
BLOCK = 1024
HISTOGRAM_BLOCKS = 16  # per program


class Selected(NamedTuple):
    """Active pairs sorted by token and then latent; those after `row_start_B1[-1]` are padding."""

    rows_N: torch.Tensor
    cols_N: torch.Tensor
    row_start_B1: torch.Tensor
    threshold: torch.Tensor
    overflow: torch.Tensor  # 0-dim: how many pairs did not fit; always 0 for topk and batchtopk


def padded_codes(pre_Bm: torch.Tensor, selected: Selected) -> Codes:
    """Codes with padding at the end of each list; offsets, and what is listed by latent, leave it out."""
    n_latents, device = pre_Bm.shape[1], pre_Bm.device
    live_N = torch.arange(len(selected.rows_N), device=device) < selected.row_start_B1[-1]
    if not pre_Bm.numel():
        vals_N = pre_Bm.new_zeros(len(selected.rows_N))
    else:
        vals_N = torch.where(live_N, pre_Bm[selected.rows_N, selected.cols_N], 0)
    keys_N, by_latent_N = torch.sort(torch.where(live_N, selected.cols_N, n_latents), stable=True)
    latent_start_m1 = torch.searchsorted(keys_N, torch.arange(n_latents + 1, device=device))
    return Codes(selected.rows_N, selected.cols_N, vals_N, selected.row_start_B1, by_latent_N, latent_start_m1)


def row_topk(
    pre_Bm: torch.Tensor, k: int, bias_m: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k largest positive values of each row and their columns, [B, k] each, in order of column.

    Ties by column. Rows with fewer than k positive values end with value 0 and column -1. None where rows or k are
    too large for one program (about k > 1024): use `torch.topk`.

    Args:
        bias_m: added to `pre_Bm` in place, in the same pass.
    """
    from sae_ray.sae import triton_jit_select as jit

    pre_Bm = _contiguous(pre_Bm)
    n_rows, width = pre_Bm.shape
    low_bit = LOW_BITS[pre_Bm.dtype]
    group = GROUP
    while k * group > MAX_SLOTS // 2 and group > 16:
        group //= 2
    n_groups = -(-width // group)
    direct = width <= 2 * k * group
    if max(width if direct else n_groups, 0 if direct else k * group) > MAX_SLOTS:
        return None
    if direct and bias_m is not None:
        pre_Bm.add_(bias_m)
    cols_Bk = torch.empty(n_rows, k, dtype=torch.int64, device=pre_Bm.device)
    vals_Bk = torch.empty(n_rows, k, dtype=pre_Bm.dtype, device=pre_Bm.device)
    shared: dict[str, Any] = {"LOW_BIT": low_bit, "GROUP": group, "PAD_K": _power_of_two(k)}
    if direct:
        _launch_rows(jit, pre_Bm, cols_Bk, cols_Bk, vals_Bk, width, k, False, width, shared)
        return vals_Bk, cols_Bk
    maxima_BG = _group_maxima(jit, pre_Bm, group, bias_m)
    groups_Bk = torch.empty_like(cols_Bk)
    _launch_rows(jit, maxima_BG, groups_Bk, groups_Bk, vals_Bk, n_groups, k, False, n_groups, shared)
    _launch_rows(jit, pre_Bm, groups_Bk, cols_Bk, vals_Bk, width, k, True, k * group, shared)
    return vals_Bk, cols_Bk


def select_topk(
    pre_Bm: torch.Tensor, k: int, collectives: SelectionCollectives, bias_m: torch.Tensor | None = None
) -> Selected | None:
    """`selection.select_topk` with capacity B * k; None where `row_topk` has none."""
    n_rows = pre_Bm.shape[0]
    local_k = min(k, pre_Bm.shape[1])
    found = row_topk(pre_Bm, local_k, bias_m)
    if found is None:
        return None
    vals_Bk, cols_Bk = found
    padded_Bk = torch.nn.functional.pad(vals_Bk, (0, k - local_k)).contiguous()
    top_RBk = collectives.gather_tp(padded_Bk)
    merged = top_RBk.transpose(0, 1).reshape(n_rows, -1)
    cut_B = merged.topk(k, dim=1).values[:, -1]
    ties_RB = (top_RBk == cut_B[None, :, None]).sum(-1)
    need_B = k - (merged > cut_B[:, None]).sum(1) - ties_RB[: collectives.tp_rank].sum(0)
    tie_Bk = vals_Bk == cut_B[:, None]
    keep_Bk = (vals_Bk > cut_B[:, None]) | (tie_Bk & (tie_Bk.cumsum(1) <= need_B[:, None]))
    keep_Bk &= cols_Bk >= 0
    starts_B1 = _starts(keep_Bk.sum(1))
    # Kept pairs move to the front; the rest goes to one slot past the end, which is cut off.
    capacity = keep_Bk.numel()
    to_N = torch.where(keep_Bk.view(-1), keep_Bk.view(-1).cumsum(0) - 1, capacity)
    rows_N = torch.arange(n_rows, device=pre_Bm.device).repeat_interleave(local_k, output_size=capacity)
    compact = [
        torch.zeros(capacity + 1, dtype=torch.int64, device=pre_Bm.device).scatter_(0, to_N, part)[:capacity]
        for part in (rows_N, cols_Bk.view(-1))
    ]
    none = torch.zeros((), dtype=torch.int64, device=pre_Bm.device)
    return Selected(compact[0], compact[1], starts_B1, cut_B.clamp(min=0).mean(), none)


# ---------------------------------------------------------------------- over the batch


def select_batch_topk(
    pre_Bm: torch.Tensor,
    n_keep: int,
    shard: Shard,
    collectives: SelectionCollectives,
    bias_m: torch.Tensor | None = None,
) -> Selected:
    """`selection.select_batch_topk` with capacity min(n_keep, B * m). Communication: 2 to 8 histograms of 256
    counts, and the number of ties of each token.

    Args:
        pre_Bm: float32, bfloat16 or float16, finite.
        bias_m: added to `pre_Bm` in place, in the same pass.
    """
    from sae_ray.sae import triton_jit_select as jit

    pre_Bm = _contiguous(pre_Bm)
    n_rows, width = pre_Bm.shape
    if n_keep * GROUP >= 1 << 31:
        raise ValueError(f"select_batch_topk keeps at most {(1 << 31) // GROUP - 1} pairs, not {n_keep}")
    maxima_BG = _group_maxima(jit, pre_Bm, GROUP, bias_m)
    n_groups = maxima_BG.shape[1]
    flat = (n_rows * n_groups, n_groups)
    state = _radix_select(jit, maxima_BG, None, flat, n_keep, LOW_BITS[pre_Bm.dtype], collectives)
    # Any rank's first `need` tied groups hold its share of the mesh's first `need`: no order across ranks here.
    above_B, tie_B = _count(jit, maxima_BG, None, state, n_groups, 0)
    budget_B = _in_order(tie_B, state[1])
    start_B1 = _starts(above_B + budget_B)
    groups = _emit(jit, maxima_BG, None, state, budget_B, start_B1, min(n_keep, n_rows * n_groups), n_groups, 0)

    candidates = (start_B1, *groups)
    size = (len(groups[0]), width)
    state = _radix_select(jit, pre_Bm, candidates, size, n_keep, LOW_BITS[pre_Bm.dtype], collectives)
    above_B, tie_B = _count(jit, pre_Bm, candidates, state, width, 0)
    budget_B = _tie_budget(tie_B, state[1], shard, collectives)
    start_B1 = _starts(above_B + budget_B)
    capacity = min(n_keep, n_rows * width)
    rows_N, cols_N = _emit(jit, pre_Bm, candidates, state, budget_B, start_B1, capacity, width, 0)
    threshold = state[0].to(torch.int32).view(torch.float32).to(pre_Bm.dtype)
    return Selected(rows_N, cols_N, start_B1, threshold, torch.zeros_like(state[0]))


def select_above(pre_Bm: torch.Tensor, threshold: torch.Tensor, capacity: int, strict: bool = False) -> Selected:
    """Positive pairs with pre >= threshold (0-dim or [m]), or > if `strict` (jumprelu), at most `capacity` of them.

    How many there are is not known beforehand: `overflow` counts what did not fit (the last in order). Whoever
    reads it on the host, now and then, must raise the capacity.
    """
    from sae_ray.sae import triton_jit_select as jit

    pre_Bm = _contiguous(pre_Bm)
    width = pre_Bm.shape[1]
    cut_m = threshold.expand(width).contiguous()
    mode = 2 if strict else 1
    above_B, _ = _count(jit, pre_Bm, None, cut_m, width, mode)
    start_B1 = _starts(above_B)
    none_B = torch.zeros_like(above_B)
    rows_N, cols_N = _emit(jit, pre_Bm, None, cut_m, none_B, start_B1, capacity, width, mode)
    overflow = (start_B1[-1] - capacity).clamp(min=0)
    return Selected(rows_N, cols_N, start_B1.clamp(max=capacity), threshold, overflow)


# ---------------------------------------------------------------------- steps

Candidates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # offsets by token [B+1], token and group [C]


def _group_maxima(jit: Any, pre_Bm: torch.Tensor, group: int, bias_m: torch.Tensor | None) -> torch.Tensor:
    n_rows, width = pre_Bm.shape
    n_groups = -(-width // group)
    out_BG = torch.empty(n_rows, n_groups, dtype=pre_Bm.dtype, device=pre_Bm.device)
    per_program = max(1, 4096 // group)
    args = (pre_Bm, pre_Bm if bias_m is None else bias_m, out_BG, width, n_groups)
    constants = {"GROUP": group, "GROUPS": per_program, "BIAS": bias_m is not None}
    launch(jit.group_max, (n_rows, -(-n_groups // per_program)), *args, **constants, num_warps=4)
    return out_BG


def _launch_rows(
    jit: Any,
    values: torch.Tensor,
    groups_Bk: torch.Tensor,
    cols_Bk: torch.Tensor,
    vals_Bk: torch.Tensor,
    width: int,
    k: int,
    gather: bool,
    slots: int,
    shared: dict[str, Any],
) -> None:
    slots = max(16, _power_of_two(slots))
    args = (values, groups_Bk, cols_Bk, vals_Bk, width, k)
    warps = max(1, min(16, slots // 512))  # 16 values a thread: more would leave one block per multiprocessor
    launch(jit.row_topk, (values.shape[0],), *args, GATHER=gather, SLOTS=slots, num_warps=warps, **shared)


def _radix_select(
    jit: Any,
    values: torch.Tensor,
    candidates: Candidates | None,
    size: tuple[int, int],
    n_keep: int,
    low_bit: int,
    collectives: SelectionCollectives,
) -> torch.Tensor:
    """int64 [2]: the bits of the n_keep-th largest positive value of the mesh (0 if fewer are positive), and how
    many of the values equal to it are to be kept."""
    count, width = size
    slots = count * GROUP if candidates else count
    programs = max(1, -(-slots // (BLOCK * HISTOGRAM_BLOCKS)))
    state = torch.zeros(2, dtype=torch.int64, device=values.device)
    state[1:].fill_(n_keep)  # `state[1] = n_keep` would copy from the host
    partial = torch.empty(programs, 256, dtype=torch.int32, device=values.device)
    chosen = candidates[0][-1:] if candidates else state
    row_C, group_C = candidates[1:] if candidates else (state, state)
    constants = {"GATHER": candidates is not None, "GROUP": GROUP, "BLOCK": BLOCK, "REPEATS": HISTOGRAM_BLOCKS}
    for shift in (24, 16, 8, 0):
        if shift + 8 <= low_bit:
            break
        args = (values, row_C, group_C, chosen, state, partial, count, width)
        launch(jit.digit_histogram, (programs,), *args, SHIFT=shift, **constants, num_warps=4)
        histogram = collectives.sum_mesh(partial.sum(0))
        launch(jit.pick_digit, (1,), histogram, state, SHIFT=shift, num_warps=1)
    return state


def _count(
    jit: Any, values: torch.Tensor, candidates: Candidates | None, cut: torch.Tensor, width: int, mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    above_B = torch.empty(values.shape[0], dtype=torch.int64, device=values.device)
    tie_B = torch.empty_like(above_B)
    start_B1, group_C = (candidates[0], candidates[2]) if candidates else (above_B, above_B)
    args = (values, start_B1, group_C, cut, above_B, tie_B, width)
    launch(jit.count_rows, (values.shape[0],), *args, **_scan(mode, candidates), num_warps=4)
    return above_B, tie_B


def _emit(
    jit: Any,
    values: torch.Tensor,
    candidates: Candidates | None,
    cut: torch.Tensor,
    budget_B: torch.Tensor,
    out_start_B1: torch.Tensor,
    capacity: int,
    width: int,
    mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_N = torch.zeros(capacity, dtype=torch.int64, device=values.device)
    cols_N = torch.zeros_like(rows_N)
    start_B1, group_C = (candidates[0], candidates[2]) if candidates else (budget_B, budget_B)
    args = (values, start_B1, group_C, cut, budget_B, out_start_B1, rows_N, cols_N, capacity, width)
    launch(jit.emit_rows, (values.shape[0],), *args, **_scan(mode, candidates), num_warps=4)
    return rows_N, cols_N


def _scan(mode: int, candidates: Candidates | None) -> dict[str, Any]:
    return {"MODE": mode, "GATHER": candidates is not None, "GROUP": GROUP, "BLOCK": BLOCK}


def _in_order(tie_B: torch.Tensor, need: torch.Tensor, earlier: torch.Tensor | int = 0) -> torch.Tensor:
    """How many of each row's ties are among the first `need`, rows in order, after `earlier` ones."""
    before_B = tie_B.cumsum(0) - tie_B + earlier
    return torch.minimum(tie_B, (need - before_B).clamp(min=0))


def _tie_budget(
    tie_B: torch.Tensor, need: torch.Tensor, shard: Shard, collectives: SelectionCollectives
) -> torch.Tensor:
    """How many of each row's ties are among the mesh's first `need` in order of (token, latent id)."""
    tie_RB = collectives.gather_tp(tie_B)
    n_ranks, n_rows = tie_RB.shape
    own = slice(shard.first_row, shard.first_row + n_rows)
    all_T = torch.zeros(shard.global_rows, dtype=torch.int64, device=tie_B.device)
    all_T[own] = tie_RB.sum(0)
    all_T = collectives.sum_mesh(all_T) // n_ranks  # each rank of a tp group has added the same numbers
    before_B = (all_T.cumsum(0) - all_T)[own] + tie_RB[: collectives.tp_rank].sum(0)
    return torch.minimum(tie_B, (need - before_B).clamp(min=0))


def _starts(count_B: torch.Tensor) -> torch.Tensor:
    starts_B1 = torch.zeros(len(count_B) + 1, dtype=torch.int64, device=count_B.device)
    torch.cumsum(count_B, 0, out=starts_B1[1:])
    return starts_B1


def _contiguous(pre_Bm: torch.Tensor) -> torch.Tensor:
    if not pre_Bm.is_contiguous() or pre_Bm.dtype not in LOW_BITS:
        raise TypeError(f"pre-activations must be contiguous float32, bfloat16 or float16, not {pre_Bm.dtype}")
    return pre_Bm


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
