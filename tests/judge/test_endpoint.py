"""The endpoint client against a small local server that speaks OpenAI's API, and then fails in every way one can.

`tests/integration/test_judge_endpoint.py` asks a real server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.endpoint import EndpointClient, continuation_reading, yes_no_reading
from sae_ray.judge.openai_answers import token_logprobs
from sae_ray.judge.prompts import explanation_continuation, likelihood_prompt, yes_no_prompt

KEY = "sk-very-secret-0123456789"


def words(text: str) -> list[str]:
    """Tokens of the test server: a blank opens each."""
    parts = text.split(" ")
    return [parts[0], *(" " + part for part in parts[1:])]


def logprob(prefix: str, token: str) -> float:
    return -((len(prefix) * 7 + len(token) * 3) % 11) - 0.5


class Server:
    """`trouble`: what to answer instead, one per request, before it answers as it should."""

    def __init__(self, trouble: list[Any] | None = None, least_tokens: int = 0, echo: bool = True) -> None:
        self.trouble, self.least_tokens, self.echo = list(trouble or []), least_tokens, echo
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0.005)
            return await self.answer(request)
        finally:
            self.open -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "small"}]})
        body = await request.json()
        self.bodies.append(body)
        probing = body.get("prompt") == "The topic of this text is"
        if self.trouble and not probing:
            trouble = self.trouble.pop(0)
            if trouble == "hang":
                await asyncio.sleep(30)
            if callable(trouble):
                return trouble(self.good(request.path, body))
            return web.Response(**trouble)
        refused = not self.echo or body["max_tokens"] < self.least_tokens
        if request.path == "/v1/completions" and body.get("echo") and refused:
            return web.json_response({"error": {"message": "echo is not supported"}}, status=400)
        if any(len(prompt) > 400 for prompt in body.get("prompt", []) if isinstance(body.get("prompt"), list)):
            return web.json_response({"error": {"message": "the maximum context length is 400"}}, status=400)
        return web.json_response(self.good(request.path, body))

    def good(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
        if path.endswith("chat/completions") and body.get("logprobs"):
            question = body["messages"][1]["content"]
            top = [{"token": "Yes", "logprob": -len(question) / 100}, {"token": " no", "logprob": -1.0}]
            content = [{"token": "Yes", "top_logprobs": [*top, {"token": "Maybe", "logprob": -9.0}]}]
            return {"choices": [{"index": 0, "logprobs": {"content": content}}], "usage": usage}
        if path.endswith("chat/completions"):
            choices = [{"index": i, "message": {"content": f"{body['seed']}:{i}"}} for i in range(body["n"])]
            return {"choices": choices, "usage": usage}
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if not body.get("echo"):
            return {"choices": [{"index": i, "text": prompts[0][:5]} for i in range(body["n"])], "usage": usage}
        choices = []
        for index, prompt in enumerate(prompts):
            tokens = words(prompt)
            values: list[float | None] = [None]
            values += [logprob("".join(tokens[:i]), tokens[i]) for i in range(1, len(tokens))]
            tokens, values = tokens + [" generated"] * body["max_tokens"], values + [-0.1] * body["max_tokens"]
            choices.append({"index": index, "logprobs": {"tokens": tokens, "token_logprobs": values}})
        return {"choices": choices[::-1], "usage": usage}


def served(server: Server, ask: Callable[[EndpointClient], Awaitable[Any]], **changes: Any) -> Any:
    """What `ask` returns with a client of the running server."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        settings = {"deadline_s": 5, "max_attempts": 3, "endpoint": f"http://127.0.0.1:{port}/v1/", **changes}
        client = EndpointClient(JudgeConfig(**settings))
        try:
            return await ask(client)
        finally:
            await client.aclose()
            await runner.cleanup()

    return asyncio.run(run())


def expected(text: str, explanation: str) -> float:
    """The likelihood verdict, computed from the server's log-probabilities without any of the client's code."""

    def reading(text: str, explanation: str) -> float:
        before = "".join(likelihood_prompt(text))
        parts, spelled, total = words(explanation_continuation(explanation))[1:], before, 0.0
        for part in parts:
            total += logprob(spelled, part)
            spelled += part
        return total

    return reading(text, explanation) - reading("", explanation)


