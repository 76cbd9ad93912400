"""Building a pair store part by part, resumably: what `prepare` does on each worker, and at the end.

While it is built the folder holds `.prepare/`, with the settings and a record for each finished task. A
second start with the same settings keeps what is finished and continues.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_app.config.base import Config
from ray_app.errors import InputError, StoreError
from ray_app.events.windows import parse_duration
from ray_app.parsing.json_text import parse_object
from ray_app.sources.base import RawPair, RejectedPair, Source, SourceTask
from ray_app.sources.images import resized
from ray_app.store.filesystem import StorageDir, Where, open_storage
from ray_app.store.manifest import (
    SCRATCH,
    Features,
    FeatureSpec,
    Manifest,
    PartRecord,
    RejectedLine,
    rejected_lines,
    require_claimable,
    require_few_rejected,
)
from ray_app.store.pair_store import (
    FACT_COLUMNS,
    Pair,
    publish,
    read_index,
    read_part,
    write_part,
    write_table,
)

SETTINGS_FILE = "settings.json"


class PairEncoder(Protocol):
    """Turns raw pairs into the bytes that are stored."""

    num_pairs: int
    """Pairs that it is given at a time, at most; a file is cut into such batches from its beginning."""

    def __call__(self, pairs: Sequence[RawPair]) -> list[tuple[bytes, bytes] | str]:
        """Return event and target bytes of each pair, or the reason why it has none."""
        ...


class PixelEncoder:
    """Pictures resized to the store's shape."""

    num_pairs = 1

    def __init__(self, features: Features) -> None:
        self._features = features

    def __call__(self, pairs: Sequence[RawPair]) -> list[tuple[bytes, bytes] | str]:
        event, target = self._features.event, self._features.target
        return [(pixel_bytes(pair.event_HWC, event), pixel_bytes(pair.target_HWC, target)) for pair in pairs]


def pixel_bytes(image_HWC: NDArray[np.uint8], spec: FeatureSpec) -> bytes:
    """Return a picture, resized, as the bytes of a feature."""
    return resized(image_HWC, *spec.shape[1:]).tobytes()


class BuiltTask(Config):
    """Outcome of one task; also its record in `.prepare/`."""

    task: str
    """Name of the task."""
    part: PartRecord | None
    """The file, or None where no pair could be built."""
    rejected: tuple[RejectedLine, ...]
    """Pairs that are not in it."""
    windows: int = 0
    """Windows of its pairs: one window can give several."""
    events_covered: int = 0
    """Events in these windows, if the source knows; events that windows share count in each."""
    events_drawn: int = 0
    """Events that were read and drawn, likewise."""

    @property
    def num_pairs(self) -> int:
        """Pairs in the file."""
        return self.part.pairs if self.part else 0


def claim_store(where: Where, source: Source, tasks: list[SourceTask], features: Features) -> None:
    """Make the folder ours. StoreError unless it is new, empty, or a cut-off prepare of these settings."""
    folder = open_storage(where)
    names = [task.name for task in tasks]
    assert names, "a source without tasks raises InputError"
    assert names == sorted(set(names)), "names of tasks are unique and sorted"
    assert all(re.fullmatch(r"\w[\w.-]*", name, re.ASCII) for name in names), "names of tasks are file names"
    settings = {
        "source": described(source),
        "features": features.model_dump(mode="json"),
        "tasks": [[task.name, task.num_pairs, task.spec] for task in tasks],
    }
    text = json.dumps(settings, sort_keys=True)
    there = require_claimable(folder)
    claimed = _read(folder, SETTINGS_FILE) if SCRATCH in there else None
    if claimed is not None:
        if claimed != text.encode():
            raise StoreError(
                f"{folder} holds an interrupted prepare of {_difference(claimed, features)}; repeat that command to "
                "finish it, or name another folder for --out."
            )
    elif there - {SCRATCH}:
        raise StoreError(f"{folder} already holds something else; --out must be a new or empty folder.")
    else:
        folder.write(f"{SCRATCH}/{SETTINGS_FILE}", text.encode())


