"""What runs in a judge replica: a thin `LLMServer` that answers batches of verdicts and generations.

Ray Serve LLM brings the vLLM engine up, checks its health and restarts the replica; this adds three methods that a
`DeploymentHandle` calls. A verdict needs engine parameters that the OpenAI endpoints do not offer (reading the prefix
cache together with prompt log-probabilities), so they go to vLLM's `AsyncLLM` directly, and an engine error is raised
here rather than yielded as an `ErrorResponse`.

Only replicas and the deploying task import this module: it brings in `ray.serve.llm` and with it vLLM.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm.deployment import LLMServer
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.metrics.loggers import StatLoggerBase

from sae_ray.embedded import resolve_model
from sae_ray.judge.adapters import adapter_folders, engine_room
from sae_ray.judge.deploy import SETTINGS_VARIABLE, check_mirrored
from sae_ray.judge.metrics import BusyClock, StepClock
from sae_ray.judge.prompts import Mode
from sae_ray.judge.reading import Placeholder, Reader, Usage
from sae_ray.judge.reaper import start_reaper

# Finished answers kept for a caller that asks again with the same request id (its connection broke, not the work).
_KEPT_ANSWERS = 256
# Work that nobody waits for any more goes on for this long, for a caller whose connection broke to ask again.
_ABANDONED_S = 15.0


class LocalModel(CallbackBase):
    """Skips Ray Serve LLM's download task for a model that is a folder: it would only import vLLM again.

    What the task fetches from a bucket is looked at before the engine is started with it.
    """

    async def on_before_node_init(self) -> None:
        loading: Any = self.llm_config.model_loading_config
        if isinstance(loading.model_source, str) and os.path.isdir(loading.model_source):
            self.ctx.run_init_node = False

    async def on_after_node_init(self) -> None:
        config: Any = self.llm_config.get_engine_config()
        if config.mirror_config is not None and config.mirror_config.bucket_uri:
            check_mirrored(config.mirror_config.bucket_uri, config.actual_hf_model_id)


def cpu_dtype() -> str:
    """bfloat16 where this machine multiplies it natively (measured: about twice the verdicts), else float32."""
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


class _VLLM:
    """`reading.Engine` over `AsyncLLM`: fresh SamplingParams and id per request, one whole output for each."""

    def __init__(self, client: Any, clock: BusyClock, adapter: LoRARequest | None = None) -> None:
        self._client = client
        self._clock = clock
        self._adapter = adapter

    async def run(self, prompt_ids: Sequence[int], **sampling: Any) -> Any:
        # FINAL_ONLY: with n > 1 the cumulative outputs come one sample at a time, and the last has one sample only.
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        last = None
        prompt = {"prompt_token_ids": list(prompt_ids)}
        with self._clock.request():
            try:
                async for output in self._client.generate(prompt, params, uuid.uuid4().hex, lora_request=self._adapter):
                    last = output
            except VLLMClientError as error:
                # The request is at fault, not the replica; callers know that by the type, and have no vLLM to unpickle.
                raise ValueError(str(error)) from None
        return last


class _StepTimes(StatLoggerBase):
    """A vLLM stat logger that keeps one number of each engine step and exports nothing."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        details = getattr(scheduler_stats, "iteration_details", None)
        if details is not None:
            self._clock.add(details.elapsed_ms)

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""


