"""`sae-ray train | evaluate | judge | explain | store | export | import | submit | status | logs | stop |
doctor`.

Errors the user can mend are one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import RunInterrupted, UserError, printable
from sae_ray.logs import redacted
from sae_ray.storage import DISK_FULL, why_not_written

if TYPE_CHECKING:
    from sae_ray.submission import Attempt, Jobs

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ConfigFile = Annotated[Path, typer.Argument(help="run config (YAML)", show_default=False)]
Address = Annotated[
    str | None, typer.Option(help="of the cluster's dashboard [default: $RAY_API_SERVER_ADDRESS, else this machine's]")
]
TrustNetwork = Annotated[bool, typer.Option("--trust-network", help="no token, though others may reach the address")]
RunName = Annotated[str, typer.Argument(help="name of a submitted run", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, over the file; repeatable")]


@app.callback()
def _root() -> None:
    """Sparse autoencoders trained on Ray with interpretability feedback from judge language models."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="remove an earlier run of this name first")] = False,
    replay_rewards: Annotated[
        Path | None,
        typer.Option(help="run folder: apply that finished run's rewards, ask no judge", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option(help="validate everything that can be without a cluster, and stop")] = False,
    verbose: Annotated[bool, typer.Option(help="show the actors' logs")] = False,
) -> None:
    """Run the whole loop, or resume it: the same run name continues from its last checkpoint."""
    if replay_rewards is not None:
        # As JSON, which is YAML: a path may hold anything.
        overrides = [*(overrides or []), f"rlaif.replay_rewards={json.dumps(str(replay_rewards.resolve()))}"]
    run = load_config(config, overrides)
    from sae_ray.preflight import check_checkpoint, check_checkpoint_dir, check_resumable, preflight, remove_run
    from sae_ray.reward.replay import check_replay

    check_checkpoint_dir(run)
    # Before anything is removed: it may name the folder that --fresh removes.
    check_replay(run)
    if fresh:
        remove_run(run)
    check_resumable(run)
    check_checkpoint(run)
    preflight(run)
    if check:
        _say(f"{config}: fine; {run.name} would train in {run.run_dir}")
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
    # Whose rewards a run was trained with is no matter of its evaluation, which asks judges.
    settings = settings.model_copy(update={"rlaif": settings.rlaif.model_copy(update={"replay_rewards": None})})
    check_checkpoint(settings)
    preflight(settings)
    from sae_ray.evaluation.run import evaluate_run

    evaluate_run(settings, verbose=verbose)


@app.command()
def judge(
    sae: Annotated[Path, typer.Argument(help="run folder, or an SAE of any format `import` reads", show_default=False)],
    config: Annotated[Path | None, typer.Option(help="run config [default: what the SAE says of itself]")] = None,
    corpus: Annotated[
        str | None, typer.Option(help=".txt, .jsonl or .parquet (glob, s3://), Hugging Face dataset, installed-docs")
    ] = None,
    latents: Annotated[str | None, typer.Option(help="0:1000, or 3,9,12:20 [default: all]")] = None,
    budget: Annotated[
        str | None, typer.Option(help="30minutes, 500000tokens: spent where intervals are widest [default: no limit]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="folder below runs_dir [default: judge- and the SAE's name]")] = None,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="remove an earlier judging of this name first")] = False,
    verbose: Annotated[bool, typer.Option(help="show the actors' logs")] = False,
) -> None:
    """Explain and score the latents of an SAE, with nulls and intervals; the same command goes on where it stopped."""
    from sae_ray.judge.roles import ROLES
    from sae_ray.judging.run import Budget, judge_sae
    from sae_ray.judging.target import find_target, latents_of
    from sae_ray.preflight import check_judges, check_sources

    limit = Budget.parse(budget)
    target = find_target(sae, config, overrides or [], corpus, name)
    chosen = latents_of(latents, target.sae.d_sae)
    check_sources(target.config)
    check_judges(target.config, ROLES)
    judge_sae(target, chosen, limit, fresh=fresh, verbose=verbose)


@app.command()
def explain(
    judging: Annotated[Path, typer.Argument(help="folder that `sae-ray judge` made", show_default=False)],
    latent: Annotated[int, typer.Argument(help="id of a judged latent", show_default=False)],
    kind: Annotated[str, typer.Option(help="latent, random_direction, or a baseline's name")] = "latent",
) -> None:
    """One latent on the terminal: explanation, scores, and texts with coloured tokens."""
    from sae_ray.judging.terminal import explain_latent

    explain_latent(judging, latent, Console(), kind)


@app.command()
def store(
    config: ConfigFile,
    to: Annotated[str, typer.Option(help="folder or s3://bucket/prefix", show_default=False)],
    blocks: Annotated[
        int | None, typer.Option(min=1, help="blocks of each split [default: what the config's run takes]")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="train, evidence, heldout; repeatable")] = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="show the actors' logs")] = False,
) -> None:
    """Write the activations that a run would train on, for `activations.store`; resumes a half-written store."""
    run = load_config(config, overrides)
    from sae_ray.corpus.reader import SPLITS
    from sae_ray.storage import open_storage

    to = os.path.expanduser(to)  # --to=~/x: no shell does
    open_storage(to)  # refuses what is no place, before anything is computed for it
    splits = [name for name in SPLITS if name in (split or ["train"])]
    if unknown := [name for name in split or [] if name not in SPLITS]:
        raise UserError(f"--split {unknown[0]}: allowed: {', '.join(SPLITS)}")
    from sae_ray.preflight import check_sources

    run = run.model_copy(update={"activations": run.activations.model_copy(update={"store": None})})
    check_sources(run)
    from sae_ray.activations.storing import store_blocks

    store_blocks(run, to, blocks, splits, verbose=verbose)


