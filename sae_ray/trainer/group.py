"""The controller's side of the trainer: places dp*tp ranks, connects them, feeds them, commits checkpoints.

Each wait has a deadline and says what it waits for. Ranks never restart on their own: a dead or hanging rank
surfaces as `RankDied`, and the controller stops the group and starts the next generation from the last
committed checkpoint.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.placement import trainer_ask
from sae_ray.reservation import Reservation, wait_placed
from sae_ray.storage import absolute, aws_environment
from sae_ray.trainer import checkpoint
from sae_ray.trainer.claim import Claim
from sae_ray.trainer.rank import TrainerRank, WindowResult
from sae_ray.trainer.saving import Saving

POLL_S = 1.0
NETWORK_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")


class RankDied(Exception):
    """A rank's process ended, lost its peers or its blocks, or hangs: the group must be rebuilt as a new generation."""


class TrainerGroup:
    def __init__(self, config: RunConfig, widths: dict[str, int], generation: int):
        self.config, self.widths, self.generation = config, widths, generation
        self.has_control = False
        self.pids: list[int] = []  # of the ranks
        self.addresses: list[str] = []  # of their nodes
        self._ranks: list[Any] = []
        self._own: Reservation | None = None

    # -- life and death -------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        config: RunConfig,
        widths: dict[str, int],
        generation: int,
        on_wait: Callable[[str], None] = lambda _: None,
        place: Reservation | None = None,
    ) -> TrainerGroup:
        """Reserves the resources, starts the ranks and connects them.

        Args:
            widths: hook name -> width of its activations, for every hook point of the blocks.
            on_wait: told about once a second what is being waited for; may raise to give up.
            place: resources that the caller has reserved, and keeps when the group stops; None: the group's own.
        Raises:
            UserError: the cluster cannot place the ranks within `ray.wait_s` (missing resources are named).
            RankDied: a rank ended or did not answer while connecting.
        """
        group = cls(config, widths, generation)
        try:
            group._place(place, on_wait)
            group._connect(on_wait)
        except BaseException:
            group.stop()
            raise
        return group

    def stop(self) -> None:
        """Ends all ranks and frees their resources; safe to call twice."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        if self._own is not None:
            self._own.release()
        self._ranks, self._own, self.pids = [], None, []

    @property
    def rank_handles(self) -> list[Any]:
        """Actors that together hold every latent once, in order of latents."""
        return self._ranks[: self.config.trainer.tp]

    # -- training -------------------------------------------------------------------------------------

    def build(self, first_window: list[ray.ObjectRef]) -> dict[str, float]:
        """New SAEs on all ranks, from the first window's blocks. Returns {"input_scale"} of main."""
        self.has_control = False
        return self._all("the SAE to be built", "build", first_window)[0]

    def train_window(
        self, window: int, start_batch: int, blocks: list[ray.ObjectRef], max_steps: int | None = None
    ) -> list[ray.ObjectRef]:
        """Submits the batches of a window from `start_batch` on, at most `max_steps` of them.

        Args:
            blocks: the window's blocks in id order.
        Returns:
            One reference to a `WindowResult` per rank; the window is trained when all are there.
        """
        return [rank.train_window.remote(window, start_batch, blocks, max_steps) for rank in self._ranks]

    def window_result(self, pending: list[ray.ObjectRef]) -> WindowResult:
        """Waits for a window on all ranks; the result of the rank that waited longest for its blocks."""
        results: list[WindowResult] = self._wait("a window to be trained", pending)
        return max(results, key=lambda result: result.block_wait_seconds)

    def apply_rewards(self, batch: Any, evidence: list[ray.ObjectRef]) -> list[dict[str, Any]]:
        """Installs a round's rewards on every rank, after what is in flight.

        Args:
            batch: a `RewardBatch`, or a reference to one.
            evidence: the evidence blocks that its context ids refer to.
        """
        reference = batch if isinstance(batch, ray.ObjectRef) else ray.put(batch)
        return self._all("rewards to be installed", "apply_rewards", [reference], evidence)

    def fork_control(self) -> None:
        """Starts the control copy on every rank."""
        self._all("the control copy to be forked", "fork_control")
        self.has_control = True

    # -- checkpoints ----------------------------------------------------------------------------------

    def begin_save(
        self,
        claim: Claim,
        step: int,
        cursor: tuple[int, int],
        extra: dict[str, Any] | None = None,
        pin: str | None = None,
    ) -> Saving:
        """Snapshots all ranks, which then write `step-N` at the claimed place while they train on; `Saving` commits it.

        Args:
            cursor: (window, batches trained in it), where a resumed run goes on.
            extra: JSON that comes back in the manifest.
            pin: a name; a pinned checkpoint is never pruned.
        Raises:
            UserError: somebody else has taken the place over; nothing was touched there.
        """
        path = checkpoint.step_dir(claim.home, step)
        claim.check()
        checkpoint.begin(path)
        reports = self._all(f"{path} to be snapshotted", "save", absolute(path), secrets.token_hex(4))
        about = {"step": step, "cursor": list(cursor), "pin": pin, "extra": extra or {}}

        def manifest(completed: list[dict[str, Any]]) -> dict[str, Any]:
            return checkpoint.manifest_of(self.config, self.widths[self.config.hook.name], completed, about)

        return Saving(self, claim, path, step, pin, reports, manifest, 3 * self.config.trainer.step_timeout_s)

    def ask_writers(self, ranks: list[int], patience_s: float) -> list[ray.ObjectRef]:
        """One question to each of `ranks`: are its files written?"""
        return [self._ranks[rank].written.remote(patience_s) for rank in ranks]

    def save_checkpoint(
        self,
        claim: Claim,
        step: int,
        cursor: tuple[int, int],
        extra: dict[str, Any] | None = None,
        pin: str | None = None,
    ) -> str | Path:
        """Like `begin_save`, but returns when it is committed and old checkpoints are pruned."""
        saving = self.begin_save(claim, step, cursor, extra, pin)
        saving.wait()
        claim.check()
        checkpoint.prune(claim.home, self.config.trainer.keep_checkpoints)
        return saving.path

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restores all ranks from a committed checkpoint; returns its manifest (`step`, `cursor`, `extra`).

        Raises:
            UserError: not committed, corrupt (the file is named), or of another SAE.
        """
        manifest = self._all(f"{path} to be loaded", "load", absolute(path))[0]
        self.has_control = "control" in manifest["copies"]
        return manifest

    # -- starting -------------------------------------------------------------------------------------

    def _place(self, place: Reservation | None, on_wait: Callable[[str], None]) -> None:
        trainer = self.config.trainer
        if place is None:
            place = self._own = Reservation(trainer_ask(trainer))
        wait_placed([place], self.config.ray, on_wait)
        actor = ray.remote(TrainerRank)
        self._ranks = [
            actor.options(
                num_cpus=trainer.cpus,
                num_gpus=trainer.gpus,
                resources=dict(trainer.resources),
                max_restarts=0,
                runtime_env={"env_vars": aws_environment()},
                scheduling_strategy=place.at(replica),
            ).remote(self.config.model_dump_json(), self.widths)
            for replica in range(trainer.dp)
            for _ in range(trainer.tp)
        ]

    def _connect(self, on_wait: Callable[[str], None]) -> None:
        wait_s, world = self.config.ray.wait_s, len(self._ranks)
        places = self._all("trainer ranks to start", "node_address", timeout=wait_s, on_wait=on_wait)
        self.addresses = [address for address, _ in places]
        one_node = len({node for _, node in places}) == 1
        address, port = ("127.0.0.1" if one_node else places[0][0]), 0
        if world > 1:
            opened = [self._ranks[0].open_store.remote(address, world)]
            port = self._wait("the trainer's rendezvous to open", opened, wait_s)[0]
        joining = [
            rank.join.remote(address, port, index, world, self.generation) for index, rank in enumerate(self._ranks)
        ]
        self.pids = self._wait(f"{world} trainer ranks to connect", joining, wait_s, on_wait)

    # -- waiting --------------------------------------------------------------------------------------

    def _all(
        self,
        what: str,
        method: str,
        *args: Any,
        timeout: float | None = None,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> list[Any]:
        calls = [getattr(rank, method).remote(*args) for rank in self._ranks]
        return self._wait(what, calls, timeout, on_wait)

    def _wait(
        self,
        what: str,
        calls: list[ray.ObjectRef],
        timeout: float | None = None,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> list[Any]:
        """Results of `calls`; the first failure ends the wait, because the other ranks would hang for it."""
        # Up to two windows may be queued before the call, each with its own step_timeout_s.
        timeout = timeout or 3 * self.config.trainer.step_timeout_s
        ends, waiting, results = time.monotonic() + timeout, list(calls), {}
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            for ref in done:
                results[ref] = self.take(what, ref)
            if not done:
                on_wait(what)
            if waiting and time.monotonic() > ends:
                raise RankDied(f"waited {timeout:g} s for {what}: {len(waiting)} of {len(calls)} ranks did not answer")
        return [results[ref] for ref in calls]

    def take(self, what: str, ref: ray.ObjectRef) -> Any:
        """A rank's finished answer.

        Raises:
            RankDied: its process, or one that it was talking to, is gone.
            UserError: what the rank found wrong.
        """
        try:
            return ray.get(ref)
        except ray.exceptions.RayActorError as error:
            raise RankDied(f"a trainer rank ended while the group waited for {what}: {error}") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if isinstance(cause, ray.exceptions.ObjectLostError):
                raise RankDied(f"a node died with blocks that the group needed for {what}: {cause}") from error
            if _lost_a_peer(cause):
                raise RankDied(f"a trainer rank lost its peers while the group waited for {what}: {cause}") from error
            raise


def _lost_a_peer(cause: BaseException) -> bool:
    """Whether a rank failed because another one went away: gloo reports that as a plain RuntimeError."""
    if type(cause).__name__ in NETWORK_ERRORS:
        return True
    text = str(cause).lower()
    return isinstance(cause, RuntimeError) and ("gloo" in text or "connection" in text or "nccl" in text)
