"""Many batches under way: the desk still has room for `progress`, and nobody stops because it is slow to answer."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sae_ray.config import RunConfig
from sae_ray.judging import run as run_module
from sae_ray.judging.desk import JudgingDesk
from sae_ray.storage import LocalStorage

LATENTS = 40


class Ref:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


class Desk:
    """An actor that runs `slots` methods at once, in the order they are asked for, one batch a look."""

    def __init__(self, slots: int) -> None:
        self.slots, self.most = slots, 0
        self.queue: list[Ref] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.ask(name, args))

    def ask(self, name: str, args: tuple[Any, ...]) -> Any:
        value: Any = {
            "prepare": dict,
            "judged": lambda: {"latent": list(range(LATENTS))},
            "judge": lambda kind, latents, texts: {"stderr": {}, "drift": None, "usage": {"prompt_tokens": 5.0}},
            "progress": lambda: {"state": "scoring", "prompt_tokens": 7.0},
        }[name](*args)
        ref = Ref(name, value)
        self.queue.append(ref)
        return ref

    def ready(self, ref: Any) -> bool:
        """A batch takes until it is waited for, anything else no time at all; neither before it has a slot."""
        self.most = max(self.most, sum(each.name == "judge" for each in self.queue[: self.slots]))
        if not any(each is ref for each in self.queue[: self.slots]):
            return False
        self.queue.remove(ref)
        return True


class Ray:
    """What a judging's loop calls of `ray`; an answer that does not come in time is a timeout."""

    exceptions = run_module.ray.exceptions

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.slots: dict[str, int] = {}

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        done = next((ref for ref in refs if self.desk.ready(ref)), None)
        return ([] if done is None else [done]), [ref for ref in refs if ref is not done]

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if ref in self.desk.queue and not self.desk.ready(ref):
            raise self.exceptions.GetTimeoutError("it has no slot")
        return ref.value

    def remote(self, kind: type) -> Any:
        def options(**asked: Any) -> Any:
            self.slots[kind.__name__] = asked["max_concurrency"]
            return SimpleNamespace(remote=lambda *_: self.desk)

        return SimpleNamespace(options=options)


def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> tuple[Desk, list[tuple[Any, ...]]]:
    judge = {"autoscaling": {"max_replicas": 6}}
    tree = {"name": "x", "runs_dir": str(tmp_path), "hook": {"layer": 2}, "judging": {"batch_latents": 2}}
    config = RunConfig.model_validate(tree | {"judge": judge})
    desk, told = Desk(slots), cast(list[tuple[Any, ...]], [])
    monkeypatch.setattr(run_module, "ray", Ray(desk))
    progress = SimpleNamespace(
        say=lambda *_: None, line=lambda *_: None, start=lambda *_: None, update=lambda *told_: told.append(told_)
    )
    interrupt = SimpleNamespace(requested=False)
    storage, budget = LocalStorage(tmp_path), run_module.Budget()
    run_module._judge(config, desk, budget, cast(Any, interrupt), cast(Any, progress), time.monotonic(), storage)
    return desk, told


def test_a_desk_has_slots_for_all_batches_and_for_questions_beside_them(monkeypatch):
    ray = Ray(Desk(1))
    monkeypatch.setattr(run_module, "ray", ray)
    judge = {"autoscaling": {"max_replicas": 30}}
    config = RunConfig.model_validate({"name": "x", "hook": {"layer": 2}, "judge": judge})
    run_module._actor(JudgingDesk, config.model_dump_json(), batches=run_module.at_once(config))
    assert ray.slots["JudgingDesk"] > run_module.at_once(config) == 60


def test_all_replicas_get_their_batches_and_progress_is_told(tmp_path, monkeypatch):
    desk, told = judged(tmp_path, monkeypatch, slots=20)
    assert desk.most > 8
    assert told[-1] == (LATENTS, "scoring", 7.0, {"state": "scoring", "prompt_tokens": 7.0})
    (usage,) = LocalStorage(tmp_path).list("usage")
    assert b'"prompt_tokens": 5.0' in LocalStorage(tmp_path).read(usage)


def test_a_desk_that_does_not_say_how_far_it_is_is_no_reason_to_stop(tmp_path, monkeypatch):
    _, told = judged(tmp_path, monkeypatch, slots=1)  # no room but for one batch
    assert told[-1][0] == LATENTS
