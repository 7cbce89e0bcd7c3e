"""Predicts a run from measured rates: steps/s, what the trainer waits for, the bottleneck (the model: `loop_model.py`).

    .venv/bin/python benchmarks/simulate.py --fit runs/quickstart                 # does it predict its own run?
    .venv/bin/python benchmarks/simulate.py --fit runs/quickstart --predict runs/b  # another run, from these rates
    .venv/bin/python benchmarks/simulate.py --fit runs/quickstart --what producers=4 rlaif_steps=0
    .venv/bin/python benchmarks/simulate.py --paper                                     # docs/scaling.md

`--fit` reads a finished run's config.yaml, metrics.jsonl and events.jsonl. Rates come from the evidence phase (blocks),
the stretches between rounds (steps), the rounds (latents) and the calibration's end; the reconstruction phase, its wait
share and the whole are then predicted and compared with what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from loop_model import START, TRAIN, Loop, Outcome, Rates, bounds, simulate
from rich.console import Console
from rich.table import Table

from sae_ray.errors import UserError
from sae_ray.telemetry import read_jsonl


@dataclass(frozen=True)
class Measured:
    """What a run's folder says: seconds of phases, of rounds (requested to applied), and of training between them."""

    phases: dict[str, float]
    rounds: list[float]
    segments: list[tuple[int, float]]  # (steps, seconds) from a round's rewards to the next request, or to the end
    calibrated_s: float | None  # after the reconstruction phase began
    step_s: float  # mean over the reconstruction phase's rows, as the ranks timed it
    save_s: float
    steps: int

    @property
    def train_share(self) -> float:
        """Of the reconstruction phase, the share in which the trainer trained."""
        return self.steps * self.step_s / self.phases["reconstruction"]

    @property
    def total(self) -> float:
        return sum(self.phases.get(name, 0) for name in ("reconstruction", "evidence", "calibration", "RLAIF"))


