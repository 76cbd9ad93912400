"""`ray-app import-checkpoint`: convert a checkpoint of the reference project."""

import sys
from typing import Any

from rich.console import Console

from ray_app.config.tune import ImportCheckpointConfig
from ray_app.core.adapters.registry import num_parameters
from ray_app.errors import CheckpointError
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.provenance import provenance
from ray_app.store.reference_checkpoint import read_reference_checkpoint


def run_import_checkpoint(cfg: ImportCheckpointConfig) -> dict[str, Any]:
    """Read, check and convert. CheckpointError: a file that cannot be used, or an --out that exists."""
    if cfg.out.exists():
        raise CheckpointError(f"{cfg.out} already exists; nothing is overwritten.")
    reference = read_reference_checkpoint(cfg.file)
    imported = {
        "file": str(cfg.file),
        "sha256": reference.sha256,
        "settings": reference.settings,
        "left_out": list(reference.left_out),
        "metrics": "unknown",
        "training_pairs": "unknown",
    }
    sha256 = save_checkpoint(
        cfg.out,
        reference.adapter,
        metrics={},
        provenance=provenance(sys.argv, imported_from=imported),
        features=reference.features,
    )
    return {
        "checkpoint": str(cfg.out),
        "checkpoint_sha256": sha256,
        "adapter": reference.adapter.config.to_dict(),
        "num_parameters": num_parameters(reference.adapter),
        "features": reference.features.model_dump(mode="json"),
        "imported_from": imported,
    }


def render_import_checkpoint(result: dict[str, Any], console: Console) -> None:
    """Print what was imported, what was left out, and what to do next."""
    adapter, imported = result["adapter"], result["imported_from"]
    lines = [
        f"{result['checkpoint']}: {adapter['strategy']}, {adapter['event_dim']:,} → {adapter['hidden_dim']:,} → "
        f"{adapter['target_dim']:,}, {result['num_parameters']:,} parameters",
        f"from {imported['file']}, SHA-256 {imported['sha256']}",
    ]
    if imported["left_out"]:
        lines.append(f"left out: {', '.join(imported['left_out'])}")
    lines.append("its metrics and training pairs are unknown; `ray-app evaluate` measures it on a store")
    for line in lines:
        console.print(line, soft_wrap=True)
