"""The optimiser of a shard: state per parameter under stable names, and the constraint on decoder rows.

Everything here is elementwise or per row, so sharding over latents changes nothing. Adam and AdamW are torch's
fused kernels; `adam8bit` is torchao's; `signum` is the sign of the momentum (Bernstein et al., 1802.04434).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sae_ray.config import TrainerConfig
from sae_ray.errors import UserError

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "signum": ("momentum",)}


class Signum(torch.optim.Optimizer):
    """Steps of fixed length along the sign of the momentum, with decoupled weight decay."""

    def __init__(self, params: Any, lr: float, beta: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(momentum.sign(), alpha=-group["lr"])


class Optimiser:
    """Steps named parameters. `fixed_lr` gives some of them a learning rate of their own that no schedule changes."""

    def __init__(self, cfg: TrainerConfig, parameters: dict[str, torch.Tensor], fixed_lr: dict[str, float]):
        self.cfg, self.parameters, self.fixed_lr = cfg, parameters, fixed_lr
        self.torch = _build(cfg, [{"params": [p], "lr": cfg.lr} for p in parameters.values()])
        compiled: Callable[[Callable], Callable] = torch.compile if cfg.compile else lambda function: function
        self._renormalise = compiled(renormalise)

    def step(self, gradients: dict[str, torch.Tensor], clip: torch.Tensor | None, lr: float) -> None:
        """One step; `clip` (0-dim) scales all gradients, which are used up."""
        # Fused Adam divides by `grad_scale` on its way, in float32; float64 runs want the exact product.
        fused = self.cfg.optimizer in ("adam", "adamw") and self.cfg.dtype == "float32"
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
            if clip is not None and not fused:
                parameter.grad.mul_(clip)
        if fused:
            self.torch.grad_scale = None if clip is None else (1 / clip).float()
        for group, name in zip(self.torch.param_groups, self.parameters, strict=True):
            rate = self.fixed_lr.get(name, lr)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def unit_rows(self, W_mO: torch.Tensor) -> None:
        self._renormalise(W_mO)

    def forget(self, rows_n: torch.Tensor, names: tuple[str, ...]) -> None:
        """Zeroes the moments of some latents: what they were is gone."""
        for name in names:
            for tensor in self.torch.state[self.parameters[name]].values():
                if isinstance(tensor, torch.Tensor) and tensor.dim():
                    tensor[rows_n] = 0

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """`adam.<moment>.<parameter>`, full precision and shaped like the parameter; none before the first step."""
        if self.cfg.optimizer == "adam8bit":
            return {}  # quantised in blocks that a re-shard would cut: its moments start anew on resume
        out = {}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS[self.cfg.optimizer]:
                if moment in self.torch.state.get(parameter, {}):
                    out[f"adam.{moment}.{name}"] = self.torch.state[parameter][moment]
        return out

    def load(self, state: dict[str, torch.Tensor], steps_done: int) -> None:
        if self.cfg.optimizer == "adam8bit":
            return
        for name, parameter in self.parameters.items():
            moments = {m: state[f"adam.{m}.{name}"] for m in MOMENTS[self.cfg.optimizer] if f"adam.{m}.{name}" in state}
            if not moments:
                continue
            own: dict[str, Any] = {m: t.to(parameter).clone() for m, t in moments.items()}
            if self.cfg.optimizer != "signum":
                own["step"] = torch.tensor(float(steps_done), dtype=torch.float32, device=parameter.device)
            self.torch.state[parameter] = own


def _build(cfg: TrainerConfig, groups: list[dict[str, Any]]) -> Any:
    if cfg.optimizer == "adam":
        return torch.optim.Adam(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "signum":
        return Signum(groups, cfg.lr, cfg.betas[0], cfg.weight_decay)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "trainer.optimizer adam8bit needs torchao, which is not installed: pip install torchao"
        ) from error
    return AdamW8bit(groups, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)


def project_out(gradient_mO: torch.Tensor, W_mO: torch.Tensor, along_m: torch.Tensor) -> torch.Tensor:
    """Takes from each row its part along W's unit row, in place.

    Args:
        along_m: `<gradient, W>` of each row.
    """
    return gradient_mO.addcmul_(along_m[:, None], W_mO, value=-1)


def renormalise(W_mO: torch.Tensor) -> torch.Tensor:
    """Scales rows to norm 1, in place."""
    return W_mO.div_(torch.linalg.vector_norm(W_mO, dim=1, keepdim=True))
