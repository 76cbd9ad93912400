"""Settings of `prepare`, `encode` and `inspect`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config, Positive, SplitFlags, StorePlace
from ray_app.errors import ConfigError

Pool = Annotated[str, Field(pattern=r"^(none|mean|cls|[1-9]\d?x[1-9]\d?)$")]
"""Tokens of a picture that are kept: all, the mean of its grid, the class token, or rows x columns of means."""


class PrepareFlags(ClusterFlags):
    """Settings of every source."""

    out: StorePlace
    """Folder of the new pair store, or a URI such as s3://bucket/store; must be new or empty."""
    storage_timeout_s: float = Field(default=60.0, ge=0.0)
    """Seconds to wait for an object store that does not answer; finished files stay."""
    num_workers: int = Field(default=0, ge=0)
    """Ray tasks at a time; 0 means one for each CPU of the cluster."""
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest fraction of pairs that may be rejected; above it the command fails."""
    event_encoder: Path | None = None
    """Folder of an image model, in safetensors: the event side is its features of the full pictures, not pixels."""
    target_encoder: Path | None = None
    """The same for the target side."""
    layer: Annotated[tuple[Annotated[int, Field(le=-1)], ...], Field(max_length=2)] = ()
    """Layer of the encoders, counted from the last one, -1: one number for both sides, or two, event and target;
    default: the last one, of LLaVA and Video-LLaVA their own."""
    pool: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=2)] = ("mean",)
    """Tokens of a picture that are kept: none (all of them), mean, cls, or a grid of means such as 3x3; one for both
    sides, or two."""
    num_event_images: Positive | None = None
    """Event images of a pair, of equal event count, that the event encoder takes together; default: 5 for EventGPT,
    else 1."""
    num_frames: Positive | None = None
    """Frames of a pair, evenly spread, that the target encoder takes together; default: 8 for Video-LLaVA, else 1."""
    projector: bool = False
    """Take the tokens of LLaVA and Video-LLaVA behind their projector; EventGPT's always are."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of stored features, on GPUs of the forward pass too; CPUs compute in float32."""
    use_gpu: bool = False
    """Encode on GPUs, one worker each; drawing and reading stay on CPUs."""

    @model_validator(mode="after")
    def _encoders_are_named(self) -> Self:
        """Refuse settings of encoders where there is none."""
        asked = {"--layer": self.layer, "--projector": self.projector, "--use-gpu": self.use_gpu}
        asked |= {"--num-frames": self.num_frames, "--num-event-images": self.num_event_images}
        asked["--pool"] = self.pool != ("mean",)
        if not (self.event_encoder or self.target_encoder) and any(asked.values()):
            flags = ", ".join(flag for flag, given in asked.items() if given)
            raise ConfigError(
                f"{flags}: without --event-encoder or --target-encoder nothing is encoded; name a folder."
            )
        return self


class EncodeConfig(PrepareFlags):
    """Make a store of the same pairs with encoder features instead of pixels."""

    store: StorePlace
    """Pair store of pixels: a folder, or a URI such as s3://bucket/store."""

    @model_validator(mode="after")
    def _something_is_encoded(self) -> Self:
        if not (self.event_encoder or self.target_encoder):
            raise ConfigError("encode needs --event-encoder, --target-encoder or both: folders of image models.")
        return self


class PrepareScenes(PrepareFlags):
    """Pairs of rendered driving scenes with simulated events; no download."""

    num_pairs: Positive = 1000
    """Number of pairs in the store."""
    num_sequences: Positive = 60
    """Number of drives; pairs are spread evenly over them."""
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
    """Length of the middle part of each window for which events are simulated and drawn."""


class PrepareVideo(PrepareFlags):
    """Pairs of real footage with simulated events, as the manifest states."""

    files: tuple[Path, ...]
    """Video files, or folders of frames."""
    fps: float | None = Field(default=None, ge=0.001, le=100_000.0)
    """Frames per second: required for folders of frames, overrides a file's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sensor noise."""
    width: Annotated[int, Field(ge=32, le=4096)] = 640
    """Sensor width in pixels."""
    height: Annotated[int, Field(ge=32, le=4096)] = 480
    """Sensor height in pixels."""
    duration: str = "50ms"
    """Window length, centred on a frame."""
    frame_stride: Positive = 1
    """Frames between the starts of two pairs."""


