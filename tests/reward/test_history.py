"""What is remembered of judged latents: across rounds, shards, files and a round that is judged again."""

from __future__ import annotations

import numpy as np
import pytest

from sae_ray.reward.choosing import spread_of
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.history import LatentHistory, Measured, UnitRows, set_cosine, text_id
from sae_ray.storage import LocalStorage

D, C = 8, 40
LATENTS = np.array([3, 7, 11])


def rows_at(angle: float, latents: np.ndarray = LATENTS) -> UnitRows:
    """Latent i points along axis i % 4, turned by `angle` toward axis 4 + i % 4; encoder and decoder alike."""
    rows = np.zeros((len(latents), D))
    for row, latent in zip(rows, latents, strict=True):
        row[latent % 4], row[4 + latent % 4] = np.cos(angle), np.sin(angle)
    return UnitRows(latents, rows.astype(np.float16), rows.astype(np.float16))


def scan_of(active: dict[int, range]) -> ContextScan:
    latents = np.array(sorted(active))
    act_CN = np.zeros((C, len(latents)), dtype=np.float32)
    for column, latent in enumerate(latents.tolist()):
        act_CN[list(active[latent]), column] = 1
    return ContextScan(latents, act_CN, act_CN - 0.5, np.zeros((C, len(latents)), dtype=np.int32))


SCAN = scan_of({3: range(10), 7: range(5, 25), 11: range(30, 40)})


def found(trust: float = 0.5, error: float = 0.1, explanation: str = "birds") -> Measured:
    return Measured(0.3, error, trust, explanation)


def after_a_round() -> LatentHistory:
    history = LatentHistory()
    measured = {3: found(), 7: Measured(0.1, 0.05, 0.4, "fish"), 11: Measured(0.4, 0.2, 0.0, "stones")}
    history.update(measured, frozenset(), rows_at(0), SCAN)
    return history


def test_shards_are_joined_in_order_of_latents():
    whole = rows_at(0.3)
    parts = [(whole.latents[s], whole.encoder_ND[s], whole.decoder_ND[s]) for s in ([2], [0, 1])]
    merged = UnitRows.merge(parts)
    assert merged.latents.tolist() == [3, 7, 11]
    assert np.array_equal(merged.encoder_ND, whole.encoder_ND)
    assert merged.of(5) is None
    assert merged.of(12) is None


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2])
def test_how_far_a_latent_has_turned_since_it_was_judged(angle):
    history = after_a_round()
    known = history.known(rows_at(angle))
    assert known.latents.tolist() == [3, 7, 11]
    assert known.cosine == pytest.approx(np.full(3, np.cos(angle)), abs=2e-3)
    assert known.reward.tolist() == [0.3, 0.1, 0.4]


def test_an_explanation_stands_until_the_latent_turns_or_fires_elsewhere():
    history = after_a_round()
    active_C = SCAN.act_CN[:, 0] > 0
    assert history.stands(3, rows_at(0.3), active_C, cosine=0.95, overlap=0.5)
    assert not history.stands(3, rows_at(0.35), active_C, cosine=0.95, overlap=0.5)
    moved_C = np.zeros(C, dtype=bool)
    moved_C[5:15] = True  # half of the ten contexts of then
    assert history.stands(3, rows_at(0), moved_C, cosine=0.95, overlap=0.5)
    assert not history.stands(3, rows_at(0), moved_C, cosine=0.95, overlap=0.51)
    turned = UnitRows(LATENTS, rows_at(0).encoder_ND, rows_at(0.35).decoder_ND)
    assert not history.stands(3, turned, active_C, cosine=0.95, overlap=0.5)  # the decoder counts too


def test_an_explanation_that_earns_no_trust_does_not_stand_nor_does_a_stranger():
    history = after_a_round()
    assert not history.stands(11, rows_at(0), SCAN.act_CN[:, 2] > 0, cosine=0.0, overlap=0.0)
    assert not history.stands(4, rows_at(0), SCAN.act_CN[:, 2] > 0, cosine=0.0, overlap=0.0)


def test_an_explanation_that_was_kept_is_still_held_against_what_it_was_written_for():
    history = after_a_round()
    history.update({3: found()}, frozenset({3}), rows_at(0.3), SCAN)
    active_C = SCAN.act_CN[:, 0] > 0
    assert not history.stands(3, rows_at(0.35), active_C, cosine=0.95, overlap=0.5)
    assert history.known(rows_at(0.3)).cosine[0] == pytest.approx(1, abs=2e-3)
    history.update({3: found()}, frozenset(), rows_at(0.3), SCAN)  # explained anew, with the same words
    assert history.stands(3, rows_at(0.35), active_C, cosine=0.95, overlap=0.5)


def test_verdicts_on_the_same_explanation_add_up_and_a_new_one_starts_over():
    history = after_a_round()
    once = history.records[3].variance
    spread = spread_of(np.array([0.3, 0.1, 0.4]), np.array([0.1, 0.05, 0.2]))
    assert once == pytest.approx(1 / (1 / spread + 100))
    history.update({3: found()}, frozenset(), rows_at(0), SCAN)
    assert history.records[3].variance == pytest.approx(1 / (1 / spread + 200), rel=1e-2)
    history.update({3: found(explanation="planes")}, frozenset(), rows_at(0), SCAN)
    assert history.records[3].variance == pytest.approx(once)


def test_a_round_that_is_judged_again_finds_what_was_there_before_it(tmp_path):
    storage = LocalStorage(tmp_path)
    history = after_a_round()
    history.save(storage, 0)
    history.update({3: found(error=0.01)}, frozenset(), rows_at(0.2), SCAN)
    history.save(storage, 1)
    assert not LatentHistory.load(storage, 0).records
    before, after = LatentHistory.load(storage, 1), LatentHistory.load(storage, 2)
    for loaded, expected in ((before, after_a_round()), (after, history)):
        for latent in LATENTS.tolist():
            a, b = loaded.records[latent], expected.records[latent]
            assert (a.reward, a.error, a.variance, a.trust, a.explanation) == (
                b.reward, b.error, b.variance, b.trust, b.explanation,
            )  # fmt: skip
            for name in ("judged_D", "explained_2D", "firing_W"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_cosines_of_sets_are_those_of_their_indicator_vectors():
    rng = np.random.default_rng(0)
    a, b = rng.random(37) < 0.4, rng.random(37) < 0.6
    expected = (a & b).sum() / np.sqrt(a.sum() * b.sum())
    assert set_cosine(np.packbits(a), np.packbits(b)) == pytest.approx(expected)
    assert set_cosine(np.packbits(a), np.packbits(np.zeros(37, dtype=bool))) == 0
    assert text_id("birds") != text_id("bird")
