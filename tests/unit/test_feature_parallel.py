"""Workers with a slice of the features train as one worker does: weights, losses, gradients, from the same start."""

from typing import Any

import pytest
import torch
from feature_workers import on_workers, whole_weights
from small_adapters import in_batches, small_pairs
from torch import Tensor

from ray_app.core.adapters import slices
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.initialization import compute_stats
from ray_app.core.adapters.registry import STRATEGIES, build_adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.slices import WHOLE, FeatureSlice, TensorSlice, gather
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import Precision, StepResult, make_optimizer, training_step
from ray_app.core.sliced_losses import SlicedObjective

WIDE = [name for name, kind in STRATEGIES.items() if kind.DIVISIBLE]
LOSSES = {
    "default": LossWeights(),
    "mse": LossWeights(cosine=0.0),
    "unit": LossWeights(mse_space="unit"),
    "accept": LossWeights(accept=0.7, accept_thetas=(0.6, 0.9)),
    "centred": LossWeights(centred=0.4),
    "contrastive": LossWeights(contrastive=0.5),
}


def config_of(strategy: str, event: int = 48, target: int = 48, **settings: Any) -> AdapterConfig:
    return AdapterConfig(strategy, event, target, **({"hidden_dim": 8, "depth": 2, "dropout": 0.1} | settings))


def pairs_of(config: AdapterConfig, pairs: int = 24) -> tuple[Tensor, Tensor]:
    event, target = small_pairs(max(config.event_dim, config.target_dim), pairs)
    return event[:, : config.event_dim], target[:, : config.target_dim]


def trained(
    config: AdapterConfig,
    weights: LossWeights,
    part: FeatureSlice = WHOLE,
    *,
    steps: int = 6,
    precision: Precision = "fp32",
    grad_clip: float = 1.0,
) -> tuple[list[StepResult], dict[str, Tensor], dict[str, Tensor]]:
    """Train a few steps; returns their results, the whole weights, and this worker's own parameters."""
    event_BE, target_BD = pairs_of(config)
    adapter = build_adapter(config, 3, part)
    event_columns, target_columns = adapter.columns(config, part)
    mean_D = target_BD.mean(dim=0)[target_columns] if weights.centred else None
    if part.count == 1:
        objective = AlignmentObjective(adapter, weights, mean_target_D=mean_D)
    else:
        objective = SlicedObjective(adapter, weights, mean_D)
    optimizer = make_optimizer(objective.train(), 1e-2, 0.01)
    results = [
        training_step(
            objective,
            optimizer,
            event_BE[:, event_columns],
            target_BD[:, target_columns],
            BatchNoise(0, step, 0, len(event_BE), len(event_BE)),
            global_pairs=len(event_BE),
            precision=precision,
            grad_clip=grad_clip,
        )
        for step in range(steps)
    ]
    return results, whole_weights(adapter), dict(objective.named_parameters())


def test_losses_of_wide_features_are_those_of_float64() -> None:
    config = config_of("lightweight", 8_000, 8_000, hidden_dim=32, depth=1, dropout=0.0)
    event_BE, target_BD = (side.double() for side in pairs_of(config))
    exact = AlignmentObjective(build_adapter(config, 3), LossWeights()).double()
    optimizer = make_optimizer(exact, 1e-2, 0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = exact.losses(exact.adapter(event_BE), target_BD)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    results, *_ = on_workers(2, lambda part: trained(config, LossWeights(), part))[0]
    assert [each.loss_sum / each.pairs for each in results] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("strategy", WIDE)
@pytest.mark.parametrize(("widths", "count"), [((31, 31), 3), ((30, 42), 2)])
def test_workers_with_slices_of_the_features_train_as_one_does(
    widths: tuple[int, int], count: int, strategy: str, losses: str
) -> None:
    """Sums in another order: losses of six steps to 1e-6, weights to 2e-5; of slices that differ in width, too.

    A `scale` that the losses do not see moves by rounding alone, which AdamW makes a step of.
    """
    config, weights = config_of(strategy, *widths), LOSSES[losses]
    alone, expected, _ = trained(config, weights)
    workers = on_workers(count, lambda part: trained(config, weights, part))
    for results, found, parameters in workers:
        for one, divided in zip(alone, results, strict=True):
            assert divided.pairs == one.pairs
            assert divided.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)
            assert divided.cos_sum == pytest.approx(one.cos_sum, rel=1e-6, abs=24e-7)
            assert divided.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        assert results == workers[0][0], "each worker has the same numbers, to the bit"
        for name, weight in expected.items():
            if (name, losses) != ("scale", "unit"):
                torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-5)
        divided_names = {f"adapter.{name}" for name in build_adapter(config, 0, FeatureSlice(0, count)).slices()}
        for name, weight in parameters.items():
            if name not in divided_names:
                assert torch.equal(weight, workers[0][2][name]), f"{name} is the same on each worker"


