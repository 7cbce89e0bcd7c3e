"""One `sae-ray train`: session, loop, evaluation, export and report, in the order a person sees them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sae_ray.config import RunConfig
from sae_ray.controller import Controller, checkpoints_dir
from sae_ray.evaluation.evaluator import find_versions
from sae_ray.evaluation.run import evaluate, print_results
from sae_ray.report.render import render_report
from sae_ray.sae.formats import export_saelens
from sae_ray.session import Interrupt, ray_session
from sae_ray.telemetry import Progress, RunLog, RunStatus
from sae_ray.trainer import checkpoint


def run_training(config: RunConfig, verbose: bool = False) -> None:
    """Trains (or resumes) a run to its end and writes everything its folder holds.

    Raises:
        UserError: what the user can mend.
        RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was committed.
    """
    console = Console()
    status = RunStatus(total_steps=config.total_steps)
    folder = checkpoints_dir(config)
    latest = checkpoint.latest(folder)
    done = checkpoint.read_manifest(latest)["step"] if latest else 0
    if done >= config.total_steps and (config.run_dir / "evaluation.json").exists():
        console.print(f"{config.name}: is complete; --fresh trains it again", soft_wrap=True)
        print_results(config, console)
        return
    (config.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    log = RunLog(config.run_dir, done)
    progress = Progress(config.name, status, console, log)
    try:
        with Interrupt() as interrupt, progress, ray_session(config.ray, verbose):
            controller = Controller(config, status, progress, log, interrupt)
            try:
                controller.run()
                controller.prepare_evaluation()
                evaluate(config, controller.stream, controller.judge, progress, status, interrupt)
                progress.phase("done", "stopping the cluster's actors")
            finally:
                controller.close()
    finally:
        log.close()
    export(config)
    render_report(config.run_dir)
    print_results(config, console)


def export(config: RunConfig) -> Path:
    """Writes the run's SAE in SAELens's format. Returns the folder."""
    sae = list(find_versions(config).values())
    return export_saelens(
        sae[min(1, len(sae) - 1)],
        config.run_dir / "saelens",
        model=config.model.name,
        hook=config.hook.name,
        context_length=config.corpus.context_length,
        dataset=config.corpus.dataset or config.corpus.kind,
    )
