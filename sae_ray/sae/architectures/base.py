"""What an architecture may leave out: the defaults of one that adds no parameters and no further loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae.activation import Active, Parameters, Regular, Slopes, StepContext, Target
from sae_ray.sae.encoder import Encoder
from sae_ray.sae.selection import Gate, SelectionCollectives

if TYPE_CHECKING:
    from sae_ray.config import SAEConfig
    from sae_ray.sae.inference import TrainedSAE


class Architecture:
    """Which latents are active and with which values, forward and backward. Parameters live with the trainer.

    Suffixes: B tokens of this process, m latents of this shard, M all latents, N active pairs.

    Attributes:
        name: what `sae.architecture` says.
        ranks: latents compete, k of them win: `sae.k` is exact, and activations cannot be rescaled one by one.
        lists_pairs: so few pairs are active that dp ranks exchange them instead of gradients.
        judged: judges may be asked about its latents (they need an activation that one latent's numbers decide).
    """

    name: ClassVar[str]
    ranks: ClassVar[bool] = False
    lists_pairs: ClassVar[bool] = True
    judged: ClassVar[bool] = True

    def __init__(self, cfg: SAEConfig):
        self.cfg = cfg

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        """Refuses settings that it cannot be trained with.

        Raises:
            ValueError: names the key.
        """

    @property
    def prefixes(self) -> list[int]:
        """Numbers of latents that must each reconstruct alone; just [d_sae] but for matryoshka."""
        return [self.cfg.d_sae]

    def new_parameters(self, m: int, dtype: torch.dtype, device: torch.device) -> Parameters:
        """What it adds to the encoder and decoder, each [m]."""
        return {}

    def start(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> None:
        """Sets its own parameters from the first batch, in place. Called by all ranks together."""

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        raise NotImplementedError

    def regularise(self, active: Active, context: StepContext, target: Target) -> Regular | None:
        """Its loss besides the reconstruction's, if it has one."""
        return None

    def backward(
        self, active: Active, d_f_N: torch.Tensor, d_gate_N: torch.Tensor | None, own: Parameters, context: StepContext
    ) -> Slopes:
        return Slopes(d_f_N, d_f_N, {})

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        """Active pairs at inference: must not depend on which other tokens share the batch."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the trained SAE, in one piece

    @staticmethod
    def trained(tensors: Parameters) -> tuple[torch.Tensor, Parameters]:
        """The threshold (0-dim, or [M]) and own parameters of a `TrainedSAE`, from a checkpoint's tensors."""
        return torch.zeros((), dtype=tensors["b_enc"].dtype), {}

    @classmethod
    def encode(cls, sae: TrainedSAE, pre_TM: torch.Tensor) -> torch.Tensor:
        """Activations [T, M], zero where inactive."""
        return cls.encode_alone(sae, pre_TM, slice(None))

    @classmethod
    def encode_alone(cls, sae: TrainedSAE, pre: torch.Tensor, latents: slice | int) -> torch.Tensor:
        """Activations of some latents, decided without the others. Of `pre`'s shape: [T, latents] or [T]."""
        threshold = sae.threshold.to(pre.dtype).expand(sae.d_sae)[latents]
        return torch.where(pre >= threshold, pre.relu(), 0)
