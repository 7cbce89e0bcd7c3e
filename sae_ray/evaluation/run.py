"""`sae-ray evaluate RUN`, and the last phase of a training run: one evaluation, written and printed."""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_ray import logs
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.errors import RunInterrupted, UserError, printable
from sae_ray.evaluation.evaluator import Evaluator, find_saes
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.pool import JudgePool, endpoint_keys
from sae_ray.report.render import render_report
from sae_ray.reward.pool_judge import HELDOUT, without_heldout
from sae_ray.session import Deadline, Interrupt, ray_session
from sae_ray.storage import LocalStorage, aws_environment
from sae_ray.telemetry import Progress, RunStatus

POLL_S = 1.0


def evaluate_run(config: RunConfig, verbose: bool = False) -> None:
    """Evaluates a run folder with its own producers and judges, prints the tables and rewrites the report."""
    find_saes(config)  # a corrupt or missing checkpoint is found before a cluster is touched
    status = RunStatus(total_steps=1)
    progress = Progress(config.name, status)
    stream, judge = BlockStream(config), JudgePool(without_heldout(config), config.ray.address == "local")
    with logs.driver(config), Interrupt() as interrupt, progress, ray_session(config.ray, verbose):
        try:
            progress.phase("starting", "producers")
            stream.start()
            evaluate(config, stream, judge, progress, status, interrupt)
        finally:
            judge.shutdown()
            stream.stop()
    print_results(config, Console())


def evaluate(
    config: RunConfig,
    stream: BlockStream,
    judge: JudgePool,
    progress: Progress,
    status: RunStatus,
    interrupt: Interrupt,
) -> dict[str, Any]:
    """Evaluates with a stream that already runs; writes `evaluation.json`.

    Args:
        judge: the judges that the run trains on, started or not; they are their owner's to shut down. The held-out
            judge, if the run has one, comes and goes with the evaluation.
    """
    began = time.monotonic()
    progress.phase("evaluation", "held-out blocks")
    heldout = _fetch(config, stream, "heldout", config.evaluation.blocks, progress, interrupt)
    n_evidence = config.rlaif.evidence_blocks if config.evaluation.latents else 0
    evidence = _fetch(config, stream, "evidence", n_evidence, progress, interrupt)
    actor: Any = ray.remote(Evaluator)
    environment = {"env_vars": aws_environment()}
    evaluator = actor.options(num_cpus=0, max_concurrency=4, runtime_env=environment).remote(
        config.model_dump_json(), endpoint_keys(config)
    )
    heldout_judge = heldout_app(config, judge)
    try:
        progress.phase("evaluation", "FVU, L0, dead latents, CE loss recovered")
        core = _wait(config, evaluator, evaluator.core.remote(heldout), progress, status, interrupt)
        result: dict[str, Any] = {"core": core, "detection": {}, "paired": [], "latents": [], "seconds": {}}
        if config.evaluation.latents:
            judge.start()
            if heldout_judge is not None:
                started = [app.deploying for app in judge.apps.values() if app.deploying is not None]
                # Whoever started Serve ends it, and that is after this judge has gone.
                heldout_judge.start(after=started[-1] if started else None, owns_serve=False if started else None)
            progress.phase("evaluation", "waiting for the judge")
            whole = JudgePool(config)
            deadline = Deadline(whole.start_limit_s, f"the judge {whole.names} to start")
            while not (judge.ready(timeout=POLL_S) and (heldout_judge is None or heldout_judge.ready(timeout=POLL_S))):
                deadline.check()
                _check(interrupt)
                progress.refresh()
            progress.phase("evaluation", "held-out detection")
            ref = evaluator.detection.remote(evidence, heldout)
            result |= _wait(config, evaluator, ref, progress, status, interrupt)
    finally:
        ray.kill(evaluator)
        if heldout_judge is not None:
            heldout_judge.shutdown()
    result["seconds"]["all"] = round(time.monotonic() - began, 1)
    LocalStorage(config.run_dir).write("evaluation.json", json.dumps(result, indent=1).encode())
    render_report(config.run_dir)
    return result


def heldout_app(config: RunConfig, judge: JudgePool) -> JudgeApp | None:
    """The application that only the held-out judge needs: None where it is elsewhere, or shares another judge's."""
    apps = JudgePool(config, config.ray.address == "local").apps
    app = apps.get(HELDOUT)
    shared = any(app is apps.get(role) for role in judge.roles)
    return None if app is None or shared else app


