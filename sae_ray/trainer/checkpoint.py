"""Checkpoints: what a folder `step-N/` holds, when it counts, and how it is read on another mesh.

    step-N/rank-<tp>.main.safetensors       one tp shard of the SAE: weights, Adam, firing counts, threshold
    step-N/rank-<tp>.control.safetensors    the same of the control copy, where there is one
    step-N/manifest.json                    written last: a folder without it was never committed

A shard lists the latents it holds, so a reader takes the rows it needs from whichever files hold them. Ranks
of one dp column hold the same shard; the first writes it. Nothing here needs Ray or a process group.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.storage import LocalStorage

FORMAT = 1
MANIFEST = "manifest.json"
CREDIT = "credit."
LATENT_AXIS_FIRST = frozenset({"W_enc", "W_dec", "b_enc", "silent", "dead"})


def is_sharded(name: str) -> bool:
    """Whether the first axis of a state tensor is latents."""
    return name.rsplit(".", 1)[-1] in LATENT_AXIS_FIRST


def step_dir(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step}"


def shard_name(tp_rank: int, copy: str) -> str:
    return f"rank-{tp_rank}.{copy}.safetensors"


def write_shard(
    folder: str | Path, tp_rank: int, copy: str, state: dict[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Writes one shard. Returns its manifest entry, {file: {sha256, bytes}}."""
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    name = shard_name(tp_rank, copy)
    return {name: {"sha256": LocalStorage(folder).write(name, data), "bytes": len(data)}}


def begin(folder: str | Path) -> None:
    """Makes `folder` an uncommitted checkpoint, also where an older attempt had committed there."""
    (Path(folder) / MANIFEST).unlink(missing_ok=True)
    Path(folder).mkdir(parents=True, exist_ok=True)


def commit(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest: from here on the checkpoint counts."""
    data = json.dumps({"format": FORMAT, **manifest}, indent=1, sort_keys=True)
    LocalStorage(folder).write(MANIFEST, data.encode())


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
        "latents_of_rank": [list(report["latents"]) for report in shards],
        "files": {name: entry for report in shards for name, entry in report["files"].items()},
        "copies": shards[0]["copies"],
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
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        UserError: there is none, or it is not readable by this version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: is not a committed checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(LocalStorage(folder).read(MANIFEST))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: has format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def committed(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the committed checkpoints below `folder`, oldest first."""
    found = []
    for path in Path(folder).glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest(folder: str | Path) -> Path | None:
    """The newest committed checkpoint below `folder`."""
    found = committed(folder)
    return found[-1][1] if found else None


def prune(folder: str | Path, keep: int) -> list[Path]:
    """Deletes all but the newest `keep` committed checkpoints, never a pinned one.

    The manifest goes first, so that a crash leaves an uncommitted folder and not a broken checkpoint.
    """
    removed = []
    for _, path in committed(folder)[:-keep]:
        if not read_manifest(path).get("pin"):
            (path / MANIFEST).unlink()
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def read_rows(
    folder: str | Path, manifest: dict[str, Any], copy: str, first: int, last: int
) -> dict[str, torch.Tensor]:
    """State of the latents `first..last-1`, whatever mesh wrote the checkpoint. Credit state is left out.

    Raises:
        UserError: no such copy, or a file is missing or not what was committed (it is named).
    """
    parts: list[dict[str, torch.Tensor]] = []
    for tp_rank, (low, high) in enumerate(_bounds(manifest)):
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
    for tp_rank in range(len(_bounds(manifest))):
        state = _read_shard(folder, manifest, tp_rank, "main")
        out.append({n.removeprefix(CREDIT): t for n, t in state.items() if n.startswith(CREDIT)})
    return out


def load_full(folder: str | Path, which: str = "main") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The whole SAE of a checkpoint, all shards joined, without Ray.

    Returns:
        Tensors: W_enc, W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in], threshold [], silent [d_sae], ...;
        and the manifest with `input_scale` and `steps_done` of this copy at the top level.
    """
    manifest = read_manifest(folder)
    tensors = read_rows(folder, manifest, which, 0, manifest["d_sae"])
    return tensors, {**manifest, **manifest["copies"][which]}


def _bounds(manifest: dict[str, Any]) -> list[tuple[int, int]]:
    return [(low, high) for low, high in manifest["latents_of_rank"]]


def _read_shard(folder: str | Path, manifest: dict[str, Any], tp_rank: int, copy: str) -> dict[str, torch.Tensor]:
    if copy not in manifest["copies"]:
        raise UserError(f"{folder}: has no {copy!r} copy, only {', '.join(sorted(manifest['copies']))}")
    name = shard_name(tp_rank, copy)
    return tensors_from_bytes(LocalStorage(folder).read(name, manifest["files"][name]["sha256"]))
