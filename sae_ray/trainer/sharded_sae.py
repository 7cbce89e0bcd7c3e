"""One SAE whose latents are sharded: forward, hand-written sparse backward, and the optimiser step.

Everything per latent (weights, Adam state, firing counts) is local to the shard. A step communicates, over
tp, two small histograms (batchtopk) or the local top-k values (topk), one [B, D] reconstruction and one
vector of D + 4 numbers; over dp, the batch statistics and one flat vector of gradients.

    x_hat = sum over shards of f @ W_dec + b_dec       one all-reduce; its backward is the identity
    d/d b_dec = sum g - (sum df) @ W_enc               the second term is a sum over shards
    norm^2 = sum over shards of sharded grads^2 + b_dec grad^2 once

Suffixes: B global batch, b its tokens on this dp rank, D d_in, m latents of this shard, N active pairs.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import torch

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae import init
from sae_ray.sae.architectures import architecture
from sae_ray.sae.losses import aux_k_weight, centred_power
from sae_ray.sae.selection import Shard, select_topk
from sae_ray.sae.sparse import Codes, decode, dot_pairs, sum_by_latent, sum_scalars_by_latent
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.schedule import learning_rate

THRESHOLD_MEMORY = 0.95  # per step, of the running threshold: longer lags behind while the weights still move
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
METRICS = ("fvu", "aux", "l0", "threshold", "credit_loss", "grad_norm", "loss")


class CreditParams(NamedTuple):
    """What a credit loss may look at. W_enc and b_enc are leaves that require grad; the rest is detached."""

    W_enc_mD: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_D: torch.Tensor
    first_latent: int
    step: int


class CreditLoss(Protocol):
    """The third loss. Its weight is its own business; only latents of this shard can be touched."""

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


class Gradients(NamedTuple):
    W_enc_mD: torch.Tensor
    W_dec_mD: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_D: torch.Tensor

    def plus(self, other: Gradients) -> Gradients:
        return Gradients(*(a.add_(b) for a, b in zip(self, other, strict=True)))


class ShardedTrainer:
    """One SAE on one process of a mesh. Without a process group it is the whole SAE."""

    def __init__(self, sae: SAEConfig, trainer: TrainerConfig, d_in: int, seed: int, collectives: Collectives):
        self.sae, self.cfg, self.d_in, self.seed, self.collectives = sae, trainer, d_in, seed, collectives
        self.mesh = collectives.mesh
        self.dtype = getattr(torch, trainer.dtype)
        self.architecture = architecture(sae.architecture, sae.k)
        self.first_latent, self.last_latent = self.mesh.latents(sae.d_sae)
        self.input_scale = 1.0
        self.steps_done = 0
        m, device = self.last_latent - self.first_latent, self.mesh.device
        self.W_enc_mD = torch.zeros(m, d_in, dtype=self.dtype, device=device)
        self.W_dec_mD = torch.zeros_like(self.W_enc_mD)
        self.b_enc_m = torch.zeros(m, dtype=self.dtype, device=device)
        self.b_dec_D = torch.zeros(d_in, dtype=self.dtype, device=device)
        self.threshold = torch.zeros((), dtype=torch.float32, device=device)
        self.silent_m = torch.zeros(m, dtype=torch.int64, device=device)  # tokens since the latent last fired
        self.dead_m = torch.zeros(m, dtype=torch.bool, device=device)
        self.n_dead = 0  # of all shards
        self.adam = torch.optim.Adam(self._parameters(), lr=trainer.lr, betas=trainer.betas, fused=True)
        self._logged: list[tuple[int, float, float, float, torch.Tensor]] = []
        self._clock = [0.0, 0]  # seconds and steps since the last log

    def initialise(self, raw_TD: torch.Tensor) -> None:
        """Scale and b_dec (geometric median) from the first window's raw activations; tied unit-norm rows."""
        raw_TD = raw_TD.to(self.mesh.device, self.dtype)
        start = torch.zeros(1 + self.d_in, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.rank == 0:
            start[0] = init.input_scale(raw_TD, self.sae.input_norm)
            start[1:] = init.geometric_median(raw_TD * start[0].to(self.dtype))
        self.collectives.from_first(start)
        self.input_scale = float(start[0])
        self.b_dec_D.copy_(start[1:])
        rows_mD = init.unit_rows(self.first_latent, self.last_latent, self.d_in, self.seed, self.dtype)
        self.W_enc_mD.copy_(rows_mD)
        self.W_dec_mD.copy_(rows_mD)

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def step(self, raw_bD: torch.Tensor, global_tokens: int, credit: CreditLoss | None = None) -> None:
        """One optimiser step on a batch of `global_tokens` raw activations.

        Args:
            raw_bD: the rows `mesh.rows(global_tokens)` of the batch, any float dtype, finite.
            credit: its gradient by this shard's encoder is added (averaged over dp ranks).
        """
        began = time.perf_counter()
        lr = learning_rate(self.steps_done, self.cfg)
        x_bD = self.scaled(raw_bD)
        codes, grads, direct_D, sums = self._loss_and_gradients(x_bD, global_tokens)
        credit_loss = self._add_credit(credit, x_bD, grads)
        fired_m = torch.bincount(codes.cols_N, minlength=len(self.b_enc_m)).to(self.dtype)
        numbers = torch.stack([*sums, credit_loss])
        grads, direct_D, fired_m, numbers = self._sum_over_dp(grads, direct_D, fired_m, numbers)
        grad_norm, grads, l0, credit_total = self._sum_over_tp(grads, direct_D, numbers, global_tokens)
        self._optimise(grads, grad_norm, lr)

        fvu, aux, _, cut, _ = numbers.unbind()
        memory = THRESHOLD_MEMORY if self.steps_done else 0.0
        self.threshold.mul_(memory).add_((1 - memory) * cut.float())
        self.steps_done += 1
        self.silent_m.add_(global_tokens).masked_fill_(fired_m > 0, 0)
        self._clock[0] += time.perf_counter() - began
        self._clock[1] += 1
        if self.steps_done % self.cfg.log_every == 0:
            values = (fvu, aux, l0, self.threshold.to(self.dtype), credit_total, grad_norm)
            loss = fvu + aux + credit_total
            self._find_dead()
            self._log(lr, torch.stack([*values, loss]))

    def scaled(self, raw_bD: torch.Tensor) -> torch.Tensor:
        return raw_bD.to(self.mesh.device, self.dtype) * self.input_scale

    def _loss_and_gradients(
        self, x_bD: torch.Tensor, n: int
    ) -> tuple[Codes, Gradients, torch.Tensor, list[torch.Tensor]]:
        """Active codes, this process's gradients, d/d b_dec through the reconstruction, and local sums."""
        total = centred_power(x_bD, n, self.collectives.sum_dp)
        centred_bD = x_bD - self.b_dec_D
        pre_bm = torch.addmm(self.b_enc_m, centred_bD, self.W_enc_mD.T)
        gate = self.architecture.train_gate(pre_bm, self._shard(n), self.collectives)
        codes = Codes.of(pre_bm, gate)
        x_hat_bD = self.collectives.sum_tp(decode(codes, self.W_dec_mD)) + self.b_dec_D
        error_bD = x_hat_bD - x_bD
        fvu = error_bD.square().sum() / total
        slope_bD = error_bD * (2 / total)
        grads = self._sparse_gradients(codes, slope_bD, centred_bD)
        aux = torch.zeros_like(fvu)
        if self.n_dead and self.sae.aux_k:
            aux, aux_grads = self._aux_k(-error_bD, centred_bD, pre_bm, n)
            grads = grads.plus(aux_grads)
        share = len(x_bD) / n
        count = torch.tensor(float(len(codes.vals_N)), dtype=self.dtype, device=x_bD.device)
        return codes, grads, slope_bD.sum(0), [fvu, aux, count, gate.threshold.to(self.dtype) * share]

    def _aux_k(
        self, error_bD: torch.Tensor, centred_bD: torch.Tensor, pre_bm: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, Gradients]:
        """AuxK (Gao et al., 2406.04093, A.2): dead latents reconstruct what the live ones left over.

        The residual is a constant here: only the dead latents learn from it, encoder and decoder alike.
        """
        dead = torch.nonzero(self.dead_m).view(-1)
        gate = select_topk(pre_bm[:, dead], min(self.sae.aux_k, self.n_dead), self.collectives)
        codes = Codes.of(pre_bm, gate._replace(cols_N=dead[gate.cols_N]))
        guess_bD = self.collectives.sum_tp(decode(codes, self.W_dec_mD))
        weight = aux_k_weight(self.sae.aux_coef, self.n_dead, self.sae.aux_k)
        weight_per_power = weight / centred_power(error_bD, n, self.collectives.sum_dp)
        left_bD = guess_bD - error_bD
        loss = left_bD.square().sum() * weight_per_power
        return loss, self._sparse_gradients(codes, left_bD * (2 * weight_per_power), centred_bD)

    def _sparse_gradients(self, codes: Codes, slope_bD: torch.Tensor, centred_bD: torch.Tensor) -> Gradients:
        """Gradients of a loss with slope `slope_bD` by the decoded sum; b_dec's is the encoder path only."""
        d_pre_N = dot_pairs(codes, slope_bD, self.W_dec_mD)
        b_enc_m = sum_scalars_by_latent(codes, d_pre_N)
        return Gradients(
            sum_by_latent(codes, d_pre_N, centred_bD),
            sum_by_latent(codes, codes.vals_N, slope_bD),
            b_enc_m,
            -(b_enc_m @ self.W_enc_mD),
        )

    def _add_credit(self, credit: CreditLoss | None, x_bD: torch.Tensor, grads: Gradients) -> torch.Tensor:
        none = torch.zeros((), dtype=self.dtype, device=x_bD.device)
        if credit is None:
            return none
        with torch.enable_grad():
            W_enc_mD = self.W_enc_mD.detach().requires_grad_()
            b_enc_m = self.b_enc_m.detach().requires_grad_()
            params = CreditParams(W_enc_mD, b_enc_m, self.b_dec_D, self.first_latent, self.steps_done)
            loss = credit.loss(x_bD, params, self.threshold)
            if loss is None:
                return none
            by_W, by_b = torch.autograd.grad(loss, (W_enc_mD, b_enc_m), allow_unused=True)
        # Each dp rank's loss is a mean over its own tokens: the sum over dp must be their mean.
        if by_W is not None:
            grads.W_enc_mD.add_(by_W, alpha=1 / self.mesh.dp)
        if by_b is not None:
            grads.b_enc_m.add_(by_b, alpha=1 / self.mesh.dp)
        return loss.detach().to(self.dtype) / self.mesh.dp

    def _sum_over_dp(
        self, grads: Gradients, direct_D: torch.Tensor, fired_m: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[Gradients, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.mesh.dp == 1:
            return grads, direct_D, fired_m, numbers
        parts = [*grads, direct_D, fired_m, numbers]
        flat = self.collectives.sum_dp(torch.cat([part.reshape(-1) for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        summed = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
        return Gradients(*summed[:4]), summed[4], summed[5], summed[6]

    def _sum_over_tp(
        self, grads: Gradients, direct_D: torch.Tensor, numbers: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, Gradients, torch.Tensor, torch.Tensor]:
        """Gradient norm, final gradients, L0 and credit loss of the whole SAE, in one all-reduce."""
        # Moving a decoder row along itself is undone by the renormalisation: keep Adam from seeing it.
        along_m1 = (grads.W_dec_mD * self.W_dec_mD).sum(1, keepdim=True)
        W_dec_mD = grads.W_dec_mD.addcmul_(along_m1, self.W_dec_mD, value=-1)
        squares = sum(g.square().sum() for g in (grads.W_enc_mD, W_dec_mD, grads.b_enc_m))
        packed = torch.cat([grads.b_dec_D, torch.stack([torch.as_tensor(squares), numbers[2], numbers[4]])])
        self.collectives.sum_tp(packed)
        b_dec_D = packed[:-3] + direct_D
        norm = (packed[-3] + b_dec_D.square().sum()).sqrt()
        return norm, Gradients(grads.W_enc_mD, W_dec_mD, grads.b_enc_m, b_dec_D), packed[-2] / n, packed[-1]

    def _optimise(self, grads: Gradients, norm: torch.Tensor, lr: float) -> None:
        clip = (self.cfg.grad_clip / (norm + 1e-6)).clamp(max=1)
        for parameter, grad in zip(self._parameters(), grads, strict=True):
            parameter.grad = grad.mul_(clip)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.W_dec_mD /= self.W_dec_mD.norm(dim=1, keepdim=True)

    def _find_dead(self) -> None:
        """Re-decides which latents are dead. Every `log_every` steps only: it needs a host read."""
        self.dead_m = self.silent_m >= self.sae.dead_after_tokens
        self.n_dead = int(self.collectives.sum_tp(self.dead_m.sum()))

    # ------------------------------------------------------------------ metrics, inference, copies

    def _log(self, lr: float, values: torch.Tensor) -> None:
        seconds = self._clock[0] / max(1, self._clock[1])
        self._logged.append((self.steps_done, lr, self.n_dead / self.sae.d_sae, seconds, values))
        self._clock = [0.0, 0]

    def read_metrics(self) -> list[dict[str, float]]:
        """Metrics of the steps logged since the last call; the only place where they reach the host."""
        out = []
        for step, lr, dead, seconds, values in self._logged:
            named = dict(zip(METRICS, values.tolist(), strict=True))
            out.append({"step": step, "lr": lr, "dead_fraction": dead, "step_seconds": seconds, **named})
        self._logged = []
        return out

    @torch.no_grad()
    def encode(self, raw_bD: torch.Tensor) -> Codes:
        """Active latents of this shard at inference. All ranks of a tp row must call it together (topk)."""
        pre_bm = self.pre_activations(raw_bD)
        gate = self.architecture.infer_gate(pre_bm, self.threshold.to(self.dtype), self.collectives)
        return Codes.of(pre_bm, gate)

    @torch.no_grad()
    def pre_activations(self, raw_bD: torch.Tensor) -> torch.Tensor:
        """[b, m] of this shard; no communication."""
        return torch.addmm(self.b_enc_m, self.scaled(raw_bD) - self.b_dec_D, self.W_enc_mD.T)

    def fork(self) -> ShardedTrainer:
        """A copy that shares nothing, optimiser state included."""
        twin = ShardedTrainer(self.sae, self.cfg, self.d_in, self.seed, self.collectives)
        twin.load_state({name: tensor.clone() for name, tensor in self.state().items()}, self.meta())
        return twin

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on. Names under `SHARDED` have latents as their first axis."""
        out = {
            **self.parameters(),
            "threshold": self.threshold,
            "silent": self.silent_m,
            "dead": self.dead_m,
        }
        for name, parameter in zip(PARAMETERS, self._parameters(), strict=True):
            moments: dict[str, Any] = self.adam.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"adam.{key}.{name}"] = moments.get(key, torch.zeros_like(parameter))
        return out

    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(zip(PARAMETERS, self._parameters(), strict=True))

    def meta(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "input_scale": self.input_scale}

    def load_state(self, state: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Restores `state()` and `meta()`; sharded tensors are this shard's rows."""
        self.steps_done, self.input_scale = int(meta["steps_done"]), float(meta["input_scale"])
        own = {**self.parameters(), "threshold": self.threshold, "silent": self.silent_m}
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.dead_m = state["dead"].to(self.mesh.device, torch.bool)
        self.n_dead = int(self.collectives.sum_tp(self.dead_m.sum()))
        for name, parameter in zip(PARAMETERS, self._parameters(), strict=True):
            self.adam.state[parameter] = {
                "step": torch.tensor(float(self.steps_done), device=self.mesh.device),
                **{key: state[f"adam.{key}.{name}"].to(parameter).contiguous() for key in ("exp_avg", "exp_avg_sq")},
            }

    def _parameters(self) -> list[torch.Tensor]:
        return [self.W_enc_mD, self.W_dec_mD, self.b_enc_m, self.b_dec_D]

    def _shard(self, n: int) -> Shard:
        return Shard(self.mesh.rows(n)[0], n, self.first_latent, self.sae.d_sae)
