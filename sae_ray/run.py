"""One `sae-ray train`: session, loop, evaluation, export and report, in the order a person sees them."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from sae_ray.config import RunConfig
from sae_ray.controller import Controller
from sae_ray.errors import UserError
from sae_ray.evaluation.evaluator import BEFORE, RLAIF, find_saes
from sae_ray.evaluation.run import evaluate, print_results
from sae_ray.report.render import render_report
from sae_ray.sae.formats import Provenance, export_sae
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
    folder = checkpoint.home(config)
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
    export(config, lambda line: console.print(line, soft_wrap=True))
    render_report(config.run_dir)
    print_results(config, console)


def export(config: RunConfig, say: Callable[[str], object]) -> None:
    """Writes every SAE of a run in SAELens's format: main's last version into `saelens/`, others beside it.

    Args:
        say: told about an SAE that SAELens cannot express.
    """
    saes = find_saes(config)
    variants = {name: placed for name, placed in saes.items() if name in config.specs()}
    main = next(saes[name] for name in (RLAIF, BEFORE) if name in saes)
    for name, placed in ({"": main} | variants).items():
        provenance = Provenance(
            config.model.name,
            placed.hook.name,
            config.corpus.context_length,
            config.corpus.dataset or config.corpus.kind,
            placed.hook_out.name if placed.hook_out else None,
        )
        folder = config.run_dir / (f"saelens-{name}" if name else "saelens")
        try:
            export_sae(placed.sae, folder, "saelens", provenance)
        except UserError as error:
            say(f"{name or 'main'} is not exported to {folder}: {error}")
