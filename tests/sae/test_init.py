from __future__ import annotations

import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.sae.init import geometric_median, input_scale, unit_rows
from sae_ray.sae.losses import aux_k_weight, fvu


def test_a_latents_first_weights_depend_on_its_id_only():
    whole = unit_rows(0, 5000, 16, 3, torch.float64)
    assert torch.equal(unit_rows(4090, 4100, 16, 3, torch.float64), whole[4090:4100])
    assert not torch.equal(unit_rows(0, 10, 16, 4, torch.float64), whole[:10])


def test_first_weights_are_independent_unit_directions():
    rows = unit_rows(0, 2000, 64, 0, torch.float64)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2000, dtype=torch.float64))
    assert rows.mean(0).abs().max() < 5 * (1 / 64 / 2000) ** 0.5
    cosines = (rows @ rows.T - torch.eye(2000)).abs()
    assert cosines.max() < 0.75  # 6 standard deviations of 1/8
    assert len(torch.unique(rows.flatten())) == rows.numel()


def test_the_geometric_median_ignores_a_massive_token():
    tokens = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    tokens[0] = 1e6
    assert geometric_median(tokens).norm() < 0.3
    assert tokens.mean(0).norm() > 100


def test_sqrt_d_scales_the_mean_norm_to_the_square_root_of_the_width():
    raw = torch.randn(100, 9) * 37
    scale = input_scale(raw, "sqrt_d")
    assert float((raw * scale).norm(dim=1).mean()) == pytest.approx(3, rel=1e-5)
    assert input_scale(raw, "none") == 1
    with pytest.raises(UserError, match="all zero"):
        input_scale(torch.zeros(3, 4), "sqrt_d")


def test_fvu_is_zero_for_a_copy_and_one_for_the_mean():
    x = torch.randn(50, 6).double()
    assert float(fvu(x, x)) == 0
    assert float(fvu(x, x.mean(0).expand_as(x))) == pytest.approx(1)
    assert float(fvu(100 * x, 90 * x)) == pytest.approx(float(fvu(x, 0.9 * x)))


def test_aux_k_counts_less_while_few_latents_are_dead():
    assert aux_k_weight(0.5, 4, 16) == 0.125
    assert aux_k_weight(0.5, 100, 16) == 0.5
    assert aux_k_weight(0.5, 100, 0) == 0
