import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.reward.atomicity import MetaDictionary, atom_users, compositions, fit_atoms
from sae_ray.reward.description import MIN_LATENTS, Description, at_equal_score, description_length
from sae_ray.reward.overlap import nearest_rows, overlap_penalties, shared_explanations, with_cofiring


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_length_is_compared_only_with_candidates_that_are_as_good():
    texts = ["a long explanation of dogs", "dogs", "animals that bark"]
    nats = [-20.0, -5.0, -9.0]
    bits = [-value / math.log(2) for value in nats]
    assert description_length(texts, [0.8, 0.6, 0.77], [0.04] * 3, 0, nats) == Description(bits[2], 0.77, "bits")
    assert description_length(texts, [0.8, 0.77, 0.77], [0.04] * 3, 0, nats) == Description(bits[1], 0.77, "bits")
    assert description_length(texts, [0.8, 0.7, 0.7], [0.04] * 3, 0, nats) == Description(bits[0], 0.8, "bits")


def test_words_are_counted_where_any_reading_is_missing_and_missing_scores_do_not_compete():
    texts = ["dogs and cats", "dogs"]
    assert description_length(texts, [0.5, 0.5], [0.1, 0.1], 0, [-3.0, None]) == Description(1, 0.5, "words")
    assert description_length(texts, [0.5, math.nan], [0.1, 0.1], 0) == Description(3, 0.5, "words")
    assert description_length(texts, [math.nan, 0.5], [0.1, 0.1], 0) is None


