"""Checkpoints: what a folder `step-N/` holds, when it counts, and how it is read on another mesh.

    step-N/rank-<tp>.main.<save>.safetensors       one tp shard of the SAE: weights, Adam, firing counts, threshold
    step-N/rank-<tp>.control.<save>.safetensors    the same of the control copy, where there is one
    step-N/manifest.json                           written last: a folder without it was never committed

A shard lists the latents it holds, so a reader takes the rows it needs from whichever files hold them. Ranks
of one dp column hold the same shard; the first writes it. `folder` is a local one or `s3://bucket/prefix`
throughout. Nothing here needs Ray or a process group, or asks who may write: `claim.py` does.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.storage import join, open_storage
from sae_ray.tensor_file import buffers_of
from sae_ray.trainer.claim import WRITER

FORMAT = 2
MANIFEST = "manifest.json"
CREDIT = "credit."
# All else is per latent, but for what is the rank's own.
OF_THE_WHOLE_SAE = frozenset({"b_dec", "threshold", "price", "gamma_hold"})
OF_A_RANK = "rng."


def is_sharded(name: str) -> bool:
    """Whether the first axis of a state tensor is latents."""
    return not name.startswith(OF_A_RANK) and name.rsplit(".", 1)[-1] not in OF_THE_WHOLE_SAE


def home(cfg: RunConfig) -> str | Path:
    """Where a run's checkpoints lie."""
    return cfg.trainer.checkpoint_dir or cfg.run_dir / "checkpoints"


def step_dir(folder: str | Path, step: int) -> str | Path:
    return join(folder, f"step-{step}")


def shard_name(tp_rank: int, copy: str, save: str = "") -> str:
    """A name that no other save gives, so that nobody's late write replaces what a manifest lists."""
    return f"rank-{tp_rank}.{copy}.{save}.safetensors" if save else f"rank-{tp_rank}.{copy}.safetensors"


