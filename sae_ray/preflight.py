"""Everything that can be found wrong before a cluster is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.session import check_address
from sae_ray.storage import LocalStorage, ensure_writable

HASHED_BYTES = 2 << 30

# Sections and keys that change where or how fast a run goes, not its numbers: a resumed run may change them.
FREE_ON_RESUME = (
    *("runs_dir", "ray", "evaluation", "rlaif.round_timeout_s"),
    *(f"judge.{key}" for key in ("app", "autoscaling", "cpus", "gpus", "threads", "max_in_flight", "max_attempts")),
    *(f"judge.{key}" for key in ("start_timeout_s", "deadline_s")),
    *(
        f"activations.{key}"
        for key in ("producers", "cpus", "gpus", "window_blocks", "lease_timeout_s", "max_restarts")
    ),
    *(f"trainer.{key}" for key in ("dp", "tp", "cpus", "gpus", "max_restarts", "step_timeout_s")),
    *(f"trainer.{key}" for key in ("checkpoint_every", "keep_checkpoints")),
)


def preflight(config: RunConfig) -> None:
    """Checks the run folder, the model, the hook, the corpus and the Ray address, cheapest first.

    Raises:
        UserError: the first thing that would fail, in the user's words.
    """
    ensure_writable(config.run_dir)
    check_address(config.ray)
    from sae_ray.activations.subject import check_hook, load_tokenizer
    from sae_ray.corpus import check_corpus
    from sae_ray.embedded import resolve_model

    check_hook(config.model, config.hook)
    check_corpus(config, load_tokenizer(config.model))
    if (config.rlaif.enabled or config.evaluation.latents) and config.judge.app is None:
        resolve_model(config.judge.model, "judge.model")


def check_checkpoint(config: RunConfig) -> None:
    """Reads a resumed run's last checkpoint against its hashes, so that a torn shard is found before a cluster starts.

    Checkpoints larger than HASHED_BYTES are left to the ranks, which read every shard against its hash anyway.

    Raises:
        UserError: a file is missing or corrupt (it is named).
    """
    from sae_ray.trainer import checkpoint

    path = checkpoint.latest(config.run_dir / "checkpoints")
    if path is None:
        return
    files = checkpoint.read_manifest(path)["files"]
    if sum(entry["bytes"] for entry in files.values()) <= HASHED_BYTES:
        storage = LocalStorage(path)
        for name, entry in files.items():
            storage.read(name, entry["sha256"])


def numbers_of(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides a run's numbers."""
    tree = config.model_dump(mode="json")
    for key in FREE_ON_RESUME:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    return tree


def check_resumable(config: RunConfig) -> None:
    """A run name that was used before must mean the same run.

    Raises:
        UserError: the run folder holds a run whose numbers would differ; names the keys.
    """
    path = config.run_dir / "config.yaml"
    if not path.exists():
        return
    try:
        before = numbers_of(RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: the earlier run's config cannot be read; use another name or remove {config.run_dir}"
        ) from error
    changed = sorted(_differences(before, numbers_of(config)))
    if changed:
        raise UserError(
            f"{config.run_dir}: holds a run with other settings ({'; '.join(changed[:5])}); "
            "use another name, the same settings, or --fresh"
        )


def _differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in before.keys() | after.keys():
            found += _differences(before.get(key), after.get(key), f"{prefix}{key}.")
        return found
    return [] if before == after else [f"{prefix[:-1]} was {before!r}, is {after!r}"]


def resolved_path(run_dir: Path) -> Path:
    """Where the resolved config of a run lies.

    Raises:
        UserError: `run_dir` holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: holds no run (no config.yaml)")
    return path