@app.command("export")
def export_(
    run: Annotated[Path, typer.Argument(help="run folder", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            help="saelens, sparsify, dictionary_learning, gemma_scope, or same: that of sae.init_from, in its units"
        ),
    ] = "saelens",
    sae: Annotated[str, typer.Option(help="which of the run's SAEs")] = "main",
    step: Annotated[int | None, typer.Option(help="of the checkpoint [default: the last]")] = None,
) -> None:
    """Write an SAE of a run in the format of another library."""
    from sae_ray.preflight import resolved_path

    settings = _at(load_config(resolved_path(run)), run)
    from sae_ray.sae.formats import export_sae
    from sae_ray.sae.formats.of_run import as_exported, sae_of_run

    at_step, found = sae_of_run(settings, sae, step)
    format, found = as_exported(settings, sae, format, found)
    export_sae(found.sae, out, format, found.provenance)
    _say(f"{out}: {format}, {found}, from {sae} of {run} at step {at_step}")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="folder of an SAE, or its file of weights", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    format: Annotated[str | None, typer.Option(help="what PATH is in [default: told by its files]")] = None,
    to: Annotated[str, typer.Option(help="saelens, sparsify, dictionary_learning, gemma_scope")] = "saelens",
) -> None:
    """Read an SAE that another library wrote, and write it in `--to`'s format."""
    from sae_ray.sae.formats import detect, export_sae, read_sae

    format = format or detect(path)
    found = read_sae(path, format)
    _say(f"{path}: {format}, {found}")
    export_sae(found.sae, out, to, found.provenance)
    _say(f"{out}: {to}; train on from it with sae.init_from: {out}")


def _say(text: str) -> None:
    """A line that may quote a file that somebody else wrote: neither markup nor control characters of it count."""
    Console().print(printable(text), soft_wrap=True, markup=False)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="show what the run prints until it ends")] = True,
    trust_network: TrustNetwork = False,
) -> None:
    """Run a config as a Ray job on a cluster. The same command joins a run that is under way, or resumes one."""
    run = load_config(config, overrides)
    from sae_ray.submission import Jobs, for_cluster

    run = for_cluster(run, str(config))
    jobs = Jobs(address, trust_network)
    attempt, is_new = jobs.submit(run)
    told = "submitted" if is_new else "is under way"
    _say(f"{run.name}: {told} as job {attempt.id} at {jobs.address}")
    if wait:
        _follow(jobs, attempt)


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(help="run folder, s3://bucket/prefix of checkpoints, or a submitted run's name [default: all]"),
    ] = None,
    once: Annotated[bool, typer.Option(help="show a run folder as it is now, and stop")] = False,
    address: Address = None,
    trust_network: TrustNetwork = False,
) -> None:
    """A run's queues, waits and last events until it ends; or submitted runs, and the last line that one printed."""
    if run is not None:
        from sae_ray.watching import is_run, watch

        if is_run(run):
            with contextlib.suppress(KeyboardInterrupt):
                watch(run, Console(), once)
            return
        if "/" in run:
            raise UserError(f"{run}: is no run folder: there is no config.yaml in it")
    from sae_ray.submission import Jobs, print_status

    print_status(Jobs(address, trust_network), run, Console())


@app.command()
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="go on until the run ends")] = False,
    trust_network: TrustNetwork = False,
) -> None:
    """What a submitted run has printed."""
    from sae_ray.submission import Jobs

    jobs = Jobs(address, trust_network)
    attempt = jobs.latest(run)
    if follow:
        _follow(jobs, attempt)
    else:
        print(jobs.logs(attempt), end="")


@app.command()
def stop(run: RunName, address: Address = None, trust_network: TrustNetwork = False) -> None:
    """Stop a submitted run; submitting it again goes on from its last checkpoint."""
    from sae_ray.submission import Jobs

    attempt = Jobs(address, trust_network).stop(run)
    told = f"had ended: {attempt.status.value}" if attempt.over else "is asked to stop"
    _say(f"{run}: job {attempt.id} {told}")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="also what this config would fail of")] = None,
    overrides: Overrides = None,
) -> None:
    """What this machine has, and what would fail: versions, GPUs, memory, ports, models, storage."""
    run = load_config(config, overrides) if config else None
    from sae_ray.doctor import examine, print_findings

    if not print_findings(examine(run), Console()):
        raise typer.Exit(1)


def _follow(jobs: Jobs, attempt: Attempt) -> None:
    """Until it ends; with exit code 1 if it did not succeed, and 130 after Ctrl-C, which leaves it alone."""
    try:
        ended = jobs.follow(attempt, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(
            f"\nsae-ray: no longer following; {attempt.run} goes on. sae-ray logs --follow {attempt.run} shows it "
            f"again, sae-ray stop {attempt.run} ends it",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if ended.status.value != "SUCCEEDED":
        print(f"sae-ray: {printable(f'{ended.run}: {ended.status.value}: {ended.message}')}", file=sys.stderr)
        raise typer.Exit(1)


def _at(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config of a run folder that may have been moved since it was written."""
    return config.model_copy(update={"runs_dir": str(run_dir.resolve().parent), "name": run_dir.resolve().name})


def main() -> None:
    """Console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"sae-ray: {printable(redacted(str(error)))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        said = f"{error.filename or 'a file of the run'}: {why_not_written(error)}"
        print(f"sae-ray: {printable(said)}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as stop:
        print(f"sae-ray: {printable(str(stop))}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
