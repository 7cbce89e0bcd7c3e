"""The endpoint client against vLLM's own OpenAI-compatible server: the same model, asked by HTTP, is the same judge.

And a whole run whose judge is that server, evaluated by a held-out judge that the session serves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import serve
from runs import finish, start, train, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray.config import JudgeConfig
from sae_ray.embedded import resolve_model
from sae_ray.errors import UserError
from sae_ray.judge.deploy import JudgeApp, llm_config, replica_env
from sae_ray.judge.endpoint import EndpointClient
from sae_ray.judge.modes import needed, verdict
from sae_ray.judge.prompts import PROMPT_VERSION, explanation_continuation, likelihood_prompt
from sae_ray.judge.roles import DECIDED, FIXED
from sae_ray.reward.bank import VerdictBank
from sae_ray.storage import LocalStorage
from sae_ray.telemetry import read_jsonl

pytestmark = pytest.mark.timeout(900)
PATIENCE_S = 600  # a machine may be busy with something else
TEXTS = [
    "Opens the file at the given path and returns its contents as a string.",
    "Send a GET request to the url and return the response with its status code and headers.",
    'naïve “quotes” — 漢字 and 🙂 in one "text"',
]
EXPLANATIONS = ["file paths", "HTTP requests, url, response", "unit tests", "words of café menus"]
PAIRS = [(text, explanation) for text in TEXTS for explanation in EXPLANATIONS]
RATING = {
    "type": "object",
    "properties": {"rating": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["rating"],
    "additionalProperties": False,
}
KEY = "key-of-this-test"
LOOP: dict[str, Any] = {
    "trainer": {"steps": 24, "checkpoint_every": 50},
    "rlaif": {
        "enabled": True, "steps": 8, "rounds": 2, "max_staleness_steps": 2, "latents": 4, "evidence_blocks": 24,
        "positives": 4, "near_misses": 2, "siblings": 2, "randoms": 2, "explainer_examples": 3, "candidates": 1,
        "max_context_share": 0.9,
    },
    "evaluation": {"blocks": 12, "ce_sequences": 2, "latents": 4, "positives": 4, "negatives": 3,
                   "random_directions": 2, "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeConfig]:
    """A judge section that names a server started here: SmolLM2 in float32, behind a key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        resolve_model("smollm2-135m-instruct"),
    ]
    command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager"]
    command += ["--max-num-seqs", "32", "--enable-prompt-tokens-details", "--api-key", KEY]
    # Its own session: what it leaves behind is found and ended with it.
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | replica_env(JudgeConfig()), stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        os.environ["SAE_RAY_TEST_KEY"] = KEY
        yield JudgeConfig(endpoint=f"http://127.0.0.1:{port}/v1", api_key_env="SAE_RAY_TEST_KEY")
    finally:
        os.environ.pop("SAE_RAY_TEST_KEY", None)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server after {PATIENCE_S} s: {log.read_text()[-3000:]}")