def build_task(
    source: Source,
    task: SourceTask,
    where: Where,
    features: Features,
    encoder: PairEncoder | None = None,
    items: Iterable[RawPair | RejectedPair] | None = None,
) -> BuiltTask:
    """Build one file, and its record after it. A pair that cannot be built costs itself alone.

    `encoder`: makes what is stored of a pair; default: its pixels. `items`: the task's pairs, where they are read.
    """
    folder = open_storage(where)
    encoder = encoder or PixelEncoder(features)
    lengths_us = {parse_duration(name): name for name in source.durations()}
    pairs: dict[str, Pair] = {}
    rejected = []
    events_in: dict[tuple[str, int, int], int] = {}
    drawn = 0
    for item, stored in _encoded(iter(items or all_of(source, task)), encoder):
        if isinstance(item, RejectedPair):
            rejected.append(RejectedLine(input=item.input, position=item.position, reason=item.reason))
            continue
        if isinstance(stored, str):
            rejected.append(_line(item.sequence, item.t_start_us, item.t_end_us, stored))
            continue
        pair = Pair(
            item.sequence,
            item.t_start_us,
            item.t_end_us,
            *stored,
            **{name: getattr(item, name) for name in FACT_COLUMNS},
        )
        if reason := _flaw(pair, lengths_us):
            rejected.append(_line(pair.sequence, pair.t_start_us, pair.t_end_us, reason))
        elif pair.sample_id in pairs:
            rejected.append(_line(pair.sequence, pair.t_start_us, pair.t_end_us, "the same pair once more"))
        else:
            pairs[pair.sample_id] = pair
            events_in[item.sequence, item.t_start_us, item.t_end_us] = item.num_events or 0
            drawn += item.num_drawn or 0
    part = write_part(folder, f"{task.name}.parquet", list(pairs.values()), features) if pairs else None
    done = BuiltTask(
        task=task.name,
        part=part,
        rejected=tuple(rejected),
        windows=len(events_in),
        events_covered=sum(events_in.values()),
        events_drawn=drawn,
    )
    _record(folder, done)
    return done


def finished(where: Where, task: SourceTask) -> BuiltTask | None:
    """Return what an interrupted prepare left of a task, if its file verifies and has all its pairs."""
    folder = open_storage(where)
    record = _read(folder, f"{task.name}.json")
    try:
        done = BuiltTask.model_validate_json(record or b"")
        if done.part is None or done.rejected or folder.sha256(done.part.name) != done.part.sha256:
            return None
    except (FileNotFoundError, ValueError):  # ValueError: not such a record
        return None
    return done


def finish(
    where: Where, source: Source, built: list[BuiltTask], features: Features, max_rejected_fraction: float
) -> Manifest:
    """Set pairs aside that an earlier file holds too, then publishes the store.

    StoreError where more than the share `max_rejected_fraction` of all pairs could not be built; everything stays.
    """
    folder = open_storage(where)
    built = _without_duplicates(folder, built)
    lines = [line for done in built for line in done.rejected]
    pairs = sum(done.num_pairs for done in built)
    require_few_rejected(folder, lines, pairs + len(lines), max_rejected_fraction)
    manifest = publish(
        folder,
        [done.part for done in built if done.part],
        features=features,
        durations={name: parse_duration(name) for name in source.durations()},
        source=described(source),
        rejected=rejected_lines(lines),
    )
    folder.delete(SCRATCH)
    return manifest


def described(source: Source) -> dict[str, Any]:
    """Kind and settings of a source, for the manifest."""
    return {"name": source.name, **source.describe()}


