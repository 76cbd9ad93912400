"""Losses and the optimizer step against NumPy in float64, and against themselves when divided."""

from typing import Any

import numpy as np
import pytest
import torch

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.losses import (
    AlignmentObjective,
    LossWeights,
    contrastive_per_pair,
    cosine_per_pair,
    mse_per_pair,
    rejection_per_pair,
)
from ray_app.core.optimizer_step import decode, make_optimizer, training_step
from ray_app.errors import TrainingError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def objective_of(dropout: float = 0.1, seed: int = 0, **weights: float) -> AlignmentObjective:
    return AlignmentObjective(
        build_adapter(AdapterConfig("lightweight", 20, 20, 8, dropout), seed), LossWeights(**weights)
    )


def test_losses_agree_with_numpy() -> None:
    a, b = draw(5, 9), draw(5, 9, seed=1)
    x, y = a.double().numpy(), b.double().numpy()
    cos = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(mse_per_pair(a, b), ((x - y) ** 2).mean(1), rtol=1e-5)
    np.testing.assert_allclose(cosine_per_pair(a, b), cos, rtol=1e-5)
    unit_x, unit_y = x / np.linalg.norm(x, axis=1)[:, None], y / np.linalg.norm(y, axis=1)[:, None]
    unit = AlignmentObjective(
        build_adapter(AdapterConfig("linear", 9, 9), 0), LossWeights(cosine=0, mse_space="unit")
    )
    np.testing.assert_allclose(unit.losses(a, b)["loss"], ((unit_x - unit_y) ** 2).mean(1), rtol=1e-4)
    logits = unit_x @ unit_y.T / 0.5
    rows = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(1))
    columns = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(0))
    cos_BB = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    found = contrastive_per_pair(cos_BB, cos_BB, 0, torch.tensor(0.5).log())
    np.testing.assert_allclose(found, (rows + columns) / 2, rtol=1e-4)


def test_soft_acceptance_and_centred_cosine_agree_with_numpy() -> None:
    """Alone in a loss: 1 / (1 + exp((cos − θ) / T)), the mean over θ; and 1 − centred cosine."""
    a, b, mean = draw(5, 9), draw(5, 9, seed=1), draw(9, seed=2)
    x, y, m = (each.double().numpy() for each in (a, b, mean))

    def cosine(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)

    rejected = sum(1 / (1 + np.exp((cosine(x, y) - theta) / 0.07)) for theta in (0.6, 0.9)) / 2
    found = rejection_per_pair(cosine_per_pair(a, b), (0.6, 0.9), 0.07)
    np.testing.assert_allclose(found, rejected, rtol=1e-4)
    assert 0.1 < rejected.mean() < 0.9, "or the sigmoid would be flat, and any temperature right"
    nothing = {"mse": 0.0, "cosine": 0.0}
    adapter = build_adapter(AdapterConfig("linear", 9, 9), 0)
    for weights, expected in (
        (LossWeights(**nothing, accept=2.0, accept_thetas=(0.6, 0.9), accept_temperature=0.07), 2.0 * rejected),
        (LossWeights(**nothing, centred=3.0), 3.0 * (1.0 - cosine(x - m, y - m))),
    ):
        losses = AlignmentObjective(adapter, weights, mean_target_D=mean).losses(a, b)
        np.testing.assert_allclose(losses["loss"], expected, rtol=1e-4)


def test_a_loss_is_composed_by_its_weights() -> None:
    aligned, target = draw(4, 20), draw(4, 20, seed=1)
    losses = objective_of(mse=2.0, cosine=3.0, contrastive=4.0).losses(aligned, target)
    whole = 2 * losses["mse"] + 3 * (1 - losses["cos_sim"]) + 4 * losses["contrastive"]
    assert torch.allclose(losses["loss"], whole)


def test_the_temperature_is_a_parameter_only_where_it_is_used() -> None:
    assert objective_of().log_temperature is None
    assert "log_temperature" in dict(objective_of(contrastive=0.1).named_parameters())


