"""Structured logs: one JSON object per line with time, level, logger, run, generation, step, role and message.

Everything goes through Python's logging, so that what libraries warn of lands in the same place. The driver writes
`RUN/logs/driver.jsonl`; an actor writes to its stderr, which Ray keeps and the cluster's collectors read, and beside
the driver's file where it sees the run's folder. Values of secrets are replaced before a line is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_ray.config import RunConfig

FOLDER = "logs"
# Libraries that keep their records from the root logger.
_APART = ("ray", "ray.serve", "ray.data", "transformers", "huggingface_hub", "vllm", "datasets")
# A variable of such a name holds a secret, and so does one that a config's `api_key_env` names.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
_SHORTEST = 8  # shorter values would be found in ordinary words
_IN_ADDRESS = (
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    # A secret key of AWS may hold slashes. What looks like a port is one, except at s3://, which has none.
    re.compile(r"(?<=://)[^/\s:@]+:(?!\d{1,5}/)[^\s@\"']+(?=@)"),
    re.compile(r"(?<=s3://)[^/\s:@]+:[^\s@\"']+(?=@)"),
)
_SECRET_FORMS = (
    *_IN_ADDRESS,
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}\b"),
    re.compile(r"(?<=X-Amz-Signature=)[0-9a-f]+|(?<=X-Amz-Security-Token=)[^&\s]+"),
)
_lock = threading.Lock()
_context: dict[str, Any] = {}
_secret_names: set[str] = set()
_handlers: list[logging.Handler] = []


def bind(**fields: Any) -> None:
    """From now on every record of this process carries these fields (run, generation, step, role)."""
    with _lock:
        _context.update(fields)


def bound() -> dict[str, Any]:
    """The fields that records carry now."""
    with _lock:
        return dict(_context)


def redacted(text: str) -> str:
    """`text` without the values of secret variables of this process, and without what looks like a key."""
    names = [name for name in os.environ if name in _secret_names or _SECRET_NAME.search(name)]
    # The longest first: one secret may be part of another.
    for value in sorted({os.environ.get(name, "") for name in names}, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***").replace(json.dumps(value)[1:-1], "***")
    for form in _SECRET_FORMS:
        text = form.sub("***", text)
    return text


def holds_credentials(text: str) -> bool:
    """Whether there is an address in it with a name, a token or a password before the '@'."""
    return bool(re.search(r"://[^/\s@]*@", text)) or any(form.search(text) for form in _IN_ADDRESS)


class JsonLines(logging.Formatter):
    """A record as one line of JSON; `extra={"fields": {...}}` adds fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": None,
            "generation": None,
            "step": None,
            **bound(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(entry, default=str))


_JSON_LINES = JsonLines()


class _Json(logging.Handler):
    """Whatever formatter it is given: Ray gives its own to every handler of its logger."""

    def format(self, record: logging.LogRecord) -> str:
        return _JSON_LINES.format(record)


class _Stderr(_Json, logging.StreamHandler):
    pass


class _File(_Json, logging.FileHandler):
    pass


class _Wanted(logging.Filter):
    """Of libraries warnings only, whatever level somebody gave the root; and each once.

    A library's record comes by its own logger and, where it lets it, by the root: the second is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and record.name.partition(".")[0] != "sae_ray":
            return False
        seen: set[int] = record.__dict__.setdefault("_sae_ray_seen", set())
        known = id(self) in seen
        seen.add(id(self))
        return not known


def start(run_dir: str | Path | None, run: str, role: str, secrets: tuple[str | None, ...] = ()) -> None:
    """Begins to log this process; a second call (another run in the same process) replaces the first.

    Args:
        run_dir: where `logs/` is made; a folder that is not there, as on another node, gets none.
        role: driver, or what an actor is. An actor also writes to stderr.
        secrets: names of further variables whose values no line may hold.
    """
    stop()
    bind(run=run, role=role, generation=None, step=None)
    _secret_names.update(name for name in secrets if name)
    made: list[logging.Handler] = []
    if role != "driver":
        made.append(_Stderr(sys.stderr))
    if run_dir is not None and Path(run_dir).is_dir():
        name = "driver" if role == "driver" else f"{role}-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder = Path(run_dir) / FOLDER
            folder.mkdir(exist_ok=True)
            # An actor that has nothing to say makes no file.
            made.append(_File(folder / f"{name}.jsonl", encoding="utf-8", delay=role != "driver"))
    for handler in made:
        handler.addFilter(_Wanted())
        for logger in (logging.getLogger(), *map(logging.getLogger, _APART)):
            logger.addHandler(handler)
    _handlers.extend(made)
    logging.captureWarnings(True)
    logging.getLogger("sae_ray").setLevel(logging.INFO)


@contextlib.contextmanager
def driver(config: RunConfig) -> Iterator[None]:
    """Logs this process as the driver of a run for the duration of the block."""
    start(config.run_dir, config.name, "driver", secrets_of(config))
    try:
        yield
    finally:
        stop()


def start_actor(config: RunConfig, role: str) -> None:
    """`start` in an actor of a run; does nothing in the driver, which may call an actor's class itself."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        start(config.run_dir, config.name, role, secrets_of(config))


def secrets_of(config: RunConfig) -> tuple[str | None, ...]:
    """Names of the variables that hold the keys of a run's judges."""
    return (config.judge.api_key_env, *(judge.get("api_key_env") for judge in config.judges.values()))


def stop() -> None:
    """Ends what `start` began."""
    for handler in _handlers:
        for logger in (logging.getLogger(), *map(logging.getLogger, _APART)):
            logger.removeHandler(handler)
        handler.close()
    if _handlers:
        logging.captureWarnings(False)
    _handlers.clear()
    with _lock:
        _context.clear()
