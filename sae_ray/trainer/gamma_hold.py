"""Holds FVU and L0 during RLAIF: the weight of the credit falls while either is beyond its set point.

Rewards pull gates; beyond some strength they do so at the expense of reconstruction, or close so many gates that fewer
than k pre-activations a token are positive, which no threshold can mend. What strength that is depends on model, judge
and step, so it is found while training:

    set points      FVU0 (1 + max_fvu_rise),   L00 (1 - max_l0_fall);   FVU0, L00: the levels when rewards first come
    error           e = max((FVU - set) / (set - FVU0), (set - L0) / (L00 - set)),   clipped to [-1, MOST_ERROR]
    integral        i <- clip(i - RATE e, LEAST, 0)
    weight          exp(clip(i - PULL e, LEAST, 0))

e is -1 where nothing has changed, 0 at the nearer set point. The logarithm makes the loop's gain the same whatever
gamma is: where the harm is proportional to the weight, d e / d log(weight) is 1 at the set point. The integral cannot
wind up: it stays inside what the weight can do, so that the weight rises again as soon as there is room. A few scalars
on the device, no host read, no communication: every rank sees the same totals and does the same.

FVU and L0 are of the training batches, smoothed. A running mean of an FVU that falls, as it does while an SAE still
learns, is what it was some steps ago: held to that, FVU settles as much too high (measured: 4 to 17%). FVU0 and L00 are
therefore running means without their lag, of logarithms: exp(2 mean - mean of the mean), Brown's double exponential
smoothing, right where a level changes by the same share each step. Their error is about .2 of a single batch's: a rise
that is not above that cannot be held.

It is one-sided: beyond a set point the weight falls; short of it the weight rises to 1 and no further, and nothing
pulls FVU up or L0 down to their set points. And these are of what the levels were: a copy that is trained without
rewards may have come to a lower FVU meanwhile. Levels pass a set point before they settle at it: what the first tens of
steps with a ruinous credit did is made good after, in some hundred steps.

Where rewards come before any step (fine-tuning on-policy, without steps of reconstruction first) FVU0 and L00 are those
of the first batch: its forward pass is of the SAE as it was.

Not held is what an estimator gives as deltas: it is given once, when rewards arrive.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sae_ray.config import RLAIFConfig
from sae_ray.trainer.credit_step import CreditLoss, CreditParams, asked

STATE = "gamma_hold"  # in a checkpoint
RATE, PULL = 0.02, 1.0  # per step, and at once
MOST_ERROR = 4.0
LEAST = math.log(1e-3)
SLOW, FAST = 0.96, 0.9  # memories per step: of the levels that set points are of, and of what is compared with them
LEAST_LEVEL = 1e-9  # that has a logarithm
# Places in the state: running means of levels' logarithms (once and twice) and of levels, and what follows from them.
N, LOG_FVU, LOG_L0, FVU, L0, FVU_START, L0_START, INTEGRAL, LOG_WEIGHT, TWICE_FVU, TWICE_L0 = range(11)
PENDING = -1.0  # a start that the next step will say; 0: no rewards yet


class GammaHold:
    """Of one SAE.

    Args:
        max_fvu_rise, max_l0_fall: shares of what they were when rewards first came; None: not held.
    """

    def __init__(self, max_fvu_rise: float | None, max_l0_fall: float | None, device: torch.device | str = "cpu"):
        self._fvu_rise, self._l0_fall = max_fvu_rise, max_l0_fall
        self.state = torch.zeros(11, dtype=torch.float64, device=device)

    @property
    def weight(self) -> torch.Tensor:
        """0-dim, 0 to 1: what the credit is to be multiplied by."""
        return self.state[LOG_WEIGHT].exp()

    def begin(self) -> None:
        """Rewards have come: the levels of now, or without a step those of the next one, become what set points are of.
        Later calls change nothing."""
        s = self.state
        first = s[FVU_START] == 0
        for start, once, twice in ((FVU_START, LOG_FVU, TWICE_FVU), (L0_START, LOG_L0, TWICE_L0)):
            level = (2 * s[once] - s[twice]).exp()
            s[start] = torch.where(first, torch.where(s[N] > 0, level, PENDING), s[start])

    def observe(self, fvu: torch.Tensor, l0: torch.Tensor) -> None:
        """Takes in a step (0-dim tensors, of the global batch), and moves the weight for the next one."""
        s = self.state
        s[N] += 1
        for level, now, once, twice in ((fvu, FVU, LOG_FVU, TWICE_FVU), (l0, L0, LOG_L0, TWICE_L0)):
            level = level.to(s)
            self._mean(now, level, FAST)
            self._mean(once, level.clamp(min=LEAST_LEVEL).log(), SLOW)
            self._mean(twice, s[once], SLOW)
        pending = s[FVU_START] == PENDING
        for start, now in ((FVU_START, FVU), (L0_START, L0)):
            s[start] = torch.where(pending, s[now], s[start])
        errors = []
        if self._fvu_rise is not None:
            errors.append((s[FVU] / s[FVU_START] - 1) / self._fvu_rise - 1)
        if self._l0_fall is not None:
            errors.append((1 - s[L0] / s[L0_START]) / self._l0_fall - 1)
        error = torch.stack(errors).amax().clamp(-1, MOST_ERROR)
        error = torch.where(s[FVU_START] > 0, error, 0)  # before rewards there is nothing to hold
        s[INTEGRAL] = (s[INTEGRAL] - RATE * error).clamp(LEAST, 0)
        s[LOG_WEIGHT] = (s[INTEGRAL] - PULL * error).clamp(LEAST, 0)

    def _mean(self, place: int, value: torch.Tensor, memory: float) -> None:
        """Takes in a value; a plain mean until there is enough to forget."""
        s = self.state
        s[place] += (1 / s[N]).clamp(min=1 - memory) * (value - s[place])

    def held(self, credit: CreditLoss) -> CreditLoss:
        """The same credit, its loss and its discounts weighted as they are to be at each step."""
        return _Held(credit, self)

    def load(self, state: torch.Tensor) -> None:
        self.state[: len(state)] = state
        if len(state) < len(self.state):  # of before there were logarithms: means of levels stood in their places
            for once, twice in ((LOG_FVU, TWICE_FVU), (LOG_L0, TWICE_L0)):
                self.state[once] = self.state[twice] = state[once].clamp(min=LEAST_LEVEL).log()


def hold_of(rlaif: RLAIFConfig, device: torch.device | str) -> GammaHold | None:
    """None where the run holds nothing."""
    wanted = rlaif.enabled and (rlaif.max_fvu_rise is not None or rlaif.max_l0_fall is not None)
    return GammaHold(rlaif.max_fvu_rise, rlaif.max_l0_fall, device) if wanted else None


class _Held:
    def __init__(self, credit: CreditLoss, hold: GammaHold):
        self._credit, self._hold = credit, hold
        self.of_decoder = getattr(credit, "of_decoder", False)

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        loss = self._credit.loss(x_BD, params, threshold)
        return None if loss is None else loss * self._hold.weight.to(loss)

    def rows(self, params: CreditParams) -> torch.Tensor | None:
        rows_n: torch.Tensor | None = asked(self._credit, "rows", params)
        return rows_n

    def deltas(self, params: CreditParams, threshold: torch.Tensor) -> Any:
        return asked(self._credit, "deltas", params, threshold)

    def selection(self, params: CreditParams) -> torch.Tensor | None:
        discount_m: torch.Tensor | None = asked(self._credit, "selection", params)
        return None if discount_m is None else discount_m * self._hold.weight.to(discount_m)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._credit.state_dict()
