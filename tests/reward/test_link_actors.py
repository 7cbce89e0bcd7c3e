"""Which actors a run's judging starts, where they are placed, and that they end with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from round_world import run_config

from sae_ray.config import RunConfig
from sae_ray.reward import link
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.steering_actor import SteeringModel


class Ray:
    """Remembers what is asked of it."""

    def __init__(self) -> None:
        self.started: list[tuple[type, dict[str, Any], tuple[Any, ...]]] = []
        self.killed: list[Any] = []

    def remote(self, kind: type) -> Any:
        def options(**place: Any) -> Any:
            def start(*args: Any) -> str:
                self.started.append((kind, place, args))
                return f"handle of a {kind.__name__}"

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@pytest.fixture
def ray(monkeypatch) -> Ray:
    fake = Ray()
    monkeypatch.setattr(link, "ray", fake)
    return fake


def started(config: RunConfig) -> None:
    desk = link.DeskLink(config, SimpleNamespace(start=lambda: None))  # type: ignore[arg-type]
    desk.start()
    desk.stop()


def test_without_causality_nothing_is_steered(ray, tmp_path: Path):
    started(run_config(tmp_path))
    ((kind, place, args),) = ray.started
    assert (kind, place["num_cpus"], args[-1]) == (RewardDesk, 0, None)
    assert ray.killed == ["handle of a RewardDesk"]


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda")])
def test_causality_places_one_actor_and_ends_it_with_the_desk(ray, tmp_path: Path, gpus, device):
    rewards = {"weights": {"causality": 0.5}, "threads": 3, "causality": {"cpus": 0.25, "gpus": gpus}}
    config = run_config(tmp_path, estimator="selection_bonus", rewards=rewards)
    started(config)
    (steering, place, args), (desk, _, desk_args) = ray.started
    assert (steering, desk) == (SteeringModel, RewardDesk)
    assert place == {"num_cpus": 0.25, "num_gpus": gpus}
    assert args == (config.model_dump_json(), device, 3)
    assert desk_args[-1] == "handle of a SteeringModel"
    assert ray.killed == ["handle of a RewardDesk", "handle of a SteeringModel"]
