"""Small planted worlds for credit: concepts along axes, latents that follow or fire on them only half."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sae_ray.reward.credit import ESTIMATORS, CreditSettings, LatentState, RewardBatch, Rollouts
from sae_ray.reward.evidence import ContextLayout
from sae_ray.trainer.sharded_sae import CreditParams

D, TOKENS, SIZE = 16, 8000, 8
SETTINGS = CreditSettings(gamma=1.0, slope=10.0, shrink=0.5, half_life_steps=400)
THRESHOLD = torch.tensor(0.7, dtype=torch.float64)


@dataclasses.dataclass
class World:
    x_TD: torch.Tensor
    on_TN: torch.Tensor  # which tokens show the concept of each latent
    layout: ContextLayout
    latent: LatentState
    batch: RewardBatch
    threshold: torch.Tensor


def make_world(noise: float = 0.0, seed: int = 0) -> World:
    """Concept along e0, confounder along e1; the latent's encoder points between the two."""
    W_ND = torch.zeros(1, D, dtype=torch.float64)
    W_ND[0, 0], W_ND[0, 1] = 0.8, 0.6
    return judged_world(W_ND, torch.zeros(1, dtype=torch.float64), [7], [0], noise, seed)


def two_latents(noise: float = 0.0, seed: int = 0) -> World:
    """Latents on e0 and e1: the first is not active enough on a frequent concept, the second too much on a rare one."""
    W_ND = torch.eye(D, dtype=torch.float64)[:2]
    b_N = torch.tensor([-1.35, 0.3], dtype=torch.float64)
    return judged_world(W_ND, b_N, [7, 9], [0, 1], noise, seed, (0.03, 0.01))


