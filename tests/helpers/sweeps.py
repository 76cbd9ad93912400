"""Small sweeps for tests."""

from pathlib import Path
from typing import Any

import yaml

from ray_app.commands.tune.command import run_tune
from ray_app.commands.tune.spec import SweepSpec, read_spec
from ray_app.config.tune import TuneConfig

FIXED = {"strategy": "lightweight", "num_epochs": 3, "batch_size": 8, "cosine_weight": 1.0, "dropout": 0.0}


def spec_file(folder: Path, **lines: Any) -> Path:
    """A sweep of two widths, written to `sweep.yaml` in `folder`; `lines` replace or add keys."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"store": "S", "out": "O", "space": {"hidden_dim": [8, 16]}} | lines))
    return path


def sized(tmp_path: Path, store: Path, **lines: Any) -> SweepSpec:
    """The same sweep on a real store, read and checked."""
    return read_spec(spec_file(tmp_path, **lines), {"store": store})


def sweep_file(folder: Path, store: Path, name: str, **lines: Any) -> Path:
    path = folder / f"{name}.yaml"
    sweep = {"store": str(store), "out": str(folder / name), "base": FIXED, "search_alg": "grid", "scheduler": "none"}
    path.write_text(yaml.safe_dump(sweep | {"num_final_seeds": 2} | lines))
    return path


def tune(path: Path, **flags: Any) -> dict[str, Any]:
    uri = f"sqlite:///{path.parent / 'mlflow.db'}"
    return run_tune(TuneConfig(file=path, **({"tracking_uri": uri, "final": False} | flags)))
