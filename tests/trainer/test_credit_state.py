from __future__ import annotations

import torch

from sae_ray.trainer.credit_state import reshard


def shard_state(ids: list[int], first_value: float) -> dict[str, torch.Tensor]:
    n = len(ids)
    return {
        "latents": torch.tensor(ids),
        "W_ND": torch.tensor(ids)[:, None] * torch.ones(n, 3),
        "x_CSD": torch.arange(2.0)[:, None, None].expand(2, 4, 3) + first_value,
        "row_latent": torch.tensor([0, n - 1, n - 1]),
        "row_context": torch.tensor([0, 1, 0]),
        "sae_step": torch.tensor(70),
    }


def facts(state: dict[str, torch.Tensor]) -> list[tuple]:
    """What the verdicts say, free of places: (latent, its direction, the context's content)."""
    return sorted(
        (int(state["latents"][j]), float(state["W_ND"][j, 0]), float(state["x_CSD"][c, 0, 0]))
        for j, c in zip(state["row_latent"].tolist(), state["row_context"].tolist(), strict=True)
    )


def test_every_verdict_stays_with_its_latent_and_context_on_any_number_of_shards():
    old = [shard_state([1, 4], 10), {}, shard_state([9, 12, 15], 20)]
    everything = facts(reshard(old, 0, 16))
    assert everything == sorted(facts(old[0]) + facts(old[2]))
    new = [reshard(old, 4 * i, 4 * i + 4) for i in range(4)]
    assert [state.get("latents", torch.tensor([])).tolist() for state in new] == [[1], [4], [9], [12, 15]]
    assert sorted(fact for state in new for fact in facts(state)) == everything
    assert all(int(state["sae_step"]) == 70 for state in new)


def test_the_same_shards_get_back_what_they_saved():
    old = [shard_state([1, 4], 10), shard_state([9, 12], 20)]
    again = reshard(old, 8, 16)
    assert facts(again) == facts(old[1])
    for name in ("latents", "W_ND", "row_latent"):
        assert torch.equal(again[name], old[1][name])
    assert reshard([{}, {}], 0, 8) == {}
