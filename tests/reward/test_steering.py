"""Steering on the real SmolLM2-135M, and the search for strengths on functions that are known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.activations.hooks import edited, hook_point
from sae_ray.activations.subject import load_full_model, load_tokenizer
from sae_ray.config import HookConfig, ModelConfig, RunConfig
from sae_ray.errors import UserError
from sae_ray.reward.steering import (
    Prompts,
    continuation_gradients,
    find_strengths,
    generate,
    match_kl,
    next_logprobs,
    residual_norm,
    steered,
)
from sae_ray.reward.steering_actor import RemoteSteering, SteeringModel, SteeringSettings

TEXTS = ["The city of", "I think that", "She went home, and"]
LAST = 29


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load_full_model(ModelConfig(), torch.float32, "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture(scope="module")
def prompts(tokenizer) -> Prompts:
    return Prompts.of([[0, *tokenizer(text, add_special_tokens=False).input_ids] for text in TEXTS])


@pytest.fixture(scope="module")
def subject(model) -> Iterator[SteeringModel]:
    """The actor's class, with the model that is loaded anyway."""
    config = {"name": "steering", "model": {"dtype": "float32"}, "hook": {"layer": 12}}
    actor = SteeringModel(RunConfig.model_validate(config).model_dump_json(), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_ray.reward.steering_actor.load_full_model", lambda *_: model)
        assert actor.ready() == {"width": 576, "dtype": "float32"}
        yield actor


def directions(n: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, 576, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("start", [1e-3, 0.7, 90.0])
def test_strengths_of_known_functions_are_found(start):
    scale = torch.tensor([0.01, 1.0, 40.0, 1.0], dtype=torch.float64)

    def kl_of(index: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        x = scale[index] * alpha
        return torch.where(index == 3, torch.log1p(x**4), x**2 / (1 + 0.1 * x))

    found = find_strengths(kl_of, 4, target=0.5, start=start, most=100.0, tolerance=0.02)
    assert found.kl_N == pytest.approx([0.5] * 4, rel=0.02)
    assert torch.allclose(kl_of(torch.arange(4), found.alpha_N), found.kl_N)
    assert found.evaluations <= 16


def test_a_target_out_of_reach_is_missing():
    def kl_of(index: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return torch.where(index == 0, 0.3 * (1 - torch.exp(-alpha)), alpha)

    found = find_strengths(kl_of, 2, target=0.5, start=0.1, most=50.0)
    assert math.isnan(found.alpha_N[0])
    assert float(found.kl_N[1]) == pytest.approx(0.5, rel=0.05)


def test_an_overflowing_pass_is_a_step_too_far():
    def kl_of(index: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return torch.where(alpha > 1, torch.nan, alpha)

    assert float(find_strengths(kl_of, 1, 0.5, start=30.0, most=100.0).kl_N) == pytest.approx(0.5, rel=0.05)


def test_the_kl_of_what_is_found_is_the_target(model, prompts):
    """Within a tenth, for random directions at a middle layer; measured prompt by prompt, without padding or batch."""
    point = hook_point(model, HookConfig(layer=12))
    rows = directions(2)
    unit = residual_norm(model, point, prompts)
    found = match_kl(model, point, rows, prompts, 0.4, start=0.1 * unit, most=20 * unit)
    for row, alpha in zip(rows, found.alpha_N, strict=True):
        kl = []
        for text in range(len(prompts)):
            alone = Prompts.of([prompts.ids_RL[text][prompts.real_RL[text]].tolist()])
            clean = next_logprobs(model, alone)[0].double()
            with steered(point, (row * alpha).float()[None], alone.steered_RL):
                moved = next_logprobs(model, alone)[0].double()
            kl.append(float((moved.exp() * (moved - clean)).sum()))
        assert np.mean(kl) == pytest.approx(0.4, rel=0.1)


def test_steering_adds_to_the_positions_it_says(model, prompts):
    point = hook_point(model, HookConfig(layer=12))
    push = 3 * directions(len(prompts))
    kept: list[torch.Tensor] = []

    def residual() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with edited(point, seen.append):  # opened later than the steering: it sees what comes out of it
            next_logprobs(model, prompts)
        return seen[0]

    clean = residual()
    for positions in ("all", "last"):
        with steered(point, push, prompts.steered_RL, positions):
            kept.append(residual() - clean)
    first = prompts.real_RL.long().argmax(dim=1)
    for r in range(len(prompts)):
        assert torch.allclose(kept[0][r, first[r] + 1 :], push[r].expand_as(kept[0][r, first[r] + 1 :]), atol=1e-3)
        assert not kept[0][r, : first[r] + 1].any()
        assert torch.allclose(kept[1][r, -1], push[r], atol=1e-3)
        assert not kept[1][r, :-1].any()
    assert torch.equal(residual(), clean)  # nothing stays behind


def test_a_tokens_unembedding_direction_makes_it_frequent(model, tokenizer, prompts):
    token = tokenizer(" water", add_special_tokens=False).input_ids[0]
    weight = model.get_output_embeddings().weight.detach()
    # Whitened: the plain row also raises the many tokens whose rows are longer and look its way.
    apart = torch.linalg.solve(weight.T.cov(), weight[token] - weight.mean(0))
    row = apart / model.model.norm.weight.detach()
    point = hook_point(model, HookConfig(layer=LAST))
    unit = residual_norm(model, point, prompts)
    found = match_kl(model, point, row[None] / row.norm(), prompts, 3.0, start=0.1 * unit, most=20 * unit)
    repeated = prompts.take(torch.arange(len(prompts)).repeat_interleave(3))
    uniform = torch.from_numpy(np.random.default_rng(0).random((len(repeated), 6)))
    push = (row / row.norm() * found.alpha_N[0].float()).expand(len(repeated), -1)
    counts = [int((generate(model, repeated, uniform, point, p).tokens_RT == token).sum()) for p in (push, None)]
    assert counts[1] == 0
    assert counts[0] >= 5  # of 54 tokens


def test_what_is_sampled_is_what_the_distributions_say(model, prompts):
    """Token by token without a cache, batch or padding: the same tokens and the same log-probabilities, both ways."""
    point = hook_point(model, HookConfig(layer=12))
    push = 8 * directions(len(prompts), seed=4)
    uniform = torch.from_numpy(np.random.default_rng(1).random((len(prompts), 4)))
    found = generate(model, prompts, uniform, point, push, temperature=0.8)
    row = 0
    ids = prompts.ids_RL[row][prompts.real_RL[row]].tolist()
    for t in range(4):
        alone = Prompts.of([ids])
        clean = (next_logprobs(model, alone)[0] / 0.8).log_softmax(-1)
        with steered(point, push[row : row + 1], alone.steered_RL):
            own = (next_logprobs(model, alone)[0] / 0.8).log_softmax(-1)
        token = int((own.double().exp().cumsum(0) > float(uniform[row, t])).long().argmax())
        assert token == int(found.tokens_RT[row, t])
        assert float(own[token]) == pytest.approx(float(found.logprob_RT[row, t]), abs=1e-3)
        assert float(clean[token]) == pytest.approx(float(found.clean_logprob_RT[row, t]), abs=1e-3)
        ids.append(token)


@pytest.mark.parametrize(("positions", "at_once"), [("all", 2**29), ("last", 1)])
def test_the_gradient_by_what_is_added_is_the_finite_difference_of_the_log_probability(
    model, prompts, monkeypatch, positions, at_once
):
    """Against token by token passes without a cache, batch or padding; one text has ended early."""
    monkeypatch.setattr("sae_ray.reward.steering.GRADIENT_BYTES", at_once)  # all rows in one pass, or each in its own
    point = hook_point(model, HookConfig(layer=12))
    push = 8 * directions(len(prompts), seed=4)
    uniform = torch.from_numpy(np.random.default_rng(1).random((len(prompts), 3)))
    tokens = generate(model, prompts, uniform, point, push, positions, temperature=0.8).tokens_RT.clone()
    tokens[2, 2] = -1
    found = continuation_gradients(model, point, prompts, push, tokens, positions, temperature=0.8)
    assert found.shape == push.shape

    def log_probability(row: int, push_D: torch.Tensor) -> float:
        first, ids, total = prompts.ids_RL[row][prompts.real_RL[row]].tolist(), [], 0.0
        for token in tokens[row][tokens[row] >= 0].tolist():
            alone = Prompts.of([first + ids])
            where = alone.steered_RL.clone()
            if positions == "last":
                where[:, : len(first) - 1] = False
            with steered(point, push_D[None], where):
                total += float((next_logprobs(model, alone)[0].double() / 0.8).log_softmax(-1)[token])
            ids.append(token)
        return total

    for row in (0, 2):
        for axis in (found[row] / found[row].norm(), directions(1, seed=9)[0] + 0.5 * found[row] / found[row].norm()):
            step = 0.5
            slope = (log_probability(row, push[row] + step * axis) - log_probability(row, push[row] - step * axis)) / (
                2 * step
            )
            assert slope == pytest.approx(float(found[row] @ axis), rel=0.02, abs=2e-4)


def test_a_text_ends_with_its_end_token(model, prompts, monkeypatch):
    monkeypatch.setattr("sae_ray.reward.steering._end_tokens", lambda model: list(range(49152)))
    found = generate(model, prompts, torch.full((len(prompts), 3), 0.5, dtype=torch.float64))
    assert (found.tokens_RT[:, 0] >= 0).all()
    assert (found.tokens_RT[:, 1:] == -1).all()
    assert found.logprob_RT[:, 1:].isnan().all()


def test_the_actor_writes_three_paired_sets_that_do_not_depend_on_the_company(subject):
    settings = SteeringSettings(target_kl=0.5, tolerance=0.05, tokens=3, samples=2, rows=12)
    rows = directions(2, seed=7).numpy() * 5
    rows[1] = 0  # cannot steer
    whole = asyncio.run(subject.steer([4, 9], rows, TEXTS[:2], settings))
    steerable, zero = whole.latents
    assert (steerable.latent, zero.latent) == (4, 9)
    assert zero.steered is None
    for written in (steerable.steered, steerable.random, zero.random):
        assert written.kl == pytest.approx(0.5, rel=0.05)
        assert [len(texts) for texts in written.texts] == [2, 2]
        assert [len(p) for texts in written.logprobs for p in texts] == [3] * 4
        assert math.isfinite(written.drift)
    assert whole.unsteered.drift == 0
    assert whole.cpu_s > 0
    alone = asyncio.run(subject.steer([4], rows[:1], TEXTS[:2], settings))
    (same,) = alone.latents
    assert same.random.strength == pytest.approx(steerable.random.strength, rel=1e-3)
    assert alone.unsteered.texts == whole.unsteered.texts
    assert same.texts(alone.unsteered) == steerable.texts(whole.unsteered)


def test_the_actor_gives_gradients_by_the_unit_direction_for_own_directions_and_only_if_asked(subject, monkeypatch):
    passes = []

    def watched(model, point, prompts, push, tokens, *how):
        slope = continuation_gradients(model, point, prompts, push, tokens, *how)
        passes.append((push, tokens, slope))
        return slope

    monkeypatch.setattr("sae_ray.reward.steering_actor.continuation_gradients", watched)
    settings = SteeringSettings(target_kl=0.5, tokens=2, samples=2, rows=12, gradients=True)
    rows = 5 * directions(1, seed=7)
    (own,) = asyncio.run(subject.steer([4], rows.numpy(), TEXTS[:2], settings)).latents
    ((push, tokens, slope),) = passes
    assert own.random.gradients is None
    assert own.steered.gradients.shape == (2, 2, 576)
    torch.testing.assert_close(push, (own.steered.strength * rows / 5).expand(4, -1))
    expected = (own.steered.strength * slope).reshape(2, 2, 576)
    torch.testing.assert_close(torch.from_numpy(own.steered.gradients), expected)
    written = [subject._tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in tokens]
    assert written == [text for of_prompt in own.steered.texts for text in of_prompt]
    assert np.linalg.norm(own.steered.gradients, axis=2).min() > 0


def test_another_width_and_no_prompts_are_refused(subject):
    with pytest.raises(UserError, match=r"shape \(1, 9\) for 1 latents; .* has width 576"):
        asyncio.run(subject.steer([0], np.ones((1, 9)), TEXTS))
    with pytest.raises(UserError, match="at least one prompt"):
        asyncio.run(subject.steer([0], np.ones((1, 576)), []))


def test_a_remote_one_passes_plain_values_on():
    class Handle:
        class steer:
            @staticmethod
            async def remote(*args):
                return args

    latents, rows, texts, settings = asyncio.run(RemoteSteering(Handle()).steer(np.array([3]), np.ones((1, 2)), ("a",)))
    assert (latents, texts, settings) == ([3], ["a"], None)
    assert rows.shape == (1, 2)
