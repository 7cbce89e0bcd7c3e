"""Everything that can be found wrong before a cluster is touched."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sae_ray.config import JudgeConfig, RunConfig
from sae_ray.errors import UserError, printable
from sae_ray.session import check_address
from sae_ray.storage import LocalStorage, ensure_writable, is_s3, probe

if TYPE_CHECKING:
    from sae_ray.judge.roles import Role

HASHED_BYTES = 2 << 30

# Sections and keys that change where or how fast a run goes, not its numbers: a resumed run may change them. And the
# alarms: what they have stopped, a person lets go on.
FREE_ON_RESUME = (
    *("runs_dir", "ray", "evaluation", "rlaif.round_timeout_s", "rlaif.alarms", "rlaif.rewards.threads", "sae.export"),
    *(f"rlaif.rewards.causality.{key}" for key in ("cpus", "gpus", "rows")),
    *(f"{part}.{key}" for part in ("activations", "trainer", "judge") for key in ("resources", "label_selector")),
    *(f"judge.{key}" for key in ("app", "autoscaling", "cpus", "gpus", "threads", "max_in_flight", "max_attempts")),
    *(f"judge.{key}" for key in ("start_timeout_s", "deadline_s", "stall_timeout_s", "api_key_env", "trust_network")),
    *(
        f"activations.{key}"
        for key in ("producers", "cpus", "gpus", "window_blocks", "lease_timeout_s", "max_restarts", "store")
    ),
    *(f"trainer.{key}" for key in ("dp", "tp", "cpus", "gpus", "max_restarts", "step_timeout_s")),
    *(f"trainer.{key}" for key in ("checkpoint_every", "keep_checkpoints", "checkpoint_dir")),
)


def preflight(config: RunConfig) -> None:
    """Checks the run folder, the Ray address, the model, the hook, the corpus, what to start from, and the judges (of
    a run that is not a replay).

    Raises:
        UserError: the first thing that would fail, in the user's words.
    """
    ensure_writable(config.run_dir)
    check_address(config.ray)
    check_sources(config)
    check_init_from(config)
    check_export(config)
    if config.rlaif.replay_rewards is None:
        check_judges(config)


def check_checkpoint_dir(config: RunConfig) -> None:
    """Proves that checkpoints can be written, before anything asks what is there already.

    Raises:
        UserError: trainer.checkpoint_dir cannot be written; names the place and what to do.
    """
    if config.trainer.checkpoint_dir is not None:
        probe(config.trainer.checkpoint_dir, "trainer.checkpoint_dir")


def check_sources(config: RunConfig) -> None:
    """Checks where activations come from: the model, its hook points, the corpus, the activation store.

    Raises:
        UserError: the first thing that is wrong, or a store that ends before the run does.
    """
    from sae_ray.activations.store import ActivationStore
    from sae_ray.activations.subject import check_hooks, load_tokenizer
    from sae_ray.corpus import check_corpus

    if config.activations.store is not None:
        store = ActivationStore.open(config.activations.store)
        store.check(config)
        store.check_enough(config)
    warn_of_code(config)
    check_hooks(config.model, config.hooks)
    check_corpus(config, load_tokenizer(config.model))


def warn_of_code(config: RunConfig) -> None:
    """Says whose code will run, where `trust_remote_code` is on."""
    from sae_ray.judge.roles import SCORER, judges_of

    trusted = {"model": config.model.name} if config.model.trust_remote_code else {}
    for role, judge in judges_of(config).items():
        if judge.trust_remote_code and judge.endpoint is None:
            trusted["judge" if role == SCORER or role not in config.judges else f"judges.{role}"] = judge.model
    for key, name in trusted.items():
        warning = f"warning: {key}.trust_remote_code: code of {name} will run on every node with all rights of this run"
        print(f"sae-ray: {printable(warning)}", file=sys.stderr)


def check_init_from(config: RunConfig) -> None:
    """Reads the SAEs that `sae.init_from` names, unless the run has a checkpoint and goes on from that.

    Raises:
        UserError: one cannot be read, or does not fit its `sae` section or the model.
    """
    from sae_ray.trainer import checkpoint

    starts = {name: spec for name, spec in config.specs().items() if spec.sae.init_from is not None}
    if not starts or checkpoint.latest(checkpoint.home(config)) is not None:
        return
    from sae_ray.activations.subject import read_model_config
    from sae_ray.sae.formats import check_fits, import_sae

    width = getattr(read_model_config(config.model).get_text_config(), "hidden_size", None)
    for name, spec in starts.items():
        try:
            sae = import_sae(str(spec.sae.init_from))
            check_fits(sae, spec.sae, width, width if spec.hook_out else None)
        except UserError as error:
            where = "" if name == "main" else f"saes {name}: "
            key = "" if str(error).startswith("sae.init_from") else "sae.init_from: "
            raise UserError(f"{where}{key}{error}") from error


def check_export(config: RunConfig) -> None:
    """Refuses a format under `sae.export` that cannot express what will be trained.

    Raises:
        UserError: names the key and what the format lacks.
    """
    from sae_ray.sae.formats import FORMATS
    from sae_ray.sae.formats.of_run import SAME, shape_of

    for name, spec in config.specs().items():
        if spec.sae.export not in (None, SAME):
            reason = FORMATS[str(spec.sae.export)].refusal(shape_of(spec), spec.hook_out is not None)
            if reason is not None:
                where = "" if name == "main" else f"saes {name}: "
                raise UserError(f"{where}sae.export {spec.sae.export}: the format cannot express {reason}")


def check_judges(config: RunConfig, asked: Collection[Role] | None = None) -> None:
    """Checks every judge that will be asked: that its model can be had, or that its server answers.

    Args:
        asked: those roles; None: what training and evaluating the run asks.
    Raises:
        UserError: a model is not to be had, or a server cannot be reached, refuses the key, does not say which model
            answers or does not know it, or gives no verdicts; names the key as the config has it.
    """
    from sae_ray.embedded import resolve_model
    from sae_ray.judge.calibrated import said_of
    from sae_ray.judge.roles import ROLES, SCORER, judges_of

    if asked is None:
        evaluated = ROLES if config.evaluation.latents else ()
        trained = {role for role in ROLES if role != "heldout" or config.rlaif.alarms.asks_held_out}
        asked = (trained if config.rlaif.enabled else set()) | set(evaluated)
    for role, judge in judges_of(config).items():
        # One that the config does not name is the scorer; an application that serves already knows its model.
        if role not in asked or (role != SCORER and role not in config.judges):
            continue
        if judge.endpoint is not None:
            try:
                asyncio.run(_check_endpoint(judge, writes=role == "explainer"))
            except UserError as error:
                raise UserError(said_of(config, role, error)) from None
        elif judge.app is None and judge.s3_mirror is None:
            resolve_model(judge.model, "judge.model" if role == SCORER else f"judges.{role}.model")


async def _check_endpoint(judge: JudgeConfig, writes: bool) -> None:
    """Asks a server one question of the kind that the run will ask; of `writes`, to write a token.

    Raises:
        UserError: it gave no answer, and why.
    """
    from sae_ray.judge.endpoint import EndpointClient

    # Somebody waits at the terminal: what does not answer twice is not there.
    client = EndpointClient(judge.model_copy(update={"max_attempts": 2, "deadline_s": min(60, judge.deadline_s)}))
    answer: Any
    try:
        modes = await client.modes()
        if writes:
            (answer,) = await client.generate(["Hello"], max_tokens=1, chat="likelihood" not in modes)
        else:
            mode = modes[0] if judge.mode == "auto" else judge.mode
            (answer,) = await client.score([("The sun is shining.", "weather")], mode)
    finally:
        await client.aclose()
    if answer is None:
        why = client.last_error or "its answer holds no number that can be read"
        raise UserError(f"judge.endpoint {judge.endpoint}: answers no question: {why}")


def check_checkpoint(config: RunConfig) -> None:
    """Reads a resumed run's last checkpoint against its hashes, so that a torn shard is found before a cluster starts.

    Checkpoints larger than HASHED_BYTES are left to the ranks, which read every shard against its hash anyway.

    Raises:
        UserError: a file is missing or corrupt (it is named).
    """
    from sae_ray.trainer import checkpoint

    path = checkpoint.latest(checkpoint.home(config))
    if path is not None and not is_s3(path):  # what S3 holds was checked as it was written
        checkpoint.check_whole(path, HASHED_BYTES)


def numbers_of(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides a run's numbers."""
    tree = config.model_dump(mode="json")
    # The evaluation's own judge is as free as the evaluation.
    tree["judges"].pop("heldout", None)
    for key in FREE_ON_RESUME:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
        if parents == ["judge"]:
            for other in tree["judges"].values():
                other.pop(leaf, None)
    return tree


