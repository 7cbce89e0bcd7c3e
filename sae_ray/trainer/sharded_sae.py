"""One SAE whose latents are sharded: forward, hand-written sparse backward, and the optimiser step.

Everything per latent (weights, moments, firing counts) is local to the shard. What a step communicates does
not grow with d_sae: over tp two small histograms (batchtopk) or the local top-k values (topk), one [B, O]
reconstruction and one vector of d_out + 4 numbers; over dp the pairs and the inputs they belong to, from which each
dp rank computes the same gradients, and the rows that a credit touches (a gradient itself would be [m, D]; relu_l1 and
gated, whose pairs are too many to list, do sum it).

    y_hat = sum over shards of f @ W_dec + b_dec       one all-reduce; its backward is the identity
    d/d b_dec = sum g - (sum d_pre) @ W_enc            the second term is a sum over shards
    norm^2 = sum over shards of sharded grads^2 + b_dec grad^2 once

Suffixes: B global batch, b its tokens on this dp rank, D d_in, O d_out, m latents of this shard, N pairs.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae import init
from sae_ray.sae.activation import Parameters, StepContext, Target
from sae_ray.sae.architectures import architecture
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.encoder import Encoder, Workspace
from sae_ray.sae.inference import TrainedSAE
from sae_ray.sae.losses import centred_power
from sae_ray.sae.selection import Shard
from sae_ray.sae.sparse import Codes
from sae_ray.trainer import gradients as backward
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.credit_step import (
    CreditLoss,
    CreditParams,
    add_credit,
    apply_deltas,
    asked,
    discount_price,
    forward_with_bonus,
)
from sae_ray.trainer.gradients import Gradients
from sae_ray.trainer.optimiser import Optimiser, project_out
from sae_ray.trainer.reconstruction import local_bounds, reconstruct, segments
from sae_ray.trainer.resampling import resample
from sae_ray.trainer.schedule import active_latents, decays, learning_rate, sparsity_coefficient
from sae_ray.trainer.warm_start import warm_start

THRESHOLD_MEMORY = 0.95  # per step, of the running threshold: longer lags behind while the weights still move
PRICE_RATE, PRICE_PULL = 0.05, 3.0  # of jumprelu's L0 constraint: how its multiplier moves, and its square's weight
METRICS = ("fvu", "aux", "penalty", "l0", "threshold", "credit_loss", "grad_norm", "loss")


class ShardedTrainer:
    """One SAE on one process of a mesh. Without a process group it is the whole SAE.

    Args:
        d_out: width of what a transcoder reconstructs; None: the input itself.
    """

    def __init__(
        self,
        sae: SAEConfig,
        trainer: TrainerConfig,
        d_in: int,
        seed: int,
        collectives: Collectives,
        d_out: int | None = None,
    ):
        self.sae, self.cfg, self.seed, self.collectives = sae, trainer, seed, collectives
        self.d_in, self.d_out, self.transcodes = d_in, d_out or d_in, d_out is not None
        self.subtract_b_dec = sae.subtract_b_dec and not self.transcodes
        self.mesh = collectives.mesh
        self.dtype = getattr(torch, trainer.dtype)
        self.architecture = architecture(sae)
        self.first_latent, self.last_latent = self.mesh.latents(sae.d_sae)
        self.bounds = local_bounds(self.architecture.prefixes, self.first_latent, self.last_latent)
        self.input_scale = self.output_scale = 1.0
        self.steps_done = 0
        m, device = self.last_latent - self.first_latent, self.mesh.device
        self.W_enc_mD = torch.zeros(m, d_in, dtype=self.dtype, device=device)
        self.W_dec_mD = torch.zeros(m, self.d_out, dtype=self.dtype, device=device)
        self.b_enc_m = torch.zeros(m, dtype=self.dtype, device=device)
        self.b_dec_D = torch.zeros(self.d_out, dtype=self.dtype, device=device)
        self.own: Parameters = self.architecture.new_parameters(m, self.dtype, device)
        self.threshold = torch.zeros((), dtype=torch.float32, device=device)
        self.price = torch.zeros(2, dtype=self.dtype, device=device)  # jumprelu: multiplier, L0 of the last step
        self.levels = self.price.new_zeros(()), self.price.new_zeros(())  # FVU and L0 of the last step
        self.silent_m = torch.zeros(m, dtype=torch.int64, device=device)  # tokens since the latent last fired
        self.dead_m = torch.zeros(m, dtype=torch.bool, device=device)
        self.n_dead = 0  # of all shards
        # What steers L0 must not slow down when the learning rate does.
        self.optimiser = Optimiser(trainer, self.parameters(), {"theta": sae.threshold_lr})
        self._workspace = Workspace()
        self._logged: list[tuple[int, float, float, float, torch.Tensor]] = []
        self._clock = [0.0, 0]  # seconds and steps since the last log

    def initialise(self, raw_TD: torch.Tensor, target_TO: torch.Tensor | None = None) -> None:
        """Scales and b_dec from the first window's raw activations; tied unit-norm rows."""
        raw_TD = raw_TD.to(self.mesh.device, self.dtype)
        target_TO = raw_TD if target_TO is None else target_TO.to(self.mesh.device, self.dtype)
        self._measure_scales(raw_TD, target_TO)
        rows_mD = init.unit_rows(self.first_latent, self.last_latent, self.d_in, self.seed, self.dtype)
        self.W_enc_mD.copy_(rows_mD * self.sae.init_norm)
        tied = not self.transcodes
        if not tied:
            rows_mD = init.unit_rows(self.first_latent, self.last_latent, self.d_out, self.seed + 1, self.dtype)
        self.W_dec_mD.copy_(rows_mD if self.sae.decoder_norm == "unit" else rows_mD * self.sae.init_norm)
        x_TD = self.scaled(raw_TD)
        if not self.subtract_b_dec:
            # What is not subtracted from the input is taken off behind the encoder.
            centre_D = self.b_dec_D if tied else init.centre(x_TD, self.sae.b_dec_init).to(self.dtype)
            self.collectives.from_first(centre_D)
            self.b_enc_m.copy_(-(self.W_enc_mD @ centre_D))
        self._start_architecture(x_TD)

    def _measure_scales(self, raw_TD: torch.Tensor, target_TO: torch.Tensor) -> None:
        start = torch.zeros(2 + self.d_out, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.rank == 0:
            start[0] = init.input_scale(raw_TD, self.sae.input_norm)
            start[1] = init.input_scale(target_TO, self.sae.input_norm) if self.transcodes else start[0]
            start[2:] = init.centre(target_TO * start[1].to(self.dtype), self.sae.b_dec_init)
        self.collectives.from_first(start)
        self.input_scale, self.output_scale = float(start[0]), float(start[1])
        self.b_dec_D.copy_(start[2:])

    def _start_architecture(self, x_TD: torch.Tensor) -> None:
        sample_TD = x_TD[: min(len(x_TD), self.cfg.batch_tokens)]
        low, high = self.mesh.rows(len(sample_TD))
        encoder = self._encoder(sample_TD[low:high])
        self.architecture.start(encoder, self.own, self._context(len(sample_TD)))

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def step(
        self,
        raw_bD: torch.Tensor,
        global_tokens: int,
        credit: CreditLoss | None = None,
        target_bO: torch.Tensor | None = None,
    ) -> None:
        """One optimiser step on a batch of `global_tokens` raw activations.

        Args:
            raw_bD: the rows `mesh.rows(global_tokens)` of the batch, any float dtype, finite.
            credit: its gradient by this shard's encoder is added (a mean over the tokens of all dp ranks), its
                selection discounts hold in this step, and its deltas are applied after it.
            target_bO: what a transcoder reconstructs, the same rows.
        """
        began = time.perf_counter()
        lr = learning_rate(self.steps_done, self.cfg)
        x_bD = self.scaled(raw_bD)
        y_bO = x_bD if target_bO is None else target_bO.to(self.mesh.device, self.dtype) * self.output_scale
        context = self._context(global_tokens)
        params = None if credit is None else self._credit_params(global_tokens)
        discount_m = None if params is None else asked(credit, "selection", params)
        grads, fired_m, numbers, error_bO = self._loss_and_gradients(x_bD, y_bO, context, discount_m)
        if credit is None or params is None:
            numbers.append(torch.zeros_like(numbers[0]))
        else:
            numbers.append(add_credit(credit, params, self._gate_threshold(), x_bD, grads, self.collectives))
        totals = self.collectives.sum_dp(torch.stack(numbers))
        grad_norm, l0, credit_total = self._finish(grads, totals, global_tokens)
        clip = (self.cfg.grad_clip / (grad_norm + 1e-6)).clamp(max=1) if self.cfg.grad_clip else None
        self.optimiser.step(grads.named(), clip, lr)
        self._constrain()
        if params is not None:
            apply_deltas(asked(credit, "deltas", params, self._gate_threshold()), params)

        fvu, reconstruction, aux, penalty, _, cut, _ = totals.unbind()
        self.levels = fvu, l0
        memory = THRESHOLD_MEMORY if self.steps_done or self.sae.init_from is not None else 0.0
        self.threshold.mul_(memory).add_((1 - memory) * cut.float())
        self._move_price(l0, context.k)
        self.steps_done += 1
        self.silent_m.add_(global_tokens).masked_fill_(fired_m > 0, 0)
        self._resample_if_due(x_bD, error_bO, global_tokens)
        self._clock[0] += time.perf_counter() - began
        self._clock[1] += 1
        if self.steps_done % self.cfg.log_every == 0:
            shown = self.own["theta"].mean() if "theta" in self.own else self.threshold.to(self.dtype)
            loss = reconstruction + aux + penalty + credit_total
            self._find_dead()
            self._log(lr, torch.stack([fvu, aux, penalty, l0, shown, credit_total, grad_norm, loss]))

    def scaled(self, raw_bD: torch.Tensor) -> torch.Tensor:
        x_bD = raw_bD.to(self.mesh.device, self.dtype)
        # In place where this is a copy already: of the evidence there is no room for two.
        return x_bD * self.input_scale if x_bD is raw_bD else x_bD.mul_(self.input_scale)

    def _loss_and_gradients(
        self, x_bD: torch.Tensor, y_bO: torch.Tensor, context: StepContext, discount_m: torch.Tensor | None
    ) -> tuple[Gradients, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Gradients of this shard, which of its latents fired, this dp rank's sums, and y_hat - y."""
        n = context.shard.global_rows
        target = Target(y_bO, self.W_dec_mD, self.b_dec_D, centred_power(y_bO, n, self.collectives.sum_dp))
        dead = None
        if self.n_dead and self.sae.aux_k:
            dead = backward.dead_in_turn(
                self.dead_m, self.n_dead, self.sae.aux_pool, self.first_latent, self.steps_done
            )
        encoder = self._encoder(x_bD)._replace(watch_n=dead)
        if discount_m is None:
            active = self.architecture.forward(encoder, self.own, context)
        else:
            # Dead latents get no bonus: AuxK reads their pre-activations from this product.
            bonus_m = (discount_m * self.threshold.to(self.dtype)).masked_fill(self.dead_m, 0)
            active = forward_with_bonus(self.architecture, encoder, self.own, context, bonus_m)
        found = reconstruct(segments(active.codes, self.bounds), active.codes, target, self.collectives)
        regular = self.architecture.regularise(active, context, target)
        d_f_N, d_gate_N = found.d_f_N, None
        if regular is not None:
            d_gate_N = regular.d_gate_N
            d_f_N = d_f_N if regular.d_f_N is None else d_f_N + regular.d_f_N
        if discount_m is not None and self.architecture.ranks:
            d_f_N = d_f_N * (active.codes.vals_N > 0)  # a bonus may select what is not above 0
        flow = backward.Flow(active, d_f_N, d_gate_N, found.d_f_N, encoder.centred_BD, found.slope_GBO)
        grads, fired_m = backward.gradients(
            flow,
            self.architecture,
            self.own,
            self.W_enc_mD,
            self.bounds,
            self.subtract_b_dec,
            context,
            self.collectives,
        )
        if discount_m is not None and isinstance(self.architecture, JumpReLU):
            discount_price(self.architecture, grads, active, self.own, discount_m, context, self.collectives)
        none = torch.zeros_like(found.fvu)
        aux = none
        if dead is not None:
            aux = backward.add_aux_k(
                grads,
                -found.error_BO,
                encoder,
                dead,
                self.n_dead,
                self.W_dec_mD,
                self.sae,
                n,
                self.subtract_b_dec,
                self.collectives,
            )
        share = len(x_bD) / n
        numbers = [
            found.fvu,
            found.loss,
            aux,
            none if regular is None else regular.loss,
            (active.codes.vals_N > 0).sum().to(self.dtype),
            active.threshold.to(self.dtype) * share,
        ]
        return grads, fired_m, numbers, found.error_BO

    def _credit_params(self, global_tokens: int) -> CreditParams:
        centre_D = self.b_dec_D if self.subtract_b_dec else self.W_enc_mD.new_zeros(self.d_in)
        W_dec_mO = None if self.transcodes else self.W_dec_mD
        return CreditParams(
            self.W_enc_mD, self.b_enc_m, centre_D, self.first_latent, self.steps_done, global_tokens, W_dec_mO
        )

    def _gate_threshold(self) -> torch.Tensor:
        return self.own.get("theta", self.threshold)

    def _finish(
        self, grads: Gradients, totals: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final gradients in place, and their norm, L0 and credit loss of the whole SAE: one all-reduce over tp."""
        if self.sae.decoder_norm == "unit":
            # Moving a decoder row along itself is undone by the renormalisation: keep the optimiser from seeing it.
            project_out(grads.W_dec_mO, self.W_dec_mD, grads.along_m)
        sharded = [grads.W_enc_mD, grads.W_dec_mO, grads.b_enc_m, *grads.own.values()]
        shown = (self.steps_done + 1) % self.cfg.log_every == 0
        squares = totals.new_zeros(())
        if self.cfg.grad_clip or shown:
            squares = torch.stack([torch.linalg.vector_norm(gradient) for gradient in sharded]).square().sum()
        packed = torch.cat([grads.b_dec_shard_O, torch.stack([squares, totals[4], totals[6]])])
        self.collectives.sum_tp(packed)
        grads.b_dec_O.add_(packed[:-3])
        norm = (packed[-3] + grads.b_dec_O.square().sum()).sqrt()
        return norm, packed[-2] / n, packed[-1]

    def _constrain(self) -> None:
        if self.sae.decoder_norm == "unit":
            self.optimiser.unit_rows(self.W_dec_mD)
        if "theta" in self.own:
            self.own["theta"].clamp_(min=0)

    def _move_price(self, l0: torch.Tensor, k: int) -> None:
        """jumprelu: the multiplier of its L0 constraint follows the error, for the next step."""
        if "theta" in self.own:
            self.price[0] += PRICE_RATE * ((l0 - k) / k).clamp(-1, 1)
            self.price[1] = l0

    def _resample_if_due(self, x_bD: torch.Tensor, error_bO: torch.Tensor, n: int) -> None:
        every = self.sae.resample_every
        if every and self.steps_done % every == 0 and not decays(self.steps_done, self.cfg):
            self._find_dead()
            if self.n_dead:
                resample(self, x_bD, error_bO, n)

    def _find_dead(self) -> None:
        """Re-decides which latents are dead. Every `log_every` steps only: it needs a host read."""
        self.dead_m = self.silent_m >= self.sae.dead_after_tokens
        self.n_dead = int(self.collectives.sum_tp(self.dead_m.sum()))

    def _encoder(self, x_bD: torch.Tensor) -> Encoder:
        centred_bD = x_bD - self.b_dec_D if self.subtract_b_dec else x_bD
        low_precision = self.cfg.autocast == "bfloat16"
        return Encoder(centred_bD, self.W_enc_mD, self.b_enc_m, self._workspace, low_precision)

    def _context(self, n: int) -> StepContext:
        shard = Shard(self.mesh.rows(n)[0], n, self.first_latent, self.sae.d_sae)
        k = active_latents(self.steps_done, self.sae)
        error = (self.price[1] - k) / k if self.steps_done else torch.zeros_like(self.price[1])
        price = ((self.price[0] + PRICE_PULL * error.clamp(-1, 1)) / (n * k)).to(self.dtype)
        return StepContext(shard, self.collectives, k, sparsity_coefficient(self.steps_done, self.sae), price)

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
        """Active latents of this shard at inference, valued by their pre-activations. All ranks of a tp row must
        call it together (topk)."""
        pre_bm = self.pre_activations(raw_bD)
        threshold = self.own["theta"] if "theta" in self.own else self.threshold.to(self.dtype)
        return Codes.of(pre_bm, self.architecture.infer_gate(pre_bm, threshold, self.collectives))

    @torch.no_grad()
    def pre_activations(self, raw_bD: torch.Tensor) -> torch.Tensor:
        """[b, m] of this shard; no communication."""
        return torch.addmm(self.b_enc_m, self._encoder(self.scaled(raw_bD)).centred_BD, self.W_enc_mD.T)

    def thresholds_m(self) -> torch.Tensor:
        """[m]: the pre-activation from which on each latent counts as active; no communication."""
        if "theta" in self.own:
            return self.own["theta"]
        return self.threshold.to(self.dtype).expand(len(self.b_enc_m))

    def fork(self) -> ShardedTrainer:
        """A copy that shares nothing, optimiser state included."""
        d_out = self.d_out if self.transcodes else None
        twin = ShardedTrainer(self.sae, self.cfg, self.d_in, self.seed, self.collectives, d_out)
        twin.load_state({name: tensor.clone() for name, tensor in self.state().items()}, self.meta())
        return twin

    # ------------------------------------------------------------------ state

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {"W_enc": self.W_enc_mD, "W_dec": self.W_dec_mD, "b_enc": self.b_enc_m, "b_dec": self.b_dec_D}
        return named | self.own

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on; see `checkpoint.is_sharded`."""
        counts = {"threshold": self.threshold, "price": self.price, "silent": self.silent_m, "dead": self.dead_m}
        return {**self.parameters(), **counts, **self.optimiser.state()}

    def meta(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "input_scale": self.input_scale,
            "output_scale": self.output_scale,
            "architecture": self.sae.architecture,
            "k": self.sae.k,
            "margin": self.sae.margin,
            "d_sae": self.sae.d_sae,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "transcodes": self.transcodes,
            "subtract_b_dec": self.subtract_b_dec,
            "input_norm": self.sae.input_norm,
        }

    def load_state(self, state: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Restores `state()` and `meta()`; sharded tensors are this shard's rows."""
        self.steps_done = int(meta["steps_done"])
        self.input_scale, self.output_scale = float(meta["input_scale"]), float(meta["output_scale"])
        own = {**self.parameters(), "threshold": self.threshold, "price": self.price, "silent": self.silent_m}
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.dead_m = state["dead"].to(self.mesh.device, torch.bool)
        self.n_dead = int(self.collectives.sum_tp(self.dead_m.sum()))
        self.optimiser.load(state, self.steps_done)

    def load_weights(self, sae: TrainedSAE, raw_TD: torch.Tensor, target_TO: torch.Tensor | None = None) -> None:
        """Starts from a trained SAE of the same shape instead of `initialise`; see `warm_start`."""
        raw_TD = raw_TD.to(self.mesh.device, self.dtype)
        target_TO = raw_TD if target_TO is None else target_TO.to(self.mesh.device, self.dtype)
        self._measure_scales(raw_TD, target_TO)
        warm_start(self, sae)
        if self.architecture.ranks and not float(self.threshold):
            self._measure_threshold(self.scaled(raw_TD))

    def _measure_threshold(self, x_TD: torch.Tensor) -> None:
        """The running threshold of an SAE whose file says none, as a first step would find it: credit counts in it."""
        sample_TD = x_TD[: min(len(x_TD), self.cfg.batch_tokens)]
        low, high = self.mesh.rows(len(sample_TD))
        context = self._context(len(sample_TD))
        cut = self.architecture.forward(self._encoder(sample_TD[low:high]), self.own, context).threshold
        self.threshold.copy_(self.collectives.sum_dp(cut.to(self.dtype) * ((high - low) / len(sample_TD))))