def _encoded(
    items: Iterator[RawPair | RejectedPair], encoder: PairEncoder
) -> Iterator[tuple[RawPair | RejectedPair, tuple[bytes, bytes] | str]]:
    """Yield each item with what is stored of it, batch by batch, in order; of a rejected pair that is its reason."""
    while batch := list(islice(items, encoder.num_pairs)):
        stored = iter(encoder([item for item in batch if isinstance(item, RawPair)]))
        for item in batch:
            yield item, item.reason if isinstance(item, RejectedPair) else next(stored)


def all_of(source: Source, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
    """Yield the task's pairs; where its input breaks off, each pair that is missing as rejected."""
    seen = 0
    try:
        for item in source.pairs(task):
            seen += 1
            yield item
    except (InputError, OSError) as error:
        for i in range(seen, task.num_pairs):
            yield RejectedPair(task.name, f"pair {i} of {task.num_pairs}", str(error))


def _difference(claimed: bytes, features: Features) -> str:
    """Return the difference between an interrupted prepare and these settings, in words."""
    theirs = parse_object(claimed)["features"]
    for side in ("event", "target"):
        before, now = theirs[side].get("encoder"), getattr(features, side).encoder
        if before and now and before["sha256"] != now.sha256:
            return (
                f"another {side} encoder: its SHA-256 was {before['sha256'][:12]}…, that of {now.model} is now "
                f"{now.sha256[:12]}…, so its weights or its config have changed"
            )
    return "other settings or inputs"


def _flaw(pair: Pair, lengths_us: dict[int, str]) -> str:
    """Return the reason why a pair cannot be stored, or an empty text."""
    length_us = pair.t_end_us - pair.t_start_us
    if length_us not in lengths_us:
        return f"the window is {length_us} µs long, not {' or '.join(lengths_us.values())}"
    for side in ("event", "target"):
        if not any(getattr(pair, side)):
            return f"the {side} picture is black throughout, and a zero vector has no cosine"
    return ""


def _line(sequence: str, t_start_us: int, t_end_us: int, reason: str) -> RejectedLine:
    return RejectedLine(input=sequence, position=f"window [{t_start_us}, {t_end_us})", reason=reason)


def _record(folder: StorageDir, done: BuiltTask) -> None:
    folder.write(f"{SCRATCH}/{done.task}.json", done.model_dump_json().encode())


def _read(folder: StorageDir, name: str) -> bytes | None:
    """Return a file of the scratch folder, or None."""
    try:
        return folder.read(f"{SCRATCH}/{name}")
    except FileNotFoundError:
        return None


def _without_duplicates(folder: StorageDir, built: list[BuiltTask]) -> list[BuiltTask]:
    """Rewrites files that hold a pair of an earlier one."""
    seen: dict[str, str] = {}
    result = []
    for done in built:
        if done.part:
            index = read_index(folder, done.part).to_pylist()
            twice = [row["sample_id"] in seen for row in index]
            if any(twice):
                done = _without_rows(folder, done, twice, [seen.get(row["sample_id"], "") for row in index])
            seen |= {row["sample_id"]: done.task for row in index if row["sample_id"] not in seen}
        result.append(done)
    return result


def _without_rows(folder: StorageDir, done: BuiltTask, twice: list[bool], holder: list[str]) -> BuiltTask:
    assert done.part
    table = read_part(folder, done.part)
    rows = table.select(["sequence", "t_start_us", "t_end_us"]).to_pylist()
    lines = [
        _line(row["sequence"], row["t_start_us"], row["t_end_us"], f"the same pair as in {where}")
        for row, where in zip(rows, holder, strict=True)
        if where
    ]
    kept = table.filter(pa.array([not t for t in twice]))
    folder.delete(f"{SCRATCH}/{done.task}.json")  # until both files are new, the task counts as unfinished
    if kept.num_rows:
        part = write_table(folder, done.part.name, kept)
    else:
        folder.delete(done.part.name)
        part = None
    done = done.model_copy(update={"part": part, "rejected": (*done.rejected, *lines)})
    _record(folder, done)
    return done
