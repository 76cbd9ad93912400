"""Every setting of every command, once: the same frozen models serve YAML, flags, Tune and MLflow.

Unknown keys are refused and values are checked at birth. A field's docstring is its help text.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ray_app.errors import ConfigError

Strategy = Literal["lightweight", "lightweight_reference", "linear", "bottleneck"]
"""Names of the adapters in `ray_app.core.adapter.STRATEGIES`; a test holds the two equal."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SplitConfig(Config):
    """How pairs are divided. Computed from the store's index, never stored in it."""

    by: Literal["sequence", "window"] = "sequence"
    """`sequence` never cuts a drive; `window` is the reference's random split, which leaks, and says so."""
    seed: int = 42
    """Seed of the division."""
    test: Share = 0.2
    """Share of all pairs for the test part, which `evaluate` alone reads."""
    val: Share = 0.1
    """Share of the training part that is taken out of it for validation."""


class SplitFlags(Config):
    """The split as flat flags, the same on every command that makes one."""

    split: Literal["sequence", "window"] = "sequence"
    """Divide by whole drives, or by single windows at random as the reference did (leaks)."""
    split_seed: int = 42
    """Seed of the division."""
    test_share: Share = 0.2
    """Share of all pairs for the test part."""
    val_share: Share = 0.1
    """Share of the training part taken out of it for validation."""
    durations: tuple[str, ...] = ()
    """Window lengths to use, such as 1s; none named: all that the store has."""

    @property
    def split_config(self) -> SplitConfig:
        return SplitConfig(by=self.split, seed=self.split_seed, test=self.test_share, val=self.val_share)


class ClusterFlags(Config):
    """Where a command runs."""

    address: str | None = None
    """Ray cluster to join (`auto`, host:port); default: RAY_ADDRESS, else one of its own on this machine."""


class TrackingFlags(Config):
    """Where runs and models are recorded."""

    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    experiment: str = "alignment"
    """MLflow experiment."""
    model_name: str = "alignment-adapter"
    """Name of the registered model."""


class PrepareFlags(ClusterFlags):
    """What every source shares."""

    out: Path
    """Folder of the new pair store; must be new or empty."""
    num_workers: int = Field(default=0, ge=0)
    """Ray tasks at a time; 0: one for each CPU of the cluster."""
    max_quarantined: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest share of pairs that may be quarantined before the command ends with an error."""


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
    every: Positive = 1
    """One pair for every so many frames."""


class PrepareEventGpt(PrepareFlags):
    """The reference's dataset folder: event_image/, video/ and, where images are missing, event_npy/."""

    root: Path
    """Dataset folder."""
    duration: str = "1s"
    """Window length of the dataset's clips."""
    step: str | None = None
    """Distance between the starts of following clips of a sequence; default: half the duration."""


class PrepareDsec(PrepareFlags):
    """DSEC recordings: events.h5 and rectified frames, as downloaded."""

    root: Path
    """Dataset folder: train/ and test/ with a folder for each sequence, or per-sequence archives side by side."""
    durations: tuple[str, ...] = ("1s",)
    """Window lengths, one or several, 50ms to 20s."""
    step: str | None = None
    """Distance between window starts; default: half of each duration, as the reference."""
    boundaries: Literal["us", "ms_floor"] = "us"
    """Window ends to the microsecond, or brought down to whole milliseconds of the file's clock as EventGPT's."""
    pick: Literal["middle", "all"] = "middle"
    """The middle event image with the middle frame, as the reference; or each event image with its nearest frame."""
    align: Literal["auto", "infinite", "none"] = "auto"
    """infinite: frames as the event camera sees what is far away, both sides cut to the common part; none: whole
    frames, as the reference; auto: infinite where there is a calibration."""
    num_images: Annotated[int, Field(ge=1, le=64)] = 5
    """Event images of a window, by equal event count."""
    max_gap: str = "200ms"
    """A window with a longer time without an event, or without a frame, is set aside."""
    event_slice: str | None = None
    """Events are taken from this length in the middle of each window alone; default: the whole window."""


class InspectConfig(SplitFlags):
    """What is in a store: counts, windows, split sizes, leaks, cosine before, checksums."""

    store: Path
    """Pair store."""
    picture: Path | None = None
    """Write a contact sheet of pairs to this PNG file."""


class TrainConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Train an adapter with Ray Train."""

    store: Path
    """Pair store."""
    out: Path
    """Folder of the run; must be new or empty."""
    resume: Path | None = None
    """Go on with the run in this folder. It gives --store, --out and all other settings; of these, only where and how
    it runs may be given anew, such as --num-workers."""
    strategy: Strategy = "lightweight"
    """Adapter: the reference's diagram, what the reference really ran, one linear map, or a bottleneck."""
    hidden_dim: Positive = 512
    """Width of the hidden layers."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout probability, where the adapter has dropout."""
    num_epochs: Positive = 20
    """Most epochs; early stopping may end sooner."""
    batch_size: Positive = 32
    """Pairs per optimizer step, summed over workers."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """AdamW learning rate."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW weight decay."""
    grad_clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    mse_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the mean squared error."""
    cosine_weight: float = Field(default=0.5, ge=0.0)
    """Weight of 1 − cosine."""
    contrastive_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the symmetric contrastive loss."""
    mse_space: Literal["raw", "unit"] = "raw"
    """Take the squared error on features, or on unit vectors as the reference did."""
    plateau_patience: int = Field(default=2, ge=0)
    """Epochs without a better validation loss before the learning rate is halved."""
    early_stop_patience: int = Field(default=5, ge=1)
    """Epochs without a better validation loss before training ends."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    num_workers: Positive = 1
    """Data-parallel workers."""
    use_gpu: bool = False
    """One GPU for each worker, NCCL instead of gloo."""
    cpus_per_worker: float | None = Field(default=None, gt=0.0)
    """CPUs for each worker; default: the cluster's, divided by the workers (one for each with GPUs)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the forward pass."""
    bf16_gradients: bool = False
    """All-reduce gradients in bf16."""
    shard_memory_gib: float = Field(default=8.0, gt=0.0)
    """A worker's shard up to this size is held in memory; a larger one is streamed each epoch."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts from the newest checkpoint after a worker dies."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Also save after every so many optimizer steps; 0: only after each epoch, and when asked to stop."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.num_workers:
            low = self.batch_size // self.num_workers * self.num_workers
            tries = " or ".join(str(n) for n in (low, low + self.num_workers) if n)
            raise ConfigError(
                f"--batch-size ({self.batch_size}) must be a multiple of --num-workers ({self.num_workers}); "
                f"try {tries}."
            )
        if self.mse_weight == self.cosine_weight == self.contrastive_weight == 0.0:
            raise ConfigError("--mse-weight, --cosine-weight and --contrastive-weight are all 0; give one a weight.")
        return self


class SyncConfig(TrackingFlags):
    """Bring the tracking server to exactly what runs' journals hold; as often as one likes."""

    runs: tuple[Path, ...]
    """Run folders."""


class JudgeFlags(SplitFlags, ClusterFlags, TrackingFlags):
    """What `evaluate` and `benchmark` share."""

    store: Path
    """Pair store."""
    checkpoint: str
    """Checkpoint folder, run folder (its best checkpoint), or models:/alignment-adapter@champion."""
    out: Path
    """Folder for alignment_metrics_<S>.json and report.html; files of these names are replaced."""
    batch_size: Positive = 32
    """Pairs per forward pass."""
    use_gpu: bool = False
    """Evaluate on a GPU."""


class EvaluateConfig(JudgeFlags):
    """Alignment metrics of a checkpoint on the test part, beside every control, and report.html."""

    proxy: Path | None = None
    """proxy.html of `ray-app proxy`, for report.html to link to: what cosine acceptance predicts about tokens."""


class BenchmarkConfig(JudgeFlags):
    """The whole store through a checkpoint: benchmark_adapter_full_<S>.json with throughput."""


class PromoteConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Register a checkpoint and make it champion if it beats the champion and every control.

    Or, instead of a run: --rollback or --list.
    """

    run: str | None = None
    """Run folder or checkpoint folder."""
    rollback: bool = False
    """Instead of a run: the alias goes back to who was champion before; again, one further back."""
    list: bool = False
    """Instead of a run: the versions with their metrics, who is champion, who was, when and why."""
    store: Path | None = None
    """Pair store to judge on; default: the one the checkpoint was trained on."""
    min_gain: float = Field(default=0.0, ge=0.0)
    """How much cosine_accept_rate_0.80 must gain over the present champion."""
    force: bool = False
    """Move the alias whatever the verdict; recorded."""
    batch_size: Positive = 32
    """Pairs per forward pass."""
    use_gpu: bool = False
    """Evaluate on a GPU."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        asked = {"RUN": self.run, "--rollback": self.rollback, "--list": self.list}
        given = [name for name, value in asked.items() if value]
        if len(given) != 1:
            raise ConfigError(
                f"promote takes exactly one of RUN, --rollback and --list; given: {', '.join(given) or 'none'}. "
                "For instance: ray-app promote runs/drive"
            )
        if self.rollback and self.force:
            raise ConfigError("--force is for RUN; --rollback asks nobody.")
        return self


