"""The client against a scripted handle: what it does when replicas die, refuse, answer late or in part."""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from ray.serve.exceptions import BackPressureError

from sae_ray.config import JudgeConfig
from sae_ray.judge import modes
from sae_ray.judge.client import JudgeClient, batches
from sae_ray.judge.metrics import BusyClock, BusyShare
from sae_ray.judge.verdict_cache import VerdictCache

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


def test_a_likelihood_verdict_is_the_gain_over_the_prior() -> None:
    async def ask() -> list[float | None]:
        return await JudgeClient(Handle(), config()).score([("a text", "files")], "likelihood")

    assert asyncio.run(ask()) == [pytest.approx(value("a text", "files") - value("", "files"))]


def test_priors_are_read_once_and_verdicts_are_cached() -> None:
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
    assert len(handle.read_pairs) == len(set(handle.read_pairs)) == 5 * 2 + 2
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

    async def ask() -> JudgeClient:
        client = JudgeClient(handle, config(max_attempts=1))
        assert await client.score([("t", "e")], "yes_no") == [value("t", "e")]
        return client

    client = asyncio.run(ask())
    assert (client.counters.back_pressure, client.counters.retries) == (3, 0)


def test_a_late_answer_is_missing_when_the_deadline_passes() -> None:
    async def ask() -> JudgeClient:
        client = JudgeClient(Handle(delay=30), config(deadline_s=0.1))
        assert await client.score([("t", "e")], "yes_no") == [None]
        return client

    client = asyncio.run(ask())
    assert client.counters.failed == 1
    assert balanced(client)
    assert "0.1 s" in (client.last_error or "")


@pytest.mark.parametrize("timeout", [TimeoutError("connect"), OSError(errno.ETIMEDOUT, "sent"), GetTimeoutError("get")])
def test_a_timeout_before_the_deadline_is_one_attempt_and_not_the_end(timeout: Exception) -> None:
    client = JudgeClient(Handle(failures=[timeout]), config())
    assert asyncio.run(client.score([("t", "a")], "yes_no")) != [None]
    assert client.counters.retries == 1
    never = JudgeClient(Handle(failures=[timeout] * 9), config())
    assert asyncio.run(never.score([("t", "a")], "yes_no")) == [None]
    assert "no answer within" not in str(never.last_error)


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


@pytest.mark.parametrize(
    ("changes", "calls", "replicas"),
    [
        ({}, 8, 1),
        ({"autoscaling": {"max_replicas": 40}}, 320, 40),
        ({"autoscaling": {"max_replicas": 40}, "max_in_flight": 3}, 3, 1),
        ({"autoscaling": {"max_replicas": 3, "target_ongoing_requests": 4}}, 12, 3),
        ({"max_in_flight": 17}, 17, 3),
    ],
)
def test_as_much_work_is_open_as_all_replicas_aim_at(changes: dict[str, Any], calls: int, replicas: int) -> None:
    judge = config(**changes)
    assert (judge.calls_in_flight, judge.replicas_worth) == (calls, replicas)


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


class Garbled(Handle):
    """Answers in the right shape, but not with numbers that can be."""

    def read(self, items: list[tuple[str, list[str]]], mode: str) -> dict[str, Any]:
        values = {"nan": (math.nan, 3), "infinite": (-math.inf, 3), "above one": (2.0, 3), "no token": (-1.0, 0)}
        readings = [[values.get(e, (value(text, e), 4)) for e in each] for text, each in items]
        return {"readings": readings, "usage": USAGE}


@pytest.mark.parametrize("explanation", ["nan", "infinite", "above one", "no token"])
def test_a_number_that_cannot_be_a_likelihood_is_missing_and_counted_and_never_kept(
    explanation: str, tmp_path: Path
) -> None:
    async def ask(cache: VerdictCache) -> JudgeClient:
        client = JudgeClient(Garbled(), config(), cache=cache)
        verdicts = await client.score([("t", explanation), ("t", "files")], "likelihood")
        assert verdicts[0] is None
        assert verdicts[1] is not None
        return client

    with VerdictCache(tmp_path) as cache:
        client = asyncio.run(ask(cache))
        # With the text and without it, of the five readings per text that the two verdicts need.
        assert client.counters.unreadable == 2
        assert len(cache) == client.counters.done - 2
    assert client.counters.failed == 0
    assert balanced(client)


def test_an_answer_of_the_wrong_shape_is_asked_for_again() -> None:
    class Short(Handle):
        def read(self, items: list[tuple[str, list[str]]], mode: str) -> dict[str, Any]:
            answer = super().read(items, mode)
            return answer if len(self.ids) > 1 else {**answer, "readings": answer["readings"][:-1]}

    async def ask() -> JudgeClient:
        client = JudgeClient(Short(), config())
        assert await client.score([("t", "e")], "yes_no") == [value("t", "e")]
        return client

    client = asyncio.run(ask())
    assert (client.counters.retries, client.counters.done) == (1, 1)


def test_a_request_that_the_engine_refuses_is_not_asked_again() -> None:
    handle = Handle([RayTaskError("generate", "", ValueError("no such schema"))])

    async def ask() -> JudgeClient:
        client = JudgeClient(handle, config())
        assert await client.generate(["p"], schema={"type": "?"}) == [None]
        return client

    client = asyncio.run(ask())
    assert (len(handle.ids), client.counters.failed) == (1, 1)


