"""Placement groups of a run: asked for, waited for with words, and given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sae_ray.config import RayConfig
from sae_ray.errors import UserError
from sae_ray.placement import Ask, NodeRoom, never, nodes_of, waits_for

POLL_S = 0.5


class Reservation:
    """A placement group for an ask; asked for at once, placed when Ray finds room."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        labels = [dict(ask.labels)] * ask.bundles if ask.labels else None
        self._group: PlacementGroup | None = placement_group(
            [dict(ask.each)] * ask.bundles, strategy="SPREAD", bundle_label_selector=labels
        )

    @property
    def placed(self) -> bool:
        """Whether every bundle has its place now: a node that is lost takes its bundles with it."""
        return self._group is not None and placement_group_table(self._group).get("state") == "CREATED"

    def at(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        """The scheduling strategy of an actor in this bundle."""
        assert self._group is not None
        return PlacementGroupSchedulingStrategy(self._group, bundle)

    def release(self) -> None:
        """Gives the resources back, and ends what still runs in them; safe to call twice."""
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
        self._group = None


def wait_placed(
    reservations: Sequence[Reservation], ray_config: RayConfig, on_wait: Callable[[str], None] = lambda _: None
) -> None:
    """Waits until all have their places.

    Args:
        on_wait: told what is waited for, several times a second; may raise to give up.
    Raises:
        UserError: not within `ray.wait_s`; or at once, where the nodes can never hold them and none may be added.
    """
    began = time.monotonic()
    # Whether a cluster that was joined has an autoscaler, or nodes that are still starting, Ray does not tell.
    grows = ray_config.address != "local" and ray_config.may_grow
    while pending := [each for each in reservations if not each.placed]:
        nodes = cluster_nodes()
        told = "; ".join(waits_for(each.ask, 0, nodes) for each in pending)
        if (why := never([each.ask for each in reservations], nodes)) is not None:
            if not grows:
                raise UserError(why)
            told += "; with no more nodes than now it will never fit"
        if time.monotonic() - began > ray_config.wait_s:
            raise UserError(f"{told}; waited {ray_config.wait_s:g} s (ray.wait_s)")
        on_wait(told)
        time.sleep(POLL_S)


def cluster_nodes() -> list[NodeRoom]:
    from ray.util.client import ray as client

    # A driver behind Ray's client sees nothing of the cluster's state itself.
    free = ray.get(ray.remote(num_cpus=0)(_free).remote()) if client.is_connected() else _free()
    return nodes_of(ray.nodes(), free)


def _free() -> dict[str, dict[str, Any]]:
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, Any]] = available_resources_per_node()
    return found
