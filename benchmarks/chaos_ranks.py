"""The cheapest level: one real trainer rank in a process of its own, without Ray.

It trains from the store, commits checkpoints in the controller's order to a folder or a bucket, and dies or is refused
where the plan says; then the next process resumes from the last commit. Processes are forked from one that has imported
everything, so a death costs about a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from chaos_actors import FaultyRank, WatchedLog, fuses_of, watch_commits
from chaos_faults import Fuses

from sae_ray.activations.store import ActivationStore
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.reward.applied import AppliedRounds
from sae_ray.storage import LocalStorage, absolute
from sae_ray.trainer import checkpoint
from sae_ray.trainer.claim import Claim
from sae_ray.trainer.mixing import Cursor

HERE = Path(__file__).parent
PRELOADED = [
    "__main__",
    "chaos_levels",
    "torch.utils.tensorboard.writer",
    "torch._dynamo",
    "sae_ray.s3",
    "sae_ray.reward.credit",
]
LIMIT_S = 1500.0  # for one process, on a machine that does much else


def forking() -> Any:
    """What starts processes in which everything has been imported already."""
    # The process that is forked from looks for modules where PYTHONPATH says, not where this one does.
    paths = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Loop:
    """One process's part of a run: from the last commit until the end, or until it dies."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.home = config, checkpoint.home(config)
        store = ActivationStore.open(str(config.activations.store))
        self._store, self._hooks = store, [point.name for point in config.hooks]
        widths = {hook: last - first for hook, (first, last) in store.columns.items()}
        self._d_in = widths[config.hook.name]
        self.rank = FaultyRank(config.model_dump_json(), widths)
        self.rank.join("127.0.0.1", 0, 0, 1, 0)
        self._rounds = [AppliedRounds(LocalStorage(str(config.rlaif.replay_rewards))).read(n) for n in range(2)]
        self.claim = Claim(self.home, config.name)
        self.claim.hold()
        latest = checkpoint.latest(self.home)
        manifest = checkpoint.read_manifest(latest) if latest else {"step": 0}
        self.log = WatchedLog(config.run_dir, manifest["step"])
        self.log.fuses = fuses_of(config)
        watch_commits(self.log.fuses)
        self.cursor, self.step, self.tokens, self.rounds_done = Cursor(0, 0), 0, 0, 0
        if latest is None:
            self.rank.build(self._blocks("train", 0, config.activations.mix_blocks))
        else:
            manifest = self.rank.load(absolute(latest))
            self.cursor, self.step = Cursor(*manifest["cursor"]), manifest["step"]
            self.tokens, self.rounds_done = manifest["extra"]["tokens"], manifest["extra"]["rounds_done"]
            self.log.event("resume", step=self.step)
        self.saved = self.step

    def run(self) -> None:
        config = self.config
        self._train_until(config.trainer.steps, pin="reconstruction")
        if "control" not in self.rank.copies:
            self.rank.fork_control()
        evidence = self._blocks("evidence", 0, config.rlaif.evidence_blocks)
        for number in range(self.rounds_done, len(self._rounds)):
            applied = self._rounds[number]
            self._train_until(applied.at_step)
            self.rank.apply_rewards([applied.batch], evidence)
            self.rounds_done = number + 1
            self.log.event("rewards_applied", round=number, at_step=self.step)
        self._train_until(config.total_steps, pin="final")

    def _train_until(self, last: int, pin: str | None = None) -> None:
        size = self.config.activations.mix_blocks
        while self.step < last:
            window = self.cursor.window
            blocks = self._blocks("train", window * size, size)
            result = self.rank.train_window(window, self.cursor.batch, blocks, last - self.step)
            self.cursor, self.step = result.next_cursor, result.last_step
            self.tokens += result.tokens
            self.log.metrics(result.metrics)
            if self.step < last and self.step - self.saved >= self.config.trainer.checkpoint_every:
                self._save(None)
        if pin and self.saved < self.step:
            self._save(pin)

    def _save(self, pin: str | None) -> None:
        path = checkpoint.step_dir(self.home, self.step)
        self.claim.check()
        checkpoint.begin(path)
        report = self.rank.save(absolute(path), secrets.token_hex(4))
        while (written := self.rank.written(1.0)) is None:
            pass
        extra = {"tokens": self.tokens, "rounds_done": self.rounds_done, "rewards_applied": 0}
        about = {"step": self.step, "cursor": list(self.cursor), "pin": pin, "extra": extra}
        self.claim.check()
        checkpoint.commit(path, checkpoint.manifest_of(self.config, self._d_in, [report | written], about))
        self.saved = self.step
        self.log.event("commit", step=self.step, pin=pin)
        self.claim.check()
        checkpoint.prune(self.home, self.config.trainer.keep_checkpoints)

    def _blocks(self, split: Any, first: int, count: int) -> list[dict[str, Any]]:
        return [self._store.read(split, block_id, self._hooks) for block_id in range(first, first + count)]


