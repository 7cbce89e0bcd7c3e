"""Neurons fire as often as they are told to, where they are largest, and never move their thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_ray.config import HookConfig
from sae_ray.evidence.baselines import TRANSFORMS, NeuronSource, density_threshold, neuron_sources, site_name

T, D = 2000, 12
NEURONS = [3, 7, 11, 0]
DENSITIES = [0.01, 0.2, 0.0005, 0.1]


def activations(seed: int = 0, tokens: int = T) -> torch.Tensor:
    """Columns of different spreads and with offsets, as residual streams have; neuron 0 is positive on 31%."""
    noise = torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))
    return noise * torch.arange(1, D + 1) + torch.linspace(-0.5, 9, D)


def size(raw_TD: torch.Tensor, transform: str) -> np.ndarray:
    x_TN = raw_TD.numpy()[:, NEURONS]
    return np.abs(x_TN) if transform == "abs" else x_TN


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_neuron_fires_on_its_density_of_the_tokens_where_it_is_largest(transform):
    raw_TD = activations()
    source = NeuronSource(NEURONS, transform, DENSITIES)
    acts_TN, margins_TN = source.activations(raw_TD)
    assert acts_TN.dtype == margins_TN.dtype == torch.float32
    for column, density in enumerate(DENSITIES):
        values = size(raw_TD, transform)[:, column]
        wanted = round(density * T)
        fires = acts_TN[:, column].numpy() > 0
        assert set(np.flatnonzero(fires)) == set(np.argsort(-values)[:wanted])
        np.testing.assert_allclose(source.achieved[column], wanted / T)
        np.testing.assert_array_equal(margins_TN[:, column].numpy() > 0, fires)


def test_activations_are_what_the_transforms_say():
    raw_TD = activations()
    x_TN = raw_TD[:, NEURONS]
    for transform, expected in (("relu", x_TN), ("abs", x_TN.abs()), ("shift", None)):
        source = NeuronSource(NEURONS, transform, DENSITIES).calibrate(raw_TD)
        acts_TN, margins_TN = source.activations(raw_TD)
        value_TN = x_TN - source.threshold_N if expected is None else expected
        torch.testing.assert_close(acts_TN, torch.where(acts_TN > 0, value_TN, 0.0))
        compared = x_TN.abs() if transform == "abs" else x_TN
        torch.testing.assert_close(margins_TN, compared - source.threshold_N)


def test_relu_fires_no_more_often_than_its_neuron_is_positive_and_says_so():
    raw_TD = activations()
    neuron = 0
    source = NeuronSource([neuron], "relu", [0.5]).calibrate(raw_TD)
    assert float(source.threshold_N) == 0
    assert source.achieved[0] == float((raw_TD[:, neuron] > 0).double().mean())
    assert NeuronSource([neuron], "shift", [0.5]).calibrate(raw_TD).achieved[0] == 0.5


def test_a_shift_below_zero_still_gives_positive_activations():
    source = NeuronSource([0], "shift", [0.5])
    acts_TN, _ = source.activations(activations())
    assert float(source.threshold_N) < 0
    assert int((acts_TN > 0).sum()) == T // 2
    assert float(acts_TN.min()) == 0


def test_only_the_first_batch_calibrates():
    first, second = activations(0), 3 * activations(1)
    source = NeuronSource(NEURONS, "relu", DENSITIES)
    source.activations(first)
    before = source.threshold_N.clone()
    acts_TN, _ = source.activations(second)
    assert torch.equal(source.threshold_N, before)
    fresh = NeuronSource(NEURONS, "relu", DENSITIES).calibrate(first)
    assert torch.equal(acts_TN, fresh.activations(second)[0])
    with pytest.raises(RuntimeError, match="residual abs: has seen no batch"):
        _ = NeuronSource(NEURONS, "abs", DENSITIES).threshold_N


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9])
def test_ties_are_split_as_near_to_the_density_as_they_allow(density):
    """bfloat16 activations take few values: the nearest count that any threshold gives."""
    values = np.random.default_rng(0).integers(-4, 5, size=500).astype(np.float32)
    threshold = density_threshold(values[:, None], [density])[0]
    counts = [(values > cut).sum() for cut in (-99, *np.unique(values))]
    possible = [count for count in counts if count > 0]
    assert (values > threshold).sum() > 0
    assert abs((values > threshold).sum() - 500 * density) == min(abs(count - 500 * density) for count in possible)


def test_bfloat16_batches_work():
    acts_TN, margins_TN = NeuronSource(NEURONS, "relu", [0.1] * 4).activations(activations().bfloat16())
    assert acts_TN.dtype == margins_TN.dtype == torch.float32
    np.testing.assert_allclose((acts_TN > 0).double().mean(0).numpy(), 0.1, atol=0.02)


def test_the_three_transforms_share_neurons_and_densities():
    densities = np.array([0.0, 0.01, 0.05, 1.0])
    sources = neuron_sources(D, 5, densities, "mlp", seed=3)
    assert [source.kind for source in sources] == ["mlp relu", "mlp abs", "mlp shift"]
    assert all(np.array_equal(source.latents, sources[0].latents) for source in sources)
    assert len(set(sources[0].latents.tolist())) == 5
    shares = sources[2].calibrate(activations()).achieved
    assert set(np.round(shares, 6)) <= {0.01, 0.05}
    assert len(neuron_sources(D, 99, densities, "mlp", seed=3)[0].latents) == D
    with pytest.raises(ValueError, match="no latent has a density"):
        neuron_sources(D, 5, [0.0, 1.0], "mlp", seed=3)


def test_wrong_densities_are_refused():
    for densities in ([0.1], [0.1, 0.0], [0.1, 1.0]):
        with pytest.raises(ValueError, match="densities"):
            NeuronSource([1, 2], "relu", densities)
    with pytest.raises(ValueError, match="known: relu, abs, shift"):
        NeuronSource([1], "gelu", [0.1])


def test_hook_sites_have_the_names_of_their_baselines():
    names = [site_name(HookConfig(layer=1, site=site)) for site in ("resid_post", "resid_mid", "mlp_out", "mlp_in")]
    assert names == ["residual", "residual", "mlp", "mlp"]
