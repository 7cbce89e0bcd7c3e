"""Re-sharding what credit estimators saved, when a run resumes on another number of shards.

An estimator's state is a flat dict of tensors whose names say what their first axis is:

    latents, *_N, *_ND   the judged latents of the shard (`latents` holds their global ids)
    row_*                verdicts; row_latent is a place in `latents`, row_context a place on the C axis
    *_C, *_CSD, ...      contexts
    anything else        the same on every shard (deltas that were `given` are so on all)
"""

from __future__ import annotations

import re

import torch

State = dict[str, torch.Tensor]


def reshard(states: list[State], first: int, last: int) -> State:
    """The state of a shard that holds latents `first..last-1`; empty where none of them was judged.

    Args:
        states: what every old shard saved, in order of latents.
    """
    joined = _join([state for state in states if state])
    if not joined:
        return {}
    keep_N = (joined["latents"] >= first) & (joined["latents"] < last)
    if not keep_N.any():
        return {}
    out = {name: tensor[keep_N] if _axis(name) == "N" else tensor for name, tensor in joined.items()}
    if "row_latent" in joined:
        keep_V = keep_N[joined["row_latent"]]
        place_N = keep_N.long().cumsum(0) - 1
        out |= {name: tensor[keep_V] for name, tensor in joined.items() if _axis(name) == "V"}
        out["row_latent"] = place_N[out["row_latent"]]
    return out


def _join(states: list[State]) -> State:
    if len(states) < 2:
        return states[0] if states else {}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in states[0]}
    latents = contexts = 0
    for state in states:
        for name, tensor in state.items():
            moved = {"row_latent": latents, "row_context": contexts}.get(name, 0)
            parts[name].append(tensor + moved if moved else tensor)
        latents += len(state["latents"])
        contexts += max((len(tensor) for name, tensor in state.items() if _axis(name) == "C"), default=0)
    return {name: torch.cat(part) if _axis(name) else part[0] for name, part in parts.items()}


def _axis(name: str) -> str | None:
    """What the first axis of a state tensor is: N latents, V verdicts, C contexts, or None."""
    if name == "latents":
        return "N"
    if name.startswith("row_"):
        return "V"
    match = re.search(r"_([NC])[A-Z]*$", name)
    return match[1] if match else None
