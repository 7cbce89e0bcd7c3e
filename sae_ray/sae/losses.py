"""The reconstruction losses, normalised so that coefficients carry over between models.

`FVU = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2` is the one definition, for training, AuxK and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def centred_power(
    x_BD: torch.Tensor, n_tokens: int, sum_over_tokens: Callable[[torch.Tensor], torch.Tensor] = identity
) -> torch.Tensor:
    """`sum ||x - mean(x)||^2`, 0-dim, at least the smallest normal number so that it can divide.

    Args:
        x_BD: this process's tokens.
        n_tokens: tokens of all processes.
        sum_over_tokens: adds a tensor up over the processes that hold other tokens.
    """
    mean_D = sum_over_tokens(x_BD.sum(0)) / n_tokens
    power = sum_over_tokens((x_BD - mean_D).square().sum())
    return power.clamp(min=torch.finfo(x_BD.dtype).tiny)


def fvu(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained of a reconstruction, 0-dim: 0 is perfect, 1 is as good as the mean."""
    return (x_BD - x_hat_BD).square().sum() / centred_power(x_BD, len(x_BD))


def aux_k_weight(aux_coef: float, n_dead: int, aux_k: int) -> float:
    """Weight of the AuxK loss: smaller while fewer latents are dead than it would revive at once."""
    return aux_coef * min(1.0, n_dead / aux_k) if aux_k else 0.0
