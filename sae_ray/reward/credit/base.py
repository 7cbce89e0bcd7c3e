"""What every credit estimator is given and may give back.

An estimator is fitted once per round (`fit`), on each rank, to the judged latents of that rank's shard. It works
by one or more of

    loss(x, params, threshold)     a scalar added to the step's loss; its gradient reaches W_enc and b_enc (and W_dec
                                   where `of_decoder`). Each dp rank gives the mean over its own tokens, and the
                                   trainer averages with the ranks' shares of the batch: the result is the global
                                   batch's loss, so anything that is divided by a number of tokens must be divided by
                                   `params.tokens(x)`, the global one.
    rows(params)                   int64 [n], the only places on the shard where that gradient is not 0, the same on all
                                   dp ranks and each once: they are all that is exchanged. None: any.
    deltas(params, threshold)      changes of W_enc rows and b_enc that the trainer applies once, right after an
                                   optimiser step. The estimator itself remembers (in its state) what it has given.
    selection(params)              [m], a latent's discount when latents are selected, in units of the threshold: an
                                   architecture that ranks latents (topk, batchtopk, matryoshka) selects by
                                   `pre + selection * threshold` and keeps `pre` as the value; one that prices active
                                   latents (jumprelu) multiplies the price by `max(0, 1 - selection)`. Training only:
                                   inference knows nothing of it.

What an estimator does not override costs a step one Python call. Nothing communicates: what needs numbers of other
shards' latents (a mean reward, a sum of firing rates) takes them from `RewardBatch.whole`, which every rank has, so
that results do not depend on tp. For the same reason random draws are per latent, never per shard.

A checkpoint keeps `state_dict()`; its names follow `trainer.credit_state`.

Suffixes: N judged local latents, V verdict rows, R rollouts, T evidence tokens, C contexts, S tokens of a context, B
batch tokens, D d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from sae_ray.reward.evidence import ContextLayout
    from sae_ray.trainer.sharded_sae import CreditParams

State = dict[str, torch.Tensor]
Self = TypeVar("Self", bound="CreditEstimator")


@dataclass(frozen=True)
class Rollouts:
    """Generations of the language model steered along decoder directions, each with a reward.

    A rollout of latent j steers with the unit vector along `d_j + sigma * u`, d_j the latent's unit decoder row when
    it was judged and u drawn uniformly from the unit sphere, at a strength that is matched in KL between rollouts. With
    gradients of log-probabilities directions need not be perturbed: then sigma is 0.
    """

    latent: np.ndarray  # int64 [R]: global latent id
    perturbation: np.ndarray | None  # float32 [R, D]: u, in the SAE's scaled input space; None: not perturbed
    strength: np.ndarray  # float32 [R]: multiple of the unit direction that was added; for the log
    reward: np.ndarray  # float32 [R]: how far the generation shows the explanation; NaN where there is none
    sigma: float
    # float32 [R, D]: gradient of the generation's log-probability by the unit direction, at that strength. The input
    # scale is one number, so a unit direction is the same in the SAE's space and in the model's. None: from the
    # perturbation.
    log_prob_grad: np.ndarray | None = None

    def of_latents(self, latents: np.ndarray) -> Rollouts:
        keep = np.isin(self.latent, latents)
        noise, grad = (None if each is None else each[keep] for each in (self.perturbation, self.log_prob_grad))
        return Rollouts(self.latent[keep], noise, self.strength[keep], self.reward[keep], self.sigma, grad)


@dataclass(frozen=True)
class RewardBatch:
    """What the desk sends to every rank after a round: metadata and numbers, no activations."""

    round: int
    sae_step: int
    latents: np.ndarray  # int64 [N], ascending
    credit_weight: np.ndarray  # float32 [N]: trust in each latent's explanation, over the number of trusted latents
    row_latent: np.ndarray  # int64 [V]: global latent id
    row_context: np.ndarray  # int64 [V]: evidence context
    row_verdict: np.ndarray  # float32 [V]: 1 where the judge held that the explanation is true of the text, else 0
    row_active: np.ndarray  # bool [V]: whether the latent was active
    row_weight: np.ndarray  # float32 [V]: inverse sampling propensity
    row_token: np.ndarray  # int64 [V]: kept-token index of the latent's largest pre-activation
    false_positive_rate: float
    false_negative_rate: float
    reward: np.ndarray | None = None  # float32 [N]: of whatever is rewarded, higher is better; None: from the verdicts
    # float32 [V]: largest pre-activation minus threshold; None: computed on the shard, for its own latents only
    row_margin: np.ndarray | None = None
    rollouts: Rollouts | None = None
    whole: RewardBatch | None = None  # what `for_shard` was taken from; None: this is the whole
    # float16 [N, D]: unit encoder rows at the scan, which is what was judged; None: taken to be those at the fit
    judged_ND: np.ndarray | None = None
    # The same of the decoder, for an estimator that says `of_decoder`.
    judged_decoder_ND: np.ndarray | None = None
    gamma_factor: float = 1.0  # of `reward.alarms`: what all of the round's credit is multiplied by

    def for_shard(self, first: int, last: int) -> RewardBatch:
        """The part that concerns latents first..last-1 and that any gradient would come from."""
        keep = (self.latents >= first) & (self.latents < last) & (self.credit_weight > 0)
        own = self.latents[keep]
        rows = np.isin(self.row_latent, own)
        return replace(
            self,
            latents=own,
            credit_weight=self.credit_weight[keep],
            row_latent=self.row_latent[rows],
            row_context=self.row_context[rows],
            row_verdict=self.row_verdict[rows],
            row_active=self.row_active[rows],
            row_weight=self.row_weight[rows],
            row_token=self.row_token[rows],
            reward=None if self.reward is None else self.reward[keep],
            row_margin=None if self.row_margin is None else self.row_margin[rows],
            rollouts=None if self.rollouts is None else self.rollouts.of_latents(own),
            judged_ND=None if self.judged_ND is None else self.judged_ND[keep],
            judged_decoder_ND=None if self.judged_decoder_ND is None else self.judged_decoder_ND[keep],
            whole=self.whole or self,
        )

    def judged_at(
        self, latents: np.ndarray, encoder_ND: np.ndarray, decoder_ND: np.ndarray | None = None
    ) -> RewardBatch:
        """With the unit rows that were judged, of `latents` (ascending), all of the batch's among them."""
        place = np.searchsorted(latents, self.latents)
        decoder_ND = None if decoder_ND is None else decoder_ND[place]
        return replace(self, judged_ND=encoder_ND[place], judged_decoder_ND=decoder_ND)

    def trusted(self) -> RewardBatch:
        """All trusted latents of the round, whichever shard holds them."""
        return (self.whole or self).for_shard(0, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class LatentState:
    """The judged latents of this rank (rows as in `RewardBatch.latents`), as they are when rewards arrive."""

    W_enc_ND: torch.Tensor
    b_enc_N: torch.Tensor
    b_dec_D: torch.Tensor  # what the encoder subtracts: zeros where that is nothing
    # The unit of gate logits, 0-dim or [N]: the gate's threshold as it is now, or what `gates.gate_units` puts in the
    # place of one that is 0. None: the threshold as it is at each step.
    threshold: torch.Tensor | None = None
    W_dec_ND: torch.Tensor | None = None  # None in a transcoder: credit has no term of its decoder


@dataclass(frozen=True)
class CreditSettings:
    gamma: float
    slope: float
    shrink: float | None  # share of the own direction in a teacher's; None: chosen for each latent by its verdicts
    half_life_steps: float
    max_turn: float = math.pi / 2  # radians that credit may turn a row in a round, with unlimited evidence
    bonus: float = 0.1  # of `selection_bonus`: thresholds that an advantage of 1 is worth
    factor: float = 1.0  # of everything that a round's credit does (`RewardBatch.gamma_factor`)
    fitted_gates: bool = False  # gates are pulled to either side of the threshold at the fit, not of the moment
    rollout_gamma: float | None = None  # of `policy_gradient`, wherever it is part of; None: gamma


class Deltas(NamedTuple):
    """Changes to add to some of the shard's latents."""

    rows_n: torch.Tensor  # int64: which, as places on the shard
    W_enc_nD: torch.Tensor | None
    b_enc_n: torch.Tensor | None


class CreditEstimator:
    """An estimator that gives nothing; see the module for what may be overridden."""

    of_decoder: ClassVar[bool] = False  # whether the loss also has a gradient by W_dec: `params.W_dec_mO` is given
    uses_reward: ClassVar[bool] = False  # whether `RewardBatch.reward` changes anything
    uses_rollouts: ClassVar[bool] = False  # whether `RewardBatch.rollouts` does

    def __init__(self, settings: CreditSettings, state: State):
        self._settings = settings
        self._state = state

    @classmethod
    def fit(
        cls: type[Self],
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> Self:
        """Fits a round's rewards.

        Args:
            batch: the part of this shard, of at least one latent.
            x_TD: scaled activations of the evidence, and `layout` where each token lies.
        """
        raise NotImplementedError

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        """Scalar, already weighted by gamma, age and trust; differentiable in W_enc and b_enc.

        Args:
            x_BD: scaled inputs of one step, this dp rank's part.
            params: the local shard (`trainer.sharded_sae.CreditParams`).
            threshold: of the gate: one for all latents (0-dim) or one for each latent of the shard.
        """
        return None

    def rows(self, params: CreditParams) -> torch.Tensor | None:
        """int64 [N]: the judged latents' places on the shard."""
        latents = self._state.get("latents")
        return None if latents is None else latents - params.first_latent

    def deltas(self, params: CreditParams, threshold: torch.Tensor) -> Deltas | None:
        """What to add to the judged latents now, after a step; None once it has been given."""
        return None

    def selection(self, params: CreditParams) -> torch.Tensor | None:
        """[m]: discounts at selection, in units of the threshold."""
        return None

    def state_dict(self) -> State:
        return self._state


def on_device(layout: ContextLayout, device: torch.device) -> ContextLayout:
    return replace(layout, context_T=layout.context_T.to(device), offset_T=layout.offset_T.to(device))


def of_latents(value_N: np.ndarray, source: RewardBatch, batch: RewardBatch, missing: float) -> np.ndarray:
    """Numbers of `source`'s latents for those of `batch`, `missing` for a latent that the source leaves out."""
    if not len(source.latents):
        return np.full(len(batch.latents), missing)
    place = np.searchsorted(source.latents, batch.latents).clip(max=len(source.latents) - 1)
    return np.where(source.latents[place] == batch.latents, value_N[place], missing)