def snapshot(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy in main memory that later training steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def write_shard(
    folder: str | Path, tp_rank: int, copy: str, state: dict[str, torch.Tensor], save: str = ""
) -> dict[str, dict[str, Any]]:
    """Writes one shard (tensors in main memory) of the save. Returns its manifest entry, {file: {sha256, bytes}}."""
    buffers = buffers_of({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    name = shard_name(tp_rank, copy, save)
    sha256 = open_storage(folder).write(name, buffers)
    return {name: {"sha256": sha256, "bytes": sum(buffer.nbytes for buffer in buffers)}}


def begin(folder: str | Path) -> None:
    """Makes `folder` an empty, uncommitted checkpoint, also where an older attempt had committed there."""
    storage = open_storage(folder)
    storage.delete(MANIFEST)
    storage.delete("")


def unseen(folder: str | Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first of a manifest's `files` that this process does not see there in whole."""
    storage = open_storage(folder)
    return next((name for name, entry in files.items() if storage.size(name) != entry["bytes"]), None)


def commit(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest: from here on the checkpoint counts.

    Raises:
        UserError: it cannot be written, or another run has committed this step here since `begin`.
    """
    data = json.dumps({"format": FORMAT, **manifest}, indent=1, sort_keys=True)
    open_storage(folder).commit(MANIFEST, data.encode())


def manifest_of(cfg: RunConfig, d_in: int, reports: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run's checkpoint.

    Args:
        reports: what `TrainerRank.save` returned on each rank.
        about: step, cursor, pin and extra.
    """
    shards = sorted((r for r in reports if r["files"]), key=lambda report: report["tp_rank"])
    return {
        **about,
        "mesh": {"dp": cfg.trainer.dp, "tp": cfg.trainer.tp},
        "files": {name: entry for report in shards for name, entry in report["files"].items()},
        "copies": {
            copy: {**meta, "latents_of_rank": [list(report["latents"][copy]) for report in shards]}
            for copy, meta in shards[0]["copies"].items()
        },
        "d_in": d_in,
        "d_sae": cfg.sae.d_sae,
        "architecture": cfg.sae.architecture,
        "k": cfg.sae.k,
        "input_norm": cfg.sae.input_norm,
        "dtype": cfg.trainer.dtype,
        "model": cfg.model.name,
        "hook": cfg.hook.name,
        "context_length": cfg.corpus.context_length,
        "seed": cfg.seed,
        "config_sha256": hashlib.sha256(cfg.to_yaml().encode()).hexdigest(),
        "config": cfg.model_dump(mode="json"),
    }


def read_manifest(folder: str | Path, any_format: bool = False) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Args:
        any_format: accept what another version wrote, of which only `step` and `config` are sure.

    Raises:
        UserError: there is none, or it is not readable by this version.
    """
    storage = open_storage(folder)
    if not storage.exists(MANIFEST):
        raise UserError(f"{folder}: is not a committed checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(storage.read(MANIFEST))
    except ValueError as error:
        raise UserError(f"{storage.url(MANIFEST)}: is not JSON") from error
    if not any_format and manifest.get("format") != FORMAT:
        raise UserError(
            f"{storage.url(MANIFEST)}: has format {manifest.get('format')}, this version reads {FORMAT}; "
            "start anew (--fresh) or go on with the version that wrote it"
        )
    return manifest


def steps(folder: str | Path) -> dict[int, bool]:
    """All checkpoints below `folder`, oldest first: step -> whether it was committed."""
    storage = open_storage(folder)
    numbers = sorted(int(match[1]) for name in storage.folders() if (match := re.fullmatch(r"step-(\d+)", name)))
    return {step: storage.exists(f"step-{step}/{MANIFEST}") for step in numbers}


def committed(folder: str | Path) -> list[tuple[int, str | Path]]:
    """(step, folder) of the committed checkpoints below `folder`, oldest first."""
    return [(step, step_dir(folder, step)) for step, whole in steps(folder).items() if whole]


def latest(folder: str | Path) -> str | Path | None:
    """The newest committed checkpoint below `folder`."""
    found = committed(folder)
    return found[-1][1] if found else None


def prune(folder: str | Path, keep: int) -> list[int]:
    """Deletes all but the newest `keep` committed checkpoints, never a pinned one, and what was never committed.

    Nothing may be in the middle of a save. Returns the steps that are gone.
    """
    found = steps(folder)
    whole = [step for step, is_whole in found.items() if is_whole]
    old = [step for step in whole[:-keep] if not read_manifest(step_dir(folder, step)).get("pin")]
    removed = sorted(old + [step for step, is_whole in found.items() if not is_whole])
    for step in removed:
        begin(step_dir(folder, step))
    return removed


def discard_uncommitted(folder: str | Path) -> None:
    """Removes what a save that failed has left."""
    for step, whole in steps(folder).items():
        if not whole:
            begin(step_dir(folder, step))


def remove_all(folder: str | Path) -> None:
    """Removes every checkpoint below `folder`, whose the place was, and nothing else."""
    for step in steps(folder):
        begin(step_dir(folder, step))
    open_storage(folder).delete(WRITER)


def check_whole(folder: str | Path, largest: int) -> None:
    """Reads a committed checkpoint of at most `largest` bytes against its hashes.

    Raises:
        UserError: a file is missing or corrupt (it is named).
    """
    files = read_manifest(folder)["files"]
    if sum(entry["bytes"] for entry in files.values()) <= largest:
        storage = open_storage(folder)
        for name, entry in files.items():
            storage.read(name, entry["sha256"])


def read_rows(
    folder: str | Path, manifest: dict[str, Any], copy: str, first: int, last: int
) -> dict[str, torch.Tensor]:
    """State of the latents `first..last-1`, whatever mesh wrote the checkpoint. Credit state is left out.

    Raises:
        UserError: no such copy, or a file is missing or not what was committed (it is named).
    """
    parts: list[dict[str, torch.Tensor]] = []
    for tp_rank, (low, high) in enumerate(_bounds(folder, manifest, copy)):
        if max(low, first) >= min(high, last):
            continue
        state = _read_shard(folder, manifest, tp_rank, copy)
        rows = slice(max(low, first) - low, min(high, last) - low)
        parts.append(
            {
                name: tensor[rows] if is_sharded(name) else tensor
                for name, tensor in state.items()
                if not name.startswith(CREDIT)
            }
        )
    return {
        name: torch.cat([part[name] for part in parts]) if is_sharded(name) else parts[0][name] for name in parts[0]
    }


def read_credit(folder: str | Path, manifest: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The credit state that each old shard saved (empty where it had none), in order of latents."""
    out = []
    for tp_rank in range(len(_bounds(folder, manifest, "main"))):
        state = _read_shard(folder, manifest, tp_rank, "main")
        out.append({n.removeprefix(CREDIT): t for n, t in state.items() if n.startswith(CREDIT)})
    return out


def load_full(folder: str | Path, which: str = "main") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The whole SAE of a checkpoint, all shards joined, without Ray.

    Returns:
        Tensors: W_enc, W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in], threshold [], silent [d_sae], ...;
        and the manifest with what it says of this copy at the top level.
    """
    manifest = read_manifest(folder)
    about = {**manifest, **manifest["copies"].get(which, {})}
    return read_rows(folder, manifest, which, 0, about["d_sae"]), about


def _bounds(folder: str | Path, manifest: dict[str, Any], copy: str) -> list[tuple[int, int]]:
    """Which latents of a copy each tp rank wrote; copies differ in d_sae."""
    if copy not in manifest["copies"]:
        raise UserError(f"{folder}: has no {copy!r} copy, only {', '.join(sorted(manifest['copies']))}")
    # Before there were variants, the bounds stood once, for all copies.
    about = {**manifest, **manifest["copies"][copy]}
    return [(low, high) for low, high in about["latents_of_rank"]]


def _read_shard(folder: str | Path, manifest: dict[str, Any], tp_rank: int, copy: str) -> dict[str, torch.Tensor]:
    files = manifest["files"]
    # Only the manifest knows which save wrote it; before saves had names, a shard's ended here.
    name = next((name for name in files if name.split(".")[:2] == [f"rank-{tp_rank}", copy]), None)
    if name is None:
        raise UserError(f"{folder}: its {MANIFEST} lists no {shard_name(tp_rank, copy)}")
    return tensors_from_bytes(open_storage(folder).read(name, files[name]["sha256"]))
