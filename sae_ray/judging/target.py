"""What `sae-ray judge` is asked about: an SAE, and the model, hook point and corpus that it is judged on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_ray.config import HookConfig, RunConfig
from sae_ray.config_file import load_config, parse_config
from sae_ray.errors import UserError
from sae_ray.sae.formats import read_sae
from sae_ray.sae.formats.notes import Provenance
from sae_ray.sae.formats.of_run import sae_of_run
from sae_ray.sae.inference import TrainedSAE

CORPUS_KINDS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Target:
    """An SAE and a config whose model, hook and corpus are what it is judged on.

    config.run_dir is the folder of the judging itself. digest: of the SAE's numbers, so that results of another SAE
    are never continued.
    """

    sae: TrainedSAE
    config: RunConfig
    digest: str


def find_target(
    path: Path, config_file: Path | None, overrides: list[str], corpus: str | None = None, name: str | None = None
) -> Target:
    """Reads the SAE and settles everything that it is judged with.

    Args:
        path: a run folder, or an SAE of any format that `sae-ray import` reads.
        config_file: a run config; None takes the run's own, or one made of what the SAE says of itself.
        overrides: `section.key=value`.
        corpus: file, glob, `s3://` URI or Hugging Face dataset id instead of the config's corpus.
        name: of the judging's own folder in `runs_dir`.
    Raises:
        UserError: names the file, option or key, and what would be right.
    """
    is_run = (path / "config.yaml").is_file()
    overrides = [*overrides, *(_corpus(corpus) if corpus else [])]
    if is_run:
        run = load_config(config_file or path / "config.yaml", overrides)
        home = run.model_copy(update={"runs_dir": str(path.resolve().parent), "name": path.resolve().name})
        _, found = sae_of_run(home)
        label = path.resolve().name
    else:
        if not path.exists():
            raise UserError(f"{path}: no such run folder or SAE")
        found = read_sae(path)
        label = path.stem if path.is_file() else path.resolve().name  # a link's own name: its target's may be a hash
        run = (
            load_config(config_file, overrides)
            if config_file is not None
            else config_from(found.provenance, path, overrides)
        )
    if run.hook_out is not None or found.sae.is_transcoder:
        raise UserError(f"{path}: is a transcoder; `sae-ray judge` reads latents of SAEs that reconstruct their input")
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", label).lstrip("._-") or "sae"
    run = run.model_copy(update={"name": name or f"judge-{safe}"[:100], "saes": []})
    return Target(found.sae, parse_config(run.model_dump(), "--name" if name else str(path)), digest_of(found.sae))


def config_from(provenance: Provenance, path: Path, overrides: list[str]) -> RunConfig:
    """A config from what an SAE says of itself; overrides fill in what it does not say."""
    given = {item.partition("=")[0] for item in overrides}
    content: dict[str, Any] = {"name": "judge"}
    if provenance.model and "model.name" not in given:
        content["model"] = {"name": provenance.model}
    hook = hook_of(provenance.hook)
    if hook is not None and "hook.layer" not in given:
        content["hook"] = {"layer": hook.layer, "site": hook.site}
    missing = [
        key for key, there in (("model.name", "model" in content), ("hook.layer", "hook" in content)) if not there
    ]
    if left := [key for key in missing if key not in given]:
        said = f" (it says hook {provenance.hook!r})" if provenance.hook and "hook.layer" in left else ""
        raise UserError(
            f"{path}: does not say its {' and '.join(left)}{said}; add "
            f"{' '.join(f'--set {key}=...' for key in left)}, or --config with a run config"
        )
    if provenance.context_length and "corpus.context_length" not in given:
        content["corpus"] = {"context_length": provenance.context_length}
    return parse_config(content, str(path), overrides)


def hook_of(name: str) -> HookConfig | None:
    """The hook point behind a name as SAELens (`blocks.9.hook_resid_post`) or sparsify (`layers.9`) write it."""
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|resid_mid|attn_out|mlp_out)", name):
        return HookConfig(layer=int(match[1]), site=match[2])
    if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_in", name):
        return HookConfig(layer=int(match[1]), site="mlp_in")
    if match := re.fullmatch(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)", name):
        return HookConfig(layer=int(match[1]))
    return None


def latents_of(text: str | None, d_sae: int) -> list[int]:
    """Latent ids of `--latents`: `0:1000`, `7`, `3,9,12:20`; None is all.

    Raises:
        UserError: not such a list, or past the last latent.
    """
    if text is None:
        return list(range(d_sae))
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        if match is None:
            raise UserError(
                f"--latents {text}: {part.strip()!r} is neither a number nor first:end, e.g. 0:1000 or 3,9,12:20"
            )
        first = int(match[1])
        end = int(match[2]) if match[2] else first + 1
        if first >= end or end > d_sae:
            raise UserError(f"--latents {text}: {part.strip()} is not within 0:{d_sae}, the latents of this SAE")
        out += range(first, end)
    return sorted(set(out))


def digest_of(sae: TrainedSAE) -> str:
    """SHA-256 over an SAE's tensors."""
    digest = hashlib.sha256(f"{sae.architecture} {sae.k} {sae.input_scale}".encode())
    for value in (sae.W_enc_MD, sae.W_dec_MD, sae.b_enc_M, sae.b_dec_D, sae.threshold, *sae.own.values()):
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _corpus(text: str) -> list[str]:
    """Overrides that name a corpus."""
    suffix = next((kind for end, kind in CORPUS_KINDS.items() if text.endswith(end)), None)
    if suffix is not None:
        return [f"corpus.kind={suffix}", f"corpus.paths=[{text!r}]"]
    if text == "installed-docs":
        return ["corpus.kind=installed-docs"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).exists():
        return ["corpus.kind=hf", f"corpus.dataset={text}"]
    raise UserError(
        f"--corpus {text}: expected a .txt, .jsonl or .parquet file or glob, a Hugging Face dataset id, or "
        "installed-docs"
    )
