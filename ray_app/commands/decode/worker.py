"""The actor of `decode`: one replica, and the rows of its sequences, shard by shard.

A shard that is finished and holds is not decoded again: drafters learn its answers, as they did when it was decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_app.commands.decode.inputs import DecodeInput, DecodeRow, RowPictures, other_row
from ray_app.commands.decode.session import DecodeSession, OnPass
from ray_app.config.decode import DecodeConfig
from ray_app.core.speculative.prompts import AnsweredPrompt
from ray_app.errors import InputError, RayAppError
from ray_app.store.capture_store import Shard, read_shard, write_shard

SHARD_ROWS = 16
"""Most rows of a shard: what a kill costs each replica at most."""


@dataclass(frozen=True, slots=True)
class DecodeShard:
    """Neighbouring rows of one sequence."""

    name: str
    """Name of its files."""
    rows: tuple[DecodeRow, ...]
    """Rows in order."""


def shards_of(rows: Sequence[DecodeRow]) -> list[DecodeShard]:
    """Cut rows into shards; the cut depends on the input alone."""
    by_sequence: dict[str, list[DecodeRow]] = {}
    for row in rows:
        by_sequence.setdefault(row.sequence, []).append(row)
    return [
        DecodeShard(f"{mine[first].row:07d}", tuple(mine[first : first + SHARD_ROWS]))
        for mine in by_sequence.values()
        for first in range(0, len(mine), SHARD_ROWS)
    ]


def lanes_of(shards: Sequence[DecodeShard], num_lanes: int) -> list[list[DecodeShard]]:
    """Give whole sequences to replicas, the longest first, each to the one with the fewest rows so far."""
    by_sequence: dict[str, list[DecodeShard]] = {}
    for shard in shards:
        by_sequence.setdefault(shard.rows[0].sequence, []).append(shard)
    lanes: list[list[DecodeShard]] = [[] for _ in range(num_lanes)]
    sizes = [0] * num_lanes
    for mine in sorted(by_sequence.values(), key=lambda each: -sum(len(shard.rows) for shard in each)):
        lane = sizes.index(min(sizes))
        lanes[lane] += mine
        sizes[lane] += sum(len(shard.rows) for shard in mine)
    return [sorted(lane, key=lambda shard: shard.name) for lane in lanes]


class DecodeActor:
    """One replica; the models are loaded at its first shard, where an error can be given back."""

    def __init__(self, cfg: DecodeConfig, data: DecodeInput, answered: Sequence[AnsweredPrompt], device: str) -> None:
        self._cfg, self._data, self._answered, self._device = cfg, data, answered, device
        self._session: DecodeSession | None = None
        torch.set_num_threads(1)

    def ready(self) -> bool:
        """Answer: the replica has its resources."""
        return True

    def decode(self, shard: DecodeShard) -> dict[str, str]:
        """Decode a shard; shards come in order. Return the kind and text of an error, empty where there is none."""
        try:
            if self._session is None:
                self._session = DecodeSession(self._cfg, self._answered, self._device)
            decode_shard(self._session, self._cfg, self._data, shard)
        except RayAppError as error:
            return {"error": str(error), "kind": type(error).__name__}
        return {"error": "", "kind": ""}


def decode_lane(
    cfg: DecodeConfig,
    data: DecodeInput,
    lane: Sequence[DecodeShard],
    answered: Sequence[AnsweredPrompt],
    device: str,
    on_pass: OnPass | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Decode what is missing of some shards in this process, in order."""
    session = DecodeSession(cfg, answered, device)
    for shard in lane:
        decode_shard(session, cfg, data, shard, on_pass, on_row)


def decode_shard(
    session: DecodeSession,
    cfg: DecodeConfig,
    data: DecodeInput,
    shard: DecodeShard,
    on_pass: OnPass | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Decode a shard, or learn from it if it is finished. A row that cannot be decoded is rejected alone."""
    kept = read_shard(cfg.out, shard.name)
    if kept is not None and not kept.rejected:
        for line in kept.rows:
            session.learn(line)
        return
    lines: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for row, pictures in zip(shard.rows, data.read(shard.rows), strict=True):
        try:
            if isinstance(pictures, str):
                raise InputError(pictures)
            other = _other(data, row) if "other" in cfg.drafter_sees else None
            lines.append(session.decode(row, pictures, other, on_pass))
        except InputError as error:
            rejected.append({"row": row.row, "id": row.id, "sequence": row.sequence, "reason": str(error)})
            continue
        lines[-1]["weight_bytes"] = session.memory()
        if on_row is not None:
            on_row(lines[-1])
    write_shard(Path(cfg.out), shard.name, Shard(lines, rejected), {})


def _other(data: DecodeInput, row: DecodeRow) -> RowPictures:
    """Return the pictures of a row of another drive. InputError: they cannot be read."""
    other = other_row(data.rows, row)
    (pictures,) = data.read([other])
    if isinstance(pictures, str):
        raise InputError(f"--drafter-sees other takes the pictures of row {other.row}, and {pictures}")
    return pictures
