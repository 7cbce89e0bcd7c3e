"""A judge pool of its own, from no replica to two and back, under everything that can happen to it.

The tests run in order and share one application: starting a replica costs more than most of them.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sae_ray.config import RunConfig
from sae_ray.judge.client import JudgeClient
from sae_ray.judge.pool import JudgePool
from sae_ray.judge.verdict_cache import VerdictCache

pytestmark = pytest.mark.timeout(1200)
EXPLANATIONS = ["file paths", "HTTP requests, url, response", "matrix multiplication", "unit tests"]
RUN = RunConfig.model_validate(
    {
        "name": "pool",
        "hook": {"layer": 1},
        "judge": {
            # float32: a verdict must not depend on what else was in its batch, so that verdicts can be compared.
            "dtype": "float32",
            "kv_cache_gb": 0.25,
            "max_model_len": 512,
            "threads": 1,
            "cpus": 0.5,
            "max_in_flight": 6,
            "deadline_s": 600,
            "autoscaling": {
                "min_replicas": 0,
                "initial_replicas": 0,
                "max_replicas": 2,
                "target_ongoing_requests": 2,
                "max_ongoing_requests": 3,
                "max_queued_requests": 2,
                "upscale_delay_s": 0.5,
                # Serve starts this many at once from none.
                "upscaling_factor": 1,
                # Longer than a client backs off from a full queue.
                "downscale_delay_s": 15,
            },
        },
        # The same model and settings: it must not become a second application.
        "judges": {"heldout": {"max_attempts": 9}},
    }
)
RATING = {
    "type": "object",
    "properties": {"rating": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["rating"],
    "additionalProperties": False,
}
PAIRS = [
    (f"Record {i} describes the file at its path and the time of the request.", explanation)
    for i in range(24)
    for explanation in EXPLANATIONS
]
# Verdicts of an undisturbed judge, by pair; every disturbed one must equal them.
KNOWN: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="module")
def pool(ray_session: None) -> Iterator[JudgePool]:
    made = JudgePool(RUN, keep_serve=True)
    try:
        made.start()
        assert made.ready(120), made.status()
        yield made
    finally:
        made.shutdown()


def client_of(pool: JudgePool, **changes: Any) -> JudgeClient:
    cfg = RUN.judge.model_copy(update=changes)
    return JudgeClient(pool.apps["scorer"].handle(), cfg)


def balanced(client: JudgeClient) -> bool:
    c = client.counters
    return c.submitted == c.done + c.failed + c.running and c.running >= 0


async def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not await asyncio.to_thread(condition):
        assert time.monotonic() - started < seconds, f"waited {seconds:g} s for {what}"
        await asyncio.sleep(0.25)
    return time.monotonic() - started


def replicas(pool: JudgePool) -> int:
    return int(pool.status()["scorer"]["running"])


def test_roles_with_the_same_settings_share_one_application_that_starts_without_a_replica(pool: JudgePool) -> None:
    apps = pool.apps
    assert apps["scorer"] is apps["explainer"] is apps["heldout"]
    assert {state["application"] for state in pool.status().values()} == {"sae-ray-judge-pool"}
    assert replicas(pool) == 0


def test_the_first_call_wakes_one_replica_that_answers_it(pool: JudgePool) -> None:
    async def ask() -> JudgeClient:
        # As many calls as one replica is to have.
        client = client_of(pool, max_in_flight=2)
        verdicts = await client.score(PAIRS, "likelihood")
        assert all(v is not None for v in verdicts)
        KNOWN.update((pair, v) for pair, v in zip(PAIRS, verdicts, strict=True) if v is not None)
        return client

    client = asyncio.run(ask())
    c = client.counters
    readings = (len(PAIRS) // len(EXPLANATIONS) + 1) * len(EXPLANATIONS)
    assert (c.submitted, c.done, c.failed, c.running) == (readings, readings, 0, 0)
    assert c.queued == c.open_calls == 0
    assert replicas(pool) == 1


def test_answers_held_to_a_schema_are_valid_json(pool: JudgePool) -> None:
    async def ask() -> list[list[str] | None]:
        prompts = [f"Rate from 1 to 5 how clear this is: {text}" for text in ("cats", "a b c", "matrix products")]
        return await client_of(pool).generate(prompts, max_tokens=24, n=2, chat=True, seed=0, schema=RATING)

    answers = asyncio.run(ask())
    ratings = [json.loads(text) for each in answers for text in (each or [])]
    assert len(ratings) == 6
    assert all(set(r) == {"rating"} and r["rating"] in range(1, 6) for r in ratings)


def test_a_schema_the_engine_cannot_hold_is_missing_at_once_and_says_why(pool: JudgePool) -> None:
    async def ask() -> JudgeClient:
        client = client_of(pool)
        assert await client.generate(["x"], schema={"type": "no such type"}) == [None]
        return client

    client = asyncio.run(ask())
    assert (client.counters.failed, client.counters.retries) == (1, 0)
    assert client.last_error


def test_a_second_run_pays_for_no_verdict_again(pool: JudgePool, tmp_path: Path) -> None:
    pairs = [(text.replace("Record", "Entry"), explanation) for text, explanation in PAIRS[:12]]

    async def ask() -> tuple[list[float | None], dict[str, float]]:
        with VerdictCache(tmp_path) as cache:
            client = pool.clients(cache)["scorer"]
            return await client.score(pairs, "likelihood"), client.statistics()

    first, paid = asyncio.run(ask())
    again, free = asyncio.run(ask())
    assert first == again
    assert paid["disk_hits"] == 0
    assert free["calls"] == free["prompt_tokens"] == 0
    assert free["disk_hits"] == paid["done"] == 4 * len(EXPLANATIONS)


def test_an_engine_that_hangs_gives_missing_verdicts_and_no_slot_is_lost(pool: JudgePool) -> None:
    """Stops every engine process, as a driver that waits for a GPU would, and lets them go on."""
    engines = engine_processes()

    async def ask() -> tuple[list[float | None], list[float | None], JudgeClient, JudgeClient]:
        hasty, patient = (client_of(pool, max_in_flight=2, deadline_s=seconds) for seconds in (4.0, 600.0))
        for process in engines:
            process.suspend()
        try:
            missing = await hasty.score(PAIRS, "likelihood")
        finally:
            for process in engines:
                process.resume()
        return missing, await patient.score(PAIRS, "likelihood"), hasty, patient

    assert engines
    missing, verdicts, hasty, patient = asyncio.run(ask())
    assert missing == [None] * len(PAIRS)
    assert hasty.counters.failed == hasty.counters.submitted > 0
    assert (hasty.counters.queued, hasty.counters.open_calls, hasty.counters.running) == (0, 0, 0)
    assert "no answer within 4 s" in (hasty.last_error or "")
    assert_as_known(PAIRS, verdicts)
    assert patient.counters.failed == 0


def test_load_brings_a_second_replica_and_the_death_of_one_mid_batch_changes_no_verdict(pool: JudgePool) -> None:
    """1 -> 2 replicas with the queues full all along, then one is killed with calls in it."""

    async def ask() -> tuple[JudgeClient, list[float | None], float]:
        client, verdicts, going = client_of(pool), list[float | None](), True

        async def work() -> None:
            while going:
                verdicts.extend(await client.score(PAIRS, "likelihood", use_cache=False))

        workers = [asyncio.ensure_future(work()) for _ in range(3)]
        try:
            took = await until(lambda: replicas(pool) == 2, 240, "a second replica")
            answered = client.counters.done
            await until(lambda: client.counters.done > answered + 64, 60, "answers of both replicas")
            victim = replica_processes()[0]
            children = engine_processes(victim)
            victim.send_signal(signal.SIGKILL)
            await until(lambda: client.counters.retries > 0, 60, "a call to be asked again")
            assert balanced(client)
        finally:
            going = False
            await asyncio.gather(*workers)
        assert not psutil.wait_procs(children, timeout=20)[1], "the dead replica's engine lives on"
        return client, verdicts, took

    client, verdicts, took = asyncio.run(ask())
    c, share, stepping = client.counters, client.busy.value, client.busy.stepping
    print(f"1 -> 2 replicas in {took:.0f} s; {client.statistics()}")
    assert_as_known(PAIRS * (len(verdicts) // len(PAIRS)), verdicts)
    assert (c.failed, c.running, c.queued, c.open_calls) == (0, 0, 0, 0)
    assert c.done == c.submitted
    assert c.back_pressure > 0, "six calls for at most three that run and two that wait"
    assert share is not None
    assert 0.5 < share <= 1
    assert stepping is not None
    # A step is counted when it ends, so the first of a window may have begun before it.
    assert 0.2 < stepping < share + 0.1


def test_without_work_the_pool_returns_to_no_replica_and_no_process(pool: JudgePool) -> None:
    # The session's shared judge has an engine too, which stays.
    mine = [engine for replica in replica_processes() for engine in engine_processes(replica)]
    assert mine

    def gone() -> bool:
        return replicas(pool) == 0 and not any(engine.is_running() for engine in mine)

    async def wait() -> float:
        return await until(gone, 90, "no replica")

    print(f"back to 0 replicas in {asyncio.run(wait()):.0f} s")
    assert pool.status()["scorer"]["state"] == "RUNNING", "the application stays, ready to scale up again"


def assert_as_known(pairs: list[tuple[str, str]], verdicts: list[float | None]) -> None:
    for pair, verdict in zip(pairs, verdicts, strict=True):
        assert verdict is not None
        assert math.isclose(verdict, KNOWN[pair], abs_tol=2e-3), pair


def replica_processes() -> list[psutil.Process]:
    """Replica actors that have an engine of their own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::ServeReplica:sae-ray-judge-pool:"):
                found.append(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return [process for process in found if engine_processes(process)]


def engine_processes(of: psutil.Process | None = None) -> list[psutil.Process]:
    """vLLM's engine and worker processes below this process (they rename themselves)."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            if process.name().startswith("VLLM::"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
