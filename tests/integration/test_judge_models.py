"""Several models behind one pool: a second family out of a bucket, a LoRA adapter, and an engine that hangs for good.

Two applications of one replica each serve the whole file: SmolLM2 with an adapter (scorer and explainer share it), and
a tiny GPT-2 with a tokenizer of its own that is only in S3 (the held-out judge).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from s3_server import BUCKET, S3Server
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from sae_ray.config import RunConfig
from sae_ray.embedded import SMOLLM2, resolve_model
from sae_ray.judge.pool import JudgePool
from sae_ray.judge.reading import Reader

pytestmark = pytest.mark.timeout(400)
EXPLANATIONS = ["file paths", "HTTP requests, url, response", "matrix multiplication"]
TEXTS = ["Opens the file at the given path.", "Send a GET request to the url and return the response.", ""]
ITEMS = [(text, EXPLANATIONS) for text in TEXTS]
# Nats per token, both sides in float32.
TOLERANCE = 0.02
MIRROR = f"s3://{BUCKET}/models/tiny"
RANK, ALPHA = 4, 16
TARGETS = ("q_proj", "v_proj", "down_proj")


def tiny_gpt2(folder: Path) -> None:
    """Random weights, one token per byte: nothing that SmolLM2 could be taken for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=128,
        n_layer=2,
        n_head=2,
        # Large enough for readings to tell explanations apart.
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lora_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Writes an adapter of SmolLM2 in PEFT's format; returns what it adds to each weight, by the weight's name."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(SMOLLM2), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    stored: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            out, into = module.weight.shape
            a_RI = torch.randn(RANK, into, generator=generator) / into**0.5
            b_OR = torch.randn(out, RANK, generator=generator) * 0.02
            stored[f"base_model.model.{name}.lora_A.weight"] = a_RI
            stored[f"base_model.model.{name}.lora_B.weight"] = b_OR
            added[f"{name}.weight"] = ALPHA / RANK * b_OR @ a_RI
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": SMOLLM2,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


class Pool:
    """The pool and what its models are made of."""

    def __init__(self, tmp: Path, server: S3Server) -> None:
        self.tiny = tmp / "tiny"
        tiny_gpt2(self.tiny)
        for file in self.tiny.iterdir():
            server.client.upload_file(str(file), BUCKET, f"models/tiny/{file.name}")
        self.added = lora_adapter(tmp / "tilt")
        heldout = {
            # Named, never there: the weights can only have come from the bucket.
            "model": "nobody/tiny",
            "s3_mirror": MIRROR,
            "lora": {},
            "stall_timeout_s": 3,
        }
        self.config = RunConfig.model_validate(
            {
                "name": "models",
                "hook": {"layer": 1},
                "judge": {
                    "dtype": "float32",
                    "kv_cache_gb": 0.25,
                    "max_model_len": 512,
                    "threads": 1,
                    "cpus": 0.5,
                    "deadline_s": 300,
                    "lora": {"tilt": str(tmp / "tilt")},
                },
                "judges": {"explainer": {"adapter": "tilt"}, "heldout": heldout},
            }
        )
        self.judges = JudgePool(self.config, keep_serve=True)
        self._base: list[tuple[float, int]] = []

    def read(self, role: str, items: list[tuple[str, list[str]]] = ITEMS) -> list[float]:
        """Readings as a client of this role gets them, past its memory; one call per text, in order."""

        async def ask() -> list[float]:
            client = self.judges.clients()[role]  # type: ignore[index]
            found = []
            for item in items:
                answer = await client._send_read(f"{role}-{item[0]}-{time.monotonic()}", [item], "likelihood")
                found += [value for value, _ in answer["readings"][0]]
            return found

        return asyncio.run(ask())

    def base(self, block_size: int) -> list[tuple[float, int]]:
        """SmolLM2 without the adapter, by transformers; computed once."""
        self._base = self._base or plain(resolve_model(SMOLLM2), block_size)
        return self._base

    def describe(self, role: str) -> dict[str, Any]:
        return asyncio.run(self.judges.clients()[role].describe())  # type: ignore[index]