def balanced(client: EndpointClient) -> bool:
    c = client.counters
    return c.submitted == c.done + c.failed + c.running and c.running == c.open_calls == c.queued == 0


PAIRS = [("Opens the file at this path", "file paths"), ("Adds two numbers", "some long explanation of sums")]


@pytest.mark.parametrize("least_tokens", [0, 1], ids=["echo alone", "echo and one token"])
def test_a_likelihood_is_the_sum_of_the_explanations_tokens_however_the_server_echoes(least_tokens: int) -> None:
    server = Server(least_tokens=least_tokens)

    async def ask(client: EndpointClient) -> tuple[Any, EndpointClient]:
        return await client.score(PAIRS, "likelihood"), client

    verdicts, client = served(server, ask)
    assert verdicts == [pytest.approx(expected(*pair)) for pair in PAIRS]
    assert {body["model"] for body in server.bodies} == {"small"}
    assert balanced(client)
    c = client.counters
    assert (c.prompt_tokens, c.cached_tokens) == (7 * c.calls, 2 * c.calls)


def test_a_yes_no_verdict_is_the_log_odds_of_the_answers_token() -> None:
    server = Server()
    verdicts = served(server, lambda client: client.score(PAIRS, "yes_no"))
    questions = [body["messages"][1]["content"] for body in server.bodies]
    assert sorted(verdicts) == sorted(1 - len(question) / 100 for question in questions)


def test_a_server_without_echo_says_so_and_still_answers_yes_or_no() -> None:
    async def ask(client: EndpointClient) -> Any:
        assert await client.modes() == ("yes_no",)
        with pytest.raises(UserError, match=r"judge\.endpoint .* echoed prompt.*judge\.mode: yes_no"):
            await client.score(PAIRS, "likelihood")
        assert balanced(client)
        return await client.score(PAIRS, "yes_no")

    assert all(isinstance(v, float) for v in served(Server(echo=False), ask))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_and_costs_no_attempt(status: int) -> None:
    busy = {"status": status, "headers": {"Retry-After": "0"}, "text": "slow down"}

    async def ask(client: EndpointClient) -> EndpointClient:
        assert await client.score(PAIRS[:1], "yes_no") != [None]
        return client

    c = served(Server([busy] * 2), ask, max_attempts=1).counters
    assert (c.back_pressure, c.retries, c.done, c.failed) == (2, 0, 1, 0)


def wrong(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], web.Response]:
    def trouble(answer: dict[str, Any]) -> web.Response:
        return web.json_response(change(answer))

    return trouble


def without_values(answer: dict[str, Any]) -> dict[str, Any]:
    for choice in answer["choices"]:
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][1:]
    return answer


GARBAGE = {
    "500": {"status": 500, "text": "oops"},
    "not json": {"text": "<html>proxy</html>"},
    "truncated": {"text": '{"choices": [{"index'},
    "a list": {"text": "[]"},
    "no choices": wrong(lambda answer: {"choices": None}),
    "too few": wrong(lambda answer: {**answer, "choices": answer["choices"][1:]}),
    "same index": wrong(lambda answer: {**answer, "choices": [answer["choices"][0]] * len(answer["choices"])}),
    "no logprobs": wrong(lambda answer: {**answer, "choices": [{**c, "logprobs": None} for c in answer["choices"]]}),
    "lengths": wrong(without_values),
    "nested": {"text": "[" * 100_000},
    "an index without end": {"text": '{"choices": [{"index": 1e999}]}'},
}