def test_two_parts_of_a_batch_give_the_gradient_of_the_whole() -> None:
    event, target = draw(8, 20), draw(8, 20, seed=1)
    whole, divided = objective_of(), objective_of()
    whole(event, target, BatchNoise(0, 0, 0, 8, 8))["loss"].mean().backward()
    for part, first in ((slice(0, 3), 0), (slice(3, 8), 3), (slice(8, 8), 8)):
        noise = BatchNoise(0, 0, first, len(event[part]), 8)
        (divided(event[part], target[part], noise)["loss"].sum() / 8).backward()
    for a, b in zip(whole.parameters(), divided.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_contrasts_with_all_workers_pairs_give_the_loss_and_the_gradient_of_the_whole_batch() -> None:
    event, target = draw(8, 20), draw(8, 20, seed=1)
    whole, divided = (objective_of(contrastive=0.5, dropout=0.0) for _ in range(2))
    expected = whole(event, target)
    expected["loss"].mean().backward()
    aligned, found = divided.adapter(event), []
    for part in (slice(0, 3), slice(3, 8), slice(8, 8)):
        divided.gather_pairs = lambda own, first=part.start: (aligned if own.requires_grad else target, first)
        found.append(divided.losses(aligned[part], target[part]))
    torch.testing.assert_close(torch.cat([each["contrastive"] for each in found]), expected["contrastive"])
    (torch.cat([each["loss"] for each in found]).sum() / 8).backward()
    for a, b in zip(whole.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_step_is_the_step_of_a_plain_loop() -> None:
    ours, plain = objective_of(dropout=0.0), objective_of(dropout=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01, foreach=False)
    mine = make_optimizer(ours, 1e-2, 0.01)
    for seed in range(5):
        event, target = draw(6, 20, seed=seed), draw(6, 20, seed=seed + 100)
        done = training_step(ours, mine, event, target, None, global_pairs=6)
        optimizer.zero_grad()
        aligned = plain.adapter(event)
        cos = torch.nn.functional.cosine_similarity(aligned, target)
        loss = ((aligned - target) ** 2).mean() + 0.5 * (1 - cos).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert done.loss_sum / 6 == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_before_any_weight_has_changed() -> None:
    objective = objective_of()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    event = draw(4, 20)
    event[1, 3] = float("nan")
    with pytest.raises(TrainingError, match="epoch 2, step 7"):
        training_step(
            objective,
            make_optimizer(objective, 1e-3, 0.0),
            event,
            draw(4, 20),
            BatchNoise(0, 0, 0, 4, 4),
            global_pairs=4,
            where="epoch 2, step 7",
        )
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


def test_losses_are_float32_under_bf16_autocast_and_near_those_without() -> None:
    objective, event, target = objective_of(dropout=0.0), draw(4, 20), draw(4, 20, seed=1)
    exact = objective(event, target)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(event, target)
    assert rough["loss"].dtype == torch.float32
    assert torch.allclose(rough["loss"], exact["loss"], rtol=0.03)


def test_the_contrastive_loss_of_no_pairs_has_a_gradient_of_zero() -> None:
    objective = objective_of(contrastive=1.0)
    losses = objective(draw(0, 20), draw(0, 20), BatchNoise(0, 0, 4, 0, 4))
    losses["loss"].sum().backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in objective.parameters())


def test_stored_bytes_become_features() -> None:
    stored = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert decode(stored, 1 / 255, torch.device("cpu")).tolist() == [pytest.approx([0.0, 0.2, 1.0])]
    assert stored.dtype == torch.uint8


def test_decoding_leaves_the_callers_features_as_they_are() -> None:
    """Float32 features need no conversion, so the scale must not be applied to the caller's own tensor."""
    for dtype in (torch.float32, torch.uint8, torch.bfloat16):
        stored = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(dtype)
        before = stored.clone()
        decoded = decode(stored, 0.5, torch.device("cpu"))
        assert torch.equal(decoded, torch.tensor([[0.5, 1.0], [1.5, 2.0]]))
        assert torch.equal(stored, before)


def grad_norm(**options: Any) -> float:
    """Norm of one step's gradient before it is clipped, of 4 pairs; the step changes nothing."""
    objective = objective_of(dropout=0.0)
    optimizer = make_optimizer(objective, 0.0, 0.0)
    return training_step(objective, optimizer, draw(4, 20), draw(4, 20, seed=1), None, **options).grad_norm


def test_a_worker_s_gradient_is_scaled_so_that_the_mean_over_workers_is_that_of_the_global_batch() -> None:
    alone = grad_norm(global_pairs=4)
    assert grad_norm(global_pairs=8) == pytest.approx(alone / 2, rel=1e-5), "half of the batch, one worker"
    assert grad_norm(global_pairs=8, world_size=2) == pytest.approx(alone, rel=1e-5), "DDP halves it again"


def test_the_precision_of_a_step_is_that_of_its_forward_pass() -> None:
    assert grad_norm(global_pairs=4, precision="bf16") != grad_norm(global_pairs=4)
    objective = objective_of(dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = objective(draw(4, 20), draw(4, 20, seed=1))["loss"].sum().item()
    done = training_step(
        objective,
        make_optimizer(objective, 0.0, 0.0),
        draw(4, 20),
        draw(4, 20, seed=1),
        None,
        global_pairs=4,
        precision="bf16",
    )
    assert done.loss_sum == pytest.approx(expected, rel=1e-6)
