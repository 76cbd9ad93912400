"""Small sweeps for tests."""

from pathlib import Path
from typing import Any

import yaml

from ray_app.cli_settings import read_yaml, typed
from ray_app.commands.tune.command import recorded_config, run_tune
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.sweep_dir import SweepDir, settings_of_sweep
from ray_app.config.tune import TuneConfig

FIXED = {"strategy": "lightweight", "num_epochs": 3, "batch_size": 8, "cosine_weight": 1.0, "dropout": 0.0}


def spec_file(folder: Path, **lines: Any) -> Path:
    """A sweep of two widths, written to `sweep.yaml` in `folder`; `lines` replace or add keys."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"store": "S", "out": "O", "space": {"hidden_dim": [8, 16]}} | lines))
    return path


def sweep_config(path: Path, **flags: Any) -> TuneConfig:
    """Settings of a sweep's file, with flags over them."""
    return TuneConfig.model_validate(typed(read_yaml(path), TuneConfig.model_fields, str(path)) | flags)


def sized(tmp_path: Path, store: Path, **lines: Any) -> SweepContext:
    """The sweep of `spec_file` on a real store."""
    return SweepContext.open(sweep_config(spec_file(tmp_path, **lines), store=store))


def created(sweep: SweepContext) -> SweepDir:
    """Folder of a sweep that has just started."""
    folder = SweepDir(Path(sweep.cfg.out))
    identity = {"name": "s", "key": "k", "store_fingerprint": sweep.fingerprint}
    folder.create({**identity, "config": recorded_config(sweep.cfg)})
    return folder


def sweep_file(folder: Path, store: Path, name: str, **lines: Any) -> Path:
    path = folder / f"{name}.yaml"
    sweep = {"store": str(store), "out": str(folder / name), "base": FIXED, "search_alg": "grid", "scheduler": "none"}
    path.write_text(yaml.safe_dump(sweep | {"num_final_seeds": 2} | lines))
    return path


def tune(path: Path, **flags: Any) -> dict[str, Any]:
    uri = f"sqlite:///{path.parent / 'mlflow.db'}"
    return run_tune(sweep_config(path, **({"tracking_uri": uri, "final": False} | flags)))


def resume(folder: Path, **flags: Any) -> dict[str, Any]:
    """Resume a sweep as the command line does: with the settings that it was started with, and flags over them."""
    return run_tune(TuneConfig.model_validate(settings_of_sweep(str(folder)) | {"resume": str(folder)} | flags))