def lengths_of(length_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    return at_equal_score([Description(*pair, "bits") for pair in zip(length_N, score_N, strict=True)])


def test_planted_simplicity_is_found_under_what_scores_cost():
    """Bits = 10 + 60 score + what the latent is itself: the lengths alone tell of the scores first."""
    rng = np.random.default_rng(0)
    score_N, own_N = rng.uniform(0.3, 0.9, 200), 4 * rng.normal(size=200)
    length_N = 10 + 60 * score_N + own_N
    found_N = lengths_of(length_N, score_N)
    assert np.corrcoef(length_N, own_N)[0, 1] < 0.5
    assert np.corrcoef(found_N, own_N)[0, 1] > 0.99
    assert abs(np.corrcoef(found_N, score_N)[0, 1]) < 1e-9
    assert found_N.mean() == pytest.approx(length_N.mean()), "the round's mean stays, for the running baseline"


def test_few_latents_or_one_score_are_compared_by_length_alone():
    length_N, score_N = 10.0 * np.arange(MIN_LATENTS), 0.1 * np.arange(MIN_LATENTS)
    assert np.ptp(lengths_of(length_N, score_N)) < 1e-9
    np.testing.assert_array_equal(lengths_of(length_N[1:], score_N[1:]), length_N[1:])
    np.testing.assert_array_equal(lengths_of(length_N, np.full(MIN_LATENTS, 0.7)), length_N)
    assert len(at_equal_score([])) == 0


def test_an_empty_phrase_is_never_simpler_than_a_good_one_of_its_length():
    """Where good explanations are the short ones, a worse one is not owed more bits."""
    score_N = np.linspace(0.2, 0.9, 20)
    length_N = 100 - 80 * score_N
    length_N[0] = length_N[-1]
    found_N = lengths_of(length_N, score_N)
    assert found_N[0] >= found_N[-1]


def composed_reference(row: np.ndarray, atoms: np.ndarray, k: int, shared: np.ndarray) -> float:
    """Orthogonal matching pursuit and the definition, one row at a time in float64."""
    chosen: list[int] = []
    left = row.copy()
    for _ in range(k):
        correlation = atoms @ left
        correlation[chosen] = -np.inf
        if correlation.max() <= 1e-6:
            break
        chosen.append(int(correlation.argmax()))
        basis = atoms[chosen].T
        left = row - basis @ np.linalg.lstsq(basis, row, rcond=None)[0]
    common = [a for a in chosen if shared[a]]
    if len(common) < 2:
        return 0.0
    basis = atoms[common].T
    kept = basis @ np.linalg.lstsq(basis, row, rcond=None)[0]
    return max(0.0, float((kept**2).sum()) - max(float(atoms[a] @ row) ** 2 for a in chosen))


def test_composed_is_its_definition():
    atoms, rows = unit(12, 10, seed=1), unit(60, 10, seed=2)
    users = atom_users(rows, atoms, 3)
    found = compositions(rows, MetaDictionary(atoms, users, 3, 0.0, 0.0), shared_by=14)
    shared = (users - 1 >= 14).numpy()
    assert 2 < shared.sum() < 12
    expected = [composed_reference(row, atoms.double().numpy(), 3, shared) for row in rows.double().numpy()]
    np.testing.assert_allclose(found.composed.numpy(), expected, atol=1e-5)
    assert (found.composed > 0.05).any()
    assert (found.composed == 0).any()


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, truth): 40 near copies of 10 atoms, and 60 sums of two."""
    atoms = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)))[0][:10]
    rng = np.random.default_rng(seed)
    copies = atoms.repeat(4, 1) + 0.05 * unit(40, 24, seed=seed + 1)
    pairs = torch.from_numpy(np.stack([rng.choice(10, 2, replace=False) for _ in range(60)]))
    sums = atoms[pairs[:, 0]] + atoms[pairs[:, 1]] + 0.05 * unit(60, 24, seed=seed + 2)
    return torch.cat([copies, sums]), torch.cat([torch.zeros(40), torch.full((60,), 0.5)])


def test_composed_latents_are_told_from_atoms_and_copies():
    rows, truth = planted()
    meta = fit_atoms(rows * torch.rand(len(rows), 1) * 9, n_atoms=10, k=2)
    found = compositions(rows, meta)
    assert meta.explained > 0.97
    assert float(found.composed[:40].max()) < 0.1
    assert float(found.composed[40:].min()) > 0.35
    assert torch.corrcoef(torch.stack([found.composed, truth]))[0, 1] > 0.95
    assert meta.cpu_s >= 0


def test_an_atom_of_its_own_does_not_compose_a_latent():
    """Nobody else uses the second atom of this row: there is nothing shared to be composed of."""
    atoms = torch.eye(6)[:4]
    rows = torch.stack([(atoms[0] + atoms[3]) / 2**0.5, *atoms[:3].repeat(3, 1)])
    meta = MetaDictionary(atoms, atom_users(rows, atoms, 2), 2, 0.0, 0.0)
    assert float(compositions(rows, meta).composed[0]) == 0
    more = torch.cat([rows, atoms[3].repeat(2, 1)])
    meta = MetaDictionary(atoms, atom_users(more, atoms, 2), 2, 0.0, 0.0)
    assert float(compositions(rows, meta).composed[0]) == pytest.approx(0.5, abs=1e-4)


def test_shards_and_blocks_give_what_the_whole_decoder_gives(monkeypatch):
    rows, _ = planted(3)
    meta = fit_atoms(rows, n_atoms=12, k=3)
    whole = compositions(rows, meta)
    assert torch.equal(sum(atom_users(part, meta.atoms_KD, 3) for part in rows.split(37)), meta.users_K)
    monkeypatch.setattr("sae_ray.reward.atomicity._BLOCK_ELEMENTS", 1000)
    parts = [compositions(part, meta) for part in rows.split(37)]
    torch.testing.assert_close(torch.cat([part.composed for part in parts]), whole.composed, atol=1e-5, rtol=0)
    assert parts[0].null == pytest.approx(whole.null, abs=1e-5)


def test_random_directions_have_the_null_that_is_reported():
    meta = fit_atoms(unit(400, 16, seed=4), n_atoms=20, k=3)
    found = compositions(unit(2000, 16, seed=9), MetaDictionary(meta.atoms_KD, meta.users_K + 1, 3, 0.0, 0.0))
    assert found.null == pytest.approx(float(found.composed.mean()), rel=0.1)


def test_zero_rows_are_missing_and_too_few_rows_refused():
    rows, _ = planted()
    rows[5] = 0
    found = compositions(rows, fit_atoms(rows, n_atoms=10, k=2))
    assert torch.isnan(found.composed).nonzero().tolist() == [[5]]
    with pytest.raises(UserError, match="10 atoms for 4 latents"):
        fit_atoms(rows[:4], n_atoms=10)


def test_a_fit_does_not_depend_on_the_run():
    rows, _ = planted(4)
    assert torch.equal(fit_atoms(rows, 8, seed=3).atoms_KD, fit_atoms(rows, 8, seed=3).atoms_KD)


def test_neighbours_are_the_largest_cosines_across_shards():
    rows = unit(90, 8)
    cosine = (rows.double() @ rows.double().T).fill_diagonal_(-9)
    shards = [(0, rows[:20]), (20, rows[20:65]), (65, rows[65:])]
    near = nearest_rows(rows[20:65], 20, shards, n=5)
    best = cosine[20:65].topk(5)
    np.testing.assert_array_equal(near.id_mn, best.indices)
    np.testing.assert_allclose(near.cosine_mn, best.values, atol=1e-5)
    lonely = nearest_rows(rows[:3], 0, [(0, rows[:3])], n=5)
    assert (lonely.id_mn[:, 2:] == -1).all()
    assert (overlap_penalties(lonely, cosine_limit=0.99).near == 0).all()


def test_cofiring_is_the_jaccard_index_of_active_contexts():
    rng = np.random.default_rng(0)
    fires = rng.random((200, 30)) < 0.2
    fires[:, 7] = False
    rows = unit(30, 4)
    context, latent = np.nonzero(fires)
    twice = np.concatenate([context, context[:50]]), np.concatenate([latent, latent[:50]])
    near = with_cofiring(nearest_rows(rows[10:20], 10, [(0, rows)], n=3), 10, *twice, 30)
    for row in range(10):
        for slot in range(3):
            a, b = fires[:, 10 + row], fires[:, near.id_mn[row, slot]]
            assert near.jaccard_mn[row, slot] == pytest.approx((a & b).sum() / (a | b).sum())


def test_twins_that_fire_together_are_duplicates_and_twins_that_take_turns_are_split():
    a, b, c = torch.eye(5)[:3]
    rows = torch.stack([a, a, b, b, c, torch.eye(5)[3], torch.eye(5)[3]])
    context = np.array([0, 0, 1, 1, 2, 3, 4])
    latent = np.array([0, 1, 0, 1, 2, 3, 4])
    near = with_cofiring(nearest_rows(rows, 0, [(0, rows)]), 0, context, latent, 7)
    found = overlap_penalties(near)
    assert found.duplicate[:5].tolist() == pytest.approx([1, 1, 0, 0, 0], abs=1e-6)
    assert found.split[:5].tolist() == pytest.approx([0, 0, 1, 1, 0], abs=1e-6)
    assert found.near[5:].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert np.isnan(found.duplicate[5:]).all()  # neither ever fired: unknown, not 0


def test_an_explanation_that_several_have_costs_each_of_them():
    assert shared_explanations({1: "Dogs", 2: "dogs.", 3: "cats"}) == {1: 0.5, 2: 0.5, 3: 0.0}
