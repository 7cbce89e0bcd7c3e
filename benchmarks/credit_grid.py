"""Which cells the bake-off has, the most telling ones first.

A grid is a row of stages and a stage has the same cells for every seed: all seeds of a stage come before the next
stage, so that a run that is cut short has whole comparisons with intervals. Seconds are CPU seconds of one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sae_ray.evaluation.proving_ground import CONTROLS, Cell
from sae_ray.evaluation.proving_ground_base import Base
from sae_ray.reward.credit import ESTIMATORS

COMPARED = tuple(ESTIMATORS)
DEFAULT = COMPARED[0]
BOTH = "teacher_gate+policy_gradient"
OTHERS = COMPARED[1:]
# Whose loss gamma weighs; the others are not trained on a loss, or change weights and selection directly.
WITH_GAMMA = (
    "teacher_gate", "bank_gate", "reward_model", "preference", "policy_gradient", "teacher_gate+policy_gradient",
    "true_labels",
)  # fmt: skip
GAMMAS = (0.01, 0.03, 0.1, 0.3)
# Of the sweep. Its cells are half as long as others, on half as many samples; the longest delay is half of that again.
# A delay of a whole round (400 steps of HALF) would be one of which the last round never arrives.
VERDICTS, NOISES, DELAYS = (32, 128, 256, 1024), (0.0, 0.1, 0.2), (0, 100, 350)
HALF: dict[str, Any] = {"steps": 800, "pool": 15_000}
SWEPT: dict[str, Any] = {"verdicts": 256, "noise": 0.1}  # where delays are swept alone


# Of the combination.
LONGER: dict[str, Any] = {"steps": 3200}
KEPT: dict[str, Any] = {**LONGER, "keep_rounds": 1}
ROLLOUTS: dict[str, Any] = {"rollout_gamma": 0.07, "rollout_share": 0.125}
BONUSES = (0.1, 1.0, 4.0)  # of a reward for simplicity: what a run has, and up to one that costs EV


class Start(NamedTuple):
    """A base at any seed, tuned at the k that it was trained at unless a cell says otherwise."""

    world: str
    architecture: str
    k: int

    def cell(self, seed: int, method: str, **changes: Any) -> Cell:
        return Cell(Base(self.world, seed, self.architecture, self.k), method, **{"k": self.k, **changes})

    def cells(self, seed: int, methods: Iterable[str], gammas: Sequence[float], **changes: Any) -> list[Cell]:
        """One cell for each method and gamma, or one for the method where gamma means nothing to it."""
        return [
            self.cell(seed, method, **changes, **({"gamma": gamma} if method in WITH_GAMMA else {}))
            for method in methods
            for gamma in (gammas if method in WITH_GAMMA else gammas[:1])
        ]


BATCHTOPK, MATRYOSHKA = Start("research", "batchtopk", 8), Start("research", "matryoshka", 8)
AT_4 = Start("research", "batchtopk", 4)
FAMILIES, FAMILIES_MATRYOSHKA = Start("parent_child", "batchtopk", 4), Start("parent_child", "matryoshka", 4)
FAMILIES_AT_8 = Start("parent_child", "batchtopk", 8)
SMALL = Start("small", "batchtopk", 6)
LARGE, LARGE_MATRYOSHKA = Start("large", "batchtopk", 12), Start("large", "matryoshka", 12)
# Where a method's F1 has gained and its EV is still near the base's.
USUAL = {BATCHTOPK: 0.03, MATRYOSHKA: 0.1}


# ---------------------------------------------------------------------- stages of `deciding` and `sweep`


def teacher(seed: int) -> list[Cell]:
    """The default's frontier with what it has to beat, and what it cannot: about 600 s a seed."""
    cells = []
    for start, gammas in ((BATCHTOPK, (0.03, 0.01, 0.1)), (MATRYOSHKA, (0.1, 0.03, 0.3))):
        usual = gammas[0]
        cells += [start.cell(seed, "base"), start.cell(seed, "continued"), *start.cells(seed, [DEFAULT], gammas)]
        cells += start.cells(seed, [DEFAULT], (usual, gammas[1]), shuffled=True)
        cells += start.cells(seed, ["true_labels", "probes"], (usual, gammas[2]))
    return cells


