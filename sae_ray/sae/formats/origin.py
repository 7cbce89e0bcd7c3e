"""An SAE that a run fine-tuned, in the units of the SAE that it started from.

A trainer holds its SAE in its own input scale and, mostly, with unit decoder rows. Whoever brought an SAE along has
thresholds, notes and plots in that one's activations: in its units an export has its scales, its input bias and its
decoder norms again, and a run that moves nothing gives back the numbers that were read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sae_ray.sae.architectures import kind_of
from sae_ray.sae.formats.rewrite import recentred, rescaled, with_row_norms
from sae_ray.sae.inference import TrainedSAE


def in_units_of(sae: TrainedSAE, original: TrainedSAE, unit_rows: bool) -> TrainedSAE:
    """The same function as `sae` under the original's scales, input bias and, with `unit_rows`, decoder norms.

    Args:
        unit_rows: `sae` was trained with unit decoder rows. Else its rows are its own, and its activations are the
            original's already.
    """
    same = rescaled(sae, original.input_scale, original.output_scale)
    if sae.d_in == sae.d_out:
        same = recentred(same, original.subtract_b_dec)
    same = replace(same, input_norm=original.input_norm)
    if not unit_rows:
        return same
    norm_M = original.W_dec_MD.norm(dim=1)
    if kind_of(sae.architecture).ranks:
        # Latents that are ranked against each other are rescaled alike or not at all; the original's rows were equal.
        now = float(same.W_dec_MD.norm(dim=1).double().mean())
        return rescaled(same, same.input_scale, same.output_scale, now / float(norm_M.double().mean()))
    return with_row_norms(same, torch.where(norm_M > 0, norm_M, torch.ones_like(norm_M)))
