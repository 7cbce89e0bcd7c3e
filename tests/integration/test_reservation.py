"""Reservations on a real Ray: what waits says for what, and goes on when there is room. No actor is started."""

from __future__ import annotations

import time

import pytest

from sae_ray.config import RayConfig
from sae_ray.errors import UserError
from sae_ray.placement import Ask
from sae_ray.reservation import Reservation, cluster_nodes, wait_placed

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]


def asked(cpus: float, who: str = "trainer", bundles: int = 1, **labels: str) -> Reservation:
    return Reservation(Ask(who, "rank", bundles, {"CPU": cpus}, labels, "trainer.cpus"))


def taken() -> Reservation:
    """The judges' place, all but one CPU of what is free; taken before anybody else asks: Ray serves in no order."""
    free, before = 0.0, -1.0
    while free != before or free < 5:  # what earlier tests gave back may still be on its way
        time.sleep(1)
        free, before = cluster_nodes()[0].free.get("CPU", 0), free
    others = asked(free - 1, "judges")
    wait_placed([others], RayConfig())
    return others


def test_a_place_that_others_hold_is_waited_for_with_words_and_taken_when_it_is_free() -> None:
    others = taken()
    ours = asked(4)
    said: list[str] = []

    def listen(told: str) -> None:
        said.append(told)
        if len(said) == 2:
            others.release()

    try:
        wait_placed([ours], RayConfig(), listen)
        assert ours.placed
        assert (
            "trainer: 0 of 1 places found; each rank needs 4 CPU on one node; too little CPU is free on any" in said[0]
        )
        assert "1 of 8 CPU" in said[0]
    finally:
        others.release()
        ours.release()


def test_a_place_that_stays_taken_ends_the_wait_at_its_deadline() -> None:
    others, ours = taken(), asked(4)
    try:
        with pytest.raises(UserError, match=r"too little CPU is free .*waited 3 s \(ray\.wait_s\)$"):
            wait_placed([ours], RayConfig(wait_s=3))
    finally:
        others.release()
        ours.release()


def test_what_an_own_ray_can_never_hold_is_said_at_once() -> None:
    for hopeless, said in (
        (asked(9), r"holds at most 0 of 1 places of the trainer"),
        (asked(3, bundles=3), r"holds at most 2 of 3"),
        (asked(1, role="judge"), r"with role=judge, and none of the 1 nodes is such"),
    ):
        began = time.monotonic()
        try:
            with pytest.raises(UserError, match=said):
                wait_placed([hopeless], RayConfig(wait_s=600))
        finally:
            hopeless.release()
        assert time.monotonic() - began < 300


def test_a_cluster_that_may_grow_is_waited_for_although_its_nodes_cannot_hold_it() -> None:
    joined = asked(9)
    try:
        with pytest.raises(UserError, match=r"with no more nodes than now it will never fit; waited 2 s"):
            wait_placed([joined], RayConfig(address="127.0.0.1:6379", wait_s=2))
        with pytest.raises(UserError, match=r"holds at most 0 of 1"):
            wait_placed([joined], RayConfig(address="127.0.0.1:6379", may_grow=False))
    finally:
        joined.release()


def test_two_that_fit_alone_and_not_together_are_told_apart_from_a_busy_cluster() -> None:
    pair = [asked(5), asked(5, "producers")]
    try:
        with pytest.raises(
            UserError, match=r"has 8 CPU and 10 are asked \(5 for the trainer and 5 for the producers\)"
        ):
            wait_placed(pair, RayConfig(wait_s=600))
    finally:
        for each in pair:
            each.release()


def test_a_node_is_seen_with_what_it_has() -> None:
    (node,) = cluster_nodes()
    assert node.total["CPU"] == 8
    assert node.labels["ray.io/node-id"]
