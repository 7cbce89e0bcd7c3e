"""The unsharded SAE in plain float64 autograd: dense, slow, and short enough to be read as the definition."""

from __future__ import annotations

import torch

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.trainer.gradients import dead_in_turn
from sae_ray.trainer.schedule import active_latents, learning_rate, sparsity_coefficient

TOPK_FAMILY = ("topk", "batchtopk", "matryoshka")


def first_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Mask [F] of the n largest positive values; equal ones in order of position."""
    order = torch.sort(values, descending=True, stable=True).indices[:n]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


class Jump(torch.autograd.Function):
    """pre where it is above theta, with the rectangular kernel's pseudo-gradient by theta."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        width = ctx.bandwidth * theta
        kernel = ((pre - theta).abs() < width / 2) / width
        return grad * (pre > theta), (-theta * kernel * grad).sum(0), None


class Step(torch.autograd.Function):
    """1 where pre is above theta, with the same kernel's pseudo-gradient by theta."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        width = ctx.bandwidth * theta
        kernel = ((pre - theta).abs() < width / 2) / width
        return None, (-kernel * grad).sum(0), None


def penalty(kind: str, p: float, f_BM: torch.Tensor) -> torch.Tensor:
    """Sum over tokens."""
    total = 0
    for f in f_BM:
        f = f[f > 0]
        if len(f):
            total = total + {
                "l1": lambda f: f.sum(),
                "l2": lambda f: f.square().sum().sqrt(),
                "hoyer": lambda f: f.sum() ** 2 / f.square().sum(),
                "p_norm": lambda f: ((f + 1e-3) ** p).sum(),
                "cross": lambda f: f.sum() ** 2 - f.square().sum(),
            }[kind](f)
    return total


class ReferenceSAE:
    """`weights`: what the trainer starts from, by its parameter names."""

    def __init__(
        self, sae: SAEConfig, cfg: TrainerConfig, weights: dict[str, torch.Tensor], scales=(1.0, 1.0), centred=True
    ):
        self.sae, self.cfg, self.scales, self.centred, self.steps = sae, cfg, scales, centred, 0
        self.p = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        self.fixed_lr = {"theta": sae.threshold_lr}
        groups = [{"params": [p], "name": name} for name, p in self.p.items()]
        if cfg.optimizer == "adamw":
            self.adam = torch.optim.AdamW(groups, lr=0, betas=cfg.betas, weight_decay=cfg.weight_decay, foreach=False)
        else:
            self.adam = torch.optim.Adam(groups, lr=0, betas=cfg.betas, foreach=False)
        self.silent = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.dead = torch.zeros(sae.d_sae, dtype=torch.bool)
        self.threshold = 0.0
        self.multiplier, self.last_l0 = 0.0, None
        self.metrics: list[dict[str, float]] = []

    def pre(self, x_BD: torch.Tensor) -> torch.Tensor:
        centred = x_BD - self.p["b_dec"] if self.centred else x_BD
        return centred @ self.p["W_enc"].T + self.p["b_enc"]

    def activations(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(f, pre, cut)."""
        kind, pre_BM = self.sae.architecture, self.pre(x_BD)
        if kind in TOPK_FAMILY:
            mask, cut = self.mask(pre_BM.detach())
            return pre_BM * mask, pre_BM, cut
        if kind == "jumprelu":
            return Jump.apply(pre_BM, self.p["theta"], self.sae.bandwidth), pre_BM, 0.0
        if kind == "relu_l1":
            return pre_BM.relu(), pre_BM, 0.0
        raw = (pre_BM - self.p["b_enc"]) * self.p["r_mag"].exp() + self.p["b_mag"]
        return raw.relu() * (pre_BM > 0), pre_BM, 0.0

    def mask(self, pre_BM: torch.Tensor) -> tuple[torch.Tensor, float]:
        k = active_latents(self.steps, self.sae)
        if self.sae.architecture == "topk":
            cut_B = pre_BM.topk(k, dim=1).values[:, -1].clamp(min=0)
            if self.sae.margin:
                return (pre_BM >= cut_B[:, None] - self.sae.margin) & (pre_BM > 0), float(cut_B.mean())
            return torch.stack([first_largest(row, k) for row in pre_BM]), float(cut_B.mean())
        mask = first_largest(pre_BM.flatten(), k * len(pre_BM)).view_as(pre_BM)
        return mask, float(pre_BM[mask].min())

    def losses(self, x_BD: torch.Tensor, y_BO: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
        f_BM, pre_BM, cut = self.activations(x_BD)
        power = (y_BO - y_BO.mean(0)).square().sum()
        W_dec, b_dec, n = self.p["W_dec"], self.p["b_dec"], len(x_BD)
        ends = [self.sae.d_sae]
        if self.sae.architecture == "matryoshka":
            ends = sorted({max(1, round(share * self.sae.d_sae)) for share in self.sae.groups})
        fvus = [(y_BO - (f_BM[:, :end] @ W_dec[:end] + b_dec)).square().sum() / power for end in ends]
        out = {"fvu": fvus[-1], "reconstruction": sum(fvus) / len(fvus)}
        unit, weight = (power / n).sqrt().detach(), sparsity_coefficient(self.steps, self.sae)
        zero = torch.zeros((), dtype=x_BD.dtype)
        out["penalty"] = zero
        if self.sae.architecture == "gated":
            gate = pre_BM.relu()
            frozen = (y_BO - (gate @ W_dec.detach() + b_dec.detach())).square().sum() / power
            out["penalty"] = frozen + weight * penalty(self.sae.sparsity, self.sae.sparsity_p, gate / unit) / n
        elif weight:
            out["penalty"] = weight * penalty(self.sae.sparsity, self.sae.sparsity_p, f_BM / unit) / n
        out["aux"] = self.aux_k(y_BO - (f_BM @ W_dec + b_dec), pre_BM)
        out["total"] = out["reconstruction"] + out["penalty"] + out["aux"]
        if self.sae.architecture == "jumprelu":
            k = self.sae.k
            error = 0.0 if self.last_l0 is None else min(1.0, max(-1.0, (self.last_l0 - k) / k))
            active = Step.apply(pre_BM, self.p["theta"], self.sae.bandwidth).sum()
            out["total"] = out["total"] + (self.multiplier + 3 * error) / (n * k) * active
        return out, f_BM.detach(), cut

    def aux_k(self, error: torch.Tensor, pre_BM: torch.Tensor) -> torch.Tensor:
        n_dead = int(self.dead.sum())
        if not n_dead or not self.sae.aux_k:
            return torch.zeros((), dtype=error.dtype)
        left = error.detach()
        k = min(self.sae.aux_k, n_dead)
        may = torch.zeros_like(self.dead)
        may[dead_in_turn(self.dead, n_dead, self.sae.aux_pool, 0, self.steps)] = True
        dead_pre = pre_BM.masked_fill(~may, -torch.inf)
        mask = torch.stack([first_largest(row, k) for row in dead_pre.detach()])
        guess = (pre_BM * mask) @ self.p["W_dec"]
        aux = (left - guess).square().sum() / (left - left.mean(0)).square().sum()
        return aux * self.sae.aux_coef * min(1, n_dead / self.sae.aux_k)

    def step(self, raw_BD: torch.Tensor, credit=None, target_BO: torch.Tensor | None = None) -> None:
        x_BD = raw_BD.double() * self.scales[0]
        y_BO = x_BD if target_BO is None else target_BO.double() * self.scales[1]
        losses, f_BM, cut = self.losses(x_BD, y_BO)
        loss = losses["total"]
        if credit is not None:
            loss = loss + credit(x_BD, self.p["W_enc"], self.p["b_enc"], self.p["b_dec"].detach())
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            if self.sae.decoder_norm == "unit":
                grad, W_dec = self.p["W_dec"].grad, self.p["W_dec"]
                grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
            norm = torch.sqrt(sum(p.grad.square().sum() for p in self.p.values()))
            for p in self.p.values():
                p.grad *= min(1.0, float(self.cfg.grad_clip / (norm + 1e-6))) if self.cfg.grad_clip else 1
        for group in self.adam.param_groups:
            group["lr"] = self.fixed_lr.get(group["name"], learning_rate(self.steps, self.cfg))
        self.adam.step()
        with torch.no_grad():
            if self.sae.decoder_norm == "unit":
                self.p["W_dec"] /= self.p["W_dec"].norm(dim=1, keepdim=True)
            if "theta" in self.p:
                self.p["theta"].clamp_(min=0)
        active = f_BM > 0
        self.last_l0 = float(active.sum()) / len(x_BD)
        self.multiplier += 0.05 * min(1.0, max(-1.0, (self.last_l0 - self.sae.k) / self.sae.k))
        self.threshold = 0.95 * self.threshold + 0.05 * cut if self.steps else cut
        self.steps += 1
        self.silent += len(x_BD)
        self.silent[active.any(0)] = 0
        if self.steps % self.cfg.log_every == 0:
            self.dead = self.silent >= self.sae.dead_after_tokens
            row = {name: float(losses[name].detach()) for name in ("fvu", "aux", "penalty")}
            self.metrics.append(
                {**row, "l0": self.last_l0, "grad_norm": float(norm), "dead_fraction": float(self.dead.double().mean())}
            )
            if self.sae.architecture in TOPK_FAMILY:
                self.metrics[-1]["threshold"] = self.threshold

    def state(self) -> dict[str, torch.Tensor]:
        out = {"silent": self.silent, "dead": self.dead}
        for name, p in self.p.items():
            out[name] = p.detach()
            out[f"adam.exp_avg.{name}"] = self.adam.state[p]["exp_avg"]
            out[f"adam.exp_avg_sq.{name}"] = self.adam.state[p]["exp_avg_sq"]
        return out
