"""RLAIF on a real language model against its controls: SmolLM2-135M judged by itself, scored by what never taught it.

    .venv/bin/python benchmarks/rlaif_real.py [--smoke] [--minutes 120] [--arms rlaif strong shuffled random_negatives]
        [--out runs/rlaif-real] [--docs docs] [--only-table]

One BatchTopK (and, for comparison, one Matryoshka) is trained by reconstruction. From its exported file
(`sae.init_from`, `trainer.steps: 0`) the arms fine-tune it on the same batches, with rewards for the same latents:

    rlaif               the default estimator and gamma
    strong              ten times that gamma
    own_cuts            as rlaif, a yes where the explanation's own scores say (`rlaif.verdict_cut`)
    shuffled            as rlaif, the verdicts of each kind of text dealt anew over all latents
    own_shuffled        as own_cuts, dealt anew in the same way
    random_negatives    as rlaif, explained and taught against random texts only
    continued           the first arm's copy without credit; `matryoshka` is trained on beside it

All are then put at the same L0: each gets the threshold that gives k active latents a token on the same texts. The
judged latents of every SAE are explained anew by the same explainers and scored by `sae-ray judge` on held-out texts:
by MiniLM's embeddings (on a few texts, on all of them, and by what labels in the explanation's place would tell it),
simulation, sensitivity, and the judge that taught. Differences are paired over latents, with bootstrap intervals;
Matryoshka's latents are others, chosen by the same rule, and are not paired. On how many of continued training's tokens
the taught latents are still active says whether a gain is a narrower gate's. The target is detection by MiniLM up by
.05 over continued training with an interval above 0, at equal L0 and FVU (2%).

It is a series of stages that leave their results in OUT. Stopped (Ctrl-C, or --minutes: no stage begins later), the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import rlaif_real_report as report
import torch
import yaml
from ray._private import ray_constants
from rich.console import Console
from rlaif_real_configs import (
    FIRST,
    FULL,
    MATRYOSHKA,
    SMOKE,
    Config,
    Place,
    Sizes,
    arm_config,
    arms,
    base_config,
    scoring_config,
    store_config,
)
from rlaif_real_match import active_shares, at_same_l0, latents_like_rlaif
from rlaif_real_texts import ceilings, detections, embedded

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.config import JudgeConfig, RayConfig, RunConfig
from sae_ray.config_file import load_config, parse_config
from sae_ray.corpus.reader import SPLITS, Split
from sae_ray.evaluation.core import PlacedSAE, ce_recovered, core_metrics
from sae_ray.evaluation.evaluator import first_sequences
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.embedder import MiniLM
from sae_ray.judging import results
from sae_ray.reward.applied import AppliedRounds
from sae_ray.reward.bank import VerdictBank
from sae_ray.sae.formats import export_sae, import_sae
from sae_ray.sae.formats.of_run import sae_of_run
from sae_ray.session import ray_session
from sae_ray.storage import LocalStorage

SCORERS = ["embedding", "sensitivity", "detection"]
L0_BLOCKS = 8
JUDGE_START_S = 900
INTERRUPTED = 130


# ---------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """done: the file that its work writes last. of: the SAEs that it must be about, where it is JSON with a key each:
    an arm that is added later begins such a stage anew."""

    name: str
    done: Path
    work: Callable[[], None]
    judged: bool  # the judge must serve
    of: frozenset[str] = frozenset()

    @property
    def is_done(self) -> bool:
        return self.done.exists() and (not self.of or self.of <= _read(self.done).keys())


class Bench:
    """The stages of one folder. Each is skipped where its result is there."""

    def __init__(self, out: Path, sizes: Sizes, chosen: Sequence[str], say: Callable[[str], None]):
        self.out, self.sizes, self.say = out.resolve(), sizes, say
        self.out.mkdir(parents=True, exist_ok=True)
        _same_sizes(self.out / "sizes.json", sizes)
        self.chosen = [FIRST, *(name for name in chosen if name != FIRST)]  # the others' controls are beside it
        # SAE -> (run, copy in its checkpoint)
        self.saes = {"continued": (FIRST, "control"), **{name: (name, "main") for name in self.chosen}}
        self.saes[MATRYOSHKA] = (FIRST, MATRYOSHKA)
        self.runs = self.out / "runs"
        self.place = Place(str(self.runs), store=str(self.out / "store"))
        # Kind of judging -> its scorers, and on how many latents. One is enough where all are simulated.
        whole = sizes.simulated >= sizes.latents
        self.judgings = {"scores": ([*SCORERS, "simulation"] if whole else SCORERS, sizes.latents)}
        self.judgings |= {} if whole else {"simulation": (["simulation"], sizes.simulated)}

    def run(self, deadline: float) -> None:
        """All stages that are left and can begin by then, in a Ray of their own with one judge."""
        todo = self.left()
        if not todo:
            return
        with ray_session(RayConfig(address="local", local_cpus=10, object_store_mb=1500)):
            judge = JudgeApp(JudgeConfig(start_timeout_s=JUDGE_START_S), "rlaif-real", keep_serve=True)
            self.place = replace(self.place, address=ray.get_runtime_context().gcs_address, app=judge.name)
            try:
                judge.start()  # it loads while the base trains
                for stage in todo:
                    if time.monotonic() > deadline:
                        break
                    if stage.judged and not judge.ready(JUDGE_START_S):
                        raise SystemExit(f"the judge did not start: {judge.status()}")
                    began = time.monotonic()
                    stage.work()
                    self._note_time(stage.name, time.monotonic() - began)
            finally:
                judge.shutdown()
        if left := [stage.name for stage in self.left()]:
            self.say(f"left: {', '.join(left)}; the same command goes on")

    def left(self) -> list[Stage]:
        """The stages that are not done, in order."""
        saes = frozenset(self.saes)
        stages = [
            Stage("base", self._exported("base"), lambda: self._train(base_config), False),
            Stage("store", self.out / "store.done", self._fill_store, False),
            *(Stage(arm, self._exported(arm), self._trainer_of(arm), True) for arm in self.chosen),
            Stage("same L0", self.out / "latents.json", self._match, False, saes),
            Stage("core metrics", self.out / "core.json", self._core, False, saes),
        ]
        for kind in self.judgings:  # all SAEs by one before the next: what is cut short is a whole comparison
            stages += [
                Stage(f"{kind} of {name}", self._folder(kind, name) / "scores.parquet", self._scorer(kind, name), True)
                for name in self.saes
            ]
            if kind == "scores":
                stages.append(Stage("all texts", self.out / "all_texts.json", self._all_texts, False, saes))
        return [stage for stage in stages if not stage.is_done]

    def _trainer_of(self, arm: str) -> Callable[[], None]:
        return lambda: self._train(lambda sizes, place: arm_config(arm, sizes, place))

    def _scorer(self, kind: str, name: str) -> Callable[[], None]:
        return lambda: self._score(kind, name)

    def _train(self, make: Callable[[Sizes, Place], Config]) -> None:
        place = self.place if make is not base_config else replace(self.place, store=None)
        self._command("train", self._write(make(self.sizes, place)))

    def _fill_store(self) -> None:
        path = self._write(store_config(self.sizes, self.place))
        splits = [word for split in SPLITS for word in ("--split", split)]
        self._command("store", path, "--to", self.out / "store", *splits)
        (self.out / "store.done").touch()

    def _match(self) -> None:
        """All SAEs at the same L0, as files; and which of their latents are scored."""
        config = self._first()
        blocks = self._blocks(config, "evidence", self.sizes.evidence_blocks)
        bank = VerdictBank(LocalStorage(config.run_dir)).read()
        judged = sorted({row["latent"] for row in bank if row["round"] == 0 and row["purpose"] == "score"})
        latents = {}
        for name, (run, copy) in self.saes.items():
            _, found = sae_of_run(load_config(self.runs / run / "config.yaml"), copy)
            sae = at_same_l0(found.sae, blocks[:L0_BLOCKS], config.hook.name, self.sizes.k)
            export_sae(sae, self.out / "saes" / name, "saelens", found.provenance)
            latents[name] = judged if name != MATRYOSHKA else latents_like_rlaif(sae, blocks, config)
        (self.out / "latents.json").write_text(json.dumps(latents))

    def _core(self) -> None:
        """FVU, L0, dead share, CE recovered and how often the scored latents are active, on the same held-out texts."""
        config = self._first()
        blocks = self._blocks(config, "heldout", self.sizes.core_blocks)
        placed = {name: PlacedSAE(import_sae(self.out / "saes" / name), config.hook) for name in self.saes}
        recovered = ce_recovered(config.model, first_sequences(blocks, self.sizes.ce_sequences), placed)
        core = {
            name: asdict(core_metrics(blocks, each))
            | {"ce_recovered": recovered[name].recovered_vs_mean}
            | {"active_share": active_shares(each.sae, self.latents()[name], blocks, config.hook.name)}
            for name, each in placed.items()
        }
        (self.out / "core.json").write_text(json.dumps(core, indent=1))

    def _score(self, kind: str, name: str) -> None:
        scorers, most = self.judgings[kind]
        path = self._write(scoring_config(kind, self.sizes, self.place, scorers))
        latents = ",".join(map(str, self.latents()[name][:most]))
        folder = self._folder(kind, name).name
        self._command("judge", self.out / "saes" / name, "--config", path, "--latents", latents, "--name", folder)

    def _all_texts(self) -> None:
        config = self._first()
        blocks, model = self._blocks(config, "heldout", self.sizes.heldout_blocks), MiniLM()
        texts = embedded(blocks, config, model)
        taught = self._blocks(config, "evidence", self.sizes.evidence_blocks)
        labelled = taught, embedded(taught, config, model, every=True)
        found: dict[str, dict[str, dict[int, float | None]]] = {}
        for name in self.saes:
            rows = results.read(LocalStorage(self._folder("scores", name)), "explanations")
            chosen = {
                row["latent"]: row["explanation"] for row in rows if row["kind"] == results.LATENT and row["chosen"]
            }
            sae = import_sae(self.out / "saes" / name)
            found[name] = {
                "all_texts": detections(sae, chosen, blocks, texts, config, model),
                "ceiling": ceilings(sae, self.latents()[name], labelled, (blocks, texts), config),
            }
        (self.out / "all_texts.json").write_text(json.dumps(found))

    # -- what is there ----------------------------------------------------------------------------------

    def scores(self) -> dict[str, dict[str, dict[int, float | None]]]:
        """measure -> SAE -> latent -> score, of what has been scored so far; None where a latent could not be judged,
        because it fires too rarely, say."""
        found: dict[str, dict[str, dict[int, float | None]]] = {measure: {} for measure in report.MEASURES}
        for name in self.saes:
            for kind, (scorers, most) in self.judgings.items():
                folder = self._folder(kind, name)
                if not (folder / "scores.parquet").exists():
                    continue
                rows = results.latest(results.read(LocalStorage(folder), "scores"))
                for scorer in scorers:
                    found[scorer][name] = {
                        latent: rows.get((results.LATENT, latent, scorer), {}).get("value")
                        for latent in self.latents()[name][:most]
                    }
        for name, by_measure in _read(self.out / "all_texts.json").items():
            for measure, by_latent in by_measure.items():
                found[measure][name] = {latent: by_latent.get(str(latent)) for latent in self.latents()[name]}
        return {measure: by_sae for measure, by_sae in found.items() if by_sae}

    def core(self) -> dict[str, dict[str, Any]]:
        return _read(self.out / "core.json")

    def latents(self) -> dict[str, list[int]]:
        """SAE -> which of its latents are scored."""
        return _read(self.out / "latents.json")

    def taught(self) -> list[int]:
        """Latents that the first arm's rewards moved. Its own judge trusted them; no held-out score had a say."""
        applied = AppliedRounds(LocalStorage(self.runs / FIRST))
        batches = [applied.read(number).batch for number in applied.numbers()]
        return sorted({int(latent) for batch in batches for latent in batch.latents[batch.credit_weight > 0]})

    def rounds(self) -> dict[str, list[dict[str, Any]]]:
        """What each arm's rounds found, arm by arm."""
        stored = {arm: AppliedRounds(LocalStorage(self.runs / arm)) for arm in self.chosen}
        return {arm: [each.read(n).summary for n in each.numbers()] for arm, each in stored.items()}

    def seconds(self) -> dict[str, float]:
        """What each finished stage took."""
        return _read(self.out / "seconds.json")

    # -- small parts ------------------------------------------------------------------------------------

    def _exported(self, run: str) -> Path:
        return self.runs / run / "saelens" / "cfg.json"

    def _folder(self, kind: str, name: str) -> Path:
        return self.runs / f"{kind}-{name}"

    def _first(self) -> RunConfig:
        return parse_config(arm_config(FIRST, self.sizes, self.place), "the first arm")

    def _blocks(self, config: RunConfig, split: Split, n: int) -> list[Block]:
        torch.set_num_threads(os.cpu_count() or 1)
        producer = ActivationProducer(config.model_dump_json())
        producer.ready()
        return [Block.from_numpy_dict(producer.produce(split, number)[1]) for number in range(n)]

    def _write(self, config: Config) -> Path:
        path = self.out / f"{config['name']}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def _command(self, *words: object) -> None:
        """One `sae-ray` command, shown as it goes. Ctrl-C reaches it too, and it is waited for: it commits first."""
        # An own Ray listens on the loopback only, which a driver that joins it would translate into another address.
        env = os.environ | {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
        process = subprocess.Popen([sys.executable, "-m", "sae_ray.cli", *map(str, words)], env=env)
        interrupted = False
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
        if interrupted or code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise SystemExit(f"sae-ray {words[0]} ended with code {code}")

    def _note_time(self, name: str, seconds: float) -> None:
        self.say(f"{name}: {seconds:.0f} s")
        (self.out / "seconds.json").write_text(json.dumps(self.seconds() | {name: round(seconds, 1)}, indent=1))


def _same_sizes(file: Path, sizes: Sizes) -> None:
    """A folder is of one size: what another has left would be taken for this one's."""
    wanted = json.loads(json.dumps({name: value for name, value in asdict(sizes).items() if name != "arms"}))
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=1))
    for name, value in _read(file).items():
        if wanted.get(name) != value:
            raise SystemExit(f"{file}: {name} was {value} and is {wanted.get(name)} now; use another --out")


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}


