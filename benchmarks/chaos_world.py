"""What disturbed runs are runs of: a tiny real one, with a store of its activations and rewards to replay.

SmolLM2 up to layer 2, a 256-latent SAE, 72 steps: 48 of reconstruction, then 24 with two rounds of
rewards. Made once in a folder; from there a run costs little more than starting its processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sae_ray.activations.store import ActivationStore, chunk_key, stream_settings, write_chunk
from sae_ray.config import RunConfig
from sae_ray.corpus import Split
from sae_ray.reward.applied import AppliedRound, AppliedRounds
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.storage import LocalStorage, open_storage
from sae_ray.trainer.mixing import batch_count
from sae_ray.trainer.rank import TrainerRank

TREE: dict[str, Any] = {
    "seed": 5,
    "ray": {"wait_s": 300},
    "model": {"dtype": "float32"},
    "hook": {"layer": 2},
    "corpus": {"context_length": 64},
    "activations": {
        "producers": 2, "block_sequences": 4, "mix_blocks": 2, "window_blocks": 6, "lease_timeout_s": 12,
        "max_restarts": 1000,
    },
    "sae": {"d_sae": 256, "k": 8, "dead_after_tokens": 2000},
    "trainer": {
        "tp": 2, "batch_tokens": 126, "steps": 48, "log_every": 1, "checkpoint_every": 8, "warmup_steps": 2,
        "max_restarts": 1000,
    },
    "rlaif": {
        "enabled": True, "steps": 24, "rounds": 2, "latents": 6, "evidence_blocks": 4, "gamma": 0.1, "control": True,
    },
    "evaluation": {"latents": 0},
}  # fmt: skip
ROUNDS_AT = (52, 63)  # steps after which the replayed rounds come; the second inside a window
JUDGED = 6


class World:
    """A folder with `store/`, `taught/rewards/`, and the runs beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "taught" / "rewards").exists():
            self._make_store()
            self._make_rewards()
        self.store = ActivationStore.open(str(self.folder / "store"))

    def config(self, name: str, **sections: Any) -> RunConfig:
        """A run's config; `sections` are merged over the usual ones."""
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TREE.items()}
        tree |= {"name": name, "runs_dir": str(self.folder / "runs")}
        tree["activations"]["store"] = str(self.folder / "store")
        tree["rlaif"]["replay_rewards"] = str(self.folder / "taught")
        for key, value in sections.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        return RunConfig.model_validate(tree)

    def write(self, config: RunConfig) -> Path:
        path = self.folder / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return path

    def windows(self, config: RunConfig) -> list[int]:
        """Tokens of each mix window that the store has whole."""
        size, held = config.activations.mix_blocks, self.store.train_blocks
        tokens = [self.store.entry("train", block_id)["tokens"] for block_id in range(held)]
        return [sum(tokens[first : first + size]) for first in range(0, held - size + 1, size)]

    def blocks(self, config: RunConfig) -> int:
        """Train blocks that the run's steps take."""
        steps = windows = 0
        for tokens in self.windows(config):
            if steps >= config.total_steps:
                break
            steps, windows = steps + batch_count(tokens, config.trainer.batch_tokens), windows + 1
        return windows * config.activations.mix_blocks

    # -- making it --------------------------------------------------------------------------------------

    def _make_store(self) -> None:
        from sae_ray.activations.producer import ActivationProducer  # brings transformers along

        config = RunConfig.model_validate({**TREE, "name": "store"})
        producer, uri = ActivationProducer(config.model_dump_json()), str(self.folder / "store")
        ready = producer.ready()
        hook = config.hook.name
        index = {"settings": stream_settings(config), "columns": {hook: (0, ready["widths"][hook])}}
        store = ActivationStore(uri, {**index, "dtype": ready["dtype"], "chunks": {}})
        for block_id in range(config.rlaif.evidence_blocks):
            self._store_block(store, producer, "evidence", block_id)
        while store.steps(config) < config.total_steps + 8:
            self._store_block(store, producer, "train", store.train_blocks)
        store.write_index()

    def _store_block(self, store: ActivationStore, producer: Any, split: Split, block_id: int) -> None:
        meta, block = producer.produce(split, block_id)
        chunk = write_chunk(open_storage(store.uri), split, block)
        counts = {key: meta[key] for key in ("tokens", "sequence_tokens")}
        store.chunks[chunk_key(split, block_id)] = chunk | counts

    def _make_rewards(self) -> None:
        """Two rounds whose verdicts agree with the activity that an SAE of this stream shows after a few steps."""
        store = ActivationStore.open(str(self.folder / "store"))
        config = RunConfig.model_validate({**TREE, "name": "taught"})
        hooks, width = [config.hook.name], store.columns[config.hook.name][1]
        rank = TrainerRank(config.model_dump_json(), {config.hook.name: width})
        rank.join("127.0.0.1", 0, 0, 1, 0)
        evidence = [store.read("evidence", number, hooks) for number in range(config.rlaif.evidence_blocks)]
        rounds = AppliedRounds(LocalStorage(self.folder / "taught"))
        size = config.activations.mix_blocks
        for window in range(8):
            blocks = [store.read("train", window * size + number, hooks) for number in range(size)]
            if not window:
                rank.build(blocks)
            rank.train_window(window, 0, blocks)
        counts = rank.count_contexts(evidence, config.judge.context_tokens)
        active = np.flatnonzero((counts > 2) & (counts < counts.max()))
        for number, step in enumerate(ROUNDS_AT):
            latents = [int(each) for each in active[number :: len(active) // JUDGED][:JUDGED]]
            scan = rank.scan(evidence, config.judge.context_tokens, latents)
            summary = {"rewards": len(latents), "verdicts": int(np.isfinite(scan.margin_CN).sum())}
            summary |= {"mean_auroc": 0.9, "mean_shuffled": 0.5, "drift": None, "judged_at_step": step - 2}
            rounds.write(AppliedRound(_batch(number, step, scan), step, summary))


def _batch(number: int, step: int, scan: ContextScan) -> RewardBatch:
    """Verdicts that hold for the contexts in which a latent is active."""
    columns, contexts = np.nonzero(np.isfinite(scan.margin_CN).T)
    active = scan.act_CN[contexts, columns] > 0
    return RewardBatch(
        round=number,
        sae_step=step - 2,
        latents=np.asarray(scan.latents),
        credit_weight=np.full(len(scan.latents), 1 / len(scan.latents), dtype=np.float32),
        row_latent=np.asarray(scan.latents)[columns],
        row_context=contexts,
        row_verdict=active.astype(np.float32),
        row_active=active,
        row_weight=np.ones(len(active), dtype=np.float32),
        row_token=scan.token_CN[contexts, columns].astype(np.int64),
        false_positive_rate=0.05,
        false_negative_rate=0.05,
    )