def test_a_second_client_reads_from_disk_what_the_first_has_paid_for(tmp_path: Path) -> None:
    pairs = [(f"text {i}", e) for i in range(3) for e in ("files", "dates")]
    handles = [Handle(), Handle()]

    async def ask(handle: Handle, cache: VerdictCache, judge: JudgeConfig) -> tuple[list[float | None], JudgeClient]:
        client = JudgeClient(handle, judge, cache=cache)
        return await client.score(pairs, "likelihood"), client

    with VerdictCache(tmp_path) as cache:
        first, paying = asyncio.run(ask(handles[0], cache, config()))
        again, free = asyncio.run(ask(handles[1], cache, config()))
        other = Handle()
        asyncio.run(ask(other, cache, config(dtype="float32")))
    assert first == again
    assert paying.counters.disk_hits == 0
    assert (free.counters.disk_hits, free.counters.submitted) == (paying.counters.done, 0)
    assert handles[1].ids == []
    assert len(other.read_pairs) == len(handles[0].read_pairs), "another judge has its own verdicts"


def test_without_use_cache_everything_is_asked_anew_and_nothing_is_kept(tmp_path: Path) -> None:
    handle = Handle()

    async def ask(cache: VerdictCache) -> None:
        client = JudgeClient(handle, config(), cache=cache)
        for _ in range(2):
            assert await client.score([("t", "e")], "yes_no", use_cache=False) == [value("t", "e")]

    with VerdictCache(tmp_path) as cache:
        asyncio.run(ask(cache))
        assert len(cache) == 0
    assert len(handle.ids) == 2


def test_a_caller_that_is_cancelled_leaves_nothing_running_and_nobody_waiting() -> None:
    async def ask() -> JudgeClient:
        client = JudgeClient(Handle(delay=0.2), config(max_in_flight=1))
        pairs = [(f"t{i}", f"e{j}") for i in range(4) for j in range(64)]
        first = asyncio.ensure_future(client.score(pairs, "yes_no"))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(client.score(pairs[-1:], "yes_no"))
        await asyncio.sleep(0.05)
        first.cancel()
        assert await asyncio.wait_for(second, 5) == [None], "it waited for the cancelled call"
        assert await client.score(pairs[-1:], "yes_no") == [value(*pairs[-1])]
        return client

    client = asyncio.run(ask())
    assert (client.counters.running, client.counters.queued, client.counters.open_calls) == (0, 0, 0)
    assert balanced(client)


def test_adapters_are_named_to_the_replica_and_only_if_there_is_one() -> None:
    seen: list[Any] = []

    class Adapting(Handle):
        def read(self, items: list[tuple[str, list[str]]], mode: str, *adapter: str) -> dict[str, Any]:
            seen.append(adapter)
            return super().read(items, mode)

    async def ask(judge: JudgeConfig) -> None:
        await JudgeClient(Adapting(), judge).score([("t", "e")], "yes_no")

    asyncio.run(ask(config()))
    asyncio.run(ask(config(lora={"terse": "some/where"}, adapter="terse")))
    assert seen == [(), ("terse",)]


def test_busy_time_is_the_union_of_overlapping_requests() -> None:
    now = [0.0]
    clock = BusyClock(lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = seconds

    first, second = clock.request(), clock.request()
    at(10)
    first.__enter__()
    at(12)
    second.__enter__()
    at(13)
    first.__exit__(None, None, None)
    assert clock.busy_s == 3
    at(15)
    second.__exit__(None, None, None)
    at(40)
    assert (clock.busy_s, clock.up_s, clock.running) == (5, 40, 0)


def test_an_engine_is_stalled_only_while_it_has_work_and_finishes_none() -> None:
    now = [0.0]
    clock = BusyClock(lambda: now[0])
    now[0] = 100
    assert clock.stalled_s == 0
    with clock.request():
        now[0] = 130
        assert clock.stalled_s == 30
        with clock.request():
            now[0] = 140
        assert clock.stalled_s == 0
        now[0] = 150
        assert clock.stalled_s == 10
    assert clock.stalled_s == 0


def test_busy_share_adds_replicas_between_each_ones_first_and_last_report() -> None:
    share = BusyShare()
    assert share.value is None
    for replica, up, busy in (("a", 110, 20), ("b", 5, 5), ("a", 100, 12), ("a", 120, 22), ("b", 35, 35)):
        share.add({"replica": replica, "up_seconds": up, "busy_seconds": busy})
    assert share.value == pytest.approx((10 + 30) / (20 + 30))


def test_what_a_client_counts_is_exported_once_with_the_runs_name_and_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's metric classes are replaced by ones that remember; what they send is Ray's own business."""
    sent: dict[str, list[float]] = {}
    tags: set[tuple[tuple[str, str], ...]] = set()

    class Metric:
        def __init__(self, name: str, **options: Any) -> None:
            self._values = sent.setdefault(name, [])

        def set_default_tags(self, given: dict[str, str]) -> None:
            tags.add(tuple(given.items()))

        def inc(self, amount: float) -> None:
            self._values.append(amount)

        set = observe = inc

    import ray.util.metrics

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, name, Metric)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)

    async def ask() -> JudgeClient:
        client = JudgeClient(Handle([ActorDiedError()]), config(), labels=("run", "scorer"))
        await client.score([(f"t{i}", "e") for i in range(100)], "yes_no")
        await client.score([("t0", "e")], "yes_no")
        return client

    client = asyncio.run(ask())
    assert tags == {(("run", "run"), ("role", "scorer"))}
    for name in ("done", "retries", "prompt_tokens"):
        assert sum(sent[f"sae_ray_pool_{name}"]) == getattr(client.counters, name) > 0
    assert len(sent["sae_ray_pool_call_seconds"]) == client.counters.calls == 2
    assert sent["sae_ray_pool_running"][-1] == sent["sae_ray_pool_open_calls"][-1] == 0
