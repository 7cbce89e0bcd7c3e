"""Fuzzing: does the judge, given the explanation, tell the latent's own tokens from others?

Texts come with tokens highlighted: named after the text, which so shares the cache that detection has filled. Nothing
about the highlights may give a negative away without a glance at the explanation, how many there are or where, or an
SAE trained on such scores would learn to fire there. So negatives carry the positives' own patterns, every one equally
often, laid over other texts (`sampling.deal_patterns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts, Example, LatentEvidence
from sae_ray.judge.marks import escaped
from sae_ray.judge.prompts import focused
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.sampling import deal_patterns, pattern_of, place, spread
from sae_ray.judge.scorers.verdicts import Trial, is_positive, separate

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

# Negatives that are active texts with other tokens highlighted than the latent's.
MISPLACED = "misplaced"
# Highlighted runs that a judge is told of, and characters of each: what follows a text should fit into one KV block.
_RUNS, _CHARACTERS = 4, 20


class Fuzzing:
    """Soft AUROC of verdicts on highlighted texts: the latent's tokens against as many others in like places.

    Half of the negatives are the active texts themselves with highlights off the latent's tokens (stratum "misplaced":
    only the words count there), half are texts in which it is inactive. `extra` has the AUROC against each. A text that
    is on both sides makes the interval, which takes them for independent, a little too wide.
    """

    name: ClassVar[str] = "fuzzing"
    needs: ClassVar[tuple[str, ...]] = ("judge",)
    mode: ClassVar[str | None] = None

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        trials = [highlighted_trials(job.latent, contexts, cfg.positives, cfg.negatives, seed) for job in jobs]
        # A misplaced text stands for nothing in the corpus, so there is no F1 at the natural prior.
        return await separate(self.name, jobs, trials, tools, cfg, self.mode, weighted=False)


def highlighted_trials(
    latent: LatentEvidence, contexts: Contexts, positives: int, negatives: int, seed: int
) -> list[Trial]:
    """The texts of one latent, highlighted; in an order whose beginnings are balanced."""
    rng = np.random.default_rng([seed, latent.latent])
    examples = spread(for_scorer(latent, positives, negatives, seed), rng)
    pieces = {e.context: _pieces(contexts, e.context) for e in examples}
    own_tokens = {
        e.context: (e.acts_S[contexts.tokens[e.context] >= 0] > 0) & np.array([bool(p) for p in pieces[e.context]])
        for e in examples
    }
    active = [e for e in examples if is_positive(e) and own_tokens[e.context].any()]
    inactive = [e for e in examples if not is_positive(e)]
    if not active:
        return []
    own = [own_tokens[e.context] for e in active]
    n_total = min(negatives, len(inactive) + len(active) // 2)
    n_misplaced = min(len(active), n_total // 2)
    marks, left = deal_patterns([pattern_of(own_n) for own_n in own], own[:n_misplaced], n_total, rng)

    def trial(example: Example, marks_n: np.ndarray, positive: bool, stratum: str) -> Trial:
        text = focused(contexts.text(example.context), highlighted(pieces[example.context], marks_n))
        return Trial(text, positive, example.context, stratum, example.weight)

    misplaced = [
        trial(example, marks_n, False, MISPLACED)
        for example, marks_n in zip(active[:n_misplaced], marks, strict=True)
        if marks_n is not None
    ]
    elsewhere = []
    for example, pattern in zip(inactive, left, strict=False):
        n = len(pieces[example.context])
        # The latent is inactive here, so no token is its own; a pattern may still be longer than a short text.
        marks_n = place(pattern, n, np.zeros(n, dtype=bool))
        if marks_n is not None:
            elsewhere.append(trial(example, marks_n, False, example.stratum))
    negatives_mixed = [each for pair in _alternate(misplaced, elsewhere) for each in pair]
    return [*(trial(e, own_n, True, e.stratum) for e, own_n in zip(active, own, strict=True)), *negatives_mixed]


def highlighted(pieces: Sequence[str], marks_n: np.ndarray) -> list[str]:
    """The runs of highlighted tokens as words, in their order; at most `_RUNS`. One of spaces only shows them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks_n.astype(np.int8), [0]])))
    runs = ["".join(pieces[start:end]) for start, end in edges.reshape(-1, 2)]
    return [escaped((run.strip() or run)[:_CHARACTERS], "delimiters") for run in runs[:_RUNS]]


def _pieces(contexts: Contexts, context: int) -> list[str]:
    """Tokens as text, special tokens empty: `Contexts.text` leaves them out as well."""
    special = set(getattr(contexts.tokenizer, "all_special_ids", ()))
    tokens = [int(token) for token in contexts.tokens[context] if token >= 0]
    return ["" if t in special else piece for t, piece in zip(tokens, contexts.pieces(context), strict=True)]


def _alternate(first: Sequence[Trial], second: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    longest = max(len(first), len(second))
    return [tuple(each[i] for each in (first, second) if i < len(each)) for i in range(longest)]
