"""Adapters: the reference's sizes, seeded weights, dropout that does not know how a batch was divided."""

import math
import typing

import numpy as np
import pytest
import torch
from small_adapters import small_adapter

from ray_app.config.base import Strategy
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES, build_adapter, meta_adapter, num_parameters
from ray_app.core.adapters.seeded_noise import BatchNoise, derive_seed
from ray_app.errors import ConfigError

WIDTH = 150_528


@pytest.mark.parametrize(
    ("strategy", "parameters"), [("lightweight", 154_556_416), ("lightweight_reference", 154_292_737)]
)
def test_the_presets_have_the_reference_s_number_of_parameters(strategy: str, parameters: int) -> None:
    with torch.device("meta"):
        adapter = STRATEGIES[strategy](AdapterConfig(strategy, WIDTH, WIDTH))
    assert num_parameters(adapter) == parameters


def test_the_config_names_every_strategy() -> None:
    assert set(typing.get_args(Strategy)) == set(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(strategy: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = (small_adapter(strategy, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one) == (strategy != "ridge"), "it is solved"
    assert torch.equal(before, torch.random.get_rng_state())


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def test_lightweight_is_the_diagram_of_the_reference() -> None:
    adapter = build_adapter(AdapterConfig("lightweight", 10, 10, 6), seed=0).eval()
    w = {key: value.double().numpy() for key, value in adapter.state_dict().items()}
    x = np.random.default_rng(0).standard_normal((4, 10))
    h = np.maximum(layer_norm(x @ w["input.weight"].T + w["input.bias"]), 0)
    h = np.maximum(layer_norm(h @ w["hidden.weight"].T + w["hidden.bias"]), 0)
    expected = h @ w["output.weight"].T + w["output.bias"] + x
    np.testing.assert_allclose(adapter(torch.from_numpy(x).float()).detach(), expected, atol=1e-5)


def test_lightweight_reference_scales_its_output_and_a_tenth_of_its_input() -> None:
    """Scale · (mlp(x) + 0.1 · x), written down in numpy and float64."""
    adapter = build_adapter(AdapterConfig("lightweight_reference", 10, 10, 6), seed=0).eval()
    adapter.load_state_dict({**adapter.state_dict(), "scale": torch.tensor([0.7])})
    w = {key: value.double().numpy() for key, value in adapter.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    h = x @ w["input.weight"].T + w["input.bias"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    expected = 0.7 * (h @ w["output.weight"].T + w["output.bias"] + 0.1 * x)
    np.testing.assert_allclose(adapter(torch.from_numpy(x)).detach(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "strategy", [name for name in STRATEGIES if name != "conv" and not name.startswith("token_")]
)
def test_event_and_target_may_differ_in_width(strategy: str) -> None:
    adapter = build_adapter(AdapterConfig(strategy, 10, 7, 6, rank=3), seed=0).eval()
    assert adapter(torch.zeros(2, 10)).shape == (2, 7)


def test_dropout_is_the_same_however_a_batch_is_divided() -> None:
    adapter = build_adapter(AdapterConfig("lightweight", 10, 10, 64, dropout=0.5), seed=0).train()
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    whole = adapter(x, BatchNoise(1, 2, 0, 8, 8))
    parts = [adapter(x[:3], BatchNoise(1, 2, 0, 3, 8)), adapter(x[3:], BatchNoise(1, 2, 3, 5, 8))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert not torch.allclose(whole, adapter(x, BatchNoise(1, 3, 0, 8, 8)))


def test_noise_is_uniform_and_keeps_the_share_it_should() -> None:
    draw = BatchNoise(0, 0, 0, 400, 400).uniform(0, 500, torch.device("cpu"))
    assert abs(float(draw.mean()) - 0.5) < 0.005
    assert abs(float((draw >= 0.1).double().mean()) - 0.9) < 0.005


def test_mixed_seeds_do_not_collide_on_small_numbers() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(100) for c in range(10)}
    assert len(seeds) == 10_000


def test_training_with_dropout_and_no_noise_is_refused() -> None:
    adapter = build_adapter(AdapterConfig("lightweight", 4, 4, 4), seed=0).train()
    with pytest.raises(AssertionError, match="noise"):
        adapter(torch.zeros(1, 4))


def test_a_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    config = AdapterConfig("bottleneck", 10, 7, 6, 0.2)
    assert AdapterConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown adapter setting colour"):
        AdapterConfig.from_dict({**config.to_dict(), "colour": 3})
    with pytest.raises(ConfigError, match="incomplete"):
        AdapterConfig.from_dict({"strategy": "linear"})
    with pytest.raises(ConfigError, match="no strategy 'nothing'"):
        meta_adapter(AdapterConfig("nothing", 1, 1))


def test_layers_steps_and_seeds_have_noise_of_their_own() -> None:
    cpu = torch.device("cpu")
    first = BatchNoise(0, 0, 0, 4, 4).uniform(0, 8, cpu)
    others = [
        BatchNoise(0, 0, 0, 4, 4).uniform(1, 8, cpu),
        BatchNoise(0, 1, 0, 4, 4).uniform(0, 8, cpu),
        BatchNoise(1, 0, 0, 4, 4).uniform(0, 8, cpu),
    ]
    assert torch.equal(first, BatchNoise(0, 0, 0, 4, 4).uniform(0, 8, cpu))
    assert not any(torch.equal(first, other) for other in others)
