"""Resampling of dead latents (Bricken et al., 2023): they start anew on tokens that are reconstructed badly.

Tokens are drawn with probability proportional to their squared error, from a generator seeded by (seed, step), over the
global batch: every mesh draws the same. A latent's new decoder row is its token's direction, its encoder row that
direction at a fifth of the mean norm of the living encoder rows, its moments are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import ShardedTrainer

ENCODER_SHARE = 0.2


def resample(trainer: ShardedTrainer, x_bD: torch.Tensor, error_bO: torch.Tensor, n_tokens: int) -> int:
    """Restarts dead latents, at most one per token of the batch; returns how many of all shards."""
    coll = trainer.collectives
    loss_B = coll.gather_dp_rows(error_bO.double().square().sum(1), n_tokens)
    count = min(trainer.n_dead, int((loss_B > 0).sum()))
    if not count:
        return 0
    generator = torch.Generator().manual_seed((trainer.seed * 1_000_003 + trainer.steps_done) % 2**63)
    tokens_n = torch.multinomial(loss_B.cpu(), count, replacement=False, generator=generator).to(x_bD.device)
    own, place_n = _own_places(trainer, count)
    first = coll.mesh.rows(n_tokens)[0]
    encoder_nD = _vectors(trainer, trainer._encoder(x_bD).centred_BD, tokens_n, first)
    decoder_nO = encoder_nD
    if trainer.transcodes:
        # There is no input-sized target direction: a transcoder's new rows write the error that was left.
        decoder_nO = _vectors(trainer, -error_bO, tokens_n, first)
    norm_m = torch.linalg.vector_norm(trainer.W_enc_mD, dim=1)
    living = torch.stack([norm_m[~trainer.dead_m].sum(), (~trainer.dead_m).sum().to(norm_m.dtype)])
    total, number = coll.sum_tp(living).unbind()
    size = ENCODER_SHARE * total / number.clamp(min=1)
    trainer.W_enc_mD[own] = _unit(encoder_nD[place_n]) * size
    trainer.W_dec_mD[own] = _unit(decoder_nO[place_n])
    trainer.b_enc_m[own] = 0
    trainer.silent_m[own] = 0
    trainer.optimiser.forget(own, ("W_enc", "W_dec", "b_enc"))
    trainer._find_dead()
    return count


def _own_places(trainer: ShardedTrainer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This shard's latents among the first `count` dead ones in order of latent, and their places among them."""
    dead = torch.nonzero(trainer.dead_m).view(-1)
    numbers = trainer.collectives.gather_tp(torch.tensor([len(dead)], device=dead.device)).view(-1)
    before = int(numbers[: trainer.mesh.tp_rank].sum())
    place_n = torch.arange(before, before + len(dead), device=dead.device)
    keep = place_n < count
    return dead[keep], place_n[keep]


def _vectors(trainer: ShardedTrainer, rows_bX: torch.Tensor, tokens_n: torch.Tensor, first: int) -> torch.Tensor:
    """The vectors of global tokens, from whichever dp rank holds them."""
    out_nX = rows_bX.new_zeros(len(tokens_n), rows_bX.shape[1])
    here = (tokens_n >= first) & (tokens_n < first + len(rows_bX))
    out_nX[here] = rows_bX[tokens_n[here] - first]
    return trainer.collectives.sum_dp(out_nX)


def _unit(rows_nX: torch.Tensor) -> torch.Tensor:
    return rows_nX / torch.linalg.vector_norm(rows_nX, dim=1, keepdim=True).clamp(min=1e-12)
