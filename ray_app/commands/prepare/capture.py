"""`ray-app prepare capture`: hidden states of a capture as a pair store; no Ray, one window after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ray_app.commands.prepare.arrays import render_prepare_arrays, written
from ray_app.config.prepare import PrepareCapture
from ray_app.data.array_store import Row
from ray_app.errors import InputError
from ray_app.store.capture_store import TRACES, CapturedRow, StateReader, read_captured

Unit = Literal["token", "answer"]


def run_prepare_capture(cfg: PrepareCapture) -> dict[str, Any]:
    """Write the store. InputError: no finished capture with states. StoreError: --out is in the way."""
    settings, rows = read_captured(cfg.folder)
    rows = [row for row in rows if row.draft_tokens and row.target_tokens]
    if not rows:
        raise InputError(f"in {cfg.folder} no window has a token of both models, so there is no pair.")
    places = sum(min(len(row.draft_tokens), len(row.target_tokens)) for row in rows)
    source = {"name": "capture", "unit": cfg.unit, "capture": settings}
    how = {"source": source, "max_rejected_fraction": cfg.max_rejected_fraction}
    return written(
        cfg.out, pairs_of(cfg.folder, rows, cfg.unit), total=places if cfg.unit == "token" else len(rows), **how
    )


def pairs_of(folder: Path, rows: list[CapturedRow], unit: Unit) -> Iterator[Row]:
    """Yield the pairs of some windows. InputError: a file of states that is missing or damaged."""
    reader = StateReader(folder / TRACES)
    for row in rows:
        event_TD = reader.read(row.states, row.row, "draft", len(row.draft_tokens)).numpy()
        target_TD = reader.read(row.states, row.row, "target", len(row.target_tokens)).numpy()
        window = {"sequence": row.sequence, "t_start_us": row.t_start_us, "t_end_us": row.t_end_us}
        if unit == "answer":
            yield {"event": event_TD, "target": target_TD, **window}
            continue
        for event_D, target_D in zip(event_TD, target_TD, strict=False):
            yield {"event": event_D, "target": target_D, **window}


def render_prepare_capture(result: dict[str, Any], console: Console) -> None:
    """Print the result for people."""
    render_prepare_arrays(result, console)
