"""Settings of `prepare` and `inspect`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ray_app.config.base import ClusterFlags, Positive, SplitFlags, StorePlace


class PrepareFlags(ClusterFlags):
    """What every source shares."""

    out: StorePlace
    """Folder of the new pair store, or a URI such as s3://bucket/store; must be new or empty."""
    storage_timeout_s: float = Field(default=60.0, ge=0.0)
    """Seconds that an object store may fail to answer before the command ends; what is done stays."""
    num_workers: int = Field(default=0, ge=0)
    """Ray tasks at a time; 0: one for each CPU of the cluster."""
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest share of pairs that may be rejected before the command ends with an error."""


class PrepareScenes(PrepareFlags):
    """Rendered driving scenes with simulated events: needs no download."""

    num_pairs: Positive = 1000
    """Pairs in all."""
    num_sequences: Positive = 60
    """Drives; pairs are spread evenly over them."""
    seed: int = 0
    """Seed of worlds, drives and sensor noise."""
    width: Annotated[int, Field(ge=32, le=4096)] = 640
    """Sensor width in pixels."""
    height: Annotated[int, Field(ge=32, le=4096)] = 480
    """Sensor height in pixels."""
    duration: str = "1s"
    """Window length."""
    step: str | None = None
    """Distance between window starts; default: half the duration, as the reference."""
    event_span: str = "50ms"
    """Events are simulated and drawn for this long in the middle of each window."""


class PrepareVideo(PrepareFlags):
    """Real footage; its events are simulated, and the manifest says so."""

    files: tuple[Path, ...]
    """Video files, or folders of frames."""
    fps: float | None = Field(default=None, gt=0.0)
    """Frames per second, for folders of frames (needed there) or to override a file's own."""
    seed: int = 0
    """Seed of the sensor noise."""
    width: Annotated[int, Field(ge=32, le=4096)] = 640
    """Sensor width in pixels."""
    height: Annotated[int, Field(ge=32, le=4096)] = 480
    """Sensor height in pixels."""
    duration: str = "50ms"
    """Window length, centred on a frame."""
    frame_stride: Positive = 1
    """One pair for every so many frames."""


class PrepareEventGpt(PrepareFlags):
    """The reference's dataset folder: event_image/, video/ and, where images are missing, event_npy/."""

    root: Path
    """Dataset folder."""
    duration: str | None = None
    """Window length of the dataset's clips; default: what the folder's name ends with (…_500ms, …_20s), else 1s."""
    step: str | None = None
    """Distance between the starts of following clips of a sequence, where recordings do not tell their times;
    default: half the duration, and for 50ms and less all of it, as EventGPT cuts them."""
    instructions: Path | None = None
    """Instruction JSON that lists the clips; default: EventGPT_Instruction_Subset.json in the folder, where it is
    there, else every clip that is found."""
    event_bins: Literal[1, 5] = 5
    """5: the middle one of the five images of event_image/; 1: the single one of event_image_1f/."""


class RecordedFlags(PrepareFlags):
    """How recordings with events and frames become windows and pairs."""

    durations: tuple[str, ...] = ("1s",)
    """Window lengths, one or several, 50ms to 20s."""
    step: str | None = None
    """Distance between window starts; default: half of each duration, as the reference."""
    pairs_per_window: Literal["middle", "all"] = "middle"
    """The middle event image with the middle frame, as the reference; or each event image with its nearest frame."""
    event_bins: Annotated[int, Field(ge=1, le=64)] = 5
    """Event images of a window, by equal event count."""
    max_gap: str = "200ms"
    """A window with a longer time without an event, or without a frame, is set aside."""
    event_window: str | None = None
    """Events are taken from this length in the middle of each window alone; default: the whole window."""


class PrepareDsec(RecordedFlags):
    """DSEC recordings: events.h5 and rectified frames, as downloaded."""

    root: Path
    """Dataset folder: train/ and test/ with a folder for each sequence, or per-sequence archives side by side."""
    window_rounding: Literal["us", "ms"] = "us"
    """Window ends to the microsecond, or brought down to whole milliseconds of the file's clock as EventGPT's."""
    align: Literal["auto", "far-field", "none"] = "auto"
    """far-field: frames as the event camera sees what is far away, both sides cut to the common part; none: whole
    frames, as the reference; auto: far-field where there is a calibration."""


class PrepareDavis(RecordedFlags):
    """Recordings of DAVIS sensors, whose pixels give events and frames at once. Needs: pip install ray-app[davis]."""

    files: tuple[Path, ...]
    """Recordings (.aedat4), a sequence each."""


class InspectConfig(SplitFlags, ClusterFlags):
    """What is in a store: counts, windows, split sizes, leaks, cosine before, checksums."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    against: StorePlace | None = None
    """Also look for windows and pictures that this other store holds too."""
    picture: Path | None = None
    """Write a contact sheet of pairs to this PNG file."""
    html: Path | None = None
    """Write everything with plots, and pictures of the worst leaks, to this HTML file."""
