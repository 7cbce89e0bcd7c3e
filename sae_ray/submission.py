"""Runs as Ray jobs: submitted, followed, asked about and stopped from a machine that is not of the cluster.

A run has one name and any number of attempts, each a job of its own with the id `sae-ray-NAME-NUMBER`. Submitting is
idempotent by that name: while an attempt is under way there is no other, whoever asks; after it has ended, the next one
goes on from the run's last checkpoint. What is under way is read from the cluster each time, so nothing has to be
remembered here.

Nothing secret travels: the token is read from the environment by Ray's own client (RAY_AUTH_MODE=token and
RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), and a job's environment gets only what `_PASSED_ON` names, since everybody who
may see the dashboard can read it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_ray.config import RunConfig
from sae_ray.errors import UserError, printable
from sae_ray.network import check_token
from sae_ray.storage import is_s3

CONFIG_FILE = "run.yaml"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# In this order, as Ray's own command line has them.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Metadata of a job.
_RUN, _NUMBER, _DIGEST = "sae_ray_run", "sae_ray_attempt", "sae_ray_config"
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_ENDPOINT")
# A connection that breaks while a job is followed is made again, so often in a row.
_RECONNECTS, _PAUSE_S = 5, 2.0
_STARTING_ATTEMPTS = 15
# What a place may be besides a path.
_OR_S3, _OR_NAME = ", or s3://bucket/prefix", ", or a Hugging Face id"


@dataclass(frozen=True)
class Attempt:
    """One job of a run. digest: of its config. Times are local; None: not yet."""

    id: str
    run: str
    number: int
    status: JobStatus
    digest: str
    started: datetime | None
    ended: datetime | None
    message: str

    @property
    def over(self) -> bool:
        return self.status.is_terminal()


class Jobs:
    """The jobs of a cluster that are runs of ours.

    Args:
        address: of the dashboard, http://HOST:PORT; None: from the environment, else this machine's.
        trust_network: talk to another machine without a token.
    Raises:
        UserError: nothing answers there, the token is refused, or there is none and the address is not loopback.
    """

    def __init__(self, address: str | None = None, trust_network: bool = False) -> None:
        self.address = checked_address(address or address_of_environment(), trust_network)
        with self._errors():
            self._client = JobSubmissionClient(self.address)

    def attempts(self, run: str) -> list[Attempt]:
        """Of a run, oldest first."""
        with self._errors():
            jobs = self._client.list_jobs()
        return sorted((each for job in jobs if (each := _attempt(job)) and each.run == run), key=lambda a: a.number)

    def runs(self) -> list[Attempt]:
        """The last attempt of every run, by name."""
        with self._errors():
            found = [each for job in self._client.list_jobs() if (each := _attempt(job))]
        return list({each.run: each for each in sorted(found, key=lambda a: (a.run, a.number))}.values())

    def latest(self, run: str) -> Attempt:
        """
        Raises:
            UserError: there is no such run here.
        """
        if found := self.attempts(run):
            return found[-1]
        known = ", ".join(each.run for each in self.runs()) or "none"
        raise UserError(f"{run}: no such run at {self.address}; there: {known}")

    def submit(self, config: RunConfig) -> tuple[Attempt, bool]:
        """(the attempt that is under way now, whether it is a new one). `config`: see `for_cluster`.

        Raises:
            UserError: an attempt with another config is under way.
        """
        text = config.to_yaml()
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        before = self.attempts(config.name)
        if before and not before[-1].over:
            return self._join(before[-1], digest), False
        number = before[-1].number + 1 if before else 1
        job_id = f"sae-ray-{config.name}-{number}"
        with tempfile.TemporaryDirectory() as folder, self._errors():
            Path(folder, CONFIG_FILE).write_text(text, encoding="utf-8")
            job: dict[str, Any] = {
                "entrypoint": f"python -m sae_ray.cli train {CONFIG_FILE}",
                "submission_id": job_id,
                "runtime_env": {
                    "working_dir": folder,
                    "env_vars": {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                },
                "metadata": {_RUN: config.name, _NUMBER: str(number), _DIGEST: digest},
            }
            for attempt in range(_STARTING_ATTEMPTS):
                try:
                    self._client.submit_job(**job)
                    break
                except RuntimeError as error:
                    # Somebody else submitted the same run a moment ago.
                    if "already exists" in str(error):
                        return self._join(self.latest(config.name), digest), False
                    # A head that has just started answers before it can take jobs.
                    if "No available agent" not in str(error) or attempt == _STARTING_ATTEMPTS - 1:
                        raise
                    time.sleep(_PAUSE_S)
        return self.latest(config.name), True

    def logs(self, attempt: Attempt) -> str:
        """What a job has printed so far."""
        with self._errors():
            return str(self._client.get_job_logs(attempt.id))

    def follow(self, attempt: Attempt, show: Callable[[str], object]) -> Attempt:
        """Shows what a job prints from its beginning until it ends. Returns it as it ended.

        Raises:
            UserError: the cluster cannot be reached any more; the job may go on.
        """
        shown = failures = 0

        async def tail() -> None:
            """From the beginning, but for what was shown before the connection broke."""
            nonlocal shown, failures
            at = 0
            async for text in self._client.tail_job_logs(attempt.id):
                if fresh := text[max(0, shown - at) :]:
                    show(fresh)
                    failures = 0
                at += len(text)
                shown = max(shown, at)

        while True:
            try:
                asyncio.run(tail())
                attempts = self.attempts(attempt.run)
            except (UserError, RuntimeError, aiohttp.ClientError, OSError) as error:
                failures += 1
                if failures > _RECONNECTS:
                    raise UserError(f"{self.address}: lost while following {attempt.run}: {error}") from error
                time.sleep(_PAUSE_S)
                continue
            now = next((each for each in attempts if each.id == attempt.id), None)
            if now is None:
                raise UserError(f"{self.address}: does not know {attempt.id} any more; was its head replaced?")
            if now.over or attempts[-1].id != now.id:
                return now
            time.sleep(_PAUSE_S)

    def stop(self, run: str) -> Attempt:
        """Asks the run's attempt to stop, if one is under way; its last committed checkpoint is what is kept."""
        attempt = self.latest(run)
        if not attempt.over:
            with self._errors():
                self._client.stop_job(attempt.id)
        return attempt

    # -- inside -----------------------------------------------------------------------------------------

    def _join(self, attempt: Attempt, digest: str) -> Attempt:
        if attempt.digest != digest:
            raise UserError(
                f"{attempt.run}: is under way at {self.address} with another config (job {attempt.id}); stop it first "
                f"(sae-ray stop {attempt.run}), or give this run another name"
            )
        return attempt

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address}: the token is refused or missing: {_first_line(error)}") from error
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            raise UserError(f"{self.address}: no Ray dashboard answers there: {_first_line(error)}") from error
        except (RuntimeError, requests.RequestException) as error:
            raise UserError(f"{self.address}: {_first_line(error)}") from error


