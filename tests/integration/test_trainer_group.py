"""The trainer group on a real Ray: it trains, commits, dies, resumes, and refuses what is corrupt."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.history import UnitRows
from sae_ray.reward.siblings import look_around
from sae_ray.trainer import checkpoint
from sae_ray.trainer.claim import Claim
from sae_ray.trainer.group import RankDied, TrainerGroup

D_IN = 24
HOOK = "blocks.0.hook_resid_post"
WIDTHS = {HOOK: D_IN}


def run_config(tmp_path: Path, **ray_section: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "group",
            "runs_dir": str(tmp_path),
            "hook": {"layer": 0},
            "ray": {"wait_s": 60, **ray_section},
            "activations": {"block_sequences": 4, "mix_blocks": 2, "window_blocks": 4},
            "corpus": {"context_length": 64},
            "sae": {"d_sae": 96, "k": 4, "aux_k": 8, "dead_after_tokens": 1500},
            "trainer": {
                "tp": 2,
                "batch_tokens": 128,
                "steps": 60,
                "warmup_steps": 4,
                "log_every": 2,
                "cpus": 0.5,
            },
            "judge": {"context_tokens": 32},
        }
    )


def block(block_id: int, bad: bool = False) -> dict:
    rng = np.random.default_rng(block_id)
    basis = np.random.default_rng(99).normal(size=(16, D_IN))
    hidden = np.maximum(rng.normal(size=(256, 16)), 0)
    acts = (hidden @ basis + 0.1 * rng.normal(size=(256, D_IN))).astype(np.float32)
    if bad:
        acts[7, 3] = np.inf
    place = np.arange(256, dtype=np.int32)
    tokens = rng.integers(0, 1000, size=(4, 64)).astype(np.int32)
    return {
        "block_id": block_id,
        "tokens_SL": tokens,
        "acts": acts,
        "seq_T": place // 64,
        "pos_T": place % 64,
        "columns": {HOOK: (0, D_IN)},
    }


@pytest.fixture(scope="module")
def blocks(ray_session: None) -> list[ray.ObjectRef]:
    return [ray.put(block(i)) for i in range(20)]


def claimed(folder: Path) -> Claim:
    claim = Claim(folder, "group")
    claim.hold()
    return claim


def window(blocks: list[ray.ObjectRef], number: int) -> list[ray.ObjectRef]:
    return blocks[2 * number : 2 * number + 2]


def losses(group: TrainerGroup, blocks: list[ray.ObjectRef], windows: range) -> list[tuple]:
    rows = []
    for number in windows:
        result = group.window_result(group.train_window(number, 0, window(blocks, number)))
        rows += [tuple(v for k, v in sorted(row.items()) if not k.endswith("step_seconds")) for row in result.metrics]
    return rows


def active_contexts(group: TrainerGroup, blocks: list[ray.ObjectRef]) -> np.ndarray:
    asked = [rank.count_contexts.remote(blocks, 32) for rank in group.rank_handles]
    return np.concatenate(ray.get(asked, timeout=60))


def check_neighbours(ranks: list[Any], evidence: list[ray.ObjectRef], scan: ContextScan) -> None:
    """What the shards say together of the closest latents, against the whole decoder and a scan of those."""
    ids, rows_MD = (np.concatenate(part) for part in zip(*answers(ranks, "decoder_rows", [*range(96)]), strict=True))
    assert ids.tolist() == [*range(96)]
    unit_MD = rows_MD / np.linalg.norm(rows_MD, axis=1, keepdims=True)
    cosine_NM = unit_MD[scan.latents] @ unit_MD.T
    cosine_NM[np.arange(len(scan.latents)), scan.latents] = -9
    unit = UnitRows.merge(answers(ranks, "unit_rows", scan.latents.tolist()))
    near = asyncio.run(look_around(ranks, evidence, 32, scan.latents, scan, unit))
    np.testing.assert_allclose(near.cosine_Nn, -np.sort(-cosine_NM, axis=1)[:, :2], atol=2e-3)
    np.testing.assert_allclose(near.cosine_Nn, np.take_along_axis(cosine_NM, near.id_Nn, axis=1), atol=2e-3)
    of_asked = ContextScan.merge(answers(ranks, "scan", evidence, 32, near.asked_F.tolist()))
    assert of_asked.latents.tolist() == near.asked_F.tolist()
    assert ((of_asked.act_CN > 0) == np.unpackbits(near.bits_FW, axis=1, count=len(scan.act_CN)).T).all()


def answers(ranks: list[Any], method: str, *args: Any) -> list[Any]:
    return ray.get([getattr(rank, method).remote(*args) for rank in ranks], timeout=60)


def test_a_resumed_group_continues_the_same_losses_and_a_corrupt_shard_is_named(blocks, tmp_path):
    config = run_config(tmp_path)
    folder = tmp_path / "checkpoints"
    group = TrainerGroup.start(config, WIDTHS, generation=0)
    try:
        group.build(window(blocks, 0))
        first = group.window_result(group.train_window(0, 0, window(blocks, 0)))
        assert first.last_step == 4
        assert first.finished_window
        losses(group, blocks, range(1, 4))
        group.fork_control()
        losses(group, blocks, range(4, 5))
        path = group.save_checkpoint(claimed(folder), 20, (5, 0), extra={"rounds_done": 1})
        expected = losses(group, blocks, range(5, 9))
        counts = active_contexts(group, window(blocks, 0))
        asked = [rank.scan.remote(window(blocks, 0), 32, [90, 3, 50]) for rank in group.rank_handles]
        scan = ContextScan.merge(ray.get(asked, timeout=60))
        check_neighbours(group.rank_handles, window(blocks, 0), scan)

        os.kill(group.pids[1], signal.SIGKILL)
        with pytest.raises(RankDied):
            losses(group, blocks, range(5, 7))
    finally:
        group.stop()

    group = TrainerGroup.start(config, WIDTHS, generation=1)
    try:
        manifest = group.load_checkpoint(checkpoint.latest(folder))
        assert manifest["extra"] == {"rounds_done": 1}
        assert manifest["cursor"] == [5, 0]
        assert group.has_control
        assert losses(group, blocks, range(5, 9)) == expected
        assert (active_contexts(group, window(blocks, 0)) == counts).all()
        assert scan.latents.tolist() == [3, 50, 90]
        # 2 blocks x 4 sequences x 2 contexts; scanned activity agrees with the counted one.
        assert scan.act_CN.shape == (16, 3)
        assert ((scan.act_CN > 0).sum(0) == counts[[3, 50, 90]]).all()

        with pytest.raises(UserError, match=r"block 77: 1 of 256 tokens .* at blocks\.0\.hook_resid_post"):
            group.window_result(group.train_window(9, 0, [ray.put(block(77, bad=True))]))

        (shard,) = path.glob("rank-1.main.*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"rank-1\.main\..*corrupt"):
            group.load_checkpoint(path)
    finally:
        group.stop()


def test_a_checkpoint_of_two_shards_trains_on_in_one_process(blocks, tmp_path):
    folder = tmp_path / "checkpoints"
    group = TrainerGroup.start(run_config(tmp_path), WIDTHS, generation=0)
    try:
        group.build(window(blocks, 0))
        losses(group, blocks, range(3))
        path = group.save_checkpoint(claimed(folder), 12, (3, 0))
        expected = losses(group, blocks, range(3, 5))
    finally:
        group.stop()

    config = run_config(tmp_path)
    alone = config.model_copy(update={"trainer": config.trainer.model_copy(update={"tp": 1})})
    group = TrainerGroup.start(alone, WIDTHS, generation=1)
    try:
        group.load_checkpoint(path)
        torch.testing.assert_close(losses(group, blocks, range(3, 5)), expected, rtol=1e-3, atol=1e-5)
    finally:
        group.stop()


def test_a_cluster_without_room_says_what_is_missing(ray_session: None, tmp_path):
    config = run_config(tmp_path, wait_s=2)
    greedy = config.model_copy(update={"trainer": config.trainer.model_copy(update={"cpus": 30.0})})
    began = time.monotonic()
    with pytest.raises(UserError, match=r"holds at most 0 of 1 places of .* needs 60 CPU on one node;.* of 8 CPU"):
        TrainerGroup.start(greedy, WIDTHS, generation=0)
    assert time.monotonic() - began < 30


def reward_batch(scan: ContextScan) -> RewardBatch:
    """Verdicts that agree with the activity of the scanned latents."""
    rows = [
        (latent, context, column)
        for column, latent in enumerate(scan.latents)
        for context in range(len(scan.act_CN))
        if np.isfinite(scan.margin_CN[context, column])
    ]
    latents, contexts, columns = (np.array(part) for part in zip(*rows, strict=True))
    active = scan.act_CN[contexts, columns] > 0
    return RewardBatch(
        round=0,
        sae_step=12,
        latents=scan.latents,
        credit_weight=np.ones(len(scan.latents), dtype=np.float32),
        row_latent=latents,
        row_context=contexts,
        row_verdict=active.astype(np.float32),
        row_active=active,
        row_weight=np.ones(len(rows), dtype=np.float32),
        row_token=scan.token_CN[contexts, columns].astype(np.int64),
        false_positive_rate=0.05,
        false_negative_rate=0.05,
    )


@pytest.mark.parametrize("estimator", ["teacher_gate", "bank_gate"])
def test_rewards_move_main_and_not_control_and_survive_a_resume(blocks, tmp_path, estimator):
    config = run_config(tmp_path)
    config = config.model_copy(update={"rlaif": config.rlaif.model_copy(update={"estimator": estimator})})
    folder, evidence = tmp_path / "checkpoints", window(blocks, 9)
    group = TrainerGroup.start(config, WIDTHS, generation=0)
    try:
        group.build(window(blocks, 0))
        losses(group, blocks, range(3))
        group.fork_control()
        counts = active_contexts(group, evidence)
        judged = [*np.flatnonzero(counts[:48] > 2)[:3], *(48 + np.flatnonzero(counts[48:] > 2)[:3])]
        asked = [rank.scan.remote(evidence, 32, judged) for rank in group.rank_handles]
        batch = reward_batch(ContextScan.merge(ray.get(asked, timeout=60)))
        reports = group.apply_rewards(batch, evidence)
        assert [report["installed"] for report in reports] == [True, True]
        path = group.save_checkpoint(claimed(folder), 12, (3, 0))
        result = group.window_result(group.train_window(3, 0, window(blocks, 3)))
        row = result.metrics[-1]
        assert row["credit_loss"] > 0
        assert row["control/credit_loss"] == 0
        assert row["fvu"] != row["control/fvu"]
        expected = losses(group, blocks, range(4, 6))
    finally:
        group.stop()

    group = TrainerGroup.start(config, WIDTHS, generation=1)
    try:
        group.load_checkpoint(path)
        losses(group, blocks, range(3, 4))
        assert losses(group, blocks, range(4, 6)) == expected
    finally:
        group.stop()
