"""The training steps that `trainer.py` compares. One process per contender, in that contender's own environment.

    python contenders.py NAME JSON      reads commands from stdin, one JSON object a line, and answers each

A contender is built from its job (sizes, threads, settings) and then does what it is told: `load` batches,
`step` so often, `train` on a stream and give the held-out FVU, `memory`. Only the chosen library is imported.

Suffixes: B tokens of a batch, D d_in, M d_sae, N batches.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from sae_ray.config import TrainerConfig
from sae_ray.sae.losses import fvu
from sae_ray.trainer.schedule import learning_rate

HELD_OUT_AT_ONCE = 1024


class Job(NamedTuple):
    """What every contender of a run has in common."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    threads: int
    lr: float
    steps: int  # of the learning rate's schedule, where the contender follows one
    sae: dict[str, Any]  # ours only: SAEConfig values
    trainer: dict[str, Any]  # ours only: TrainerConfig values


class Contender(NamedTuple):
    step: Callable[[torch.Tensor], None]
    reconstruct: Callable[[torch.Tensor], torch.Tensor] | None = None
    note: Callable[[], str] = lambda: ""


def schedule(job: Job) -> TrainerConfig:
    """The learning rate that all contenders of a quality run follow."""
    return TrainerConfig(lr=job.lr, lr_final=0.0, steps=job.steps, warmup_steps=min(20, job.steps // 10))


# ---------------------------------------------------------------------- ours


def import_ours() -> None:
    import sae_ray.sae.inference
    import sae_ray.trainer.sharded_sae  # noqa: F401


def ours(job: Job, first_BD: torch.Tensor) -> Contender:
    from sae_ray.config import SAEConfig
    from sae_ray.sae.inference import TrainedSAE
    from sae_ray.trainer.collectives import Collectives
    from sae_ray.trainer.mesh import Mesh
    from sae_ray.trainer.sharded_sae import ShardedTrainer

    sae = SAEConfig(**{"d_sae": job.d_sae, "k": job.k, **job.sae})
    config = TrainerConfig(**{**schedule(job).model_dump(), "batch_tokens": job.batch, **job.trainer})
    machine = ShardedTrainer(sae, config, job.d_in, 0, Collectives(Mesh.alone()))
    machine.initialise(first_BD)

    def step(x_BD: torch.Tensor) -> None:
        machine.step(x_BD, len(x_BD))

    def reconstruct(x_BD: torch.Tensor) -> torch.Tensor:
        manifest = {"architecture": sae.architecture, "k": sae.k, "input_scale": machine.input_scale, **machine.meta()}
        return TrainedSAE.from_checkpoint(machine.state(), manifest).reconstruct(x_BD)

    def note() -> str:
        rows = machine.read_metrics()
        return f"{rows[-1]['dead_fraction']:.0%} dead" if rows and sae.aux_k else ""

    return Contender(step, reconstruct, note)


# ---------------------------------------------------------------------- the peers


def import_sparsify() -> None:
    import sparsify  # noqa: F401


def sparsify_bare(job: Job, first_BD: torch.Tensor) -> Contender:
    """Forward, backward, Adam: less than its own trainer does."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(job.d_in, SparseCoderConfig(num_latents=job.d_sae, k=job.k), device="cpu")
    adam = torch.optim.Adam(coder.parameters(), lr=job.lr)

    def step(x_BD: torch.Tensor) -> None:
        out = coder(x_BD)
        adam.zero_grad()
        out.fvu.backward()
        adam.step()

    return Contender(step)


def sparsify_trainer(job: Job, first_BD: torch.Tensor) -> Contender:
    """What its trainer does in a step besides: unit decoder rows, their gradient kept tangent, firing counts."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(job.d_in, SparseCoderConfig(num_latents=job.d_sae, k=job.k), device="cpu")
    coder.b_dec.data = first_BD.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=job.lr)
    since_fired_M = torch.zeros(job.d_sae, dtype=torch.long)
    did_fire_M = torch.zeros(job.d_sae, dtype=torch.bool)
    config, steps_done = schedule(job), [0]

    def step(x_BD: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x_BD)
        did_fire_M[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.param_groups[0]["lr"] = learning_rate(steps_done[0], config)
        adam.step()
        adam.zero_grad()
        since_fired_M.add_(len(x_BD))
        since_fired_M[did_fire_M] = 0
        did_fire_M.zero_()
        steps_done[0] += 1

    def reconstruct(x_BD: torch.Tensor) -> torch.Tensor:
        return coder(x_BD).sae_out

    return Contender(step, reconstruct)


def import_dictionary_learning() -> None:
    import dictionary_learning.trainers.top_k  # noqa: F401


def dictionary_learning(job: Job, first_BD: torch.Tensor) -> Contender:
    """`TopKTrainer.update`. Its AuxK starts after ten million silent tokens, so it is off here."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1_000_000,
        activation_dim=job.d_in,
        dict_size=job.d_sae,
        k=job.k,
        layer=0,
        lm_name="none",
        lr=job.lr,
        warmup_steps=10,
        seed=0,
        device="cpu",
    )
    steps_done = [0]

    def step(x_BD: torch.Tensor) -> None:
        trainer.update(steps_done[0], x_BD)
        steps_done[0] += 1

    return Contender(step)


def import_saelens() -> None:
    import sae_lens.training.sae_trainer  # noqa: F401


def saelens_bare(job: Job, first_BD: torch.Tensor) -> Contender:
    """Forward, backward, Adam and the firing count, without the rest of its trainer."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job.d_in, d_sae=job.d_sae, k=job.k))
    adam = torch.optim.Adam(sae.parameters(), lr=job.lr)
    dead_M = torch.zeros(job.d_sae, dtype=torch.bool)

    def step(x_BD: torch.Tensor) -> None:
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x_BD, coefficients={}, dead_neuron_mask=dead_M, n_training_steps=1, is_logging_step=False
            )
        )
        adam.zero_grad()
        out.loss.backward()
        adam.step()
        out.feature_acts.bool().float().sum(-1).mean()

    return Contender(step)


