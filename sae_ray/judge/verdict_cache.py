"""Readings on disk, so that no run pays for a verdict that an earlier one has paid for.

One SQLite file per folder: a reading is in it once it is committed, and a crash leaves either all or nothing of a
call's readings. A rollback journal, not a write-ahead log: runs folders are often network file systems, where the
latter's shared memory does not work. One process writes at a time (a lock file says which); others read.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.prompts import PROMPT_VERSION

FILE = "verdicts.sqlite"
_SCHEMA = "CREATE TABLE IF NOT EXISTS readings (key BLOB PRIMARY KEY, value REAL, tokens INTEGER) WITHOUT ROWID"
# SQLite's own limit on variables in one statement is higher; this keeps statements small.
_KEYS_PER_QUERY = 500
_BUSY_S = 30.0
# What a judge's numbers depend on. Not the places it runs at, nor how long one waits for it.
_NUMBERS = (
    *("model", "s3_mirror", "app", "endpoint", "endpoint_model", "dtype", "quantization", "adapter"),
    *("engine_kwargs", "max_model_len"),
)

Reading = tuple[float, int]


def judge_identity(cfg: JudgeConfig) -> str:
    """Names whose readings these are: the settings that decide its numbers, and for a local folder its weights' files.

    `dtype: auto` is not resolved (that would take a replica): readings of one cache come from one kind of machine, or
    differ by the rounding of its own.
    """
    values: dict[str, Any] = {key: getattr(cfg, key) for key in _NUMBERS}
    values["lora"] = cfg.lora.get(cfg.adapter) if cfg.adapter else None
    values["accelerator"] = "gpu" if cfg.gpus else "cpu"
    values["weights"] = [_files(folder) for folder in (cfg.model, values["lora"]) if folder]
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _files(folder: str) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time) of a model folder's weights and configs; empty for a Hub id."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return []
    found = sorted(file for pattern in ("*.safetensors", "*config.json") for file in path.glob(pattern))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


class VerdictCache:
    """Readings by (judge, mode, prompt version, text, explanation).

    Args:
        folder: where the file lies or is made.
        writable: False reads only, and then several processes may.
    Raises:
        UserError: another process writes to it, or the file is none of this kind.
    """

    def __init__(self, folder: str | Path, writable: bool = True) -> None:
        self._path = Path(folder).expanduser() / FILE
        self.writable = writable
        self._lock: FileLock | None = None
        if writable:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{self._path}.lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"{self._path}: another process writes to this verdict cache") from error
        elif not self._path.is_file():
            raise UserError(f"{self._path}: there is no verdict cache")
        try:
            mode = "rwc" if writable else "ro"
            # Used by one event loop, which may run in another thread than the one that opened it.
            self._db = sqlite3.connect(
                f"{self._path.resolve().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S, check_same_thread=False
            )
            if writable:
                self._db.execute("PRAGMA journal_mode=TRUNCATE")
                with self._db:
                    self._db.execute(_SCHEMA)
            self._db.execute("SELECT key, value, tokens FROM readings LIMIT 1")
        except sqlite3.Error as error:
            self._release()
            raise UserError(f"{self._path}: is no verdict cache ({error}); remove it or name another folder") from error

    def get_many(self, judge: str, mode: str, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Reading]:
        """Those readings of (text, explanation) pairs that are there."""
        wanted = {_key(judge, mode, *pair): pair for pair in pairs}
        keys = list(wanted)
        found: dict[tuple[str, str], Reading] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            rows = self._db.execute(f"SELECT key, value, tokens FROM readings WHERE key IN ({marks})", some)
            found |= {wanted[bytes(key)]: (value, tokens) for key, value, tokens in rows}
        return found

    def put_many(self, judge: str, mode: str, readings: Mapping[tuple[str, str], Reading]) -> None:
        """Commit readings. One that is there stays: a cached reading never changes under a run that has used it."""
        if not self.writable or not readings:
            return
        rows = [(_key(judge, mode, *pair), value, tokens) for pair, (value, tokens) in readings.items()]
        with self._db:
            self._db.executemany("INSERT OR IGNORE INTO readings VALUES (?, ?, ?)", rows)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM readings").fetchone()[0])

    def close(self) -> None:
        self._db.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(judge: str, mode: str, text: str, explanation: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (judge, mode, PROMPT_VERSION, text, explanation):
        raw = part.encode(errors="surrogatepass")
        # Length first: no two different sequences of strings give the same bytes.
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.digest()


def shared_cache(runs_dir: str | Path) -> VerdictCache:
    """What all runs and judgings below one `runs_dir` have paid for; the second of two at a time only reads it.

    Raises:
        UserError: the file is no verdict cache.
    """
    folder = Path(runs_dir) / ".verdicts"
    try:
        return VerdictCache(folder)
    except UserError:
        return VerdictCache(folder, writable=False)
