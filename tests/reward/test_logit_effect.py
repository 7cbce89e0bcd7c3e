import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evidence.logit_lens import Unembedding
from sae_ray.reward.logit_effect import logit_effects, tokens_after

V, D, N = 60, 24, 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lens() -> Unembedding:
    generator = torch.Generator().manual_seed(0)
    return Unembedding(torch.randn(V, D, generator=generator), torch.rand(D, generator=generator) + 0.5)


def texts(seed: int = 0) -> list[list[np.ndarray]]:
    """Latent n is followed by tokens 5n to 5n+4, mostly, and by token 0 always."""
    rng = np.random.default_rng(seed)
    return [
        [np.concatenate([[0], rng.integers(5 * n, 5 * n + 5, 6), rng.integers(0, V, 2)]) for _ in range(8)]
        for n in range(N)
    ]


def own_directions(lens: Unembedding) -> torch.Tensor:
    weight = lens.weight_VD.double()
    return torch.stack([torch.linalg.pinv(weight)[:, 5 * n : 5 * n + 5].sum(1) for n in range(N)]) / lens.norm_D


def test_tokens_after_an_active_position_count_once_and_padding_never():
    tokens = np.array([7, 8, 9, 10, 11, -1])
    acts = np.array([0, 2.0, 3.0, 0, 1.0, 1.0])
    assert tokens_after(tokens, acts).tolist() == [9, 10]
    assert tokens_after(tokens, acts, span=2).tolist() == [9, 10, 11]
    assert tokens_after(tokens, acts, itself=True).tolist() == [8, 9, 10, 11]
    assert tokens_after(tokens, np.zeros(6)).tolist() == []


def test_the_auroc_is_that_of_all_pairs_of_a_following_and_a_background_token(lens):
    following = texts()
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    found = logit_effects(W, lens, following)
    effect = ((W.double() * lens.norm_D) @ lens.weight_VD.double().T).numpy()
    share = np.zeros((N, V))
    for n, examples in enumerate(following):
        for ids in examples:
            share[n] += np.bincount(ids, minlength=V) / len(ids) / len(examples)
    background = share.mean(0)
    wins = (effect[:, :, None] > effect[:, None, :]) + 0.5 * (effect[:, :, None] == effect[:, None, :])
    table = np.einsum("nv,lvu,u->ln", share, wins, background)
    for n, one in enumerate(found):
        others = np.delete(table[n], n)
        assert one.auroc == pytest.approx(table[n, n], abs=1e-6)
        assert one.null == pytest.approx(others.mean(), abs=1e-6)
        assert one.null_std == pytest.approx(others.std(), abs=1e-6)
        assert one.score == pytest.approx(table[n, n] - others.mean(), abs=1e-6)
        assert one.p_value == pytest.approx((1 + (others >= table[n, n] - 1e-12).sum()) / N)
        assert one.examples == 8


def test_directions_that_cause_what_follows_score_and_random_ones_do_not(lens):
    caused = logit_effects(own_directions(lens), lens, texts())
    assert min(one.score for one in caused) > 0.2
    assert max(one.p_value for one in caused) <= 1 / N + 1e-9
    assert max(one.standard_error for one in caused) < 0.06
    random = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    scores = [one.score for one in logit_effects(random, lens, texts())]
    assert abs(np.mean(scores)) < 3 * np.std(scores) / N**0.5


def test_a_direction_that_only_raises_what_is_common_anyway_scores_like_its_null(lens):
    """Token 0 follows every latent: raising it is no merit of any of them."""
    everyone = (torch.linalg.pinv(lens.weight_VD.double())[:, 0] / lens.norm_D).repeat(N, 1)
    # The same direction for all: who does better is a matter of whose texts have more of token 0, and they sum to 0.
    scores = [one.score for one in logit_effects(everyone, lens, texts())]
    assert abs(np.mean(scores)) < 1e-9


def test_latents_without_following_tokens_are_missing(lens):
    following = texts()
    following[3] = [np.array([], dtype=np.int64)]
    W = own_directions(lens)
    found = logit_effects(W, lens, following, latents=range(100, 100 + N))
    assert math.isnan(found[3].score)
    assert found[3].latent == 103
    assert found[4].score > 0.2
    alone = logit_effects(W[:1], lens, texts()[:1])  # no null
    assert math.isnan(alone[0].score)


def test_blocks_of_latents_change_nothing(lens, monkeypatch):
    W = own_directions(lens)
    whole = logit_effects(W, lens, texts())
    monkeypatch.setattr("sae_ray.reward.logit_effect._BLOCK_ELEMENTS", 2 * V)
    assert [one.score for one in logit_effects(W, lens, texts())] == pytest.approx([one.score for one in whole])


def test_a_layer_norms_mean_is_taken_off_and_another_width_refused(lens):
    W = own_directions(lens)
    centred = Unembedding(lens.weight_VD, lens.norm_D, centred=True)
    moved = logit_effects(W + 3, centred, texts())
    assert [a.score for a in moved] == pytest.approx([b.score for b in logit_effects(W, centred, texts())], abs=1e-5)
    with pytest.raises(UserError, match="width 5"):
        logit_effects(torch.ones(N, 5), lens, texts())
