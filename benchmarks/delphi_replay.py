"""Delphi's own pipeline on a machine without a GPU, with its calls counted. Runs in delphi's environment, not in ours.

    benchmarks/judge.py makes the inputs and starts this; by itself:
    PEERS/delphi/bin/python benchmarks/delphi_replay.py --subject DIR --sae DIR --hookpoint layers.9 --judge DIR
        --corpus DIR --tokens 200000 --latents 8 --home DIR --out peer.json

`python -m delphi` itself stops where it loads the model onto "cuda" (`--probe` runs it unchanged and notes its last
line). So its entry point `delphi.__main__.run` is called here with the options that its own parser read, and every
context, prompt, call, parse and score is delphi's code. What is put in its place is listed in `STAND_INS` and printed.
Counters are vLLM's own: the token ids and `num_cached_tokens` of each request's output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

STAND_INS = (
    "device_map 'cuda' -> 'cpu' in load_artifacts (hard-coded there)",
    "vllm.LLM with the judge's CPU settings: block_size, enforce_eager, dtype, KV memory (else the same arguments)",
    "apply_chat_template(..., return_dict=False): transformers 5 returns a dict by default, delphi expects token ids",
)
KINDS = ("explainer", "detection", "fuzz", "other")


class Tally:
    """What the engine did, by kind of call."""

    def __init__(self) -> None:
        self.calls: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.seconds: dict[str, float] = defaultdict(float)
        self.start_seconds = 0.0
        self.batch_sizes: list[int] = []
        self.kinds_of_batch: list[str] = []

    def count(self, outputs: list[Any], seconds: float) -> None:
        """seconds: of this batch; its kinds share them by the tokens that were computed for them."""
        self.batch_sizes.append(len(outputs))
        work: Counter[str] = Counter()
        for kind, output in zip(self.kinds_of_batch, outputs, strict=True):
            done = output.outputs[0]
            cached = output.num_cached_tokens or 0
            work[kind] += len(output.prompt_token_ids) - cached + len(done.token_ids)
            self.calls[kind].update(
                calls=1,
                prompt_tokens=len(output.prompt_token_ids),
                cached_tokens=cached,
                output_tokens=len(done.token_ids),
                cut_off=int(done.finish_reason == "length"),
            )
        print(f"batch of {len(outputs)}: {seconds:.2f} s, computed tokens {dict(work)}", flush=True)
        for kind, tokens in work.items():
            self.seconds[kind] += seconds * tokens / work.total()


def counting_client(tally: Tally, engine: dict[str, Any], limits: dict[str, int]) -> type:
    """delphi's `Offline` client; its engine is built with `engine` on top and counted in `tally`.

    limits: kind of call -> the most output tokens, where fewer than delphi's own limit are to be given.
    """
    from delphi.clients import offline
    from delphi.scorers.classifier.prompts.detection_prompt import prompt as detection_prompt
    from delphi.scorers.classifier.prompts.fuzz_prompt import prompt as fuzz_prompt
    from vllm import LLM

    systems = {
        detection_prompt("", "")[0]["content"]: "detection",
        fuzz_prompt("", "")[0]["content"]: "fuzz",
        explainer_system(): "explainer",
    }

    class CountedLLM(LLM):
        def __init__(self, **kwargs: Any) -> None:
            started = time.perf_counter()
            kwargs.pop("gpu_memory_utilization")  # a CPU engine is told its KV memory instead
            super().__init__(**{**kwargs, **engine})
            tally.start_seconds = time.perf_counter() - started

        def generate(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
            each = [sampling_params.clone() for _ in prompts]
            for params, kind in zip(each, tally.kinds_of_batch, strict=True):
                params.max_tokens = min(params.max_tokens, limits.get(kind, params.max_tokens))
            started = time.perf_counter()
            outputs = super().generate(prompts, sampling_params=each, **kwargs)
            tally.count(outputs, time.perf_counter() - started)
            return outputs

    class CountedOffline(offline.Offline):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            template = self.tokenizer.apply_chat_template
            self.tokenizer.apply_chat_template = partial(template, return_dict=False)

        async def process_func(self, batches: Any, kwargs: Any) -> Any:
            tally.kinds_of_batch = [systems.get(batch[0]["content"], "other") for batch in batches]
            return await super().process_func(batches, kwargs)

    offline.LLM = CountedLLM
    return CountedOffline


def explainer_system() -> str:
    from delphi.explainers.default.prompt_builder import build_prompt

    return str(build_prompt("", activations=True)[0]["content"])


def on_cpu(auto_model: Any) -> Any:
    """`AutoModel`, whatever device it is asked for."""

    class OnCPU:
        @staticmethod
        def from_pretrained(name: str, **kwargs: Any) -> Any:
            return auto_model.from_pretrained(name, **{**kwargs, "device_map": {"": "cpu"}})

    return OnCPU


def arguments(args: argparse.Namespace) -> list[str]:
    """The command line that delphi's parser gets: its defaults, but for the names of things and what is said here."""
    line = [str(args.subject), str(args.sae), "--hookpoints", args.hookpoint, "--explainer_model", str(args.judge)]
    line += ["--dataset_repo", str(args.corpus), "--dataset_split", "train", "--n_tokens", str(args.tokens)]
    line += ["--num_gpus", "1", "--name", "peer", "--scorers", *args.scorers]
    # It only logs, writes a file per call and draws; with it the peer would be slower.
    line += ["--verbose", "false"]
    if args.concurrency is not None:
        line += ["--pipeline_num_proc", str(args.concurrency)]
    return line


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """`python -m delphi` as it is: its exit code and last line."""
    command = [sys.executable, "-m", "delphi", *arguments(args), "--max_latents", "1"]
    folder = args.home / "probe"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"command": "python -m delphi ...", "rc": done.returncode, "last_line": lines[-1] if lines else ""}


