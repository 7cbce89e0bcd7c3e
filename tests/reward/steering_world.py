"""A steered language model as its actor's handle shows it, on the world of `round_world`."""

from __future__ import annotations

from typing import Any

import numpy as np
from round_world import WIDTH, Remote

from sae_ray.reward.steering_actor import Continuations, SteeredLatent, SteeringResult


class Steering:
    """Latents below 10 write their own word under steering; 20 cannot be steered. The gradient of a text, where one is
    asked for, is the latent's number, the prompt's, the sample's, and ones."""

    def __init__(self) -> None:
        self.ready = Remote(lambda: {"width": WIDTH})
        self.steer = Remote(self._steer)
        self.asked: tuple[Any, ...] = ()

    def _steer(self, latents: list[int], W: np.ndarray, texts: list[str], settings: Any) -> SteeringResult:
        self.asked = (latents, W, texts, settings)

        def written(word: str, latent: int | None = None) -> Continuations:
            rows = [[f"{word} {prompt} {sample}" for sample in range(settings.samples)] for prompt in texts]
            gradients = None
            if settings.gradients and latent is not None:
                gradients = np.ones((len(texts), settings.samples, WIDTH), dtype=np.float32)
                gradients[..., 0] = latent
                gradients[..., 1] = np.arange(len(texts))[:, None]
                gradients[..., 2] = np.arange(settings.samples)
            return Continuations(rows, [], [], 1.0 if latent is None else 1.0 + latent, 0.5, gradients)

        steered = [
            SteeredLatent(n, None if n == 20 else written(f"w{n}" if n < 10 else "nothing", n), written("random"))
            for n in latents
        ]
        return SteeringResult(steered, written("plain"), 0.0)