def work(config_json: str, environment: dict[str, str]) -> None:
    """What a process does; an error that the user is told of ends it with 2, as the command line does."""
    os.environ.update(environment)
    config = RunConfig.model_validate_json(config_json)
    try:
        Loop(config).run()
    except UserError as error:
        (config.run_dir / "chaos" / "said.txt").open("a").write(f"{error}\n")
        if not isinstance(config.trainer.checkpoint_dir, str) or not config.trainer.checkpoint_dir.startswith("s3:"):
            # As the controller's `close`: what was not committed goes.
            with contextlib.suppress(UserError):
                checkpoint.discard_uncommitted(checkpoint.home(config))
        sys.exit(2)


def run_to_end(
    config: RunConfig, environment: dict[str, str] | None = None, random_kills: int = 0, seed: int = 0
) -> list[int]:
    """Starts processes until one ends with 0. Returns all exit codes.

    Args:
        environment: AWS settings of the processes.
        random_kills: how many times a process is killed from outside at a moment drawn by `seed`.
    Raises:
        RuntimeError: a process hangs, fails otherwise than by a fault, or the run does not get on.
    """
    context = forking()
    (config.run_dir / "chaos").mkdir(parents=True, exist_ok=True)
    rng, fuses, codes = random.Random(seed), fuses_of(config), []
    limit = 2 * (len(fuses.faults) + random_kills) + 5
    while True:
        process = context.Process(target=work, args=(config.model_dump_json(), environment or {}))
        process.start()
        killer = _Killer(process, rng.uniform(0.05, 2.5), fuses, f"random-{len(codes)}") if random_kills else None
        process.join(LIMIT_S)
        if killer is not None and killer.ended(process):
            random_kills -= 1
        if process.is_alive():
            process.kill()
            raise RuntimeError(f"{config.name}: a process did not end within {LIMIT_S:g} s")
        codes.append(process.exitcode)
        if process.exitcode == 0:
            return codes
        if process.exitcode not in (2, -signal.SIGKILL) or len(codes) > limit:
            raise RuntimeError(f"{config.name}: exit codes {codes}; {_said(config)}")
        with contextlib.suppress(FileNotFoundError):  # somebody makes room on the full disk
            (Path(checkpoint.home(config)) / "taken").unlink()


class _Killer:
    """Kills a process from a thread after `delay_s`, and notes the fault if it was still there."""

    def __init__(self, process: Any, delay_s: float, fuses: Fuses, fault_id: str) -> None:
        self._process, self._fuses, self._id, self._struck = process, fuses, fault_id, False
        self._timer = threading.Timer(delay_s, self._strike)
        self._timer.start()

    def _strike(self) -> None:
        if self._process.is_alive():
            self._fuses.note(self._id)
            self._struck = True
            os.kill(self._process.pid, signal.SIGKILL)

    def ended(self, process: Any) -> bool:
        """Whether it was this that ended the process."""
        self._timer.cancel()
        self._timer.join()
        if self._struck and process.exitcode != -signal.SIGKILL:
            (self._fuses.folder / f"{self._id}.struck").unlink()  # it had ended by itself
        return self._struck and process.exitcode == -signal.SIGKILL


def _said(config: RunConfig) -> str:
    path = config.run_dir / "chaos" / "said.txt"
    return path.read_text()[-500:] if path.exists() else "said nothing"
