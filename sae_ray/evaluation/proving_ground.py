"""One cell of the bake-off: an SAE is pretrained on a synthetic world, fine-tuned with credit, and measured.

The trainer and the estimators are the real ones (`trainer.sharded_sae`, `reward.credit`), on one process and without
Ray: `estimator.fit` on a round's verdicts, then `trainer.step(..., credit)` until the next round. SAEs are compared
at matched L0: one shift of all thresholds brings each to the same number of active latents per sample.

    round r: state at step s --evidence, oracle verdicts--> rows --delay_steps--> fit --> credit until the next fit

Suffixes: B batch, N evaluation samples, T pool samples, M latents, F features, D d_in.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from sae_ray.errors import UserError
from sae_ray.evaluation.proving_ground_base import (
    BATCH,
    Base,
    Ground,
    digest,
    make_trainer,
    pretrained,
    without_moments,
)
from sae_ray.evaluation.proving_ground_controls import Probes, TruthGate
from sae_ray.evaluation.proving_ground_evidence import Asking, Pool, ask
from sae_ray.evaluation.proving_ground_readout import (
    TARGET_L0,
    Readout,
    concepts,
    main_metrics,
    measurements,
    readout,
)
from sae_ray.evaluation.proving_ground_rounds import Rounds, margin
from sae_ray.evaluation.proving_ground_simplicity import PARTS, Rewarding, SimplicityRewards
from sae_ray.evaluation.synthetic_judge import Explaining, JudgeErrors, OracleJudge
from sae_ray.evaluation.synthetic_matching import best_features
from sae_ray.evaluation.synthetic_metrics import Truth, collapsed, detect
from sae_ray.reward.credit import ESTIMATORS, CreditSettings, LatentState, RewardBatch
from sae_ray.reward.verdict_memory import VerdictMemory
from sae_ray.trainer.gamma_hold import GammaHold
from sae_ray.trainer.sharded_sae import CreditLoss, ShardedTrainer

CONTROLS = ("base", "continued", "true_labels", "probes", "verdict_probes")
PROBE_STEPS, PROBE_BATCHES = 1500, 100
YOUNGER = (
    "keep_rounds", "fitted_gates", "max_fvu_rise", "max_l0_fall", "rollout_gamma", "rollout_share", "reader_cosine",
    "rewards", "bonus",
)  # fmt: skip
WATCHED = 5000  # held-out samples that metrics during fine-tuning, and what a latent stands for, are of


@dataclass(frozen=True)
class Cell:
    """What is done to a base.

    Attributes:
        method: a name of `reward.credit.ESTIMATORS`, or of CONTROLS: the base as it is; trained on without credit;
            gate BCE with the truth; supervised probes (a ceiling of linear detectors, no SAE); the SAE with its gates
            replaced by probes of the verdicts.
        k: active latents per sample while fine-tuning.
        verdicts: per latent, over all rounds; judged generations are among them.
        noise, explanation_noise, leniency: see `JudgeErrors` (verdict, explanation, leniency).
        delay_steps: trainer steps between gathering evidence and the arrival of its rewards.
        shuffled, frozen_decoder: controls that go with an estimator.
        keep_rounds, max_fvu_rise, max_l0_fall: as in `config.loop`; what is held needs a delay, to be measured in.
        fitted_gates: `rlaif.gate_threshold: fitted`.
        rollout_gamma: of an estimator's part that learns from rollouts; None: gamma.
        rollout_share: of the verdicts, on generations instead of samples, where an estimator learns from both.
        rewards: what a round's rewards are made of: the verdicts, or how simple the decoder's rows are (see
            `proving_ground_simplicity`); shuffled deals these anew over the latents too.
        bonus: `rlaif.bonus`, the strength of a selection bonus.
        reader_cosine: between where the steered model writes a feature and where it reads it; see `SteeredWriter`.
    """

    base: Base
    method: str
    k: int = 4
    verdicts: int = 512
    noise: float = 0.1
    explanation_noise: float = 0.0
    leniency: float = 0.0
    delay_steps: int = 0
    explain: Explaining = "f1"
    shuffled: bool = False
    frozen_decoder: bool = False
    rounds: int = 2
    steps: int = 1600
    lr: float = 1e-3
    gamma: float = 0.1
    slope: float = 10.0
    shrink: float | None = None
    half_life_steps: float = 1e6  # no ageing unless a cell asks for it
    pool: int = 30_000
    keep_rounds: int = 0
    fitted_gates: bool = False
    max_fvu_rise: float | None = None
    max_l0_fall: float | None = None
    rollout_gamma: float | None = None
    rollout_share: float = 0.5
    reader_cosine: float = 1.0
    rewards: Rewarding = "verdicts"
    bonus: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in CONTROLS and self.method not in ESTIMATORS:
            known = ", ".join([*CONTROLS, *ESTIMATORS])
            raise UserError(f"cell: method {self.method!r} is unknown; known: {known}")
        if self.holds and (self.method not in ESTIMATORS or not self.delay_steps):
            raise UserError(
                f"cell: max_fvu_rise and max_l0_fall need an estimator and delay_steps above 0, not {self.method} and "
                f"{self.delay_steps}"
            )
        if self.rewards not in PARTS:
            raise UserError(f"cell: rewards {self.rewards!r} are unknown; known: {', '.join(PARTS)}")
        if PARTS[self.rewards] and not (self.method in ESTIMATORS and ESTIMATORS[self.method].uses_reward):
            using = ", ".join(name for name, kind in ESTIMATORS.items() if kind.uses_reward)
            raise UserError(f"cell: rewards {self.rewards}: {self.method} uses no reward; estimators that do: {using}")
        if self.keep_rounds and self.method == "policy_gradient":
            raise UserError("cell: keep_rounds keeps verdicts on samples, and policy_gradient asks for none")

    @property
    def rollouts(self) -> int:
        """Judged generations per latent and round."""
        if self.method not in ESTIMATORS or not ESTIMATORS[self.method].uses_rollouts:
            return 0
        share = 1.0 if self.method == "policy_gradient" else self.rollout_share
        return round(share * (self.verdicts // self.rounds))

    @property
    def holds(self) -> bool:
        return self.max_fvu_rise is not None or self.max_l0_fall is not None

    @property
    def key(self) -> str:
        # What cells could not yet say when the first were run is left out where it is as it was then.
        usual = {f.name: f.default for f in fields(self) if f.name in YOUNGER}
        return digest(
            {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}
        )

    @classmethod
    def read(cls, record: dict[str, Any]) -> Cell:
        """From `asdict`, as a line of results holds it."""
        return cls(**{**record, "base": Base(**record["base"])})


def run_cell(cell: Cell, ground: Ground, cache: Path) -> dict[str, Any]:
    """Everything that is reported of a cell, ready for JSON; see `proving_ground_readout.measurements`."""
    base = pretrained(cell.base, ground, cache)
    began = time.process_time()
    curve: list[dict[str, float]] = []
    judge = None
    if cell.method == "probes":
        found = _ceiling(base, ground)
    elif cell.method == "verdict_probes":
        at, judge = _verdict_probes(cell, base, ground)
        found = _measured(cell, base, at, ground)
    else:
        trainer = base
        if cell.method != "base":
            trainer, judge = fine_tune(cell, base, ground, curve)
        found = _measured(cell, base, readout(trainer, ground.truth.x_ND), ground)
    spent = 0 if judge is None else judge.verdicts_spent
    return {
        "key": cell.key,
        "cell": asdict(cell),
        **found,
        "curve": curve,
        "verdicts_spent": spent,
        "verdicts_per_latent": spent / len(base.b_enc_m),
        "texts_read": 0 if judge is None else judge.texts_read,
        "cpu_seconds": time.process_time() - began,
    }


def _measured(cell: Cell, base: ShardedTrainer, at: Readout, ground: Ground) -> dict[str, Any]:
    """The cell's metrics at every L0, and the share of children's latents that it made their parents'."""
    some = _watched(ground)
    then_M = concepts(readout(base, some.x_ND), some, cell.k)
    now_M = concepts(at._replace(margin_NM=at.margin_NM[:WATCHED], value_NM=at.value_NM[:WATCHED]), some, cell.k)
    l0s = sorted({*TARGET_L0, cell.k})
    return measurements(at, ground.truth, l0s) | {"collapsed": collapsed(then_M, now_M, ground.world.forest)}


