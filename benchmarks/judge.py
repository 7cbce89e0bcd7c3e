"""`sae-ray judge` against eai-delphi: the same judge model in vLLM, the same SAE, latents and documents, one machine.

    .venv/bin/python benchmarks/peer_envs.py delphi
    .venv/bin/python benchmarks/judge.py --sae runs/quickstart/saelens --latents 64 --ours OURS --out peer.json

OURS is a JSON file, or a command that writes one. A command is run after delphi, which decides what latents can be
judged (active in 200 windows or more), with these names filled in: {sae} a SAELens folder, {corpus} a JSONL file,
{latents} ids with commas between, {model} the judge's folder, {out} the file to write. The file holds, for all latents
together:

    {"features": 64, "seconds": 60.0, "prompt_tokens": 1, "cached_tokens": 1, "output_tokens": 1, "stderr": 0.05}

`seconds` are of explaining and scoring, without starting the engine and without the pass over the corpus, for both;
`stderr` is the median over features of one score's standard error. Optional: "calls"; "cpu_seconds" of all the
processes that explain and score, which still mean something on a machine that others use too; and "verdicts", per
feature how many of either class were right, wrong or lost (positive_right, negative_failed...).

Delphi runs its own pipeline with its defaults (delphi_replay.py says what stands in for what). At an equal standard
error s its cost is: explaining once, and scoring (own error / s)^2 times, since a score's variance goes with 1/n. The
error is that of the balanced accuracy (which is the AUROC of a yes/no answer) over the verdicts that could be parsed,
with Jeffreys' half added to each count, so that 5 of 5 is not an error of 0. The row "all parsed" is kinder to delphi:
the error it would have had at the same accuracy with no answer lost. The row "coin flips" counts only how many verdicts
there were: a judge that always says yes has a balanced accuracy of .5 and an error near 0, and would win any comparison
by its own error. Given our "verdicts", our error is of the same kind in each row; without, `stderr` stands for all.

SmolLM2 was seen to run on to delphi's limit of 500 tokens an answer; `--answer-tokens 24` cuts its verdicts off after
what a list of five needs, as a judge that stops would. That is kinder in time; it may lose lists that come late.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from judge_costs import Cost, balanced, costs, median, said_yes
from peer_envs import default_dir, python_of
from rich.console import Console
from rich.table import Table

from sae_ray.embedded import SMOLLM2, cache_dir, resolve_model
from sae_ray.errors import UserError

TARGETS = {"features per minute": ">= 5x", "uncached tokens": "<= 1/3"}
COUNTED = ("features", "seconds", "prompt_tokens", "cached_tokens", "output_tokens", "stderr")


class Inputs(NamedTuple):
    """What both contenders read: folders, and `documents`, the JSONL file in `corpus`."""

    saelens: Path
    sparsify: Path
    hookpoint: str
    subject: Path
    corpus: Path
    documents: Path
    home: Path


def prepare(sae_folder: Path, judge: str, tokens: int) -> Inputs:
    """Writes what both read, once per SAE and corpus size, into the cache.

    Raises:
        UserError: the SAE is not of a residual stream after a layer of a known model, or is no TopK or BatchTopK.
    """
    from sae_ray.sae.formats import detect, export_sae, read_sae

    found = read_sae(sae_folder)
    where = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", found.provenance.hook)
    if where is None:
        raise UserError(f"{sae_folder}: is of {found.provenance.hook or 'no known hook'}; a resid_post is needed")
    if found.sae.architecture not in ("topk", "batchtopk"):
        raise UserError(
            f"{sae_folder}: a {found.sae.architecture}; delphi reads TopK SAEs, so topk or batchtopk is needed"
        )
    weights = next(sae_folder.glob("*.safetensors")) if detect(sae_folder) else sae_folder
    key = hashlib.sha256(f"{weights.resolve()} {weights.stat().st_mtime_ns} {judge} {tokens}".encode()).hexdigest()[:12]
    home = cache_dir() / "judge_bench" / key
    layer = int(where[1])
    inputs = Inputs(
        saelens=home / "saelens",
        sparsify=home / "sparsify",
        hookpoint=f"layers.{layer}",
        subject=home / "subject",
        corpus=home / "corpus",
        documents=home / "corpus" / "documents.jsonl",
        home=home,
    )
    if (home / ".ready").exists():
        return inputs
    sae = as_topk(found.sae)
    export_sae(sae, inputs.saelens, "saelens", found.provenance)
    export_sae(sae, inputs.sparsify / inputs.hookpoint, "sparsify", found.provenance)
    write_subject(resolve_model(found.provenance.model, "SAE's model"), layer, inputs.subject)
    write_documents(inputs.documents, tokens)
    (home / ".ready").touch()
    return inputs


def as_topk(sae: Any) -> Any:
    """The same weights as a TopK, which delphi can read; a BatchTopK's k is its mean L0."""
    import dataclasses

    import torch

    return dataclasses.replace(sae, architecture="topk", threshold=torch.zeros(()))


