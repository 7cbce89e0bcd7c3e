"""The subject language model writes under steering: for the causality reward, on producer-like actors.

For every latent three sets of continuations of the same prompts: steered along its decoder direction, not steered
(once for all latents), and steered along a random direction. Both directions have the strength at which the next
token's distribution moves by `target_kl` nats (`reward.steering`). The random direction belongs to the latent's id and
the seed, and all sets share their random numbers, so nothing depends on which latents are asked together.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sae_ray import logs
from sae_ray.activations.hooks import HookPoint, hook_point
from sae_ray.activations.subject import check_hooks, load_full_model, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import DocumentEncoder
from sae_ray.errors import UserError
from sae_ray.reward.steering import (
    Generated,
    Positions,
    Prompts,
    Strengths,
    continuation_gradients,
    generate,
    match_kl,
    residual_norm,
)

# Strengths are looked for from a tenth of the residual stream's norm on, up to this many times the norm.
_START, _MOST = 0.1, 20.0


@dataclass(frozen=True)
class SteeringSettings:
    """target_kl: nats, of the next token, mean over the prompts. tolerance: relative. tokens: per continuation.
    samples: continuations per prompt. rows: of one forward pass, at most. gradients: also those of the log-probability
    of what is written along the latents' own directions; one more pass, and its way back."""

    target_kl: float = 0.5
    tolerance: float = 0.05
    positions: Positions = "all"
    tokens: int = 24
    samples: int = 2
    temperature: float = 1.0
    seed: int = 0
    rows: int = 64
    gradients: bool = False


@dataclass(frozen=True)
class Continuations:
    """Of one direction: texts [prompts][samples], without the prompt; per token its log-probability as sampled and
    without steering, float32 [prompts][samples][tokens]. strength: length of what was added; kl: what that did to the
    next token, nats (0 both without steering). gradients: float32 [prompts, samples, D], of each continuation's
    log-probability by the unit direction at that strength; None: not asked for."""

    texts: list[list[str]]
    logprobs: list[list[np.ndarray]]
    clean_logprobs: list[list[np.ndarray]]
    strength: float
    kl: float
    gradients: np.ndarray | None = None

    @property
    def drift(self) -> float:
        """Mean over all tokens of log p(steered) - log p(clean), nats: the KL per token along the texts, estimated."""
        terms = [
            own - clean
            for owns, cleans in zip(self.logprobs, self.clean_logprobs, strict=True)
            for own, clean in zip(owns, cleans, strict=True)
        ]
        return float(np.concatenate(terms).mean())


@dataclass(frozen=True)
class SteeredLatent:
    """None: no strength of that direction reached the target. Missing, not 0."""

    latent: int
    steered: Continuations | None
    random: Continuations | None

    def texts(self, unsteered: Continuations) -> dict[str, list[list[str]] | None]:
        """As `causality.questions` and `causality.judged_steering` want them."""
        return {
            "steered": None if self.steered is None else self.steered.texts,
            "unsteered": unsteered.texts,
            "random": None if self.random is None else self.random.texts,
        }


@dataclass(frozen=True)
class SteeringResult:
    latents: list[SteeredLatent]
    unsteered: Continuations
    cpu_s: float


