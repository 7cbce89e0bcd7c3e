"""`sae-ray train | evaluate`. Errors the user can mend are one line on stderr and exit code 2."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sae_ray.config import RunConfig, load_config
from sae_ray.errors import RunInterrupted, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ConfigFile = Annotated[Path, typer.Argument(help="run config (YAML)", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, over the file; repeatable")]


@app.callback()
def _root() -> None:
    """Sparse autoencoders trained on Ray with interpretability feedback from judge language models."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="remove an earlier run of this name first")] = False,
    check: Annotated[bool, typer.Option(help="validate everything that can be without a cluster, and stop")] = False,
    verbose: Annotated[bool, typer.Option(help="show the actors' logs")] = False,
) -> None:
    """Run the whole loop, or resume it: the same run name continues from its last checkpoint."""
    run = load_config(config, overrides)
    from sae_ray.preflight import check_checkpoint, check_resumable, preflight

    if fresh and run.run_dir.exists():
        if not (run.run_dir / "config.yaml").is_file() and any(run.run_dir.iterdir()):
            raise UserError(f"--fresh: {run.run_dir} does not look like a run folder; not removed")
        shutil.rmtree(run.run_dir)
    check_resumable(run)
    check_checkpoint(run)
    preflight(run)
    if check:
        Console().print(f"{config}: fine; {run.name} would train in {run.run_dir}", soft_wrap=True)
        return
    from sae_ray.run import run_training

    run_training(run, verbose=verbose)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder", show_default=False)],
    address: Annotated[str | None, typer.Option(help="Ray address instead of the run's own")] = None,
    verbose: Annotated[bool, typer.Option(help="show the actors' logs")] = False,
) -> None:
    """FVU, L0, dead latents, CE loss recovered and held-out detection of a run's SAEs, with nulls."""
    from sae_ray.preflight import check_checkpoint, preflight, resolved_path

    settings = load_config(resolved_path(run), [f"ray.address={address}"] if address else None)
    settings = _at(settings, run)
    check_checkpoint(settings)
    preflight(settings)
    from sae_ray.evaluation.run import evaluate_run

    evaluate_run(settings, verbose=verbose)


def _at(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config of a run folder that may have been moved since it was written."""
    return config.model_copy(update={"runs_dir": str(run_dir.resolve().parent), "name": run_dir.resolve().name})


def main() -> None:
    """Console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"sae-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as stop:
        print(f"sae-ray: {stop}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
