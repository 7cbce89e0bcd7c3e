"""What a run asks of a cluster, and what a pending placement waits for. Pure: no Ray; nodes are an argument.

An ask is a number of equal bundles. A bundle lies on one node; bundles are spread over nodes where they can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_ray.config import ActivationsConfig, RunConfig, TrainerConfig

SHOWN_NODES = 4
# Ray counts resources in ten-thousandths.
_EPSILON = 1e-4


@dataclass(frozen=True)
class Ask:
    """Places for `bundles` of something, each of which needs `each` on one node with the labels of `labels`."""

    who: str
    what: str  # one bundle, in words
    bundles: int
    each: dict[str, float]
    labels: dict[str, str]
    keys: str  # of the config, that decide it


@dataclass(frozen=True)
class NodeRoom:
    """A node that is up: its address, and what it has and has free of each resource."""

    address: str
    total: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def trainer_ask(trainer: TrainerConfig) -> Ask:
    """One bundle is a whole tensor-parallel group, so that Ray cannot tear one apart (STRICT_PACK)."""
    what = "rank" if trainer.tp == 1 else f"tensor-parallel group of {trainer.tp} ranks"
    keys = "trainer.dp, trainer.tp, trainer.cpus or trainer.gpus"
    return Ask("trainer", what, trainer.dp, _need(trainer, trainer.tp), trainer.label_selector, keys)


def producer_ask(activations: ActivationsConfig, number: int) -> Ask:
    keys = "activations.producers, activations.cpus or activations.gpus"
    return Ask("producers", "producer", number, _need(activations), activations.label_selector, keys)


def asks_of(config: RunConfig, producers: int) -> list[Ask]:
    """What a training run reserves before its judges deploy, in this order."""
    return [trainer_ask(config.trainer), producer_ask(config.activations, producers)]


def nodes_of(described: Iterable[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]]) -> list[NodeRoom]:
    """The nodes that are up.

    Args:
        described: `ray.nodes()`.
        free: node id -> what it has free.
    """
    return [
        NodeRoom(
            address=node.get("NodeManagerAddress", node["NodeID"][:8]),
            total=dict(node["Resources"]),
            free=dict(free.get(node["NodeID"], {})),
            labels=dict(node.get("Labels") or {}),
        )
        for node in described
        if node["Alive"]
    ]


def selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector, as Ray reads it: value, !value, in(a, b), !in(a, b)."""
    for key, asked in selector.items():
        negated, wanted = asked.startswith("!"), asked.removeprefix("!")
        listed = re.fullmatch(r"in\((.*)\)", wanted)
        values = [value.strip() for value in listed.group(1).split(",")] if listed else [wanted]
        if (labels.get(key) in values) == negated:
            return False
    return True


def held(ask: Ask, nodes: Iterable[NodeRoom]) -> int:
    """How many of the ask's bundles the nodes could hold if nothing ran on them; exact, because bundles are equal."""
    return sum(_fits(ask, node, node.total) for node in nodes)


def never(asks: Iterable[Ask], nodes: Iterable[NodeRoom]) -> str | None:
    """Why these nodes can never hold all asks, however long one waits; None: they may.

    Each ask is looked at alone and then all together by their sums: that they fit side by side is not promised.
    """
    asks, nodes = list(asks), list(nodes)
    for ask in asks:
        if (most := held(ask, nodes)) < ask.bundles:
            return (
                f"the cluster holds at most {most} of {ask.bundles} places of the {ask.who}, however long one waits: "
                f"{_needs(ask, nodes)}: add nodes, or lower {ask.keys}"
            )
    for name in dict.fromkeys(name for ask in asks for name in ask.each):
        asked = sum(ask.bundles * ask.each.get(name, 0) for ask in asks)
        there = sum(node.total.get(name, 0) for node in nodes)
        if asked > there + _EPSILON:
            parts = " and ".join(
                f"{ask.bundles * ask.each[name]:g} for the {ask.who}" for ask in asks if ask.each.get(name)
            )
            return (
                f"the cluster has {there:g} {name} and {asked:g} are asked ({parts}): add nodes, or lower "
                + " or ".join(ask.keys for ask in asks if ask.each.get(name))
            )
    return None


def waits_for(ask: Ask, placed: int, nodes: Iterable[NodeRoom]) -> str:
    """What a pending placement waits for: the resource, how much is asked, how much is free, and where.

    Args:
        placed: bundles that have their place.
    """
    return f"{ask.who}: {placed} of {ask.bundles} places found; {_needs(ask, list(nodes))}"


def _needs(ask: Ask, nodes: list[NodeRoom]) -> str:
    there = [node for node in nodes if selected(node.labels, ask.labels)]
    each = " and ".join(f"{amount:g} {name}" for name, amount in ask.each.items() if amount)
    where = f" with {', '.join(f'{key}={value}' for key, value in ask.labels.items())}" if ask.labels else ""
    told = f"each {ask.what} needs {each} on one node{where}"
    if not there:
        return f"{told}, and none of the {len(nodes)} nodes is such" if nodes else f"{told}, and there are no nodes"
    short = [
        name for name, amount in ask.each.items() if all(node.free.get(name, 0) + _EPSILON < amount for node in there)
    ]
    if short:
        told += f"; too little {' and '.join(short)} is free on any"
    names = [name for name, amount in ask.each.items() if amount]
    roomy = sorted(there, key=lambda node: [-node.free.get(name, 0) for name in (short or names)])
    shown = [
        f"{node.address} "
        + ", ".join(f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}" for name in names)
        for node in roomy[:SHOWN_NODES]
    ]
    more = f"; and {len(there) - SHOWN_NODES} nodes with less" if len(there) > SHOWN_NODES else ""
    return f"{told}; free: {'; '.join(shown)}{more}"


def _need(section: TrainerConfig | ActivationsConfig, times: int = 1) -> dict[str, float]:
    need = {"CPU": section.cpus * times}
    if section.gpus:
        # More than one GPU are whole ones: a share of one cannot be next to them in one bundle.
        gpus = section.gpus * times
        need["GPU"] = gpus if gpus <= 1 else float(math.ceil(gpus))
    return need | {name: amount * times for name, amount in section.resources.items()}


def _fits(ask: Ask, node: NodeRoom, room: Mapping[str, float]) -> int:
    if not selected(node.labels, ask.labels):
        return 0
    counts = [math.floor((room.get(name, 0) + _EPSILON) / amount) for name, amount in ask.each.items() if amount]
    return min([ask.bundles, *counts])
