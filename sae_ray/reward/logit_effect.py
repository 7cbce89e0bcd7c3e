"""A causal score that asks no judge: does a latent's decoder direction raise the tokens that follow where it fires?

The direction's effect on the logits is read through the final norm's weight and the unembedding, as in
`evidence.logit_lens`. Then, with tokens drawn alike,

    auroc_l = P(effect_l(token after an active position of l) > effect_l(token of the background)) + half the ties

The background is the tokens after all latents' active positions, so a token that is common everywhere says nothing.
The null permutes whose texts are whose: the same effect against other latents' tokens. All assignments of a latent's
effect to another latent's tokens are computed, not a sample of them; `score = auroc - null`.

Suffixes: N latents, P of them as the null, U distinct tokens of the background, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_ray.errors import UserError
from sae_ray.evidence.logit_lens import Unembedding

_BLOCK_ELEMENTS = 1 << 24
# Null latents compared to at most: enough for p-values of .002, and the work stays linear in the latents.
_NULLS = 512


@dataclass(frozen=True)
class LogitEffect:
    """auroc with its standard error over examples. null, null_std: of the same effect on other latents' tokens.
    score: auroc - null. p_value: (1 + others that do at least as well) / (1 + others). All NaN: no token follows."""

    latent: int
    auroc: float
    standard_error: float
    null: float
    null_std: float
    score: float
    p_value: float
    examples: int


def tokens_after(tokens_S: np.ndarray, acts_S: np.ndarray, span: int = 1, itself: bool = False) -> np.ndarray:
    """Token ids at most `span` positions behind an active one, each position once; -1 in tokens_S is padding.

    Args:
        itself: the active positions' own tokens too (what the latent occurs on, not only what it leads to).
    """
    active_S = np.asarray(acts_S) > 0
    reached_S = active_S.copy() if itself else np.zeros_like(active_S)
    for distance in range(1, span + 1):
        reached_S[distance:] |= active_S[:-distance]
    tokens = np.asarray(tokens_S)[reached_S]
    return tokens[tokens >= 0].astype(np.int64)


@torch.no_grad()
def logit_effects(
    W_dec_ND: torch.Tensor,
    unembedding: Unembedding,
    following: Sequence[Sequence[np.ndarray]],
    latents: Sequence[int] | None = None,
    seed: int = 0,
) -> list[LogitEffect]:
    """Of every row of W_dec_ND; the result is in their order, and a latent without tokens has NaN.

    Args:
        following: per latent and example the token ids that follow (`tokens_after`); examples weigh alike.
        latents: ids for the result; None numbers them.
        seed: of which latents are the null, where there are more than 512.
    Raises:
        UserError: the decoder's width is not the output layer's.
    """
    latents = range(len(W_dec_ND)) if latents is None else latents
    if not (len(W_dec_ND) == len(following) == len(latents)):
        raise ValueError(f"{len(W_dec_ND)} rows, tokens of {len(following)} latents, {len(latents)} ids")
    some = [[np.asarray(ids, dtype=np.int64) for ids in examples if len(ids)] for examples in following]
    known = [index for index, examples in enumerate(some) if examples]
    if W_dec_ND.shape[1] != unembedding.weight_VD.shape[1]:
        raise UserError(
            f"the decoder writes vectors of width {W_dec_ND.shape[1]}, the output layer reads "
            f"{unembedding.weight_VD.shape[1]}: no logit effects at this hook point"
        )
    nan = math.nan
    missing = [LogitEffect(int(latent), nan, nan, nan, nan, nan, nan, 0) for latent in latents]
    if len(known) < 2:
        return missing
    vocabulary_U, columns = _vocabulary([some[index] for index in known])
    background_U = sum(_share(examples, len(vocabulary_U)) for examples in columns) / len(columns)
    picked = np.random.default_rng(seed).permutation(len(known))[:_NULLS]
    share_UP = np.stack([_share(columns[row], len(vocabulary_U)) for row in picked], axis=1)
    out = missing
    block = max(1, _BLOCK_ELEMENTS // len(vocabulary_U))
    for first in range(0, len(known), block):
        rows = known[first : first + block]
        effect_nU = _effects(W_dec_ND[rows], unembedding, vocabulary_U)
        place_nU = _mid_ranks(effect_nU, torch.from_numpy(background_U)).numpy()
        null_nP = place_nU @ share_UP
        for row, index in enumerate(rows):
            means_E = np.array([place_nU[row, example].mean() for example in columns[first + row]])
            others = null_nP[row][picked != first + row]
            auroc, null = float(means_E.mean()), float(others.mean())
            error = float(means_E.std(ddof=1) / len(means_E) ** 0.5) if len(means_E) > 1 else math.nan
            at_least = int((others >= auroc - 1e-12).sum())
            out[index] = LogitEffect(
                int(latents[index]), auroc, error, null, float(others.std()), auroc - null,
                (1 + at_least) / (1 + len(others)), len(means_E),
            )  # fmt: skip
    return out


def _vocabulary(examples: list[list[np.ndarray]]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The tokens that occur, [U], and every example as places in them."""
    vocabulary_U = np.unique(np.concatenate([ids for some in examples for ids in some]))
    return vocabulary_U, [[np.searchsorted(vocabulary_U, ids) for ids in some] for some in examples]


def _share(examples: list[np.ndarray], n_tokens: int) -> np.ndarray:
    """One latent's distribution over the tokens, float64 [U]; the mean of its examples'."""
    share_U = np.zeros(n_tokens)
    for places in examples:
        np.add.at(share_U, places, 1 / (len(places) * len(examples)))
    return share_U


def _effects(rows_nD: torch.Tensor, unembedding: Unembedding, vocabulary_U: np.ndarray) -> torch.Tensor:
    """Effect on the logits of the tokens that occur, [n, U]. A constant over tokens changes no rank: not centred."""
    weight_UD = unembedding.weight_VD[torch.from_numpy(vocabulary_U)].float()
    rows_nD = rows_nD.to(weight_UD.device, torch.float32)
    if unembedding.centred:
        rows_nD = rows_nD - rows_nD.mean(dim=1, keepdim=True)
    return ((rows_nD * unembedding.norm_D.float()) @ weight_UD.T).cpu()


def _mid_ranks(effect_nU: torch.Tensor, background_U: torch.Tensor) -> torch.Tensor:
    """Share of the background with a smaller effect, plus half of that with an equal one: float64 [n, U]."""
    ordered_nU, order_nU = effect_nU.sort(dim=1)
    below_nU = torch.cat([torch.zeros(len(effect_nU), 1).double(), background_U[order_nU].cumsum(dim=1)], dim=1)
    first_nU = torch.searchsorted(ordered_nU, effect_nU.contiguous())
    last_nU = torch.searchsorted(ordered_nU, effect_nU.contiguous(), right=True)
    return (below_nU.gather(1, first_nU) + below_nU.gather(1, last_nU)) / 2
