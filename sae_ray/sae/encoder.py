"""From inputs to the pairs that may be active, without ever holding all pre-activations.

The encoder is one dense product. Its [B, m] result is computed in pieces of some tokens, and each is reduced to
candidates before the next one overwrites it. What makes that cheap and exact is the maximum of every GROUP
consecutive latents: a token's k largest latents lie in the k groups with the largest maxima, and the n-th largest
maximum of a batch is a lower bound of its n-th largest value.

Suffixes: B tokens, m latents, C tokens of a piece, P latents padded to whole groups, G groups, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

GROUP = 32
CPU_ROWS = 1024  # as fast as the whole product, and a quarter of its memory at a batch of 4096
GPU_ELEMENTS = 1 << 28
_ID_BITS = 32
_LAST_ID = (1 << 31) - 1


class Pairs(NamedTuple):
    """(token, latent) pairs sorted by token and then latent, with their pre-activations."""

    rows_N: torch.Tensor
    cols_N: torch.Tensor
    vals_N: torch.Tensor


class Workspace:
    """Buffers that are kept between steps: fresh pages for a [B, m] result cost as much as half its product."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor; the one given out before under this name is overwritten."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size or buffer.dtype != dtype or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


class Encoder(NamedTuple):
    """`pre = centred @ W.T + b`, in bfloat16 if `low_precision`.

    watch_n: latents whose pre-activations are kept on the way, for `watched_top`.
    """

    centred_BD: torch.Tensor
    W_mD: torch.Tensor
    b_m: torch.Tensor
    workspace: Workspace
    low_precision: bool = False
    watch_n: torch.Tensor | None = None

    def pre_activations(self) -> torch.Tensor:
        """All of them, [B, m], in a buffer that the next call overwrites."""
        out_Bm = self.workspace.take("dense", (len(self.centred_BD), len(self.b_m)), *_place(self))
        c_BD, W_mD, b_m = self.operands()
        torch.mm(c_BD, W_mD.T, out=out_Bm)
        self.note(0, out_Bm.add_(b_m))
        return out_Bm.to(self.W_mD.dtype)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first token, pre-activations [C, P], group maxima [C, G]) of consecutive tokens, each overwritten by
        the next. Latents past the last are -inf."""
        c_BD, W_mD, b_m = self.operands()
        n_tokens, m = len(c_BD), len(b_m)
        width = -(-m // GROUP) * GROUP
        n_rows = min(n_tokens, CPU_ROWS if c_BD.device.type == "cpu" else max(1, GPU_ELEMENTS // width))
        pre = self.workspace.take("pre", (n_rows, width), *_place(self))
        pre[:, m:] = -torch.inf
        for first in range(0, n_tokens, n_rows):
            c_CD = c_BD[first : first + n_rows]
            pre_CP = pre[: len(c_CD)]
            live_Cm = pre_CP[:, :m]
            torch.mm(c_CD, W_mD.T, out=live_Cm)
            live_Cm.add_(b_m)
            self.note(first, pre_CP)
            yield first, pre_CP, _group_maxima(pre_CP)

    def note(self, first: int, pre_Cm: torch.Tensor) -> None:
        """Keeps the watched latents' pre-activations of the tokens from `first` on."""
        if self.watch_n is not None:
            watched_CP = self._watched()[first : first + len(pre_Cm)]
            watched_CP[:, len(self.watch_n) :] = -torch.inf
            watched_CP[:, : len(self.watch_n)] = pre_Cm.index_select(1, self.watch_n)

    def watched_top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`top_rows` of the watched latents, after the product: values [B, k] in the parameters' dtype, and places
        in `watch_n` [B, k]."""
        assert self.watch_n is not None
        watched_BP, n = self._watched(), len(self.watch_n)
        parts = [_top_of_piece(part, _group_maxima(part), k, n) for part in watched_BP.split(CPU_ROWS)]
        vals_Bk = torch.cat([vals for vals, _ in parts])
        return vals_Bk.to(self.W_mD.dtype), torch.cat([ids for _, ids in parts])

    def _watched(self) -> torch.Tensor:
        assert self.watch_n is not None
        width = -(-len(self.watch_n) // GROUP) * GROUP
        return self.workspace.take("watched", (len(self.centred_BD), width), *_place(self))

    def widened(self, pairs: Pairs) -> Pairs:
        """The pairs with values in the parameters' dtype. A bfloat16 product's are off by about a hundredth of an
        active value, which costs a few parts in 10^5 of FVU; computing them again would cost a tenth of the step."""
        return pairs._replace(vals_N=pairs.vals_N.to(self.W_mD.dtype))

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(centred, W, b) in the dtype of the product."""
        if not self.low_precision:
            return self.centred_BD, self.W_mD, self.b_m
        W_mD = self.workspace.take("W_low", tuple(self.W_mD.shape), torch.bfloat16, self.W_mD.device)
        return self.centred_BD.bfloat16(), W_mD.copy_(self.W_mD), self.b_m.bfloat16()


