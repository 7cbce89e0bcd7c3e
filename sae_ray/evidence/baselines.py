"""What an SAE has to beat: the language model's own neurons, made to fire as rarely as the SAE's latents do.

A neuron is one coordinate of the raw activations at the hook point: of the residual stream, or of what the MLP reads or
writes. Raw coordinates are dense, and whether texts are told apart depends on how often something fires; so each neuron
gets a threshold at which it fires with a density that some latent has, and the comparison is at equal density.

Suffixes: T tokens, D width of the hook point, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from sae_ray.config import HookConfig

Transform = Literal["relu", "abs", "shift"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)


class NeuronSource:
    """A `LatentSource` of neurons x under one transform, each firing on `densities` of the tokens.

        relu   fires where x > t, with activation x; t >= 0
        abs    fires where |x| > t, with activation |x|
        shift  fires where x + c > 0, with activation x + c

    relu cannot fire more often than x is positive: there its density is what it can have (see `achieved`). abs and
    shift have any density. Thresholds come from the first batch seen, or from `calibrate`; later batches do not move
    them, so everyone who must agree on what fires is given the same calibrated source.

    Args:
        neurons: coordinates of the hook point, int [N]; they are the latents' ids.
        densities: share of tokens that each fires on, [N], each above 0 and below 1.
        site: what the hook point is, for `kind`: "residual" or "mlp" (see `site_name`).
    Raises:
        ValueError: densities are not one per neuron or not between 0 and 1, or there is no such transform.
    """

    def __init__(
        self,
        neurons: Sequence[int] | np.ndarray,
        transform: Transform,
        densities: Sequence[float] | np.ndarray,
        site: str = "residual",
    ) -> None:
        self._neurons = np.asarray(neurons, dtype=np.int64)
        self._densities = np.asarray(densities, dtype=np.float64)
        if transform not in TRANSFORMS:
            raise ValueError(f"transform {transform!r} is unknown; known: {', '.join(TRANSFORMS)}")
        if self._densities.shape != self._neurons.shape or self._neurons.ndim != 1:
            raise ValueError(f"densities {self._densities.shape} are not one per neuron {self._neurons.shape}")
        if not ((self._densities > 0) & (self._densities < 1)).all():
            raise ValueError("densities must lie above 0 and below 1")
        self._transform: Transform = transform
        self._site = site
        self._threshold_N: torch.Tensor | None = None
        self.achieved: np.ndarray = np.full(len(self._neurons), np.nan)
        """Density on the batch that calibrated, [N]; NaN before."""

    @property
    def kind(self) -> str:
        return f"{self._site} {self._transform}"

    @property
    def latents(self) -> np.ndarray:
        return self._neurons

    @property
    def threshold_N(self) -> torch.Tensor:
        """float32 [N], what the transformed x is compared with (shift: -c)."""
        if self._threshold_N is None:
            raise RuntimeError(f"{self.kind}: has seen no batch that would calibrate it")
        return self._threshold_N

    def calibrate(self, raw_TD: torch.Tensor) -> NeuronSource:
        """Set the thresholds from a sample of raw activations. Returns itself."""
        size_TN = self._size(raw_TD)
        threshold_N = density_threshold(size_TN.cpu().numpy(), self._densities)
        if self._transform == "relu":
            threshold_N = np.maximum(threshold_N, 0)
        self._threshold_N = torch.from_numpy(threshold_N)
        self.achieved = (size_TN > self._threshold_N.to(size_TN.device)).double().mean(0).cpu().numpy()
        return self

    def activations(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(activations, margins) [T, N] float32; the first batch calibrates where `calibrate` did not."""
        if self._threshold_N is None:
            self.calibrate(raw_TD)
        size_TN = self._size(raw_TD)
        margin_TN = size_TN - self.threshold_N.to(size_TN.device)
        value_TN = margin_TN if self._transform == "shift" else size_TN
        return torch.where(margin_TN > 0, value_TN, 0), margin_TN

    def _size(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """[T, N] float32, what is compared with the threshold."""
        x_TN = raw_TD[:, torch.from_numpy(self._neurons).to(raw_TD.device)].float()
        return x_TN.abs() if self._transform == "abs" else x_TN


def density_threshold(size_TN: np.ndarray, densities: Sequence[float] | np.ndarray) -> np.ndarray:
    """Thresholds float32 [N] that `densities[j]` of column j's values lie strictly above, as nearly as ties allow.

    At least one token is above each, so that a rare neuron is rare and not dead.
    """
    n_tokens = len(size_TN)
    ordered_TN = np.sort(size_TN.astype(np.float32), axis=0)
    threshold_N = np.empty(ordered_TN.shape[1], dtype=np.float32)
    for column, density in enumerate(np.asarray(densities, dtype=np.float64)):
        values = ordered_TN[:, column]
        wanted = min(max(1, round(density * n_tokens)), n_tokens)
        edge = values[n_tokens - wanted]  # the smallest value that should fire
        below = int(np.searchsorted(values, edge, "left"))
        above = int(np.searchsorted(values, edge, "right"))
        fires_with_ties, fires_without = n_tokens - below, n_tokens - above
        if fires_without and abs(fires_without - wanted) < abs(fires_with_ties - wanted):
            threshold_N[column] = edge
        else:
            lower = values[below - 1] if below else edge - 1
            middle = (lower + edge) / 2
            # Between neighbouring floats there is no middle; the comparison is strict, so the lower one will do.
            threshold_N[column] = middle if middle < edge else lower
    return threshold_N


def neuron_sources(
    width: int, n: int, latent_densities: Sequence[float] | np.ndarray, site: str, seed: int
) -> list[NeuronSource]:
    """The same n random neurons under each transform, with densities drawn from those of an SAE's latents.

    Args:
        width: D, of the hook point. Fewer than n neurons are all taken.
        latent_densities: of the latents that were judged; those that are 0 or 1 are left out.
    Raises:
        ValueError: no latent has a density between 0 and 1.
    """
    usable = np.asarray(latent_densities, dtype=np.float64)
    usable = usable[(usable > 0) & (usable < 1)]
    if not len(usable):
        raise ValueError("no latent has a density between 0 and 1 that neurons could be given")
    rng = np.random.default_rng(seed)
    neurons = np.sort(rng.choice(width, size=min(n, width), replace=False))
    densities = rng.choice(usable, size=len(neurons))
    return [NeuronSource(neurons, transform, densities, site) for transform in TRANSFORMS]


def site_name(hook: HookConfig) -> str:
    """ "residual", "mlp" or "attention": whose coordinates a hook point's are."""
    return {"resid": "residual", "mlp": "mlp", "attn": "attention"}[hook.site.split("_")[0]]
