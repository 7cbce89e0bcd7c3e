"""The parts of a latent's reward as a judged round measures them, and their sum: one advantage per latent.

| part             | what is measured, higher is better                                   | needs                      |
|------------------|----------------------------------------------------------------------|----------------------------|
| interpretability | detection AUROC minus the shuffled explanation's                     | the round's verdicts       |
| description      | minus the bits that describe the latent, at equal score              | prior readings             |
| atomicity        | minus the share of the decoder row that shared atoms compose         | the whole decoder          |
| splitting        | minus (duplicate + split + shared explanation)                       | the same, maybe a scan     |
| causality        | steered text shows the explanation, beyond both controls             | a steered language model   |
| logit_effect     | AUROC of the row's logits for the tokens that follow, minus its null | the unembedding            |

Only parts with a weight are measured, and with interpretability alone none of this is used: credit then follows the
verdicts as they are. The advantage is handed on in units of `clip` standard deviations, for estimators expect rewards
between -1 and 1.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from ray.exceptions import RayActorError, RayTaskError

from sae_ray.activations.subject import load_full_model, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.evidence.logit_lens import Unembedding, output_logits
from sae_ray.reward.atomicity import compositions, fit_atoms
from sae_ray.reward.causality import causality_rewards, judged_steering, questions, steered_rollouts
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.credit import ESTIMATORS, Rollouts
from sae_ray.reward.decoder import COSINE_LIMIT, DecoderFacts
from sae_ray.reward.description import Description, at_equal_score, description_length
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.logit_effect import logit_effects, tokens_after
from sae_ray.reward.overlap import overlap_penalties, shared_explanations
from sae_ray.reward.rounds import Choice
from sae_ray.reward.steering_actor import RemoteSteering, SteeringSettings
from sae_ray.reward.weights import Combined, RewardCombiner

OF_WHOLE_DECODER = frozenset({"atomicity", "splitting"})
OF_ROWS = OF_WHOLE_DECODER | {"causality", "logit_effect"}

Values = dict[int, float]


class PartsJudge(Protocol):
    """What parts need of the judge; `PoolJudge` is one."""

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]: ...

    async def priors(self, explanations: list[str]) -> list[float | None]: ...

    def probability(self, explanation: str, raw: float) -> float: ...


@dataclass(frozen=True)
class Outcome:
    """A judged round. rewards: of the latents whose detection could be measured; choices: at least theirs. decoder:
    None where no needed part reads it."""

    scan: ContextScan
    texts: ContextTexts
    choices: Sequence[Choice]
    rewards: Sequence[LatentReward]
    decoder: DecoderFacts | None = None


class RewardParts:
    """Measures what has a weight. Use it inside one event loop.

    Args:
        steering: actor handle of a `SteeringModel`, where causality has a weight.
    Attributes:
        rollouts: the steered texts of the round combined last, where the run's estimator learns from such.
    """

    def __init__(self, config: RunConfig, judge: PartsJudge, steering: Any = None) -> None:
        self._config, self._judge, self._steering = config, judge, steering
        self._settings = config.rlaif.rewards
        self._unembedding: Unembedding | None = None
        self._with_rollouts = ESTIMATORS[config.rlaif.estimator].uses_rollouts
        self.rollouts: Rollouts | None = None
        weights = self._settings.weights
        # With interpretability alone no part is needed, its own included: nothing is standardised.
        self.needed = frozenset(part for part, weight in weights.model_dump().items() if weight and weights.combined)

    async def prepare(self) -> None:
        """Loads what needed parts compute with.

        Raises:
            UserError: the language model cannot be loaded or steered, or has no unembedding that is known.
        """
        if self.needed & OF_ROWS or self._config.rlaif.alarms.duplicates:
            torch.set_num_threads(self._settings.threads)
        if "causality" in self.needed:
            await _asked(self._steering.ready.remote())
        if "logit_effect" in self.needed:
            self._unembedding = await asyncio.to_thread(_unembedding, self._config)

    async def combine(self, outcome: Outcome, state: Mapping[str, Any]) -> tuple[Combined, dict[str, Any]]:
        """Measures the needed parts of a round.

        Args:
            state: baselines and scales as the round before left them; empty before the first.
        Returns:
            The advantages, and the state that this round leaves.
        """
        settings = self._settings
        combiner = RewardCombiner(settings.weights.model_dump(), settings.memory, settings.clip, settings.min_coverage)
        combiner.load_state(state)
        measure: dict[str, Callable[[Outcome], Awaitable[Values]]] = {
            "interpretability": self._interpretability,
            "description": self._description,
            "atomicity": self._atomicity,
            "splitting": self._splitting,
            "causality": self._causality,
            "logit_effect": self._logit_effect,
        }
        self.rollouts = None
        # One after the other: they share a judge and a few threads.
        found = {part: await measure[part](outcome) for part in combiner.needed}
        return combiner.combine(found), combiner.state_dict()

    def rewards_of(self, combined: Combined, latents: np.ndarray) -> np.ndarray:
        """float32 [N] of these latents, as `RewardBatch.reward`; NaN is missing."""
        unit = self._settings.clip * math.hypot(*self._settings.weights.model_dump().values())
        return combined.rewards_of(latents, unit)

    # -- the parts ------------------------------------------------------------------------------------

    async def _interpretability(self, outcome: Outcome) -> Values:
        return {reward.latent: reward.interpretability for reward in outcome.rewards}

    async def _description(self, outcome: Outcome) -> Values:
        rewarded = {reward.latent for reward in outcome.rewards}
        choices = [choice for choice in outcome.choices if choice.plan.latent in rewarded]
        texts = list(dict.fromkeys(each.text for choice in choices for each in choice.offered))
        prior = dict(zip(texts, await self._judge.priors(texts), strict=True))
        read = any(value is not None for value in prior.values())
        found: dict[int, Description] = {}
        for choice in choices:
            described = description_length(
                [each.text for each in choice.offered],
                [math.nan if fit is None else fit.f1 for fit in choice.fits],
                [math.nan if fit is None else fit.f1_error for fit in choice.fits],
                choice.offered.index(choice.explanation),
                [prior[each.text] for each in choice.offered],
            )
            # Words beside other latents' bits would be another measure: a latent with a lost reading is missing.
            if described is not None and (described.unit == "bits") == read:
                found[choice.plan.latent] = described
        lengths = at_equal_score(list(found.values())).tolist()
        return {latent: -length for latent, length in zip(found, lengths, strict=True)}

    async def _atomicity(self, outcome: Outcome) -> Values:
        facts, settings = _decoder(outcome), self._settings.atomicity
        assert facts.whole_MO is not None

        def composed(whole_MO: torch.Tensor) -> list[float]:
            meta = fit_atoms(whole_MO, settings.atoms, settings.per_code, settings.rounds, seed=self._config.seed)
            return compositions(facts.rows_NO, meta, seed=self._config.seed).composed.tolist()

        values = await asyncio.to_thread(composed, facts.whole_MO)
        return _of(outcome, facts.latents, [-value for value in values])

    async def _splitting(self, outcome: Outcome) -> Values:
        facts = _decoder(outcome)
        assert facts.near is not None
        overlap = overlap_penalties(facts.near, COSINE_LIMIT)
        shared = shared_explanations({reward.latent: reward.explanation for reward in outcome.rewards})
        own = _of(outcome, facts.latents, (-(overlap.duplicate + overlap.split)).tolist())
        return {latent: value - shared[latent] for latent, value in own.items()}

    async def _causality(self, outcome: Outcome) -> Values:
        facts, settings = _decoder(outcome), self._settings.causality
        row_of = {int(latent): row for row, latent in enumerate(facts.latents)}
        explanation = {reward.latent: reward.explanation for reward in outcome.rewards}
        latents = sorted(explanation)
        steered = await _asked(
            RemoteSteering(self._steering).steer(
                latents,
                facts.rows_NO[[row_of[latent] for latent in latents]].numpy(),
                prompts(outcome.texts, settings.prompts, settings.prompt_tokens, self._config.seed),
                SteeringSettings(
                    settings.target_kl, settings.tolerance, settings.positions, settings.tokens, settings.samples,
                    settings.temperature, self._config.seed, settings.rows, self._with_rollouts,
                ),
            )
        )  # fmt: skip
        texts = {one.latent: one.texts(steered.unsteered) for one in steered.latents}
        asked = list(
            dict.fromkeys(pair for latent in latents for pair in questions(explanation[latent], texts[latent]))
        )
        raw = dict(zip(asked, await self._judge.score(asked), strict=True))
        known = {
            pair: None if value is None else self._judge.probability(pair[1], value) for pair, value in raw.items()
        }
        judged = [judged_steering(latent, explanation[latent], texts[latent], known) for latent in latents]
        found = causality_rewards(judged)
        if self._with_rollouts:
            written = {
                one.latent: (one.steered.strength, one.steered.gradients)
                for one in steered.latents
                if one.steered is not None and one.steered.gradients is not None
            }
            self.rollouts = steered_rollouts(judged, found, written)
        return {latent: one.reward for latent, one in found.items()}

    async def _logit_effect(self, outcome: Outcome) -> Values:
        facts, scan, texts = _decoder(outcome), outcome.scan, outcome.texts
        assert self._unembedding is not None
        following = [
            [_after_peak(texts, context, int(scan.token_CN[context, column])) for context in np.flatnonzero(act_C > 0)]
            for column, act_C in enumerate(scan.act_CN.T)
        ]
        effects = await asyncio.to_thread(
            logit_effects, facts.rows_NO, self._unembedding, following, facts.latents.tolist(), self._config.seed
        )
        return _of(outcome, facts.latents, [one.score for one in effects])


def prompts(texts: ContextTexts, n: int, tokens: int, seed: int) -> list[str]:
    """Beginnings of n contexts that are that long, the same in every round."""
    order = np.random.default_rng([seed, 23]).permutation(texts.n_contexts)
    long_enough = (context for context in order if (texts.tokens(int(context)) >= 0).sum() > tokens)
    found = [texts.opening(int(context), tokens) for context, _ in zip(long_enough, range(n), strict=False)]
    if len(found) < n:
        raise UserError(
            f"rlaif.rewards.causality.prompts = {n}: only {len(found)} evidence contexts are longer than "
            f"prompt_tokens = {tokens}; more evidence_blocks or fewer prompt_tokens would give more"
        )
    return found


def _after_peak(texts: ContextTexts, context: int, token: int) -> np.ndarray:
    """The token behind the one on which a latent is strongest; empty at a context's end."""
    tokens_S = texts.tokens(context)
    act_S = np.zeros(len(tokens_S))
    act_S[texts.offset_of(token)] = 1
    return tokens_after(tokens_S, act_S)


def _of(outcome: Outcome, latents: np.ndarray, values: Sequence[float]) -> Values:
    """The values of the rewarded latents among `latents`."""
    by_latent = dict(zip(latents.tolist(), values, strict=True))
    return {reward.latent: by_latent[reward.latent] for reward in outcome.rewards}


def _decoder(outcome: Outcome) -> DecoderFacts:
    if outcome.decoder is None:
        raise RuntimeError("a part reads the decoder, and nobody asked the ranks for it")
    return outcome.decoder


def _unembedding(config: RunConfig) -> Unembedding:
    return output_logits(load_full_model(config.model, torch.float32, "cpu"), load_tokenizer(config.model))


async def _asked(answer: Awaitable[Any]) -> Any:
    """The steering actor's answer; its troubles are no trainer rank's."""
    try:
        return await answer
    except RayActorError as error:
        raise UserError(f"rlaif.rewards.causality: the steered language model ended: {_first_line(error)}") from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