def top_rows(encoder: Encoder, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest positive latents of each token, largest first, equal ones in order of latent.

    Returns:
        Values [B, k] (0 where fewer are positive) and latents [B, k] int64; k at most the number of latents.
    """
    parts = [_top_of_piece(pre, largest, k, len(encoder.b_m)) for _, pre, largest in encoder.pieces()]
    return torch.cat([vals for vals, _ in parts]), torch.cat([ids for _, ids in parts])


def top_of(pre_Bm: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_rows` of pre-activations that are already there."""
    if pre_Bm.dtype == torch.float64:
        vals, ids = pre_Bm.sort(dim=1, descending=True, stable=True)
        return vals[:, :k].clamp(min=0), ids[:, :k]
    return _top_by_key(pre_Bm, torch.arange(pre_Bm.shape[1], device=pre_Bm.device), k)


def pairs_above(encoder: Encoder, low: torch.Tensor) -> Pairs:
    """Pairs that are positive and at least `low` (0-dim or [m]), in order."""
    found = []
    for first, pre_CP, largest_CG in encoder.pieces():
        if low.dim():
            low_P = torch.nn.functional.pad(low.to(pre_CP.dtype), (0, pre_CP.shape[1] - len(low)))
            largest_CG = _group_maxima(pre_CP - low_P)
            hit_CG, low_GK = largest_CG >= 0, low_P.view(-1, GROUP)
        else:
            hit_CG, low_GK = (largest_CG >= low) & (largest_CG > 0), None
        found.append(_pairs_of_groups(pre_CP, hit_CG, first, low if low_GK is None else low_GK))
    return encoder.widened(_joined(found))


def batch_candidates(encoder: Encoder, n_keep: int) -> Pairs:
    """Pairs among which the `n_keep` largest positive ones of these tokens are, and few others, in order."""
    found, counts = [], None
    for first, pre_CP, largest_CG in encoder.pieces():
        wide_CG = largest_CG.float() if largest_CG.dtype == torch.bfloat16 else largest_CG
        bits, shift = high_bits(wide_CG.reshape(-1))
        seen = torch.bincount(bits, minlength=1 << 15)
        counts = seen if counts is None else counts + seen
        # At least n_keep of the maxima seen so far, and so of all values, lie in this bucket or above it.
        place = torch.searchsorted(counts.flip(0).cumsum(0), n_keep)
        bucket = (len(counts) - 1 - place).clamp(min=0)
        low = (bucket.to(_bits_dtype(wide_CG.dtype)) << shift).view(wide_CG.dtype)
        hit_CG = (wide_CG >= low) & (wide_CG > 0)
        found.append(_pairs_of_groups(pre_CP, hit_CG, first, low.to(pre_CP.dtype)))
    return encoder.widened(_joined(found))


def high_bits(values_F: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The highest 15 bits below the sign of each value (0 for what is negative), and how far they were shifted.

    Positive IEEE floats sort like their bit patterns, so these are buckets in order of size.
    """
    bits_F = values_F.view(_bits_dtype(values_F.dtype))
    shift = values_F.element_size() * 8 - 16
    return (bits_F >> shift).clamp_(min=0), shift


def _bits_dtype(dtype: torch.dtype) -> torch.dtype:
    return {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]


def _place(encoder: Encoder) -> tuple[torch.dtype, torch.device]:
    return torch.bfloat16 if encoder.low_precision else encoder.W_mD.dtype, encoder.W_mD.device


def _group_maxima(pre_CP: torch.Tensor) -> torch.Tensor:
    """The largest value of every GROUP neighbours; where none is positive, one that is not."""
    if pre_CP.dtype == torch.bfloat16:
        # Positive ones sort like the integers with their bits, whose maximum is five times as fast on CPU.
        return pre_CP.view(torch.int16).unflatten(1, (-1, GROUP)).amax(2).view(torch.bfloat16)
    return pre_CP.unflatten(1, (-1, GROUP)).amax(2)


def _top_of_piece(pre_CP: torch.Tensor, largest_CG: torch.Tensor, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows, n_groups = largest_CG.shape
    if pre_CP.dtype == torch.float64 or n_groups <= 2 * k:
        return top_of(pre_CP[:, :m], k)
    groups = torch.arange(n_groups, device=pre_CP.device)
    _, group_Ck = _top_by_key(largest_CG, groups, k)
    flat = group_Ck + n_groups * torch.arange(n_rows, device=pre_CP.device)[:, None]
    near_Cq = pre_CP.view(-1, GROUP).index_select(0, flat.view(-1)).view(n_rows, -1)
    ids_Cq = (group_Ck[:, :, None] * GROUP + torch.arange(GROUP, device=pre_CP.device)).view(n_rows, -1)
    return _top_by_key(near_Cq, ids_Cq, k)


def _top_by_key(values_CQ: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row by (value, then lowest id): one integer that sorts that way is ranked."""
    kind = _bits_dtype(values_CQ.dtype)
    keys_CQ = values_CQ.clamp(min=0).view(kind).to(torch.int64) << _ID_BITS
    keys_CQ |= _LAST_ID - ids
    top_Ck = keys_CQ.topk(k, dim=1).values
    vals_Ck = (top_Ck >> _ID_BITS).to(kind).view(values_CQ.dtype)
    return vals_Ck, _LAST_ID - (top_Ck & _LAST_ID)


def _pairs_of_groups(pre_CP: torch.Tensor, hit_CG: torch.Tensor, first_row: int, low: torch.Tensor) -> Pairs:
    """Pairs of the groups marked in `hit_CG` that are positive and at least `low` (0-dim or [G, GROUP])."""
    rows_H, groups_H = torch.nonzero(hit_CG, as_tuple=True)
    values_HK = pre_CP.reshape(-1, GROUP).index_select(0, rows_H * hit_CG.shape[1] + groups_H)
    low_HK = low[groups_H] if low.dim() else low
    which_N, inside_N = torch.nonzero((values_HK >= low_HK) & (values_HK > 0), as_tuple=True)
    return Pairs(rows_H[which_N] + first_row, groups_H[which_N] * GROUP + inside_N, values_HK[which_N, inside_N])


def _joined(parts: list[Pairs]) -> Pairs:
    return parts[0] if len(parts) == 1 else Pairs(*(torch.cat(field) for field in zip(*parts, strict=True)))