def parents(seed: int) -> list[Cell]:
    """Absorption, where nothing else can go wrong, and children that a broad explanation makes parents."""
    cells = [start.cell(seed, method) for start in (FAMILIES, FAMILIES_MATRYOSHKA) for method in ("base", "continued")]
    cells += FAMILIES.cells(seed, [DEFAULT], (0.003, 0.01, 0.03, 0.1, 0.3))
    cells += FAMILIES.cells(seed, [DEFAULT], (0.003, 0.01, 0.1), shuffled=True)
    cells += FAMILIES.cells(seed, [DEFAULT], (0.1,), explain="random_negatives")
    cells += FAMILIES.cells(seed, ["true_labels"], (0.003, 0.01, 0.03, 0.1))
    return cells + FAMILIES_MATRYOSHKA.cells(seed, [DEFAULT], (0.1,))


def parents_at_8(seed: int) -> list[Cell]:
    """The same world where all that is active has a latent: 6.4 features are on average, so that at 4 some absorption
    is what the k costs. From the SAE that absorbed at 4, and from one that never had to."""
    small = (0.003, 0.01, 0.03)  # EV is .99 here: what costs a hundredth of it is a small gamma
    cells = [FAMILIES.cell(seed, "continued", k=8), *FAMILIES.cells(seed, [DEFAULT], (*small, 0.1), k=8)]
    cells += FAMILIES.cells(seed, [DEFAULT], small, k=8, shuffled=True)
    cells += FAMILIES.cells(seed, ["true_labels"], (0.001, *small), k=8)
    cells += [FAMILIES_AT_8.cell(seed, method) for method in ("base", "continued")]
    return cells + FAMILIES_AT_8.cells(seed, [DEFAULT], small)


def controls(seed: int) -> list[Cell]:
    """What the default is not: its decoder frozen, probes in its place, other explanations, a lenient judge."""
    cells = []
    for start, gamma in USUAL.items():
        cells += start.cells(seed, [DEFAULT], (gamma,), explain="random_negatives")
        cells += start.cells(seed, [DEFAULT], (gamma,), frozen_decoder=True)
        cells.append(start.cell(seed, "verdict_probes"))
    cells += BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), leniency=0.3)
    return cells + BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), explanation_noise=0.2)


def explanations(seed: int) -> list[Cell]:
    """Explanations as a run chooses them, for verdicts that err and count, instead of by labels that nobody has."""
    cells = BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), explain="specific")
    cells += BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), explain="specific", shuffled=True)
    cells += BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), explain="specific", verdicts=2048)
    cells += MATRYOSHKA.cells(seed, [DEFAULT], (USUAL[MATRYOSHKA],), explain="specific")
    return cells + FAMILIES.cells(seed, [DEFAULT], (0.1,), explain="specific")


def estimators(seed: int) -> list[Cell]:
    return BATCHTOPK.cells(seed, OTHERS, (0.03, 0.1))


def budgets(seed: int) -> list[Cell]:
    """Verdicts, noise and staleness, one at a time."""
    cells = []
    for changes in ({"verdicts": 2048}, {"verdicts": 128}, {"noise": 0.0}, {"noise": 0.2}, {"delay_steps": 700}):
        cells += BATCHTOPK.cells(seed, [DEFAULT], (USUAL[BATCHTOPK],), **changes)
    return cells + MATRYOSHKA.cells(seed, [DEFAULT], (USUAL[MATRYOSHKA],), verdicts=2048)


def at_l0_4(seed: int) -> list[Cell]:
    cells = [AT_4.cell(seed, "base"), AT_4.cell(seed, "continued"), *AT_4.cells(seed, [DEFAULT], (0.1, 0.03))]
    return [*cells, *AT_4.cells(seed, [DEFAULT], (0.1,), shuffled=True), *AT_4.cells(seed, ["true_labels"], (0.1,))]


