"""Small sweeps for tests."""

from pathlib import Path
from typing import Any

import yaml

from ray_app.commands.tune.command import run_tune
from ray_app.config.tune import TuneConfig

FIXED = {"strategy": "lightweight", "num_epochs": 3, "batch_size": 8, "cosine_weight": 1.0, "dropout": 0.0}


def sweep_file(folder: Path, store: Path, name: str, **lines: Any) -> Path:
    path = folder / f"{name}.yaml"
    sweep = {"store": str(store), "out": str(folder / name), "fixed": FIXED, "searcher": "grid", "scheduler": "none"}
    path.write_text(yaml.safe_dump(sweep | {"final_seeds": 2} | lines))
    return path


def tune(path: Path, **flags: Any) -> dict[str, Any]:
    uri = f"sqlite:///{path.parent / 'mlflow.db'}"
    return run_tune(TuneConfig(file=path, **({"tracking_uri": uri, "final": False} | flags)))