def judged_world(
    W_ND: torch.Tensor,
    b_N: torch.Tensor,
    ids: list[int],
    concepts: list[int],
    noise: float,
    seed: int,
    often=(0.02, 0.02),
) -> World:
    g = torch.Generator().manual_seed(seed)
    on_T2 = torch.rand(TOKENS, 2, generator=g, dtype=torch.float64) < torch.tensor(often)
    x_TD = 0.2 * torch.randn(TOKENS, D, generator=g, dtype=torch.float64)
    x_TD[:, :2] += 2.0 * on_T2
    context_T = torch.arange(TOKENS) // SIZE
    layout = ContextLayout(context_T, torch.arange(TOKENS) % SIZE, TOKENS // SIZE, SIZE)
    W_dec_ND = W_ND.clone()
    W_dec_ND[:, 2] += 0.5  # a decoder row is not its encoder row
    W_dec_ND = torch.nn.functional.normalize(W_dec_ND, dim=1)
    latent = LatentState(W_ND, b_N, torch.zeros(D, dtype=torch.float64), W_dec_ND=W_dec_ND)
    rng = np.random.default_rng(seed)
    columns: dict[str, list[np.ndarray]] = {}
    for latent_id, w_D, b, concept in zip(ids, W_ND, b_N, concepts, strict=True):
        pre_CS = (x_TD @ w_D + b).view(-1, SIZE)
        best_C, active_C = pre_CS.amax(1).numpy(), (pre_CS.amax(1) > THRESHOLD).numpy()
        truth_C = on_T2[:, concept].view(-1, SIZE).any(1).numpy()
        inactive = np.flatnonzero(~active_C)
        near = inactive[np.argsort(-best_C[inactive])][: len(inactive) // 5]
        strata = [(np.flatnonzero(active_C), 60), (near, 20), (np.setdiff1d(inactive, near), 20)]
        chosen = [rng.choice(pool, min(n, len(pool)), replace=False) for pool, n in strata]
        rows = np.concatenate(chosen)
        parts = {
            "latent": np.full(len(rows), latent_id),
            "context": rows,
            "verdict": (truth_C[rows] ^ (rng.random(len(rows)) < noise)).astype(np.float32),
            "active": active_C[rows],
            "weight": np.concatenate(
                [np.full(len(c), len(pool) / len(c), dtype=np.float32) for c, (pool, _) in zip(chosen, strata)]  # noqa: B905
            ),
            "token": pre_CS.argmax(1).numpy()[rows] + rows * SIZE,
            "margin": (best_C - float(THRESHOLD))[rows].astype(np.float32),
        }
        for name, part in parts.items():
            columns.setdefault(name, []).append(part)
    row = {name: np.concatenate(parts) for name, parts in columns.items()}
    batch = RewardBatch(
        round=0, sae_step=100, latents=np.array(ids), credit_weight=np.full(len(ids), 1 / len(ids), dtype=np.float32),
        row_latent=row["latent"], row_context=row["context"], row_verdict=row["verdict"], row_active=row["active"],
        row_weight=row["weight"], row_token=row["token"], false_positive_rate=noise, false_negative_rate=noise,
        row_margin=row["margin"],
    )  # fmt: skip
    return World(x_TD, on_T2[:, concepts], layout, latent, batch, THRESHOLD)


def shuffled(world: World, seed: int = 0) -> World:
    """The same world with each latent's verdicts dealt out anew among its rows."""
    rng = np.random.default_rng(100 + seed)
    verdict = world.batch.row_verdict.copy()
    for latent in world.batch.latents:
        rows = np.flatnonzero(world.batch.row_latent == latent)
        verdict[rows] = rng.permutation(verdict[rows])
    return dataclasses.replace(world, batch=dataclasses.replace(world.batch, row_verdict=verdict))


def with_rollouts(world: World, n: int = 64, reward_of=None, seed: int = 0) -> World:
    """Rollouts whose reward is how far the steered direction is along the concept."""
    rng = np.random.default_rng(seed)
    u_RD = rng.normal(size=(n, D))
    u_RD /= np.linalg.norm(u_RD, axis=1, keepdims=True)
    steered_RD = world.latent.W_dec_ND[0].numpy() + 0.5 * u_RD
    reward_R = steered_RD[:, 0] / np.linalg.norm(steered_RD, axis=1) if reward_of is None else reward_of(steered_RD)
    latent = np.full(n, world.batch.latents[0])
    rollouts = Rollouts(latent, u_RD.astype(np.float32), np.ones(n), reward_R.astype(np.float32), 0.5)
    return dataclasses.replace(world, batch=dataclasses.replace(world.batch, rollouts=rollouts))


def params_of(
    world: World, step: int = 100, W_ND: torch.Tensor | None = None, W_dec_ND: torch.Tensor | None = None
) -> CreditParams:
    first, last = world.batch.latents[0], world.batch.latents[-1]
    own = torch.tensor(world.batch.latents - first)
    W_enc, W_dec = torch.zeros(2, last - first + 1, D, dtype=torch.float64)
    W_enc[own] = (world.latent.W_enc_ND if W_ND is None else W_ND).detach()
    W_dec[own] = (world.latent.W_dec_ND if W_dec_ND is None else W_dec_ND).detach()
    b_enc = torch.zeros(len(W_enc), dtype=torch.float64)
    b_enc[own] = world.latent.b_enc_N
    W_enc, b_enc, W_dec = (tensor.clone().requires_grad_() for tensor in (W_enc, b_enc, W_dec))
    return CreditParams(W_enc, b_enc, world.latent.b_dec_D, int(first), step, W_dec_mO=W_dec)


def fit(name: str, world: World, settings: CreditSettings = SETTINGS):
    return ESTIMATORS[name].fit(settings, world.batch, world.latent, world.x_TD, world.layout)


def own_rows(world: World, params: CreditParams) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.tensor(world.batch.latents - world.batch.latents[0])
    return params.W_enc_mD.detach()[own], params.b_enc_m.detach()[own]


def trained(credit, world: World, steps: int = 120, lr: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder rows and biases of the judged latents after steps on the credit alone."""
    params = params_of(world)
    optimiser = torch.optim.Adam([params.W_enc_mD, params.b_enc_m], lr=lr)
    batches = world.x_TD.split(500)
    for step in range(steps):
        optimiser.zero_grad()
        loss = credit.loss(batches[step % len(batches)], params._replace(step=100 + step), world.threshold)
        if loss is None:
            break
        loss.backward()
        optimiser.step()
    return own_rows(world, params)


def moved(credit, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """The same after its deltas."""
    params = params_of(world)
    deltas = credit.deltas(params, world.threshold)
    assert credit.deltas(params, world.threshold) is None, "deltas are given once"
    with torch.no_grad():
        for tensor, change in ((params.W_enc_mD, deltas.W_enc_nD), (params.b_enc_m, deltas.b_enc_n)):
            if change is not None:
                tensor.index_add_(0, deltas.rows_n, change)
    return own_rows(world, params)


def fires(world: World, rows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Which tokens each latent is active on, [T, N]."""
    return world.x_TD @ rows[0].T + rows[1] > world.threshold


def mean_f1(world: World, rows: tuple[torch.Tensor, torch.Tensor]) -> float:
    fires_TN = fires(world, rows)
    both_N = (fires_TN & world.on_TN).sum(0)
    return float((2 * both_N / (fires_TN.sum(0) + world.on_TN.sum(0))).mean())


def matched_f1(world: World, rows: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of the first latent when it marks as many tokens as show its concept: the direction's merit at equal L0."""
    score_T, on_T = world.x_TD @ rows[0][0], world.on_TN[:, 0]
    return float(on_T[score_T.topk(int(on_T.sum())).indices].double().mean())


def before(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    return world.latent.W_enc_ND, world.latent.b_enc_N
