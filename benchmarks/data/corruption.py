"""Flip single bits in, and cut the end off, every kind of file that is written; count what is found before use.

Each count comes with what a plain reader notices of the same damaged bytes, without our checksums.

    python -m benchmarks.data.corruption
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks.provenance import require_commit, save
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.errors import RayAppError
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries
from ray_app.store.checkpoint import load_checkpoint, load_training_state, save_checkpoint, save_training_state
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part

SPEC = FeatureSpec(dtype="uint8", shape=(3, 8, 8), scale=1 / 255)
BOTH = Features(event=SPEC, target=SPEC)
NUM_FLIPS, NUM_CUTS = 120, 100
NOTICED = (SafetensorError, ValueError, KeyError, OSError, pa.ArrowException, subprocess.CalledProcessError)
"""What plain loaders raise: of a broken header, broken JSON or UTF-8, a broken footer or page."""


@dataclass(frozen=True)
class Kind:
    """One kind of file, with the way in which this program reads it and a plain one."""

    path: Path
    """An intact file."""
    checked: Callable[[], Any]
    """Reads it as the program does before it uses it."""
    plain: Callable[[Path], Any]
    """Reads it without our checks."""


def kinds(folder: Path) -> list[Kind]:
    """Write a checkpoint, a training state, a store and an event log with the product's own functions."""
    checkpoint, state, store, run = (folder / name for name in ("checkpoint", "state", "store", "run"))
    adapter = build_adapter(AdapterConfig("bottleneck", SPEC.width, SPEC.width, hidden_dim=8), 0)
    numbers = {f"number_{i}": i / 7 for i in range(8)}
    save_checkpoint(checkpoint, adapter, metrics=numbers, provenance={"argv": [*numbers]}, features=BOTH)
    save_training_state(state, {"0.exp_avg": torch.rand(900), "0.step": torch.tensor(7.0)}, numbers)
    store.mkdir()
    rng = np.random.default_rng(0)
    pairs = [Pair("drive", i, i + 100, rng.bytes(SPEC.num_bytes), rng.bytes(SPEC.num_bytes)) for i in range(40)]
    part = write_part(store, "drive.parquet", pairs, BOTH)
    line = json.dumps({"input": "drive", "position": "window [0, 100)", "reason": "the target picture is black"})
    rejected_lines = f"{line}\n".encode() * 5
    publish(store, [part], features=BOTH, durations={"100us": 100}, source={"name": "x"}, rejected=rejected_lines)
    run.mkdir()
    with EventLog(run) as log:
        for step in range(1, 41):
            log.write("step", global_step=step, loss=1 / step)

    def stored() -> None:
        PairStore.open(store).table(0)

    def loaded() -> None:
        load_checkpoint(checkpoint)

    def resumed() -> None:
        load_training_state(state)

    readers = ((checkpoint, loaded), (state, resumed), (store, stored))
    found = [Kind(path, read, _plain(path)) for parent, read in readers for path in sorted(parent.iterdir())]
    found.append(Kind(run / EVENT_LOG, lambda: entries(run), _plain(run / EVENT_LOG)))
    for kind in found:  # intact, both ways of reading it are content
        kind.checked()
        kind.plain(kind.path)
    return found


def damaged(intact: bytes, num_flips: int, num_cuts: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield (`flips` or `cuts`, damaged bytes): single bits anywhere; lengths from 0 to all but one byte.

    A text is also cut at line ends, where the rest still looks whole.
    """
    for bit in rng.choice(len(intact) * 8, min(num_flips, len(intact) * 8), replace=False).tolist():
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        yield "flips", bytes(flipped)
    cuts = {*rng.choice(len(intact), min(num_cuts, len(intact)), replace=False).tolist()}
    if intact.isascii():
        ends = [i + 1 for i, byte in enumerate(intact[:-1]) if byte == 0x0A]
        cuts |= {*ends[:num_cuts]}
    for length in sorted(cuts):
        yield "cuts", intact[:length]


def measure(kind: Kind, num_flips: int, num_cuts: int, seed: int) -> dict[str, dict[str, int]]:
    """Count how often damage was tried, found, named, and noticed by plain loading."""
    intact = kind.path.read_bytes()
    logged = entries(kind.path.parent) if kind.path.name == EVENT_LOG else []
    counts = {how: {"tried": 0, "found": 0, "named": 0, "plain_noticed": 0} for how in ("flips", "cuts")}
    for how, data in damaged(intact, num_flips, num_cuts, np.random.default_rng(seed)):
        count = counts[how]
        kind.path.write_bytes(data)
        count["tried"] += 1
        try:
            read = kind.checked()
        except RayAppError as error:
            count["found"] += 1
            count["named"] += kind.path.name in str(error)
        else:
            if kind.path.name == EVENT_LOG and read == logged[: data.count(b"\n")]:
                count["left_out"] = count.get("left_out", 0) + 1
        try:
            kind.plain(kind.path)
        except NOTICED:
            count["plain_noticed"] += 1
    kind.path.write_bytes(intact)
    kind.checked()
    return counts


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {
            str(kind.path.relative_to(folder)): {
                "bytes": kind.path.stat().st_size,
                **measure(kind, NUM_FLIPS, NUM_CUTS, seed),
            }
            for seed, kind in enumerate(kinds(Path(folder)))
        }
    save(
        "corruption",
        {
            "what": "single-bit flips and truncations at seeded random places; found: our error before the content "
            "is used; named: the error names the file; plain_noticed: safetensors load_file, json.loads, pyarrow "
            "read_table or sha256sum -c raised on the same bytes",
            "left_out": "of the event log, whose last line may be cut by a kill: a line without its end is left out, "
            "and every whole line before it read as written",
            "files": table,
        },
    )


def _plain(path: Path) -> Callable[[Path], Any]:
    match path.suffix:
        case ".safetensors":
            return load_file
        case ".json":
            return lambda path: json.loads(path.read_text())
        case ".jsonl":
            return lambda path: [json.loads(line) for line in path.read_text().splitlines()]
        case ".parquet":
            return pq.read_table
        case ".sha256":
            return _sha256sum
    raise AssertionError(f"no plain loader for {path}")


def _sha256sum(path: Path) -> None:
    """Check a list with the common tool for it, the fairest plain reader."""
    subprocess.run(["sha256sum", "--check", path.name], cwd=path.parent, check=True, capture_output=True)


if __name__ == "__main__":
    require_commit()
    main()
