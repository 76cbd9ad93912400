"""Every strategy is served as it was judged: the endpoint's cosines and verdicts are the evaluator's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from endpoints import local_server
from small_adapters import perturbed, small_adapter

from ray_app.client import AlignmentClient
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.evaluation import AlignmentEvaluator
from ray_app.core.metrics import THETA, THETAS, AlignmentCounts
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec

PAIRS, LIMIT, TOKEN = 32, 6, 8


def pairs(*, tokens: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets not far from their events. Of sequences each side ends where it likes, and the last tokens are long."""
    generator = torch.Generator().manual_seed(3)
    event = torch.randn(PAIRS, LIMIT, TOKEN, generator=generator)
    target = event + 0.5 * torch.randn(event.shape, generator=generator)
    if tokens:
        for side in (event, target):
            lengths = torch.randint(1, LIMIT + 1, (PAIRS, 1), generator=generator)
            side *= torch.linspace(1.0, 9.0, LIMIT)[:, None] * (torch.arange(LIMIT) < lengths)[..., None]
    return event.flatten(1), target.flatten(1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_served_of_a_strategy_is_what_was_evaluated(tmp_path: Path, strategy: str) -> None:
    tokens = strategy.startswith("token_")
    adapter = perturbed(small_adapter(strategy)).eval()
    spec = FeatureSpec(dtype="float32", shape=adapter.config.event_shape, scale=1.0)
    features = Features(event=spec, target=spec)
    evaluator = AlignmentEvaluator(adapter, torch.ones(spec.width), 1.0, 1.0, token_width=spec.token_width)
    event, target = pairs(tokens=tokens)
    judged = evaluator.add(event, target)
    theta = float(judged["after"].median()) + 1e-4
    val = AlignmentCounts.of(judged["after"]).means()
    save_checkpoint(tmp_path / "it", adapter, metrics={"val": val}, provenance={}, features=features)
    flat = torch.nn.functional.cosine_similarity(adapter(event), target).detach()
    assert torch.allclose(flat, judged["after"], atol=1e-3) != tokens, "or the test could not tell the two apart"
    with local_server(tmp_path / "it", max_batch=PAIRS, max_queue=64) as server:
        client = AlignmentClient(f"http://{server.url}")
        for wire in ("binary", "json"):
            answer = client.verify(event.numpy(), target.numpy(), theta=theta, wire=wire)
            np.testing.assert_allclose(answer.cos_sim_B, judged["after"], atol=1e-5)
            assert answer.accepted_B.tolist() == (judged["after"] > theta).tolist()
        tensors = {"event": event.tolist(), "target": target.tolist()}
        before = [pair["before"] for pair in client.v1("verify", tensors)["pairs"]]
        np.testing.assert_allclose(before, judged["before"], atol=1e-5)
        curve, stats = client.model()["acceptance_curve"], server.json("GET", "/v1/stats")[1]
    shown = dict(zip(curve["theta"], curve["adapter"], strict=True))
    assert shown == {theta: float((judged["after"] > theta).double().mean()) for theta in THETAS}
    verified = stats["verified"]
    assert verified["pairs"] == 3 * PAIRS
    assert verified["accepted"] == 3 * int((judged["after"] > THETA).sum())
    assert verified["cos_sim_mean"] == pytest.approx(val["cos_sim_mean"], abs=1e-5)
