from __future__ import annotations

import math

import numpy as np
import pytest

from sae_ray.judge.leniency import detection, sibling_shuffle


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


class LenientJudge:
    """Says yes to what shows the explanation, and to a share of what is merely of the explanation's sort."""

    def __init__(self, leniency: np.ndarray, seed: int) -> None:
        self.leniency, self.rng = leniency, np.random.default_rng(seed)

    def ask(self, shows: np.ndarray, text_sort: int, explanation_sort: int) -> np.ndarray:
        lenient = self.leniency[explanation_sort] if text_sort == explanation_sort else 0.02
        yes = shows | (self.rng.random(len(shows)) < lenient)
        return np.where(yes, 0.95, 0.05)


def simulate(n_texts: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true quality, raw, corrected) of 48 latents in 6 sorts; the sorts with bad latents are judged leniently."""
    rng = np.random.default_rng(seed)
    leniency = np.linspace(0.8, 0.0, 6)
    judge = LenientJudge(leniency, seed)
    quality, raw, corrected = [], [], []
    for latent in range(48):
        sort = latent % 6
        # True share of positives that the explanation covers; low where the judge is lenient.
        q = rng.uniform(0.15, 0.6) + 0.06 * sort
        positives = rng.random(n_texts) < q
        nothing = np.zeros(n_texts, dtype=bool)
        elsewhere = (sort + 3) % 6
        found = detection(
            judge.ask(positives, sort, sort),
            judge.ask(nothing, elsewhere, sort),
            # A sibling's explanation, which these texts do not show.
            judge.ask(nothing, sort, sort),
            judge.ask(nothing, elsewhere, sort),
        )
        quality.append(q)
        raw.append(found.raw)
        corrected.append(found.corrected)
    return np.array(quality), np.array(raw), np.array(corrected)


def test_a_judge_lenient_to_siblings_ranks_latents_wrong_and_the_correction_ranks_them_right() -> None:
    quality, raw, corrected = simulate()
    assert rank_correlation(quality, raw) < 0.3, "the simulated judge must mislead, or nothing is shown"
    assert rank_correlation(quality, corrected) > 0.75


def test_the_corrected_score_does_not_depend_on_how_lenient_the_judge_is() -> None:
    rng = np.random.default_rng(1)
    shows, nothing = rng.random(4000) < 0.6, np.zeros(4000, dtype=bool)
    found = []
    for leniency in (0.0, 0.3, 0.7):
        judge = LenientJudge(np.array([leniency]), seed=2)

        def hard(answer: np.ndarray) -> np.ndarray:
            return (answer > 0.5).astype(float)

        found.append(
            detection(
                hard(judge.ask(shows, 0, 0)), hard(judge.ask(nothing, 1, 0)),
                hard(judge.ask(nothing, 0, 0)), hard(judge.ask(nothing, 1, 0)),
            )
        )  # fmt: skip
    expected = (shows.mean() + 1) / 2
    assert [f.corrected for f in found] == pytest.approx([expected] * 3, abs=0.03)
    assert found[2].raw > found[0].raw + 0.1


def test_its_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    q, lenient, covered, runs = 0.6, 0.4, 0, 400
    for _ in range(runs):
        positives = (rng.random(40) < q + (1 - q) * lenient).astype(float)
        found = detection(
            positives, (rng.random(40) < 0.1).astype(float),
            (rng.random(40) < lenient).astype(float), (rng.random(40) < 0.1).astype(float),
        )  # fmt: skip
        covered += found.low <= (q + 1) / 2 <= found.high
    assert 0.91 <= covered / runs <= 0.985


def test_an_explanation_that_is_too_broad_keeps_its_penalty() -> None:
    broad = detection([0.9] * 10, [0.8] * 10, [0.1] * 10, [0.1] * 10)
    exact = detection([0.9] * 10, [0.1] * 10, [0.1] * 10, [0.1] * 10)
    assert broad.corrected < 0.6 < 0.9 < exact.corrected


def test_a_wrong_explanation_scores_chance_after_correction() -> None:
    found = detection([0.7] * 10, [0.3] * 10, [0.7] * 10, [0.3] * 10)
    assert found.raw == pytest.approx(0.7)
    assert found.corrected == pytest.approx(0.5)


def test_a_judge_that_says_yes_to_everything_is_missing_not_zero() -> None:
    assert math.isnan(detection([1.0] * 9, [0.0] * 9, [1.0] * 9, [0.0] * 9).corrected)
    with pytest.raises(ValueError, match="own_negatives"):
        detection([1.0], [math.nan], [0.0], [0.0])


def test_the_null_is_dealt_among_siblings_where_there_are_any() -> None:
    explanations = ["cats", "dogs", "birds", "files", "paths", "alone"]
    sorts = ["animal", "animal", "animal", "disk", "disk", "other"]
    dealt = sibling_shuffle(explanations, sorts, seed=0)
    sort_of = dict(zip(explanations, sorts, strict=True))
    assert all(d != e for d, e in zip(dealt, explanations, strict=True))
    assert [sort_of[d] for d in dealt[:5]] == sorts[:5]
    assert dealt[5] != "alone"
