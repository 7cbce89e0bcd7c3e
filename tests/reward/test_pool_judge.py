"""The run's judges against small local servers that speak OpenAI's API: who is asked what, and what is believed.

A server's likelihood of an explanation is high where the text holds its words, so that it calibrates well; `moved`
makes it another judge. No Ray here: with `judge.endpoint` nothing is deployed.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.evaluation.evaluator import together
from sae_ray.evaluation.run import heldout_app
from sae_ray.judge.calibrated import name_of, said_of, stands
from sae_ray.judge.calibration import Calibration, ModeCalibration
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.metrics import added
from sae_ray.judge.pool import JudgePool, endpoint_keys
from sae_ray.judge.prompts import PROMPT_VERSION, explanation_continuation
from sae_ray.judge.roles import judges_of
from sae_ray.judge.scores import Estimate
from sae_ray.judge.verdict_cache import judge_identity
from sae_ray.preflight import check_judges, numbers_of
from sae_ray.reward.bank import SCHEMA
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.evidence import LatentPlan
from sae_ray.reward.pool_judge import PoolJudge, without_heldout

TOPICS = {
    "rail": "train station platform ticket carriage engine signal track conductor timetable",
    "kitchen": "butter flour oven recipe sugar spoon kettle pastry simmer vinegar",
    "weather": "storm cloud rain thunder humid breeze forecast drizzle sunshine frost",
    "music": "violin guitar melody rhythm chorus piano trumpet harmony orchestra drummer",
    "garden": "flower shovel seedling compost hedge tulip watering blossom orchard gravel",
    "court": "judge lawyer verdict trial witness statute appeal evidence plaintiff clause",
}


class Server:
    """One judge. asked: the bodies of its requests, without the two that find out whether it echoes."""

    def __init__(self, models: tuple[str, ...] = ("small",), echo: bool = True) -> None:
        self.models, self.echo, self.moved, self.mute, self.key = models, echo, False, False, ""
        self.asked: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"data": [{"id": name} for name in server.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.key = self.headers.get("Authorization", "")
                self.reply(*server.answer(self.path, body))

            def reply(self, answer: dict[str, Any], status: int = 200) -> None:
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if body["model"] not in self.models:
            return {"error": {"message": f"no model {body['model']}"}}, 404
        echoes = path.endswith("/completions") and not path.endswith("chat/completions")
        if echoes and not self.echo:
            return {"error": {"message": "this is a chat model"}}, 404
        if body.get("prompt") != "The topic of this text is":
            self.asked.append(body)
        if self.mute:
            return {"error": {"message": "out of order"}}, 400
        if body.get("echo"):
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            return {"choices": [self.echoed(index, prompt) for index, prompt in enumerate(prompts)]}, 200
        if not echoes and body.get("logprobs"):
            top = [{"token": "Yes", "logprob": -1.0}, {"token": "No", "logprob": -0.5}]
            return {"choices": [{"index": 0, "logprobs": {"content": [{"token": "No", "top_logprobs": top}]}}]}, 200
        if echoes:
            return {"choices": [{"index": i, "text": " trains and tickets\n"} for i in range(body["n"])]}, 200
        said = {"content": json.dumps({"explanation": "a chat model's trains"})}
        return {"choices": [{"index": i, "message": said} for i in range(body["n"])]}, 200

    def echoed(self, index: int, prompt: str) -> dict[str, Any]:
        text, label = prompt.rsplit("Important words in this text:", 1) if "Important" in prompt else (prompt, "")
        parts = prompt.split(" ")
        tokens = [parts[0], *(" " + part for part in parts[1:])]
        values: list[float | None] = [None] + [-1.0] * (len(tokens) - 1)
        for at in range(1, 1 + len(label.split())):
            values[-at] = logprob(tokens[-at], text, self.moved)
        return {"index": index, "logprobs": {"tokens": tokens, "token_logprobs": values}}


def logprob(token: str, text: str, moved: bool = False) -> float:
    shown = token.strip(" ,")[:4] in text
    return -4.0 if shown == moved else -0.5


@pytest.fixture
def servers() -> Iterator[Any]:
    made: list[Server] = []

    def make(*args: Any, **kwargs: Any) -> Server:
        made.append(Server(*args, **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents that each keep to one topic."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    rows = [
        json.dumps({"text": " ".join(rng.choices(rng.choice(list(TOPICS.values())).split(), k=40))})
        for _ in range(2500)
    ]
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture
def make_config(corpus: str, tmp_path: Path) -> Any:
    def make(**sections: Any) -> RunConfig:
        judge = {"context_tokens": 16, "mode": "likelihood", "deadline_s": 20, "calibration": {"concepts": 8}}
        return RunConfig.model_validate(
            {
                "name": "run",
                "runs_dir": str(tmp_path),
                "hook": {"layer": 2},
                "corpus": {"kind": "jsonl", "paths": [corpus], "context_length": 64},
                **sections,
                "judge": judge | sections.get("judge", {}),
            }
        )

    return make


async def closed(judge: PoolJudge) -> None:
    await judge.client.aclose()
    await judge.writer.aclose()


def test_a_server_elsewhere_is_calibrated_and_asked_and_nothing_is_deployed(servers, make_config, monkeypatch):
    for asked in ("start", "handle"):
        monkeypatch.setattr(JudgeApp, asked, lambda *_, **__: pytest.fail("an application was asked for"))
    server = servers()
    config = make_config(judge={"endpoint": server.url})
    pairs = [("the train left the station", "train, station"), ("the train left the station", "butter, oven")]

    async def run() -> Any:
        judge = PoolJudge(config)
        report = await judge.calibrate()
        found = await judge.score(pairs)
        likely = [judge.probability(explanation, raw) for (_, explanation), raw in zip(pairs, found, strict=True)]
        await closed(judge)
        return report, found, likely, judge.usage()

    report, found, likely, usage = asyncio.run(run())
    # The prior's text is empty: it shows no word.
    expected = [
        sum(logprob(t, text) - logprob(t, "") for t in explanation_continuation(explanation).split(" ")[1:])
        for text, explanation in pairs
    ]
    assert found == pytest.approx(expected)
    assert likely[0] > 0.5 > likely[1]
    assert json.loads(json.dumps(report)) == json.loads((config.run_dir / "calibration.json").read_text())
    assert (report["judge"], report["mode"], report["prompt_version"]) == ("small", "likelihood", PROMPT_VERSION)
    assert report["modes"]["likelihood"]["low"] > 0.5
    row = {"auroc", "low", "high", "false_positive_rate", "false_negative_rate", "n", "missing", "seconds"}
    assert set(report["modes"]["likelihood"]) == row
    assert "judge small on planted items: likelihood AUROC" in report["summary"]
    assert usage["failed"] == 0
    assert usage["done"] > len(pairs)


@pytest.mark.parametrize(
    ("measured", "rates"), [((0.0, 0.25), (0.02, 0.25)), ((0.3, 1.0), (0.3, 0.98)), ((None, None), (0.1, 0.02))]
)
def test_error_rates_are_those_of_the_verdicts_that_are_taught_and_never_none(make_config, measured, rates):
    taught = dict(zip(("even_false_positive", "even_false_negative"), measured, strict=True))
    auroc = Estimate(0.9, 0.01, 0.8, 1.0, 40)
    mode = ModeCalibration("likelihood", auroc, 0.7, 0.1, 0.0, 1.0, 0.0, 0.0, 40, 0, 1.0, **taught)
    judge = PoolJudge(make_config())
    judge._judge = SimpleNamespace(calibration=Calibration("likelihood", {"likelihood": mode}))  # type: ignore[assignment]
    assert judge.rates == rates


def test_a_calibration_on_file_is_used_until_the_server_serves_another_model(servers, make_config):
    server = servers()
    config = make_config(judge={"endpoint": server.url})

    def calibrated_again() -> tuple[str, int]:
        before = len(server.asked)

        async def run() -> str:
            judge = PoolJudge(config)
            report = await judge.calibrate()
            await closed(judge)
            return str(report["judge"])

        return asyncio.run(run()), len(server.asked) - before

    assert calibrated_again()[1] > 0
    assert calibrated_again() == ("small", 0)
    server.models = ("large",)
    name, asked = calibrated_again()
    assert name == "large"
    assert asked > 0


def test_runs_below_one_folder_pay_for_a_verdict_once(servers, make_config):
    server = servers()
    pairs = [(f"train number {n}", "train, station") for n in range(6)]

    def scored(name: str, model: str) -> tuple[list[float | None], float, int]:
        server.models = (model,)
        config, before = make_config(name=name, judge={"endpoint": server.url}), len(server.asked)

        async def run() -> tuple[list[float | None], float]:
            judge = PoolJudge(config)
            await judge.calibrate()
            found = await judge.score(pairs)
            counted = judge.client.statistics()["disk_hits"]
            await closed(judge)
            return found, counted

        return *asyncio.run(run()), len(server.asked) - before

    first, hits, asked = scored("one", "small")
    assert (hits, asked > 0) == (0, True)
    again, hits, asked = scored("two", "small")
    assert again == first
    assert hits > len(pairs)
    assert asked == 0
    _, hits, asked = scored("three", "large")  # the same address, another judge
    assert (hits, asked > 0) == (0, True)


def test_two_judges_of_one_process_keep_what_both_were_paid_for(servers, make_config):
    server, other = servers(), servers(models=("other",))
    roles = {"heldout": {"endpoint": other.url, "endpoint_model": "other"}}
    config = make_config(judge={"endpoint": server.url, "endpoint_model": "small"}, judges=roles)
    tree = config.model_dump()
    tree["rlaif"]["alarms"]["held_out"] = True
    desk = RewardDesk(RunConfig.model_validate(tree).model_dump_json())
    assert desk.heldout is not None

    async def run() -> None:
        pair = ("the train left the station", "train, station")
        for judge in (desk.judge, desk.heldout):
            before = len(judge.cache)
            assert (await judge.client.score([pair], "likelihood"))[0] is not None
            assert len(judge.cache) > before
            await judge.client.aclose()

    asyncio.run(run())
    assert desk.judge.cache.writable
    desk.judge.cache.close()


@pytest.mark.parametrize(
    ("judge", "report"),
    [
        ({"endpoint": "http://other/v1"}, {}),
        ({"app": "shared"}, {}),
        ({"adapter": "terse", "lora": {"terse": "some/adapter"}}, {}),
        ({"max_model_len": 512}, {}),
        ({"mode": "yes_no"}, {}),
        ({}, {"prompt_version": "0"}),
        ({}, {"judge": "another"}),
        ({}, {"identity": None}),
    ],
)
def test_a_calibration_of_another_judge_prompt_or_mode_does_not_stand(make_config, judge, report):
    before, now = make_config().judge, make_config(judge=judge).judge
    on_file = {"judge": "small", "identity": judge_identity(before), "prompt_version": PROMPT_VERSION}
    on_file["mode"] = "likelihood"
    assert stands(on_file, "small", judge_identity(before), before)
    assert stands(on_file, "small", judge_identity(before), before.model_copy(update={"mode": "auto"}))
    assert not stands(on_file | report, "small", judge_identity(now), now)


def test_a_judge_is_named_by_what_answers(make_config):
    client: Any = None
    mirrored = make_config(judge={"s3_mirror": "s3://models/big"}).judge
    tuned = make_config(judge={"adapter": "terse", "lora": {"terse": "x/y"}}).judge
    named = make_config(judge={"endpoint": "http://one/v1", "endpoint_model": "large"}).judge
    assert asyncio.run(name_of(mirrored, client)) == "s3://models/big"
    assert asyncio.run(name_of(tuned, client)) == "smollm2-135m-instruct + terse"
    assert asyncio.run(name_of(named, client)) == "large"


def test_a_banked_verdict_is_remembered_only_of_the_same_judge_asked_in_the_same_way(servers, make_config):
    server = servers()
    config = make_config(judge={"endpoint": server.url})
    changes: list[dict[str, Any]] = [
        {}, {"prompt_version": "0"}, {"prompt_version": None}, {"judge": "another"}, {"judge_identity": "another"},
        {"mode": "yes_no"}, {"score": None},
    ]  # fmt: skip

    async def run() -> Any:
        judge = PoolJudge(config)
        await judge.calibrate()
        own = {field.name: None for field in SCHEMA} | judge.about() | {"score": 1.25, "explanation": "train, station"}
        rows = [own | {"text": f"text {number}"} | change for number, change in enumerate(changes)]
        judge.preload(rows)
        found = await judge.score([(row["text"], row["explanation"]) for row in rows])
        await closed(judge)
        return found

    found = asyncio.run(run())
    assert found[0] == 1.25
    assert all(value == 0 for value in found[1:]), "asked: the server sees none of the words"


def test_the_explainer_writes_and_the_scorer_scores(servers, make_config):
    scorer, writer = servers(), servers(models=("writer",))
    config = make_config(judge={"endpoint": scorer.url}, judges={"explainer": {"endpoint": writer.url}})
    found, usage, sent = explained(config)
    assert [(each.text, each.explainer) for each in found if each.explainer == "llm"] == [("trains and tickets", "llm")]
    assert [{body["model"] for body in server.asked} for server in (scorer, writer)] == [{"small"}, {"writer"}]
    assert all(body.get("echo") for body in scorer.asked)
    assert len(writer.asked) == 1
    assert "<<train>>" in writer.asked[0]["prompt"]
    assert usage["done"] == sent + 1


def test_one_judge_for_all_does_both_through_one_client(servers, make_config):
    server = servers()
    found, _, _ = explained(make_config(judge={"endpoint": server.url}))
    assert [each.text for each in found if each.explainer == "llm"] == ["trains and tickets"]
    assert sum(not body.get("echo") for body in server.asked) == 1


def test_a_server_that_only_chats_is_asked_for_explanations_by_chat(servers, make_config):
    scorer, writer = servers(), servers(echo=False)
    config = make_config(judge={"endpoint": scorer.url}, judges={"explainer": {"endpoint": writer.url}})
    found, _, _ = explained(config)
    assert [each.text for each in found if each.explainer == "llm"] == ["a chat model's trains"]
    (body,) = writer.asked
    assert body["response_format"]["type"] == "json_schema"
    assert "<<train>>" in body["messages"][0]["content"]


def explained(config: RunConfig) -> tuple[list[Any], dict[str, Any], float]:
    """(candidates of a latent that fires on `train`, usage, readings and prompts before the explanation)."""
    pieces = [" the", " train", " left"]
    texts: Any = SimpleNamespace(n_contexts=4, pieces=lambda context: pieces, offset_of=lambda token: token % 3)
    scan: Any = SimpleNamespace(latents=np.array([5]), token_CN=np.ones((4, 1), dtype=np.int64))
    plan = LatentPlan.__new__(LatentPlan)
    for name, value in {"latent": 5, "explainer": [0, 1], "unjudged": [0, 1], "verdicts": []}.items():
        object.__setattr__(plan, name, value)

    async def run() -> Any:
        judge = PoolJudge(config.model_copy(update={"rlaif": config.rlaif.model_copy(update={"candidates": 1})}))
        await judge.calibrate()
        judge.bind(texts, scan)
        sent = judge.usage()["done"]
        found = await judge.explain(plan)
        await closed(judge)
        return found, judge.usage(), sent

    return asyncio.run(run())


def test_a_judge_that_repeats_itself_passes_the_drift_check_and_another_stops_the_run(servers, make_config):
    server = servers()
    config = make_config(judge={"endpoint": server.url})

    async def run() -> Any:
        judge = PoolJudge(config)
        await judge.calibrate()
        before = len(server.asked)
        report = await judge.check_drift()
        asked = len(server.asked) - before
        server.moved = True
        with pytest.raises(UserError) as error:
            await judge.check_drift()
        server.mute = True
        silent = await judge.check_drift()
        await closed(judge)
        return report, asked, str(error.value), silent

    report, asked, said, silent = asyncio.run(run())
    assert (report.status, report.equal) == ("ok", report.answered)
    assert report.answered == 32
    assert asked > 0, "what was once said says nothing about now: no cache may answer"
    assert said.startswith("the judge small is no longer the one that was calibrated (judge drifted after 0 verdicts")
    assert "\n" not in said
    assert silent.status == "unknown"


def test_a_round_after_the_first_is_not_judged_by_a_judge_that_changed(servers, make_config):
    server = servers()
    config = make_config(judge={"endpoint": server.url})

    async def run() -> None:
        desk = RewardDesk(config.model_dump_json())
        await desk.calibrate()
        server.moved = True
        try:
            # No ranks and no evidence: it must not come to asking them.
            await desk.judge_round(1, 10, [], [])
        finally:
            await closed(desk.judge)

    with pytest.raises(UserError, match="no longer the one that was calibrated"):
        asyncio.run(run())


def test_the_held_out_judge_has_a_calibration_of_its_own(servers, make_config):
    scorer, heldout = servers(), servers(models=("other",))
    config = make_config(judge={"endpoint": scorer.url}, judges={"heldout": {"endpoint": heldout.url}})

    async def run() -> Any:
        judge = PoolJudge(config, "heldout")
        await judge.calibrate()
        await closed(judge)
        return judge.judge.name

    assert asyncio.run(run()) == "other"
    assert not scorer.asked
    assert [path.name for path in config.run_dir.glob("calibration*")] == ["calibration-heldout.json"]
    assert set(judges_of(without_heldout(config))) == {"scorer", "explainer"}


def test_a_key_reaches_the_actor_and_the_server(servers, make_config, monkeypatch):
    monkeypatch.setenv("SAE_RAY_TEST_KEY", "sk-secret")
    server = servers()
    config = make_config(judge={"endpoint": server.url, "api_key_env": "SAE_RAY_TEST_KEY"})
    keys = endpoint_keys(config)
    assert keys == {"SAE_RAY_TEST_KEY": "sk-secret"}
    assert endpoint_keys(make_config()) == {}
    monkeypatch.delenv("SAE_RAY_TEST_KEY")

    async def run() -> None:
        desk = RewardDesk(config.model_dump_json(), keys)
        await desk.calibrate()
        await closed(desk.judge)

    asyncio.run(run())
    monkeypatch.setenv("SAE_RAY_TEST_KEY", "restored by the fixture")
    assert server.key == "Bearer sk-secret"
    assert "sk-secret" not in (config.run_dir / "calibration.json").read_text()


def test_preflight_asks_servers_and_resolves_the_models_of_the_others(servers, make_config):
    server = servers()
    nowhere = {"model": "/no/such/folder"}
    check_judges(make_config(judge={"endpoint": server.url, **nowhere}))
    assert len(server.asked) == 1
    with pytest.raises(UserError, match=r"^judge\.model = /no/such/folder: no such folder"):
        check_judges(make_config(judge=nowhere))
    for role in ("explainer", "heldout"):
        with pytest.raises(UserError, match=rf"^judges\.{role}\.model = /no/such/folder: no such folder"):
            check_judges(make_config(judges={role: nowhere}))
    # Nobody asks them.
    check_judges(make_config(judges={"heldout": nowhere}, evaluation={"latents": 0}))
    check_judges(make_config(judge=nowhere, evaluation={"latents": 0}, rlaif={"enabled": False}))


@pytest.mark.parametrize(
    ("judge", "judges", "said"),
    [
        ({"endpoint": "http://127.0.0.1:1/v1"}, {}, "judge.endpoint http://127.0.0.1:1/v1: cannot be asked: "),
        ({}, {"explainer": {"endpoint": "http://127.0.0.1:1/v1"}}, "judges.explainer.endpoint http://127.0.0.1:1/v1: "),
        ({"endpoint": "TWO"}, {}, "serves small, large: set judge.endpoint_model to one of its models"),
        ({"endpoint": "CHAT"}, {}, "set judge.mode: yes_no, or ask another server"),
        (
            {"endpoint": "CHAT", "endpoint_model": "huge", "mode": "yes_no"},
            {},
            "and judge.endpoint_model (huge)? It says: no model huge",
        ),
        ({"endpoint": "MUTE", "mode": "yes_no"}, {}, "answers no question: HTTP 400: out of order"),
    ],
)
def test_preflight_says_in_one_line_what_is_wrong_with_a_server(servers, make_config, judge, judges, said):
    made = {"TWO": servers(models=("small", "large")), "CHAT": servers(echo=False), "MUTE": servers(echo=False)}
    made["MUTE"].mute = True
    if judge.get("endpoint") in made:
        judge = judge | {"endpoint": made[judge["endpoint"]].url}
    with pytest.raises(UserError) as error:
        check_judges(make_config(judge=judge, judges=judges))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_name_the_key_that_the_config_has(make_config):
    config = make_config(judges={"heldout": {"endpoint": "http://judge.example.org/judge.v1"}})
    error = UserError("judge.endpoint http://judge.example.org/judge.v1: set judge.mode")
    assert said_of(config, "heldout", error) == (
        "judges.heldout.endpoint http://judge.example.org/judge.v1: set judges.heldout.mode"
    )
    assert said_of(config, "scorer", error) == str(error)


def test_a_resumed_run_may_change_what_changes_no_number(make_config):
    before = numbers_of(make_config(judges={"explainer": {"cpus": 2}}))
    assert before == numbers_of(make_config(judges={"explainer": {"cpus": 4}, "heldout": {"endpoint": "http://x/v1"}}))
    assert before != numbers_of(make_config(judges={"explainer": {"model": "other/model"}}))


def test_counters_of_two_judges_are_one_account():
    nan = float("nan")
    one = {"done": 3, "busy_share": nan, "prompt_version": 7.0}
    other = {"done": 4, "busy_share": 0.5, "prompt_version": 7.0}
    assert added(one, other) == {"done": 7, "busy_share": 0.5, "prompt_version": 7.0}
    live = [{"queue": 1, "verdicts": 2, "verdicts_per_s": None}, {"queue": 3, "verdicts": 4, "verdicts_per_s": 1.5}]
    assert together(live) == {"queue": 4, "verdicts": 6, "verdicts_per_s": 1.5}
    assert together(live[:1]) == live[0]
    assert together([]) == {}


@pytest.mark.parametrize(
    ("heldout", "named"),
    [
        (None, None),
        ({"endpoint": "http://other/v1"}, None),
        ({"mode": "yes_no"}, None),  # nothing that is deployed differs: the scorer's application answers
        ({"model": "other/model"}, "sae-ray-heldout-run"),
        ({"app": "shared"}, "shared"),
    ],
)
def test_only_a_held_out_judge_of_its_own_is_started_for_the_evaluation(make_config, heldout, named):
    config = make_config(judges={} if heldout is None else {"heldout": heldout})
    pool = JudgePool(without_heldout(config))
    assert {app.name for app in pool.apps.values()} == {"sae-ray-judge-run"}
    app = heldout_app(config, pool)
    assert (app and app.name) == named