@pytest.mark.parametrize("trouble", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_asked_again_and_the_verdict_is_the_right_one(trouble: Any) -> None:
    async def ask(client: EndpointClient) -> EndpointClient:
        assert await client.score(PAIRS, "likelihood") == [pytest.approx(expected(*pair)) for pair in PAIRS]
        assert balanced(client)
        return client

    assert served(Server([trouble]), ask).counters.retries == 1


def test_a_server_that_only_answers_garbage_gives_missing_verdicts_and_is_counted() -> None:
    async def ask(client: EndpointClient) -> EndpointClient:
        await client.modes()
        assert await client.score(PAIRS, "likelihood") == [None, None]
        assert balanced(client)
        return client

    client = served(Server([GARBAGE["not json"]] * 99), ask)
    assert client.counters.failed == client.counters.submitted > 0
    assert "not JSON" in (client.last_error or "")


def test_tokens_that_do_not_spell_the_explanation_are_unreadable_not_a_number() -> None:
    def scramble(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            choice["logprobs"]["tokens"] = ["?"] * len(choice["logprobs"]["tokens"])
        return answer

    async def ask(client: EndpointClient) -> EndpointClient:
        assert await client.score(PAIRS[:1], "likelihood") == [None]
        return client

    client = served(Server([wrong(scramble)] * 9), ask)
    assert client.counters.unreadable == client.counters.done > 0


def test_a_server_that_hangs_gives_a_missing_verdict_at_the_deadline_and_keeps_no_slot() -> None:
    async def ask(client: EndpointClient) -> EndpointClient:
        assert await client.score(PAIRS[:1], "yes_no") == [None]
        assert balanced(client)
        assert await client.score(PAIRS[:1], "yes_no") != [None]
        return client

    client = served(Server(["hang"]), ask, deadline_s=1.0, max_in_flight=1)
    assert (client.counters.failed, client.counters.done) == (1, 1)


def test_a_server_that_is_not_there_is_missing_and_says_so() -> None:
    async def ask() -> EndpointClient:
        # Port 9 is "discard": nothing listens.
        client = EndpointClient(JudgeConfig(endpoint="http://127.0.0.1:9/v1", endpoint_model="m", max_attempts=2))
        assert await client.score(PAIRS[:1], "yes_no") == [None]
        with pytest.raises(UserError, match=r"judge\.endpoint http://127\.0\.0\.1:9/v1: cannot be asked"):
            await client.modes()
        await client.aclose()
        return client

    client = asyncio.run(ask())
    assert client.counters.retries >= 1
    assert "Connect" in (client.last_error or "")


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the key"), (403, "refuses the key"), (404, "in /v1")])
def test_what_the_user_must_put_right_names_the_endpoint_and_never_the_key(
    status: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    refusal = {"status": status, "text": json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})}
    server = Server([refusal] * 9)

    async def ask(client: EndpointClient) -> str:
        with pytest.raises(UserError) as error:
            await client.score(PAIRS, "yes_no")
        assert balanced(client)
        assert KEY not in repr(vars(client)["_cfg"])
        assert KEY not in str(client.last_error)
        return str(error.value)

    message = served(server, ask, api_key_env="JUDGE_KEY")
    assert message.startswith("judge.endpoint http://127.0.0.1:")
    assert said in message
    assert KEY not in message
    assert KEY not in caplog.text
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_key_that_is_not_set_is_named_by_its_config_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match=r"judge\.api_key_env"):
        EndpointClient(JudgeConfig(endpoint="http://127.0.0.1:9/v1", api_key_env="JUDGE_KEY"))


def test_one_prompt_that_is_too_long_is_missing_and_costs_the_others_nothing() -> None:
    pairs = [*PAIRS, ("word " * 100, "file paths")]
    verdicts = served(Server(), lambda client: client.score(pairs, "likelihood"))
    assert verdicts == [*(pytest.approx(expected(*pair)) for pair in PAIRS), None]


def test_requests_in_flight_are_bounded() -> None:
    server = Server()
    pairs = [(f"text {i}", f"explanation {j}") for i in range(10) for j in range(4)]
    verdicts = served(server, lambda client: client.score(pairs, "yes_no"), max_in_flight=3)
    assert None not in verdicts
    assert server.most_open == 3


def test_generations_keep_order_seeds_and_schema() -> None:
    server = Server()
    schema = {"type": "object"}

    async def ask(client: EndpointClient) -> Any:
        chats = await client.generate([f"p{i}" for i in range(5)], n=2, seed=10, chat=True, schema=schema)
        return chats, await client.generate(["plain text"], n=2)

    chats, plain = served(server, ask)
    assert chats == [[f"{10 + i}:0", f"{10 + i}:1"] for i in range(5)]
    assert plain == [["plain", "plain"]]
    held = [body["response_format"]["json_schema"]["schema"] for body in server.bodies if "messages" in body]
    assert held == [schema] * 5


