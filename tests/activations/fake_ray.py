"""A stand-in for `ray` as the stream uses it: two producers' actors whose answers are there at once, or when told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from sae_ray.activations import pool as pool_module
from sae_ray.activations import stream as stream_module


class Ref:
    """A stand-in for an object reference: identity is all that the driver uses of one."""

    def __init__(self, value: Any = None) -> None:
        self.value, self.ready = value, True


class FakeRay:
    """What the stream calls of `ray`, on two nodes that may be taken away."""

    exceptions, ObjectRef = ray.exceptions, Ref

    def __init__(self) -> None:
        self.alive = {"node-0": True, "node-1": True}
        self.started, self.killed = 0, 0

    def remote(self, _cls: Any) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, *_: Any) -> Any:
        info = {"widths": {"blocks.2.hook_resid_post": 8}, "dtype": "float32", "node_id": f"node-{self.started % 2}"}
        self.started += 1
        made = {"tokens": 10, "seconds": 1.0, "corpus_seconds": 0.5, "forward_seconds": 0.5}
        produce = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: (Ref(dict(made)), Ref())))
        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: Ref(info)), produce=produce)

    def get(self, ref: Ref, timeout: float | None = None) -> Any:
        return ref.value

    def wait(self, refs: list[Ref], num_returns: int = 1, **_: Any) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if ref.ready][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]

    def kill(self, _actor: Any) -> None:
        self.killed += 1


def on_fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(stream_module, "ray", fake)
    monkeypatch.setattr(pool_module, "ray", fake)
    place = SimpleNamespace(at=lambda _: None)  # there is room at once
    monkeypatch.setattr(pool_module, "Reservation", lambda _: place)
    monkeypatch.setattr(pool_module, "wait_placed", lambda *_: None)
    return fake