def write_subject(model: str, layer: int, folder: Path) -> None:
    """The subject model up to the hook: delphi runs every layer it is given, and nobody reads those above."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = layer + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: layer + 1]
    AutoModelForCausalLM.from_pretrained(model, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def write_documents(file: Path, tokens: int) -> None:
    """Documents of the installed packages, in our reader's order, until there are well over `tokens` tokens."""
    from sae_ray.config import CorpusConfig
    from sae_ray.corpus.documents import open_corpus

    file.parent.mkdir(parents=True, exist_ok=True)
    characters = 0
    with file.open("w") as lines:
        for document in open_corpus(CorpusConfig(kind="installed-docs")).documents(0, 0):
            lines.write(json.dumps({"text": document}) + "\n")
            characters += len(document)
            if characters > 6 * tokens:  # SmolLM2 has about 4 characters to a token here
                return


def run_peer(python: Path, inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """delphi's pipeline in its own environment. Returns what delphi_replay.py wrote."""
    from sae_ray.judge.server import cpu_dtype

    engine = {"block_size": 32, "enforce_eager": True, "dtype": cpu_dtype()}
    out = inputs.home / "peer.json"
    out.unlink(missing_ok=True)
    command: list[Any] = [python, Path(__file__).with_name("delphi_replay.py"), "--hookpoint", inputs.hookpoint]
    command += ["--subject", inputs.subject, "--sae", inputs.sparsify, "--judge", resolve_model(args.judge, "--judge")]
    command += ["--corpus", inputs.corpus, "--tokens", args.tokens, "--latents", args.latents]
    command += ["--home", inputs.home / "delphi", "--out", out, "--engine", json.dumps(engine)]
    command += ["--scorers", *args.scorers]
    limits = {"explainer": args.explainer_tokens, "fuzz": args.answer_tokens, "detection": args.answer_tokens}
    command += ["--limits", json.dumps({kind: limit for kind, limit in limits.items() if limit is not None})]
    if args.concurrency is not None:
        command += ["--concurrency", args.concurrency]
    if not args.no_probe:
        command.append("--probe")
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(inputs.home / "datasets"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log = inputs.home / "peer.log"
    print(f"delphi: {args.latents} latents, log in {log}", flush=True)
    with log.open("w") as lines:
        done = subprocess.run(
            [str(each) for each in command], env=os.environ | settings, stdout=lines, stderr=subprocess.STDOUT
        )
    if done.returncode or not out.exists():
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise UserError(f"delphi_replay.py ended with {done.returncode}; the last of {log}:\n{tail}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def run_ours(ours: str, inputs: Inputs, latents: list[int], judge: str) -> dict[str, Any]:
    """Our counts, from the file that `ours` is or that the command `ours` writes.

    Raises:
        UserError: no such file, no count in it, or the command failed.
    """
    file = Path(ours)
    if not file.is_file():
        if "{out}" not in ours:
            raise UserError(f"--ours {ours}: is no file, and no command with {{out}} in it")
        file = inputs.home / "ours.json"
        file.unlink(missing_ok=True)
        names = {
            "sae": inputs.saelens,
            "corpus": inputs.documents,
            "latents": ",".join(map(str, latents)),
            "model": resolve_model(judge, "--judge"),
            "out": file,
        }
        command = shlex.split(re.sub(r"\{(\w+)\}", lambda name: shlex.quote(str(names.get(name[1], name[0]))), ours))
        if subprocess.run(command).returncode or not file.is_file():
            raise UserError(f"--ours: the command failed, or did not write {file}")
    found: dict[str, Any] = json.loads(file.read_text())
    if missing := [name for name in COUNTED if name not in found]:
        raise UserError(f"{file}: lacks {', '.join(missing)}")
    return found


def table(rows: list[Cost]) -> Table:
    shown = Table(
        "contender", *("stderr", "calls", "prompt tokens", "uncached", "output", "s/feature", "CPU s", "features/min")
    )
    for row in rows:
        numbers = [f"{value:,.0f}" for value in (row.calls, row.prompt_tokens, row.uncached_tokens, row.output_tokens)]
        times = [f"{value:.2f}" for value in (row.seconds, row.cpu_seconds, row.per_minute)]
        shown.add_row(row.name, f"{row.stderr:.4f}", *numbers, *times)
    return shown


def ratios(rows: list[Cost]) -> Table:
    """Ours over each of the peer's rows, beside the targets."""
    ours, *others = rows
    shown = Table("ours against", *(f"{name} ({target})" for name, target in TARGETS.items()))
    for row in others:
        speed, tokens = ours.per_minute / row.per_minute, ours.uncached_tokens / row.uncached_tokens
        shown.add_row(row.name, f"{speed:.2f}x", f"{tokens:.3f}")
    return shown


def quality(peer: dict[str, Any]) -> list[str]:
    """What the peer's answers were worth, one line a scorer."""
    lines = []
    for scorer, found in peer["verdicts"].items():
        values = [balanced(counts)[0] for counts in found.values()]
        asked = sum(sum(counts.values()) for counts in found.values())
        lost = sum(count for counts in found.values() for name, count in counts.items() if name.endswith("failed"))
        scored = sum(not math.isnan(value) for value in values)
        lines.append(
            f"delphi {scorer}: {lost} of {asked} verdicts could not be parsed; {scored} of {len(values)} latents have "
            f"a score, median balanced accuracy {median(values):.3f}"
        )
        yes = median([said_yes(counts) for counts in found.values()])
        if not 0.05 < yes < 0.95:
            lines.append(f"delphi {scorer}: {yes:.0%} of its answers are yes; a constant's small error says nothing")
    cut = peer["cut_off"]
    lines.append(f"delphi: {cut} of {peer['calls']} answers ran into their limit (delphi's own is 500 tokens)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sae", type=Path, required=True, help="folder of a TopK or BatchTopK SAE, of any format we read"
    )
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the corpus, for the pass that finds examples")
    parser.add_argument("--judge", default=SMOLLM2, help="model that explains and scores: a folder, a Hugging Face id")
    parser.add_argument("--ours", help="our counts: a JSON file, or a command that writes one (see above)")
    parser.add_argument("--peer", type=Path, help="delphi's counts from an earlier --out, instead of running it")
    parser.add_argument("--peer-env", type=Path, default=default_dir(), help="folder that peer_envs.py made")
    parser.add_argument("--scorers", nargs="+", default=["fuzz", "detection"], help="delphi's; the default is its own")
    parser.add_argument("--scorer", default="detection", help="whose standard error is compared")
    parser.add_argument("--stderr", type=float, help="without --ours: also show delphi at this standard error")
    parser.add_argument("--concurrency", type=int, help="delphi's pipeline_num_proc; its default is half the cores")
    parser.add_argument("--answer-tokens", type=int, help="cut delphi's verdicts off here instead of at its 500")
    parser.add_argument("--explainer-tokens", type=int, help="cut delphi's explanations off here instead of at its 500")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of delphi's engine; give ours as many")
    parser.add_argument("--no-probe", action="store_true", help="do not first try `python -m delphi` unchanged")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.scorer not in args.scorers:
        sys.exit(f"--scorer {args.scorer}: is not one of --scorers {' '.join(args.scorers)}")
    if args.ours and args.stderr:
        sys.exit("--stderr: is for a run without --ours, whose own standard error is what delphi is scaled to")
    try:
        compare(args)
    except UserError as error:
        sys.exit(str(error))


def compare(args: argparse.Namespace) -> None:
    inputs = prepare(args.sae, args.judge, args.tokens)
    if args.peer:
        peer = json.loads(args.peer.read_text())["peer"]
    else:
        peer = run_peer(python_of("delphi", args.peer_env), inputs, args)
    ours = run_ours(args.ours, inputs, peer["latents"], args.judge) if args.ours else None
    rows = costs(peer, ours, args.scorer, args.stderr)
    console = Console(width=140)
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    console.print(f"{peer['peer']}, {peer['features']} latents, {peer['settings']}")
    if (unchanged := peer["unchanged_cli"]) is not None:
        console.print(f"`python -m delphi` unchanged: exit code {unchanged['rc']}, {unchanged['last_line']}")
    console.print("In its place delphi's own `run`, with: " + "; ".join(peer["stand_ins"]), markup=False)
    console.print(table(rows))
    if ours:
        console.print(ratios(rows))
    for line in quality(peer):
        console.print(line)
    if args.out:
        written = {"peer": peer, "ours": ours, "costs": [row._asdict() for row in rows]}
        args.out.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
