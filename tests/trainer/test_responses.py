"""What a rank does with blocks of evidence: one block at a time, and the same as of all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import D_IN, sharded_run

from sae_ray.activations.block import Block
from sae_ray.errors import UserError
from sae_ray.reward.credit import projections, whitener, whitening
from sae_ray.reward.evidence import scan_contexts
from sae_ray.trainer import responses
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

HOOK, OTHER, CONTEXT = "in", "other", 8


def block(number: int) -> Block:
    """Some tokens are not kept, and of the second sequence none of the first two contexts."""
    rng = np.random.default_rng(number)
    keep_SL = rng.random((3, 40)) < 0.7
    keep_SL[1, :16] = False
    seq_T, pos_T = (each.astype(np.int32) for each in np.nonzero(keep_SL))
    basis = np.random.default_rng(99).normal(size=(8, D_IN))
    acts = np.maximum(rng.normal(size=(len(seq_T), 8)), 0) @ basis + 5
    wide = np.concatenate([acts, -acts], axis=1).astype(np.float32)
    columns = {HOOK: (0, D_IN), OTHER: (D_IN, 2 * D_IN)}
    return Block(number, np.zeros((3, 40), dtype=np.int32), wide, seq_T, pos_T, columns)


BLOCKS = [block(number) for number in range(5)]


@pytest.fixture(scope="module")
def trainer() -> ShardedTrainer:
    return sharded_run(Mesh.alone(), "batchtopk", steps=4)


def test_a_scan_block_by_block_equals_one_of_all_blocks_at_once(trainer, monkeypatch):
    own_n = np.array([1, 5, 17, 40])
    rows, sizes = torch.from_numpy(own_n), []
    whole = scan_contexts(
        trainer.scaled(responses.activations(BLOCKS, [HOOK])[HOOK]), responses.layout_of(BLOCKS, CONTEXT), own_n,
        trainer.W_enc_mD[rows], trainer.b_enc_m[rows], trainer.b_dec_D, trainer.thresholds_m()[rows],
    )  # fmt: skip
    scaled = trainer.scaled
    monkeypatch.setattr(trainer, "scaled", lambda raw_TD: sizes.append(len(raw_TD)) or scaled(raw_TD))
    found = responses.scan(trainer, BLOCKS, HOOK, CONTEXT, own_n)
    assert sizes == [each.n_tokens for each in BLOCKS]
    assert np.isneginf(found.margin_CN).any()  # contexts without a token
    for name in ("latents", "act_CN", "margin_CN", "token_CN"):
        a, b = getattr(whole, name), getattr(found, name)
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name


def test_firing_is_where_a_scan_is_active(trainer, monkeypatch):
    monkeypatch.setattr(responses, "LATENTS_AT_ONCE", 3)
    own_n = np.array([1, 5, 17, 40])
    active_CN = responses.scan(trainer, BLOCKS, HOOK, CONTEXT, own_n).act_CN > 0
    bits_nW = responses.firing(trainer, BLOCKS, HOOK, CONTEXT, own_n)
    assert active_CN.any()
    assert bits_nW.shape == (4, 10)  # of 75 contexts
    assert np.array_equal(np.unpackbits(bits_nW, axis=1, count=len(active_CN)).T, active_CN)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "gated"])
def test_nearest_latents_are_the_largest_cosines_of_the_decoder(architecture):
    trainer, latents = sharded_run(Mesh.alone(), architecture, steps=2), [3, 8, 40]
    rows_MD = torch.nn.functional.normalize(trainer.W_dec_mD.double(), dim=1)
    cosine_NM = rows_MD[latents] @ rows_MD.T
    cosine_NM[range(3), latents] = -9
    best = cosine_NM.topk(2)
    ids_Nn, cosine_Nn = responses.nearest_latents(trainer, latents, rows_MD[latents].half().numpy(), 2)
    np.testing.assert_array_equal(ids_Nn, best.indices)
    np.testing.assert_allclose(cosine_Nn, best.values, atol=1e-3)


@pytest.mark.parametrize("hook", [HOOK, OTHER])
def test_the_evidence_of_a_fit_is_all_tokens_scaled_and_the_blocks_are_left_alone(trainer, hook):
    before = [each.acts.copy() for each in BLOCKS]
    x_TD = responses.scaled_inputs(trainer, BLOCKS, hook)
    assert torch.equal(x_TD, trainer.scaled(responses.activations(BLOCKS, [hook])[hook]))
    assert all(np.array_equal(a, each.acts) for a, each in zip(before, BLOCKS, strict=True))


def test_the_evidence_of_a_fit_must_be_finite(trainer):
    acts = BLOCKS[1].acts.copy()
    acts[3, 2] = np.inf
    bad = Block(7, BLOCKS[1].tokens_SL, acts, BLOCKS[1].seq_T, BLOCKS[1].pos_T, BLOCKS[1].columns)
    for of_blocks in (
        lambda: responses.scaled_inputs(trainer, [BLOCKS[0], bad], HOOK),
        lambda: responses.scan(trainer, [BLOCKS[0], bad], HOOK, CONTEXT, np.array([1])),
    ):
        with pytest.raises(UserError, match="block 7: 1 of"):
            of_blocks()


def test_scaling_copies_once_and_never_changes_what_it_is_given(trainer):
    raw_TD = torch.randn(5, D_IN, dtype=torch.float64)
    for given in (raw_TD, raw_TD.float()):
        kept = given.clone()
        assert torch.equal(trainer.scaled(given), kept.double() * trainer.input_scale)
        assert torch.equal(given, kept)


def test_whitening_and_projections_in_chunks_equal_those_of_all_tokens(monkeypatch):
    x_TD = torch.randn(101, D_IN, dtype=torch.float64) + 3
    W_ND = torch.randn(4, D_IN, dtype=torch.float64)
    mean_D, cov_DD, inverse_DD = whitener(x_TD)
    centred_TD = x_TD - x_TD.mean(0)
    assert torch.equal(cov_DD, centred_TD.T @ centred_TD / len(x_TD))  # one chunk: to the last bit
    assert torch.equal(projections(x_TD, mean_D, W_ND), centred_TD @ W_ND.T)
    sizes: list[Any] = []
    split = torch.Tensor.split
    monkeypatch.setattr(whitening, "CHUNK", 16)
    monkeypatch.setattr(torch.Tensor, "split", lambda self, n: [sizes.append(len(p)) or p for p in split(self, n)])
    for a, b in zip(whitener(x_TD), (mean_D, cov_DD, inverse_DD), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert max(sizes) == 16
    torch.testing.assert_close(projections(x_TD, mean_D, W_ND), centred_TD @ W_ND.T, rtol=1e-10, atol=1e-12)
