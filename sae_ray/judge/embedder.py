"""Texts to unit vectors, by an encoder of the sentence-transformers kind read with plain transformers.

The default is all-MiniLM-L6-v2, which comes with a PyPI package. It is of another family than the judges, so it is
also a held-out opinion on explanations.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from sae_ray.embedded import MINILM, resolve_model
from sae_ray.errors import UserError

_KEY = "judging.embedder"
_BATCH = 32
# What sentence-transformers models are trained on, where their folder does not say how much.
_USUAL_TOKENS = 256


class MiniLM:
    """An embedding model in this process. Tokens past the longest input that it was trained on are cut off.

    Args:
        name: `all-minilm-l6-v2`, a folder, or a Hugging Face id.
        device: None takes CUDA if there is one.
        batch: texts per forward pass.
        key: the config key that holds `name`, for errors.
    Raises:
        UserError: there is no such model, it has no safetensors, or it pools in a way that is not known here.
    """

    def __init__(
        self, name: str = MINILM, device: str | torch.device | None = None, batch: int = _BATCH, key: str = _KEY
    ) -> None:
        self._batch = batch
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._lock = threading.Lock()
        folder = resolve_model(name, key)
        progress = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model, info = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{key} = {name}: cannot be loaded: {' '.join(str(error).split())}") from error
        finally:
            if progress:
                hf_logging.enable_progress_bar()
        # Some checkpoints have no pooler head; it is not read here.
        if missing := sorted(each for each in info["missing_keys"] if not each.startswith("pooler.")):
            raise UserError(f"{key} = {name}: the checkpoint lacks {missing[0]} ({len(missing)} in all)")
        self._model: Any = model.to(self._device).eval()
        self._pool_first = _pools_first_token(folder, f"{key} = {name}")
        limits = (
            _json(folder, "sentence_bert_config.json").get("max_seq_length") or _USUAL_TOKENS,
            self._tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", _USUAL_TOKENS),
        )
        self.max_tokens = int(min(limits))
        self.width = int(model.config.hidden_size)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d], float32, in order. The event loop goes on meanwhile."""
        return await asyncio.to_thread(self.embed_now, texts)

    @torch.inference_mode()
    def embed_now(self, texts: Sequence[str]) -> np.ndarray:
        """`embed`, in this thread."""
        out_ND = np.zeros((len(texts), self.width), dtype=np.float32)
        # Texts of a length share a batch: padding costs as much as text does.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            with self._lock:  # the fast tokenizer's truncation is state
                encoded = self._tokenizer(
                    [texts[i] for i in rows],
                    padding=True,
                    truncation=True,
                    max_length=self.max_tokens,
                    return_tensors="pt",
                ).to(self._device)
                hidden_BLD = self._model(**encoded).last_hidden_state
            out_ND[rows] = self._pooled(hidden_BLD, encoded["attention_mask"]).cpu().numpy()
        return out_ND

    def _pooled(self, hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        if self._pool_first:
            vector_BD = hidden_BLD[:, 0]
        else:
            mask_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD)
            vector_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        return torch.nn.functional.normalize(vector_BD, dim=-1)


class EmbedderActor:
    """What `ray.remote` wraps. Nothing is loaded before `ready`: an error in a constructor is only a dead actor."""

    def __init__(self, name: str = MINILM, threads: int = 1) -> None:
        self._name, self._threads = name, threads
        self._model: MiniLM | None = None
        self._loading = threading.Lock()

    def ready(self) -> dict[str, Any]:
        """Load the model. Returns its width and longest input, tokens.

        Raises:
            UserError: as `MiniLM`.
        """
        model = self._loaded()
        return {"width": model.width, "max_tokens": model.max_tokens}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d], float32."""
        return self._loaded().embed_now(texts)

    def _loaded(self) -> MiniLM:
        with self._loading:  # an actor may run several calls at once
            if self._model is None:
                torch.set_num_threads(self._threads)
                self._model = MiniLM(self._name)
            return self._model


class RemoteEmbedder:
    """The `scorers.base.Embedder` that asks an `EmbedderActor`. actor: its Ray handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        return await self._actor.embed.remote(list(texts))


def _pools_first_token(folder: str, where: str) -> bool:
    """Whether the sentence is the first token's vector, instead of the mean over all."""
    pooling = {
        name.removeprefix("pooling_mode_")
        for name, on in _json(folder, "1_Pooling/config.json").items()
        if name.startswith("pooling_mode_") and on
    }
    if not pooling <= {"mean_tokens", "cls_token"} or len(pooling) > 1:
        raise UserError(f"{where}: pools by {' and '.join(sorted(pooling))}; mean_tokens or cls_token is needed")
    return pooling == {"cls_token"}


def _json(folder: str, file: str) -> dict[str, Any]:
    """A settings file of a model folder or Hugging Face id; empty where it has none."""
    try:
        path = cached_file(
            folder, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except OSError:
        return {}
    if path is None:
        return {}
    with open(path, encoding="utf-8") as text:
        found = json.load(text)
    return found if isinstance(found, dict) else {}