def combined(seed: int) -> list[Cell]:
    """What adds up: twice the steps at a lower gamma, verdicts kept for the next round, an eighth of them on rollouts.

    Chosen on seeds 10 and 11. With controls, and with steered models that read elsewhere than they write.
    """
    cells = [BATCHTOPK.cell(seed, method, **LONGER) for method in ("base", "continued")]
    cells += BATCHTOPK.cells(seed, [BOTH], (0.02, 0.03), **KEPT, **ROLLOUTS)
    cells += BATCHTOPK.cells(seed, [BOTH], (0.02,), **KEPT, **ROLLOUTS, shuffled=True)
    cells += BATCHTOPK.cells(seed, [DEFAULT], (0.02, 0.03), **KEPT)
    for cosine in (0.5, 0.0):
        cells += BATCHTOPK.cells(seed, [BOTH], (0.02,), **KEPT, **ROLLOUTS, reader_cosine=cosine)
    more: dict[str, Any] = {"verdicts": 2048, "rollout_gamma": 0.2, "rollout_share": 0.25}
    return [*cells, *BATCHTOPK.cells(seed, [BOTH], (0.05,), **KEPT, **more),
            *BATCHTOPK.cells(seed, ["true_labels"], (0.02, 0.03), **LONGER)]  # fmt: skip


def simplicity(seed: int) -> list[Cell]:
    """Asking for simple features, as far as rewards reach an SAE: by what an estimator adds at selection."""
    cells = []
    for start in (BATCHTOPK, FAMILIES):
        cells += [start.cell(seed, method) for method in ("base", "continued")]
        cells += [start.cell(seed, "selection_bonus", rewards="simplicity", bonus=bonus) for bonus in BONUSES]
        for alone in ("atomicity", "splitting"):
            cells.append(start.cell(seed, "selection_bonus", rewards=alone, bonus=BONUSES[1]))
        cells.append(start.cell(seed, "selection_bonus", rewards="simplicity", bonus=BONUSES[1], shuffled=True))
    return cells


def sweep(seed: int) -> list[Cell]:
    """Every estimator over verdicts and noise, and over staleness at one of them, in a world small enough for all."""
    cells = [SMALL.cell(seed, method, **HALF) for method in ("base", "continued", "probes")]
    for verdicts in VERDICTS:
        for noise in NOISES:
            asked: dict[str, Any] = {"verdicts": verdicts, "noise": noise, **HALF}
            cells.append(SMALL.cell(seed, "verdict_probes", **asked))
            cells += SMALL.cells(seed, COMPARED, (0.03,), **asked)
            cells += SMALL.cells(seed, [DEFAULT], (0.03,), **asked, shuffled=True)
    for delay in DELAYS[1:]:
        cells += SMALL.cells(seed, COMPARED, (0.03,), **SWEPT, **HALF, delay_steps=delay)
    return cells


# ---------------------------------------------------------------------- what `full` adds


def sweep_delays(seed: int) -> list[Cell]:
    """Staleness at all verdicts and noises; credit that halves as it ages, as a run's does; the teacher's gammas."""
    cells = SMALL.cells(seed, ["true_labels", DEFAULT], GAMMAS, **SWEPT, **HALF)
    for verdicts in VERDICTS:
        for noise in NOISES:
            for delay in DELAYS[1:]:
                asked: dict[str, Any] = {"verdicts": verdicts, "noise": noise, **HALF}
                cells += SMALL.cells(seed, COMPARED, (0.03,), **asked, delay_steps=delay)
    for delay in DELAYS:
        cells += SMALL.cells(seed, [DEFAULT], (0.03,), **SWEPT, **HALF, delay_steps=delay, half_life_steps=200.0)
    return cells


