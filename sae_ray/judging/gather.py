"""The evidence pass: producers' blocks through collectors, one shard of the latents each, and onto disk.

    loop     waits for                               unblocked by                   deadline
    gather   blocks (producers), `add` (gatherers)   window: a block is released    lease_timeout_s x restarts
                                                     once every shard has seen it   for each next block

Blocks stay in the object store: the driver moves references. What a gatherer holds does not grow with the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from sae_ray.activations.block import Block
from sae_ray.activations.stream import BlockStream
from sae_ray.activations.subject import load_full_model, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.errors import RunInterrupted, UserError
from sae_ray.evidence.collect import EvidenceCollector
from sae_ray.evidence.files import is_written, write_evidence
from sae_ray.evidence.logit_lens import output_logits
from sae_ray.evidence.source import RandomDirections, SAELatents
from sae_ray.evidence.types import LatentSource
from sae_ray.judging.baselines import baseline_sources
from sae_ray.judging.results import LATENT, RANDOM_DIRECTION
from sae_ray.sae.inference import TrainedSAE
from sae_ray.session import Deadline, Interrupt
from sae_ray.storage import LocalStorage, aws_environment

POLL_S = 1.0
CALIBRATION_LATENTS = 256  # whose densities the null and the baselines take over


class Gatherer:
    """Collects the evidence of one shard of the latents; the first one also that of the nulls and baselines.

    Args:
        sae: the whole SAE (its object is shared by all gatherers of a node).
        latents: this shard's.
        nulls: whether random directions and baselines are this one's too.
    """

    def __init__(self, config_json: str, sae: TrainedSAE, latents: list[int], nulls: bool):
        self.config = RunConfig.model_validate_json(config_json)
        torch.set_num_threads(self.config.evaluation.threads)
        self.sae, self.nulls = sae, nulls
        self._source = SAELatents(sae, np.array(latents, dtype=np.int64))
        self._collectors: dict[str, EvidenceCollector] = {}
        self._hooks: dict[str, str] = {}

    def add(self, stored: dict[str, Any]) -> int:
        """Takes in one block dict. Blocks come in id order. Returns its kept tokens."""
        block = Block.from_numpy_dict(stored)
        if not self._collectors:
            for source, hook in self._sources(block):
                self._collectors[source.kind], self._hooks[source.kind] = self._collector(source), hook
        for kind, collector in self._collectors.items():
            collector.add(block, self._hooks[kind])
        return block.n_tokens

    def collectors(self) -> dict[str, EvidenceCollector]:
        """What this shard has collected, to be merged."""
        return self._collectors

    def finish(self, folder: str, *others: dict[str, EvidenceCollector]) -> dict[str, Any]:
        """Merges the other shards', and writes `evidence/<kind>/` into `folder`.

        Returns:
            For each kind how many latents can be judged, and why others cannot.
        """
        tokenizer = load_tokenizer(self.config.model)
        told: dict[str, Any] = {}
        for kind, collector in self._collectors.items():
            merged = EvidenceCollector.merge([collector, *(other[kind] for other in others if kind in other)])
            extra: dict[str, Any] = {}
            if kind == LATENT:
                model = load_full_model(self.config.model, torch.float32, None)
                extra = {"W_dec_MD": self.sae.W_dec_MD, "lens": output_logits(model, tokenizer)}
            found = merged.finish(tokenizer, **extra)
            write_evidence(LocalStorage(folder), evidence_prefix(kind), found)
            told[kind] = {
                "judged": len(found.latents),
                "skipped": len(found.skipped),
                "tokens": found.n_tokens,
                "contexts": found.n_contexts,
            }
        return told

    def _collector(self, source: LatentSource) -> EvidenceCollector:
        config = self.config
        return EvidenceCollector(source, config.judging, config.judge.context_tokens, config.seed)

    def _sources(self, first: Block) -> list[tuple[LatentSource, str]]:
        """This shard's latents, and with them whatever they are compared with, at the same densities."""
        hook = self.config.hook.name
        sources: list[tuple[LatentSource, str]] = [(self._source, hook)]
        settings = self.config.judging
        if not self.nulls or not (settings.random_directions or settings.baselines):
            return sources
        raw_TD = first.acts_TD(torch.float32, hook)
        some = np.random.default_rng(self.config.seed).permutation(self._source.latents)[:CALIBRATION_LATENTS]
        f_TN, _ = SAELatents(self.sae, np.sort(some)).activations(raw_TD)
        densities = (f_TN > 0).double().mean(0).numpy()
        densities = np.sort(densities[densities > 0])
        if not len(densities):
            raise UserError(
                "none of the latents fires on the first block of the corpus: is it the SAE's model and hook?"
            )
        if settings.random_directions:
            wanted = _spread(densities, settings.random_directions)
            sources.append((RandomDirections(raw_TD, wanted, self.config.seed), hook))
        sources += baseline_sources(self.config, first, _spread(densities, settings.baseline_neurons))
        return sources