def test_a_server_of_several_models_asks_which() -> None:
    class Several(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/v1/models":
                return web.json_response({"data": [{"id": "small"}, {"id": "large"}]})
            return await super().answer(request)

    async def ask(client: EndpointClient) -> None:
        with pytest.raises(UserError, match=r"small, large: set judge\.endpoint_model"):
            await client.score(PAIRS[:1], "yes_no")

    served(Several(), ask)
    assert served(Several(), lambda client: client.score(PAIRS[:1], "yes_no"), endpoint_model="large") != [None]


@pytest.mark.parametrize(
    ("tokens", "continuation", "generated", "found"),
    [
        (["is", " file", " paths"], " file paths", 0, (-3.0, 2)),
        (["is", " file", " paths", " too"], " file paths", 1, (-3.0, 2)),
        (["is", "▁file", "▁paths"], " file paths", 0, (-3.0, 2)),
        (["is", "file", " paths"], " file paths", 0, (-3.0, 2)),
        (["is", " ", "file"], " file", 0, (-3.0, 2)),
        (["�", "�", " file"], " file", 0, (-2.0, 1)),
        (["is fi", "le"], " file", 0, None),
        ([" file"], " file", 0, None),
    ],
)
def test_an_explanation_is_found_at_the_end_of_the_echo(
    tokens: list[str], continuation: str, generated: int, found: tuple[float, int] | None
) -> None:
    values: list[float | None] = [None, *(-float(i) for i in range(1, len(tokens)))]
    assert continuation_reading(tokens, values, continuation, generated) == found


def test_log_odds_take_the_best_spelling_and_bound_the_answer_that_is_not_told() -> None:
    told = [("Yes", -0.5), (" yes", -3.0), ("No", -2.0), ("no", -1.5), ("Maybe", -6.0)]
    assert yes_no_reading(told) == -0.5 - -1.5
    assert yes_no_reading([("Yes", -0.1), ("Maybe", -6.0)]) == pytest.approx(5.9)
    assert yes_no_reading([("Maybe", -0.1)]) is None
    assert yes_no_reading([("Yes", -math.inf), ("Maybe", -0.1)]) is None


def test_a_server_with_chat_only_can_be_asked_yes_or_no_and_a_wrong_address_cannot() -> None:
    class ChatOnly(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/v1/completions":
                return web.json_response({"error": {"message": "This is a chat model"}}, status=404)
            return await super().answer(request)

    async def ask(client: EndpointClient) -> Any:
        assert await client.modes() == ("yes_no",)
        with pytest.raises(UserError, match=r"judge\.mode: yes_no.*This is a chat model"):
            await client.score(PAIRS, "likelihood")
        return await client.score(PAIRS, "yes_no")

    assert None not in served(ChatOnly(), ask)

    class Nothing(Server):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            return web.Response(status=404, text="nothing here")

    async def ask_nothing(client: EndpointClient) -> None:
        for question in (client.modes(), client.score(PAIRS, "likelihood"), client.score(PAIRS, "yes_no")):
            with pytest.raises(UserError, match=r"judge\.endpoint .*is the address right"):
                await question

    served(Nothing(), ask_nothing)


def test_an_answer_that_would_fill_the_memory_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_ray.judge.endpoint._MOST_BYTES", 1 << 20)

    async def ask(client: EndpointClient) -> EndpointClient:
        assert await client.score(PAIRS[:1], "yes_no") == [pytest.approx(expected_log_odds(PAIRS[0]))]
        return client

    def expected_log_odds(pair: tuple[str, str]) -> float:
        question = "".join(yes_no_prompt(*pair)[1:])
        return -len(question) / 100 + 1.0

    client = served(Server([{"text": "x" * (3 << 20)}]), ask)
    assert client.counters.retries == 1


def test_numbers_that_no_float_holds_are_missing() -> None:
    tokens, values = token_logprobs(
        {"logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [None, 10**400, -1e999]}}
    )
    assert (tokens, values) == (["a", "b", "c"], [None, None, None])
