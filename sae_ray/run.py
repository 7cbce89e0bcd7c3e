"""One `sae-ray train`: session, loop, evaluation, export and report, in the order a person sees them."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from sae_ray import logs
from sae_ray.config import RunConfig
from sae_ray.controller import Controller
from sae_ray.errors import UserError, printable
from sae_ray.evaluation.run import evaluate, print_results
from sae_ray.report.render import render_report
from sae_ray.sae.formats import export_sae
from sae_ray.sae.formats.of_run import as_exported, sae_of_run
from sae_ray.session import Interrupt, ray_session
from sae_ray.status_file import StatusFile
from sae_ray.storage import LocalStorage, is_s3
from sae_ray.telemetry import Progress, RunLog, RunStatus
from sae_ray.trainer import checkpoint
from sae_ray.variants import MAIN


def run_training(config: RunConfig, verbose: bool = False) -> None:
    """Trains (or resumes) a run to its end and writes everything its folder holds.

    Raises:
        UserError: what the user can mend.
        RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was committed.
    """
    console = Console()
    status = RunStatus(total_steps=config.total_steps)
    folder = checkpoint.home(config)
    latest = checkpoint.latest(folder)
    done = checkpoint.read_manifest(latest)["step"] if latest else 0
    if done >= config.total_steps and (config.run_dir / "evaluation.json").exists():
        console.print(f"{config.name}: is complete; --fresh trains it again", soft_wrap=True, markup=False)
        print_results(config, console)
        return
    # In one piece: a run folder without a whole config is no run any more.
    LocalStorage(config.run_dir).write("config.yaml", config.to_yaml().encode())
    log = RunLog(config.run_dir, done)
    place = str(checkpoint.home(config))
    file = StatusFile(config.run_dir, config.name, place if is_s3(place) else None)
    progress = Progress(config.name, status, console, log, file)
    try:
        with logs.driver(config), Interrupt() as interrupt, progress, ray_session(config.ray, verbose):
            controller = Controller(config, status, progress, log, interrupt)
            try:
                controller.run()
                controller.prepare_evaluation()
                evaluate(_evaluated(config), controller.stream, controller.judge, progress, status, interrupt)
                progress.phase("done", "stopping the cluster's actors")
            finally:
                controller.close()
    finally:
        log.close()
    export(config, lambda line: console.print(printable(line), soft_wrap=True, markup=False))
    render_report(config.run_dir)
    print_results(config, console)


def _evaluated(config: RunConfig) -> RunConfig:
    """What is evaluated at the end: of a replay only what needs no judge; `sae-ray evaluate` measures the rest."""
    if config.rlaif.replay_rewards is None:
        return config
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"latents": 0})})


def export(config: RunConfig, say: Callable[[str], object]) -> None:
    """Writes each SAE of a run, as its last checkpoint holds it, in the format that its `sae.export` names.

    Main goes into the folder `FORMAT/`, the others into `FORMAT-NAME/`.

    Args:
        say: told about an SAE that its format cannot express, or whose `sae.init_from` is gone.
    """
    for name, spec in config.specs().items():
        if spec.sae.export is None:
            continue
        try:
            format, found = as_exported(config, name, spec.sae.export, sae_of_run(config, name)[1])
            folder = config.run_dir / (format if name == MAIN else f"{format}-{name}")
            export_sae(found.sae, folder, format, found.provenance)
        except UserError as error:
            say(f"{name} is not exported: {error}")
