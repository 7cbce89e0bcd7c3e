"""A trained SAE or transcoder in one piece, for evaluation, explanation and export. No process group, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sae_ray.sae.activation import Parameters
from sae_ray.sae.architectures import kind_of


@dataclass(frozen=True)
class TrainedSAE:
    """Takes and gives raw activations; the scales are applied and undone inside.

        x = raw * input_scale;  c = x - b_dec if subtract_b_dec else x;  pre = c @ W_enc.T + b_enc
        reconstruction = (f @ W_dec + b_dec) / output_scale

    Suffixes: D d_in, O d_out (equal to d_in unless it is a transcoder), M d_sae.

    threshold: 0-dim (the running one of the topk family; 0 where the gate has none) or [M] (jumprelu: a latent
    passes strictly above it). k: 0 where it is not known. output_scale: None is input_scale. own: what the
    architecture adds, [M] each (gated: r_mag and b_mag).
    """

    W_enc_MD: torch.Tensor
    W_dec_MD: torch.Tensor  # [M, O]
    b_enc_M: torch.Tensor
    b_dec_D: torch.Tensor  # [O]
    threshold: torch.Tensor
    architecture: str
    k: int
    input_scale: float = 1.0
    output_scale: float | None = None
    subtract_b_dec: bool = True
    own: Parameters = field(default_factory=dict)
    margin: float = 0.0
    input_norm: str = "none"

    @classmethod
    def from_checkpoint(cls, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> TrainedSAE:
        """From what `trainer.checkpoint.load_full` returns."""
        threshold, own = kind_of(manifest["architecture"]).trained(tensors)
        output_scale = manifest.get("output_scale")
        return cls(
            tensors["W_enc"],
            tensors["W_dec"],
            tensors["b_enc"],
            tensors["b_dec"],
            threshold,
            manifest["architecture"],
            int(manifest["k"]),
            float(manifest["input_scale"]),
            None if output_scale is None else float(output_scale),
            bool(manifest.get("subtract_b_dec", True)),
            own,
            float(manifest.get("margin", 0.0)),
            manifest.get("input_norm", "none"),
        )

    @property
    def d_sae(self) -> int:
        return self.W_enc_MD.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc_MD.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec_MD.shape[1]

    @property
    def reconstruction_scale(self) -> float:
        """What a decoded vector is divided by to become a raw activation."""
        return self.input_scale if self.output_scale is None else self.output_scale

    @property
    def is_transcoder(self) -> bool:
        """Whether the numbers alone say so; one between equal widths and scales differs only by its hook points."""
        return self.d_out != self.d_in or self.reconstruction_scale != self.input_scale

    @property
    def centre_D(self) -> torch.Tensor:
        """[d_in], what the encoder subtracts from a scaled input."""
        return self.b_dec_D if self.subtract_b_dec else torch.zeros_like(self.W_enc_MD[0])

    def to(self, device: torch.device | str) -> TrainedSAE:
        own = vars(self).items()
        tensors: dict[str, Any] = {name: value.to(device) for name, value in own if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, own={name: value.to(device) for name, value in self.own.items()})

    def centred(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """[T, D], what the encoder's rows are multiplied with."""
        x_TD = raw_TD.to(self.W_enc_MD) * self.input_scale
        return x_TD - self.b_dec_D if self.subtract_b_dec else x_TD

    def pre_activations(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """[T, M], what the gate decides on (gated: the gate's path, not the magnitude's)."""
        return torch.addmm(self.b_enc_M, self.centred(raw_TD), self.W_enc_MD.T)

    @torch.no_grad()
    def encode(self, raw_TD: torch.Tensor) -> torch.Tensor:
        """Activations [T, M], zero where inactive; a token's do not depend on the other tokens."""
        return kind_of(self.architecture).encode(self, self.pre_activations(raw_TD))

    @torch.no_grad()
    def encode_latent(self, raw_TD: torch.Tensor, latent: int) -> torch.Tensor:
        """Activations [T] of one latent; topk is gated by its running threshold, which needs no other latent."""
        pre_T = self.centred(raw_TD) @ self.W_enc_MD[latent] + self.b_enc_M[latent]
        return kind_of(self.architecture).encode_alone(self, pre_T, latent)

    @torch.no_grad()
    def decode(self, f_TM: torch.Tensor) -> torch.Tensor:
        """Raw activations [T, O] that the latents' activations stand for."""
        return torch.addmm(self.b_dec_D, f_TM, self.W_dec_MD) / self.reconstruction_scale

    def reconstruct(self, raw_TD: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(raw_TD))
