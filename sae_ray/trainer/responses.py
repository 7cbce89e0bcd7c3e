"""Blocks as a rank reads them, and what its shard's latents do on them. No communication: calls about evidence and the
windows may reach the ranks in different orders.

Suffixes: m latents of the shard, n or N some of them, T tokens, D d_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.activations.block import Block
from sae_ray.errors import UserError
from sae_ray.reward.evidence import ContextLayout, ContextScan, layout_contexts, max_per_context, scan_contexts
from sae_ray.reward.overlap import nearest_to
from sae_ray.sae.selection import select_above
from sae_ray.trainer.sharded_sae import ShardedTrainer

if TYPE_CHECKING:
    from sae_ray.reward.credit import LatentState

LATENTS_AT_ONCE = 4096  # whose pre-activations on a block, or decoder rows, are held

# ----------------------------------------------------------------------------- blocks


def fetch(references: list[Any]) -> list[Any]:
    """The objects behind references, blocks unpacked (zero-copy views of the object store)."""
    import ray

    values = [ray.get(item) if isinstance(item, ray.ObjectRef) else item for item in references]
    is_block = [isinstance(value, dict) and "acts" in value for value in values]
    return [Block.from_numpy_dict(value) if block else value for value, block in zip(values, is_block, strict=True)]


def activations(blocks: Sequence[Block], hooks: Sequence[str]) -> dict[str, torch.Tensor]:
    """All kept tokens' raw activations at some hook points, blocks in order: [T, D] each.

    Raises:
        UserError: a block holds a number that is not finite.
    """
    return {hook: torch.cat([_finite(block, hook) for block in blocks]) for hook in hooks}


def _finite(block: Block, hook: str) -> torch.Tensor:
    acts_TD = block.acts_TD(hook=hook)
    # One pass over the block in the usual case: a sum is finite only if every term is.
    if not torch.isfinite(acts_TD.sum(dtype=torch.float32)) and not torch.isfinite(acts_TD).all():
        bad = int((~torch.isfinite(acts_TD)).any(1).sum())
        raise UserError(
            f"block {block.block_id}: {bad} of {len(acts_TD)} tokens have activations at {hook} that are not "
            "finite; a float16 model overflows where bfloat16 or float32 does not (model.dtype)"
        )
    return acts_TD


def layout_of(blocks: Sequence[Block], context_tokens: int) -> ContextLayout:
    """Which context each kept token of `blocks` is in."""
    sequences, length = blocks[0].tokens_SL.shape
    return layout_contexts([(block.seq_T, block.pos_T) for block in blocks], sequences, length, context_tokens)


# ----------------------------------------------------------------------------- latents


def own_latents(trainer: ShardedTrainer, latents: list[int]) -> np.ndarray:
    """Ids int64 [n] of those of `latents` that this shard holds."""
    ids = np.asarray(latents, dtype=np.int64)
    return ids[(ids >= trainer.first_latent) & (ids < trainer.last_latent)]


def contexts_active(trainer: ShardedTrainer, acts_TD: torch.Tensor, layout: ContextLayout) -> torch.Tensor:
    """In how many contexts each latent of the shard is active: int64 [m]."""
    n_latents = len(trainer.b_enc_m)
    # The threshold gate, for topk too: its own selection would need a collective.
    rows_N, cols_N, _ = select_above(trainer.pre_activations(acts_TD), trainer.thresholds_m())
    pairs = layout.context_T[rows_N.cpu()] * n_latents + cols_N.cpu()
    return torch.bincount(torch.unique(pairs) % n_latents, minlength=n_latents)


def scan(
    trainer: ShardedTrainer, blocks: Sequence[Block], hook: str, context_tokens: int, own_n: np.ndarray
) -> ContextScan:
    """Responses of latents that this shard holds to every context of `blocks`, which are read one at a time."""
    rows = _rows(trainer, own_n)
    W_nD, b_n, threshold_n = (
        each_m[rows].cpu() for each_m in (trainer.W_enc_mD, trainer.b_enc_m, trainer.thresholds_m())
    )
    centre_D = _centre(trainer).cpu()
    act, margin, token, first = [], [], [], 0
    for block in blocks:
        x_TD = trainer.scaled(_finite(block, hook)).cpu()
        layout = layout_of([block], context_tokens)
        part = scan_contexts(x_TD, layout, own_n, W_nD, b_n, centre_D, threshold_n)
        act.append(part.act_CN)
        margin.append(part.margin_CN)
        # Counted over all blocks, but 0 where a context has no token.
        token.append(np.where(np.isneginf(part.margin_CN), 0, part.token_CN + np.int32(first)))
        first += len(x_TD)
    return ContextScan(part.latents, *(np.concatenate(parts) for parts in (act, margin, token)))


@torch.no_grad()
def firing(
    trainer: ShardedTrainer, blocks: Sequence[Block], hook: str, context_tokens: int, own_n: np.ndarray
) -> np.ndarray:
    """In which contexts of `blocks` latents that this shard holds are active: bits, uint8 [n, C / 8 rounded up].

    2 T d_in FLOPs a latent, on the trainer's device; a byte for each context and latent is held.
    """
    rows, device = _rows(trainer, own_n), trainer.mesh.device
    W_nD, threshold_n = trainer.W_enc_mD[rows], trainer.thresholds_m()[rows]
    b_n, fires = trainer.b_enc_m[rows] - W_nD @ _centre(trainer), []
    for block in blocks:
        x_TD = trainer.scaled(_finite(block, hook))
        layout = layout_of([block], context_tokens)
        layout = replace(layout, context_T=layout.context_T.to(device))
        fires_Cn = np.empty((layout.n_contexts, len(own_n)), dtype=bool)
        for start in range(0, len(own_n), LATENTS_AT_ONCE):
            some = slice(start, start + LATENTS_AT_ONCE)
            best_Cn = max_per_context(torch.addmm(b_n[some], x_TD, W_nD[some].T), layout)
            fires_Cn[:, some] = ((best_Cn >= threshold_n[some]) & (best_Cn > 0)).cpu().numpy()
        fires.append(fires_Cn)
    return np.packbits(np.concatenate(fires).T, axis=1)


def scaled_inputs(trainer: ShardedTrainer, blocks: Sequence[Block], hook: str) -> torch.Tensor:
    """[T, d_in] on the trainer's device: all tokens of `blocks`, in order, held once.

    Raises:
        UserError: a block holds a number that is not finite.
    """
    sizes = [block.n_tokens for block in blocks]
    x_TD = torch.empty(sum(sizes), trainer.d_in, dtype=trainer.dtype, device=trainer.mesh.device)
    for block, part_TD in zip(blocks, x_TD.split(sizes), strict=True):
        part_TD.copy_(trainer.scaled(_finite(block, hook)))
    return x_TD


def decoder_rows(trainer: ShardedTrainer, own_n: np.ndarray) -> np.ndarray:
    """[n, D] of latents that this shard holds."""
    rows_nD: np.ndarray = trainer.W_dec_mD[_rows(trainer, own_n)].cpu().numpy()
    return rows_nD


def nearest_latents(
    trainer: ShardedTrainer, latents: list[int], rows_ND: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, cosines float32), [N, n] each: the latents of this shard whose decoder rows lie closest to given
    ones of the whole SAE, see `overlap.nearest_to`. 2 N m D FLOPs, on the trainer's device."""
    ids, shard = np.asarray(latents, dtype=np.int64), (trainer.first_latent, trainer.W_dec_mD)
    found = []
    for start in range(0, len(ids), LATENTS_AT_ONCE):
        some = slice(start, start + LATENTS_AT_ONCE)
        wanted_ND = torch.from_numpy(rows_ND[some]).to(trainer.W_dec_mD.device)
        found.append(nearest_to(wanted_ND, ids[some], [shard], n))
    return np.concatenate([near.id_mn for near in found]), np.concatenate([near.cosine_mn for near in found])


