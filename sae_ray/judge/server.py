"""What runs in a judge replica: a thin `LLMServer` that answers batches of verdicts and generations.

Ray Serve LLM brings the vLLM engine up, checks its health and restarts the replica; this adds three methods that a
`DeploymentHandle` calls. A verdict needs engine parameters that the OpenAI endpoints do not offer (reading the prefix
cache together with prompt log-probabilities), so they go to vLLM's `AsyncLLM` directly, and an engine error is raised
here rather than yielded as an `ErrorResponse`.

Only replicas and the deploying task import this module: it brings in `ray.serve.llm` and with it vLLM.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm.deployment import LLMServer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from sae_ray.embedded import resolve_model
from sae_ray.judge.prompts import Mode
from sae_ray.judge.reading import Reader, Usage
from sae_ray.judge.reaper import start_reaper

# Finished answers kept for a caller that asks again with the same request id (its connection broke, not the work).
_KEPT_ANSWERS = 256


class LocalModel(CallbackBase):
    """Skips Ray Serve LLM's download task for a model that is a folder: it would only import vLLM again."""

    async def on_before_node_init(self) -> None:
        loading: Any = self.llm_config.model_loading_config
        if os.path.isdir(str(loading.model_source)):
            self.ctx.run_init_node = False


def cpu_dtype() -> str:
    """bfloat16 where this machine multiplies it natively (measured: about twice the verdicts), else float32."""
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


class _VLLM:
    """`reading.Engine` over `AsyncLLM`: fresh SamplingParams and id per request, one whole output for each."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def run(self, prompt_ids: Sequence[int], **sampling: Any) -> Any:
        # FINAL_ONLY: with n > 1 the cumulative outputs come one sample at a time, and the last has one sample only.
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        last = None
        prompt = {"prompt_token_ids": list(prompt_ids)}
        async for output in self._client.generate(prompt, params, uuid.uuid4().hex):
            last = output
        return last


class JudgeServer(LLMServer):
    """Answers `read` and `generate`, each a batch per call, idempotent by request id."""

    async def __init__(self, llm_config: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        # Here and not in the driver: the embedded model's folder is made on the machine that serves it.
        source = llm_config.model_loading_config
        source.model_source = resolve_model(source.model_source, "judge.model")
        if llm_config.accelerator_config.kind == "cpu" and llm_config.engine_kwargs["dtype"] == "auto":
            llm_config.engine_kwargs["dtype"] = cpu_dtype()
        llm_config._engine_config = None
        self._answers: OrderedDict[str, asyncio.Task[dict[str, Any]]] = OrderedDict()
        self._reaper = start_reaper()
        await super().__init__(llm_config, **kwargs)
        engine: Any = self.engine
        self._client = engine._engine_client
        self._reaper.watch([child.pid for child in multiprocessing.active_children() if child.pid])
        self._vllm = _VLLM(self._client)

    def _reader(self) -> Reader:
        config = self._client.vllm_config
        return Reader(
            engine=self._vllm,
            tokenizer=self._client.get_tokenizer(),
            block_size=config.cache_config.block_size,
            max_tokens=config.model_config.max_model_len,
        )

    async def read(self, request_id: str, items: list[tuple[str, list[str]]], mode: Mode) -> dict[str, Any]:
        """Readings of several texts, each with its own explanations.

        Returns:
            `readings`: per item a list of (value in nats, tokens) or None, in the order asked; `usage`; `pid`.
        """

        async def work() -> dict[str, Any]:
            reader = self._reader()
            answers = await asyncio.gather(*(reader.read(text, each, mode) for text, each in items))
            readings = [[None if r is None else (r.value, r.tokens) for r in answer] for answer in answers]
            return {"readings": readings, "usage": asdict(reader.usage), "pid": os.getpid()}

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
    ) -> dict[str, Any]:
        """`n` sampled continuations per prompt; `chat` wraps each prompt as a user message where a template exists.

        Returns:
            `texts`: per prompt a list of n strings, or an empty list where the prompt does not fit; `usage`; `pid`.
        """

        async def work() -> dict[str, Any]:
            tokenizer, usage = self._client.get_tokenizer(), Usage()
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
                output = await self._vllm.run(
                    ids,
                    max_tokens=max_tokens,
                    n=n,
                    temperature=temperature,
                    top_p=top_p,
                    stop=stop,
                    seed=None if seed is None else seed + index,
                )
                usage.add(output)
                return [choice.text for choice in output.outputs]

            texts = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
            return {"texts": texts, "usage": asdict(usage), "pid": os.getpid()}

        return await self._once(request_id, work)

    async def describe(self) -> dict[str, Any]:
        """What answers: model folder or id, dtype, block size, process ids of the replica and its engine."""
        config = self._client.vllm_config
        return {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": config.cache_config.block_size,
            "chat_template": bool(self._client.get_tokenizer().chat_template),
            "pid": os.getpid(),
            "engine_pids": self._reaper.watched,
        }

    async def _once(self, request_id: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Run `work`, or wait for the run that an earlier call with this id started."""
        task = self._answers.get(request_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(work())
            self._answers[request_id] = task
            while len(self._answers) > _KEPT_ANSWERS:
                self._answers.popitem(last=False)
        # Shielded: Serve cancels a call whose caller went away, and another call may wait for the same work.
        return await asyncio.shield(task)

    async def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.shutdown()
        await super().__del__()
        self._reaper.stop()