def frontiers(seed: int) -> list[Cell]:
    """The gammas that `deciding` leaves out, and the other estimators from Matryoshka and with shuffled verdicts."""
    cells = []
    for start, usual in USUAL.items():
        cells += start.cells(seed, [DEFAULT, "true_labels"], GAMMAS)
        cells += start.cells(seed, [DEFAULT], GAMMAS, shuffled=True)
        cells += start.cells(seed, [DEFAULT], GAMMAS, verdicts=2048)
        cells += start.cells(seed, OTHERS, (usual,))
        cells += start.cells(seed, OTHERS, (usual,), shuffled=True)
    return cells


def large(seed: int) -> list[Cell]:
    cells = [LARGE.cell(seed, method) for method in ("base", "continued")]
    cells += LARGE.cells(seed, [DEFAULT], (0.03, 0.1))
    cells += LARGE.cells(seed, [DEFAULT], (0.03,), shuffled=True)
    cells += LARGE.cells(seed, ["true_labels"], (0.03,))
    return cells + LARGE.cells(seed, [DEFAULT], (0.03,), explain="random_negatives")


def large_matryoshka(seed: int) -> list[Cell]:
    cells = [LARGE_MATRYOSHKA.cell(seed, method) for method in ("base", "continued")]
    return cells + LARGE_MATRYOSHKA.cells(seed, [DEFAULT], (0.1,))


def smoke(seed: int) -> list[Cell]:
    """Controls and estimators, shrunk until all take a minute or two: it shows that things run."""
    base = Base("research", seed, steps=150)
    small: dict[str, Any] = {"steps": 60, "pool": 6000, "verdicts": 64}
    return [Cell(base, method, **small) for method in (*CONTROLS, *COMPARED)]


# ---------------------------------------------------------------------- grids


DECIDING = (
    teacher, parents, parents_at_8, controls, explanations, estimators, budgets, at_l0_4, combined, simplicity,
)  # fmt: skip
GRIDS: dict[str, tuple[Callable[[int], list[Cell]], ...]] = {
    "smoke": (smoke,),
    "deciding": DECIDING,
    "sweep": (sweep,),
    "full": (*DECIDING, sweep, sweep_delays, frontiers, large, large_matryoshka),
}
LEFT_OUT = {
    "smoke": ["Everything: it only shows that the cells run."],
    "deciding": [
        "Estimators other than the teacher from any start but BatchTopK k 8, and their shuffled verdicts.",
        "Rewards for simplicity with other estimators, which hear no reward, and from Matryoshka.",
        "Rewards for short explanations: an oracle's are features' numbers and have no length.",
        "Verdict budgets, noise and staleness of other estimators: grid `sweep`, in the small world.",
        "The large world.",
    ],
    "sweep": [
        "Staleness but at 256 verdicts and 10% noise, gammas but .03, shuffled verdicts of others, true labels.",
        "Worlds but the small one: grid `deciding`.",
    ],
    "full": [
        "Budgets x noise x staleness outside the small world, at gammas other than .03, from Matryoshka.",
        "In the large world all but the teacher and its controls.",
    ],
}


def by_stage(
    name: str, seeds: Iterable[int], settings: dict[str, Any], only: Sequence[str] | None = None
) -> dict[str, list[Cell]]:
    """The cells of a grid in the order of running, no cell twice; `settings` are changed in all of them.

    Of a stage the bases come first: workers train them side by side, and need not wait for each other.

    Args:
        only: the stages to take; None: all. What two of them share is the first one's.
    """
    seeds = list(seeds)[:1] if name == "smoke" else list(seeds)
    seen: set[str] = set()
    stages: dict[str, list[Cell]] = {}
    for stage in GRIDS[name]:
        if only is not None and stage.__name__ not in only:
            continue
        cells = [replace(cell, **settings) for seed in seeds for cell in stage(seed)]
        cells.sort(key=lambda cell: cell.method != "base")
        stages[stage.__name__] = new = []
        for cell in cells:
            if cell.key not in seen:
                seen.add(cell.key)
                new.append(cell)
    return stages