@pytest.mark.parametrize("strategy", WIDE)
def test_workers_start_with_parts_of_the_very_weights_of_one(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "BLOCK_NUMBERS", 100)  # drawn and gathered in many blocks
    config = config_of(strategy, 30, 42)
    expected = build_adapter(config, 5).state_dict()
    for found in on_workers(3, lambda part: whole_weights(build_adapter(config, 5, part))):
        assert list(found) == list(expected)
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("strategy", WIDE)
@pytest.mark.parametrize("widths", [(48, 48), (30, 42)])
def test_a_start_at_the_principal_subspaces_is_that_of_one_worker(strategy: str, widths: tuple[int, int]) -> None:
    config = config_of(strategy, *widths, rank=3)
    event, target = pairs_of(config)
    stats = compute_stats(in_batches(event, target), "subspaces", 3, len(event), seed=0)

    def started(part: FeatureSlice) -> dict[str, Tensor]:
        adapter = build_adapter(config, 0, part)
        adapter.initialize_from(stats, pca=True)
        return whole_weights(adapter)

    expected = started(WHOLE)
    for found in on_workers(2, started):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["lightweight", "lightweight_reference"])
def test_the_gradient_is_clipped_by_the_norm_of_all_workers(strategy: str) -> None:
    """A limit far below the norm: a slice clipped by its own norm alone would move further."""
    config = config_of(strategy)
    alone, expected, _ = trained(config, LossWeights(), grad_clip=1e-3)
    assert alone[0].grad_norm > 0.1
    for results, found, _ in on_workers(2, lambda part: trained(config, LossWeights(), part, grad_clip=1e-3)):
        assert results[0].grad_norm == pytest.approx(alone[0].grad_norm, rel=1e-5)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-5)


def test_under_bf16_autocast_losses_stay_near_those_of_one_worker() -> None:
    config = config_of("lightweight")
    alone, _, _ = trained(config, LossWeights(), precision="bf16")
    for results, _, _ in on_workers(2, lambda part: trained(config, LossWeights(), part, precision="bf16")):
        for one, divided in zip(alone, results, strict=True):
            assert divided.loss_sum == pytest.approx(one.loss_sum, rel=0.03)


def test_a_step_sends_hidden_activations_and_a_few_sums_a_pair() -> None:
    """Two of (B, H), four sums a pair, and one number for the norm of the gradient; `scale` has a gradient too."""
    sent: list[int] = []

    def counting(part: FeatureSlice) -> None:
        def all_reduce(own: Tensor) -> Tensor:
            sent.append(own.numel())
            return part.all_reduce(own)

        trained_part = FeatureSlice(part.index, part.count, all_reduce)
        config = config_of("lightweight_reference", hidden_dim=16)
        event, target = pairs_of(config)
        objective = SlicedObjective(build_adapter(config, 0, trained_part).train(), LossWeights())
        columns = objective.adapter.columns(config, trained_part)
        sides = (side[:, own] for side, own in zip((event, target), columns, strict=True))
        training_step(
            objective, make_optimizer(objective, 1e-3, 0.0), *sides, BatchNoise(0, 0, 0, 24, 24), global_pairs=24
        )

    on_workers(2, counting)
    assert sorted(sent) == sorted(2 * [24 * 16, 24 * 16, 4 * 24, 1, 1])


def test_the_cosine_matrix_and_the_cosine_of_zero_vectors_are_those_of_whole_features() -> None:
    config = config_of("bottleneck", dropout=0.0)
    aligned, target = pairs_of(config, 6)
    aligned = aligned.clone()
    aligned[2] = 0.0
    whole = AlignmentObjective(build_adapter(config, 0), LossWeights(contrastive=0.3))
    expected = whole.losses(aligned.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(expected["loss"].sum(), aligned)

    def divided(part: FeatureSlice) -> tuple[dict[str, Tensor], Tensor]:
        objective = SlicedObjective(build_adapter(config, 0, part), LossWeights(contrastive=0.3))
        _, columns = objective.adapter.columns(config, part)
        own = aligned.detach()[:, columns].requires_grad_()
        losses = objective.losses(own, target[:, columns])
        (own_gradient,) = torch.autograd.grad(losses["loss"].sum(), own)
        return losses, own_gradient

    found = on_workers(3, divided)
    for losses, _ in found:
        for key, value in expected.items():
            torch.testing.assert_close(losses[key], value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat([each for _, each in found], dim=1), gradient, atol=1e-6, rtol=1e-5)


def test_a_gathered_tensor_is_the_whole_one_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """−0, infinities and numbers that are none among them, cut along either dimension, in blocks of a few rows."""
    monkeypatch.setattr(slices, "BLOCK_NUMBERS", 30)
    whole = torch.randn(11, 14, generator=torch.Generator().manual_seed(0))
    whole[0, :4] = torch.tensor([-0.0, float("inf"), float("nan"), float("-inf")])
    bits = whole.view(torch.int32)

    def gathered(part: FeatureSlice, along: int) -> Tensor:
        place = [slice(0, size) for size in whole.shape]
        place[along] = part.of(whole.shape[along])
        return torch.cat(list(gather(whole[tuple(place)].contiguous(), TensorSlice(whole.shape, tuple(place)), part)))

    for along in (0, 1):
        for found in on_workers(3, lambda part, along=along: gathered(part, along)):
            assert torch.equal(found.view(torch.int32), bits)
