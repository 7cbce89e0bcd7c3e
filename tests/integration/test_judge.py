"""The judge on real Ray Serve LLM and vLLM: its numbers, its cache, and what happens when a replica is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray.config import JudgeConfig
from sae_ray.embedded import resolve_model
from sae_ray.judge.calibration import calibrate
from sae_ray.judge.client import JudgeClient
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.explainer import STOP, explanation_prompt, parse_explanation
from sae_ray.judge.planting import plant_items
from sae_ray.judge.prompts import explanation_continuation, likelihood_prompt
from sae_ray.judge.reading import Reader

pytestmark = pytest.mark.timeout(600)
# Nats per token: the judge computes in its own dtype, the reference in float32.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.25}
EXPLANATIONS = ["file paths", "HTTP requests, url, response", "matrix multiplication", "unit tests"]
TEXTS = [
    "Opens the file at the given path and returns its contents as a string.",
    "Send a GET request to the url and return the response with its status code and headers.",
    "",
]


class Reference:
    """log p(explanation | text) by one plain transformers forward in float32."""

    def __init__(self, name: str, block_size: int) -> None:
        folder = resolve_model(name)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.reader = Reader(engine=None, tokenizer=self.tokenizer, block_size=block_size, max_tokens=4096)  # type: ignore[arg-type]

    @torch.inference_mode()
    def logprob(self, text: str, explanation: str) -> float:
        prompt, continuation = self.reader.likelihood_tokens(text, explanation)
        logits_SV = self.model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        return sum(float(logits_SV[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation))

    def prompt_tokens(self, text: str) -> int:
        """Without the filler."""
        return sum(len(self.tokenizer.encode(part)) for part in likelihood_prompt(text))


@pytest.fixture(scope="module")
def described(judge_app: JudgeApp, judge_config: JudgeConfig) -> dict[str, Any]:
    return asyncio.run(JudgeClient(judge_app.handle(), judge_config).describe())


@pytest.fixture(scope="module")
def reference(judge_config: JudgeConfig, described: dict[str, Any]) -> Reference:
    return Reference(judge_config.model, described["block_size"])


async def raw(app: JudgeApp, items: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """Past the client: readings as the replica computes them, with no cache of ours in between."""
    return await app.handle().options(method_name="read").remote(uuid.uuid4().hex, items, "likelihood")


def assert_agree(answer: dict[str, Any], items: list[tuple[str, list[str]]], ref: Reference, dtype: str) -> None:
    for (text, explanations), readings in zip(items, answer["readings"], strict=True):
        for explanation, reading in zip(explanations, readings, strict=True):
            value, tokens = reading
            assert tokens == len(ref.tokenizer.encode(explanation_continuation(explanation)))
            assert value == pytest.approx(ref.logprob(text, explanation), abs=TOLERANCE[dtype] * tokens), (
                text,
                explanation,
            )


def test_readings_equal_a_plain_forward_even_when_everything_is_in_the_engines_cache(
    judge_app: JudgeApp, described: dict[str, Any], reference: Reference
) -> None:
    items = [(text, EXPLANATIONS) for text in TEXTS]

    async def ask() -> list[dict[str, Any]]:
        return [await raw(judge_app, items) for _ in range(3)]

    answers = asyncio.run(ask())
    for answer in answers:
        assert_agree(answer, items, reference, described["dtype"])
    assert answers[2]["usage"]["cached_tokens"] > 0.7 * answers[2]["usage"]["prompt_tokens"]


def test_long_explanations_whose_boundary_falls_into_a_cached_block_are_read_right(
    judge_app: JudgeApp, described: dict[str, Any], reference: Reference
) -> None:
    long = "a list of words: " + ", ".join(f"number {i}" for i in range(25))
    items = [(TEXTS[0], [long, long + " and more"])]

    async def ask() -> list[dict[str, Any]]:
        return [await raw(judge_app, items) for _ in range(2)]

    first, second = asyncio.run(ask())
    assert_agree(first, items, reference, described["dtype"])
    assert_agree(second, items, reference, described["dtype"])
    assert second["usage"]["recomputed"] == 2, "vLLM had these positions in its cache; the test must exercise that"


def test_texts_that_end_on_every_offset_around_a_block_edge_are_read_right(
    judge_app: JudgeApp, described: dict[str, Any], reference: Reference
) -> None:
    block = described["block_size"]
    texts = ["path" + " file" * n for n in range(2 * block)]
    offsets = {text: reference.prompt_tokens(text) % block for text in texts}
    near_edge = [text for text, offset in offsets.items() if offset in (0, 1, 2, block - 1)]
    assert {offsets[text] for text in near_edge} == {0, 1, 2, block - 1}
    items = [(text, EXPLANATIONS[:2]) for text in near_edge]
    answer = asyncio.run(raw(judge_app, items))
    assert_agree(answer, items, reference, described["dtype"])
    assert answer["usage"]["recomputed"] == 0


def test_verdicts_favour_the_right_explanation_and_repeats_come_from_our_cache(
    judge_app: JudgeApp, judge_config: JudgeConfig
) -> None:
    pairs = [(text, explanation) for text in TEXTS[:2] for explanation in EXPLANATIONS[:2]]

    async def ask() -> tuple[list[float | None], list[float | None], int, JudgeClient]:
        client = JudgeClient(judge_app.handle(), judge_config)
        first = await client.score(pairs, "likelihood")
        calls = client.counters.calls
        return first, await client.score(pairs, "likelihood"), calls, client

    first, again, calls, client = asyncio.run(ask())
    assert first == again
    assert client.counters.calls == calls
    assert client.counters.cache_hits > 0
    file_file, file_http, http_file, http_http = first
    assert file_file > http_file
    assert http_http > file_http
    assert client.counters.failed == 0
    assert client.counters.done == client.counters.submitted


def test_yes_no_and_generation_answer_for_real(judge_app: JudgeApp, judge_config: JudgeConfig) -> None:
    contexts = [["Open", " the", " file", " at", " this", " path"], [" the", " path", " of", " a", " file"]]
    active = [[t.strip() in ("file", "path") for t in tokens] for tokens in contexts]
    prompt = explanation_prompt(contexts, active)

    async def ask() -> tuple[list[float | None], list[Any]]:
        client = JudgeClient(judge_app.handle(), judge_config)
        verdicts = await client.score([(text, EXPLANATIONS[0]) for text in TEXTS[:2]], "yes_no")
        return verdicts, await client.generate([prompt, prompt * 40], max_tokens=16, n=4, stop=STOP, seed=0)

    verdicts, (candidates, too_long) = asyncio.run(ask())
    assert all(v is not None and abs(v) < 50 for v in verdicts)
    assert len(candidates) == 4
    assert sum(parse_explanation(c) is not None for c in candidates) >= 2
    assert too_long == []


def test_seeded_generation_survives_more_prompt_tokens_than_fit_into_one_step(
    judge_app: JudgeApp, judge_config: JudgeConfig
) -> None:
    """vLLM's CPU engine died of a seeded request whose prompt it had cut in two."""
    prompts = [f"Prompt {i}. " + "The judge reads a long text about rivers and bridges. " * 50 for i in range(24)]

    async def work() -> list[list[str] | None]:
        client = JudgeClient(judge_app.handle(), judge_config)
        return await client.generate(prompts, max_tokens=4, n=2, seed=0)

    texts = asyncio.run(work())
    assert all(each is not None and len(each) == 2 for each in texts)