def measured(run: Path) -> Measured:
    """Raises UserError: the folder holds no run that went through in one go."""
    try:
        events, rows = read_jsonl(run / "events.jsonl"), read_jsonl(run / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{run}: holds no finished run: {error.filename}: {error.strerror}") from error
    if any(event["event"] in ("resume", "rank_died") for event in events):
        raise UserError(f"{run}: was interrupted; rates are read from a run that went through in one go")
    phases = {event["name"]: event["seconds"] for event in events if event["event"] == "phase"}
    if "reconstruction" not in phases:
        raise UserError(f"{run}: its events.jsonl has no reconstruction phase that ended")
    began = next(e["time"] - e["seconds"] for e in events if e["event"] == "phase" and e["name"] == "reconstruction")
    ended = max((e["time"] for e in events if e["event"] == "commit"), default=began)
    asked = [(e["time"], e["step"]) for e in events if e["event"] == "round_requested"]
    applied = [(e["time"], e["at_step"]) for e in events if e["event"] == "rewards_applied"]
    last_step = rows[-1]["step"]
    ends = [*asked[1:], (ended, last_step)]
    plain = [row for row in rows if "control/step_seconds" not in row]
    return Measured(
        phases,
        [after[0] - before[0] for before, after in zip(asked, applied, strict=False)],
        [(after[1] - before[1], after[0] - before[0]) for before, after in zip(applied, ends, strict=False)],
        next((e["time"] - began for e in events if e["event"] == "calibration"), None),
        statistics.fmean(row["step_seconds"] for row in plain or rows),
        statistics.fmean([e.get("snapshot_seconds", 0.0) for e in events if e["event"] == "commit"] or [0.0]),
        max((row["step"] for row in plain), default=last_step),
    )


def loop_of(config: dict[str, Any]) -> Loop:
    """The loop that a resolved config describes."""
    acts, trainer, rlaif = config["activations"], config["trainer"], config["rlaif"]
    tokens = acts["block_sequences"] * (config["corpus"]["context_length"] - acts["mask_first_tokens"])
    scaling, on = config["judge"]["autoscaling"], rlaif["enabled"]
    return Loop(
        producers=producers if isinstance(producers := acts["producers"], int) else producers["max"],
        steps=trainer["steps"],
        mix_blocks=acts["mix_blocks"],
        window_blocks=acts["window_blocks"],
        steps_per_window=max(1, round(acts["mix_blocks"] * tokens / trainer["batch_tokens"])),
        checkpoint_every=trainer["checkpoint_every"],
        rlaif_steps=rlaif["steps"] if on else 0,
        rounds=rlaif["rounds"] if on else 0,
        latents=rlaif["latents"] if on else 0,
        evidence_blocks=rlaif["evidence_blocks"] if on else 0,
        max_staleness_steps=rlaif["max_staleness_steps"],
        **{key: scaling[key] for key in ("min_replicas", "initial_replicas", "max_replicas", "upscaling_factor")},
        **{key: scaling[key] for key in ("upscale_delay_s", "downscale_delay_s")},
    )


def fit(config: dict[str, Any], found: Measured, cores: float | None) -> Rates:
    """Rates with which the model repeats the phases that they are read from (not the reconstruction phase).

    Each is found by bisection on the model itself, because what a run shows is contended: twice around, as they
    depend on each other a little. Without RLAIF the reconstruction phase is all there is, and blocks are read from it.
    """
    loop, trainer = loop_of(config), config["trainer"]
    rates = Rates(
        block_s=found.phases.get("evidence", found.phases["reconstruction"]) * loop.producers / 100,
        step_s=found.step_s,
        save_s=found.save_s,
        rlaif_step_factor=2.0 if config["rlaif"].get("control") else 1.0,
        cores=cores,
        producer_threads=config["activations"]["threads"],
        trainer_threads=trainer["dp"] * trainer["tp"] * trainer["threads"],
        replica_threads=config["judge"]["threads"],
    )
    if not loop.rlaif_steps:
        solve = _solved(loop, "block_s", lambda outcome: outcome.phases["reconstruction"])
        return solve(rates, found.phases["reconstruction"])
    # Where the calibration reached into the evidence phase, the producers had only a share of the cores.
    both = loop.producers * rates.producer_threads + rates.replica_threads
    overlap = min(max(0.0, (found.calibrated_s or 0.0) - found.phases["reconstruction"]), found.phases["evidence"])
    lost = overlap * (1 - min(1.0, cores / both)) if cores else 0.0
    rates = replace(rates, latent_s=1.0, later_latent_s=1.0)
    for _ in range(2):
        idle = replace(rates, calibration_s=0.0)
        solve = _solved(loop, "block_s", lambda outcome: outcome.phases["evidence"])
        rates = replace(rates, block_s=solve(idle, found.phases["evidence"] - lost).block_s)
        if found.segments:
            rates = _solved(loop, "step_s", lambda outcome: outcome.segments[0][1])(rates, found.segments[0][1])
        rates = _solved(loop, "latent_s", lambda outcome: outcome.rounds[0])(rates, found.rounds[0])
        if len(found.rounds) > 1:
            rates = _solved(loop, "later_latent_s", lambda outcome: outcome.rounds[1])(rates, found.rounds[1])
        if found.calibrated_s is not None:
            rates = _solved(loop, "calibration_s", lambda outcome: outcome.calibrated_at or 0.0)(
                rates, found.calibrated_s
            )
    return rates


def _solved(loop: Loop, name: str, figure: Callable[[Outcome], float]) -> Callable[[Rates, float], Rates]:
    """Sets one rate so that a figure of the outcome, which grows with it, has a given value."""

    def solve(rates: Rates, wanted: float) -> Rates:
        low, high = 0.0, max(1e-3, getattr(rates, name))
        while figure(simulate(loop, replace(rates, **{name: high}))) < wanted and high < 1e6:
            high *= 2
        for _ in range(30):
            middle = (low + high) / 2
            above = figure(simulate(loop, replace(rates, **{name: middle}))) >= wanted
            low, high = (low, middle) if above else (middle, high)
        return replace(rates, **{name: (low + high) / 2})

    return solve


def compare(outcome: Outcome, found: Measured, fitted: bool) -> list[tuple[str, float, float, bool]]:
    """(figure, measured, predicted, whether a rate was read from it) of one run."""
    rows = [
        ("reconstruction, s", found.phases["reconstruction"], outcome.phases["reconstruction"], False),
        ("of that the trainer trained, share", found.train_share, outcome.share(TRAIN, "reconstruction"), False),
    ]
    if "evidence" in found.phases and found.rounds:
        rows.append(("evidence, s", found.phases["evidence"], outcome.phases["evidence"], fitted))
        for number, pair in enumerate(zip(found.rounds, outcome.rounds, strict=False)):
            rows.append((f"round {number + 1}, s", *pair, fitted and number < 2))
        for number, ((steps, seconds), (_, said)) in enumerate(zip(found.segments, outcome.segments, strict=False)):
            rows.append((f"{steps} steps after round {number + 1}, s", seconds, said, fitted and number == 0))
        rows.append(("RLAIF, s", found.phases["RLAIF"], outcome.phases["RLAIF"], False))
    rows.append(
        ("training and judging in all, s", found.total, outcome.seconds - outcome.phases.get(START, 0.0), False)
    )
    return rows


def _print(console: Console, title: str, rows: list[tuple[str, float, float, bool]]) -> None:
    table = Table(title=title)
    for heading in ("figure", "measured", "predicted", "error"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, real, said, is_fitted in rows:
        error = "(fitted)" if is_fitted else f"{said / real - 1:+.1%}"
        table.add_row(name, f"{real:,.2f}", f"{said:,.2f}", error)
    console.print(table)


def describe(outcome: Outcome, loop: Loop, rates: Rates) -> list[tuple[str, str]]:
    """An outcome in words."""
    pool = f"{outcome.replica_seconds:,.0f}, {outcome.replica_busy:.0%}, {outcome.most_replicas}"
    blame = ", ".join(f"{who} {share:.0%}" for who, share in sorted(outcome.blame.items(), key=lambda x: -x[1]))
    least = ", ".join(f"{who} {seconds:,.0f} s" for who, seconds in bounds(loop, rates).items())
    return [
        ("steps/s, in all", f"{outcome.steps_per_s:.3f} ({outcome.steps:,} steps in {outcome.seconds:,.0f} s)"),
        ("the trainer's time went to", blame),
        ("bottleneck", outcome.bottleneck),
        ("least that each would take alone", least),
        ("producers busy", f"{outcome.producer_busy:.0%}"),
        ("judge replicas: seconds, busy, most", pool),
    ]


def changed(loop: Loop, rates: Rates, assignments: list[str]) -> tuple[Loop, Rates]:
    """`--what`: fields of either with other values.

    Raises:
        UserError: no such field, or no number.
    """
    known = {field.name: "loop" for field in fields(Loop)} | {field.name: "rates" for field in fields(Rates)}
    for item in assignments:
        key, _, text = item.partition("=")
        if key not in known:
            raise UserError(f"--what {item}: {key!r} is unknown; known: {', '.join(known)}")
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(f"--what {item}: {text!r} is no number") from error
        if known[key] == "loop":
            loop = replace(loop, **{key: value if isinstance(getattr(loop, key), float) else int(value)})
        else:
            rates = replace(rates, **{key: value})
    return loop, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, help="run folder that rates are read from")
    parser.add_argument("--predict", type=Path, nargs="*", default=[], help="run folders to predict with these rates")
    parser.add_argument("--what", nargs="*", default=[], help="field=value: what if; fields of Loop and Rates")
    parser.add_argument("--cores", type=float, help="that all share; 0: everyone has devices of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action="store_true", help="70B subject LM, 1M latents, 64 GPUs")
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    args = parser.parse_args()
    console = Console(width=130)
    figures: dict[str, Any] = {}
    if args.paper:
        from simulate_paper import paper

        figures["paper"] = paper(console, args.seed)
    if args.fit is not None:
        config = yaml.safe_load((args.fit / "config.yaml").read_text(encoding="utf-8"))
        found = measured(args.fit)
        shared = args.cores if args.cores is not None else (0 if config["trainer"]["gpus"] else os.cpu_count() or 1)
        loop, rates = loop_of(config), fit(config, found, shared or None)
        console.print(f"rates of {args.fit}: {rates}", soft_wrap=True)
        own = compare(simulate(loop, rates, args.seed), found, fitted=True)
        _print(console, f"{args.fit}, predicted from rates of its other phases", own)
        figures["fit"] = {"rates": vars(rates), "rows": own}
        for other in args.predict:
            its = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8"))
            rows = compare(simulate(loop_of(its), rates, args.seed), measured(other), fitted=False)
            _print(console, f"{other}, predicted from the rates of {args.fit}", rows)
            figures[str(other)] = rows
        if args.what:
            loop, rates = changed(loop, rates, args.what)
            for label, value in describe(simulate(loop, rates, args.seed), loop, rates):
                console.print(f"{label}: {value}", soft_wrap=True)
    if not figures:
        parser.error("nothing to do: --fit RUN or --paper")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"simulate: {error}") from None