class JudgeServer(LLMServer):
    """Answers `read` and `generate`, each a batch per call, idempotent by request id."""

    async def __init__(self, llm_config: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        # Here and not in the driver: the embedded model's folder is made on the machine that serves it.
        source = llm_config.model_loading_config
        if isinstance(source.model_source, str):
            source.model_source = resolve_model(source.model_source, "judge.model")
        if llm_config.accelerator_config.kind == "cpu" and llm_config.engine_kwargs["dtype"] == "auto":
            llm_config.engine_kwargs["dtype"] = cpu_dtype()
        settings = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
        if lora := adapter_folders(settings.get("lora", {})):
            room = engine_room(lora)
            room["max_lora_rank"] = max(room["max_lora_rank"], llm_config.engine_kwargs["max_lora_rank"])
            llm_config.engine_kwargs.update(room)
        llm_config._engine_config = None
        self._answers: OrderedDict[str, asyncio.Task[dict[str, Any]]] = OrderedDict()
        self._waiters: dict[asyncio.Task[dict[str, Any]], int] = {}
        self._stall_timeout_s = float(settings.get("stall_timeout_s", float("inf")))
        self._adapters = {
            # vLLM tells adapters apart by number.
            name: LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
            for number, (name, path) in enumerate(lora.items(), start=1)
        }
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._reaper = start_reaper()
        await super().__init__(llm_config, **kwargs)
        engine: Any = self.engine
        self._client = engine._engine_client
        self._reaper.watch([child.pid for child in multiprocessing.active_children() if child.pid])
        self._clock, self._steps = BusyClock(), StepClock()
        # Instead of vLLM's Prometheus logger, which keeps histograms of every request: nobody scrapes a replica.
        if self._client.logger_manager is not None:
            self._client.logger_manager.stat_loggers = [_StepTimes(self._steps)]

    def _engine(self, adapter: str | None) -> _VLLM:
        return _VLLM(self._client, self._clock, None if adapter is None else self._adapters[adapter])

    def _reader(self, adapter: str | None) -> Reader:
        config = self._client.vllm_config
        return Reader(
            engine=self._engine(adapter),
            tokenizer=self._client.get_tokenizer(),
            block_size=config.cache_config.block_size,
            max_tokens=config.model_config.max_model_len,
        )

    async def read(
        self, request_id: str, items: list[tuple[str, list[str]]], mode: Mode, adapter: str | None = None
    ) -> dict[str, Any]:
        """Readings of several texts, each with its own explanations; `adapter` names one of `judge.lora`.

        Returns:
            `readings`: per item a list of (value in nats, tokens) or None, in the order asked; `usage`, whose
            `unreadable` counts those that the engine had no number for; `engine`, see `_report`.
        """

        async def work() -> dict[str, Any]:
            reader = self._reader(adapter)
            unreadable = 0

            async def one(text: str, explanations: list[str]) -> list[Any]:
                nonlocal unreadable
                try:
                    return await reader.read(text, explanations, mode)
                except Placeholder:  # asked again without the cache, the engine still gave none
                    unreadable += len(explanations)
                    return [None] * len(explanations)

            answers = await asyncio.gather(*(one(text, each) for text, each in items))
            readings = [[None if r is None else (r.value, r.tokens) for r in answer] for answer in answers]
            usage = {**asdict(reader.usage), "unreadable": unreadable}
            return {"readings": readings, "usage": usage, "engine": self._report()}

        return await self._once(request_id, work)

    async def generate(
        self,
        request_id: str,
        prompts: list[str],
        max_tokens: int,
        n: int,
        temperature: float,
        top_p: float,
        stop: list[str],
        seed: int | None,
        chat: bool,
        schema: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> dict[str, Any]:
        """`n` sampled continuations per prompt; `chat` wraps each prompt as a user message where a template exists.

        `schema` is a JSON schema that the engine's sampling is held to.

        Returns:
            `texts`: per prompt a list of n strings, or an empty list where the prompt does not fit; `usage`; `engine`.
        """

        async def work() -> dict[str, Any]:
            tokenizer, usage, engine = self._client.get_tokenizer(), Usage(), self._engine(adapter)
            room = self._client.vllm_config.model_config.max_model_len - max_tokens

            async def one(index: int, prompt: str) -> list[str]:
                if chat and tokenizer.chat_template:
                    message = [{"role": "user", "content": prompt}]
                    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                    ids = tokenizer.encode(text, add_special_tokens=False)
                else:
                    ids = tokenizer.encode(prompt)
                if not ids or len(ids) > room:
                    return []
                # Free whitespace lets a small model fill its tokens with blanks before the first value.
                held = StructuredOutputsParams(json=schema, disable_any_whitespace=True) if schema else None
                output = await engine.run(
                    ids,
                    max_tokens=max_tokens,
                    n=n,
                    temperature=temperature,
                    top_p=top_p,
                    stop=stop,
                    seed=None if seed is None else seed + index,
                    structured_outputs=held,
                )
                usage.add(output)
                return [choice.text for choice in output.outputs]

            texts = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
            return {"texts": texts, "usage": asdict(usage), "engine": self._report()}

        return await self._once(request_id, work)

    async def describe(self) -> dict[str, Any]:
        """What answers: model folder or id, dtype, block size, adapters, process ids, and the engine's busy time."""
        config = self._client.vllm_config
        return {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": config.cache_config.block_size,
            "chat_template": bool(self._client.get_tokenizer().chat_template),
            "pid": os.getpid(),
            "engine_pids": self._reaper.watched,
            "adapters": list(self._adapters),
            **self._report(),
            "running": self._clock.running,
            "steps": self._steps.steps,
        }

    async def check_health(self) -> None:
        """As Ray Serve LLM's, and an engine that has work but finishes none of it is not well either.

        Serve asks every 10 s and replaces a replica at the third failure in a row.
        """
        await super().check_health()
        if self._clock.stalled_s > self._stall_timeout_s:
            raise RuntimeError(
                f"the engine has {self._clock.running} requests and finished none for {self._clock.stalled_s:.0f} s "
                f"(judge.stall_timeout_s {self._stall_timeout_s:g})"
            )

    def _report(self) -> dict[str, Any]:
        """Whose engine this is, how long it has been up, and how much of that it had requests and executed batches."""
        return {
            "replica": self._replica,
            "up_seconds": self._clock.up_s,
            "busy_seconds": self._clock.busy_s,
            "step_seconds": self._steps.seconds,
        }

    async def _once(self, request_id: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Run `work`, or wait for the run that an earlier call with this id started."""
        task = self._answers.get(request_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(work())
            self._answers[request_id] = task
            while len(self._answers) > _KEPT_ANSWERS:
                self._answers.popitem(last=False)
        self._waiters[task] = self._waiters.get(task, 0) + 1
        try:
            # Shielded: Serve cancels a call whose caller went away, and another call may wait for the same work.
            return await asyncio.shield(task)
        finally:
            self._waiters[task] -= 1
            if self._waiters[task] == 0:
                del self._waiters[task]
                if not task.done():
                    asyncio.get_running_loop().call_later(_ABANDONED_S, self._abandon, task)

    def _abandon(self, task: asyncio.Task[dict[str, Any]]) -> None:
        """End work that still nobody waits for; vLLM drops the requests of a cancelled caller."""
        if task not in self._waiters:
            task.cancel()

    async def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.shutdown()
        await super().__del__()
        # A model or an adapter that is not there ends the constructor before it has one.
        if (reaper := getattr(self, "_reaper", None)) is not None:
            reaper.stop()
