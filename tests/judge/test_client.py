"""The client against a scripted handle: what it does when replicas die, refuse, answer late or in part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from sae_ray.config import JudgeConfig
from sae_ray.judge import modes
from sae_ray.judge.client import JudgeClient, batches
from sae_ray.judge.prompts import DISTRACTORS

USAGE = {"requests": 1, "prompt_tokens": 10, "cached_tokens": 5, "output_tokens": 1, "recomputed": 0}


def value(text: str, explanation: str) -> float:
    return -float(len(text) * 10 + len(explanation))


class Handle:
    """Stands for a DeploymentHandle; `failures` are raised first, one per call."""

    def __init__(self, failures: list[Exception] | None = None, delay: float = 0.0) -> None:
        self.failures, self.delay = list(failures or []), delay
        self.ids: list[str] = []
        self.read_pairs: list[tuple[str, str]] = []
        self.sessions: list[str] = []
        self.open = self.most_open = 0

    def options(self, method_name: str, session_id: str) -> Handle:
        self.sessions.append(session_id)
        self._method: Callable[..., dict[str, Any]] = getattr(self, method_name)
        return self

    def remote(self, request_id: str, *args: Any) -> Any:
        method = self._method

        async def answer() -> dict[str, Any]:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                self.ids.append(request_id)
                await asyncio.sleep(self.delay)
                if self.failures:
                    raise self.failures.pop(0)
                return method(*args)
            finally:
                self.open -= 1

        return answer()

    def read(self, items: list[tuple[str, list[str]]], mode: str) -> dict[str, Any]:
        self.read_pairs += [(text, e) for text, each in items for e in each]
        readings = [[None if "?" in e else (value(text, e), 4) for e in each] for text, each in items]
        return {"readings": readings, "usage": USAGE, "pid": 1}

    def generate(self, prompts: list[str], max_tokens: int, n: int, *rest: Any) -> dict[str, Any]:
        return {"texts": [[f"{p}-{i}" for i in range(n)] for p in prompts], "usage": USAGE, "pid": 1}


def config(**changes: Any) -> JudgeConfig:
    return JudgeConfig(**{"deadline_s": 5, "max_attempts": 3, **changes})


def balanced(client: JudgeClient) -> bool:
    c = client.counters
    return c.submitted == c.done + c.failed + c.running


def test_a_likelihood_verdict_is_the_gain_over_prior_and_distractors() -> None:
    async def ask() -> list[float | None]:
        return await JudgeClient(Handle(), config()).score([("a text", "files")], "likelihood")

    def gain(e: str) -> float:
        return value("a text", e) - value("", e)

    expected = gain("files") - sum(gain(d) for d in DISTRACTORS) / len(DISTRACTORS)
    assert asyncio.run(ask()) == [pytest.approx(expected)]


def test_priors_and_distractors_are_read_once_and_verdicts_are_cached() -> None:
    handle = Handle()

    async def ask() -> JudgeClient:
        client = JudgeClient(handle, config())
        pairs = [(f"text {i}", e) for i in range(5) for e in ("files", "dates")]
        first = await client.score(pairs, "likelihood")
        before = len(handle.read_pairs)
        assert await client.score(pairs, "likelihood") == first
        assert len(handle.read_pairs) == before
        return client

    client = asyncio.run(ask())
    assert len(handle.read_pairs) == len(set(handle.read_pairs)) == 5 * (2 + len(DISTRACTORS)) + 2 + len(DISTRACTORS)
    assert client.counters.cache_hits > 0
    assert client.counters.running == 0
    assert balanced(client)


def test_the_same_question_asked_at_the_same_time_goes_out_once() -> None:
    handle = Handle(delay=0.05)

    async def ask() -> list[Any]:
        client = JudgeClient(handle, config())
        return await asyncio.gather(*(client.score([("t", "e")], "yes_no") for _ in range(6)))

    assert len({tuple(a) for a in asyncio.run(ask())}) == 1
    assert len(handle.read_pairs) == 1


def test_a_replica_that_dies_is_asked_again_under_the_same_id_and_counted_once() -> None:
    handle = Handle([ActorDiedError(), ActorDiedError()])

    async def ask() -> JudgeClient:
        client = JudgeClient(handle, config())
        assert await client.score([("t", "e")], "yes_no") == [value("t", "e")]
        return client

    client = asyncio.run(ask())
    assert len(handle.ids) == 3
    assert len(set(handle.ids)) == 1
    assert (client.counters.submitted, client.counters.done, client.counters.failed) == (1, 1, 0)
    assert client.counters.retries == 2


def test_after_the_last_attempt_a_verdict_is_missing_and_may_be_asked_again() -> None:
    handle = Handle([ActorDiedError()] * 3)

    async def ask() -> JudgeClient:
        client = JudgeClient(handle, config())
        assert await client.score([("t", "e")], "yes_no") == [None]
        assert client.counters.failed == 1
        assert client.last_error
        assert "ActorDied" in client.last_error
        assert await client.score([("t", "e")], "yes_no") == [value("t", "e")]
        return client

    assert balanced(asyncio.run(ask()))


def test_back_pressure_is_waited_out_and_costs_no_attempt() -> None:
    handle = Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1) for _ in range(3)])

    async def ask() -> list[float | None]:
        return await JudgeClient(handle, config(max_attempts=1)).score([("t", "e")], "yes_no")

    assert asyncio.run(ask()) == [value("t", "e")]


def test_a_late_answer_is_missing_when_the_deadline_passes() -> None:
    async def ask() -> JudgeClient:
        client = JudgeClient(Handle(delay=30), config(deadline_s=0.1))
        assert await client.score([("t", "e")], "yes_no") == [None]
        return client

    client = asyncio.run(ask())
    assert client.counters.failed == 1
    assert balanced(client)
    assert "0.1 s" in (client.last_error or "")


def test_one_unanswerable_pair_leaves_the_others_answered() -> None:
    async def ask() -> list[float | None]:
        return await JudgeClient(Handle(), config()).score([("t", "what?"), ("t", "files")], "yes_no")

    assert asyncio.run(ask()) == [None, value("t", "files")]


def test_calls_in_flight_are_bounded() -> None:
    handle = Handle(delay=0.02)

    async def ask() -> None:
        client = JudgeClient(handle, config(max_in_flight=3))
        await client.score([(f"text {i}", f"e{j}") for i in range(40) for j in range(16)], "yes_no")

    asyncio.run(ask())
    assert handle.most_open == 3


def test_generations_keep_their_order_over_several_calls() -> None:
    async def ask() -> list[list[str] | None]:
        return await JudgeClient(Handle(), config()).generate([f"p{i}" for i in range(19)], n=2)

    assert asyncio.run(ask()) == [[f"p{i}-0", f"p{i}-1"] for i in range(19)]


def test_batches_keep_a_texts_explanations_together_and_bounded() -> None:
    wanted = {f"t{i}": [f"e{j}" for j in range(10)] for i in range(7)} | {"big": [f"e{j}" for j in range(45)]}
    calls = batches(wanted, 20)
    assert all(sum(len(e) for _, e in call) <= 20 for call in calls)
    asked = [(text, e) for call in calls for text, each in call for e in each]
    assert sorted(asked) == sorted((t, e) for t, each in wanted.items() for e in each)
    assert len(calls) == 7


def test_a_verdict_without_its_prior_is_missing() -> None:
    readings: dict[tuple[str, str], tuple[float, int] | None] = dict.fromkeys(
        modes.needed([("t", "e")], "likelihood"), (-1.0, 1)
    )
    assert modes.verdict("t", "e", "likelihood", readings) == 0
    readings["", "e"] = None
    assert modes.verdict("t", "e", "likelihood", readings) is None
