"""Whether a run may be trained with the rewards of another one: `sae-ray train CONFIG --replay-rewards RUN`.

The replay applies each round's batch after the same step as the other run did and asks no judge. On the same mesh its
losses are the other run's, bit for bit. What turns rewards into gradients (`rlaif.estimator`, `gamma`, ...) may differ:
then it shows what the same verdicts do otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError
from sae_ray.preflight import differences, numbers_of
from sae_ray.reward.applied import FOLDER, AppliedRounds
from sae_ray.reward.credit import ESTIMATORS
from sae_ray.storage import LocalStorage
from sae_ray.trainer import checkpoint

# The sections that decide which activations and weights a reward meets.
_SECTIONS = ("seed", "model", "hook", "hook_out", "corpus", "activations", "sae", "trainer")
# Keys of `rlaif` that decide when a reward arrives and what its context ids mean.
_PLACES = ("enabled", "steps", "rounds", "evidence_blocks")


def check_replay(config: RunConfig) -> None:
    """Finds out whether `rlaif.replay_rewards` names a run whose rewards this run can be trained with.

    Raises:
        UserError: it holds no run, the run is not finished or differs in what its rewards refer to (names the keys and
            both values), or its rewards are missing or unreadable.
    """
    if config.rlaif.replay_rewards is None:
        return
    folder = Path(config.rlaif.replay_rewards)
    if not config.rlaif.enabled:
        raise UserError("rlaif.replay_rewards: nothing would be replayed, for rlaif.enabled is false")
    if folder.resolve() == config.run_dir.resolve():
        raise UserError(f"rlaif.replay_rewards = {folder}: is this run's own folder; give the replay another name")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"rlaif.replay_rewards = {folder}: holds no run (no config.yaml)")
    earlier = load_config(folder / "config.yaml")
    # It may have been moved since.
    earlier = earlier.model_copy(update={"runs_dir": str(folder.resolve().parent), "name": folder.resolve().name})
    if differing := sorted(differences(_referred_to(earlier), _referred_to(config))):
        raise UserError(
            f"rlaif.replay_rewards = {folder}: its rewards are of another run ({'; '.join(differing[:5])}); "
            "set these as they were there"
        )
    latest = checkpoint.latest(checkpoint.home(earlier))
    done = checkpoint.read_manifest(latest, any_format=True)["step"] if latest is not None else 0
    if done < earlier.total_steps:
        raise UserError(
            f"rlaif.replay_rewards = {folder}: that run is not finished (step {done} of {earlier.total_steps})"
        )
    rounds = AppliedRounds(LocalStorage(folder))
    missing = sorted(set(range(config.rlaif.rounds)) - set(rounds.numbers()))
    if missing:
        raise UserError(
            f"rlaif.replay_rewards = {folder}: holds no rewards of round {missing[0] + 1} of {config.rlaif.rounds} "
            f"({FOLDER}/ is what a run of this version leaves there when it has asked judges)"
        )
    for number in range(config.rlaif.rounds):
        batch = rounds.read(number).batch
        if batch.rollouts is None and ESTIMATORS[config.rlaif.estimator].uses_rollouts:
            raise UserError(
                f"rlaif.estimator = {config.rlaif.estimator}: learns from steered generations, and round {number + 1} "
                f"of rlaif.replay_rewards = {folder} holds none; replay a run of such an estimator, or give another one"
            )


def _referred_to(config: RunConfig) -> dict[str, Any]:
    tree = numbers_of(config)
    judge = {"context_tokens": tree["judge"]["context_tokens"]}
    places = {key: tree["rlaif"][key] for key in _PLACES}
    return {key: tree[key] for key in _SECTIONS} | {"judge": judge, "rlaif": places}
