"""Starting from an SAE that someone trained: its numbers, in this run's input scale and with this run's row norms.

A latent's activation may be rescaled if its encoder row, bias and threshold grow by what its decoder row shrinks;
the SAE stays the same function. That is how unit decoder rows are reached. Where latents are ranked against each
other (`Architecture.ranks`) all of them must be rescaled alike, or the ranking would change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_ray.errors import UserError
from sae_ray.sae.inference import TrainedSAE

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import ShardedTrainer

EQUAL_NORMS = 1e-3  # relative spread of decoder norms that counts as rounding


def warm_start(trainer: ShardedTrainer, sae: TrainedSAE) -> None:
    """Copies this shard's rows of `sae`; the trainer has measured its scales.

    Raises:
        UserError: its shape or architecture is not the trainer's, or its decoder norms cannot be made 1.
    """
    name = f"sae.init_from {trainer.sae.init_from}"
    shape, wanted = (sae.d_in, sae.W_dec_MD.shape[1], sae.d_sae), (trainer.d_in, trainer.d_out, trainer.sae.d_sae)
    if shape != wanted:
        raise UserError(f"{name}: has (d_in, d_out, d_sae) = {shape}, this run's are {wanted}")
    if sae.architecture != trainer.sae.architecture:
        raise UserError(f"{name}: is a {sae.architecture} SAE, sae.architecture is {trainer.sae.architecture}")
    rows = slice(trainer.first_latent, trainer.last_latent)
    theirs_out = sae.input_scale if sae.output_scale is None else sae.output_scale
    into, out = sae.input_scale / trainer.input_scale, trainer.output_scale / theirs_out
    W_dec_MO = sae.W_dec_MD.double() * out
    size_M = _row_scales(trainer, W_dec_MO, name)
    size_m = size_M[rows]
    trainer.W_enc_mD.copy_(sae.W_enc_MD[rows].double() * into * size_m[:, None])
    trainer.b_enc_m.copy_(sae.b_enc_M[rows].double() * size_m)
    trainer.W_dec_mD.copy_(W_dec_MO[rows] / size_m[:, None])
    trainer.b_dec_D.copy_(sae.b_dec_D.double() * out)
    if trainer.subtract_b_dec != sae.subtract_b_dec:
        # pre = W(x - b_dec) + b_enc and pre = W x + b_enc differ by a constant per latent.
        shift_m = trainer.W_enc_mD @ trainer.b_dec_D
        trainer.b_enc_m.add_(shift_m if trainer.subtract_b_dec else -shift_m)
    threshold_M = sae.threshold.double().expand(sae.d_sae) * size_M
    if "theta" in trainer.own:
        trainer.own["theta"].copy_(threshold_M[rows])
    elif trainer.architecture.ranks:
        trainer.threshold.copy_(threshold_M.mean())
    if "b_mag" in sae.own:
        trainer.own["r_mag"].copy_(sae.own["r_mag"][rows])
        trainer.own["b_mag"].copy_(sae.own["b_mag"][rows].double() * size_m)


def _row_scales(trainer: ShardedTrainer, W_dec_MO: torch.Tensor, name: str) -> torch.Tensor:
    """What each latent's activation is multiplied by, [M]: its decoder row's norm, or 1 if norms are free."""
    norm_M = W_dec_MO.norm(dim=1)
    if trainer.sae.decoder_norm == "free":
        return torch.ones_like(norm_M)
    if float(norm_M.min()) == 0:
        raise UserError(f"{name}: latent {int(norm_M.argmin())} has a decoder row of zeros; set sae.decoder_norm: free")
    spread = float((norm_M.max() - norm_M.min()) / norm_M.mean())
    if trainer.architecture.ranks:
        if spread > EQUAL_NORMS:
            raise UserError(
                f"{name}: its decoder rows have norms from {float(norm_M.min()):.3g} to {float(norm_M.max()):.3g}, and "
                f"{trainer.sae.architecture} ranks latents by activation: set sae.decoder_norm: free to keep them"
            )
        return norm_M.mean().expand_as(norm_M)
    return norm_M
