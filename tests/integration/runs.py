"""Tiny real runs for the tests: SmolLM2 up to layer 2, a 256-latent SAE, the installed-docs corpus."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.config import RunConfig
from sae_ray.sae.inference import TrainedSAE
from sae_ray.telemetry import read_jsonl
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "ray": {"address": "local", "local_cpus": 8, "object_store_mb": 300},
    "model": {"dtype": "float32"},
    "hook": {"layer": 2},
    "corpus": {"context_length": 64},
    "activations": {"producers": 2, "block_sequences": 4, "mix_blocks": 2, "window_blocks": 6},
    "sae": {"d_sae": 256, "k": 8, "dead_after_tokens": 2000},
    "trainer": {"tp": 2, "batch_tokens": 126, "steps": 48, "log_every": 1, "checkpoint_every": 8, "warmup_steps": 2},
    "rlaif": {"enabled": False, "evidence_blocks": 4},
    "evaluation": {"blocks": 2, "ce_sequences": 2, "latents": 0, "random_directions": 0, "threads": 1},
}


def write_config(folder: Path, **sections: Any) -> Path:
    """A run config in `folder`: TINY with sections merged over it; its run folder lies beside it."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    config["runs_dir"] = str(folder / "runs")
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    """`sae-ray train` in a process group of its own, as a shell would start it."""
    command = [sys.executable, "-m", "sae_ray.cli", "train", str(config), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 280) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a run that hangs is killed with its children and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"the run did not end within {timeout} s\n{out[-2000:]}\n{err[-2000:]}") from None
    return process.returncode, out, err


def train(config: Path, *options: str, timeout: float = 280) -> str:
    """Runs to the end and returns what it printed; fails the test on any other exit code than 0."""
    code, out, err = finish(start(config, *options), timeout)
    assert code == 0, f"exit code {code}\n{out[-3000:]}\n{err[-3000:]}"
    return out


def losses(folder: Path, name: str = "tiny") -> dict[int, float]:
    """Loss of every step of a finished run."""
    return {row["step"]: row["loss"] for row in read_jsonl(folder / "runs" / name / "metrics.jsonl")}


def wait_for(condition: Any, process: subprocess.Popen[str], timeout: float = 200) -> None:
    """Polls until `condition()` holds; fails if the run ends first or takes too long."""
    ends = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.1)


def tiny_sae(d_sae: int) -> TrainedSAE:
    """A BatchTopK of SmolLM2's layer 2, trained for a moment in this process."""
    config = RunConfig.model_validate({**TINY, "sae": {**TINY["sae"], "d_sae": d_sae}})
    producer = ActivationProducer(config.model_dump_json())
    blocks = [Block.from_numpy_dict(producer.produce("train", i)[1]).acts_TD(torch.float32) for i in range(12)]
    trainer = ShardedTrainer(config.sae, config.trainer, 576, 0, Collectives(Mesh.alone()))
    trainer.initialise(torch.cat(blocks))
    for _ in range(8):
        for raw_BD in blocks:
            trainer.step(raw_BD, len(raw_BD))
    return TrainedSAE.from_checkpoint(trainer.state(), trainer.meta())
