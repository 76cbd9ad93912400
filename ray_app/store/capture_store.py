"""Files of `capture`: rows of traces and the models' states, in shards that are checked before use.

    capture.json  traces.jsonl  rejected.jsonl
    shards/NAME.jsonl  shards/NAME.rejected.jsonl  shards/NAME.safetensors  shards/NAME.sha256

A shard is finished when its NAME.sha256, in the format of `sha256sum`, is there and holds; it is written last.
Shapes: T = tokens of an answer, D = width of a model's last hidden state.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import FailFast
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ray_app.config.base import Config
from ray_app.errors import InputError, StoreError
from ray_app.listing import data_in
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import disk_errors, make_folder, sha256_bytes, sha256_file, write_file

CAPTURE_SETTINGS = "capture.json"
TRACES = "traces.jsonl"
REJECTED_ROWS = "rejected.jsonl"
SHARDS = "shards"
ModelSide = Literal["draft", "target"]


def claim_capture(folder: Path, settings: Mapping[str, Any], name: str = CAPTURE_SETTINGS) -> None:
    """Make the folder ours. StoreError unless it is new, empty, or has these very settings in its file `name`."""
    path, text = folder / name, json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            theirs = _json(path)
            differing = sorted(k for k in settings.keys() | theirs.keys() if settings.get(k) != theirs.get(k))
            raise StoreError(
                f"{folder} holds a {path.stem} of other {', '.join(differing) or 'settings'}; repeat that command to "
                "continue it, or name another folder for --out."
            )
    elif folder.exists() and (not folder.is_dir() or data_in(folder)):
        raise StoreError(f"{folder} already holds something else; --out must be a new or empty folder.")
    else:
        with disk_errors(folder):
            make_folder(folder / SHARDS)
        write_file(path, text.encode())


@dataclass(frozen=True, slots=True)
class Shard:
    """A few windows of one video, as they were captured."""

    rows: Sequence[Mapping[str, Any]]
    """Lines of traces, in order."""
    rejected: Sequence[Mapping[str, Any]]
    """Windows that could not be captured, each with its reason."""


def write_shard(folder: Path, name: str, shard: Shard, states: Mapping[str, Tensor]) -> None:
    """Write the lines, and the states by `state_key`, where there are any; the sums last."""
    shards = folder / SHARDS
    with disk_errors(shards):
        make_folder(shards)
    files = {f"{name}.jsonl": as_lines(shard.rows), f"{name}.rejected.jsonl": as_lines(shard.rejected)}
    if states:
        files[f"{name}.safetensors"] = save({key: state.contiguous() for key, state in states.items()})
    for file, data in files.items():
        write_file(shards / file, data)
    sums = "".join(f"{sha256_bytes(data)}  {file}\n" for file, data in files.items())
    write_file(shards / f"{name}.sha256", sums.encode())


def read_shard(folder: Path, name: str) -> Shard | None:
    """Return a shard that verifies; None where it is missing, unfinished or damaged."""
    shards = folder / SHARDS
    try:
        verify_shard(shards, name)
    except InputError:
        return None
    rows, rejected = (
        [parse_object(line) for line in (shards / file).read_bytes().splitlines()]
        for file in (f"{name}.jsonl", f"{name}.rejected.jsonl")
    )
    return Shard(rows, rejected)


def verify_shard(shards: Path, name: str) -> None:
    """Every file of a shard against its NAME.sha256. InputError names the file that does not hold."""
    path = shards / f"{name}.sha256"
    try:
        lines = re.findall(r"^([0-9a-f]{64})  ([\w.-]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        lines = []
    if f"{name}.jsonl" not in {file for _, file in lines}:
        raise InputError(f"{path} is missing or damaged; repeat the `ray-app capture` that wrote it.")
    for sha256, file in lines:
        if not (shards / file).is_file() or sha256_file(shards / file) != sha256:
            raise InputError(
                f"{shards / file} is missing or damaged: its SHA-256 differs from {path.name}. Repeat the "
                "`ray-app capture` that wrote it: it captures this shard again."
            )


def publish_capture(folder: Path, rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> None:
    """Write traces.jsonl, all rows in order, and rejected.jsonl."""
    for file, lines in ((TRACES, rows), (REJECTED_ROWS, rejected)):
        write_file(folder / file, as_lines(lines))


def as_lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def state_key(row: int, side: ModelSide) -> str:
    """Name of a row's states (T, D) in its shard."""
    return f"{row}.{side}"


class CapturedRow(Config, extra="ignore"):
    """Part of a line of traces that names the states of a window."""

    row: int
    """Place in the recording order."""
    sequence: str
    """Video of the window."""
    t_start_us: int
    """First microsecond of the window."""
    t_end_us: int
    """First microsecond after it."""
    draft_tokens: Annotated[tuple[int, ...], FailFast()]
    """The drafter's answer."""
    target_tokens: Annotated[tuple[int, ...], FailFast()]
    """The target's answer."""
    states: str
    """File with both models' states."""


def read_captured(folder: Path) -> tuple[dict[str, Any], list[CapturedRow]]:
    """Return settings and rows of a capture. InputError: it is not finished, damaged, or kept no states."""
    try:
        settings = parse_object((folder / CAPTURE_SETTINGS).read_bytes())
        lines = (folder / TRACES).read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is no finished capture ({error}); name the --out of `ray-app capture`."
        ) from error
    if not settings.get("features"):
        raise InputError(f"{folder} has no states; capture them: ray-app capture … --features")
    try:
        return settings, [CapturedRow.model_validate(parse_object(line)) for line in lines]
    except ValueError as error:
        raise InputError(f"{folder / TRACES} is damaged; repeat the command that wrote it.") from error


class StateReader:
    """States of the rows of one trace file; each shard is verified once, before its first use."""

    def __init__(self, traces: Path) -> None:
        self._folder = traces.parent
        self._verified: set[str] = set()

    def read(self, states: str, row: int, side: ModelSide, num_tokens: int) -> Tensor:
        """States (T, D) as float32 of a row whose trace names the file `states`.

        InputError: a file that is missing, damaged or elsewhere; states that do not fit the tokens or are not finite.
        """
        path = self._folder / states
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*\.safetensors", states, re.ASCII):
            raise InputError(f"row {row}: '{states}' does not name a states file in the folder of the traces.")
        if states not in self._verified:
            verify_shard(path.parent, path.stem)
            self._verified.add(states)
        try:
            with safe_open(path, framework="pt") as file:
                found = file.get_tensor(state_key(row, side))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} lacks the {side} states of row {row}: {error}") from error
        if found.ndim != 2 or len(found) != num_tokens or not torch.isfinite(found).all():
            raise InputError(
                f"{path}, row {row}: {side} states of shape {list(found.shape)} for {num_tokens} tokens, or not all "
                "finite; capture the row again."
            )
        return found.float()


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is damaged; name another folder for --out.") from error