class CaptureConfig(ClusterFlags):
    """Outputs of live models on one's own videos, as traces for `replay`, with the time of each stage.

    Greedy decoding; weights are safetensors in local folders. The same command again goes on where it was cut off.
    """

    clips: tuple[Path, ...]
    """Video files, or folders of numbered frames with --fps."""
    target: Path
    """Folder of the target, a VideoLlavaForConditionalGeneration."""
    drafter: Path
    """Folder of the drafter: Video-LLaVA, or any causal language model (which sees the question alone)."""
    out: Path
    """Folder for traces.jsonl; must be new, empty, or a capture of the same settings."""
    question: str = "What are the key elements in this scene?"
    """What both models are asked about every window."""
    duration: str = "1s"
    """Window length."""
    step: str | None = None
    """Distance between window starts; default: half the duration."""
    fps: float | None = Field(default=None, gt=0.0)
    """Frames per second of folders; of files, where it is to replace their own times."""
    num_frames: Annotated[int, Field(ge=1, le=64)] = 8
    """Frames of a window that the models see, evenly spread."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    """Length limit of an answer, the end token included."""
    verify: tuple[Positive, ...] = (4, 8, 16, 24)
    """Draft lengths for which a target pass over that many drafted tokens is timed, in answers that are longer."""
    features: bool = False
    """Keep both models' last hidden state for every token, bfloat16: what a token was chosen from."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights in memory; auto: as saved."""
    use_gpu: bool = False
    """One replica of both models on each GPU; else one on the CPUs."""
    num_workers: int = Field(default=0, ge=0)
    """Replicas; 0: one for each GPU, without --use-gpu one in all."""


class ReplayConfig(ClusterFlags):
    """Token acceptance of drafters on recorded greedy outputs, replayed exactly: no model, no GPU."""

    traces: tuple[Path, ...]
    """Trace files (.jsonl), each one stretch of windows in order of time."""
    drafter: tuple[str, ...] = ("eventgpt", "ngram", "prompt_lookup", "retrieval", "hybrid")
    """Drafters: none, eventgpt, ngram, prompt_lookup, retrieval, hybrid; for traces captured with --features also
    hidden_state and adapter. The controls constant, positional and previous_window run beside them in any case."""
    gamma: Annotated[int, Field(ge=1, le=256)] = 8
    """Tokens drafted for each target pass."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Contiguous stretches of a file; each is replayed by drafters that learnt from the others."""
    gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not learnt from: windows overlap."""
    adapter: Path | None = None
    """Checkpoint that carries the drafter's states into the target's space, for the drafter `adapter`."""
    timing: Path | None = None
    """JSON file of measured milliseconds for every row, instead of the traces' own timing_ms."""
    draft_device: Literal["same", "second"] = "same"
    """EventGPT runs on the target's device before its prefill, or on a second one during it."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    start_token: int = 1
    """Its start token."""
    end_token: int = 2
    """Its end token."""


class ProxyConfig(ClusterFlags):
    """Proxy against truth: what cosine acceptance predicts about token acceptance, on captured traces with states.

    Every adapter is judged beside the raw states (where widths allow) and the mean target state, a constant.
    """

    traces: tuple[Path, ...]
    """traces.jsonl files of `ray-app capture --features`."""
    adapter: tuple[Path, ...] = ()
    """Checkpoints that carry the drafter's states into the target's space; three or more give a rank correlation."""
    out: Path
    """Folder for proxy.json and proxy.html; files of these names are replaced."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Contiguous stretches of a file; tokens of each are looked up among the states of the others."""
    gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not looked up."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    end_token: int = 2
    """Its end token."""


class ImportCheckpointConfig(Config):
    """A checkpoint of the reference project (.pt) as a checkpoint folder; its pickle is read, never run."""

    file: Path
    """Checkpoint of the reference: torch.save of config and model_state_dict."""
    out: Path
    """Folder of the new checkpoint; must be new."""


class DoctorConfig(ClusterFlags):
    """What this machine or cluster lacks. Exit code 1 where there is a problem."""

    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    mend: bool = False
    """Take the key to Ray's clusters out of reach of others (mode 0600)."""


class QuickstartConfig(TrackingFlags):
    """Scenes, training, evaluation and promotion, small, on this machine."""

    out: Path = Path("quickstart")
    """Folder for the store, the run and the report."""
    num_pairs: Positive = 480
    """Rendered pairs."""
    num_sequences: Positive = 40
    """Rendered drives."""
    num_epochs: Positive = 5
    """Training epochs."""
    hidden_dim: Positive = 512
    """Width of the hidden layers."""
    seed: int = 0
    """Seed of everything."""


def flat(config: Config) -> dict[str, Any]:
    """A config as JSON values, for MLflow parameters and provenance."""
    return config.model_dump(mode="json")
