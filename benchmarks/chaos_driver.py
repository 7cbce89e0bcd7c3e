"""The driver process of a disturbed run: `sae-ray train`'s loop, without the evaluation that follows it.

    python benchmarks/chaos_driver.py CONFIG

Joins `ray.address`. Ends with 0 when the run is complete, with 2 and one line when the run says what is wrong; the same
command resumes it. Producers, ranks, log and commits have fuses in them (`chaos_actors.py`, `chaos_producer.py`).
"""

from __future__ import annotations

import functools
import io
import sys
from pathlib import Path

from chaos_actors import FaultyRank, WatchedLog, fuses_of, watch_commits
from chaos_producer import FaultyProducer
from rich.console import Console

import sae_ray.controller
import sae_ray.trainer.group
from sae_ray.activations.stream import BlockStream
from sae_ray.config_file import load_config
from sae_ray.controller import Controller
from sae_ray.errors import UserError
from sae_ray.session import Interrupt, ray_session
from sae_ray.telemetry import Progress, RunStatus
from sae_ray.trainer import checkpoint


def train(path: Path) -> None:
    config = load_config(path)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    sae_ray.trainer.group.TrainerRank = FaultyRank  # type: ignore[misc]
    sae_ray.controller.BlockStream = functools.partial(  # type: ignore[assignment,misc]
        BlockStream, producer=FaultyProducer
    )
    fuses = fuses_of(config)
    watch_commits(fuses)
    latest = checkpoint.latest(checkpoint.home(config))
    log = WatchedLog(config.run_dir, checkpoint.read_manifest(latest)["step"] if latest else 0)
    log.fuses = fuses
    status = RunStatus(total_steps=config.total_steps)
    progress = Progress(config.name, status, Console(file=io.StringIO(), width=200), log)
    try:
        with Interrupt() as interrupt, progress, ray_session(config.ray):
            controller = Controller(config, status, progress, log, interrupt)
            try:
                controller.run()
            finally:
                controller.close()
    finally:
        log.close()


if __name__ == "__main__":
    try:
        train(Path(sys.argv[1]))
    except UserError as error:
        print(f"sae-ray: {error}", file=sys.stderr)
        sys.exit(2)
