"""Sparse products against their dense counterparts."""

from __future__ import annotations

import pytest
import torch

from sae_ray.sae.selection import Gate
from sae_ray.sae.sparse import Codes, decode, dot_pairs, sum_by_latent, sum_scalars_by_latent


@pytest.fixture(params=[0.2, 0.0], ids=["sparse", "nothing-active"])
def case(request):
    generator = torch.Generator().manual_seed(0)
    pre = torch.rand(9, 14, generator=generator, dtype=torch.float64) + 0.1
    mask = torch.rand(9, 14, generator=generator) < request.param
    rows, cols = mask.nonzero(as_tuple=True)
    W = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    return Codes.of(pre, Gate(rows, cols, torch.zeros(()))), pre * mask, mask, W, y


def test_decode_equals_the_dense_product(case):
    codes, f, _, W, _ = case
    torch.testing.assert_close(decode(codes, W), f @ W)
    assert torch.equal(codes.dense(), f)


@pytest.mark.parametrize("mkl", [True, False])
def test_pair_products_equal_the_dense_product_with_and_without_mkl(case, mkl, monkeypatch):
    codes, _, mask, W, y = case
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    torch.testing.assert_close(dot_pairs(codes, y, W), (y @ W.T)[mask])


def test_sums_by_latent_equal_the_transposed_product(case):
    codes, f, _, _, y = case
    torch.testing.assert_close(sum_by_latent(codes, codes.vals_N, y), f.T @ y)
    torch.testing.assert_close(sum_scalars_by_latent(codes, codes.vals_N), f.sum(0))