def saelens_trainer(job: Job, first_BD: torch.Tensor) -> Contender:
    """`SAETrainer.step`, as its own runner calls it."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=1_000_000 * job.batch,
        device="cpu",
        autocast=False,
        lr=job.lr,
        lr_end=job.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=job.batch,
        dead_feature_window=1_000_000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job.d_in, d_sae=job.d_sae, k=job.k))
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x_BD: torch.Tensor) -> None:
        trainer.step(x_BD)
        trainer.n_training_steps += 1

    return Contender(step)


# ---------------------------------------------------------------------- the floor


def gemm(dtype: torch.dtype) -> Callable[[Job, torch.Tensor], Contender]:
    """The one dense product that a TopK step cannot do without, and nothing else."""

    def build(job: Job, first_BD: torch.Tensor) -> Contender:
        weight_MD = torch.randn(job.d_sae, job.d_in).to(dtype)
        bias_M = torch.zeros(job.d_sae, dtype=dtype)
        out_BM = torch.empty(job.batch, job.d_sae, dtype=dtype)
        x_BD = first_BD[: job.batch].to(dtype)
        return Contender(lambda _: torch.addmm(bias_M, x_BD, weight_MD.T, out=out_BM))

    return build


def nothing() -> None:
    """The floor needs no library."""


CONTENDERS: dict[str, tuple[Callable[[], None], Callable[[Job, torch.Tensor], Contender]]] = {
    "ours": (import_ours, ours),
    "sparsify": (import_sparsify, sparsify_bare),
    "sparsify_trainer": (import_sparsify, sparsify_trainer),
    "dictionary_learning": (import_dictionary_learning, dictionary_learning),
    "saelens": (import_saelens, saelens_bare),
    "saelens_trainer": (import_saelens, saelens_trainer),
    "gemm_float32": (nothing, gemm(torch.float32)),
    "gemm_bfloat16": (nothing, gemm(torch.bfloat16)),
}


# ---------------------------------------------------------------------- a process of its own


def resident_mib(field: str = "VmRSS") -> float:
    """Resident memory of this process, MiB: VmRSS now, VmHWM the most so far.

    Where there is no /proc both are ru_maxrss, which starts at the parent's size.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(rf"{field}:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    divisor = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / divisor


def warm_up(build: Callable[[Job, torch.Tensor], Contender], job: Job) -> None:
    """A step of a tiny SAE: what is imported and started on first use is no cost of a training step."""
    tiny_BD = torch.randn(8, 16)
    tiny = build(job._replace(d_in=16, d_sae=64, k=2, batch=8), tiny_BD)
    tiny.step(tiny_BD)
    tiny.step(tiny_BD)


def read_batches(file: str) -> torch.Tensor:
    """[N, B, D] float32 that the comparing process has laid out."""
    return load_file(file)["x_NBD"]


def serve(name: str, job: Job) -> None:
    """Answers commands until stdin closes. Whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    load_library, build = CONTENDERS[name]
    load_library()
    warm_up(build, job)
    before = resident_mib()
    x_NBD, contender, at = torch.empty(0), Contender(lambda _: None), 0
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "load":
            x_NBD = read_batches(command["file"])
            contender = build(job, x_NBD[0])
        elif command["do"] == "step":
            seconds = []
            for _ in range(command["times"]):
                began = time.perf_counter()
                contender.step(x_NBD[at % len(x_NBD)])
                seconds.append(time.perf_counter() - began)
                at += 1
            answer = {"seconds": seconds}
        elif command["do"] == "train":
            answer = train(contender, x_NBD, command["steps"], command["held_out"])
        elif command["do"] == "memory":
            answer = {"imports_mib": before, "peak_mib": resident_mib("VmHWM"), "note": contender.note()}
        print(json.dumps(answer), file=answers, flush=True)


def train(contender: Contender, x_NBD: torch.Tensor, steps: int, held_out: int) -> dict[str, float]:
    """Trains on all but the last `held_out` batches, in order and again from the start. FVU of those left out."""
    assert contender.reconstruct is not None
    n_train = len(x_NBD) - held_out
    began = time.perf_counter()
    for i in range(steps):
        contender.step(x_NBD[i % n_train])
    seconds = time.perf_counter() - began
    x_TD = x_NBD[n_train:].flatten(0, 1)
    with torch.no_grad():
        hat_TD = torch.cat([contender.reconstruct(part) for part in x_TD.split(HELD_OUT_AT_ONCE)])
        return {"fvu": float(fvu(x_TD.double(), hat_TD.double())), "seconds": seconds}


if __name__ == "__main__":
    serve(sys.argv[1], Job(**json.loads(sys.argv[2])))
