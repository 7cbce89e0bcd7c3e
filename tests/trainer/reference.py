"""The unsharded SAE in plain float64 autograd: dense, slow, and short enough to be read as the definition."""

from __future__ import annotations

import torch

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.trainer.schedule import learning_rate


def first_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Mask [F] of the n largest positive values; equal ones in order of position."""
    order = torch.sort(values, descending=True, stable=True).indices[:n]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


class ReferenceSAE:
    def __init__(self, sae: SAEConfig, cfg: TrainerConfig, W_MD: torch.Tensor, b_dec_D: torch.Tensor, scale: float):
        self.sae, self.cfg, self.scale, self.steps = sae, cfg, scale, 0
        self.W_enc, self.W_dec = W_MD.clone().requires_grad_(), W_MD.clone().requires_grad_()
        self.b_enc = torch.zeros(len(W_MD), dtype=W_MD.dtype, requires_grad=True)
        self.b_dec = b_dec_D.clone().requires_grad_()
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=0, betas=cfg.betas, foreach=False)
        self.silent = torch.zeros(len(W_MD), dtype=torch.int64)
        self.dead = torch.zeros(len(W_MD), dtype=torch.bool)
        self.threshold = 0.0
        self.metrics: list[dict[str, float]] = []

    def gate(self, pre_BM: torch.Tensor) -> tuple[torch.Tensor, float]:
        if self.sae.architecture == "batchtopk":
            mask = first_largest(pre_BM.flatten(), self.sae.k * len(pre_BM)).view_as(pre_BM)
            return mask, float(pre_BM[mask].min())
        mask = torch.stack([first_largest(row, self.sae.k) for row in pre_BM])
        return mask, float(pre_BM.topk(self.sae.k, dim=1).values[:, -1].clamp(min=0).mean())

    def losses(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        pre_BM = (x_BD - self.b_dec) @ self.W_enc.T + self.b_enc
        mask, cut = self.gate(pre_BM.detach())
        error = x_BD - ((pre_BM * mask) @ self.W_dec + self.b_dec)
        fvu = error.square().sum() / (x_BD - x_BD.mean(0)).square().sum()
        aux = torch.zeros((), dtype=x_BD.dtype)
        n_dead = int(self.dead.sum())
        if n_dead and self.sae.aux_k:
            left = error.detach()
            dead_pre = pre_BM.masked_fill(~self.dead, -torch.inf)
            k = min(self.sae.aux_k, n_dead)
            dead_mask = torch.stack([first_largest(row, k) for row in dead_pre.detach()])
            guess = (pre_BM * dead_mask) @ self.W_dec
            aux = (left - guess).square().sum() / (left - left.mean(0)).square().sum()
            aux = aux * self.sae.aux_coef * min(1, n_dead / self.sae.aux_k)
        return fvu, aux, mask, cut

    def step(self, raw_BD: torch.Tensor, credit=None) -> None:
        x_BD = raw_BD.double() * self.scale
        fvu, aux, mask, cut = self.losses(x_BD)
        loss = fvu + aux
        if credit is not None:
            loss = loss + credit(x_BD, self.W_enc, self.b_enc, self.b_dec.detach())
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad = self.W_dec.grad
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
            norm = torch.sqrt(sum(p.grad.square().sum() for p in self.parameters))
            for p in self.parameters:
                p.grad *= min(1.0, float(self.cfg.grad_clip / (norm + 1e-6)))
        self.adam.param_groups[0]["lr"] = learning_rate(self.steps, self.cfg)
        self.adam.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.threshold = 0.95 * self.threshold + 0.05 * cut if self.steps else cut
        self.steps += 1
        self.silent += len(x_BD)
        self.silent[mask.any(0)] = 0
        if self.steps % self.cfg.log_every == 0:
            self.dead = self.silent >= self.sae.dead_after_tokens
            self.metrics.append(
                {
                    "fvu": float(fvu.detach()),
                    "aux": float(aux.detach()),
                    "l0": float(mask.sum()) / len(x_BD),
                    "grad_norm": float(norm),
                    "dead_fraction": float(self.dead.double().mean()),
                    "threshold": self.threshold,
                }
            )

    def state(self) -> dict[str, torch.Tensor]:
        out = {"silent": self.silent, "dead": self.dead}
        for name, p in zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.parameters, strict=True):
            out[name] = p.detach()
            out[f"adam.exp_avg.{name}"] = self.adam.state[p]["exp_avg"]
            out[f"adam.exp_avg_sq.{name}"] = self.adam.state[p]["exp_avg_sq"]
        return out