def _watched(ground: Ground) -> Truth:
    return ground.truth._replace(x_ND=ground.truth.x_ND[:WATCHED], on_NF=ground.truth.on_NF[:WATCHED])


# ---------------------------------------------------------------------- fine-tuning


def fine_tune(
    cell: Cell, base: ShardedTrainer, ground: Ground, watch: list[dict[str, float]] | None = None
) -> tuple[ShardedTrainer, OracleJudge]:
    """A copy of the base, trained on with the cell's credit; its optimiser starts anew.

    Args:
        watch: gets the metrics at matched L0 (`cell.k`) at the end of each round.
    """
    trainer = make_trainer(cell.base, cell.k, cell.steps, cell.lr, base.d_in)
    trainer.load_state(without_moments(base), {**base.meta(), "steps_done": 0})
    frozen = {name: trainer.parameters()[name].clone() for name in ("W_dec", "b_dec")} if cell.frozen_decoder else {}
    judge = oracle(cell, ground)
    rng = np.random.default_rng([cell.base.seed, 11])
    settings = CreditSettings(
        cell.gamma, cell.slope, cell.shrink, cell.half_life_steps, bonus=cell.bonus, fitted_gates=cell.fitted_gates,
        rollout_gamma=cell.rollout_gamma,
    )  # fmt: skip
    memory = VerdictMemory(cell.keep_rounds, cell.half_life_steps) if cell.keep_rounds else None
    simplicity = SimplicityRewards(cell.rewards, cell.base.seed) if PARTS[cell.rewards] else None
    rounds = Rounds(ground, cell.pool, judge, _asking(cell), rng, memory, cell.rollouts, cell.reader_cosine, simplicity)
    hold = GammaHold(cell.max_fvu_rise, cell.max_l0_fall) if cell.holds else None
    per_round = cell.steps // cell.rounds
    truth = TruthGate(cell.gamma, cell.slope)
    credit: CreditLoss | None = truth if cell.method == "true_labels" else None
    feature_M = torch.empty(0)
    pending: list[tuple[int, RewardBatch, Pool]] = []
    for step in range(cell.steps):
        if step % per_round == 0 and step // per_round < cell.rounds:
            index = step // per_round
            feature_M = best_features(trainer.W_dec_mD, ground.truth.directions_FD)
            if cell.method in ESTIMATORS:
                rows, pool = rounds.judged(trainer, step, index)
                if cell.delay_steps:  # evidence is of the latents as they were judged, not as they will be
                    judged_ND = normalize(trainer.W_enc_mD[torch.from_numpy(rows.latents)], dim=1)
                    rows = rows.judged_at(rows.latents, judged_ND.numpy())
                pending.append((step + cell.delay_steps, rows, pool))
        while pending and pending[0][0] <= step:
            _, rows, pool = pending.pop(0)
            x_TD = trainer.scaled(pool.x_TD)
            credit = ESTIMATORS[cell.method].fit(settings, rows, _latents(trainer, rows), x_TD, pool.layout)
            if hold is not None:
                hold.begin()
                credit = hold.held(credit)
        x_BD, firings = ground.batch(step)
        if credit is truth:
            truth.labels_BM = ground.world.shown(firings)[:, feature_M]
        trainer.step(x_BD, BATCH, credit)
        if hold is not None:
            hold.observe(*trainer.levels)
        for name, tensor in frozen.items():
            trainer.parameters()[name].copy_(tensor)
        if watch is not None and (step + 1) % per_round == 0:
            weight = {} if hold is None else {"gamma_weight": float(hold.weight)}
            watch.append({"step": step + 1, **weight, **_progress(trainer, ground, cell.k)})
    return trainer, judge


