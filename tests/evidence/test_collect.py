"""The pass against a plain loop over all contexts, and what must not depend on how it is cut."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import CFG, Corpus, D, L, Rows, S, make_block

from sae_ray.config import JudgingConfig
from sae_ray.errors import UserError
from sae_ray.evidence.collect import EvidenceCollector
from sae_ray.evidence.types import NEAR_MISS, QUANTILE, RANDOM, SIBLING, TOP, EvidenceSet, Side, side_of

SIDES: tuple[Side, Side] = ("explain", "score")


def described(found: EvidenceSet) -> dict[int, object]:
    """Everything in it, comparable (NaN equals NaN)."""

    def example(e):
        return (e.context, e.acts_S.tolist(), e.stratum, e.weight, e.quantile, repr(e.margin), e.sibling)

    out: dict[int, object] = {-1: (found.n_tokens, found.n_contexts, found.skipped)}
    for latent, e in found.latents.items():
        plain = replace(e, explain=(), score=())
        out[latent] = (repr(plain), [example(x) for x in e.explain], [example(x) for x in e.score])
    tokens = {context: ids.tolist() for context, ids in found.contexts.tokens.items()}
    return out | {-2: tokens}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    texts=st.integers(1, 60),
    n=st.integers(1, 25),
    fixed=st.booleans(),
    scale=st.sampled_from([0.3, 1.2, 4.0]),
)
def test_no_text_is_on_both_sides_and_none_twice_on_a_side(seed, texts, n, fixed, scale):
    corpus = Corpus(n, seed, texts, scale=scale, fixed=fixed)
    found = corpus.collect().finish(None)
    side_by_text: dict[bytes, str] = {}
    for evidence in found.latents.values():
        for side in SIDES:
            examples = getattr(evidence, side)
            texts_here = [found.contexts.tokens[e.context].tobytes() for e in examples]
            assert len(texts_here) == len(set(texts_here))
            for text in texts_here:
                assert side_by_text.setdefault(text, side) == side
            assert all(e.active == (e.stratum in (TOP, QUANTILE)) for e in examples)
            assert all(e.weight > 0 for e in examples)


def reference_best(entries, value, n):
    """The n distinct texts of the largest value; of equal ones the earlier."""
    best: dict[bytes, tuple[float, int]] = {}
    for context, text, *_ in entries:
        score = value[context]
        if text not in best or score > best[text][0]:
            best[text] = (score, context)
    ranked = sorted(best.values(), key=lambda item: (-item[0], item[1]))
    return [context for _, context in ranked[:n]]


@pytest.mark.parametrize("texts", [12, 10**6])
@pytest.mark.parametrize("side", SIDES)
def test_the_strongest_and_the_nearest_are_those_of_the_whole_pass(texts, side):
    corpus = Corpus(150, 3, texts)
    cfg = CFG.model_copy(update={"top": 7, "near_misses": 6})
    found = corpus.collect(cfg=cfg).finish(None)
    compared = 0
    for latent in range(D):
        entries = corpus.occurrences(latent, side)
        peak = {context: p for context, _, p, _ in entries}
        margin = {context: m for context, _, _, m in entries}
        active = [e for e in entries if e[2] > 0]
        evidence = found.latents.get(latent)
        if evidence is None:
            continue
        got = [e for e in evidence.positives(side) if e.stratum == TOP]
        assert [e.context for e in got] == reference_best(active, peak, 7)
        assert [float(e.acts_S.max()) for e in got] == [peak[e.context] for e in got]
        ever_active = {text for _, text, *_ in active}
        near = reference_best([e for e in entries if e[2] == 0], margin, 6)
        text_of = {context: text for context, text, *_ in entries}
        got_near = evidence.negatives(side, NEAR_MISS)
        if texts > 1000:
            assert [e.context for e in got_near] == near
        else:
            # A text that is active elsewhere is no near miss where the pass still knows of it.
            assert [e.context for e in got_near if text_of[e.context] not in ever_active] == [
                context for context in near if text_of[context] not in ever_active
            ]
        assert [e.margin for e in got_near] == [margin[e.context] for e in got_near]
        compared += len(got_near)
    assert compared > 20 or texts < 1000


@pytest.mark.parametrize("fixed", [True, False])
def test_statistics_and_weights_are_those_of_the_corpus(fixed):
    corpus = Corpus(200, 5, 10**6 if not fixed else 40, fixed=fixed)
    found = corpus.collect(cfg=CFG.model_copy(update={"top": 4})).finish(None)
    assert found.n_tokens == corpus.keep.sum()
    for latent, evidence in found.latents.items():
        fires = (corpus.acts[..., latent] > 2) & corpus.keep
        assert evidence.density == pytest.approx(fires.sum() / corpus.keep.sum())
        assert evidence.max_activation == corpus.acts[..., latent][fires].max()
        ids, counts = np.unique(corpus.tokens[fires], return_counts=True)
        share = counts / counts.sum()
        assert evidence.firing_entropy == pytest.approx(-(share * np.log(share)).sum())
        assert evidence.unigram_share == pytest.approx(share.max())
        assert evidence.top_tokens[0][0] == ids[counts.argmax()]
        n_active = 0
        for side in SIDES:
            entries = corpus.occurrences(latent, side)
            active = sum(e[2] > 0 for e in entries)
            n_active += active
            assert sum(e.weight for e in evidence.positives(side)) == pytest.approx(active)
            assert sum(e.weight for e in evidence.negatives(side)) == pytest.approx(len(entries) - active)
        assert evidence.contexts_active == pytest.approx(n_active / found.n_contexts)


def test_activations_lie_at_their_positions_and_are_zero_where_no_token_is_kept():
    corpus = Corpus(30, 2)
    found = corpus.collect().finish(None)
    for latent, evidence in found.latents.items():
        for e in (*evidence.explain, *evidence.score):
            sequence, chunk = divmod(e.context, L // S)
            here = slice(chunk * S, chunk * S + S)
            assert found.contexts.tokens[e.context].tolist() == corpus.tokens[sequence, here].tolist()
            pre, keep = corpus.acts[sequence, here, latent], corpus.keep[sequence, here]
            assert e.acts_S.tolist() == np.where((pre > 2) & keep, pre, 0).tolist()
            assert np.isnan(e.margin) if e.stratum == SIBLING else e.margin == pre[keep].max() - 2


def test_quantile_groups_are_ordered_by_activation_and_stand_for_equal_parts():
    corpus = Corpus(600, 1)
    cfg = CFG.model_copy(update={"quantiles": 4, "per_quantile": 5, "top": 5})
    evidence = corpus.collect(cfg=cfg).finish(None).latents[0]
    groups = [[e for e in evidence.score if e.stratum == QUANTILE and e.quantile == q] for q in range(4)]
    assert [len(group) for group in groups] == [5] * 4
    for weak, strong in pairwise(groups):
        assert max(e.acts_S.max() for e in weak) <= min(e.acts_S.max() for e in strong)
    weights = [sum(e.weight for e in group) for group in groups]
    assert max(weights) < 1.5 * min(weights)
    assert min(weights) > 5


def test_a_sample_is_uniform_over_the_contexts_of_the_pass():
    corpus = Corpus(30, 4, scale=9.0)
    active = [context for context, _, peak, _ in corpus.occurrences(0, "score") if peak > 0]
    cfg = JudgingConfig(top=1, quantiles=2, per_quantile=3, near_misses=0, randoms=4, siblings=0, min_contexts=1)
    chosen = np.zeros(60)
    passes = 200
    for seed in range(passes):
        collector = corpus.collect(30, Rows([0]), cfg, seed)
        sample = collector.sides["score"].sample
        chosen[sample.context_NK[0]] += 1
    drawn = chosen[active]
    slots = sample.key_NK.shape[1]
    assert chosen.sum() == drawn.sum() == passes * slots
    expected = passes * slots / len(active)
    chi2 = float(((drawn - expected) ** 2 / (expected * (1 - slots / len(active)))).sum())
    assert abs(chi2 - len(active)) < 5 * np.sqrt(2 * len(active))
    early, late = drawn[: len(active) // 2].mean(), drawn[-(len(active) // 2) :].mean()
    assert early == pytest.approx(late, rel=0.15)


def test_weighted_means_estimate_those_of_all_active_contexts():
    """Without bias over seeds: of the peak, which the strata are cut by."""
    corpus = Corpus(100, 8)
    peaks = [peak for _, _, peak, _ in corpus.occurrences(1, "score") if peak > 0]
    got = []
    for seed in range(40):
        evidence = corpus.collect(150, Rows([1]), CFG, seed).finish(None).latents[1].positives("score")
        got.append(np.average([e.acts_S.max() for e in evidence], weights=[e.weight for e in evidence]))
    assert np.mean(got) == pytest.approx(np.mean(peaks), abs=3 * np.std(got) / np.sqrt(len(got)) + 1e-6)
    assert np.std(got) > 0


@pytest.mark.parametrize("texts", [20, 10**6])
def test_blocks_cut_differently_give_the_same_evidence(texts):
    corpus = Corpus(90, 6, texts)
    whole = described(corpus.collect(90).finish(None))
    for size in (1, 7, 32):
        assert described(corpus.collect(size).finish(None)) == whole


@pytest.mark.parametrize("texts", [20, 10**6])
def test_shards_of_the_latents_merge_into_what_one_collector_gives(texts):
    corpus = Corpus(90, 6, texts)
    decoder = torch.randn(D, 5)
    one = corpus.collect()
    parts = [corpus.collect(source=Rows(latents)) for latents in ([6, 1], [0, 3, 7], [2], [5, 4])]
    merged = EvidenceCollector.merge([pickle.loads(pickle.dumps(part)) for part in parts])
    assert described(merged.finish(None, decoder)) == described(one.finish(None, decoder))
    with pytest.raises(ValueError, match="share a latent"):
        EvidenceCollector.merge([parts[0], parts[0]])
    with pytest.raises(ValueError, match="n_tokens differs"):
        EvidenceCollector.merge([parts[0], Corpus(50).collect(source=Rows([2]))])
    with pytest.raises(RuntimeError):
        merged.add(corpus.blocks(5)[0])


def test_two_sources_on_one_corpus_see_the_same_random_texts():
    corpus = Corpus(200, 9)
    cfg = CFG.model_copy(update={"siblings": 0, "near_misses": 0})
    first = corpus.collect(source=Rows([0], 4.0), cfg=cfg).finish(None).latents[0]
    second = corpus.collect(source=Rows([3], 4.0), cfg=cfg).finish(None).latents[3]
    one, other = ({e.context for e in evidence.negatives("score", RANDOM)} for evidence in (first, second))
    assert len(one) == 4
    assert len(one & other) >= 2


def test_memory_does_not_grow_with_the_corpus():
    corpus = Corpus(64, 1)
    collector = EvidenceCollector(Rows(), CFG, S, 0)
    sizes = []
    for index in range(30):
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, 50, (64, L)).astype(np.int32)
        collector.add(make_block(tokens, np.round(rng.normal(0, 2.4, (64, L, D)))))
        sizes.append(collector.state_bytes())
    assert collector.n_contexts == 30 * 64 * 2
    held = sum(best.key_NK.size for s in collector.sides.values() for best in (s.top, s.sample, s.near))
    assert len(collector._texts) <= max(1024, 2 * held) + 128
    assert max(sizes[15:]) <= 1.15 * max(sizes[:15])
    assert corpus.collect().state_bytes() <= 1.2 * max(sizes)


def test_a_latent_that_is_hardly_active_is_skipped_and_it_is_said_why():
    corpus = Corpus(40, 0)
    corpus.acts[..., 0] = -1
    corpus.acts[..., 1] = -1
    corpus.keep[:] = True
    corpus.acts[3, 1, 1] = 5
    found = corpus.collect(cfg=CFG.model_copy(update={"min_contexts": 3})).finish(None)
    assert found.skipped[0] == "dead"
    assert found.skipped[1] == "1 active contexts"
    assert 2 in found.latents


def test_siblings_are_named_and_their_texts_are_ones_in_which_the_latent_is_silent():
    corpus = Corpus(200, 11)
    corpus.acts[..., 1] = np.where(corpus.acts[..., 0] > 2, corpus.acts[..., 0], corpus.acts[..., 1])
    decoder = torch.eye(D)
    decoder[3] = decoder[2] + 0.1 * decoder[5]
    cfg = CFG.model_copy(update={"siblings": 6, "near_misses": 2, "per_quantile": 10})
    found = corpus.collect(cfg=cfg).finish(None, decoder, n_siblings=2)
    assert found.latents[2].siblings[0][0] == 3
    assert found.latents[2].siblings[0][1] == pytest.approx(1 / np.sqrt(1.01))
    assert found.latents[0].siblings[0][0] == 1
    for latent, evidence in found.latents.items():
        silent = {c for side in SIDES for c, _, peak, _ in corpus.occurrences(latent, side) if peak == 0}
        for side in SIDES:
            for e in evidence.negatives(side, SIBLING):
                assert e.sibling in [sibling for sibling, *_ in evidence.siblings]
                assert e.context in silent
                assert any(c == e.context and p > 0 for c, _, p, _ in corpus.occurrences(e.sibling, side))
    assert len(found.latents[2].negatives("score", SIBLING)) == 6


def test_evidence_of_some_latents_is_that_of_all():
    collector = Corpus(60, 2).collect()
    all_of_them, some = described(collector.finish(None)), described(collector.finish(None, only=[5, 2]))
    assert all(some[latent] == all_of_them[latent] for latent in (2, 5))
    assert 3 not in some
    with pytest.raises(UserError, match="no evidence was collected of 99"):
        collector.finish(None, only=[99])


def test_sequences_that_are_no_whole_number_of_contexts_are_refused():
    collector = EvidenceCollector(Rows(), CFG, 3, 0)
    with pytest.raises(UserError, match=r"context_tokens = 3: sequences of 8 tokens"):
        collector.add(Corpus(2).blocks(2)[0])


def test_a_hook_point_is_read_by_name():
    corpus = Corpus(10)
    block = corpus.blocks(10)[0]
    wide = replace(
        block, acts=np.concatenate([block.acts * 0, block.acts], axis=1), columns={"a": (0, D), "b": (D, 2 * D)}
    )
    one, other = (EvidenceCollector(Rows(), CFG, S, 7) for _ in range(2))
    one.add(block)
    other.add(wide, "b")
    assert described(one.finish(None)) == described(other.finish(None))


def test_the_sides_hold_about_a_quarter_and_three_quarters_of_the_contexts():
    collector = Corpus(500, 3).collect(50)
    share = collector.sides["explain"].contexts / collector.n_contexts
    assert share == pytest.approx(0.25, abs=0.05)
    assert all(side_of(text) in SIDES for text in collector._texts.values())