def _spread(densities: np.ndarray, n: int) -> np.ndarray:
    """`n` of the sorted densities, evenly over their ranks."""
    return densities[np.linspace(0, len(densities) - 1, n).round().astype(int)]


def evidence_prefix(kind: str) -> str:
    return f"evidence/{kind.replace(' ', '-')}"


def has_evidence(config: RunConfig) -> bool:
    return is_written(LocalStorage(config.run_dir), evidence_prefix(LATENT))


def kinds_of(config: RunConfig) -> list[str]:
    """What is judged: the latents, and what they are compared with."""
    return [LATENT, *([RANDOM_DIRECTION] if config.judging.random_directions else []), *config.judging.baselines]


def gather(
    config: RunConfig,
    stream: BlockStream,
    sae: TrainedSAE,
    latents: list[int],
    interrupt: Interrupt,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the pass with a stream whose producers serve; writes the evidence below `config.run_dir`.

    Raises:
        UserError: a producer or a gatherer failed, or no block came within the time limit.
        RunInterrupted: nothing of the pass is kept.
    """
    settings, split = config.judging, config.judging.split
    sae_ref = ray.put(sae)
    actor: Any = ray.remote(Gatherer)
    shards = [part.tolist() for part in np.array_split(np.array(latents), min(settings.shards, len(latents)))]
    environment = {"env_vars": aws_environment()}
    gatherers = [
        actor.options(num_cpus=0, runtime_env=environment).remote(config.model_dump_json(), sae_ref, part, index == 0)
        for index, part in enumerate(shards)
    ]
    limit_s = config.activations.lease_timeout_s * (1 + config.activations.max_restarts)
    deadline = Deadline(limit_s, "an evidence block")
    asked = sent = seen = tokens = 0
    adding: dict[int, list[ray.ObjectRef]] = {}
    began = time.monotonic()
    try:
        while seen < settings.blocks:
            while asked < settings.blocks and asked - seen < config.activations.window_blocks:
                stream.fetch(split, [asked])
                asked += 1
            stream.pump(time.monotonic())
            # In id order, so that the evidence does not depend on which producer was faster.
            while sent < asked and stream.fetched(split, [sent]):
                ref = stream.fetched_refs(split, [sent])[0]
                adding[sent] = [gatherer.add.remote(ref) for gatherer in gatherers]
                sent += 1
            oldest = adding.get(seen, [])
            ready, _ = ray.wait([*stream.pending_refs(), *oldest], timeout=POLL_S, fetch_local=False)
            for ref in ready:
                if stream.owns(ref):
                    stream.on_ready(ref, time.monotonic())
            if oldest and len(ray.wait(oldest, num_returns=len(oldest), timeout=0)[0]) == len(oldest):
                tokens += _value(oldest)[0]
                stream.release(split, [seen])
                del adding[seen]
                seen += 1
                deadline = Deadline(limit_s, "an evidence block")
                left = (time.monotonic() - began) / seen * (settings.blocks - seen)
                say(f"evidence: {seen} of {settings.blocks} blocks, {tokens:,} tokens, left {left:.0f} s")
            deadline.check()
            if interrupt.requested:
                raise RunInterrupted("stopped during the evidence pass, which is short and starts anew")
        say("evidence: writing")
        others = [gatherer.collectors.remote() for gatherer in gatherers[1:]]
        return _value([gatherers[0].finish.remote(str(config.run_dir), *others)])[0]
    finally:
        for gatherer in gatherers:
            ray.kill(gatherer)


def _value(refs: list[ray.ObjectRef]) -> list[Any]:
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
