"""Whether an imported SAE can be trained on under a run's `sae` section, and in which form."""

from __future__ import annotations

from sae_ray.config import SAEConfig
from sae_ray.errors import UserError
from sae_ray.sae.formats.rewrite import recentred, rescaled, with_unit_rows
from sae_ray.sae.inference import TrainedSAE

UNIT_TOLERANCE = 1e-3


def check_fits(sae: TrainedSAE, cfg: SAEConfig, d_in: int | None, d_out: int | None = None) -> TrainedSAE:
    """Refuses an SAE that `sae.init_from` cannot start this training from.

    Args:
        d_in: width of the hook point; None where it is not known yet.
        d_out: width of a transcoder's output hook point; None if it is no transcoder.
    Returns:
        The same function in the form that the trainer keeps: b_dec subtracted or not as `cfg.subtract_b_dec` says
        (never by a transcoder), decoder rows of unit norm if `cfg.decoder_norm` is unit. Its scales are its own.
    Raises:
        UserError: names the file, the key and what to write.
    """
    where = f"sae.init_from {cfg.init_from}"
    if sae.architecture != cfg.architecture:
        raise UserError(
            f"{where}: is a {sae.architecture}, sae.architecture is {cfg.architecture}; "
            f"write sae.architecture: {sae.architecture}"
        )
    if sae.d_sae != cfg.d_sae:
        raise UserError(f"{where}: has {sae.d_sae} latents, sae.d_sae is {cfg.d_sae}; write sae.d_sae: {sae.d_sae}")
    if cfg.architecture == "topk" and sae.k != cfg.k:
        raise UserError(f"{where}: has k {sae.k}, sae.k is {cfg.k}; write sae.k: {sae.k}")
    if d_in is not None and sae.d_in != d_in:
        raise UserError(f"{where}: reads activations of width {sae.d_in}, the hook point's is {d_in}")
    target = d_out if d_out is not None else d_in
    if target is not None and sae.d_out != target:
        raise UserError(f"{where}: reconstructs activations of width {sae.d_out}, the hook point's is {target}")
    if d_out is None and sae.is_transcoder:
        raise UserError(f"{where}: is a transcoder; name the hook point that it reconstructs under hook_out")
    if sae.d_in == sae.d_out:
        sae = recentred(sae, cfg.subtract_b_dec and d_out is None)
    return sae if cfg.decoder_norm == "free" else _unit(sae, where)


def _unit(sae: TrainedSAE, where: str) -> TrainedSAE:
    norm_M = sae.W_dec_MD.norm(dim=1)
    live = norm_M[norm_M > 0]
    if not len(live):
        raise UserError(f"{where}: its decoder is 0 everywhere")
    low, high = float(live.min()), float(live.max())
    if len(live) == len(norm_M) and high - low <= UNIT_TOLERANCE * high:
        if abs(low - 1) <= UNIT_TOLERANCE and abs(high - 1) <= UNIT_TOLERANCE:
            return sae
        # One norm for all: another scale of the inputs makes it 1 and changes no activation.
        scale = float(norm_M.double().mean())
        output_scale = None if sae.output_scale is None else sae.output_scale / scale
        return rescaled(sae, sae.input_scale / scale, output_scale)
    if sae.architecture in ("relu_l1", "jumprelu", "gated"):
        return with_unit_rows(sae)
    raise UserError(
        f"{where}: the norms of its decoder's rows lie from {low:.3g} to {high:.3g}, and {sae.architecture} ranks "
        "latents, so that they cannot be made 1 without changing it; write sae.decoder_norm: free"
    )
