"""The run's own producer with fuses in it: it dies, or lets its lease run out, where a plan says."""

from __future__ import annotations

import time
from typing import Any

from chaos_actors import fuses_of

from sae_ray.activations.producer import ActivationProducer
from sae_ray.corpus import Split


class FaultyProducer(ActivationProducer):
    def __init__(self, config_json: str) -> None:
        super().__init__(config_json)
        self._fuses = fuses_of(self._cfg)

    def ready(self) -> dict[str, Any]:
        self._fuses.kill("producer killed", "while it starts", 0)
        return super().ready()

    def produce(self, split: Split, block_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if split != "train":
            return super().produce(split, block_id)
        self._fuses.kill("producer killed", "before a block", block_id)
        if self._fuses.take("lease runs out", "inside a block", block_id) is not None:
            time.sleep(20 * self._cfg.activations.lease_timeout_s)  # its lease's end is its own
        self._wait_at_gates(block_id)
        made = super().produce(split, block_id)
        self._fuses.kill("producer killed", "after a block", block_id)
        return made

    def _wait_at_gates(self, block_id: int) -> None:
        """Holds the stream until whoever takes a node away has done so."""
        for gate in self._fuses.faults:
            if gate.phase == "at a gate" and block_id >= gate.at:
                (self._fuses.folder / f"{gate.id}.reached").touch()
                while not (self._fuses.folder / f"{gate.id}.open").exists():
                    time.sleep(0.1)
