from __future__ import annotations

import pytest
import torch

from sae_ray.config import TrainerConfig
from sae_ray.trainer.mixing import Cursor, batch_count, next_cursor, window_batches
from sae_ray.trainer.schedule import learning_rate


@pytest.mark.parametrize("n_tokens", [1, 99, 100, 149, 151, 1234])
def test_every_token_is_trained_exactly_once_in_near_equal_batches(n_tokens):
    batches = window_batches(3, n_tokens, 100, seed=0)
    assert sorted(torch.cat(batches).tolist()) == list(range(n_tokens))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == batch_count(n_tokens, 100)


def test_the_mix_is_a_function_of_seed_and_window():
    first = window_batches(3, 500, 100, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, window_batches(3, 500, 100, seed=1), strict=True))
    for window, seed in ((4, 1), (3, 2)):
        assert not torch.equal(first[0], window_batches(window, 500, 100, seed)[0])
    assert first[0].tolist() != sorted(first[0].tolist())


def test_an_empty_window_has_no_batches():
    assert window_batches(0, 0, 100, seed=0) == []
    assert next_cursor(0, 0, 0) == Cursor(1, 0)


def test_the_cursor_moves_to_the_next_window_after_the_last_batch():
    assert next_cursor(5, 2, 4) == Cursor(5, 2)
    assert next_cursor(5, 4, 4) == Cursor(6, 0)


def test_the_learning_rate_warms_up_decays_and_stays():
    cfg = TrainerConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=10, decay_fraction=0.2)
    assert learning_rate(0, cfg) == pytest.approx(0.1)
    assert learning_rate(9, cfg) == learning_rate(50, cfg) == learning_rate(80, cfg) == 1.0
    assert learning_rate(90, cfg) == pytest.approx(0.55)
    assert learning_rate(100, cfg) == learning_rate(10_000, cfg) == 0.1
    rates = [learning_rate(step, cfg) for step in range(80, 101)]
    assert rates == sorted(rates, reverse=True)
    steady = TrainerConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=0, decay_fraction=0)
    assert learning_rate(99, steady) == 1.0


def test_without_a_reconstruction_phase_the_last_rate_is_warmed_up_to():
    cfg = TrainerConfig(lr=1.0, lr_final=0.1, steps=0, warmup_steps=10)
    assert [learning_rate(step, cfg) for step in (0, 4, 9, 500)] == pytest.approx([0.01, 0.05, 0.1, 0.1])
    assert learning_rate(3, TrainerConfig(lr_final=0.1, steps=2, warmup_steps=10)) == 0.1