def oracle(cell: Cell, ground: Ground) -> OracleJudge:
    errors = JudgeErrors(cell.explanation_noise, cell.noise, cell.leniency)
    return OracleJudge(ground.world.forest, errors, seed=700_001 + cell.base.seed)


def _asking(cell: Cell) -> Asking:
    return Asking(cell.verdicts // cell.rounds - cell.rollouts, cell.explain, shuffled=cell.shuffled)


def _latents(trainer: ShardedTrainer, rows: RewardBatch) -> LatentState:
    latents = torch.from_numpy(rows.latents)
    centre_D = trainer.b_dec_D if trainer.subtract_b_dec else torch.zeros_like(trainer.b_dec_D)
    W_ND, b_N, W_dec_ND = (tensor[latents] for tensor in (trainer.W_enc_mD, trainer.b_enc_m, trainer.W_dec_mD))
    return LatentState(W_ND, b_N, centre_D.clone(), trainer.threshold.clone(), W_dec_ND)


def _progress(trainer: ShardedTrainer, ground: Ground, l0: float) -> dict[str, float]:
    some = _watched(ground)
    at = readout(trainer, some.x_ND)
    return {"deployed_l0": main_metrics(at, some, None)["l0"], **main_metrics(at, some, l0)}


# ---------------------------------------------------------------------- probes


def _ceiling(base: ShardedTrainer, ground: Ground) -> dict[str, Any]:
    """Supervised linear probes of the features that the base's latents are most parallel to, each at the threshold with
    the best F1. They reconstruct nothing, and their L0 is what it is."""
    feature_M = best_features(base.W_dec_mD, ground.truth.directions_FD)
    drawn = [ground.batch(step) for step in range(PROBE_BATCHES)]
    batches = [(x_BD, ground.world.shown(firings)[:, feature_M]) for x_BD, firings in drawn]
    pool = ground.pool(20_000, 0)
    probes = Probes(pool.x_TD, len(feature_M))
    probes.train_on_labels(batches, PROBE_STEPS)
    probes.choose_thresholds(pool.x_TD, pool.on_TF[:, feature_M])
    fires_NM = probes.margin(ground.truth.x_ND) >= 0
    found = detect(fires_NM, ground.truth.on_NF[:, feature_M])
    means = {name: float(values.mean()) for name, values in found._asdict().items()}
    return {"deployed": {"l0": float(fires_NM.sum(1).double().mean()), **means}, "matched": {}, "frontier": []}


def _verdict_probes(cell: Cell, base: ShardedTrainer, ground: Ground) -> tuple[Readout, OracleJudge]:
    """The base, each gate replaced by a probe fitted to the verdicts on its latent; magnitudes and decoder stay."""
    judge, pool = oracle(cell, ground), ground.pool(cell.pool, 0)
    margin_TM = margin(base, pool)
    asking = Asking(cell.verdicts, cell.explain, shuffled=cell.shuffled)
    rows = ask(judge, asking, margin_TM, pool, 0, 0, np.random.default_rng([cell.base.seed, 11]))
    probes = Probes(pool.x_TD, len(base.b_enc_m))
    probes.train_on_verdicts(pool.x_TD, rows)
    at = readout(base, ground.truth.x_ND)
    return at._replace(margin_NM=probes.margin(ground.truth.x_ND)), judge
