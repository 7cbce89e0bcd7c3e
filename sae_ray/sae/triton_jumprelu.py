"""JumpReLU on dense pre-activations, for GPUs: forward, and backward by straight-through rectangles.

    f = pre where pre > theta, else 0;  L0 = number of active latents of a token
    d f / d theta = -theta / eps and d L0 / d theta = -1 / eps, both only where |pre - theta| < eps / 2

(Rajamanoharan et al., 2407.14435.) One pass each way; the thresholds' and the encoder bias's gradients are
column sums over runs of rows, added up afterwards: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_ray.sae.triton_kernels import launch

BLOCK = 512
ROWS = 64


class JumpReLU(torch.autograd.Function):
    """`f_Bm, l0_B = JumpReLU.apply(pre_Bm, theta_m, eps)`; both outputs have gradients by `pre` and `theta`.

    The L0 of a token has no gradient by `pre`. `theta` is float32 whatever the type of `pre`.
    """

    @staticmethod
    def forward(
        ctx: Any, pre_Bm: torch.Tensor, theta_m: torch.Tensor, bandwidth: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from sae_ray.sae import triton_jit as jit

        pre_Bm = pre_Bm.contiguous()
        n_rows, width = pre_Bm.shape
        f_Bm = torch.empty_like(pre_Bm)
        columns = -(-width // BLOCK)
        part_BC = torch.empty(n_rows, columns, dtype=torch.int32, device=pre_Bm.device)
        args = (pre_Bm, theta_m, f_Bm, part_BC, width, columns)
        launch(jit.jumprelu_forward, (n_rows, columns), *args, BLOCK=BLOCK, num_warps=2)
        ctx.save_for_backward(pre_Bm, theta_m)
        ctx.bandwidth = bandwidth
        return f_Bm, part_BC.sum(1).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_f_Bm, grad_l0_B = grads
        pre_Bm, theta_m = ctx.saved_tensors
        grad_pre_Bm, grad_theta_m, _ = jumprelu_backward(pre_Bm, theta_m, ctx.bandwidth, grad_f_Bm, grad_l0_B)
        return grad_pre_Bm, grad_theta_m.to(theta_m.dtype), None


def jumprelu_backward(
    pre_Bm: torch.Tensor, theta_m: torch.Tensor, bandwidth: float, grad_f_Bm: torch.Tensor, grad_l0_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by pre [B, m], by theta [m] and by the encoder's bias [m] (the last two float32)."""
    from sae_ray.sae import triton_jit as jit

    n_rows, width = pre_Bm.shape
    runs = -(-n_rows // ROWS)
    grad_pre_Bm = torch.empty_like(pre_Bm)
    part = torch.empty(2, runs, width, dtype=torch.float32, device=pre_Bm.device)
    args = (pre_Bm, theta_m, grad_f_Bm.contiguous(), grad_l0_B.contiguous(), grad_pre_Bm, part[0], part[1])
    grid = (-(-width // BLOCK), runs)
    launch(jit.jumprelu_backward, grid, *args, float(bandwidth), n_rows, width, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
    return grad_pre_Bm, part[0].sum(0), part[1].sum(0)
