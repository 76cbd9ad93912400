"""`ray-app prepare arrays`: a pair store from files of features; no Ray, one file after the other."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_app.commands.prepare.sole_builder import sole_builder
from ray_app.config.prepare import PrepareArrays
from ray_app.data.array_store import Row, claim_folder, write_store
from ray_app.sources.array_files import open_arrays
from ray_app.store.filesystem import open_storage
from ray_app.terminal import make_console

COLUMNS = ("event", "target", "sequence", "t_start_us", "t_end_us")


def run_prepare_arrays(cfg: PrepareArrays) -> dict[str, Any]:
    """Write the store. InputError: the arrays cannot be read, or do not fit. StoreError: --out is in the way."""
    given = open_arrays(cfg.file, {name: getattr(cfg, name) for name in COLUMNS})
    source = {"files": [path.name for path in given.files], "bytes": [path.stat().st_size for path in given.files]}
    how = {"duration": cfg.duration, "source": source, "max_rejected_fraction": cfg.max_rejected_fraction}
    return written(cfg.out, given.rows, total=given.pairs, **(given.arrays or {}), **how)


def written(out: str, rows: Iterable[Row] | None, *, total: int, **how: Any) -> dict[str, Any]:
    """Write a store as `write_store` does, with progress; returns the --json object.

    StoreError: another `prepare` is at work in it.
    """
    began = time.perf_counter()
    console, folder = make_console(stderr=True), open_storage(out)
    columns = (TextColumn("prepare"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} pairs"))
    claim_folder(folder)
    with (
        sole_builder(folder),
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=total)
        manifest = write_store(folder, rows, progress=lambda done: bar.update(task, completed=done), **how)
    return {
        "store": str(out),
        "source": manifest.source,
        "features": {side: str(getattr(manifest.features, side)) for side in ("event", "target")},
        "pairs": manifest.pairs,
        "sequences": manifest.sequences,
        "rejected": manifest.rejected,
        "fingerprint": manifest.fingerprint,
        "durations": list(manifest.durations),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "seconds": round(time.perf_counter() - began, 3),
    }


def render_prepare_arrays(result: dict[str, Any], console: Console) -> None:
    """Print the store, its features and counts."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("store", "pairs", "sequences", "rejected", "fingerprint"):
        value = result[name]
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    for side, layout in result["features"].items():
        table.add_row(side, layout)
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB in {result['files']:,} files")
    console.print(table)
    if result["sequences"] == 1:
        console.print(
            "- all pairs are one sequence, so the test part is its last block; name sequences by --sequence to hold "
            "whole recordings out",
            style="yellow",
        )