def conclude(bench: Bench, docs: Path | None, console: Console) -> None:
    """Prints the table and the targets of what is there, and writes them."""
    scores, core = bench.scores(), bench.core()
    found = report.differences(scores, [MATRYOSHKA])
    head, rows = report.grid(scores, core, found)
    controls = ("shuffled", "own_shuffled", "random_negatives")
    targets = report.targets(found, core, [name for name in bench.chosen if name not in controls])
    console.print(report.rich_table("held-out scores (difference to continued training, 95% interval)", head, rows))
    taught = bench.taught()
    among_taught, among_others = (
        report.differences(report.only(scores, latents, [MATRYOSHKA]))
        for latents in (taught, sorted(set(bench.latents().get(FIRST, [])) - set(taught)))
    )
    lines = report.target_lines(targets)
    lines += [report.told(d) for d in found if d.other != report.REFERENCE]
    lines.append(f"rewards taught {len(taught)} latents, as the training judge trusted their explanations; among them:")
    lines += [report.told(d) for d in among_taught]
    lines += report.narrowed(core, taught, [MATRYOSHKA])
    lines.append("among the others, which no reward moved (what explaining anew does by itself):")
    lines += [report.told(d) for d in among_others]
    for line in lines:
        console.print(line, soft_wrap=True)
    content = {
        "sizes": asdict(bench.sizes),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seconds": bench.seconds(),
        "core": core,
        "scores": scores,
        "differences": [asdict(each) for each in found],
        "taught": taught,
        "among_taught": [asdict(each) for each in among_taught],
        "among_others": [asdict(each) for each in among_others],
        "rounds": bench.rounds(),
        "targets": targets,
    }
    (bench.out / "results.json").write_text(json.dumps(content, indent=1))
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        text = report.markdown(head, rows) + "\n" + "".join(f"- {line}\n" for line in lines)
        (docs / "rlaif_real.md").write_text(text + "\n![differences](rlaif_real.svg)\n")
        (docs / "rlaif_real.svg").write_text(report.svg(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, and nothing else")
    parser.add_argument("--minutes", type=float, default=120, help="no stage begins later than this")
    parser.add_argument("--arms", nargs="+", choices=sorted(arms(FULL)), help="[default: all; --smoke: two]")
    parser.add_argument("--out", type=Path, help="folder of all stages [default: runs/rlaif-real]")
    parser.add_argument("--docs", type=Path, help="also write the table and the plot into this folder")
    parser.add_argument("--only-table", action="store_true", help="of what is there")
    args = parser.parse_args()
    sizes, console = SMOKE if args.smoke else FULL, Console()
    out = args.out or Path("runs/rlaif-smoke" if args.smoke else "runs/rlaif-real")
    bench = Bench(out, sizes, args.arms or sizes.arms, lambda line: console.print(line, style="bold", soft_wrap=True))
    try:
        if not args.only_table:
            bench.run(time.monotonic() + 60 * args.minutes)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
    conclude(bench, args.docs, console)


if __name__ == "__main__":
    main()