def test_calibration_on_the_installed_documentation_picks_likelihood(
    judge_app: JudgeApp, judge_config: JudgeConfig, reference: Reference
) -> None:
    documents = installed_documentation()
    setting = judge_config.calibration
    items = plant_items(documents, setting.concepts, setting.texts_per_concept, 32, reference.tokenizer, setting.seed)

    async def ask() -> Any:
        return await calibrate(JudgeClient(judge_app.handle(), judge_config), items, judge_config)

    found = asyncio.run(ask())
    print({mode: (each.auroc, each.seconds) for mode, each in found.modes.items()})
    assert found.mode == "likelihood"
    assert found.chosen.auroc.value > 0.7
    assert found.chosen.missing == 0
    assert found.modes["yes_no"].auroc.value < found.chosen.auroc.value


def test_a_killed_replica_costs_time_but_no_answer_and_leaves_no_process(
    judge_app: JudgeApp, judge_config: JudgeConfig, described: dict[str, Any]
) -> None:
    texts = [f"Record {i} describes the file at its path and the time of the request." for i in range(40)]
    pairs = [(text, explanation) for text in texts for explanation in EXPLANATIONS]
    patient = judge_config.model_copy(update={"deadline_s": 300.0})
    old = engine_processes(described["pid"])
    assert len(old) >= 2, "an engine core and a worker"

    async def ask() -> tuple[list[float | None], JudgeClient]:
        client = JudgeClient(judge_app.handle(), patient)
        asking = asyncio.ensure_future(client.score(pairs, "likelihood"))
        while client.counters.running == 0:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        os.kill(described["pid"], signal.SIGKILL)
        return await asking, client

    verdicts, client = asyncio.run(ask())
    assert all(v is not None for v in verdicts)
    counters = client.counters
    assert counters.retries > 0
    # 40 texts and no text, each with every explanation: every reading done once, none lost.
    readings = 41 * len(EXPLANATIONS)
    assert (counters.submitted, counters.done, counters.failed, counters.running) == (readings, readings, 0, 0)
    assert not alive(old)


# Last in this file: it needs a pool of its own, after the shared one has been exercised.
def test_shutdown_leaves_no_application_and_no_process(ray_session: None, judge_config: JudgeConfig) -> None:
    from ray import serve

    app = JudgeApp(judge_config, "short-lived")
    started = time.monotonic()
    app.start()
    assert time.monotonic() - started < 5, "start must not wait for vLLM"
    try:
        assert app.ready(judge_config.start_timeout_s)
        assert app.status()["running"] == 1
        described = asyncio.run(JudgeClient(app.handle(), judge_config).describe())
        left = [psutil.Process(described["pid"]), *engine_processes(described["pid"])]
        assert len(left) >= 3
    finally:
        app.shutdown()
    app.shutdown()
    assert not alive(left)
    assert app.name not in serve.status().applications


def engine_processes(replica_pid: int) -> list[psutil.Process]:
    """vLLM's engine and worker processes of a replica (they rename themselves)."""
    children = psutil.Process(replica_pid).children(recursive=True)
    return [process for process in children if process.name().startswith("VLLM::")]


def alive(processes: list[psutil.Process], wait_s: float = 15) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=wait_s)[1]


def installed_documentation() -> list[str]:
    """Docstrings of a few installed packages."""
    import ast
    from pathlib import Path

    import numpy
    import ray

    found = []
    for package in (torch, numpy, ray):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py"))[:700]:
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)):
                    found.append(doc)
    return [doc for doc in found if len(doc) > 200]