def check_resumable(config: RunConfig) -> None:
    """A run name that was used before must mean the same run, and so must a checkpoint folder.

    Raises:
        UserError: the run folder or trainer.checkpoint_dir holds a run whose numbers would differ; names the keys.
    """
    from sae_ray.trainer import checkpoint

    path = config.run_dir / "config.yaml"
    if path.exists():
        try:
            earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            earlier = None
        _check_same(config, earlier, path, config.run_dir)
    latest = checkpoint.latest(checkpoint.home(config))
    if latest is not None and (earlier := checkpoint.read_manifest(latest).get("config")):
        _check_same(config, earlier, latest, checkpoint.home(config))


def _check_same(config: RunConfig, earlier: Any, where: str | Path, holder: str | Path) -> None:
    try:
        before = numbers_of(RunConfig.model_validate(earlier))
    except ValueError as error:
        raise UserError(
            f"{where}: the earlier run's config cannot be read; use another name or remove {holder}"
        ) from error
    changed = sorted(differences(before, numbers_of(config)))
    if changed:
        raise UserError(
            f"{holder}: holds a run with other settings ({'; '.join(changed[:5])}); "
            "use another name, the same settings, or --fresh"
        )


def remove_run(config: RunConfig) -> None:
    """What `--fresh` does: the run folder goes, and this run's checkpoints wherever they are.

    Raises:
        UserError: the folder is no run's, or a link, or the checkpoints are another run's; nothing was removed then.
    """
    from sae_ray.trainer import checkpoint

    folder = config.run_dir
    if folder.is_symlink():
        raise UserError(
            f"--fresh: {folder} is a link to {folder.readlink()}; not removed; remove what it leads to, or the link"
        )
    # The probe of a checkpoint_dir in here leaves folders, and nothing in them.
    empty = all(path.is_dir() and not path.is_symlink() for path in folder.rglob("*"))
    if folder.exists() and not (folder / "config.yaml").is_file() and not empty:
        raise UserError(f"--fresh: {folder} does not look like a run folder; not removed")
    home = checkpoint.home(config)
    for _, path in checkpoint.committed(home):
        name = checkpoint.read_manifest(path, any_format=True).get("config", {}).get("name", config.name)
        if name != config.name:
            raise UserError(
                f"--fresh: {path} is a checkpoint of the run {name!r}; not removed; "
                "choose another trainer.checkpoint_dir"
            )
    checkpoint.remove_all(home)
    LocalStorage(folder).delete("")


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Every key in which two trees differ, with both values, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in before.keys() | after.keys():
            found += differences(before.get(key), after.get(key), f"{prefix}{key}.")
        return found
    return [] if before == after else [f"{prefix[:-1]} was {before!r}, is {after!r}"]


def resolved_path(run_dir: Path) -> Path:
    """Where the resolved config of a run lies.

    Raises:
        UserError: `run_dir` holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: holds no run (no config.yaml)")
    return path
