"""A trained SAE in one piece, for evaluation, explanation and export. No process group, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_ray.sae.architectures import architecture
from sae_ray.sae.selection import Alone


@dataclass(frozen=True)
class TrainedSAE:
    """Takes and gives raw activations; the input scale is applied and undone inside.

    threshold: 0-dim (BatchTopK's running one) or [M] (an imported JumpReLU). input_scale: x = raw * scale.
    """

    W_enc_MD: torch.Tensor
    W_dec_MD: torch.Tensor
    b_enc_M: torch.Tensor
    b_dec_D: torch.Tensor
    threshold: torch.Tensor
    architecture: str
    k: int
    input_scale: float = 1.0

    @classmethod
    def from_checkpoint(cls, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> TrainedSAE:
        """From what `trainer.checkpoint.load_full` returns."""
        return cls(
            tensors["W_enc"],
            tensors["W_dec"],
            tensors["b_enc"],
            tensors["b_dec"],
            tensors["threshold"],
            manifest["architecture"],
            int(manifest["k"]),
            float(manifest["input_scale"]),
        )

    @property
    def d_sae(self) -> int:
        return self.W_enc_MD.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc_MD.shape[1]

    def to(self, device: torch.device | str) -> TrainedSAE:
        own = vars(self).items()
        tensors: dict[str, Any] = {name: value.to(device) for name, value in own if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def pre_activations(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """[T, M], before the gate."""
        x_TD = raw_TD.to(self.W_enc_MD) * self.input_scale
        return torch.addmm(self.b_enc_M, x_TD - self.b_dec_D, self.W_enc_MD.T)

    @torch.no_grad()
    def encode(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """Activations [T, M], zero where inactive; a token's do not depend on the other tokens."""
        pre_TM = self.pre_activations(raw_TD)
        gate = architecture(self.architecture, self.k).infer_gate(pre_TM, self.threshold.to(pre_TM.dtype), Alone())
        f_TM = torch.zeros_like(pre_TM)
        f_TM[gate.rows_N, gate.cols_N] = pre_TM[gate.rows_N, gate.cols_N]
        return f_TM

    @torch.no_grad()
    def encode_latent(self, raw_TD: torch.Tensor, latent: int) -> torch.Tensor:
        """Activations [T] of one latent under the threshold gate."""
        x_TD = raw_TD.to(self.W_enc_MD) * self.input_scale
        pre_T = (x_TD - self.b_dec_D) @ self.W_enc_MD[latent] + self.b_enc_M[latent]
        threshold = self.threshold.to(pre_T.dtype).expand(self.d_sae)[latent]
        return torch.where(pre_T >= threshold, pre_T.relu(), 0)

    @torch.no_grad()
    def decode(self, f_TM: torch.Tensor) -> torch.Tensor:
        """Raw activations [T, D] that the latents' activations stand for."""
        return (f_TM @ self.W_dec_MD + self.b_dec_D) / self.input_scale

    def reconstruct(self, raw_TD: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(raw_TD))