@pytest.fixture(scope="module")
def pool(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    tmp = tmp_path_factory.mktemp("judges")
    server = S3Server()
    with pytest.MonkeyPatch.context() as patched:
        # Where the server is; the credentials are those that this Ray was started with (conftest.py).
        for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
            patched.setenv(name, server.settings[name])
        patched.setenv("HF_HOME", str(tmp / "hf"))
        made = Pool(tmp, server)
        try:
            made.judges.start()
            assert made.judges.ready(300), made.judges.status()
            yield made
        finally:
            made.judges.shutdown()
            server.stop()


@torch.inference_mode()
def plain(folder: str | Path, block_size: int, added: dict[str, torch.Tensor] | None = None) -> list[tuple[float, int]]:
    """(log p(explanation | text), tokens) by transformers alone, with `added` merged into the weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())
    for name, change in (added or {}).items():
        weights[name] += change
    reader = Reader(engine=None, tokenizer=tokenizer, block_size=block_size, max_tokens=512)  # type: ignore[arg-type]
    found = []
    for text, explanations in ITEMS:
        for explanation in explanations:
            prompt, continuation = reader.likelihood_tokens(text, explanation)
            logits_SV = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
            picked = [float(logits_SV[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation)]
            found.append((sum(picked), len(picked)))
    return found


def assert_agree(readings: list[float], expected: list[tuple[float, int]]) -> None:
    for reading, (value, tokens) in zip(readings, expected, strict=True):
        assert reading == pytest.approx(value, abs=TOLERANCE * tokens)


def furthest(readings: list[float], expected: list[tuple[float, int]]) -> float:
    """Nats per token between the two, at the pair where they differ most."""
    return max(abs(reading - value) / tokens for reading, (value, tokens) in zip(readings, expected, strict=True))


def test_two_families_serve_at_once_and_each_answers_as_itself(pool: Pool) -> None:
    apps = pool.judges.apps
    assert apps["scorer"] is apps["explainer"], "an adapter is no application of its own"
    assert apps["heldout"] is not apps["scorer"]
    states = pool.judges.status()
    assert {role: (state["state"], state["running"]) for role, state in states.items()} == dict.fromkeys(
        ("scorer", "explainer", "heldout"), ("RUNNING", 1)
    )
    scorer, heldout = pool.describe("scorer"), pool.describe("heldout")
    assert scorer["pid"] != heldout["pid"]
    assert (scorer["chat_template"], heldout["chat_template"]) == (True, False)
    assert scorer["adapters"] == ["tilt"]
    assert_agree(pool.read("scorer"), pool.base(scorer["block_size"]))
    assert_agree(pool.read("heldout"), plain(pool.tiny, heldout["block_size"]))


def test_an_adapter_reads_as_the_merged_weights_do_and_leaves_the_base_alone(pool: Pool) -> None:
    """The two in turn on the same texts: a KV cache that they shared would show."""
    block = pool.describe("scorer")["block_size"]
    base = pool.base(block)
    merged = plain(resolve_model(SMOLLM2), block, pool.added)
    for _ in range(2):
        adapted, plainly = pool.read("explainer"), pool.read("scorer")
        assert_agree(adapted, merged)
        assert_agree(plainly, base)
        assert furthest(adapted, base) > 10 * TOLERANCE, "the adapter must change the readings for this to prove it"


def test_the_replica_took_its_weights_out_of_the_bucket(pool: Pool) -> None:
    served = Path(pool.describe("heldout")["model"])
    assert served.is_dir()
    assert Path(os.environ["HF_HOME"]) in served.parents
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (served / file).read_bytes() == (pool.tiny / file).read_bytes()


def test_the_engines_steps_are_timed_and_take_no_longer_than_its_requests(pool: Pool) -> None:
    before = pool.describe("scorer")
    pool.read("scorer", [(f"Text number {i} about files.", EXPLANATIONS) for i in range(4)])
    after = pool.describe("scorer")
    spent = {name: after[name] - before[name] for name in ("up_seconds", "busy_seconds", "step_seconds", "steps")}
    print(spent)
    # Each text is read in two steps at least: its first explanation goes alone.
    assert spent["steps"] >= 8
    assert 0.3 * spent["busy_seconds"] < spent["step_seconds"] <= spent["busy_seconds"] <= spent["up_seconds"]


def test_a_replica_whose_engine_hangs_is_replaced_and_the_call_answered_once(pool: Pool) -> None:
    """Stops the held-out judge's worker for good, as a device that does not come back would."""
    known = pool.read("heldout")
    before = pool.describe("heldout")
    engines = [psutil.Process(pid) for pid in before["engine_pids"]]
    tree = [*engines, *(child for engine in engines for child in engine.children(recursive=True))]
    workers = [process for process in tree if process.name().startswith("VLLM::Worker")]
    assert workers

    async def ask() -> tuple[list[float | None], Any]:
        client = pool.judges.clients()["heldout"]
        for process in workers:
            process.send_signal(signal.SIGSTOP)
        pairs = [(text, explanation) for text, explanations in ITEMS for explanation in explanations]
        return await client.score(pairs, "likelihood"), client

    began = time.monotonic()
    verdicts, client = asyncio.run(ask())
    took = time.monotonic() - began
    c = client.counters
    print(f"answered after {took:.0f} s; {client.statistics()}; {client.last_error}")
    assert None not in verdicts
    assert pool.read("heldout") == pytest.approx(known, abs=2e-3)
    assert c.retries >= 1
    assert (c.submitted, c.done, c.failed, c.running, c.open_calls) == (9, 9, 0, 0, 0)
    after = pool.describe("heldout")
    assert after["replica"] != before["replica"]
    assert not psutil.wait_procs(tree, timeout=20)[1], "the hanging engine lives on"
    assert pool.describe("scorer")["running"] == 0, "the other judge was not touched"