class SteeringModel:
    """Works in any process; `ray.remote` wraps it elsewhere. Nothing is loaded before it is asked for or `ready`.

    Args:
        config_json: the run's config: model, hook, first positions that are masked.
        device: None takes CUDA if there is one.
        threads: of torch, in this whole process; None leaves them alone.
    """

    def __init__(self, config_json: str, device: str | None = None, threads: int | None = None) -> None:
        self._cfg = RunConfig.model_validate_json(config_json)
        logs.start_actor(self._cfg, "steering")
        self._device, self._threads = device, threads
        self._lock = threading.Lock()
        self._model: Any = None
        self._point: HookPoint | None = None

    def ready(self) -> dict[str, Any]:
        """Load the model. Returns the width of the hook point that is steered, and the dtype.

        Raises:
            UserError: what is wrong with the model or the hook.
        """
        with self._lock:
            self._load()
            return {"width": self._width, "dtype": str(self._model.dtype).removeprefix("torch.")}

    async def steer(
        self,
        latents: Sequence[int],
        W_dec_ND: np.ndarray,
        prompts: Sequence[str],
        settings: SteeringSettings | None = None,
    ) -> SteeringResult:
        """Continuations of every prompt, for every latent; W_dec_ND holds their decoder rows.

        Raises:
            UserError: another width than the hook point's, or no prompts.
        """
        return await asyncio.to_thread(
            self._steer, list(latents), np.asarray(W_dec_ND), list(prompts), settings or SteeringSettings()
        )

    def _steer(
        self, latents: list[int], W_dec_ND: np.ndarray, texts: list[str], settings: SteeringSettings
    ) -> SteeringResult:
        with self._lock:
            self._load()
            began = time.process_time()
            if W_dec_ND.shape != (len(latents), self._width):
                raise UserError(
                    f"decoder rows of shape {W_dec_ND.shape} for {len(latents)} latents; the hook point "
                    f"{self._hook.name} of {self._cfg.model.name} has width {self._width}"
                )
            if not texts:
                raise UserError("steering needs at least one prompt to continue")
            prompts = self._prompts(texts)
            own_ND = torch.from_numpy(np.ascontiguousarray(W_dec_ND, dtype=np.float32))
            random_ND = (
                torch.stack([_random_direction(settings.seed, latent, self._width) for latent in latents])
                if latents
                else own_ND
            )
            unit_ND = torch.nn.functional.normalize(torch.cat([own_ND, random_ND]), dim=1).to(self._model.device)
            unit = residual_norm(self._model, self._steered_point, prompts)
            found = match_kl(
                self._model, self._steered_point, unit_ND, prompts, settings.target_kl,
                start=_START * unit, most=_MOST * unit,
                positions=settings.positions, tolerance=settings.tolerance, rows=settings.rows,
            )  # fmt: skip
            # The row behind all directions is no steering at all.
            n = len(latents)
            written = self._write(unit_ND, found, prompts, settings, n if settings.gradients else 0)
            return SteeringResult(
                [SteeredLatent(int(latent), written.get(i), written.get(n + i)) for i, latent in enumerate(latents)],
                written[2 * n],
                time.process_time() - began,
            )

    def _write(
        self, unit_ND: torch.Tensor, found: Strengths, prompts: Prompts, settings: SteeringSettings, derived: int
    ) -> dict[int, Continuations]:
        """By direction (absent: no strength), and unsteered behind the last one; the first `derived` with gradients."""
        uniform_PST = np.stack(
            [
                np.random.default_rng([settings.seed, 21, prompt]).random((settings.samples, settings.tokens))
                for prompt in range(len(prompts))
            ]
        )
        per_direction = len(prompts) * settings.samples
        prompt_C = torch.arange(len(prompts)).repeat_interleave(settings.samples)
        uniform_CT = torch.from_numpy(uniform_PST).reshape(per_direction, settings.tokens)
        n = len(unit_ND)
        chosen = [i for i in range(n) if torch.isfinite(found.alpha_N[i])]
        out: dict[int, Continuations] = {}
        clean = self._generate(prompts, prompt_C, uniform_CT, None, settings)
        out[n] = self._continuations(clean, len(prompts), settings.samples, 0.0, 0.0)
        at_once = max(1, settings.rows // per_direction)
        for first in range(0, len(chosen), at_once):
            some = chosen[first : first + at_once]
            push_ND = unit_ND[some] * found.alpha_N[some, None].to(unit_ND)
            generated = self._generate(
                prompts, prompt_C.repeat(len(some)), uniform_CT.repeat(len(some), 1),
                push_ND.repeat_interleave(per_direction, dim=0), settings,
            )  # fmt: skip
            for place, i in enumerate(some):
                rows = slice(place * per_direction, (place + 1) * per_direction)
                part = Generated(
                    generated.tokens_RT[rows], generated.logprob_RT[rows], generated.clean_logprob_RT[rows]
                )
                alpha = float(found.alpha_N[i])
                written = self._continuations(part, len(prompts), settings.samples, alpha, float(found.kl_N[i]))
                if i < derived:
                    of_each = prompts.take(prompt_C.to(prompts.ids_RL.device))
                    written = replace(written, gradients=self._gradients(of_each, unit_ND[i], alpha, part, settings))
                out[i] = written
        return out

    def _gradients(
        self, prompts: Prompts, unit_D: torch.Tensor, alpha: float, written: Generated, settings: SteeringSettings
    ) -> np.ndarray:
        """[prompts, samples, D]; `prompts` are those of each continuation."""
        slope_CD = continuation_gradients(
            self._model, self._steered_point, prompts, (alpha * unit_D).expand(len(prompts), -1), written.tokens_RT,
            settings.positions, settings.temperature,
        )  # fmt: skip
        return (alpha * slope_CD).reshape(-1, settings.samples, len(unit_D)).cpu().numpy()

    def _generate(
        self,
        prompts: Prompts,
        prompt_R: torch.Tensor,
        uniform_RT: torch.Tensor,
        push_RD: torch.Tensor | None,
        settings: SteeringSettings,
    ) -> Generated:
        """In passes of at most `rows` rows."""
        parts = [
            generate(
                self._model, prompts.take(prompt_R[some].to(prompts.ids_RL.device)), uniform_RT[some],
                self._steered_point, None if push_RD is None else push_RD[some.to(push_RD.device)],
                settings.positions, settings.temperature,
            )
            for some in torch.arange(len(prompt_R)).split(settings.rows)
        ]  # fmt: skip
        return Generated(
            torch.cat([part.tokens_RT for part in parts]),
            torch.cat([part.logprob_RT for part in parts]),
            torch.cat([part.clean_logprob_RT for part in parts]),
        )

    def _continuations(
        self, generated: Generated, n_prompts: int, samples: int, strength: float, kl: float
    ) -> Continuations:
        texts: list[list[str]] = [[] for _ in range(n_prompts)]
        own: list[list[np.ndarray]] = [[] for _ in range(n_prompts)]
        clean: list[list[np.ndarray]] = [[] for _ in range(n_prompts)]
        for row, tokens_T in enumerate(generated.tokens_RT.cpu()):
            there_T = tokens_T >= 0
            place = row // samples
            texts[place].append(self._tokenizer.decode(tokens_T[there_T].tolist(), skip_special_tokens=True))
            own[place].append(generated.logprob_RT[row].cpu()[there_T].numpy())
            clean[place].append(generated.clean_logprob_RT[row].cpu()[there_T].numpy())
        return Continuations(texts, own, clean, strength, kl)

    def _prompts(self, texts: list[str]) -> Prompts:
        """Behind the BOS, or else what separates documents: so a prompt is never empty."""
        opening = self._encoder.bos if self._encoder.bos is not None else self._encoder.separator
        ids = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        rows = [([] if opening is None else [opening]) + list(own) for own in ids]
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise UserError(f"steering prompt {empty[0]!r} has no tokens")
        return Prompts.of(rows, self._cfg.activations.mask_first_tokens).to(self._model.device)

    @property
    def _hook(self) -> Any:
        """Where the decoder writes."""
        return self._cfg.hook_out or self._cfg.hook

    @property
    def _steered_point(self) -> HookPoint:
        assert self._point is not None
        return self._point

    def _load(self) -> None:
        if self._model is not None:
            return
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        check_hooks(self._cfg.model, [self._hook])
        self._tokenizer = load_tokenizer(self._cfg.model)
        self._encoder = DocumentEncoder(self._tokenizer)
        # `auto` is float32: strengths are found on small differences between distributions.
        dtype = torch.float32 if self._cfg.model.dtype == "auto" else getattr(torch, self._cfg.model.dtype)
        model = load_full_model(self._cfg.model, dtype, self._device)
        model.requires_grad_(False)  # gradients are taken by what is added, never by weights
        self._width = int(model.config.get_text_config().hidden_size)
        self._point = hook_point(model, self._hook)
        self._model = model


class RemoteSteering:
    """`SteeringModel.steer` behind a Ray actor handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def steer(
        self,
        latents: Sequence[int],
        W_dec_ND: np.ndarray,
        prompts: Sequence[str],
        settings: SteeringSettings | None = None,
    ) -> SteeringResult:
        ids = [int(latent) for latent in latents]
        return await self._actor.steer.remote(ids, np.asarray(W_dec_ND), list(prompts), settings)


def _random_direction(seed: int, latent: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 22, int(latent)]).standard_normal(width)).float()