class PrepareEventGpt(PrepareFlags):
    """Pairs of the reference's dataset folder: event_image/, video/ and event_npy/ for images that are missing."""

    root: Path
    """Dataset folder."""
    duration: str | None = None
    """Window length of the dataset's clips; default: the end of the folder's name (…_500ms, …_20s), else 1s."""
    step: str | None = None
    """Distance between the starts of consecutive clips of a sequence whose recordings have no times; default: half
    the duration, or all of it up to 50ms, as EventGPT cuts them."""
    instructions: Path | None = None
    """Instruction JSON that lists the clips; default: EventGPT_Instruction_Subset.json of the folder, else every clip
    in it."""
    event_bins: Literal[1, 5] = 5
    """5 takes the middle one of the five images of event_image/, 1 the single one of event_image_1f/."""


class RecordedFlags(PrepareFlags):
    """Settings by which recordings with events and frames become windows and pairs."""

    durations: tuple[str, ...] = ("1s",)
    """One or several window lengths, 50ms to 20s."""
    step: str | None = None
    """Distance between window starts; default: half of each duration, as the reference."""
    pairs_per_window: Literal["middle", "all"] = "middle"
    """middle pairs the middle event image with the middle frame, as the reference; all pairs each event image with
    its nearest frame."""
    event_bins: Annotated[int, Field(ge=1, le=64)] = 5
    """Number of event images of a window, of equal event count."""
    max_gap: str = "200ms"
    """Longest time without an event or a frame; a window with a longer one is rejected."""
    event_window: str | None = None
    """Length of the middle part of each window from which events are taken; default: the whole window."""


class PrepareDsec(RecordedFlags):
    """Pairs of DSEC recordings: events.h5 and rectified frames, as downloaded."""

    root: Path
    """Dataset folder: train/ and test/ with a folder for each sequence, or the unpacked archives of each sequence."""
    window_rounding: Literal["us", "ms"] = "us"
    """us keeps window ends exact; ms rounds them down to milliseconds of the file's clock, as EventGPT does."""
    align: Literal["auto", "far-field", "none"] = "auto"
    """far-field warps frames to the event camera's view of distant points and crops both sides to the common part;
    none keeps whole frames, as the reference; auto means far-field where there is a calibration."""


class PrepareDavis(RecordedFlags):
    """Pairs of DAVIS recordings, with events and frames of one sensor; needs `pip install ray-app[davis]`."""

    files: tuple[Path, ...]
    """Recordings (.aedat4); each is one sequence."""


class PrepareArrays(Config):
    """Pairs of your own arrays: features of any encoder, of any two widths, or sequences of tokens.

    A column is a name in FILE, or FILE.npy, FILE.txt (one name a line), or FILE:NAME. Event and target are needed.
    """

    file: Path | None = None
    """.npz, .safetensors or .parquet file, or a folder of Parquet files or of Hugging Face `save_to_disk`."""
    out: StorePlace
    """Folder of the new pair store, or a URI such as s3://bucket/store; must be new or empty."""
    event: str = "event"
    """Event features: (pairs, width), (pairs, tokens, width) or (pairs, channels, height, width)."""
    target: str = "target"
    """Target features, likewise; the width may be another."""
    sequence: str = "sequence"
    """Name of each pair's continuous recording, which a split never cuts; without it all pairs are one."""
    t_start_us: str = "t_start_us"
    """Start of each pair's window in microseconds; without it the pairs of a sequence follow each other."""
    t_end_us: str = "t_end_us"
    """End of each pair's window; default: --duration after its start."""
    duration: str = "1s"
    """Window length."""
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest fraction of pairs that may be rejected (numbers that are not finite, all zeros, a pair twice)."""


class PrepareCapture(Config):
    """Pairs of the hidden states that `capture --features` kept of both models."""

    folder: Path
    """Folder of the capture."""
    out: StorePlace
    """Folder of the new pair store, or a URI such as s3://bucket/store; must be new or empty."""
    unit: Literal["token", "answer"] = "token"
    """token: a pair of vectors for each place that both answers have, as `replay --drafter adapter` and `correlate`
    take them; answer: a pair of sequences for each window."""
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest fraction of pairs that may be rejected (numbers that are not finite, all zeros, a pair twice)."""


class InspectConfig(SplitFlags, ClusterFlags):
    """Show a store: counts, windows, split sizes, leaks, cosine before, checksums."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    against: StorePlace | None = None
    """Another store to search for the same windows and pictures."""
    picture: Path | None = None
    """Write a contact sheet of pairs to this PNG file."""
    html: Path | None = None
    """Write everything with plots, and pictures of the worst leaks, to this HTML file."""
