"""The subject language model as an instrument: where texts make a latent fire, and how surprising texts are.

Texts are tokenised as training does it: no special tokens but the model's own BOS, masked positions count as inactive.
A model without BOS is trained on packed documents, so a text comes behind the document separator here, and its first
token is a token like any other instead of the attention sink.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_ray.activations.subject import SubjectLM, load_full_model, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import PAD, DocumentEncoder
from sae_ray.errors import UserError
from sae_ray.evidence.types import LatentSource
from sae_ray.sae.formats import import_sae
from sae_ray.sae.inference import TrainedSAE

# Tokens of one forward pass, padding included. The whole model's logits are the largest tensor: 512 x 49,152 float32
# are 100 MB for SmolLM2, and half a GB for a vocabulary of 256,000.
_ACTIVATION_TOKENS = 2048
_LOSS_TOKENS = 512


class SubjectModel:
    """A `scorers.base.Subject`. Works in any process; `ray.remote` wraps it elsewhere. Nothing is loaded before it is
    asked for, or `ready` is called: an error in a constructor would be only a dead actor.

    Args:
        config_json: the run's config: model, hook, context length, masked tokens.
        judged: an SAE (or a folder of one, in any format that is read here), or any other source of latents.
        device: None takes CUDA if there is one.
        threads: of torch, in this whole process; None leaves them alone.
    """

    def __init__(
        self,
        config_json: str,
        judged: TrainedSAE | LatentSource | str | Path,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._cfg = RunConfig.model_validate_json(config_json)
        self._judged = judged
        self._device = device
        self._threads = threads
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._short: SubjectLM | None = None
        self._whole: Any = None

    def ready(self) -> dict[str, Any]:
        """Load what `activations` needs. Returns the width of the hook point and the dtype.

        Raises:
            UserError: what is wrong with the model, the hook or the SAE.
        """
        with self._lock:
            subject = self._load_short()
            return {
                "width": subject.widths[self._cfg.hook.name],
                "dtype": str(subject.dtype).removeprefix("torch."),
            }

    async def activations(self, texts: Sequence[str], latents: Sequence[int]) -> list[np.ndarray]:
        """Per text the activations [tokens, len(latents)], float32, 0 where a token is masked; a text is cut at the
        context length. BOS and separator have no row."""
        return await asyncio.to_thread(self._activations, texts, latents)

    async def losses(self, prefixes: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean next-token loss (nats) of each text after its prefix; NaN where a text has no token to predict.

        A text has the same tokens after any prefix: they are tokenised apart. It is cut at the context length, or at
        what the model's positions leave behind the prefix.
        """
        return await asyncio.to_thread(self._losses, prefixes, texts)

    @torch.inference_mode()
    def _activations(self, texts: Sequence[str], latents: Sequence[int]) -> list[np.ndarray]:
        with self._lock:
            subject = self._load_short()
            opening = self._opening(always=self._cfg.corpus.pack)
            room = self._cfg.corpus.context_length - len(opening)
            rows = [opening + ids[:room] for ids in self._ids(texts)]
            out: list[np.ndarray] = [np.zeros((0, len(latents)), dtype=np.float32)] * len(texts)
            for some in _batches(rows, _ACTIVATION_TOKENS):
                tokens_SL = _padded([rows[i] for i in some])
                keep_SL = self._keep(tokens_SL)
                raw_SLD = subject.forward(torch.from_numpy(tokens_SL))[self._cfg.hook.name]
                acts_SLN = np.zeros((*tokens_SL.shape, len(latents)), dtype=np.float32)
                if keep_SL.any():
                    raw_TD = raw_SLD[torch.from_numpy(keep_SL).to(raw_SLD.device)].float().cpu()
                    acts_SLN[keep_SL] = self._latents(raw_TD, latents)
                for index, i in enumerate(some):
                    out[i] = acts_SLN[index, len(opening) : len(rows[i])].copy()
            return out

    def _latents(self, raw_TD: torch.Tensor, latents: Sequence[int]) -> np.ndarray:
        """[T, len(latents)] float32."""
        if isinstance(self._judged, TrainedSAE):
            # One by one, and gated by themselves: as `LatentEvidence.contexts_active` was counted.
            columns = [self._judged.encode_latent(raw_TD, int(latent)) for latent in latents]
            return torch.stack(columns, dim=1).float().numpy()
        assert not isinstance(self._judged, str | Path)
        acts_TN, _ = self._judged.activations(raw_TD)
        column_of = {int(latent): column for column, latent in enumerate(self._judged.latents)}
        return acts_TN[:, [column_of[int(latent)] for latent in latents]].float().cpu().numpy()

    @torch.inference_mode()
    def _losses(self, prefixes: Sequence[str], texts: Sequence[str]) -> list[float]:
        with self._lock:
            model = self._load_whole()
            opening = self._opening(always=True)
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            rows, lengths = [], []
            for prefix, text in zip(self._ids(prefixes), self._ids(texts), strict=True):
                before = opening + prefix
                room = self._cfg.corpus.context_length
                if positions is not None:
                    room = max(0, min(room, positions - len(before)))
                # Without an opening the first token has no prediction where there is no prefix: it never counts.
                lengths.append(len(text[:room]) - (not opening))
                rows.append(before + text[:room])
            out = [float("nan")] * len(texts)
            for some in _batches(rows, _LOSS_TOKENS):
                some = [i for i in some if lengths[i] > 0]
                if not some:
                    continue
                # Padding is on the right, where causal attention keeps it from all real positions.
                tokens_SL = torch.from_numpy(_padded([rows[i] for i in some])).long().to(model.device)
                logits_SLV = model(input_ids=tokens_SL.clamp(min=0), use_cache=False).logits
                for index, i in enumerate(some):
                    last = len(rows[i])
                    first = last - lengths[i]
                    out[i] = float(
                        torch.nn.functional.cross_entropy(
                            logits_SLV[index, first - 1 : last - 1].float(), tokens_SL[index, first:last]
                        )
                    )
            return out

    def _load_short(self) -> SubjectLM:
        if self._short is None:
            self._prepare()
            if isinstance(self._judged, str | Path):
                self._judged = import_sae(self._judged)
            if isinstance(self._judged, TrainedSAE):
                self._judged = self._judged.to("cpu")
            subject = SubjectLM(self._cfg.model, [self._cfg.hook], self._device)
            width = subject.widths[self._cfg.hook.name]
            if isinstance(self._judged, TrainedSAE) and self._judged.d_in != width:
                raise UserError(
                    f"the SAE reads {self._judged.d_in} numbers, {self._cfg.hook.name} of {self._cfg.model.name} "
                    f"gives {width}; name the hook point that it was trained on"
                )
            self._short = subject
        return self._short

    def _load_whole(self) -> Any:
        if self._whole is None:
            self._prepare()
            # `auto` is float32 here: in bfloat16, rounding would be a visible part of a small difference of losses.
            dtype = torch.float32 if self._cfg.model.dtype == "auto" else getattr(torch, self._cfg.model.dtype)
            self._whole = load_full_model(self._cfg.model, dtype, self._device)
        return self._whole

    def _prepare(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._cfg.model)
            self._encoder = DocumentEncoder(self._tokenizer)
            masked = self._encoder.special_ids if self._cfg.activations.mask_special_tokens else set()
            self._masked_ids = np.array(sorted(masked), dtype=np.int32)

    def _opening(self, always: bool) -> list[int]:
        """What stands before a text: BOS, or else (`always`) what separates documents."""
        token = self._encoder.bos
        if token is None and always:
            token = self._encoder.separator
        return [] if token is None else [token]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Without special tokens: a text that quotes one does not get it."""
        if not texts:
            return []
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def _keep(self, tokens_SL: np.ndarray) -> np.ndarray:
        keep_SL = (tokens_SL != PAD) & ~np.isin(tokens_SL, self._masked_ids)
        keep_SL[:, : self._cfg.activations.mask_first_tokens] = False
        return keep_SL


class RemoteSubject:
    """The `scorers.base.Subject` that asks a `SubjectModel` behind a Ray actor handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def activations(self, texts: Sequence[str], latents: Sequence[int]) -> list[np.ndarray]:
        return await self._actor.activations.remote(list(texts), [int(latent) for latent in latents])

    async def losses(self, prefixes: Sequence[str], texts: Sequence[str]) -> list[float]:
        return await self._actor.losses.remote(list(prefixes), list(texts))


def _batches(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, in batches of at most `tokens` tokens with padding (or of one row)."""
    batch: list[int] = []
    for i in sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [S, L], padding on the right."""
    tokens_SL = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int32)
    for index, row in enumerate(rows):
        tokens_SL[index, : len(row)] = row
    return tokens_SL
