"""What evidence is collected of: latents of a trained SAE, and random directions that fire as often.

Suffixes: T tokens, N the source's latents, M all latents of the SAE, D width of the hook point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_ray.errors import UserError
from sae_ray.sae.architectures import kind_of
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.architectures.batchtopk import BatchTopK
from sae_ray.sae.architectures.gated import Gated
from sae_ray.sae.encoder import top_of
from sae_ray.sae.inference import TrainedSAE

CHUNK_ELEMENTS = 1 << 22  # of a [T, latents] product: 16 MB in float32, twice that with its temporaries
CHUNK_TOKENS = 64  # at least so many: a product of fewer rows reads all of W_enc for little


class SAELatents:
    """Some latents of an SAE, as `TrainedSAE.encode` activates them.

    Where one latent's numbers decide whether it is active (relu_l1, jumprelu, gated, batchtopk, matryoshka), only
    the rows of `latents` are multiplied. Under topk latents compete, so all of them are encoded and the wanted ones
    are taken; its margin is the pre-activation minus the token's own k-th largest one (less `sae.margin`), not minus
    the running threshold: that is what the latent would have had to reach on this token, so its sign says whether
    the latent is active, and the near misses are those that lost narrowly.

    gated: active means that the gate's path and the magnitude's are both positive; the margin is the smaller.

    Args:
        latents: ids; None is all of them.
    Raises:
        UserError: a latent that the SAE does not have, or one named twice.
    """

    kind = "latent"

    def __init__(self, sae: TrainedSAE, latents: Sequence[int] | np.ndarray | None = None) -> None:
        ids = np.arange(sae.d_sae) if latents is None else np.asarray(latents, dtype=np.int64).reshape(-1)
        if not len(ids):
            raise UserError("latents: none is named")
        if ids.min() < 0 or ids.max() >= sae.d_sae:
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"latents: {wrong} is not one of this SAE's, 0 to {sae.d_sae - 1}")
        if len(np.unique(ids)) < len(ids):
            raise UserError("latents: one is named twice")
        self._latents = ids.astype(np.int64)
        self._all = len(ids) == sae.d_sae and bool((ids == np.arange(len(ids))).all())
        self._kind = kind_of(sae.architecture)
        self._alone = _decides_alone(self._kind)
        self._sae = sae if self._all or not self._alone else _restricted(sae, torch.from_numpy(self._latents))

    @property
    def latents(self) -> np.ndarray:
        return self._latents

    @torch.no_grad()
    def activations(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `evidence.types.LatentSource`. Memory beyond the two results is bounded whatever T is."""
        rows = max(CHUNK_TOKENS, CHUNK_ELEMENTS // self._sae.d_sae)
        if len(raw_TD) <= rows:
            return self._chunk(raw_TD)
        f_TN = torch.empty(len(raw_TD), len(self._latents), device=self._sae.W_enc_MD.device)
        margin_TN = torch.empty_like(f_TN)
        for first in range(0, len(raw_TD), rows):
            f_TN[first : first + rows], margin_TN[first : first + rows] = self._chunk(raw_TD[first : first + rows])
        return f_TN, margin_TN

    def _chunk(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sae = self._sae
        pre_TM = sae.pre_activations(raw_TD.to(sae.W_enc_MD.device))
        f_TM = self._kind.encode(sae, pre_TM)
        margin_TM = self._margin(pre_TM)
        if not self._alone and not self._all:
            wanted = torch.from_numpy(self._latents).to(pre_TM.device)
            f_TM, margin_TM = f_TM[:, wanted], margin_TM[:, wanted]
        return f_TM.float(), margin_TM.float()

    def _margin(self, pre_TM: torch.Tensor) -> torch.Tensor:
        """May overwrite `pre_TM`."""
        sae = self._sae
        if not self._alone:
            kth_T1 = top_of(pre_TM, min(sae.k, pre_TM.shape[1]))[0][:, -1:]  # 0 where fewer than k are positive
            return pre_TM.sub_((kth_T1 - sae.margin).clamp(min=0))
        if issubclass(self._kind, Gated):
            magnitude_TM = (pre_TM - sae.b_enc_M) * sae.own["r_mag"].exp() + sae.own["b_mag"]
            return torch.minimum(pre_TM, magnitude_TM)
        # No latent is active at or below 0, whatever its threshold.
        return pre_TM.sub_(sae.threshold.to(pre_TM.dtype).clamp(min=0))


class RandomDirections:
    """Unit vectors in random directions, each firing on the share of tokens that it is told to: the null of any
    claim that an SAE's latents mean more than directions of the space do.

    A direction's pre-activation is its product with the input minus the mean input; it is active above its
    threshold, with that pre-activation as its activation (less a threshold that is below 0, so that activations
    are positive). Its id is its place in `densities`.

    Args:
        calibration_TD: raw activations of a first block; thresholds are set where `densities` of its tokens pass
            (at least one token: so densities below 1/T cannot be told apart).
        densities: share of tokens that each direction is to fire on, in (0, 1).
    Raises:
        UserError: a density outside (0, 1).
    """

    kind = "random_direction"

    def __init__(self, calibration_TD: torch.Tensor, densities: Sequence[float] | np.ndarray, seed: int = 0) -> None:
        share_N = np.asarray(densities, dtype=np.float64).reshape(-1)
        if not len(share_N) or not ((share_N > 0) & (share_N < 1)).all():
            raise UserError("densities of random directions: at least one, each above 0 and below 1")
        x_TD = calibration_TD.float()
        generator = torch.Generator().manual_seed(seed)
        directions_ND = torch.randn(len(share_N), x_TD.shape[1], generator=generator).to(x_TD.device)
        self.directions_ND = torch.nn.functional.normalize(directions_ND, dim=1)
        self.mean_D = x_TD.mean(0)
        self._offset_N = self.directions_ND @ self.mean_D
        n_active_N = np.clip(np.round(share_N * len(x_TD)), 1, max(1, len(x_TD) - 1)).astype(np.int64)
        self.threshold_N = torch.empty(len(share_N), device=x_TD.device)
        for first in range(0, len(share_N), 64):
            rows = slice(first, first + 64)
            ordered_TN = self._pre(x_TD, rows).sort(dim=0, descending=True).values
            last_N = torch.from_numpy(np.minimum(n_active_N[rows], len(x_TD) - 1)).to(x_TD.device)
            self.threshold_N[rows] = ordered_TN.gather(0, last_N[None])[0]

    @property
    def latents(self) -> np.ndarray:
        return np.arange(len(self.directions_ND), dtype=np.int64)

    @torch.no_grad()
    def activations(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre_TN = self._pre(raw_TD.to(self.mean_D), slice(None))
        margin_TN = pre_TN - self.threshold_N
        return torch.where(margin_TN > 0, pre_TN - self.threshold_N.clamp(max=0), 0), margin_TN

    def _pre(self, x_TD: torch.Tensor, rows: slice) -> torch.Tensor:
        return torch.addmm(-self._offset_N[rows], x_TD, self.directions_ND[rows].T)


def _decides_alone(kind: type[Architecture]) -> bool:
    """Whether one latent's numbers decide if it is active: so for every `encode` that is known to be of that sort;
    an architecture with one of its own is taken to need all latents."""
    known = (Architecture.encode.__func__, BatchTopK.encode.__func__)  # type: ignore[attr-defined]
    return kind.encode.__func__ in known  # type: ignore[attr-defined]


def _restricted(sae: TrainedSAE, latents_N: torch.Tensor) -> TrainedSAE:
    """The same SAE with only these latents."""
    latents_N = latents_N.to(sae.W_enc_MD.device)
    return replace(
        sae,
        W_enc_MD=sae.W_enc_MD[latents_N],
        W_dec_MD=sae.W_dec_MD[latents_N],
        b_enc_M=sae.b_enc_M[latents_N],
        threshold=sae.threshold.expand(sae.d_sae)[latents_N] if sae.threshold.dim() else sae.threshold,
        own={name: value[latents_N] for name, value in sae.own.items()},
    )
