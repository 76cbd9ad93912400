"""Rows to decode, from prompts, from a pair store, or from videos: a question each, and pictures where there are any.

Shapes: T = frames, H, W = pixels, C = 3 colours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator

from ray_app.config.decode import DecodeConfig
from ray_app.errors import ConfigError, InputError
from ray_app.events.windows import parse_duration
from ray_app.language_models.model import Frames
from ray_app.parsing.json_text import require_few_members
from ray_app.parsing.text import read_utf8
from ray_app.sources.base import RejectedPair
from ray_app.sources.clips import ClipWindow, clip_windows, clips
from ray_app.sources.images import read_image
from ray_app.sources.video import identity
from ray_app.store.atomic import sha256_file
from ray_app.store.manifest import MANIFEST
from ray_app.store.pair_store import PairStore


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One row before its pictures are read."""

    row: int
    """Place in the order of decoding."""
    id: str
    """Name of the row in its source."""
    sequence: str
    """The continuous drive that it is from."""
    question: str
    """Question to the models."""
    draft_tokens: tuple[int, ...] = ()
    """The event model's own answer, where the source has it."""
    t_start_us: int | None = None
    """Start of the window, where it is one."""
    t_end_us: int | None = None
    """End of the window."""


@dataclass(frozen=True, slots=True)
class RowPictures:
    """Pictures of a row."""

    frames_THWC: Frames | None = None
    """The camera's frames."""
    events_THWC: Frames | None = None
    """Event images."""


class DecodeInput(Protocol):
    """Rows of a source, and their pictures."""

    @property
    def rows(self) -> tuple[DecodeRow, ...]:
        """All rows, those of a sequence next to each other."""
        ...

    def read(self, rows: Sequence[DecodeRow]) -> Iterator[RowPictures | str]:
        """Yield the pictures of some rows of one sequence, or the reason why there are none."""
        ...

    def describe(self) -> Any:
        """Return what identifies the input, as JSON values."""
        ...


@dataclass(frozen=True, slots=True)
class ClipInput:
    """Windows of videos."""

    rows: tuple[DecodeRow, ...]
    """One for each window."""
    windows: tuple[ClipWindow, ...]
    """The windows, by row."""

    def read(self, rows: Sequence[DecodeRow]) -> Iterator[RowPictures | str]:
        for clip in clips([self.windows[row.row] for row in rows]):
            yield clip.reason if isinstance(clip, RejectedPair) else RowPictures(clip.frames_THWC)

    def describe(self) -> Any:
        paths = dict.fromkeys((window.sequence, window.path) for window in self.windows)
        return [{"sequence": name, **identity(path)} for name, path in paths]


@dataclass(frozen=True, slots=True)
class StoreInput:
    """Pairs of pictures: the target feature is the frame, the event feature the event image."""

    rows: tuple[DecodeRow, ...]
    """One for each pair."""
    store: PairStore
    """The store."""
    positions: tuple[int, ...]
    """Position of each row in the store's index."""

    def read(self, rows: Sequence[DecodeRow]) -> Iterator[RowPictures | str]:
        event_ND, target_ND = self.store.read_rows([self.positions[row.row] for row in rows])
        for event_D, target_D in zip(event_ND, target_ND, strict=True):
            yield RowPictures(self._picture("target", target_D), self._picture("event", event_D))

    def _picture(self, side: str, values_D: NDArray[np.uint8]) -> Frames:
        return values_D.reshape(self.store.feature(side).shape).transpose(1, 2, 0)[None]

    def describe(self) -> Any:
        return {"fingerprint": self.store.fingerprint}


