"""Interface of a source of pairs: settings that describe it, tasks that divide it, and a reader of one task.

Shapes: H, W = pixels as recorded or rendered (no common size), C = 3 colours.
"""

import hashlib
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError, ResourceError
from ray_app.listing import is_data
from ray_app.parsing.text import printable


@dataclass(frozen=True, slots=True)
class Views:
    """Number of pictures of a window on either side; several are for models that see several."""

    num_event_images: int = 1
    """Event images of equal event count, in order of time."""
    num_frames: int = 1
    """Frames, evenly spread over the window."""


ONE_EACH = Views()


@dataclass(frozen=True, slots=True)
class RawPair:
    """One window as two pictures, before resizing."""

    sequence: str
    """Name of the continuous drive that the window belongs to."""
    t_start_us: int
    """First microsecond of the window."""
    t_end_us: int
    """First microsecond after the window."""
    event_HWC: NDArray[np.uint8]
    """The window's events, drawn."""
    target_HWC: NDArray[np.uint8]
    """The camera's frame for the window."""
    num_events: int | None = None
    """Events of the window, drawn or not; None where not known, as below."""
    num_drawn: int | None = None
    """Events that were drawn into the event image."""
    num_positive: int | None = None
    """Positive events among those that were drawn."""
    target_t_us: int | None = None
    """Time of the target's frame, in microseconds."""
    event_images: tuple[NDArray[np.uint8], ...] = ()
    """All event images, (H, W, 3) each, where several are wanted; `event_HWC` is the middle one."""
    frames: tuple[NDArray[np.uint8], ...] = ()
    """All frames, likewise; `target_HWC` is the middle one."""


@dataclass(frozen=True, slots=True)
class RejectedPair:
    """One pair that could not be built."""

    input: str
    """File or drive that it should have come from."""
    position: str
    """Position in it, for instance `frame 17` or `window [500000, 1500000)`."""
    reason: str
    """Reason of the rejection."""


@dataclass(frozen=True, slots=True)
class SourceTask:
    """A part of a source that is built in one go, by one worker, into one file."""

    name: str
    """Unique within the source, a file name, and in sorted order of the source's own order."""
    num_pairs: int
    """Pairs that the task yields, rejected ones included; at most 64."""
    spec: dict[str, Any]
    """Data by which `pairs` finds them; JSON values."""


class Source(Protocol):
    """A reader of one kind of input. Implementations are frozen dataclasses: cheap, picklable, comparable.

    Everything a source yields is a function of its settings and input alone: not of the worker, the number of
    workers or the order of tasks.
    """

    @property
    def name(self) -> str:
        """Kind of source, as on the command line."""
        ...

    def describe(self) -> dict[str, Any]:
        """Every setting that shaped a pixel, as JSON values; `events` says `simulated` or `recorded`."""
        ...

    def durations(self) -> list[str]:
        """Window lengths that occur, such as `1s`."""
        ...

    def tasks(self) -> list[SourceTask]:
        """Return the cut into tasks. An input that is missing or empty as a whole raises InputError."""
        ...

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Return the task's pairs, in order of time. One bad pair is yielded as Rejected, and the rest follow.

        ResourceError: what `tasks` found is not to be seen from this machine; no pair is to blame for that.
        """
        ...


def spread(places: range, count: int) -> list[int]:
    """Return `count` places, evenly spread: one is the middle. Of fewer places than that some come again."""
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def named_sequences(files: Iterable[Path]) -> list[tuple[str, Path]]:
    """(sequence, path) of each recording that is a sequence of its own; equal names are numbered.

    What `clips/*` names besides, such as Thumbs.db, is left out. InputError: a name that no manifest can hold.
    """
    named: list[tuple[str, Path]] = []
    for path in files:
        if not is_data(path.name):
            continue
        if printable(path.name) != path.name:
            raise InputError(f"the name {printable(str(path))} is no valid text (UTF-8); rename it")
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.name if path.is_dir() else path.stem) or "recording"
        taken = {name for name, _ in named}
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        named.append((name, path))
    return named


def require_visible(path: Path) -> None:
    """ResourceError, with this machine's name, unless it sees the file or folder.

    A mount point is empty without its mount.
    """
    try:
        there, why = any(path.iterdir()) if path.is_dir() else path.exists(), "missing or empty"
    except OSError as error:
        there, why = False, f"unreadable ({error.strerror})"
    if not there:
        raise ResourceError(
            f"{path} is {why} on {socket.gethostname()}, which was to read it; mount the input at the same path on "
            "every node."
        )


def file_identity(path: Path) -> dict[str, Any]:
    """Return the facts that identify a file in a manifest. InputError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