def print_status(jobs: Jobs, run: str | None, console: Console) -> None:
    """A table of all runs, or of one run's attempts with its last line."""
    found = jobs.attempts(run) if run else jobs.runs()
    if run and not found:
        jobs.latest(run)
    table = Table("run", "attempt", "job", "status", "started", "ended", title=Text(printable(jobs.address)))
    for each in found:
        times = (f"{t:%Y-%m-%d %H:%M:%S}" if t else "-" for t in (each.started, each.ended))
        row = (each.run, str(each.number), each.id, each.status.value, *times)
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    if run:
        lines = jobs.logs(found[-1]).strip().splitlines()
        console.print(Text(printable(lines[-1] if lines else found[-1].message)))


def for_cluster(config: RunConfig, source: str) -> RunConfig:
    """The config as a job runs it: it joins the cluster that it runs on, and no place is relative to a laptop's folder.

    Args:
        source: the config's file, for errors.
    Raises:
        UserError: a relative path, or a Ray address.
    """
    if config.ray.address not in ("local", "auto"):
        raise UserError(
            f"{source}: ray.address = {config.ray.address!r}: a job joins the cluster that it was submitted to; leave "
            "it out, and give --address the dashboard's"
        )
    for key, value, right in _places(config):
        # What may be a model's name is one, unless there is such a folder.
        is_name = right == _OR_NAME and not value.startswith(".") and not Path(value).exists()
        if _is_relative_path(value) and not is_name:
            raise UserError(
                f"{source}: {key} = {value!r}: is relative to a folder of this machine, and a job runs on another; "
                f"give an absolute path that every node sees{right}"
            )
    return config.model_copy(update={"ray": config.ray.model_copy(update={"address": "auto"})})


def address_of_environment() -> str:
    for name in ADDRESS_VARIABLES:
        value = os.environ.get(name, "")
        if value.startswith(("http://", "https://")):
            return value
    return DEFAULT_ADDRESS


def checked_address(address: str, trust_network: bool = False) -> str:
    """
    Raises:
        UserError: no http(s) URL, or another machine's and no token to send.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address {address}: expected the dashboard's, e.g. {DEFAULT_ADDRESS}")
    if parts.username or parts.password:
        raise UserError("--address: holds a password, which would stand in logs; set RAY_AUTH_TOKEN instead")
    check_token(parts.hostname, f"--address {address}", trust_network, "--trust-network")
    return address.rstrip("/")


def _places(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(key, value, what else would be right) of all that a job's driver would look for in the job's own folder."""
    from sae_ray.judge.roles import SCORER, judges_of

    outlives = ", on storage that outlives the job"
    places = [
        ("runs_dir", config.runs_dir, outlives),
        ("trainer.checkpoint_dir", config.trainer.checkpoint_dir, outlives + _OR_S3),
        ("activations.store", config.activations.store, _OR_S3),
        ("rlaif.replay_rewards", config.rlaif.replay_rewards, ""),
        *(("corpus.paths", path, "") for path in config.corpus.paths),
        ("model.name", config.model.name, _OR_NAME),
    ]
    for index, spec in enumerate(config.specs().values()):
        places.append((f"saes[{index - 1}].sae.init_from" if index else "sae.init_from", spec.sae.init_from, ""))
    for role, judge in judges_of(config).items():
        where = "judge" if role == SCORER else f"judges.{role}"
        places.append((f"{where}.model", judge.model, _OR_NAME))
        places += [(f"{where}.lora.{name}", path, _OR_NAME) for name, path in judge.lora.items()]
    return ((key, value, right) for key, value, right in places if value is not None)


def _is_relative_path(value: str) -> bool:
    return not is_s3(value) and not Path(os.path.expanduser(value)).is_absolute()


def _attempt(job: JobDetails) -> Attempt | None:
    """None for a job that is not one of ours."""
    known = job.metadata or {}
    if job.submission_id is None or _RUN not in known or not re.fullmatch(r"\d+", known.get(_NUMBER, "")):
        return None
    return Attempt(
        id=job.submission_id,
        run=known[_RUN],
        number=int(known[_NUMBER]),
        status=JobStatus(job.status),
        digest=known.get(_DIGEST, ""),
        started=_local(job.start_time),
        ended=_local(job.end_time),
        message=" ".join((job.message or "").split()),
    )


def _local(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
