"""Steering: a direction added at a hook point, at the strength at which it changes the next token by so many nats.

    x_t <- x_t + alpha * d,    KL(alpha) = mean over prompts of KL(p_steered || p_clean) of the next token = target

Strengths of different latents, layers and models are only comparable through what they do, so alpha is never given but
found: widened until the target lies between, then narrowed on the logarithms of alpha and KL (which are nearly linear,
KL ~ alpha^2), every other time by halving. A direction that does not get there below `most` has no strength (NaN).

Sampling is by inverse CDF from given uniform numbers: the same numbers with and without steering are common random
numbers, and what else is in a batch changes no text, but where a number falls within rounding of a boundary.

Nothing here knows Ray or SAEs; any transformers causal LM will do. Prompts are padded on the left.

Suffixes: R rows of a batch, N directions, P prompts, L prompt tokens, T generated tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sae_ray.activations.hooks import HookPoint, edited

Positions = Literal["all", "last"]

GRADIENT_BYTES = 2**29  # of logits and what is derived from them, in one pass of `continuation_gradients`
_COPIES = 5  # of the logits, float32, that such a pass holds


@dataclass(frozen=True)
class Prompts:
    """ids_RL int64, padded on the left; real_RL: no padding; steered_RL: positions that `all` steers."""

    ids_RL: Tensor
    real_RL: Tensor
    steered_RL: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], spared: int = 1) -> Prompts:
        """Token ids of every prompt, at least one each. spared: first positions that are never steered (attention
        sinks, whose size is not to be touched), as long as one is left."""
        longest = max(map(len, rows))
        ids_RL = torch.zeros(len(rows), longest, dtype=torch.int64)
        real_RL = torch.zeros(len(rows), longest, dtype=torch.bool)
        steered_RL = torch.zeros(len(rows), longest, dtype=torch.bool)
        for r, row in enumerate(rows):
            first = longest - len(row)
            ids_RL[r, first:] = torch.tensor(row, dtype=torch.int64)
            real_RL[r, first:] = True
            steered_RL[r, first + min(spared, len(row) - 1) :] = True
        return cls(ids_RL, real_RL, steered_RL)

    def __len__(self) -> int:
        return len(self.ids_RL)

    def take(self, rows: Tensor) -> Prompts:
        return Prompts(self.ids_RL[rows], self.real_RL[rows], self.steered_RL[rows])

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(self.ids_RL.to(device), self.real_RL.to(device), self.steered_RL.to(device))


@contextmanager
def steered(point: HookPoint, push_RD: Tensor, steered_RL: Tensor, positions: Positions = "all") -> Iterator[None]:
    """While open, row r of every batch has push_RD[r] added at `point`.

    all: at the marked positions; last: only at the last one. A forward pass of one position per row (a generated
    token behind a cache) is always steered.
    """

    def push(x_RLD: Tensor) -> Tensor:
        push_R1D = push_RD[:, None].to(x_RLD.dtype)
        if positions == "last" or x_RLD.shape[1] == 1:
            new_RLD = x_RLD.clone()
            new_RLD[:, -1:] += push_R1D
            return new_RLD
        return x_RLD + push_R1D * steered_RL[..., None].to(x_RLD.dtype)

    with edited(point, push):
        yield


@torch.inference_mode()
def next_logprobs(model: Any, prompts: Prompts) -> Tensor:
    """Log-probabilities of the token behind each prompt, float32 [R, V]."""
    out = _forward(model, prompts.ids_RL, prompts.real_RL, keep=1)
    return out.logits[:, -1].float().log_softmax(dim=-1)


@dataclass(frozen=True)
class Strengths:
    """alpha_N: float64, NaN where the target is out of reach; kl_N: what it does, nats; evaluations: of all N at once,
    at most."""

    alpha_N: Tensor
    kl_N: Tensor
    evaluations: int


def find_strengths(
    kl_of: Callable[[Tensor, Tensor], Tensor],
    n: int,
    target: float,
    start: float,
    most: float,
    tolerance: float = 0.05,
    evaluations: int = 24,
) -> Strengths:
    """Strengths at which kl_of is the target within the relative tolerance.

    Args:
        kl_of: (indices int64 [n'], alpha float64 [n']) -> KL [n'] in nats; 0 at alpha 0, continuous.
        start, most: first alpha tried, largest allowed.
    """
    if not (target > 0 and 0 < start <= most):
        raise ValueError(f"needs target {target} > 0 and 0 < start {start} <= most {most}")
    alpha, kl = torch.full((n,), start, dtype=torch.float64), torch.full((n,), math.nan, dtype=torch.float64)
    low, low_kl = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    high, high_kl = torch.full((n,), math.inf, dtype=torch.float64), torch.full((n,), math.inf, dtype=torch.float64)
    open_n = torch.arange(n)
    used = 0
    while len(open_n) and used < evaluations:
        used += 1
        kl[open_n] = kl_of(open_n, alpha[open_n]).detach().double().cpu()
        # A forward pass that overflowed went too far.
        kl[open_n] = torch.where(torch.isfinite(kl[open_n]), kl[open_n].clamp(min=0), math.inf)
        done = (kl[open_n] / target - 1).abs() <= tolerance
        lost = (kl[open_n] < target) & (alpha[open_n] >= most) & ~done
        alpha[open_n[lost]] = math.nan
        open_n = open_n[~(done | lost)]
        for i in open_n.tolist():
            a, found = float(alpha[i]), float(kl[i])
            if found < target:
                low[i], low_kl[i] = a, found
            else:
                high[i], high_kl[i] = a, found
            bounds = (float(low[i]), float(low_kl[i]), float(high[i]), float(high_kl[i]))
            alpha[i] = min(most, _next_alpha(a, found, target, bounds, halve=used % 2 == 0))
    alpha[open_n] = math.nan  # not settled in time
    return Strengths(alpha, kl, used)


def _next_alpha(
    alpha: float, kl: float, target: float, bounds: tuple[float, float, float, float], halve: bool
) -> float:
    low, low_kl, high, high_kl = bounds
    if math.isinf(high) or low == 0:
        # One side only: KL ~ alpha^2, but neither so far that all is lost, nor so near that nothing is learnt.
        factor = math.sqrt(target / kl) if 0 < kl < math.inf else (8.0 if kl == 0 else 0.125)
        return alpha * (min(max(1.1 * factor, 1.3), 8.0) if math.isinf(high) else max(min(0.9 * factor, 0.75), 0.125))
    middle = math.sqrt(low * high)
    if halve or not (low_kl > 0 and math.isfinite(high_kl) and high_kl > low_kl):
        return middle
    share = math.log(target / low_kl) / math.log(high_kl / low_kl)
    return low * (high / low) ** min(max(share, 0.05), 0.95)


@torch.inference_mode()
def match_kl(
    model: Any,
    point: HookPoint,
    directions_ND: Tensor,
    prompts: Prompts,
    target: float,
    *,
    start: float,
    most: float,
    positions: Positions = "all",
    tolerance: float = 0.05,
    rows: int = 64,
) -> Strengths:
    """alpha of every direction (as it is: its length counts) at which the mean KL over all prompts is the target, nats.

    Args:
        start, most: alpha tried first, and the largest; a norm of the residual stream is a natural unit.
        rows: of one forward pass, at most.
    """
    clean_PV = torch.cat([next_logprobs(model, prompts.take(some)) for some in torch.arange(len(prompts)).split(rows)])

    def kl_of(index_n: Tensor, alpha_n: Tensor) -> Tensor:
        direction_R = index_n.repeat_interleave(len(prompts))
        alpha_R = alpha_n.repeat_interleave(len(prompts))
        prompt_R = torch.arange(len(prompts)).repeat(len(index_n))
        kl = []
        for some in torch.arange(len(prompt_R)).split(rows):
            batch = prompts.take(prompt_R[some])
            push_RD = directions_ND[direction_R[some]] * alpha_R[some, None].to(directions_ND)
            with steered(point, push_RD, batch.steered_RL, positions):
                steered_RV = next_logprobs(model, batch)
            kl.append((steered_RV.exp() * (steered_RV - clean_PV[prompt_R[some]])).sum(dim=1))
        return torch.cat(kl).reshape(len(index_n), len(prompts)).mean(dim=1)

    return find_strengths(kl_of, len(directions_ND), target, start, most, tolerance)


@dataclass(frozen=True)
class Generated:
    """tokens_RT int64, -1 behind the end. logprob_RT: of every token as it was sampled (steered, tempered);
    clean_logprob_RT: of the same tokens without steering. float32, NaN behind the end."""

    tokens_RT: Tensor
    logprob_RT: Tensor
    clean_logprob_RT: Tensor


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Prompts,
    uniform_RT: Tensor,
    point: HookPoint | None = None,
    push_RD: Tensor | None = None,
    positions: Positions = "all",
    temperature: float = 1.0,
) -> Generated:
    """Continuations of T tokens, ended by an end-of-sequence token (which is kept).

    Args:
        uniform_RT: numbers in [0, 1), one per token: token = the first whose cumulated probability exceeds it.
        point, push_RD: where, and what is added to each row; None: no steering.
    """
    device = prompts.ids_RL.device
    steering = point is not None and push_RD is not None
    ends = torch.tensor(_end_tokens(model), device=device)
    n_rows, n_tokens = uniform_RT.shape
    tokens_RT = torch.full((n_rows, n_tokens), -1, dtype=torch.int64, device=device)
    logprob_RT = torch.full((n_rows, n_tokens), math.nan, device=device)
    ids_RL, real_RL, cache = prompts.ids_RL, prompts.real_RL, None
    running_R = torch.ones(n_rows, dtype=torch.bool, device=device)
    hook: Any = nullcontext()
    if point is not None and push_RD is not None:
        hook = steered(point, push_RD, prompts.steered_RL, positions)
    with hook:
        for t in range(n_tokens):
            out = _forward(model, ids_RL, real_RL, keep=1, cache=cache, use_cache=True)
            cache = out.past_key_values
            logprob_RV = (out.logits[:, -1].float() / temperature).log_softmax(dim=-1)
            token_R = _inverse_cdf(logprob_RV, uniform_RT[:, t].to(device))
            tokens_RT[:, t] = torch.where(running_R, token_R, -1)
            drawn_R = logprob_RV.gather(1, token_R[:, None])[:, 0]
            logprob_RT[:, t] = torch.where(running_R, drawn_R, math.nan)
            running_R = running_R & ~torch.isin(token_R, ends)
            if not running_R.any():
                break
            ids_RL = token_R[:, None]
            real_RL = torch.cat([real_RL, torch.ones_like(real_RL[:, :1])], dim=1)
    clean_RT = continuation_logprobs(model, prompts, tokens_RT, temperature) if steering else logprob_RT.clone()
    return Generated(tokens_RT, logprob_RT, clean_RT)


@torch.inference_mode()
def continuation_logprobs(model: Any, prompts: Prompts, tokens_RT: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of every given token behind its prompt, without steering: float32 [R, T], NaN where -1."""
    there_RT = tokens_RT >= 0
    ids_RL = torch.cat([prompts.ids_RL, tokens_RT.clamp(min=0)], dim=1)
    real_RL = torch.cat([prompts.real_RL, there_RT], dim=1)
    n_tokens = tokens_RT.shape[1]
    logits_RTV = _forward(model, ids_RL, real_RL, keep=n_tokens + 1).logits[:, -n_tokens - 1 : -1]
    out_RT = torch.full(tokens_RT.shape, math.nan, device=tokens_RT.device)
    for r, logits_TV in enumerate(logits_RTV):  # one row's float32 copy at a time
        logprob_TV = (logits_TV.float() / temperature).log_softmax(dim=-1)
        found_T = logprob_TV.gather(1, tokens_RT[r].clamp(min=0)[:, None])[:, 0]
        out_RT[r] = torch.where(there_RT[r], found_T, math.nan)
    return out_RT


def continuation_gradients(
    model: Any,
    point: HookPoint,
    prompts: Prompts,
    push_RD: Tensor,
    tokens_RT: Tensor,
    positions: Positions = "all",
    temperature: float = 1.0,
) -> Tensor:
    """Gradient of every row's log-probability, as `generate` samples it, by what is added to the row: float32 [R, D].

    The same positions are steered as when the text was written: those of the prompt, and every token that was generated
    and read again. The sum over a row's tokens; `tokens_RT` is -1 behind the end.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    at_once = max(1, GRADIENT_BYTES // (4 * _COPIES * tokens_RT.shape[1] * vocabulary))
    parts = [
        _gradients(model, point, prompts.take(some), push_RD[some], tokens_RT[some], positions, temperature)
        for some in torch.arange(len(tokens_RT), device=tokens_RT.device).split(at_once)
    ]
    return torch.cat(parts)


@torch.enable_grad()
def _gradients(
    model: Any,
    point: HookPoint,
    prompts: Prompts,
    push_RD: Tensor,
    tokens_RT: Tensor,
    positions: Positions,
    temperature: float,
) -> Tensor:
    there_RT = tokens_RT >= 0
    tokens_RT = tokens_RT.clamp(min=0)
    n_tokens = tokens_RT.shape[1]
    # The last token is predicted and never read.
    ids_RL = torch.cat([prompts.ids_RL, tokens_RT[:, :-1]], dim=1)
    real_RL = torch.cat([prompts.real_RL, there_RT[:, :-1]], dim=1)
    steered_RL = prompts.steered_RL.clone()
    if positions == "last":
        steered_RL[:, :-1] = False
        steered_RL[:, -1] = True
    steered_RL = torch.cat([steered_RL, there_RT[:, :-1]], dim=1)
    push_RD = push_RD.detach().clone().requires_grad_()

    def add(x_RLD: Tensor) -> Tensor:
        return x_RLD + push_RD[:, None].to(x_RLD.dtype) * steered_RL[..., None].to(x_RLD.dtype)

    with edited(point, add):
        logits_RTV = _forward(model, ids_RL, real_RL, keep=n_tokens).logits[:, -n_tokens:]
    logprob_RTV = (logits_RTV.float() / temperature).log_softmax(dim=-1)
    drawn_RT = logprob_RTV.gather(2, tokens_RT[..., None])[..., 0]
    (slope_RD,) = torch.autograd.grad(torch.where(there_RT, drawn_RT, 0).sum(), push_RD)
    return slope_RD.float()


def residual_norm(model: Any, point: HookPoint, prompts: Prompts) -> float:
    """Median norm at the hook point over the positions that are steered: the unit that strengths start from."""
    seen: list[Tensor] = []

    def look(x_RLD: Tensor) -> None:
        seen.append(x_RLD[prompts.steered_RL].float().norm(dim=-1))

    with torch.inference_mode(), edited(point, look):
        _forward(model, prompts.ids_RL, prompts.real_RL, keep=1)
    return float(torch.cat(seen).median())


def _forward(model: Any, ids_RL: Tensor, real_RL: Tensor, keep: int, cache: Any = None, use_cache: bool = False) -> Any:
    """A pass over the new positions ids_RL, the last of real_RL; logits of at least the last `keep` positions."""
    position_RL = (real_RL.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids_RL.shape[1] :]
    # Not every model can leave logits out; SmolLM2's are 49,152 numbers per position.
    only = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(
        input_ids=ids_RL,
        attention_mask=real_RL.long(),
        position_ids=position_RL,
        past_key_values=cache,
        use_cache=use_cache,
        **only,
    )


def _inverse_cdf(logprob_RV: Tensor, uniform_R: Tensor) -> Tensor:
    cumulated_RV = logprob_RV.double().exp().cumsum(dim=1)
    # Rounding leaves the last sum beside 1; the number is scaled to it.
    wanted_R1 = uniform_R.double()[:, None] * cumulated_RV[:, -1:]
    return torch.searchsorted(cumulated_RV, wanted_R1, right=True)[:, 0].clamp(max=logprob_RV.shape[1] - 1)


def _end_tokens(model: Any) -> list[int]:
    for config in (getattr(model, "generation_config", None), model.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return list(end) if isinstance(end, list | tuple) else [int(end)]
    return []
