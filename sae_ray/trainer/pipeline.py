"""Windows on their way through the trainer group, seen from the controller.

Every rank trains the same windows in the same order, so a window is trained when all ranks have answered.
Two windows in flight keep the ranks busy while the controller looks elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import ray

from sae_ray.config import RunConfig
from sae_ray.trainer.group import RankDied, TrainerGroup
from sae_ray.trainer.mixing import Cursor, batch_count, next_cursor
from sae_ray.trainer.rank import WindowResult

PEER_GRACE_S = 10.0


@dataclass
class _Flight:
    window: int
    ends_window: bool
    pending: list[ray.ObjectRef]
    deadline: float
    began: float
    results: list[WindowResult] = field(default_factory=list)


@dataclass(frozen=True)
class TrainedWindow:
    window: int
    ends_window: bool  # False: the window's later batches are still to come
    result: WindowResult
    wait_seconds: float  # longest any rank waited for blocks


class WindowPipeline:
    """What has been handed to one generation of the group, in order.

    Args:
        cursor: the next batch to hand over.
        step: steps handed over so far.
    """

    def __init__(self, config: RunConfig, group: TrainerGroup, cursor: Cursor, step: int):
        self._config = config
        self._group = group
        self._flights: list[_Flight] = []
        self.cursor = cursor
        self.step = step

    def __len__(self) -> int:
        return len(self._flights)

    def submit(self, blocks: list[ray.ObjectRef], n_tokens: int, max_steps: int) -> None:
        """Hands over the cursor's window: its remaining batches, at most `max_steps` of them."""
        window, start = self.cursor
        n_batches = batch_count(n_tokens, self._config.trainer.batch_tokens)
        steps = min(n_batches - start, max_steps)
        refs = self._group.train_window(window, start, blocks, steps)
        self.cursor = next_cursor(window, start + steps, n_batches)
        self.step += steps
        now = time.monotonic()
        deadline = now + self._config.trainer.step_timeout_s * (1 + len(self._flights))
        self._flights.append(_Flight(window, self.cursor.window > window, refs, deadline, now))

    def oldest_s(self, now: float) -> float:
        """Age of the oldest window that was handed over and is not trained; 0 for none."""
        return now - self._flights[0].began if self._flights else 0.0

    def pending_refs(self) -> list[ray.ObjectRef]:
        """Of the oldest window: windows are reported in order, also when a late look finds several trained."""
        return list(self._flights[0].pending) if self._flights else []

    def on_ready(self, ref: ray.ObjectRef) -> TrainedWindow | None:
        """Takes a rank's answer; returns the window if it was the last one missing.

        Raises:
            RankDied: this rank's process, or a peer's, is gone.
            UserError: what the rank found wrong.
        """
        flight = next(flight for flight in self._flights if ref in flight.pending)
        flight.results.append(self._group.take(f"window {flight.window} to be trained", ref))
        flight.pending.remove(ref)
        if flight.pending:
            return None
        self._flights.remove(flight)
        waited = max(result.block_wait_seconds for result in flight.results)
        return TrainedWindow(flight.window, flight.ends_window, flight.results[0], waited)

    def check_deadlines(self) -> None:
        """Raises RankDied when a window takes longer than `trainer.step_timeout_s`: a rank hangs.

        A rank that has answered does not hang, however late the controller looks.
        """
        for flight in self._flights:
            if time.monotonic() <= flight.deadline:
                continue
            n = len(flight.pending)
            if silent := ray.wait(flight.pending, num_returns=n, timeout=0, fetch_local=False)[1]:
                raise RankDied(
                    f"window {flight.window} was not trained within trainer.step_timeout_s = "
                    f"{self._config.trainer.step_timeout_s:g} s; {len(silent)} ranks did not answer"
                )
