"""Saves of a tiny run whose numbers name their epoch, and the epoch that such a run would resume from."""

import torch

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.runs.run_dir import RunDir, checkpoint_name
from ray_app.store.checkpoint import load_checkpoint, load_training_state
from ray_app.store.manifest import Features, FeatureSpec

SPEC = FeatureSpec(dtype="float32", shape=(20,), scale=1.0)


def save(run: RunDir, epoch: int, hidden_dim: int = 3) -> None:
    """Saves an epoch as the best so far."""
    adapter = build_adapter(AdapterConfig("bottleneck", 20, 20, hidden_dim), 0)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.fill_(epoch)
    run.save(
        checkpoint_name(epoch),
        adapter,
        features=Features(event=SPEC, target=SPEC),
        metrics={"epoch": epoch},
        provenance={},
        tensors={"0.exp_avg": torch.full((20 * hidden_dim,), float(epoch))},
        meta={"epoch": epoch},
        best_epoch=epoch,
    )


def found(run: RunDir) -> int:
    """Return the epoch that training would resume from, after checking every byte of it."""
    name = run.latest_resumable()
    assert name is not None, "nothing to resume from"
    tensors, meta = load_training_state(run.state(name))
    epoch = meta["epoch"]
    assert name == checkpoint_name(epoch)
    assert (tensors["0.exp_avg"] == epoch).all()
    checkpoint = load_checkpoint(run.checkpoint(name))
    assert checkpoint.metrics == {"epoch": epoch}
    assert all((weight == epoch).all() for weight in checkpoint.adapter.parameters())
    best = run.best()
    assert best is not None
    load_checkpoint(best)
    return epoch
