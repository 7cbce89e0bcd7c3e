"""A judge that somebody else serves: any server that speaks OpenAI's API, named by `judge.endpoint`.

Likelihoods come from `/completions` with the prompt echoed and its log-probabilities; a server that does not offer
them (OpenAI's own, for one) can only answer yes or no. Prompts go as text, so they carry no filler tokens: such a
server gives no prompt log-probability from its cache, and alignment would buy nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Literal, Unpack
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.asking import BadAnswer, Common, Items, Judge, PutOff, Reading, Refused
from sae_ray.judge.openai_answers import (
    by_index,
    continuation_reading,
    message_of,
    token_logprobs,
    usage_of,
    yes_no_reading,
)
from sae_ray.judge.prompts import MODES, Mode, explanation_continuation, likelihood_prompt, yes_no_prompt

__all__ = ["EndpointClient", "continuation_reading", "yes_no_reading"]

# Most servers tell no more than this many alternatives to a token.
_TOP_TOKENS = 20
# The largest answer that is read: 16 echoed prompts with their log-probabilities take some hundred KiB.
_MOST_BYTES = 64 << 20
_PROBE = "The topic of this text is"
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
# How servers say that a prompt does not fit.
_TOO_LONG = ("context length", "too long", "maximum length", "max_model_len")


class _NotThere(UserError):
    """HTTP 404: a wrong address or model, or a path that this server does not offer."""


class EndpointClient(Judge):
    """Asks an OpenAI-compatible server, as `JudgeClient` asks the pool.

    Args:
        cfg, common: see `Judge`.
    Raises:
        UserError: `judge.api_key_env` names a variable that is not set. When asking: the key is refused, the address
            or the model is wrong, or likelihoods are asked of a server that does not give them.
    """

    # A call is one request: a list of prompts where /completions takes one, else a single chat.
    readings_per_call: ClassVar[Mapping[Mode, int]] = {"likelihood": 16, "yes_no": 1}
    prompts_per_call: ClassVar[int] = 1

    def __init__(self, cfg: JudgeConfig, **common: Unpack[Common]) -> None:
        super().__init__(cfg, **common)
        if cfg.endpoint is None:
            raise ValueError("judge.endpoint is not set")
        self._base = cfg.endpoint.rstrip("/")
        self._key = None
        if cfg.api_key_env is not None:
            self._key = os.environ.get(cfg.api_key_env)
            if not self._key:
                raise UserError("judge.api_key_env: the environment variable that it names is not set where this runs")
        self._session: aiohttp.ClientSession | None = None
        self._model: str | None = cfg.endpoint_model
        # Tokens to ask for beside an echo (some servers refuse 0); None: not known yet; -1: no echo to be had.
        self._echo_tokens: int | None = None
        self._why_no_echo = ""
        self._finding_out = asyncio.Lock()

    async def modes(self) -> tuple[Mode, ...]:
        """yes_no, and likelihood if the server echoes prompts with their log-probabilities."""
        if await self._call(self._found_out) is None:
            raise UserError(f"judge.endpoint {self._base}: cannot be asked: {self.last_error}")
        return MODES if self._echo_tokens != -1 else tuple(mode for mode in MODES if mode != "likelihood")

    async def describe(self) -> dict[str, Any]:
        """The address, the model as the server calls it, and the verdict modes that it can answer in."""
        return {"endpoint": self._base, "modes": list(await self.modes()), "model": self._model}

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send_read(self, request_id: str, items: Items, mode: Mode) -> dict[str, Any]:
        if mode == "yes_no":
            ((text, (explanation,)),) = items
            reading, usage = await self._yes_no(request_id, text, explanation)
            return {"readings": [[reading]], "usage": usage}
        await self._find_out()
        if self._echo_tokens == -1:
            raise UserError(
                f"judge.endpoint {self._base}: /completions does not give the log-probabilities of an echoed prompt, "
                f"which the likelihood mode reads; set judge.mode: yes_no, or ask another server.{self._why_no_echo}"
            )
        prompts = []
        for text, explanations in items:
            before = "".join(likelihood_prompt(text))
            prompts += [(before, explanation_continuation(each)) for each in explanations]
        found, usage = await self._likelihoods(request_id, prompts)
        answers = iter(found)
        return {"readings": [[next(answers) for _ in explanations] for _, explanations in items], "usage": usage}

    async def _likelihoods(
        self, request_id: str, prompts: list[tuple[str, str]]
    ) -> tuple[list[Reading | None], dict[str, int]]:
        body = {
            "prompt": [before + after for before, after in prompts],
            "max_tokens": self._echo_tokens,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            answer = await self._post("completions", body, request_id)
        except Refused:
            # One prompt that is too long must not cost the others their answers.
            if len(prompts) == 1:
                return [None], {}
            half = len(prompts) // 2
            first, paid = await self._likelihoods(request_id + "a", prompts[:half])
            second, also = await self._likelihoods(request_id + "b", prompts[half:])
            return first + second, {key: paid.get(key, 0) + also.get(key, 0) for key in paid | also}
        choices = by_index(answer, len(prompts))
        readings: list[Reading | None] = []
        for choice, (_, after) in zip(choices, prompts, strict=True):
            tokens, values = token_logprobs(choice)
            readings.append(continuation_reading(tokens, values, after, generated=int(self._echo_tokens or 0)))
        return readings, {**usage_of(answer), "unreadable": readings.count(None)}

    async def _yes_no(self, request_id: str, text: str, explanation: str) -> tuple[Reading | None, dict[str, int]]:
        system, shared, question = yes_no_prompt(text, explanation)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": shared + question}]
        body = {
            "messages": messages,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP_TOKENS,
        }
        try:
            answer = await self._post("chat/completions", body, request_id)
        except Refused as error:
            self.last_error = str(error)
            return None, {}
        try:
            top = by_index(answer, 1)[0]["logprobs"]["content"][0]["top_logprobs"]
            alternatives = [(str(each["token"]), float(each["logprob"])) for each in top]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise BadAnswer(f"no log-probabilities of the answer's token ({type(error).__name__})") from error
        value = yes_no_reading(alternatives)
        return None if value is None else (value, 1), usage_of(answer)

    async def _send_generate(self, request_id: str, prompts: list[str], *arguments: Any) -> dict[str, Any]:
        (prompt,) = prompts
        max_tokens, n, temperature, top_p, stop, seed, chat, schema = arguments
        body: dict[str, Any] = {"max_tokens": max_tokens, "n": n, "temperature": temperature, "top_p": top_p}
        if stop:
            body["stop"] = stop
        if seed is not None:
            body["seed"] = seed
        if schema is not None:
            held = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": held}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        try:
            answer = await self._post("chat/completions" if chat else "completions", body, request_id)
        except Refused as error:
            if any(words in str(error).lower() for words in _TOO_LONG):
                return {"texts": [[]], "usage": {}}
            raise
        try:
            choices = by_index(answer, n)
            texts = [choice["message"]["content"] if chat else choice["text"] for choice in choices]
        except (KeyError, TypeError) as error:
            raise BadAnswer(f"choices without text ({type(error).__name__})") from error
        if not all(isinstance(text, str) for text in texts):
            raise BadAnswer("choices without text")
        return {"texts": [texts], "usage": usage_of(answer)}

    async def _found_out(self, request_id: str) -> dict[str, Any]:
        await self._find_out()
        return {}

    async def _find_out(self) -> None:
        """Which model answers, and whether it echoes prompts with log-probabilities. Asked once."""
        if self._echo_tokens is not None:
            return
        async with self._finding_out:
            if self._echo_tokens is not None:
                return
            if self._model is None:
                # Outside the questions below, whose 404 says less than this one's.
                self._model = await self._only_model()
            for tokens in (0, 1):
                body = {"prompt": _PROBE, "max_tokens": tokens, "temperature": 0, "echo": True, "logprobs": 1}
                try:
                    answer = await self._post("completions", body, f"probe-{tokens}")
                except (Refused, _NotThere) as error:
                    # Not the end: OpenAI answers 404 here for its chat models.
                    self._why_no_echo = f" It says: {error}"
                    continue
                try:
                    _, values = token_logprobs(by_index(answer, 1)[0])
                except BadAnswer:
                    continue
                # The first token has none, and one that was generated does not count.
                if len(values) > tokens + 1 and all(value is not None for value in values[1:]):
                    self._echo_tokens = tokens
                    return
            self._echo_tokens = -1

    async def _only_model(self) -> str:
        """The model that the server serves.

        Raises:
            UserError: there are several, and `judge.endpoint_model` does not say which.
        """
        answer = await self._request("GET", "models", None, "models")
        try:
            names = [str(each["id"]) for each in answer["data"]]
        except (KeyError, TypeError) as error:
            raise BadAnswer("/models holds no list of models") from error
        if len(names) != 1:
            some = ", ".join(names[:10]) or "none"
            raise UserError(f"judge.endpoint {self._base} serves {some}: set judge.endpoint_model to one of its models")
        return names[0]

    async def _post(self, path: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        if self._model is None:
            self._model = await self._only_model()
        return await self._request("POST", path, {"model": self._model, **body}, request_id)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, request_id: str) -> dict[str, Any]:
        """One HTTP request; see `_weigh` for what its errors mean."""
        if self._session is None:
            # No timeout of its own: the call's deadline cancels it. Connections are bounded by the caller's slots.
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=30))
        headers = {"X-Request-Id": request_id}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self._base}/{path}"
        async with self._session.request(
            method, url, json=body, headers=headers, proxy=_proxy(url), allow_redirects=False
        ) as response:
            raw = await _bounded(response)
            status, after = response.status, response.headers.get("Retry-After", "")
        said = self._redacted(message_of(raw))
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            # Servers like to quote the key that they refuse, in part: their words are not repeated here.
            how = "refuses the key of judge.api_key_env" if self._key else "asks for a key: set judge.api_key_env"
            raise UserError(f"judge.endpoint {self._base} {how} (HTTP {status})")
        if status == HTTPStatus.NOT_FOUND:
            raise _NotThere(
                f"judge.endpoint {self._base}: /{path} answers HTTP {status}; is the address right (as a rule it ends "
                f"in /v1), and judge.endpoint_model ({self._model})? It says: {said}"
            )
        if status in _BUSY:
            # As seconds; a date, or a digit that is none of ours, is as good as nothing.
            raise PutOff(f"HTTP {status}: {said}", float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0)
        if 300 <= status < 400:
            raise UserError(
                f"judge.endpoint {self._base} redirects elsewhere (HTTP {status}); name that address itself"
            )
        if 400 <= status < 500 and status != HTTPStatus.REQUEST_TIMEOUT:
            raise Refused(f"HTTP {status}: {said}")
        if status != HTTPStatus.OK:
            raise BadAnswer(f"HTTP {status}: {said}")
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"is not JSON: {said}") from error
        if not isinstance(answer, dict):
            raise BadAnswer(f"is no JSON object: {said}")
        return answer

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _weigh(self, error: Exception) -> Literal["put_off", "again", "give_up", "raise"]:
        if isinstance(error, PutOff):
            return "put_off"
        if isinstance(error, Refused):
            return "give_up"
        if isinstance(error, (BadAnswer, aiohttp.ClientError, OSError)):
            return "again"
        return "raise"


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body, unpacked; a server must not be able to fill the memory of who asks it."""
    raw = bytearray()
    async for part in response.content.iter_chunked(1 << 16):
        raw += part
        if len(raw) > _MOST_BYTES:
            raise BadAnswer(f"an answer of more than {_MOST_BYTES >> 20} MiB")
    return bytes(raw)


def _proxy(url: str) -> str | None:
    """The environment's proxy for an address, if any; never for this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    return getproxies().get(parts.scheme)
