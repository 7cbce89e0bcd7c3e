"""What the scorers by verdict share: asking, and turning answers into a score with its nulls, interval and rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sae_ray.errors import UserError
from sae_ray.evidence.types import QUANTILE, TOP, Example
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob, Verdicts
from sae_ray.judge.scorers.stopping import Looks, error_of, plan_looks
from sae_ray.judge.scores import Estimate, auroc, balanced_accuracy, logit_interval, soft_f1

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

NAN = float("nan")
OWN, SHUFFLED = "score", "shuffled"


@dataclass(frozen=True)
class Trial:
    """One text as a judge reads it, and whether a true explanation should get a high verdict on it."""

    text: str
    positive: bool
    context: int
    stratum: str
    weight: float = 1.0


def is_positive(example: Example) -> bool:
    return example.stratum in (TOP, QUANTILE)


def judge_of(tools: Instruments, scorer: str) -> Verdicts:
    if tools.judge is None:
        raise UserError(f"judging.scorers: {scorer} asks a judge and there is none")
    return tools.judge


def asks_questions(tools: Instruments) -> bool:
    """Whether the judge is one to be asked in words: it calibrated best by answering Yes or No."""
    return tools.calibration is not None and tools.calibration.mode == "yes_no"


async def ask(judge: Verdicts, pairs: Sequence[tuple[str, str]], mode: str | None = None) -> list[float | None]:
    """Verdicts of (text, explanation) pairs, in order; None is missing.

    One call, each different pair once, all explanations of a text together: its KV cache is filled once.
    """
    by_text: dict[str, dict[str, None]] = {}
    for text, explanation in pairs:
        by_text.setdefault(text, {})[explanation] = None
    wanted = [(text, explanation) for text, explanations in by_text.items() for explanation in explanations]
    if not wanted:
        return []
    raw = dict(zip(wanted, await judge.score(wanted, mode), strict=True))
    # A verdict that is not a number is no verdict.
    return [None if (v := raw[pair]) is None or not math.isfinite(v) else v for pair in pairs]


@dataclass(frozen=True)
class ModeMap:
    """What a calibration says of the verdicts of one mode; without a calibration, nothing."""

    probability: Callable[[float], float] | None = None
    threshold: float | None = None

    @classmethod
    def of(cls, calibration: Any, mode: str | None) -> ModeMap:
        if calibration is None:
            return cls()
        known = calibration.modes.get(mode or calibration.mode)
        return cls(known.probability, known.threshold) if known is not None else cls()

    def of_raw(self, raw: float | None) -> float | None:
        return None if raw is None or self.probability is None else self.probability(raw)


def row(trial: Trial | Example, purpose: str, raw: float | None, probability: float | None) -> dict[str, Any]:
    """One line of the Parquet file of verdicts."""
    return {
        "context": trial.context,
        "stratum": trial.stratum,
        "weight": trial.weight,
        "purpose": purpose,
        "raw": raw,
        "probability": probability,
    }


async def separate(
    scorer: str,
    jobs: Sequence[ScoreJob],
    trials: Sequence[Sequence[Trial]],
    tools: Instruments,
    cfg: JudgingConfig,
    mode: str | None = None,
    weighted: bool = True,
) -> list[Score]:
    """Soft AUROC of the verdicts on each job's trials, and of another latent's explanation on the same texts.

    The trials of a job are judged in their order, in looks (see `stopping`), all jobs' together: texts that many
    latents share are read once. The other explanation is judged on `cfg.null_share` of each class.

    Args:
        weighted: whether the trials' weights add up to the corpus, so that there is an F1 at the natural prior.
    """
    judge = judge_of(tools, scorer)
    courses = [_Course.of(job, some, cfg) for job, some in zip(jobs, trials, strict=True)]
    open_courses = [course for course in courses if course.trials]
    while open_courses:
        asked: list[tuple[_Course, str, int]] = []
        pairs: list[tuple[str, str]] = []
        for course in open_courses:
            for index in course.next_look():
                for purpose, explanation in course.explanations.items():
                    if purpose == OWN or index in course.null_on:
                        asked.append((course, purpose, index))
                        pairs.append((course.trials[index].text, explanation))
        for (course, purpose, index), raw in zip(asked, await ask(judge, pairs, mode), strict=True):
            course.answers[purpose][index] = raw
        open_courses = [course for course in open_courses if not course.enough()]
    known = ModeMap.of(tools.calibration, mode)
    return [course.score(scorer, known, weighted) for course in courses]


@dataclass
class _Course:
    """One job's way through its looks. null_on: trials that the other explanation is judged on too. answers:
    purpose -> trial index -> raw verdict."""

    job: ScoreJob
    trials: Sequence[Trial]
    looks: Looks
    explanations: dict[str, str]
    null_on: set[int]
    answers: dict[str, dict[int, float | None]] = field(default_factory=dict)
    taken: int = 0

    @classmethod
    def of(cls, job: ScoreJob, trials: Sequence[Trial], cfg: JudgingConfig) -> _Course:
        sides = [[i for i, trial in enumerate(trials) if trial.positive is positive] for positive in (True, False)]
        n_pos, share = len(sides[0]), cfg.null_share
        explanations = {OWN: job.explanation.text}
        if job.shuffled is not None:
            explanations[SHUFFLED] = job.shuffled.text
        # Evenly through the order, so that every look has its part of them.
        null_on = {i for side in sides for n, i in enumerate(side) if math.ceil((n + 1) * share) > math.ceil(n * share)}
        looks = plan_looks(n_pos, len(trials) - n_pos, cfg.stop_at_stderr)
        return cls(job, trials, looks, explanations, null_on, {purpose: {} for purpose in explanations})

    def next_look(self) -> list[int]:
        """Indices of the trials that the next look adds."""
        n_pos, n_neg = self.looks.sizes[self.taken]
        self.taken += 1
        positives = [i for i, trial in enumerate(self.trials) if trial.positive][:n_pos]
        negatives = [i for i, trial in enumerate(self.trials) if not trial.positive][:n_neg]
        return [i for i in [*positives, *negatives] if i not in self.answers[OWN]]

    def sides(self, purpose: str, stratum: str | None = None) -> tuple[list[float], list[float]]:
        """(verdicts of positives, verdicts of negatives) that are not missing."""
        pos, neg = [], []
        for index, raw in self.answers.get(purpose, {}).items():
            trial = self.trials[index]
            if raw is not None and trial.positive:
                pos.append(raw)
            elif raw is not None and stratum in (None, trial.stratum):
                neg.append(raw)
        return pos, neg

    def enough(self) -> bool:
        found = auroc_of(*self.sides(OWN), self.looks.level)
        return self.looks.enough(self.taken, found.stderr)

    def score(self, scorer: str, known: ModeMap, weighted: bool) -> Score:
        own, null = auroc_of(*self.sides(OWN), self.looks.level), auroc_of(*self.sides(SHUFFLED))
        rows = [
            row(self.trials[index], purpose, raw, known.of_raw(raw))
            for purpose, answers in self.answers.items()
            for index, raw in sorted(answers.items())
        ]
        return Score(
            scorer, self.job.latent.latent, own.value, own.low, own.high, own.stderr, null.value, 0.5, own.n,
            tuple(rows), self._extra(known, null, weighted),
        )  # fmt: skip

    def _extra(self, known: ModeMap, null: Estimate, weighted: bool) -> dict[str, float]:
        pos, neg = self.sides(OWN)
        extra = {
            "looks": float(self.taken),
            "looks_planned": float(len(self.looks.sizes)),
            "missing": float(sum(raw is None for raw in self.answers[OWN].values())),
            "shuffled_stderr": null.stderr,
        }
        extra["above_shuffled"], extra["above_shuffled_stderr"] = self._above_shuffled()
        if known.probability is not None and weighted:
            there = [
                (self.trials[i], known.probability(raw)) for i, raw in self.answers[OWN].items() if raw is not None
            ]
            extra["soft_f1"] = (
                soft_f1(
                    np.array([probability for _, probability in there]),
                    np.array([trial.positive for trial, _ in there]),
                    np.array([trial.weight for trial, _ in there]),
                )
                if pos and neg
                else NAN
            )
        if known.threshold is not None:
            extra["balanced_accuracy"] = balanced_accuracy(pos, neg, known.threshold)[0] if pos and neg else NAN
        for stratum in sorted({trial.stratum for trial in self.trials if not trial.positive}):
            extra[f"auroc_{stratum}"] = auroc_of(*self.sides(OWN, stratum)).value
        return extra

    def _above_shuffled(self) -> tuple[float, float]:
        """(AUROC minus the null's, standard error) on the texts that both were judged on, DeLong's paired error."""
        if SHUFFLED not in self.answers:
            return NAN, NAN
        own, null = self.answers[OWN], self.answers[SHUFFLED]
        both = [i for i in own if own[i] is not None and null.get(i) is not None]
        pos, neg = ([i for i in both if self.trials[i].positive is wanted] for wanted in (True, False))
        if len(pos) < 2 or len(neg) < 2:
            return NAN, NAN
        # Shares of the other class that each text beats, with one explanation less with the other.
        wins_PN = wins(cast(Any, own), pos, neg) - wins(cast(Any, null), pos, neg)
        variance = sum(float(wins_PN.mean(axis=axis).var(ddof=1)) / wins_PN.shape[1 - axis] for axis in (0, 1))
        return float(wins_PN.mean()), variance**0.5


def wins(verdict_of: Mapping[int, float], pos: Sequence[int], neg: Sequence[int]) -> np.ndarray:
    """[P, N]: 1 where the positive has the higher verdict, one half for a tie, else 0."""
    p, n = np.array([verdict_of[i] for i in pos])[:, None], np.array([verdict_of[i] for i in neg])[None]
    return (p > n) + 0.5 * (p == n)


def auroc_of(positives: Sequence[float], negatives: Sequence[float], level: float = 0.95) -> Estimate:
    """AUROC with the error of `stopping.error_of`; NaN where a class has no verdict (n counts what there is)."""
    if not positives or not negatives:
        return Estimate(NAN, NAN, NAN, NAN, len(positives) + len(negatives))
    found = auroc(positives, negatives, level)
    return Estimate(found.value, error_of(found, len(positives), len(negatives)), found.low, found.high, found.n)


def clustered(values: Sequence[float], first: Sequence[int], second: Sequence[int], level: float = 0.95) -> Estimate:
    """Mean of comparisons in [0, 1], each between one of `first` and one of `second`, that share what they compare.

    The error is the two-way cluster-robust one: comparisons with an item in common count together. NaN where there are
    no comparisons; `n` counts them.
    Reference: Cameron, Gelbach & Miller, J. Business & Economic Statistics 29 (2011).
    """
    if not values:
        return Estimate(NAN, NAN, NAN, NAN, 0)
    value = float(np.mean(values))
    rest = np.asarray(values) - value
    sums, sizes = [], []
    for items in (first, second):
        _, index = np.unique(np.asarray(items), return_inverse=True)
        per_item = np.bincount(index, weights=rest)
        # A finite number of clusters spreads less than it should by G / (G - 1).
        sums.append(float((per_item**2).sum()) * len(per_item) / max(1, len(per_item) - 1))
        sizes.append(len(per_item))
    # Subtracting what both count can leave less than either alone.
    total = max(sums[0] + sums[1] - float((rest**2).sum()), *sums)
    least = min(sizes)
    low, high = logit_interval(value, total**0.5 / len(values), least, level)
    stderr = total**0.5 / len(values)
    if not stderr:
        # All comparisons went one way: what the rule of three leaves possible, as an error.
        stderr = (high - low) / NormalDist().inv_cdf((1 + level) / 2)
    return Estimate(value, stderr, low, high, len(values))


def wilson(share: float, n: float, level: float = 0.95) -> Estimate:
    """A share of n trials with Wilson's interval, for graded trials in [0, 1] as well: none varies more than p (1 - p).

    NaN where there are none.
    """
    if n <= 0:
        return Estimate(NAN, NAN, NAN, NAN, 0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return Estimate(share, half / z, max(0.0, centre - half), min(1.0, centre + half), int(n))


def parse_option(answer: str, key: str, options: Sequence[str]) -> str | None:
    """The one of `options` that an answer names: as JSON {key: option}, or as its first word that is one.

    None where it names none: a failure, to be counted.
    """
    try:
        found = json.loads(answer)
        if isinstance(found, dict):
            return str(found[key]) if key in found and str(found[key]) in options else None
    except (ValueError, RecursionError):
        pass
    words = "|".join(re.escape(option) for option in options)
    match = re.search(rf"(?<![A-Za-z0-9])(?<![0-9][.,])({words})(?![A-Za-z0-9]|[.,][0-9])", answer)
    return match.group(1) if match else None


@dataclass(frozen=True)
class Picked:
    """Answers to one question. shares: of the answers that name an option, by option; None where none does."""

    shares: dict[str, float] | None
    unparsed: int


async def pick(
    judge: Verdicts, questions: Sequence[str], key: str, options: Sequence[str | int], samples: int, seed: int
) -> list[Picked]:
    """Asks each question `samples` times. The engine is held to {key: option} where it can be."""
    if not questions:
        return []
    named = [str(option) for option in options]
    schema = {
        "type": "object",
        "properties": {key: {"enum": list(options)}},
        "required": [key],
        "additionalProperties": False,
    }
    answers = await judge.generate(
        list(questions), max_tokens=24, n=samples, temperature=0.7, seed=seed, chat=True, schema=schema
    )
    found = []
    for some in answers:
        parsed = [parse_option(answer, key, named) for answer in some or []]
        known = [option for option in parsed if option is not None]
        shares = {option: known.count(option) / len(known) for option in named} if known else None
        found.append(Picked(shares, len(parsed) - len(known)))
    return found