def eligible(folder: Path, window: int, fewest: int) -> list[int]:
    """The latents that delphi will explain: active in `fewest` windows of the cached tokens or more."""
    import numpy as np
    from safetensors.numpy import load_file

    found: list[int] = []
    for file in folder.glob("*_*.safetensors"):
        data = load_file(file)
        first = int(file.stem.split("_")[0])
        place_N3 = data["locations"].astype(np.int64)
        window_N = (place_N3[:, 0] * data["tokens"].shape[1] + place_N3[:, 1]) // window
        windows = np.unique(np.stack([place_N3[:, 2] + first, window_N], axis=1), axis=0)
        latents, counts = np.unique(windows[:, 0], return_counts=True)
        found += latents[counts >= fewest].tolist()
    return sorted(found)


def verdicts(file: Path) -> dict[str, int]:
    """Counts of one latent's verdicts: by class, how many were right, wrong and not to be parsed."""
    counts = Counter[str]()
    for verdict in json.loads(file.read_bytes()):
        side = "positive" if verdict["activating"] else "negative"
        prediction = verdict["prediction"]
        right = None if prediction is None else prediction == verdict["activating"]
        counts[f"{side}_{ {None: 'failed', True: 'right', False: 'wrong'}[right] }"] += 1
    return dict(counts)


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started and that still run: the engine and its worker."""
    import psutil

    here = psutil.Process()
    return float(sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("subject", "sae", "judge", "corpus", "home", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--hookpoint", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--latents", type=int, required=True)
    parser.add_argument("--scorers", nargs="+", default=["fuzz", "detection"])
    parser.add_argument("--concurrency", type=int, help="pipeline_num_proc; delphi's own default is half the cores")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: arguments of vllm.LLM")
    parser.add_argument("--limits", type=json.loads, default={}, help="JSON: kind of call -> the most output tokens")
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()

    unchanged = probe(args) if args.probe else None
    result = replay(args)
    args.out.write_text(json.dumps({**result, "unchanged_cli": unchanged}, indent=1))


def replay(args: argparse.Namespace) -> dict[str, Any]:
    import delphi
    import delphi.__main__ as cli
    import delphi.pipeline
    from delphi.config import RunConfig
    from simple_parsing import ArgumentParser
    from transformers import AutoTokenizer

    args.home.mkdir(parents=True, exist_ok=True)
    os.chdir(args.home)
    parser = ArgumentParser()
    parser.add_arguments(RunConfig, dest="run_cfg")
    cfg: RunConfig = parser.parse_args(arguments(args)).run_cfg
    base = args.home / "results" / cfg.name
    latents_path = base / "latents"

    tally = Tally()
    cli.AutoModel = on_cpu(cli.AutoModel)
    cli.Offline = counting_client(tally, args.engine, args.limits)

    evidence_seconds = None
    if not (latents_path / args.hookpoint / "config.json").exists():
        shutil.rmtree(latents_path, ignore_errors=True)
        started = time.perf_counter()
        _, encoders, model, transcode = cli.load_artifacts(cfg)
        cli.populate_cache(cfg, model, encoders, latents_path, AutoTokenizer.from_pretrained(cfg.model), transcode)
        evidence_seconds = time.perf_counter() - started
        del encoders, model
    fewest = cfg.constructor_cfg.min_examples
    able = eligible(latents_path / args.hookpoint, cfg.constructor_cfg.example_ctx_len, fewest)
    if len(able) < args.latents:
        sys.exit(f"only {len(able)} latents are active in {fewest} windows or more; give more --tokens")
    chosen = able[: args.latents]
    cfg.max_latents = chosen[-1] + 1

    for stale in ("scores", "explanations"):
        shutil.rmtree(base / stale, ignore_errors=True)
    spent: dict[str, float] = {}

    async def timed_run(pipeline: Any, *positional: Any) -> Any:
        started, cpu = time.perf_counter(), cpu_seconds()
        done = await run_pipeline(pipeline, *positional)
        spent.update(seconds=time.perf_counter() - started, cpu_seconds=cpu_seconds() - cpu)
        return done

    run_pipeline, delphi.pipeline.Pipeline.run = delphi.pipeline.Pipeline.run, timed_run
    asyncio.run(cli.run(cfg))

    explanations = {file.stem: json.loads(file.read_bytes()) for file in (base / "explanations").glob("*.txt")}
    scores = {
        scorer: {file.stem: verdicts(file) for file in sorted((base / "scores" / scorer).glob("*.txt"))}
        for scorer in args.scorers
    }
    total = sum(tally.calls.values(), Counter())
    return {
        "peer": f"eai-delphi {delphi.__version__}",
        "stand_ins": STAND_INS,
        "settings": {
            "examples_to_explain": cfg.sampler_cfg.n_examples_train,
            "positives": cfg.sampler_cfg.n_examples_test,
            "negatives": cfg.constructor_cfg.n_non_activating,
            "examples_per_prompt": cfg.num_examples_per_scorer_prompt,
            "window_tokens": cfg.constructor_cfg.example_ctx_len,
            "max_model_len": cfg.explainer_model_max_len,
            "pipeline_num_proc": cfg.pipeline_num_proc,
            "scorers": args.scorers,
            "engine": args.engine,
            "limits": args.limits,
        },
        "latents": chosen,
        "features": len(explanations),
        **spent,
        "engine_seconds": sum(tally.seconds.values()),
        "seconds_by_kind": dict(tally.seconds),
        "engine_start_seconds": tally.start_seconds,
        "evidence_seconds": evidence_seconds,
        "calls_per_batch": sum(tally.batch_sizes) / max(1, len(tally.batch_sizes)),
        **{name: total[name] for name in ("calls", "prompt_tokens", "cached_tokens", "output_tokens", "cut_off")},
        "by_kind": {kind: dict(counts) for kind, counts in tally.calls.items() if counts},
        "explanations": explanations,
        "verdicts": scores,
    }


if __name__ == "__main__":
    main()