def _fetch(
    config: RunConfig, stream: BlockStream, split: Any, n: int, progress: Progress, interrupt: Interrupt
) -> list[ray.ObjectRef]:
    ids = list(range(n))
    stream.fetch(split, ids)
    deadline = Deadline(config.activations.lease_timeout_s * n, f"{n} {split} blocks from the producers")
    while not stream.fetched(split, ids):
        stream.pump(time.monotonic())
        done, _ = ray.wait(stream.pending_refs(), timeout=POLL_S, fetch_local=False)
        for ref in done:
            stream.on_ready(ref, time.monotonic())
        deadline.check()
        _check(interrupt)
        progress.refresh()
    return stream.fetched_refs(split, ids)


def _wait(
    config: RunConfig, evaluator: Any, ref: ray.ObjectRef, progress: Progress, status: RunStatus, interrupt: Interrupt
) -> Any:
    deadline = Deadline(config.evaluation.timeout_s, "the evaluation")
    asked = evaluator.progress.remote()
    while True:
        done, _ = ray.wait([ref], timeout=POLL_S)
        if done:
            return _value(ref)
        if ray.wait([asked], timeout=0)[0]:
            counters = ray.get(asked)
            status.detail = counters["detail"]
            if "queue" in counters:
                status.judge_queue, status.verdicts = counters["queue"], counters["verdicts"]
                status.verdicts_per_s = counters["verdicts_per_s"]
            asked = evaluator.progress.remote()
        deadline.check()
        _check(interrupt)
        progress.refresh()


def _value(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


def _check(interrupt: Interrupt) -> None:
    if interrupt.requested:
        raise RunInterrupted("evaluation stopped; `sae-ray evaluate` starts it again")


def print_results(config: RunConfig, console: Console) -> None:
    """The tables of `evaluation.json`."""
    result = json.loads((config.run_dir / "evaluation.json").read_text(encoding="utf-8"))
    core = Table(title=f"{config.name}: reconstruction on held-out text")
    for heading in (
        "version",
        "FVU",
        "L0",
        "dead",
        "CE clean",
        "CE with SAE",
        "CE recovered (mean abl.)",
        "(zero abl.)",
    ):
        core.add_column(heading, justify="left" if heading == "version" else "right")
    for name, row in result["core"].items():
        losses = [_f(row[key]) for key in ("ce_clean", "ce_sae", "ce_recovered_mean", "ce_recovered_zero")]
        core.add_row(name, _f(row["fvu"]), _f(row["l0"], 1), f"{row['dead_fraction']:.1%}", *losses)
    console.print(core)
    if config.saes:
        saes = Table("version", "architecture", "latents", "hook point", title="the SAEs of this run")
        for name, row in result["core"].items():
            place = row["hook"] if row["hook_out"] is None else f"{row['hook']} -> {row['hook_out']}"
            saes.add_row(name, row["architecture"], str(row["d_sae"]), place)
        console.print(saes)
    title = f"held-out detection, soft AUROC (95% interval over latents), {_detector(config, result)}"
    detection = Table(title=Text(printable(title)))
    for heading in ("version", "AUROC", "interval", "shuffled null", "latents"):
        detection.add_column(heading, justify="left" if heading == "version" else "right")
    for name, row in result["detection"].items():
        interval = f"{_f(row['low'])} to {_f(row['high'])}"
        name = name.replace("_", " ")
        detection.add_row(name, _f(row["auroc"]), interval, _f(row["shuffled"]), str(row["n_latents"]))
    if result["detection"]:
        console.print(detection)
    for pair in result["paired"]:
        console.print(
            f"{pair['name']}: {_f(pair['difference'])} ({_f(pair['low'])} to {_f(pair['high'])}), "
            f"paired over {pair['n']} latents"
        )
    console.print(Text(printable(f"report: {config.run_dir / 'report.html'}")), soft_wrap=True)


def _detector(config: RunConfig, result: dict[str, Any]) -> str:
    """Whose verdicts the detection is of; evaluations of earlier versions were all the scorer's."""
    judge = result.get("judge") or {}
    return f"{'held-out ' if judge.get('role') == HELDOUT else ''}judge {judge.get('model', config.judge.model)}"


def _f(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
