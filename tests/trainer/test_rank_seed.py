"""What a rank's process would draw follows from the run's seed, as all its numbers do."""

from __future__ import annotations

import torch

from sae_ray.config import RunConfig
from sae_ray.trainer.rank import TrainerRank


def draws(seed: int) -> list[float]:
    torch.seed()  # as in a process that has just started
    TrainerRank(RunConfig.model_validate({"name": "seeded", "seed": seed, "hook": {"layer": 0}}).model_dump_json(), {})
    return torch.rand(3).tolist()


def test_a_rank_that_is_started_again_draws_what_it_would_have_drawn() -> None:
    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
