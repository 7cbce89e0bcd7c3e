"""Leases: order, bounds, and that nothing is lost or trained twice, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.activations.scheduler import BlockKey, BlockScheduler


def train(*ids: int) -> list[BlockKey]:
    return [BlockKey("train", i) for i in ids]


def scheduler(window=4, timeout=10.0, per_worker=1) -> BlockScheduler:
    return BlockScheduler(window, timeout, per_worker)


def test_blocks_are_leased_in_id_order():
    s = scheduler()
    assert [s.lease(w, 0) for w in "abc"] == train(0, 1, 2)


def test_the_window_bounds_what_is_leased_or_held():
    s = scheduler(window=2, per_worker=5)
    assert [s.lease("a", 0) for _ in range(3)] == [*train(0, 1), None]
    s.complete("a", *train(0), 0)
    assert s.lease("a", 0) is None


def test_a_slot_is_released_by_training_not_by_delivery():
    s = scheduler(window=1)
    s.lease("a", 0)
    s.complete("a", *train(0), 0)
    assert s.lease("a", 0) is None
    s.trained([0])
    assert s.lease("a", 0) == BlockKey("train", 1)


def test_a_worker_gets_no_more_leases_than_allowed():
    s = scheduler(per_worker=2)
    assert [s.lease("a", 0) for _ in range(3)] == [*train(0, 1), None]


def test_a_dead_workers_leases_go_first_and_lowest_first():
    s = scheduler(window=6, per_worker=2)
    for worker in "aab":
        s.lease(worker, 0)
    assert s.worker_died("a") == train(0, 1)
    assert [s.lease("b", 0), s.lease("c", 0), s.lease("c", 0)] == train(0, 1, 3)


def test_a_timed_out_lease_is_reported_until_its_worker_is_ended():
    s = scheduler(timeout=10)
    s.lease("a", 0)
    assert s.expired(9.9) == []
    assert s.expired(10) == [("a", *train(0))]
    s.worker_died("a")
    assert s.expired(11) == []
    assert s.lease("b", 11) == BlockKey("train", 0)


def test_the_clock_of_a_second_lease_starts_when_the_first_is_delivered():
    s = scheduler(timeout=10, per_worker=2)
    s.lease("a", 0)
    s.lease("a", 0)
    s.complete("a", *train(0), 9)
    assert s.expired(18) == []
    assert s.expired(19) == [("a", *train(1))]


def test_the_second_delivery_of_a_block_is_a_duplicate():
    s = scheduler()
    s.lease("a", 0)
    s.worker_died("a")
    s.lease("b", 0)
    assert s.complete("a", *train(0), 1) == "accepted"  # late, and as good as any
    assert s.complete("b", *train(0), 2) == "duplicate"
    assert s.n_held == 1


def test_a_delivery_after_training_is_stale():
    s = scheduler()
    s.lease("a", 0)
    s.worker_died("a")
    s.lease("b", 0)
    s.complete("b", *train(0), 1)
    s.trained([0])
    assert s.complete("a", *train(0), 2) == "stale"
    assert s.n_held == 0


@pytest.mark.parametrize("ids", [[1], [0, 0], [0, 2]])
def test_training_out_of_order_or_twice_is_refused(ids):
    s = scheduler(per_worker=3)
    for _ in range(3):
        s.complete("a", s.lease("a", 0), 0)
    with pytest.raises(ValueError, match="reported as trained"):
        s.trained(ids)


def test_training_what_was_never_delivered_is_refused():
    s = scheduler()
    s.lease("a", 0)
    with pytest.raises(ValueError, match="not held"):
        s.trained([0])


def test_requested_blocks_come_before_train_blocks_and_outside_the_window():
    s = scheduler(window=1, per_worker=9)
    evidence = [BlockKey("evidence", i) for i in (5, 6)]
    s.request(evidence)
    assert [s.lease("a", 0) for _ in range(4)] == [*evidence, *train(0), None]
    s.complete("a", evidence[0], 0)
    s.request(evidence)  # again: already there
    assert s.lease("a", 0) is None
    s.release(evidence)
    assert not s.holds(evidence[0])
    assert s.complete("a", evidence[1], 0) == "stale"


def test_seek_drops_what_the_new_window_does_not_want():
    s = scheduler(window=2, per_worker=2)
    for _ in range(2):
        s.complete("a", s.lease("a", 0), 0)
    assert s.seek(1) == train(0)
    assert s.lease("a", 0) == BlockKey("train", 2)
    assert s.seek(0) == []
    assert s.lease("a", 0) == BlockKey("train", 0)
    assert s.complete("a", BlockKey("train", 2), 0) == "stale"  # beyond the window now


def test_a_lost_object_is_computed_again():
    s = scheduler()
    s.complete("a", s.lease("a", 0), 0)
    assert s.lost(*train(0))
    assert not s.lost(*train(0))
    assert s.lease("a", 0) == BlockKey("train", 0)


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["lease", "deliver", "deliver_late", "die", "lose", "train", "tick"]),
            st.integers(0, 2),
        ),
        max_size=120,
    ),
    window=st.integers(1, 6),
    per_worker=st.integers(1, 3),
)
def test_no_block_is_lost_or_trained_twice(actions, window, per_worker):
    s = scheduler(window, 5.0, per_worker)
    request = BlockKey("evidence", 0)
    s.request([request])
    now, trained = 0.0, []
    open_leases: list[tuple[str, BlockKey]] = []
    orphans: list[tuple[str, BlockKey]] = []  # of workers given up, which may still deliver

    def bounded() -> bool:
        leased = {key for _, key in open_leases if key != request}
        held = s.n_held - s.holds(request)
        return held <= window and all(k.block_id < s.first_untrained + window for k in leased)

    def end(worker: str) -> None:
        s.worker_died(worker)
        for lease in [lease for lease in open_leases if lease[0] == worker]:
            open_leases.remove(lease)
            orphans.append(lease)

    def train_next() -> None:
        if s.holds(BlockKey("train", s.first_untrained)):
            trained.append(s.first_untrained)
            s.trained([s.first_untrained])

    for action, who in actions:
        worker = str(who)
        now += 1
        if action == "lease" and (key := s.lease(worker, now)) is not None:
            assert key not in [k for _, k in open_leases]
            assert not s.holds(key)
            open_leases.append((worker, key))
        elif action == "deliver" and open_leases:
            s.complete(*open_leases.pop(who % len(open_leases)), now)
        elif action == "deliver_late" and orphans:
            s.complete(*orphans.pop(0), now)
        elif action == "die":
            end(worker)
        elif action == "lose":
            s.lost(BlockKey("train", s.first_untrained + who))
        elif action == "train":
            train_next()
        elif action == "tick":
            for expired in {worker for worker, _ in s.expired(now)}:
                end(expired)
        assert bounded()

    # However it stood, one working producer finishes the job.
    for worker in {worker for worker, _ in open_leases}:
        end(worker)
    for _ in range(2 * window + 2):
        now += 1
        if (key := s.lease("survivor", now)) is not None:
            assert s.complete("survivor", key, now) == "accepted"
        train_next()
    assert s.holds(request)
    assert trained == list(range(len(trained)))
    assert len(trained) >= window