def unit_rows(trainer: ShardedTrainer, own_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit encoder and decoder rows of latents that this shard holds, float16 [n, D] each."""
    rows = _rows(trainer, own_n)
    encoder, decoder = (
        F.normalize(W_mD[rows].float(), dim=1).half().cpu().numpy() for W_mD in (trainer.W_enc_mD, trainer.W_dec_mD)
    )
    return encoder, decoder


def latent_state(trainer: ShardedTrainer, own_n: np.ndarray, x_TD: torch.Tensor) -> LatentState:
    """What a credit is fitted to: latents that this shard holds, and the units of their gates.

    Args:
        x_TD: scaled inputs.
    """
    from sae_ray.reward.credit import LatentState, gate_units, projections

    rows, centre_D = _rows(trainer, own_n), _centre(trainer).clone()
    W_ND, b_N, units_N = trainer.W_enc_mD[rows], trainer.b_enc_m[rows], trainer.thresholds_m()[rows].clone()
    if not bool((units_N > 0).all()):
        units_N = gate_units(units_N, projections(x_TD, centre_D, W_ND).add_(b_N))
    W_dec_ND = None if trainer.transcodes else trainer.W_dec_mD[rows]
    return LatentState(W_ND, b_N, centre_D, units_N, W_dec_ND)


def _rows(trainer: ShardedTrainer, own_n: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(own_n - trainer.first_latent).to(trainer.b_enc_m.device)


def _centre(trainer: ShardedTrainer) -> torch.Tensor:
    """[d_in], what the encoder subtracts from a scaled input."""
    return trainer.b_dec_D if trainer.subtract_b_dec else trainer.W_enc_mD.new_zeros(trainer.d_in)
