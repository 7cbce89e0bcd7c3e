"""An oracle judge: it knows which features a synthetic sample shows, and errs as much as it is told to.

A sample is what a text is to a real judge, and a feature is what an explanation is. Everything is drawn from the
judge's own generator, in the order of the calls.

Suffixes: N samples, M latents, F features, V verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sae_ray.errors import UserError
from sae_ray.evaluation.synthetic_matching import best_by_f1
from sae_ray.evaluation.synthetic_worlds import Forest

Explaining = Literal["f1", "specific", "random_negatives"]
SHOWN = 12  # active, and as many random, samples that an explainer who reads compares


@dataclass(frozen=True)
class JudgeErrors:
    """Probabilities.

    Attributes:
        explanation: that an explanation names a sibling or the parent of the right feature (a child, if it is a root).
        verdict: that a verdict is flipped.
        leniency: that a sample which shows a sibling or the parent of a feature (of a root: a child), but not the
            feature, is judged to show it, before flips. The estimators are not told of it.
    """

    explanation: float = 0.0
    verdict: float = 0.0
    leniency: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"judge errors: {name} {value} must be a probability")


class OracleJudge:
    """Explains latents and gives verdicts.

    Attributes:
        verdicts_spent: how many were given.
        texts_read: samples that explanations were chosen on, over all calls (of all latents together).
    """

    def __init__(self, forest: Forest, errors: JudgeErrors, seed: int):
        self.errors = errors
        self.verdicts_spent = self.texts_read = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._relatives = [_relatives(forest, feature) for feature in range(len(forest.parent_F))]

    # ------------------------------------------------------------------ explanations

    def explain(self, fires_NM: torch.Tensor, on_NF: torch.Tensor, how: Explaining = "f1") -> torch.Tensor:
        """The feature that each latent is taken for, int64 [M]; "specific" is `proving_ground_choice`'s.

        "f1": the one with the best F1 against the latent's firing at the natural prior, over all samples: true
        labels of all features, without an error and for no verdict. No judge knows them: it is a ceiling of explaining.
        "random_negatives": the one whose share among SHOWN active samples exceeds that among SHOWN random inactive
        ones the most. A child's parent is as frequent there as the child: this is the explainer that RESEARCH.md
        section 1 warns of.
        """
        self.texts_read += len(fires_NM)
        found_M = best_by_f1(fires_NM, on_NF) if how == "f1" else self._by_contrast(fires_NM, on_NF)
        return self.misnamed(found_M)

    def candidates(self, active: torch.Tensor, on_NF: torch.Tensor, n: int) -> torch.Tensor:
        """The `n` features, int64 [n], that these active samples show most often more than SHOWN random ones do; those
        that tie are in any order."""
        self.texts_read += len(active)
        others = torch.randint(len(on_NF), (SHOWN,), generator=self._generator)
        contrast_F = on_NF[active].double().mean(0) - on_NF[others].double().mean(0)
        return (contrast_F + 1e-6 * torch.rand(contrast_F.shape, generator=self._generator)).topk(n).indices

    def misnamed(self, found_M: torch.Tensor) -> torch.Tensor:
        """The features in place, some replaced by a relative as often as `errors.explanation` says."""
        wrong_M = torch.rand(len(found_M), generator=self._generator) < self.errors.explanation
        for latent in torch.nonzero(wrong_M).flatten().tolist():
            relatives = self._relatives[int(found_M[latent])]
            if len(relatives):
                found_M[latent] = relatives[int(torch.randint(len(relatives), (), generator=self._generator))]
        return found_M

    def _by_contrast(self, fires_NM: torch.Tensor, on_NF: torch.Tensor) -> torch.Tensor:
        found = []
        for fires_N in fires_NM.T:
            shown = [self._some(torch.nonzero(mask).flatten(), SHOWN) for mask in (fires_N, ~fires_N)]
            active_F, random_F = (on_NF[rows].double().sum(0) / max(1, len(rows)) for rows in shown)
            found.append(int((active_F - random_F).argmax()))
        return torch.tensor(found)

    def _some(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=self._generator)[:n]]

    # ------------------------------------------------------------------ verdicts

    def verdicts(self, sample_V: torch.Tensor, feature_V: torch.Tensor, on_NF: torch.Tensor) -> torch.Tensor:
        """Whether each sample is held to show its feature, float32 [V] of 0 and 1."""
        self.verdicts_spent += len(sample_V)
        yes_V = on_NF[sample_V, feature_V].clone()
        if self.errors.leniency:
            lenient_V = torch.rand(len(yes_V), generator=self._generator) < self.errors.leniency
            for place in torch.nonzero(lenient_V & ~yes_V).flatten().tolist():
                relatives = self._relatives[int(feature_V[place])]
                yes_V[place] = bool(on_NF[sample_V[place], relatives].any())
        flipped_V = torch.rand(len(yes_V), generator=self._generator) < self.errors.verdict
        return (yes_V ^ flipped_V).float()


def _relatives(forest: Forest, feature: int) -> torch.Tensor:
    """Siblings and parent of a feature, int64; the children of a root."""
    parent = int(forest.parent_F[feature])
    if parent < 0:
        first, count = int(forest.first_child_F[feature]), int(forest.n_children_F[feature])
        return torch.arange(first, first + count) if count else torch.empty(0, dtype=torch.int64)
    first, count = int(forest.first_child_F[parent]), int(forest.n_children_F[parent])
    siblings = torch.arange(first, first + count)
    return torch.cat([siblings[siblings != feature], torch.tensor([parent])])
