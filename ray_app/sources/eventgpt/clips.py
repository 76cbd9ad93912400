"""Clips of an EventGPT dataset folder: from its instruction JSON, or from the files in its folders.

The JSON is a list of entries with `event_data` (`<seq>/<clip>.npy`, below event_npy/), and where they were made
`event_image` and `event_image_1f` (lists of images, below folders of these names) and `video_data` (a folder of
frames, below video/). A clip with several questions has several entries; it is one clip here.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_app.errors import InputError
from ray_app.listing import data_in
from ray_app.parsing.json_text import parse_json
from ray_app.parsing.text import printable
from ray_app.sources.images import natural

INSTRUCTIONS = "EventGPT_Instruction_Subset.json"
"""Name of the list in a dataset folder."""
MOST_FLAWS = 10_000
"""Flawed entries of a list: one with more of them lists something else."""
MAX_LIST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class EventGptClip:
    """Files of one clip; paths are relative to the dataset folder."""

    sequence: str
    """The drive."""
    name: str
    """The clip's name in it, a number."""
    npy: str
    """Its events."""
    images: tuple[str, ...]
    """Its event images in order of time; `npy` is drawn where they are not there."""
    video: str
    """Folder of its frames."""
    flaw: str = ""
    """Reason why its entry is rejected."""

    @property
    def image(self) -> str:
        """Path of its middle event image."""
        return self.images[len(self.images) // 2] if self.images else ""

    def spec(self) -> dict[str, Any]:
        return asdict(self)


def image_folder(event_bins: int) -> str:
    """Folder, and key of the JSON, of clips drawn as one image or as five."""
    return "event_image_1f" if event_bins == 1 else "event_image"


def found_clips(root: Path, event_bins: int) -> list[EventGptClip]:
    """Clips that any of the folders knows of, by sequence and number: what one of them lacks is found out later."""
    kinds = (image_folder(event_bins), "event_npy", "video")
    folders = [root / kind for kind in kinds]
    sequences = {p.name for folder in folders for p in _entries(folder) if p.is_dir()}
    clips = []
    for sequence in sorted(sequences):
        image, npy, video = (_entries(folder / sequence) for folder in folders)
        names = {
            *(re.sub(r"_\d+$", "", path.stem) for path in image if path.suffix == ".png"),
            *(path.stem for path in npy if path.suffix == ".npy"),
            *(path.name for path in video if path.is_dir()),
        }
        clips += [_clip(sequence, name, event_bins) for name in names]
    return _in_order(clips)


def listed_clips(path: Path, event_bins: int) -> list[EventGptClip]:
    """Clips of an instruction JSON, each once. InputError: not such a file. A flawed entry is a clip with a flaw."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, more than the {MAX_LIST_BYTES} that are read")
        entries = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON file: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"{path} holds a {type(entries).__name__}; an instruction JSON is a list of entries")
    if not entries:
        raise InputError(f"{path} lists no clip")
    clips: dict[EventGptClip, None] = {}
    flaws = 0
    for number, entry in enumerate(entries):
        clip = _listed(entry, number, path.name, event_bins)
        flaws += bool(clip.flaw)
        if flaws > MOST_FLAWS:
            raise InputError(f"{path}: more than {MOST_FLAWS:,} entries are no clips; {clip.flaw}")
        clips[clip] = None
    return _in_order(clips)


def _listed(entry: Any, number: int, file: str, event_bins: int) -> EventGptClip:
    where = f"{file}, entry {number}"
    if isinstance(entry, dict) and isinstance(entry.get("id"), str | int):
        where += f" (id {str(entry['id'])[:80]!r})"
    try:
        if not isinstance(entry, dict):
            raise InputError(f"it is a {type(entry).__name__}, not an object")
        data = PurePosixPath(_path(entry, "event_data"))
        if len(data.parts) < 2:
            raise InputError(f"event_data is '{data}'; it must be <sequence>/<clip>.npy")
        clip = _clip(str(data.parent), data.stem, event_bins)
        key = image_folder(event_bins)
        paths, video = clip.images, clip.video
        if images := entry.get(key):
            if not isinstance(images, list) or len(images) != event_bins:
                raise InputError(f"{key} must list {event_bins} images")
            paths = tuple(f"{key}/{_path({key: image}, key)}" for image in images)
        if entry.get("video_data"):
            video = f"video/{_path(entry, 'video_data')}"
        return EventGptClip(clip.sequence, clip.name, f"event_npy/{data}", paths, video)
    except InputError as error:
        return EventGptClip(file, f"{number:08d}", "", (), "", f"{where}: {error}")


def _path(entry: dict[str, Any], key: str) -> str:
    """Return a path below the dataset folder. InputError: missing, or one that leads out of it."""
    value = entry.get(key)
    if not isinstance(value, str) or not value or "\0" in value or printable(value) != value:
        raise InputError(f"it has no {key}" if value is None else f"{key} is no path")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{key} is '{value[:200]}', which leads out of the dataset folder")
    return str(path)


def _clip(sequence: str, name: str, event_bins: int) -> EventGptClip:
    """Return a clip whose parts lie where the reference puts them; one that no manifest can name has a flaw."""
    if (text := printable(f"{sequence}/{name}")) != f"{sequence}/{name}":
        return EventGptClip(printable(sequence), printable(name), "", (), "", f"{text} is no valid text; rename it")
    return EventGptClip(
        sequence,
        name,
        npy=f"event_npy/{sequence}/{name}.npy",
        images=tuple(f"{image_folder(event_bins)}/{sequence}/{name}_{i}.png" for i in range(event_bins)),
        video=f"video/{sequence}/{name}",
    )


def _in_order(clips: Any) -> list[EventGptClip]:
    return sorted(clips, key=lambda clip: (clip.sequence, natural(clip.name), clip.image, clip.video))


def _entries(folder: Path) -> list[Path]:
    return data_in(folder) if folder.is_dir() else []
