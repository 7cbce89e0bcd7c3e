"""Rollouts on a synthetic world: a stand-in for the language model that is steered along decoder directions.

A *writer* reads an activation out into a distribution over features and writes a text of a few of them. With e_f the
feature directions, b the world's bias, p_f how often feature f fires, s the sharpness, and n_f a random unit vector
orthogonal to e_f,

    r_f = c e_f + sqrt(1 - c^2) n_f
    z_f(x) = s <r_f, x - b> + log p_f         P(token = f | x) = softmax(z(x))_f
    steered:  x <- x + alpha u                u the unit decoder row, x a sample of the pool (a prompt)
    text:  T tokens, drawn independently      log P(text | x, u) = sum_t log softmax(z(x + alpha u))_{f_t}

A text shows the features among its tokens and all their ancestors: who writes of a poodle writes of a dog. alpha is
each latent's own: the KL of the next token, mean over the prompts, is `target_kl`, as in `reward.steering` but exact,

    KL(x) = sum_f P(f | x + alpha u) (log P(f | x + alpha u) - log P(f | x))

and a direction that never gets there has no rollouts. At that strength the gradient by the direction is

    d log P(text) / du = alpha s sum_t (r_{f_t} - sum_f P(f | x + alpha u) r_f)

so a round of generations shows the estimator the readers of what it writes about. c, `reader_cosine`, says how much
that helps: at 1 the readers are the true directions, which a real model's need not be, and a latent that writes about
its feature points at it; at lower c the gradient points elsewhere by as much.

The reward of a generation is the judge's verdict on whether it shows the feature that the latent was explained as; a
generation costs one verdict. There are no controls here: one number per latent, such as a control's mean, is taken off
by the estimator's baseline, and unsteered texts would cost as many verdicts again.

Suffixes: M latents, P prompts, K generations of a latent, T tokens of a text, R rollouts, F features, D d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sae_ray.evaluation.synthetic import World
from sae_ray.evaluation.synthetic_judge import OracleJudge
from sae_ray.reward.credit import Rollouts
from sae_ray.reward.steering import Strengths, find_strengths

READ_BYTES = 2**26  # of readouts at once
_READER_SEED = 0
_START, _MOST = 1.0, 100.0  # strengths tried first and at most, in units of a feature's mean magnitude


@dataclass(frozen=True)
class SteeredWriter:
    """The stand-in; see the module.

    Attributes:
        sharpness: s; a feature of magnitude 2 is exp(2 s) times as likely a token as when it is absent.
        reader_cosine: c, of a feature's reader with its direction; what else is in readers is the same for all writers.
        tokens: of a text. prompts: that every latent's generations go on from, in turn. target_kl: nats.
    """

    world: World
    sharpness: float = 3.0
    reader_cosine: float = 1.0
    tokens: int = 4
    prompts: int = 32
    target_kl: float = 0.5

    @cached_property
    def readers_FD(self) -> torch.Tensor:
        """r_f, unit rows."""
        e_FD = self.world.directions_FD
        n_FD = torch.randn(e_FD.shape, generator=torch.Generator().manual_seed(_READER_SEED)).to(e_FD)
        n_FD = torch.nn.functional.normalize(n_FD - (n_FD * e_FD).sum(1, keepdim=True) * e_FD, dim=1)
        return self.reader_cosine * e_FD + (1 - self.reader_cosine**2) ** 0.5 * n_FD

    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        """z [B, F]"""
        prior_F = self.world.wanted_F.log().to(x_BD)
        return torch.addmm(prior_F, x_BD - self.world.bias_D, self.sharpness * self.readers_FD.T)

    def strengths(self, x_PD: torch.Tensor, unit_MD: torch.Tensor) -> Strengths:
        """alpha of every direction at which the mean KL over the prompts is `target_kl`."""
        clean_PF = self.logits(x_PD).log_softmax(1)
        # Of alpha u the readout is linear, so a direction is read once for all strengths.
        shift_MF = self.sharpness * unit_MD @ self.readers_FD.T
        at_once = max(1, READ_BYTES // (4 * clean_PF.numel()))

        def kl_of(index_n: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
            found = []
            for some, alpha in zip(index_n.split(at_once), alpha_n.split(at_once), strict=True):
                pushed_nF = alpha[:, None].to(shift_MF) * shift_MF[some]
                steered_nPF = (clean_PF + pushed_nF[:, None]).log_softmax(2)
                found.append((steered_nPF.exp() * (steered_nPF - clean_PF)).sum(2).mean(1))
            return torch.cat(found)

        unit = self.world.spec.magnitude_mean
        return find_strengths(kl_of, len(unit_MD), self.target_kl, _START * unit, _MOST * unit)

    def shown(self, token_KT: torch.Tensor) -> torch.Tensor:
        """The features that texts show, bool [K, F]."""
        shown_KF = torch.zeros(len(token_KT), self.world.spec.n_features, dtype=torch.bool)
        row_KT = torch.arange(len(token_KT))[:, None].expand_as(token_KT)
        while token_KT.numel():
            shown_KF[row_KT, token_KT] = True
            parent_KT = self.world.forest.parent_F[token_KT]
            row_KT, token_KT = row_KT[parent_KT >= 0], parent_KT[parent_KT >= 0]
        return shown_KF

    def write(
        self, x_PD: torch.Tensor, unit_D: torch.Tensor, alpha: float, n: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """n texts under steering: their tokens [K, T], and the gradients [K, D] of their log-probabilities by u."""
        p_PF = self.logits(x_PD + alpha * unit_D).softmax(1)
        each = -(-n // len(x_PD))
        token_PKT = torch.multinomial(p_PF, each * self.tokens, replacement=True, generator=generator)
        # In turn over the prompts, so that a number that is no multiple of theirs leaves out the last ones.
        token_KT = token_PKT.view(len(x_PD), each, self.tokens).transpose(0, 1).reshape(-1, self.tokens)[:n]
        expected_PD = p_PF @ self.readers_FD
        of_prompt_KD = expected_PD.repeat(each, 1)[:n]
        score_KD = self.readers_FD[token_KT].sum(1) - self.tokens * of_prompt_KD
        return token_KT, alpha * self.sharpness * score_KD


def steered_rollouts(
    writer: SteeredWriter,
    judge: OracleJudge,
    W_dec_MD: torch.Tensor,
    feature_M: torch.Tensor,
    latents: np.ndarray,
    n: int,
    x_TD: torch.Tensor,
    rng: np.random.Generator,
    shuffled: bool = False,
) -> Rollouts:
    """Judged generations of each latent, steered along its decoder row.

    Args:
        feature_M: what each latent was explained as.
        latents: which, ascending. n: generations, and so verdicts, of each; `x_TD` gives their prompts.
        shuffled: deal the verdicts anew over the generations of all latents: a null that keeps their rate.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    x_PD = x_TD[torch.from_numpy(rng.choice(len(x_TD), min(writer.prompts, len(x_TD)), replace=False))]
    unit_ND = torch.nn.functional.normalize(W_dec_MD[torch.from_numpy(latents)], dim=1)
    strength_N = writer.strengths(x_PD, unit_ND).alpha_N
    steerable = torch.nonzero(torch.isfinite(strength_N)).flatten().tolist()
    rewards, gradients = [torch.empty(0)], [torch.empty(0, x_TD.shape[1])]
    for row in steerable:
        token_KT, gradient_KD = writer.write(x_PD, unit_ND[row], float(strength_N[row]), n, generator)
        asked_K = feature_M[int(latents[row])].expand(n)
        rewards.append(judge.verdicts(torch.arange(n), asked_K, writer.shown(token_KT)))
        gradients.append(gradient_KD)
    reward_R = torch.cat(rewards).numpy()
    return Rollouts(
        latent=np.repeat(latents[steerable], n),
        perturbation=None,
        strength=np.repeat(strength_N[steerable].numpy().astype(np.float32), n),
        reward=rng.permutation(reward_R) if shuffled else reward_R,
        sigma=0.0,
        log_prob_grad=torch.cat(gradients).numpy(),
    )