class PromptLine(BaseModel):
    """A line of a file of prompts; paths are relative to the file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    id: str | None = None
    """Name of the row."""
    sequence: str = ""
    """The continuous drive that it is from."""
    question: str | None = None
    """Question to the models."""
    frames: Annotated[list[str], FailFast()] = []
    """Image files that the target sees."""
    events: Annotated[list[str], FailFast()] = []
    """Event images that a drafter may see."""
    draft_tokens: Annotated[list[int], FailFast()] = []
    """The event model's own answer in the target's tokens."""

    _few = model_validator(mode="before")(require_few_members)


@dataclass(frozen=True, slots=True)
class PromptInput:
    """Lines of a file of prompts."""

    rows: tuple[DecodeRow, ...]
    """One for each line."""
    lines: tuple[PromptLine, ...]
    """The lines, by row."""
    path: Path
    """The file."""

    def read(self, rows: Sequence[DecodeRow]) -> Iterator[RowPictures | str]:
        for row in rows:
            line = self.lines[row.row]
            try:
                yield RowPictures(self._pictures(line.frames), self._pictures(line.events))
            except InputError as error:
                yield str(error)

    def _pictures(self, names: Sequence[str]) -> Frames | None:
        if not names:
            return None
        found = [read_image(self.path.parent / name) for name in names]
        if len({picture.shape for picture in found}) > 1:
            raise InputError(f"{names[0]} and the pictures with it are not of one size")
        return np.stack(found)

    def describe(self) -> Any:
        return {"sha256": sha256_file(self.path)}


def open_input(cfg: DecodeConfig) -> DecodeInput:
    """Return the rows of a source. InputError, StoreError: it cannot be read. ConfigError: no such kind."""
    first = cfg.source[0]
    if first.suffix == ".jsonl" or (first / MANIFEST).is_file():
        if len(cfg.source) > 1:
            raise ConfigError(f"decode takes one store or one file of prompts; {len(cfg.source)} were given.")
        return _prompts(cfg, first) if first.suffix == ".jsonl" else _store(cfg, first)
    return _clips(cfg)


def other_row(rows: Sequence[DecodeRow], row: DecodeRow) -> DecodeRow:
    """Return the row at the same place of the next sequence. ConfigError: there is one sequence only."""
    by_sequence: dict[str, list[DecodeRow]] = {}
    for each in rows:
        by_sequence.setdefault(each.sequence, []).append(each)
    if len(by_sequence) < 2:
        raise ConfigError("--drafter-sees other needs a source of two drives or more; this one has one.")
    names = list(by_sequence)
    theirs = by_sequence[names[(names.index(row.sequence) + 1) % len(names)]]
    return theirs[by_sequence[row.sequence].index(row) % len(theirs)]


def _clips(cfg: DecodeConfig) -> ClipInput:
    duration_us = parse_duration(cfg.duration)
    windows = clip_windows(
        [path.absolute() for path in cfg.source],
        duration_us=duration_us,
        step_us=parse_duration(cfg.step) if cfg.step else max(duration_us // 2, 1),
        num_frames=cfg.num_frames,
        fps=cfg.fps,
    )
    rows = tuple(
        DecodeRow(
            row=window.row,
            id=f"{window.sequence}/{window.window.t_start_us}",
            sequence=window.sequence,
            question=cfg.question,
            t_start_us=window.window.t_start_us,
            t_end_us=window.window.t_end_us,
        )
        for window in windows
    )
    return ClipInput(rows[: cfg.max_rows or None], tuple(windows))


def _store(cfg: DecodeConfig, path: Path) -> StoreInput:
    store = PairStore.open(path.absolute(), (cfg.duration,))
    for side in ("event", "target"):
        spec = store.feature(side)
        if spec.dtype != "uint8" or len(spec.shape) != 3 or spec.shape[0] != 3:
            raise InputError(
                f"{path}: its {side} feature is {spec}, not a picture (uint8 [3, H, W]); decode needs a store of "
                "pictures, as `prepare` writes without encoders."
            )
    index = store.index
    # Drives one after the other, each in order of time: drafters learn from what came before.
    order = np.lexsort((index.t_start_us, index.sequence)).tolist()
    rows = tuple(
        DecodeRow(
            row=row,
            id=str(index.sample_id[at]),
            sequence=str(index.sequence[at]),
            question=cfg.question,
            t_start_us=int(index.t_start_us[at]),
            t_end_us=int(index.t_end_us[at]),
        )
        for row, at in enumerate(order)
    )
    return StoreInput(rows[: cfg.max_rows or None], store, tuple(order))


def _prompts(cfg: DecodeConfig, path: Path) -> PromptInput:
    try:
        texts = read_utf8(path).split("\n")  # JSON may hold other ends of lines
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Name a .jsonl file of prompts.") from error
    lines: list[PromptLine] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append(PromptLine.model_validate_json(text))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the line"
            raise InputError(f"{path}, line {number}: {field}: {first['msg'].lower()}.") from error
    if not lines:
        raise InputError(f"{path} has no prompt; write a JSON object on each line, such as {{}}.")
    rows = [
        DecodeRow(row, line.id or str(row), line.sequence, line.question or cfg.question, tuple(line.draft_tokens))
        for row, line in enumerate(lines)
    ]
    seen = list(dict.fromkeys(row.sequence for row in rows))
    order = sorted(range(len(rows)), key=lambda row: seen.index(rows[row].sequence))
    ordered = tuple(replace(rows[at], row=row) for row, at in enumerate(order))
    return PromptInput(ordered[: cfg.max_rows or None], tuple(lines[at] for at in order), path.absolute())
