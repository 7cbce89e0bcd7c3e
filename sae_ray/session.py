"""Starting or joining Ray, and leaving nothing behind.

An own Ray (`ray.address: local`) is shut down with every process it started. A joined cluster keeps running;
only this run's actors and Serve app are removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

from sae_ray.config import RayConfig
from sae_ray.errors import UserError
from sae_ray.network import TOKEN_FILE, check_token

CONNECT_TIMEOUT_S = 5.0
# Ray sets it for the driver of a submitted job.
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def check_address(config: RayConfig) -> None:
    """Fails at once where Ray's own client would retry for minutes, or talk to strangers.

    Raises:
        UserError: nothing listens at `ray.address`, or it is another machine's and there is no token to send.
    """
    address = config.address.removeprefix("ray://")
    if config.address == "local":
        return
    if config.address == "auto":
        # A job's driver runs on its cluster already. Elsewhere `auto` means this machine's, unless this variable says
        # otherwise.
        named = "" if IN_A_JOB in os.environ else os.environ.get("RAY_ADDRESS", "")
        if ":" in named and not named.startswith(("http://", "https://")):
            host = named.removeprefix("ray://").rpartition(":")[0]
            check_token(host, f"RAY_ADDRESS={named}", config.trust_network, "ray.trust_network: true")
        return
    host, _, port = address.rpartition(":")
    check_token(host, f"ray.address = {config.address!r}", config.trust_network, "ray.trust_network: true")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:  # no such name, none that can be (a..b), no port (99999)
        why = getattr(error, "strerror", None) or error
        raise UserError(f"ray.address = {config.address!r}: cannot be reached: {why}") from error


@contextlib.contextmanager
def ray_session(config: RayConfig, verbose: bool = False) -> Iterator[None]:
    """Starts or joins Ray for the duration of the block.

    Raises:
        UserError: the cluster cannot be joined.
    """
    check_address(config)
    import ray

    # Ray's metrics exporter and usage reporting have nobody to talk to in an own, loopback Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers are nice to everything else on their machine, which starves judges that share one.
    os.environ.setdefault("RAY_worker_niceness", "0")
    options: dict[str, Any] = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
        "namespace": "sae_ray",
    }
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    own = config.address == "local"
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    if own:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": config.local_cpus}
        if config.object_store_mb:
            options["object_store_memory"] = config.object_store_mb * 2**20
    else:
        options["address"] = config.address
    try:
        with _signals_kept(), _on_loopback() if own else contextlib.nullcontext():
            ray.init(**options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"ray.address = {config.address!r}: the token is refused or missing: {_first_line(error)}"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"ray.address = {config.address!r}: no Ray cluster found there: {_first_line(error)}"
        ) from error
    except RuntimeError as error:  # other versions of Ray or Python there, each on a line of its own
        said = " ".join(str(error).split())
        raise UserError(f"ray.address = {config.address!r}: Ray cannot be started or joined: {said}") from error
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    try:
        yield
    finally:
        if own:
            started = list({*started, *(p for p in psutil.Process().children(recursive=True) if p.pid not in before)})
        ray.shutdown()
        if own:
            _reap(started)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Whoever handled signals goes on to: a driver's `ray.init` takes SIGTERM, and its core then aborts the process."""
    if threading.current_thread() is not threading.main_thread():  # it may set none, and Ray does not either
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: somebody's who is not Python
                signal.signal(number, handler)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in here listens on this machine's loopback only, and its token is nobody else's to read.

    It is what Ray does by itself on macOS and Windows, where it takes no other nodes; its switch is read at import.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    said = os.environ.get(name)
    _hide_token()
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if said is not None:
            os.environ[name] = said
        _hide_token()


def _hide_token() -> None:
    """Ray writes the token of an own Ray with the umask, for everybody on the machine to read."""
    path = TOKEN_FILE.expanduser()
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _reap(processes: list[psutil.Process], patience_s: float = 8.0) -> None:
    """Waits for an own Ray's processes to end, and ends those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Deadline:
    """A wait that knows when it has lasted too long and what it was waiting for."""

    def __init__(self, seconds: float, waiting_for: str):
        self._ends = time.monotonic() + seconds
        self._seconds = seconds
        self._waiting_for = waiting_for

    @property
    def left_s(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def check(self) -> None:
        if self.left_s == 0:
            raise UserError(f"waited {self._seconds:.0f} s for {self._waiting_for}; giving up")
