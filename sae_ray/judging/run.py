"""`sae-ray judge`: evidence, judges, batches of latents, and the tables at the end.

    loop      waits for                          unblocked by                        deadline
    gather    blocks, gatherers (gather.py)      window of blocks                    per block
    start     judge pool, embedder, subject      Serve, actors                       judge.start_timeout_s
    judge     two batches at the desk            a batch is committed                judging.batch_timeout_s each

The judges start while the evidence is gathered. Every batch is committed when it is done: the same command goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from sae_ray import logs
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.errors import RunInterrupted, UserError
from sae_ray.judge.embedder import EmbedderActor
from sae_ray.judge.pool import JudgePool, endpoint_keys
from sae_ray.judge.roles import SCORER, judges_of
from sae_ray.judge.subject_actor import SubjectModel
from sae_ray.judging import results
from sae_ray.judging.baselines import with_baseline_hooks
from sae_ray.judging.desk import JudgingDesk, check_settings
from sae_ray.judging.gather import gather, has_evidence
from sae_ray.judging.progress import JudgingProgress
from sae_ray.judging.summary import print_summary, write_summary
from sae_ray.judging.target import Target
from sae_ray.report.judging import render_judging
from sae_ray.session import Deadline, Interrupt, ray_session
from sae_ray.storage import LocalStorage, aws_environment

POLL_S = 1.0
BATCHES_AT_ONCE = 2  # a replica; while one batch's explanations are written, the other's texts are read
FIRST_SHARE = 4  # under a budget every latent first gets a quarter of its texts
SETTINGS = "judging.json"
# Keys of a judge that decide what it answers.
_JUDGES_OWN = {"model", "s3_mirror", "endpoint", "endpoint_model", "app", "adapter", "mode", "context_tokens"}

Task = tuple[str, tuple[int, ...], int]  # kind, latents, texts per class


@dataclass(frozen=True)
class Budget:
    """How much judging may cost; None is without limit. Tokens: computed prompt tokens and output tokens."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """`30minutes`, `2h`, `500000tokens`, `2M tokens`.

        Raises:
            UserError: something else.
        """
        if text is None:
            return cls()
        match = re.fullmatch(r"\s*([\d_.]+)\s*([kM]?)\s*(tokens?|s|seconds?|m|min|minutes?|h|hours?)\s*", text)
        if match is None or not re.fullmatch(r"\d[\d_]*(\.\d+)?", match[1]):
            raise UserError(f"--budget {text}: expected e.g. 30minutes, 2h, 500000tokens or 2Mtokens")
        amount = float(match[1].replace("_", "")) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
        unit = match[3][0]
        if amount <= 0:
            raise UserError(f"--budget {text}: must be above 0")
        if unit == "t":
            return cls(tokens=int(amount))
        return cls(seconds=amount * {"s": 1, "m": 60, "h": 3600}[unit])

    def __bool__(self) -> bool:
        return self.seconds is not None or self.tokens is not None

    def spent(self, seconds: float, cost: dict[str, float]) -> bool:
        tokens = computed_tokens(cost)
        return (self.seconds is not None and seconds >= self.seconds) or (
            self.tokens is not None and tokens >= self.tokens
        )


def computed_tokens(cost: dict[str, float]) -> float:
    """Tokens that the judges had to compute: prompts less what was cached, and answers."""
    return cost.get("prompt_tokens", 0) - cost.get("cached_tokens", 0) + cost.get("output_tokens", 0)


class Schedule:
    """Which latents are judged next, and on how many texts. Pure.

    Args:
        judged: the latents of each kind that there is evidence of.
        done: (kind, latent) -> (texts, standard error) of what is committed.
        widen: go back to the latents with the widest intervals until `most` texts; else each latent is judged once.
    """

    def __init__(
        self,
        judged: dict[str, list[int]],
        done: dict[tuple[str, int], tuple[int, float | None]],
        batch: int,
        most: int,
        widen: bool,
    ):
        self._first = max(5, most // FIRST_SHARE) if widen else most
        self._most, self._batch, self._widen = most, batch, widen
        self._kinds = judged
        self._done = dict(done)
        self._busy: set[tuple[str, int]] = set()

    def next(self) -> Task | None:
        """The next batch, which counts as under way; None if there is none now."""
        for kind, latents in self._kinds.items():
            new = [
                latent for latent in latents if (kind, latent) not in self._done and (kind, latent) not in self._busy
            ]
            if new:
                return self._take(kind, new[: self._batch], self._first)
        if not self._widen:
            return None
        open_ = [
            (error if error is not None else float("inf"), kind, latent)
            for (kind, latent), (texts, error) in self._done.items()
            if texts < self._most and (kind, latent) not in self._busy
        ]
        if not open_:
            return None
        widest = max(open_, key=lambda item: item[0])
        kind, texts = widest[1], self._done[widest[1], widest[2]][0]
        alike = [item for item in open_ if item[1] == kind and self._done[kind, item[2]][0] == texts]
        some = sorted(alike, key=lambda item: (-item[0], item[2]))[: self._batch]
        return self._take(kind, [latent for _, _, latent in some], min(self._most, 2 * texts))

    def finished(self, task: Task, errors: dict[int, float]) -> None:
        kind, latents, texts = task
        for latent in latents:
            self._busy.discard((kind, latent))
            self._done[kind, latent] = (texts, errors.get(latent))

    @property
    def left(self) -> int:
        """Latents that were not judged at all yet."""
        return sum((kind, latent) not in self._done for kind, some in self._kinds.items() for latent in some)

    @property
    def total(self) -> int:
        return sum(len(some) for some in self._kinds.values())

    def _take(self, kind: str, latents: list[int], texts: int) -> Task:
        self._busy |= {(kind, latent) for latent in latents}
        return kind, tuple(latents), texts


def judge_sae(
    target: Target, latents: list[int], budget: Budget, fresh: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """Judges an SAE, or goes on where an earlier call stopped. Returns the summary that is also on disk.

    Raises:
        UserError: what the user can mend.
        RunInterrupted: Ctrl-C or SIGTERM; what was committed counts.
    """
    config = with_baseline_hooks(target.config)
    needs_embedder, needs_subject = check_settings(config)
    storage = LocalStorage(config.run_dir)
    settle(config, target, latents, fresh)
    console = Console()
    began = time.monotonic()
    stream, pool = BlockStream(config, train_blocks=0), JudgePool(config, config.ray.address == "local")
    actors: list[Any] = []
    with (
        logs.driver(config),
        Interrupt() as interrupt,
        JudgingProgress(config.name, console) as progress,
        ray_session(config.ray, verbose),
    ):
        try:
            sae = ray.put(target.sae)
            actors += [_actor(EmbedderActor, config.judging.embedder)] if needs_embedder else []
            actors += [_actor(SubjectModel, config.model_dump_json(), sae)] if needs_subject else []
            embedder, subject = (actors[0] if needs_embedder else None), (actors[-1] if needs_subject else None)
            if not has_evidence(config):
                progress.say("starting the producers")
                stream.start()
                pool.start()
                told = gather(config, stream, target.sae, latents, interrupt, progress.say)
                storage.write("evidence.json", json.dumps(told, indent=1).encode())
                stream.stop()
            pool.start()
            desk = _actor(
                JudgingDesk, config.model_dump_json(), embedder, subject, endpoint_keys(config), batches=at_once(config)
            )
            actors.append(desk)
            _wait_for_judges(pool, interrupt, progress.say)
            _judge(config, desk, budget, interrupt, progress, began, storage)
        finally:
            for actor in actors:
                ray.kill(actor)
            pool.shutdown()
            stream.stop()
    summary = write_summary(config)
    render_judging(config.run_dir)
    print_summary(config, summary, console)
    return summary


def settle(config: RunConfig, target: Target, latents: list[int], fresh: bool) -> None:
    """Makes the folder of a judging, or finds that the one that is there may be continued.

    Raises:
        UserError: it holds a judging of another SAE, of other latents or with other settings.
    """
    folder, storage = config.run_dir, LocalStorage(config.run_dir)
    about: dict[str, Any] = {"digest": target.digest, "latents": _short(latents), "settings": _numbers(config)}
    if folder.exists() and any(folder.iterdir()) and not storage.exists(SETTINGS):
        raise UserError(f"{folder}: holds something else than a judging; choose another --name")
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if storage.exists(SETTINGS):
        before = json.loads(storage.read(SETTINGS))
        changed = [key for key in about if before.get(key) != about[key]]
        if "settings" in changed:
            keys = before["settings"].keys() | about["settings"].keys()
            changed.remove("settings")
            changed += sorted(key for key in keys if before["settings"].get(key) != about["settings"].get(key))
        if changed:
            what = {"digest": "another SAE", "latents": f"the latents {before['latents']}"}
            told = "; ".join(what.get(key, f"another {key}") for key in changed[:4])
            raise UserError(f"{folder}: holds a judging of {told}; use --fresh, or another --name")
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(SETTINGS, json.dumps(about, indent=1).encode())
    storage.write("judging.yaml", config.to_yaml().encode())


def _numbers(config: RunConfig) -> dict[str, Any]:
    """What decides a judging's numbers, flat."""
    sections = config.model_dump(mode="json", include={"model", "hook", "corpus", "judging", "seed"})
    for role, judge in judges_of(config).items():
        about = judge.model_dump(mode="json", include=_JUDGES_OWN)
        sections["judge" if role == SCORER else f"judges.{role}"] = about
    for key in ("shards", "batch_latents", "batch_timeout_s"):
        del sections["judging"][key]
    if config.judging.split == "evidence":  # as in judgings of versions that knew no other
        del sections["judging"]["split"]
    flat = {"seed": sections.pop("seed")}
    return flat | {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _short(latents: list[int]) -> str:
    """`0:1000,1003`"""
    parts: list[list[int]] = []
    for latent in latents:
        if parts and parts[-1][1] == latent:
            parts[-1][1] += 1
        else:
            parts.append([latent, latent + 1])
    return ",".join(f"{first}:{end}" if end > first + 1 else str(first) for first, end in parts)


def at_once(config: RunConfig) -> int:
    """Batches under way."""
    return BATCHES_AT_ONCE * config.judge.replicas_worth


def _actor(kind: type, *args: Any, batches: int = 0) -> Any:
    """Args:
    batches: that the actor has under way; it has room for other questions, `progress` for one, beside them.
    """
    remote: Any = ray.remote(kind)
    environment = {"env_vars": aws_environment()}
    return remote.options(num_cpus=0, max_concurrency=8 + batches, runtime_env=environment).remote(*args)


class _LastSeen:
    """What an actor said last of how far it is. Asking never waits: one that is slow to answer is no reason to stop."""

    def __init__(self, desk: Any):
        self._desk = desk
        self._asked: Any = None
        self.answer: dict[str, Any] = {"state": "judging"}

    def look(self) -> dict[str, Any]:
        if self._asked is None:
            self._asked = self._desk.progress.remote()
        elif ray.wait([self._asked], timeout=0)[0]:
            self.answer, self._asked = ray.get(self._asked), None
        return self.answer


def _wait_for_judges(pool: JudgePool, interrupt: Interrupt, say: Callable[[str], None]) -> None:
    deadline = Deadline(pool.start_limit_s, f"the judge {pool.names} to start")
    while not pool.ready(timeout=POLL_S):
        say("waiting for the judges")
        deadline.check()
        if interrupt.requested:
            raise RunInterrupted("stopped; the same command goes on")


def _judge(
    config: RunConfig,
    desk: Any,
    budget: Budget,
    interrupt: Interrupt,
    progress: JudgingProgress,
    began: float,
    storage: LocalStorage,
) -> None:
    progress.say("measuring the judges on planted items")
    report = _value(desk.prepare.remote(), config.judging.batch_timeout_s, "the judges' calibration", interrupt)
    for role, found in report.items():
        modes = ", ".join(f"{name} AUROC {each['auroc']:.2f}" for name, each in found["modes"].items())
        progress.line(f"{role}: {found['judge'].rsplit('/', 1)[-1]}, {modes}; uses {found['mode']}")
    judged = ray.get(desk.judged.remote())
    done = committed(storage, config)
    schedule = Schedule(judged, done, config.judging.batch_latents, config.judging.positives, bool(budget))
    progress.start(schedule.total, schedule.total - schedule.left)
    session = f"usage/{int(time.time())}.json"
    started = time.monotonic()
    under_way: dict[ray.ObjectRef, tuple[Task, Deadline]] = {}
    cost: dict[str, float] = {}
    seen = _LastSeen(desk)
    while True:
        stop = interrupt.requested or budget.spent(time.monotonic() - began, cost)
        while not stop and len(under_way) < at_once(config) and (task := schedule.next()) is not None:
            ref = desk.judge.remote(task[0], list(task[1]), task[2])
            under_way[ref] = (task, Deadline(config.judging.batch_timeout_s, f"{len(task[1])} {task[0]}s to be judged"))
        if not under_way:
            break
        ready, _ = ray.wait(list(under_way), timeout=POLL_S)
        for ref in ready:
            task, _ = under_way.pop(ref)
            outcome = _result(ref)
            schedule.finished(task, outcome["stderr"])
            if outcome["drift"]:
                progress.line(outcome["drift"])
            cost = max(outcome["usage"], cost, key=computed_tokens)  # of batches that end together, the last one
            about = {**cost, "seconds": time.monotonic() - started}
            storage.write(session, json.dumps(about, indent=1).encode())
        for _, deadline in under_way.values():
            deadline.check()
        state = seen.look()
        progress.update(schedule.total - schedule.left, state["state"], computed_tokens(state), state)
    if interrupt.requested:
        raise RunInterrupted(f"stopped; {config.run_dir} holds what was judged; the same command goes on")


def committed(storage: LocalStorage, config: RunConfig) -> dict[tuple[str, int], tuple[int, float | None]]:
    """(kind, latent) -> (texts, standard error of the first scorer) of the latents that are judged.

    Latents without any explanation have no score rows; they are judged again, which costs one prompt each.
    """
    first = config.judging.scorers[0]
    rows = results.latest(results.read(storage, "scores"))
    return {
        (kind, latent): (row["texts"], row["stderr"]) for (kind, latent, name), row in rows.items() if name == first
    }


def _value(ref: Any, seconds: float, what: str, interrupt: Interrupt) -> Any:
    deadline = Deadline(seconds, what)
    while not ray.wait([ref], timeout=POLL_S)[0]:
        deadline.check()
        if interrupt.requested:
            raise RunInterrupted("stopped; the same command goes on")
    return _result(ref)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
