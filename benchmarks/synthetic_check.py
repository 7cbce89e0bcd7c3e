"""Our synthetic worlds and metrics against SAELens's, as numbers side by side.

    .venv/bin/python benchmarks/synthetic_check.py [--samples 40000] [--out FILE.json]

Metrics: one SAE (random near the true directions, so that every metric is neither 0 nor 1), one set of samples, both
implementations; they must agree to rounding. World: the `research` preset against the `SyntheticModel` of
`benchmarks/synthetic.py`, which is given our correlation matrix (a drawn one decides how often a child fires); the two
samplers share no random numbers, so statistics are compared within sampling error. Runs in the `saelens` environment of
`peer_envs.py`, and goes there by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peer_envs import REPO, default_dir, python_of

from sae_ray.evaluation.synthetic import World
from sae_ray.evaluation.synthetic_metrics import Truth, measure
from sae_ray.evaluation.synthetic_worlds import grow, preset

METRIC_TOLERANCE = 2e-5  # SAELens sums in float32
SIGMAS = 5.0  # by how many standard errors a statistic of the worlds may differ


def metrics_side_by_side(samples: int) -> dict[str, dict[str, float]]:
    """{metric: {ours, theirs}} of the same SAE on the same samples of our world."""
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic import evals as theirs

    world = World.of("research", 0)
    generator = torch.Generator().manual_seed(5)
    x_ND, a_NF = world.sample(samples, generator)
    d_sae = world.spec.d_sae
    # Every third latent lies near its neighbour's feature, and some are silent: uniqueness and dead are not trivial.
    aim = torch.arange(d_sae) - (torch.arange(d_sae) % 3 == 2).long()
    W_dec_MD = world.directions_FD[aim] + 0.06 * torch.randn(d_sae, world.spec.d_in, generator=generator)
    pre_NM = (x_ND - world.bias_D) @ W_dec_MD.T
    pre_NM[:, ::50] = -1.0
    f_NM = torch.where(pre_NM > 1.2, pre_NM, 0)
    x_hat_ND = 0.6 * f_NM @ W_dec_MD + world.bias_D
    own = measure(f_NM, x_hat_ND, W_dec_MD, Truth(x_ND, a_NF > 0, world.directions_FD, world.forest))
    sums = {
        "l0": theirs.L0Calculator(),
        "dead": theirs.DeadLatentsCalculator(d_sae),
        "ev": ExplainedVarianceCalculator(),
        "class": theirs.ClassificationMetricsCalculator(W_dec_MD, world.directions_FD),
    }
    for rows in torch.arange(samples).split(4096):
        sums["l0"].add_batch(f_NM[rows])
        sums["dead"].add_batch(f_NM[rows])
        sums["ev"].add_batch(x_hat_ND[rows], x_ND[rows])
        sums["class"].add_batch(f_NM[rows], a_NF[rows])
    found = sums["class"].compute()
    peer = {
        "l0": sums["l0"].compute(),
        "dead": sums["dead"].compute(),
        "ev": sums["ev"].compute(),
        "precision": found.precision,
        "recall": found.recall,
        "f1": found.f1_score,
        "mcc": theirs.mean_correlation_coefficient(W_dec_MD, world.directions_FD),
        "uniqueness": theirs.feature_uniqueness(W_dec_MD, world.directions_FD),
    }
    return {name: {"ours": float(getattr(own, name)), "theirs": float(value)} for name, value in peer.items()}


def worlds_side_by_side(samples: int) -> dict[str, dict[str, float]]:
    """{statistic: {ours, theirs, error}}, where error is the standard error of the difference."""
    from synthetic import make_world

    world, peer = World.of("research", 0), make_world(0)
    ours_F, theirs_F = world.given_F, peer.activation_generator.firing_probabilities.double()
    peer.activation_generator.low_rank_correlation = (world.factor_FR, world.own_F)
    _, ours_NF = world.sample(samples, torch.Generator().manual_seed(8))
    torch.manual_seed(9)
    theirs_NF = peer.activation_generator.sample(samples)
    out: dict[str, dict[str, float]] = {}
    for feature in (0, 63, 64, 319, 320, 1022):
        name = f"probability of feature {feature} given its parent"
        out[name] = {"ours": float(ours_F[feature]), "theirs": float(theirs_F[feature]), "error": 1e-6}
    forest = grow(preset("research"))
    for name, of in _statistics(forest).items():
        a_N, b_N = of(ours_NF).double(), of(theirs_NF).double()
        error = (a_N.var() / len(a_N) + b_N.var() / len(b_N)).sqrt()
        out[name] = {"ours": float(a_N.mean()), "theirs": float(b_N.mean()), "error": float(error)}
    peer_FD = peer.feature_dict.feature_vectors.detach()
    for name, rows_FD in (("ours", world.directions_FD), ("theirs", peer_FD)):
        cosine_FF = (rows_FD @ rows_FD.T).fill_diagonal_(0)
        # Two draws of directions: their root mean square cosine varies by far less than the 2% allowed here.
        out.setdefault("rms cosine", {"error": 0.02 / SIGMAS * 0.0872})[name] = float(cosine_FF.square().mean().sqrt())
        out.setdefault("largest absolute cosine", {"error": 0.02})[name] = float(cosine_FF.abs().max())
        out.setdefault("norm of a direction", {"error": 1e-6})[name] = float(rows_FD.norm(dim=1).mean())
    out["bias norm"] = {
        "ours": float(world.bias_D.norm()),
        "theirs": float(peer.feature_dict.bias.detach().norm()),
        "error": 1e-6,
    }
    return out


def _statistics(forest: Any) -> dict[str, Any]:
    """Numbers of one sample (or of one firing) whose means describe a world: name -> f(a [N, F]) -> values."""
    level = forest.level_F
    child = torch.nonzero(forest.parent_F >= 0).flatten()
    parent = forest.parent_F[child]
    family = torch.arange(64, 68)  # the children of feature 0

    def fired(a_NF: torch.Tensor, feature: int) -> torch.Tensor:
        return (a_NF[:, feature] > 0).float()

    named = {
        "true L0": lambda a: (a > 0).float().sum(1),
        "squared true L0 (correlation)": lambda a: (a > 0).float().sum(1).square(),
        "orphans: children without their parent": lambda a: ((a[:, child] > 0) & (a[:, parent] <= 0)).float().sum(1),
        "children of feature 0 per sample showing it": lambda a: (a[a[:, 0] > 0][:, family] > 0).float().sum(1),
        "two children of feature 0 at once": lambda a: ((a[:, family] > 0).sum(1) > 1).float(),
        "child 64's magnitude over its parent's": lambda a: (a[:, 64] / a[:, 0])[a[:, 64] > 0].clamp(max=10),
    }
    for depth in range(3):
        named[f"active features of level {depth}"] = lambda a, d=depth: (a[:, level == d] > 0).float().sum(1)
        named[f"magnitude at level {depth}"] = lambda a, d=depth: a[:, level == d][a[:, level == d] > 0]
        named[f"squared magnitude at level {depth}"] = lambda a, d=depth: a[:, level == d][
            a[:, level == d] > 0
        ].square()
    for feature in (0, 5, 40, 63, 64, 100, 300, 319, 320, 700, 1000, 1023):
        named[f"rate of feature {feature}"] = lambda a, f=feature: fired(a, f)
    return named


def disagreements(metrics: dict[str, dict[str, float]], worlds: dict[str, dict[str, float]]) -> list[str]:
    """What differs by more than rounding, or by more than chance; empty is what should come out."""
    bad = [n for n, row in metrics.items() if not abs(row["ours"] - row["theirs"]) <= METRIC_TOLERANCE]
    return bad + [n for n, row in worlds.items() if not abs(row["ours"] - row["theirs"]) <= SIGMAS * row["error"]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Our synthetic worlds and metrics against SAELens's.")
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--envs", type=Path, default=default_dir(), help="where peer_envs.py made the environments")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("sae_lens") is None:
        python = python_of("saelens", args.envs.expanduser().resolve())
        os.execve(python, [str(python), *sys.argv], {**os.environ, "PYTHONPATH": str(REPO)})
    torch.set_num_threads(1)
    metrics, worlds = metrics_side_by_side(args.samples), worlds_side_by_side(args.samples)
    print("| | ours | SAELens |\n|---|---|---|")
    for name, row in {**metrics, **worlds}.items():
        print(f"| {name} | {row['ours']:.5f} | {row['theirs']:.5f} |")
    bad = disagreements(metrics, worlds)
    if args.out:
        args.out.write_text(json.dumps({"metrics": metrics, "worlds": worlds, "disagreements": bad}, indent=1))
    sys.exit(f"differ: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
