"""A new architecture is a class and a registry line: here one with a parameter of its own, a gain per latent."""

from __future__ import annotations

import socket
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import BATCH, D_IN, D_SAE, SEED, batches
from pydantic import ValidationError

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.errors import UserError
from sae_ray.sae.activation import Active, Slopes
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.architectures.topk import TopK
from sae_ray.sae.formats import FORMATS, export_sae
from sae_ray.sae.formats.notes import Provenance
from sae_ray.sae.inference import TrainedSAE
from sae_ray.sae.sparse import per_pair, sum_scalars_by_latent
from sae_ray.trainer import checkpoint
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

STEPS = 12


class Amplified(TopK):
    """TopK whose activations are `gain * pre`."""

    name: ClassVar[str] = "amplified"

    def new_parameters(self, m, dtype, device):
        return {"gain": torch.ones(m, dtype=dtype, device=device)}

    def forward(self, encoder, parameters, context):
        active = super().forward(encoder, parameters, context)
        pre_N = active.codes.vals_N
        f_N = pre_N * per_pair(active.codes, parameters["gain"])
        return Active(active.codes._replace(vals_N=f_N), active.threshold, (pre_N,))

    def backward(self, active, d_f_N, d_gate_N, own, context):
        (pre_N,) = active.saved
        d_pre_N = d_f_N * per_pair(active.codes, own["gain"])
        return Slopes(d_pre_N, d_pre_N, {"gain": sum_scalars_by_latent(active.codes, d_f_N * pre_N)})

    @staticmethod
    def trained(tensors):
        return tensors["threshold"], {"gain": tensors["gain"]}

    @classmethod
    def encode(cls, sae, pre_TM):
        return super().encode(sae, pre_TM) * sae.own["gain"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "amplified", Amplified)


def run(mesh: Mesh) -> ShardedTrainer:
    sae = SAEConfig(architecture="amplified", d_sae=D_SAE, k=3, aux_k=0)
    cfg = TrainerConfig(lr=3e-3, warmup_steps=3, steps=STEPS, dtype="float64", tp=1, batch_tokens=BATCH)
    trainer = ShardedTrainer(sae, cfg, D_IN, SEED, Collectives(mesh))
    trainer.initialise(batches(1)[0])
    for raw in batches(STEPS):
        low, high = mesh.rows(len(raw))
        trainer.step(raw[low:high], len(raw))
    return trainer


def rank_process(rank: int, port: int) -> None:
    REGISTRY["amplified"] = Amplified
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    sharded, alone = run(Mesh.connect(2, 2)), run(Mesh.alone())
    rows = slice(sharded.first_latent, sharded.last_latent)
    assert float((alone.own["gain"] - 1).abs().max()) > 1e-3
    torch.testing.assert_close(sharded.own["gain"], alone.own["gain"][rows], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(sharded.W_enc_mD, alone.W_enc_mD[rows], rtol=1e-10, atol=1e-11)
    dist.destroy_process_group()


def test_it_trains_the_same_on_every_mesh(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_process, (port,), nprocs=4)


def test_its_gradient_is_that_of_autograd():
    trainer = run(Mesh.alone())
    x_BD = trainer.scaled(batches(1)[0])
    context = trainer._context(len(x_BD))
    grads, *_ = trainer._loss_and_gradients(x_BD, x_BD, context, None)
    W_enc, W_dec, gain = (t.clone().requires_grad_() for t in (trainer.W_enc_mD, trainer.W_dec_mD, trainer.own["gain"]))
    pre = (x_BD - trainer.b_dec_D) @ W_enc.T + trainer.b_enc_m
    keep = torch.zeros_like(pre).scatter_(1, pre.topk(3).indices, 1.0)
    error = (pre.relu() * keep * gain) @ W_dec + trainer.b_dec_D - x_BD
    (error.square().sum() / (x_BD - x_BD.mean(0)).square().sum()).backward()
    torch.testing.assert_close(grads.W_enc_mD, W_enc.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads.W_dec_mO, W_dec.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads.own["gain"], gain.grad, rtol=1e-9, atol=1e-12)


def test_its_parameter_is_sharded_in_checkpoints_and_read_by_the_trained_sae(tmp_path):
    trainer = run(Mesh.alone())
    assert checkpoint.is_sharded("gain")
    assert checkpoint.is_sharded("adam.exp_avg.gain")
    assert not checkpoint.is_sharded("rng.torch")
    sae = TrainedSAE.from_checkpoint(trainer.state(), trainer.meta())
    raw_BD = batches(1)[0]
    codes = trainer.encode(raw_BD)
    expected_BM = codes._replace(vals_N=codes.vals_N * per_pair(codes, trainer.own["gain"])).dense()
    torch.testing.assert_close(sae.encode(raw_BD), expected_BM)
    for name in FORMATS:
        with pytest.raises(UserError, match=f"{name} cannot express an? amplified.*no known format can"):
            export_sae(sae, tmp_path / name, name, Provenance())


def test_a_name_that_nobody_registered_is_refused():
    with pytest.raises(ValidationError, match=r"'topkk' is unknown; known: batchtopk, topk, .*amplified"):
        SAEConfig(architecture="topkk")
