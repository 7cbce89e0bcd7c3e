"""LoRA adapters as a replica finds them: their folders, ranks and modules, and which of them a judge cannot use.

vLLM applies an adapter's change of the output head to sampled tokens, but not to a prompt's log-probabilities, from
which likelihoods are read: https://github.com/vllm-project/vllm/issues/51594. Worse, an engine with room for such a
change dies of a prompt's log-probabilities on CPU, whatever the adapter changes (issue 16668 there). So engines are
told which modules adapters change, and the head is never among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sae_ray.errors import UserError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HEAD = "lm_head"
# What vLLM can make room for.
_RANKS = (16, 32, 64, 128, 256, 320, 512)


def adapter_folders(lora: Mapping[str, str]) -> dict[str, str]:
    """Where this machine has each adapter of `judge.lora`; one that is a Hugging Face id is fetched.

    Raises:
        UserError: there is no such adapter, or it has no safetensors.
    """
    return {name: str(_folder(name, path)) for name, path in lora.items()}


def engine_room(lora: Mapping[str, str]) -> dict[str, Any]:
    """Engine arguments for adapters in these folders: the rank and the modules that they need.

    Raises:
        UserError: an adapter changes the output head, or its files are not as PEFT writes them.
    """
    modules: set[str] = set()
    for name, folder in lora.items():
        changed = _modules(Path(folder) / _WEIGHTS)
        if not changed:
            raise UserError(f"judge.lora.{name} {folder}: {_WEIGHTS} holds no LoRA weights as PEFT names them")
        if _HEAD in changed:
            raise UserError(
                f"judge.lora.{name} {folder}: changes {_HEAD}, which vLLM leaves out of a prompt's log-probabilities, "
                f"and so out of likelihoods; merge it into the model, or train it without {_HEAD}"
            )
        modules |= changed
    return {"max_lora_rank": fitting_rank(lora), "lora_target_modules": sorted(modules)}


def fitting_rank(lora: Mapping[str, str]) -> int:
    """The smallest rank that vLLM allows and all adapters fit into, as far as their folders can be read here."""
    ranks = [_RANKS[0], *(rank for folder in lora.values() if (rank := _rank(Path(folder).expanduser())) is not None)]
    return next((rank for rank in _RANKS if rank >= max(ranks)), max(ranks))


def _rank(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / _CONFIG).read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(name: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[_CONFIG, _WEIGHTS]))
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"judge.lora.{name} {path}: is no folder here, and the Hub has it not: {said}") from error
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"judge.lora.{name} {path}: has no {file}; an adapter as PEFT saves it is needed")
    return folder


def _modules(weights: Path) -> set[str]:
    """Last parts of the names of modules with LoRA weights: `q_proj` of `...self_attn.q_proj.lora_A.weight`."""
    with safe_open(weights, framework="numpy") as file:
        names = list(file.keys())
    return {name[: name.index(".lora_")].rsplit(".", 1)[-1] for name in names if ".lora_" in name} | {
        _HEAD for name in names if f"{_HEAD}." in name
    }
