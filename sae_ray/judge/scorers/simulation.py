"""Simulation: can activations be predicted, token by token, from the explanation?

The metric of OpenAI's and Anthropic's explainers: over all tokens of the scoring texts, the correlation of predicted
and true activations on a scale from 0 to 10. Two simulators make the prediction:

- a judge that reads likelihoods gives token i the calibrated verdict on the short window that ends at i. Any judge that
  scores at all can do it. Cost: one verdict per token, explanation and null, so about 50 uncached tokens per token of
  text: texts are few.
- a judge that follows instructions is shown all tokens at once and fills in the numbers. One call per text and
  explanation; an answer that is not exactly the list is a counted failure, and its text is missing.

Reference: Bills et al. 2023 (OpenAI), whose simulator's prediction is an expected value too; Bricken et al. 2023.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts, Example
from sae_ray.judge.prompts import nonce
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.verdicts import NAN, OWN, SHUFFLED, ask, asks_questions, is_positive, judge_of, row

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

SCALE = 10
_WINDOW = 8
_TEXTS = 5
_RESAMPLES = 1000


class Simulation:
    """value: Pearson correlation over tokens, with a bootstrap interval over texts; chance is 0.

    `extra`: spearman, r2 (1 - squared error / variance of the predictions as they are: negative where their scale is
    wrong), parse_failures, missing (texts), and the null's spearman. NaN where predictions or activations are constant.
    `n` counts tokens. Verdicts are one per text: raw and probability are its strongest prediction, on the scale and as
    a share of it.

    Args:
        texts: of either class, at most.
        window: tokens that a likelihood judge sees, the last one being the one that is predicted.
        chat: whether the judge is asked for the whole list; None: where it calibrated best on questions.
    """

    name: ClassVar[str] = "simulation"
    needs: ClassVar[tuple[str, ...]] = ("judge",)

    def __init__(self, texts: int = _TEXTS, window: int = _WINDOW, chat: bool | None = None) -> None:
        self._most = texts
        self._window = window
        self._chat = chat

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        chat = asks_questions(tools) if self._chat is None else self._chat
        n_pos, n_neg = min(self._most, cfg.positives), min(self._most, cfg.negatives)
        examples = [for_scorer(job.latent, n_pos, n_neg, seed) for job in jobs]
        asked = [
            (example.context, explanation.text)
            for job, some in zip(jobs, examples, strict=True)
            for explanation in (job.explanation, job.shuffled)
            if explanation is not None
            for example in some
        ]
        wanted = list(dict.fromkeys(asked))
        simulate = self._by_list if chat else self._by_windows
        predicted = await simulate(wanted, contexts, tools)
        return [self._scored(job, some, contexts, predicted, seed) for job, some in zip(jobs, examples, strict=True)]

    async def _by_windows(
        self, wanted: list[tuple[int, str]], contexts: Contexts, tools: Instruments
    ) -> dict[tuple[int, str], np.ndarray | None]:
        windows = {context: window_texts(contexts, context, self._window) for context, _ in wanted}
        pairs = list(
            dict.fromkeys(
                (window, explanation) for context, explanation in wanted for window in windows[context] if window
            )
        )
        raw = dict(zip(pairs, await ask(judge_of(tools, self.name), pairs), strict=True))

        def prediction(window: str, explanation: str) -> float:
            value = raw.get((window, explanation))
            return NAN if value is None else SCALE * _probability(tools.calibration, value)

        return {
            (context, explanation): np.array([prediction(window, explanation) for window in windows[context]])
            for context, explanation in wanted
        }

    async def _by_list(
        self, wanted: list[tuple[int, str]], contexts: Contexts, tools: Instruments
    ) -> dict[tuple[int, str], np.ndarray | None]:
        judge = judge_of(tools, self.name)
        pieces = {context: contexts.pieces(context) for context, _ in wanted}

        longest = max((len(tokens) for tokens in pieces.values()), default=0)
        # A line is a token in quotes, a colon, a number: four tokens, and as many again for rare spellings.
        answers = await judge.generate(
            [list_prompt(pieces[context], explanation) for context, explanation in wanted],
            max_tokens=8 * longest + 16,
            n=1,
            temperature=0.0,
            chat=True,
        )
        return {
            (context, explanation): parse_list(answer[0], pieces[context])
            if answer
            else np.full(len(pieces[context]), np.nan)
            for (context, explanation), answer in zip(wanted, answers, strict=True)
        }

    def _scored(
        self,
        job: ScoreJob,
        examples: Sequence[Example],
        contexts: Contexts,
        predicted: dict[tuple[int, str], np.ndarray | None],
        seed: int,
    ) -> Score:
        rows: list[dict[str, Any]] = []
        measured: dict[str, Correlation] = {}
        failures = missing = 0
        for purpose, explanation in ((OWN, job.explanation), (SHUFFLED, job.shuffled)):
            kept: list[tuple[np.ndarray, np.ndarray, bool]] = []
            for example in examples if explanation is not None else ():
                assert explanation is not None
                prediction_S = predicted[example.context, explanation.text]
                failures += prediction_S is None
                if prediction_S is None or not np.isfinite(prediction_S).any():
                    missing += purpose == OWN
                    continue
                known_S = np.isfinite(prediction_S)
                true_S = quantised(real_activations(example, contexts), job.latent.max_activation)
                kept.append((prediction_S[known_S], true_S[known_S], is_positive(example)))
                strongest = float(prediction_S[known_S].max())
                rows.append(row(example, purpose, strongest, strongest / SCALE))
            measured[purpose] = correlate(kept, np.random.default_rng([seed, job.latent.latent, 1]))
        own, null = measured[OWN], measured[SHUFFLED]
        extra = {
            "spearman": own.spearman,
            "r2": own.r2,
            "shuffled_spearman": null.spearman,
            "shuffled_stderr": null.stderr,
            "parse_failures": float(failures),
            "missing": float(missing),
        }
        return Score(
            self.name, job.latent.latent, own.pearson, own.low, own.high, own.stderr, null.pearson, 0.0, own.n,
            tuple(rows), extra,
        )  # fmt: skip


@dataclass(frozen=True)
class Correlation:
    """Of n tokens; the interval is Pearson's."""

    pearson: float
    low: float
    high: float
    stderr: float
    spearman: float
    r2: float
    n: int


