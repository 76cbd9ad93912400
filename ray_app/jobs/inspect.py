"""`ray-app inspect`: what is in a pair store, how it divides, and whether every byte of it still holds."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ray_app.config import InspectConfig
from ray_app.core.metrics import AlignmentCounts, cos_sim
from ray_app.errors import ConfigError, StoreError
from ray_app.store.durable import write_file
from ray_app.store.manifest import QUARANTINE
from ray_app.store.pair_store import PairStore, feature_matrix, verify_file
from ray_app.store.split import split_pairs

SHEET_COLUMNS, SHEET_ROWS = 4, 6
GAP, CAPTION = 6, 14


def run_inspect(cfg: InspectConfig) -> dict[str, Any]:
    """Reads every file once, verified. StoreError names the first that is damaged.

    With `durations`, counts, split and cosine are those of the pairs of these window lengths.
    """
    if cfg.picture and cfg.picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture {cfg.picture}: the contact sheet is a PNG file; end its name in .png.")
    store = PairStore.open(cfg.store, cfg.durations)
    before = _cosine_before(store)
    split = split_pairs(store.index, cfg.split_config)
    if cfg.picture:
        _write_contact_sheet(store, cfg.picture)
    manifest = store.manifest
    names, counts = np.unique(store.index.duration, return_counts=True)
    return {
        "store": str(cfg.store),
        "pairs": len(store.index),
        "sequences": len(np.unique(store.index.sequence)),
        "quarantined": manifest.quarantined,
        "fingerprint": manifest.fingerprint,
        "verified": True,
        "durations": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "source": manifest.source,
        "features": manifest.features.model_dump(mode="json"),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "split": {
            "by": split.by,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "test_windows_overlapping_train": split.test_windows_overlapping_train,
            "label": split.label,
        },
        "before": before,
        "picture": str(cfg.picture) if cfg.picture else None,
    }


def render_inspect(result: dict[str, Any], console: Console) -> None:
    """Prints the result for people."""
    source, split, before = result["source"], result["split"], result["before"]
    lost = f" (reasons in {QUARANTINE})" if result["quarantined"] else ""
    lengths = ", ".join(f"{count:,} of {name}" for name, count in result["durations"].items())
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("store", result["store"])
    table.add_row("source", f"{source['name']}, events {source['events']}")
    table.add_row("pairs", f"{result['pairs']:,}; windows: {lengths}")
    table.add_row("sequences", f"{result['sequences']:,}")
    table.add_row("quarantined", f"{result['quarantined']:,}{lost}")
    for side, spec in result["features"].items():
        shape = " × ".join(map(str, spec["shape"]))
        table.add_row(side, f"{shape} {spec['dtype']}, times {spec['scale']:.6g}")
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB in {result['files']:,} files")
    table.add_row("checksums", "all hold")
    table.add_row(
        "split", f"train {split['train']:,}, val {split['val']:,}, test {split['test']:,}: {split['label']}"
    )
    if before["cos_sim_mean"] is None:
        table.add_row("cos_sim before", "not defined: the two features differ in width")
    else:
        table.add_row("cos_sim before", f"{before['cos_sim_mean']:.4f} ± {before['cos_sim_std']:.4f}")
    table.add_row("fingerprint", result["fingerprint"])
    if result["picture"]:
        table.add_row("picture", result["picture"])
    console.print(table)


def _cosine_before(store: PairStore) -> dict[str, float | None]:
    """Mean and standard deviation of each pair's cosine as stored; every file is verified on the way."""
    event, target = store.feature("event"), store.feature("target")
    counts = AlignmentCounts()
    for file in track(
        range(len(store.files)),
        "verify",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ):
        table = store.table(file)
        rows = store.index.row[store.index.file == file]
        if event.width != target.width or not len(rows):
            continue
        event_ND = feature_matrix(table["event"], event)[rows]
        target_ND = feature_matrix(table["target"], target)[rows]
        # Scales are positive and leave a cosine as it is.
        counts += AlignmentCounts.of(cos_sim(torch.from_numpy(event_ND).float(), torch.from_numpy(target_ND).float()))
    verify_file(store.folder, store.manifest.quarantine)
    if not counts.pairs:
        return {"cos_sim_mean": None, "cos_sim_std": None}
    means = counts.means()
    return {name: means[name] for name in ("cos_sim_mean", "cos_sim_std")}


def _write_contact_sheet(store: PairStore, path: Path) -> None:
    """Pairs spread evenly over the store, each event picture to the left of its target."""
    event, target = store.feature("event"), store.feature("target")
    if any(spec.dtype != "uint8" or len(spec.shape) != 3 or spec.shape[0] != 3 for spec in (event, target)):
        raise ConfigError(f"--picture: the features of {store.folder} are not pictures; leave it out.")
    rows = np.unique(np.linspace(0, len(store.index) - 1, SHEET_COLUMNS * SHEET_ROWS).astype(np.int64))
    event_ND, target_ND = store.read_rows(rows)
    width = event.shape[2] + target.shape[2] + GAP
    height = max(event.shape[1], target.shape[1]) + CAPTION
    columns = min(SHEET_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, lines * (height + GAP) + GAP), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        for spec, picture_D, left in (
            (event, event_ND[i], x),
            (target, target_ND[i], x + width - target.shape[2]),
        ):
            picture_HWC = np.ascontiguousarray(picture_D.reshape(spec.shape).transpose(1, 2, 0))
            sheet.paste(Image.fromarray(picture_HWC), (left, y))
        caption = f"{store.index.sequence[row]}  {store.index.t_start_us[row] / 1e6:.2f} s"
        draw.text((x, y + height - CAPTION), caption, fill=(60, 60, 60))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getvalue())
    except OSError as error:
        raise StoreError(f"--picture {path} cannot be written: {error.strerror}.") from error
