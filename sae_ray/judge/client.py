"""Asking a judge pool from anywhere, by its deployment's handle."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from sae_ray.config import JudgeConfig
from sae_ray.judge.asking import BadAnswer, Common, Items, Judge, PutOff, Reading, Refused, batches, digest
from sae_ray.judge.prompts import Mode

__all__ = ["BadAnswer", "Items", "Judge", "JudgeClient", "PutOff", "Reading", "Refused", "batches"]


class JudgeClient(Judge):
    """Asks a judge pool.

    Serve retries what no replica had accepted; once accepted, a replica's death is ours to handle.

    Args:
        handle: DeploymentHandle of `JudgeApp.handle()`.
        cfg, common: see `Judge`.
    """

    def __init__(self, handle: Any, cfg: JudgeConfig, **common: Unpack[Common]) -> None:
        super().__init__(cfg, **common)
        self._handle = handle
        self._adapter = () if cfg.adapter is None else (cfg.adapter,)

    async def describe(self) -> dict[str, Any]:
        """What one replica says of itself (see `JudgeServer.describe`)."""
        described: dict[str, Any] = await self._handle.describe.remote()
        return described

    async def aclose(self) -> None:
        """Nothing to do: a deployment's handle is this process's, not this client's."""

    async def _send_read(self, request_id: str, items: Items, mode: Mode) -> dict[str, Any]:
        answer = await self._remote("read", items[0][0], request_id, items, mode, *self._adapter)
        rows = answer["readings"]
        if [len(row) for row in rows] != [len(explanations) for _, explanations in items]:
            raise BadAnswer(f"{len(rows)} readings of {len(items)} texts")
        return answer

    async def _send_generate(self, request_id: str, prompts: list[str], *arguments: Any) -> dict[str, Any]:
        return await self._remote("generate", prompts[0], request_id, prompts, *arguments, *self._adapter)

    async def _remote(self, method: str, text: str, *arguments: Any) -> dict[str, Any]:
        # The session routes calls on one text to the replica that holds its KV.
        handle = self._handle.options(method_name=method, session_id=digest(text))
        answer: dict[str, Any] = await handle.remote(*arguments)
        return answer

    def _weigh(self, error: Exception) -> Literal["put_off", "again", "give_up", "raise"]:
        if isinstance(error, (BackPressureError, DeploymentUnavailableError)):
            return "put_off"
        if isinstance(error, RayTaskError) and isinstance(error.cause, (ValueError, TypeError)):
            return "give_up"  # the engine refuses the request itself, a schema that it cannot hold for one
        if isinstance(error, (RayError, RayServeException, BadAnswer)):
            return "again"
        return "raise"