def correlate(texts: Sequence[tuple[np.ndarray, np.ndarray, bool]], rng: np.random.Generator) -> Correlation:
    """Predictions against truth over the tokens of all texts.

    The interval is the bootstrap's percentiles over texts, since tokens of one text are not independent. Positives
    and negatives are drawn apart, as they were chosen; their number is a design and no accident.

    Args:
        texts: per text (predicted, true, whether it is a positive), float [tokens of the text].
    """
    predicted = np.concatenate([text[0] for text in texts]) if texts else np.empty(0)
    true = np.concatenate([text[1] for text in texts]) if texts else np.empty(0)
    n = len(true)
    if n < 2:
        return Correlation(NAN, NAN, NAN, NAN, NAN, NAN, n)
    x0, y0 = float(predicted.mean()), float(true.mean())
    # Moments about the common mean, per text: a resample is a sum of rows.
    moments_X6 = np.array([_moments(text[0] - x0, text[1] - y0) for text in texts])
    pearson = float(_pearson(moments_X6.sum(0)))
    variance = float(((true - y0) ** 2).mean())
    r2 = 1 - float(((predicted - true) ** 2).mean()) / variance if variance > 0 else NAN
    spearman = pearson_of(_ranks(predicted), _ranks(true))
    low = high = stderr = NAN
    if math.isfinite(pearson) and len(texts) > 1:
        counts_RX = np.zeros((_RESAMPLES, len(texts)))
        for active in (True, False):
            rows = np.flatnonzero([text[2] == active for text in texts])
            if len(rows):
                drawn_RC = rows[rng.integers(len(rows), size=(_RESAMPLES, len(rows)))]
                np.add.at(counts_RX, (np.arange(_RESAMPLES)[:, None], drawn_RC), 1)
        resampled = _pearson(counts_RX @ moments_X6)
        resampled = resampled[np.isfinite(resampled)]
        # Where most resamples are constant, those that are not are no fair sample of the statistic.
        if len(resampled) > _RESAMPLES / 2:
            # n texts drawn from n vary by (n - 1) / n of what they should: much, where n is 5.
            least = min(count for count in (sum(text[2] == side for text in texts) for side in (True, False)) if count)
            stretch = (max(2, least) / (max(2, least) - 1)) ** 0.5
            ends = pearson + stretch * (np.quantile(resampled, [0.025, 0.975]) - pearson)
            low, high = (float(each) for each in np.clip(ends, -1, 1))
            stderr = stretch * float(resampled.std(ddof=1))
    return Correlation(pearson, low, high, stderr, spearman, r2, n)


