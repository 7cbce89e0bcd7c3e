"""Committed rows: nothing half-written counts, later rows replace earlier ones, missing stays missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sae_ray.evidence.files import is_written, read_evidence, write_evidence
from sae_ray.evidence.types import NEAR_MISS, SIBLING, TOP, Contexts, EvidenceSet, Example, LatentEvidence, side_of
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Score
from sae_ray.judging import results
from sae_ray.judging.selection import halves
from sae_ray.storage import LocalStorage


def score(latent: int, value: float, shuffled: float = 0.5) -> Score:
    return Score("detection", latent, value, value - 0.1, value + 0.1, 0.05, shuffled, 0.5, 40)


def rows(*scores: Score, texts: int = 20) -> dict[str, list]:
    explanation = Explanation("colours", "lexical")
    return {
        "verdicts": [],
        "explanations": [],
        "scores": [results.score_row("latent", each, explanation, texts) for each in scores],
    }


def test_a_batch_counts_only_once_its_scores_are_there(tmp_path):
    storage = LocalStorage(tmp_path)
    results.commit(storage, rows(score(1, 0.8)))
    storage.write("results/part-000002.verdicts.parquet", b"half a batch")
    assert results.parts(storage) == [1]
    assert results.commit(storage, rows(score(2, 0.7))) == 2
    assert [row["latent"] for row in results.read(storage, "scores")] == [1, 2]


def test_the_last_row_of_a_latent_counts(tmp_path):
    storage = LocalStorage(tmp_path)
    results.commit(storage, rows(score(1, 0.6), score(2, 0.7), texts=5))
    results.commit(storage, rows(score(1, 0.9), texts=10))
    (line,) = results.summarise(results.read(storage, "scores"))
    assert line["mean"] == pytest.approx(0.8)
    assert line["n_latents"] == 2


def test_missing_scores_are_missing_and_not_zero(tmp_path):
    storage = LocalStorage(tmp_path)
    results.commit(storage, rows(score(1, 0.8), score(2, math.nan, math.nan)))
    assert results.read(storage, "scores")[1]["value"] is None
    (line,) = results.summarise(results.read(storage, "scores"))
    assert (line["mean"], line["n_latents"], line["missing"]) == (pytest.approx(0.8), 1, 1)


def evidence() -> EvidenceSet:
    rng = np.random.default_rng(0)
    tokens = {context: rng.integers(0, 99, size=6).astype(np.int32) for context in range(40)}
    examples = (
        *(Example(context, rng.random(6).astype(np.float32), TOP, 1.5, 2, 0.25) for context in range(20)),
        Example(20, np.zeros(6, dtype=np.float32), NEAR_MISS, 9.0, margin=-0.01),
        Example(21, np.zeros(6, dtype=np.float32), SIBLING, sibling=7),
    )
    latent = LatentEvidence(
        3,
        *(0.01, 0.1, 2.5, 1.25, 0.5),
        ((4, 0.5), (9, 0.25)),
        ((" red", 1.5),),
        ((" blue", -1.0),),
        ((7, 0.9, 0.2),),
        examples[:4],
        examples[4:],
    )
    return EvidenceSet({3: latent, 4: LatentEvidence(4, 0.0, 0.0, 0.0)}, Contexts(tokens, None), 240, 40, {9: "dead"})


def test_evidence_reads_back_as_it_was(tmp_path):
    storage, before = LocalStorage(tmp_path), evidence()
    assert not is_written(storage, "evidence/latent")
    write_evidence(storage, "evidence/latent", before)
    after = read_evidence(storage, "evidence/latent", None)
    assert (after.n_tokens, after.n_contexts, after.skipped) == (240, 40, {9: "dead"})
    assert after.contexts.tokens.keys() == before.contexts.tokens.keys()
    assert all(np.array_equal(after.contexts.tokens[c], before.contexts.tokens[c]) for c in after.contexts.tokens)
    for name in ("density", "siblings", "promoted", "suppressed", "top_tokens", "firing_entropy"):
        assert getattr(after.latents[3], name) == getattr(before.latents[3], name), name
    for side in ("explain", "score"):
        for a, b in zip(getattr(after.latents[3], side), getattr(before.latents[3], side), strict=True):
            assert np.array_equal(a.acts_S, b.acts_S)
            assert (a.context, a.stratum, a.weight, a.quantile, a.margin, a.sibling) == (
                b.context, b.stratum, b.weight, b.quantile, b.margin, b.sibling,
            )  # fmt: skip
    assert math.isnan(after.latents[4].firing_entropy)


def test_texts_that_choose_an_explanation_never_score_it():
    found = evidence()
    select, scoring = halves(found.latents[3], found.contexts)
    chosen, scored = ({e.context for e in half.score} for half in (select, scoring))
    assert not chosen & scored
    assert chosen | scored == {e.context for e in found.latents[3].score}


def test_the_choosing_share_is_seven_sixteenths_and_independent_of_the_explaining_side():
    rng = np.random.default_rng(1)
    tokens = {context: rng.integers(0, 50_000, size=32).astype(np.int32) for context in range(6000)}
    ones_S = np.ones(32, dtype=np.float32)
    scoring_side = tuple(Example(c, ones_S, TOP) for c in tokens if side_of(tokens[c]) == "score")
    latent = LatentEvidence(0, 0.1, 0.1, 1.0, score=scoring_side)
    select, scoring = halves(latent, Contexts(tokens, None))
    assert len(latent.score) / 6000 == pytest.approx(0.75, abs=0.03)
    assert len(select.score) / len(latent.score) == pytest.approx(7 / 16, abs=0.03)
    assert len(scoring.score) + len(select.score) == len(latent.score)
