"""Which dead latents AuxK may choose from: a fair draw that no mesh changes."""

from __future__ import annotations

import torch

from sae_ray.trainer.gradients import dead_in_turn

N_DEAD, POOL = 6000, 300
DEAD_M = torch.rand(9000, generator=torch.Generator().manual_seed(0)).argsort() < N_DEAD


def drawn(step: int, first: int = 0, last: int = 9000) -> torch.Tensor:
    return dead_in_turn(DEAD_M[first:last], N_DEAD, POOL, first, step) + first


def test_few_are_all_taken():
    few_m = torch.zeros(9000, dtype=torch.bool)
    few_m[[4, 80, 8999]] = True
    assert dead_in_turn(few_m, 3, POOL, 0, 7).tolist() == [4, 80, 8999]


def test_shards_together_draw_what_one_process_draws():
    parts = [drawn(5, first, first + 2250) for first in range(0, 9000, 2250)]
    assert torch.equal(torch.cat(parts), drawn(5))


def test_only_dead_ones_are_drawn_and_about_as_many_as_the_pool_holds():
    sizes = [len(drawn(step)) for step in range(50)]
    assert all(DEAD_M[drawn(step)].all() for step in range(50))
    assert all(abs(size - POOL) < 6 * POOL**0.5 for size in sizes)
    assert abs(sum(sizes) / 50 - POOL) < 0.05 * POOL


def test_over_many_steps_each_has_its_turn_equally_often():
    counts = torch.zeros(9000)
    for step in range(2000):
        counts[drawn(step)] += 1
    share = counts[DEAD_M] / 2000
    expected = POOL / N_DEAD
    assert float((share - expected).abs().max()) < 6 * (expected / 2000) ** 0.5
    neighbours = torch.corrcoef(torch.stack([counts[DEAD_M][:-1], counts[DEAD_M][1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.05