class Plain:
    """Readings by a plain transformers forward of the text prompt, without filler tokens."""

    def __init__(self) -> None:
        folder = resolve_model("smollm2-135m-instruct")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def reading(self, text: str, explanation: str) -> tuple[float, int]:
        prompt = self.tokenizer.encode("".join(likelihood_prompt(text)))
        continuation = self.tokenizer.encode(explanation_continuation(explanation))
        logits_SV = self.model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        value = sum(float(logits_SV[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation))
        return value, len(continuation)


def ask(cfg: JudgeConfig, question: Any) -> Any:
    async def run() -> Any:
        client = EndpointClient(cfg)
        try:
            return await question(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def test_likelihood_verdicts_equal_a_plain_forward_of_the_same_model(server: JudgeConfig) -> None:
    plain = Plain()
    readings = {pair: plain.reading(*pair) for pair in needed(PAIRS, "likelihood")}
    expected = [verdict(*pair, "likelihood", readings) for pair in PAIRS]

    async def question(client: EndpointClient) -> Any:
        assert await client.modes() == ("likelihood", "yes_no")
        return await client.score(PAIRS, "likelihood"), client.counters

    verdicts, counters = ask(server, question)
    assert verdicts == pytest.approx(expected, abs=1e-3)
    assert (counters.failed, counters.unreadable, counters.retries) == (0, 0, 0)
    assert counters.prompt_tokens > 0


def test_yes_no_answers_and_answers_held_to_a_schema(server: JudgeConfig) -> None:
    async def question(client: EndpointClient) -> Any:
        prompts = [f"Rate from 1 to 5 how clear this is: {text}" for text in ("cats", "matrix products")]
        ratings = await client.generate(prompts, max_tokens=32, n=2, chat=True, seed=0, schema=RATING)
        return await client.score(PAIRS[:4], "yes_no"), ratings, await client.generate(["word " * 600])

    verdicts, ratings, too_long = ask(server, question)
    assert all(v is not None and abs(v) < 50 for v in verdicts)
    read = [json.loads(text)["rating"] for each in ratings for text in each]
    assert len(read) == 4
    assert all(rating in range(1, 6) for rating in read)
    assert too_long == [[]]


def test_a_wrong_key_or_model_is_the_users_to_put_right(server: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_model = server.model_copy(update={"endpoint_model": "large"})
    with pytest.raises(UserError, match=r"judge\.endpoint .*judge\.endpoint_model \(large\)"):
        ask(wrong_model, lambda client: client.score(PAIRS[:1], "likelihood"))
    monkeypatch.setenv("SAE_RAY_TEST_KEY", "not-the-key")
    with pytest.raises(UserError, match=r"refuses the key of judge\.api_key_env") as error:
        ask(server, lambda client: client.score(PAIRS[:1], "likelihood"))
    assert "not-the-key" not in str(error.value)


def test_a_text_beyond_the_context_is_missing_and_others_are_not(server: JudgeConfig) -> None:
    pairs = [("word " * 600, "file paths"), PAIRS[0]]
    long, short = ask(server, lambda client: client.score(pairs, "likelihood"))
    assert long is None
    assert short is not None


def test_every_argument_is_one_that_vllm_and_serve_know() -> None:
    """The whole configuration, with every optional part of it, passes Ray Serve LLM's and vLLM's own checks."""
    from ray.serve.llm import LLMConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    cfg = JudgeConfig(
        quantization="fp8",
        lora={"terse": "some/adapter"},
        adapter="terse",
        s3_mirror="s3://models/judge",
        engine_kwargs={"kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.5},
        gpus=1,
    )
    made = LLMConfig(**llm_config(cfg))
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(made.engine_kwargs) <= known
    assert set(DECIDED) | set(FIXED) <= known
    assert made.model_loading_config.model_source.bucket_uri == "s3://models/judge"


@pytest.mark.timeout(2400)
def test_a_run_is_taught_by_a_server_elsewhere_and_evaluated_by_a_held_out_judge(
    judge_app: JudgeApp, server: JudgeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's workers were started without this variable: the run has to hand the key on.
    monkeypatch.setenv("SAE_RAY_RUN_KEY", KEY)
    address = {"address": ray.get_runtime_context().gcs_address}
    judge = {
        "endpoint": server.endpoint,
        "api_key_env": "SAE_RAY_RUN_KEY",
        "model": "no-such/model",
        "mode": "likelihood",
        "calibration": {"concepts": 8},
    }
    judges = {"heldout": {"app": judge_app.name, "endpoint": None, "model": "smollm2-135m-instruct"}}
    applications = set(serve.status().applications)
    printed = train(
        write_config(tmp_path, name="elsewhere", ray=address, judge=judge, judges=judges, **LOOP), timeout=900
    )
    assert set(serve.status().applications) == applications == {judge_app.name}

    run = tmp_path / "runs" / "elsewhere"
    events = read_jsonl(run / "events.jsonl")
    (calibration,) = (event for event in events if event["event"] == "calibration")
    assert (calibration["judge"], calibration["mode"]) == ("small", "likelihood")
    rounds = [event for event in events if event["event"] == "rewards_applied"]
    assert [event["round"] for event in rounds] == [0, 1]
    assert all(event["verdicts"] > 0 and event["missing"] == 0 for event in rounds)
    assert rounds[0]["drift"] is None
    assert rounds[1]["drift"]["status"] == "ok"
    assert rounds[1]["drift"]["answered"] >= 8
    rows = VerdictBank(LocalStorage(run)).read()
    assert {(row["judge"], row["prompt_version"]) for row in rows} == {("small", PROMPT_VERSION)}
    assert any(row["explainer"] == "llm" for row in rows), "the server wrote explanations"

    evaluated = json.loads((run / "evaluation.json").read_text())
    held = json.loads((run / "calibration-heldout.json").read_text())
    assert evaluated["judge"] == {
        "model": "smollm2-135m-instruct", "role": "heldout", "mode": held["mode"], "auroc": held["auroc"],
    }  # fmt: skip
    assert "held-out judge smollm2-135m-instruct" in " ".join(printed.split())
    assert all(KEY.encode() not in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_a_server_that_is_not_there_is_one_line_before_a_cluster(tmp_path: Path) -> None:
    judge = {"endpoint": "http://127.0.0.1:1/v1"}
    code, out, err = finish(start(write_config(tmp_path, name="nowhere", judge=judge, **LOOP)), timeout=120)
    assert code == 2, out + err
    assert "judge.endpoint http://127.0.0.1:1/v1: cannot be asked" in err
    assert len(err.strip().splitlines()) == 1, err
    assert "starting" not in out