def pearson_of(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN where either is constant."""
    return float(_pearson(_moments(x - x.mean(), y - y.mean())))


def quantised(acts_S: np.ndarray, largest: float) -> np.ndarray:
    """Whole numbers from 0 to `SCALE`, float64; `largest` and all above it are `SCALE`."""
    largest = largest if math.isfinite(largest) and largest > 0 else float(acts_S.max(initial=0)) or 1.0
    return np.clip(np.round(SCALE * np.asarray(acts_S, dtype=np.float64) / largest), 0, SCALE)


def real_activations(example: Example, contexts: Contexts) -> np.ndarray:
    """The example's activations on real tokens, padding left out."""
    return np.asarray(example.acts_S)[contexts.tokens[example.context] >= 0]


def window_texts(contexts: Contexts, context: int, window: int) -> list[str]:
    """Per token the text of the last `window` tokens up to it; empty where that is only space."""
    tokens_S = contexts.tokens[context]
    ids = tokens_S[tokens_S >= 0].tolist()
    return [
        contexts.tokenizer.decode(ids[max(0, i - window + 1) : i + 1], skip_special_tokens=True).strip()
        for i in range(len(ids))
    ]


def list_prompt(pieces: Sequence[str], explanation: str) -> str:
    """All tokens at once, each to be given a number. Tokens are in JSON's quotes, so that each is one line."""
    listed = "\n".join(f"{json.dumps(piece, ensure_ascii=False)}: unknown" for piece in pieces)
    mark = nonce("".join(pieces))
    return (
        f"A neuron of a language model responds to: {' '.join(explanation.split()).rstrip('.')}\n"
        f"Below, between the lines with the number {mark}, is a text, one token per line. Predict how strongly the "
        f"neuron responds to each token: a whole number from 0 (not at all) to {SCALE} (as strongly as it can). Most "
        "tokens are 0.\n"
        f"Text {mark} begins.\n{listed}\nText {mark} ends.\n"
        "Repeat every line in order, with the number instead of the word unknown. Write nothing else."
    )


_LINE = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*(\d{1,2})')


def parse_list(answer: str, pieces: Sequence[str]) -> np.ndarray | None:
    """The predictions, float [tokens]; None unless every token is there, in order, with a number from 0 to `SCALE`."""
    lines = [line.strip() for line in answer.strip().split("\n") if line.strip() and not line.startswith("```")]
    if len(lines) != len(pieces):
        return None
    values = np.empty(len(pieces))
    for index, (line, piece) in enumerate(zip(lines, pieces, strict=True)):
        if (match := _LINE.fullmatch(line)) is None or int(match[2]) > SCALE:
            return None
        try:
            token = json.loads(match[1])
        except ValueError:
            return None
        # Models drop the space before a word, which decides nothing here: the order does.
        if token.strip() != piece.strip():
            return None
        values[index] = int(match[2])
    return values


def _probability(calibration: Any, raw: float) -> float:
    """The calibrated verdict; where there is no calibration the log-odds that a verdict roughly is."""
    if calibration is not None:
        return float(calibration.probability(raw))
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, raw))))


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def _pearson(moments: np.ndarray) -> np.ndarray:
    """Correlations [...] from moments [..., 6]; NaN where a variance is 0, up to rounding."""
    n, sx, sy, sxx, syy, sxy = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy, cov = sxx - sx * sx / n, syy - sy * sy / n, sxy - sx * sy / n
        real = (vx > 1e-12 * sxx) & (vy > 1e-12 * syy)
        return np.where(real, np.clip(cov / np.sqrt(vx * vy), -1, 1), np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
