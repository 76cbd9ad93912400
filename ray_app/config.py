"""Every setting of every command, once: the same frozen models serve YAML, flags, Tune and MLflow.

Unknown keys are refused and values are checked at birth. A field's docstring is its help text.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ray_app.errors import ConfigError

Strategy = Literal[
    "lightweight",
    "lightweight_reference",
    "lightweight_subspace",
    "linear",
    "bottleneck",
    "conv",
    "lowrank",
    "ridge",
    "token_bottleneck",
    "token_multilayer",
    "token_wide",
    "token_attention",
    "token_causal",
]
"""Names of the adapters in `ray_app.core.adapter.STRATEGIES`; a test holds the two equal."""

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
"""A registered model by alias or by version."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
StorePlace = Annotated[str, BeforeValidator(os.fspath)]
"""A folder, or a URI such as s3://bucket/store. Text, for a Path would make one slash of the two."""


def _workers(value: Any) -> str:
    """A number, or MIN:MAX; ConfigError otherwise."""
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", str(value))
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise ConfigError(
            f"--num-workers ({value}) must be a number from 1 on, or MIN:MAX with 1 ≤ MIN ≤ MAX, such as 1:8"
        )
    return str(value)


Workers = Annotated[str, BeforeValidator(_workers)]
"""A fixed number of workers, or the fewest and the most."""


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

    out: StorePlace
    """Folder of the new pair store, or a URI such as s3://bucket/store; must be new or empty."""
    store_patience: float = Field(default=60.0, ge=0.0)
    """Seconds that an object store may fail to answer before the command ends; what is done stays."""
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
    duration: str | None = None
    """Window length of the dataset's clips; default: what the folder's name ends with (…_500ms, …_20s), else 1s."""
    step: str | None = None
    """Distance between the starts of following clips of a sequence, where recordings do not tell their times;
    default: half the duration, and for 50ms and less all of it, as EventGPT cuts them."""
    instructions: Path | None = None
    """Instruction JSON that lists the clips; default: EventGPT_Instruction_Subset.json in the folder, where it is
    there, else every clip that is found."""
    num_images: Literal[1, 5] = 5
    """5: the middle one of the five images of event_image/; 1: the single one of event_image_1f/."""


class RecordedFlags(PrepareFlags):
    """How recordings with events and frames become windows and pairs."""

    durations: tuple[str, ...] = ("1s",)
    """Window lengths, one or several, 50ms to 20s."""
    step: str | None = None
    """Distance between window starts; default: half of each duration, as the reference."""
    pick: Literal["middle", "all"] = "middle"
    """The middle event image with the middle frame, as the reference; or each event image with its nearest frame."""
    num_images: Annotated[int, Field(ge=1, le=64)] = 5
    """Event images of a window, by equal event count."""
    max_gap: str = "200ms"
    """A window with a longer time without an event, or without a frame, is set aside."""
    event_slice: str | None = None
    """Events are taken from this length in the middle of each window alone; default: the whole window."""


class PrepareDsec(RecordedFlags):
    """DSEC recordings: events.h5 and rectified frames, as downloaded."""

    root: Path
    """Dataset folder: train/ and test/ with a folder for each sequence, or per-sequence archives side by side."""
    boundaries: Literal["us", "ms_floor"] = "us"
    """Window ends to the microsecond, or brought down to whole milliseconds of the file's clock as EventGPT's."""
    align: Literal["auto", "infinite", "none"] = "auto"
    """infinite: frames as the event camera sees what is far away, both sides cut to the common part; none: whole
    frames, as the reference; auto: infinite where there is a calibration."""


class PrepareDavis(RecordedFlags):
    """Recordings of DAVIS sensors, whose pixels give events and frames at once. Needs: pip install ray-app[davis]"""

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
    page: Path | None = None
    """Write everything with plots, and pictures of the worst leaks, to this HTML file."""


class TrainConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Train an adapter with Ray Train."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: Path
    """Folder of the run; must be new or empty."""
    resume: Path | None = None
    """Go on with the run in this folder. It gives --store, --out and all other settings; of these, only where and how
    it runs may be given anew, such as --num-workers."""
    strategy: Strategy = "lightweight"
    """Adapter. The reference's: lightweight (its diagram), lightweight_reference (its code). For images: conv.
    Between principal subspaces: lowrank, lightweight_subspace. Plain: linear, bottleneck. Solved: ridge.
    For sequences of hidden states: token_bottleneck, token_multilayer, token_wide, token_attention, token_causal."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers, channels of conv; default: the strategy's own (lightweight 512, conv 64, lowrank
    256)."""
    depth: Positive | None = None
    """Blocks of conv, lowrank; default: the strategy's own (3, 1)."""
    patch: Positive = 16
    """Side of a patch of conv, in pixels."""
    rank: Positive = 64
    """Dimensions of the principal subspaces of lowrank, lightweight_subspace and --init spectral."""
    init: Literal["random", "spectral"] = "random"
    """spectral: full-width layers begin at the mean training target and the principal subspaces; conv, lowrank and
    lightweight_subspace begin at the mean target in any case."""
    space: Literal["full", "compressed"] = "full"
    """compressed: lowrank and lightweight_subspace are trained on coordinates in the subspaces, with losses and
    metrics that equal those at full width; what is saved is the full-width adapter."""
    start: Path | None = None
    """Means and subspaces that another run found on the same training pairs, RUN/start; default: computed here."""
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
    accept_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the soft rejection, sigmoid((θ − cosine) / temperature)."""
    accept_thetas: tuple[Annotated[float, Field(ge=-1.0, le=1.0)], ...] = (0.8,)
    """Each θ of it; their losses are averaged."""
    accept_temperature: float = Field(default=0.05, gt=0.0)
    """Temperature of it."""
    centred_weight: float = Field(default=0.0, ge=0.0)
    """Weight of 1 − centred cosine: the mean training target taken off both sides."""
    next_position_weight: float = Field(default=0.0, ge=0.0)
    """For sequences: weight of 1 − cosine of each aligned token with the target's next one; made for token_causal."""
    flip: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: probability that both images of a pair are mirrored."""
    shift: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Augmentation: both images are moved by up to this share of their sides."""
    event_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: up to this share of an image's event pixels is wiped out."""
    event_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: up to this share of an image's pixels becomes red or blue."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """Learning rate: halved where validation stands still, or a half cosine over --num-epochs, epoch by epoch."""
    fit_on: Literal["train", "train+val"] = "train"
    """train+val: the validation part trains too, for a last run of settings that are chosen already. Nothing stops
    early then, the learning rate goes by the training loss, and the last epoch's checkpoint is the result."""
    plateau_patience: int = Field(default=2, ge=0)
    """Epochs without a better validation loss before the learning rate is halved."""
    early_stop_patience: int = Field(default=5, ge=1)
    """Epochs without a better validation loss before training ends."""
    validate_every: int = Field(default=0, ge=0)
    """Also validate before the first step and, within each epoch, after every so many steps, for a finer curve; the
    best checkpoint is still that of an epoch's end. 0: only there."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    num_workers: Workers = "1"
    """Data-parallel workers: a number, or MIN:MAX such as 1:8. Then as many train as the cluster has room for: fewer
    go on when nodes go, more when nodes come, with the same global batches; a node that goes costs the steps since
    the last save (see --checkpoint-every)."""
    resize_seconds: float = Field(default=60.0, gt=0.0)
    """With MIN:MAX: seconds between two looks for room for more workers; each change costs a start of all workers."""
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
    """Restarts from the newest checkpoint after a worker dies; with MIN:MAX, those without a step forward."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Also save after every so many optimizer steps; 0: only after each epoch, and when asked to stop."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_workers > self.batch_size:
            raise ConfigError(
                f"--num-workers ({self.num_workers}) asks for more workers than a batch has pairs "
                f"({self.batch_size}); take at most {self.batch_size}, or a larger --batch-size."
            )
        if self.elastic and self.contrastive_weight:
            raise ConfigError(
                "--contrastive-weight compares a pair with the others of its worker, so the loss would change with "
                f"the number of workers; fix it (--num-workers {self.max_workers}), or leave the weight out."
            )
        losses = ("mse", "cosine", "contrastive", "accept", "centred", "next_position")
        if not any(getattr(self, f"{name}_weight") for name in losses):
            raise ConfigError(
                f"{', '.join(f'--{name}-weight'.replace('_', '-') for name in losses)} are all 0; give one a weight."
            )
        if self.accept_weight and not self.accept_thetas:
            raise ConfigError("--accept-weight needs a θ: --accept-thetas 0.8")
        if self.space == "compressed":
            self._fits_in_subspaces()
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return int(self.num_workers.partition(":")[0])

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return int(self.num_workers.rpartition(":")[2])

    @property
    def elastic(self) -> bool:
        """The number of workers follows the cluster."""
        return ":" in self.num_workers

    def _fits_in_subspaces(self) -> None:
        if self.strategy not in ("lowrank", "lightweight_subspace"):
            raise ConfigError(
                "--space compressed is for lowrank and lightweight_subspace, which work between subspaces; "
                f"{self.strategy} does not: leave it out"
            )
        if self.contrastive_weight and self.strategy == "lightweight_subspace":
            raise ConfigError(
                "--contrastive-weight compares each pair with the others, whose events the compressed space does not "
                "hold; lightweight_subspace adds them: use --space full, or lowrank"
            )
        if self.flip or self.shift or self.event_dropout or self.event_noise:
            raise ConfigError(
                "augmentation changes pixels, which the compressed space does not hold: use --space full"
            )


class TuneConfig(ClusterFlags, TrackingFlags):
    """Search for the best adapter. A YAML file is the whole sweep; flags here override its lines of the same name.

    Or, instead of a file: --resume SWEEP goes on with a sweep, --watch SWEEP shows one as it goes.
    """

    file: Path | None = None
    """YAML file of the sweep; tune_configs/ holds examples."""
    resume: Path | None = None
    """Go on with the sweep in this folder: what is finished is not run again, what is not goes on."""
    watch: Path | None = None
    """Show the sweep in this folder live, until it ends; a finished one at once."""
    store: Path | None = None
    """Pair store."""
    out: Path | None = None
    """Folder of the sweep; must be new or empty."""
    max_trials: Positive | None = None
    """Most trials."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Most hours of search, all starts together; what has not ended then can go on later."""
    max_gpu_hours: float | None = Field(default=None, gt=0.0)
    """Most GPU hours of search, all trials together."""
    final: bool = True
    """Train the best setting once more with several seeds on training and validation parts, and judge it on the
    test part."""
    promote: bool = False
    """Promote the first of these at the end; otherwise the command for it is printed."""
    yes: bool = False
    """Go on without a question where the estimate is above a limit."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        asked = {"FILE": self.file, "--resume": self.resume, "--watch": self.watch}
        given = [name for name, value in asked.items() if value]
        if len(given) != 1:
            raise ConfigError(
                f"tune takes exactly one of FILE, --resume and --watch; given: {', '.join(given) or 'none'}. "
                "For instance: ray-app tune tune_configs/smoke.yaml"
            )
        return self


class SyncConfig(TrackingFlags):
    """Bring the tracking server to exactly what runs' journals hold; as often as one likes."""

    runs: tuple[Path, ...]
    """Run folders."""


class JudgeFlags(SplitFlags, ClusterFlags, TrackingFlags):
    """What `evaluate` and `benchmark` share."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
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


class CompareConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Several checkpoints on the same test pairs: acceptance, size, latency and pictures side by side."""

    checkpoints: tuple[str, ...]
    """Checkpoint folders, run folders (their best checkpoints), or models:/NAME@ALIAS."""
    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: Path
    """Folder for comparison.json and comparison.html; files of these names are replaced."""
    batch_size: Positive = 32
    """Pairs per forward pass."""
    use_gpu: bool = False
    """Evaluate on a GPU."""


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
    store: StorePlace | None = None
    """Pair store to judge on, a folder or a URI; default: the one the checkpoint was trained on."""
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
    page: Path | None = None
    """Write the numbers with plots to this HTML file."""
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


class EndpointConfig(Config):
    """What the endpoint is told: the same for `ray-app serve`, serve/config.yaml and the app's builder."""

    checkpoint: str = "models:/alignment-adapter@champion"
    """models:/NAME@ALIAS, which is watched, models:/NAME/VERSION, or a checkpoint or run folder."""
    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    name: str = Field(default="alignment-adapter", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of the model in requests."""
    tokens: Path | None = None
    """File of bearer tokens, a line each; needed unless the endpoint is bound to loopback."""
    open_access: bool = False
    """Answer everyone without a token, on any interface: for a gateway that does the asking."""
    num_replicas: Positive = 1
    """Processes that answer."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 where the hardware multiplies it (AMX, GPUs)."""
    use_gpu: bool = False
    """One GPU for each replica."""
    cpus_per_replica: float = Field(default=1.0, gt=0.0)
    """CPUs, and threads of the forward pass, of each replica."""
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most pairs in a request, and in a forward pass."""
    max_queue: Annotated[int, Field(ge=1)] = 64
    """Most pairs that wait; a request that does not fit is answered 429."""
    batch_wait_ms: float = Field(default=0.0, ge=0.0, le=1000.0)
    """How long an idle replica waits for more pairs before it computes."""
    max_body_mib: float = Field(default=32.0, gt=0.0)
    """Largest request, as sent and inflated."""
    max_json_mib: float = Field(default=8.0, gt=0.0)
    """Largest JSON request: reading JSON holds everyone up, binary requests do not."""
    timeout_s: float = Field(default=10.0, gt=0.0)
    """Longest time of a request; a caller may ask for less."""
    watch_s: float = Field(default=10.0, gt=0.0)
    """Time between two looks at the alias or folder."""
    traces: Path | None = None
    """File that spans are appended to, a JSON object each; OTEL_EXPORTER_OTLP_ENDPOINT sends them instead."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.checkpoint.startswith("models:") and not MODEL_URI.fullmatch(self.checkpoint):
            raise ConfigError(
                f"--checkpoint '{self.checkpoint}' is no model; write models:/NAME@ALIAS or models:/NAME/VERSION, "
                "for instance models:/alignment-adapter@champion."
            )
        if self.max_queue < self.max_batch:
            raise ConfigError(
                f"--max-queue ({self.max_queue}) must be at least --max-batch ({self.max_batch}), or a full request "
                "never fits."
            )
        if self.tokens and self.open_access:
            raise ConfigError("--tokens and --open-access contradict each other; give one of them.")
        return self


class ServeConfig(EndpointConfig):
    """The endpoint on this machine: a champion or checkpoint over HTTP, until Ctrl-C or SIGTERM."""

    host: str = "127.0.0.1"
    """Interface to listen on; others than loopback need --tokens."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    cpus_per_replica: float = Field(default=0.0, ge=0.0)
    """CPUs, and threads of the forward pass, of each replica; 0: this machine's, divided by the replicas."""
    proxy: Literal["auto", "haproxy", "python"] = "auto"
    """What stands before the replicas; auto: HAProxy on Linux unless TLS is asked for, which it cannot do here."""
    tls_cert: Path | None = None
    """Certificate chain (PEM): answer HTTPS alone."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    new_token: str | None = None
    """Instead of serving: add a token of this name to --tokens, and print its secret once."""
    scopes: tuple[Literal["infer", "admin"], ...] = ("infer",)
    """What the new token may do."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key belong together; give both.")
        if self.tls_cert and self.proxy == "haproxy":
            raise ConfigError("--proxy haproxy cannot do TLS here; leave it out, or end TLS before it.")
        if self.new_token and not self.tokens:
            raise ConfigError("--new-token needs the file it goes to: --tokens FILE")
        if not (self.new_token or self.tokens or self.open_access or self.loopback):
            raise ConfigError(
                f"--host {self.host} can be reached by others: give --tokens FILE (--new-token NAME makes one), or "
                "--open-access where a gateway asks for them."
            )
        return self

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class JobsConfig(Config):
    """The jobs of a cluster."""

    address: str | None = None
    """Dashboard of the cluster, http://host:8265; default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."""


class JobConfig(JobsConfig):
    """Ask a job to end: training saves first."""

    job: str
    """Name of the job, as `ray-app jobs list` shows it."""


class JobLogsConfig(JobConfig):
    """Follow a job's log to its end, whatever happens to the connection. Exit code: the job's own."""

    follow: bool = True
    """Wait for the end; otherwise only what there is."""


class SubmitConfig(JobsConfig):
    """Run a command as a job on a cluster, follow its log, end with its exit code.

    For instance: ray-app submit --env MLFLOW_TRACKING_URI -- train --store /mnt/stores/dsec --out /mnt/runs/dsec
    """

    command: tuple[str, ...] = ()
    """The command and its flags, after `--`. Its paths are the cluster's."""
    working_dir: Path = Path()
    """Folder that travels with the job: its code and settings, without what git ignores."""
    max_upload_mib: float = Field(default=5.0, gt=0.0)
    """Largest size of that folder: data does not travel with a job."""
    env: tuple[str, ...] = ()
    """Names of variables that the job gets from here. Not for secrets: the dashboard shows them."""
    requirements: Path | None = None
    """Requirements to install for this job, such as constraints.txt; default: the cluster has them installed."""
    python: str = "python"
    """Python of the cluster's head."""
    detach: bool = False
    """Only submit; `ray-app jobs logs` follows."""

    @model_validator(mode="after")
    def _has_command(self) -> Self:
        if not self.command:
            raise ConfigError("submit needs a command after `--`, such as: ray-app submit -- doctor")
        return self


class QuickstartConfig(TrackingFlags):
    """Scenes, training, evaluation and promotion, small, on this machine."""

    out: Path = Path("quickstart")
    """Folder for the store, the run and the report."""
    num_pairs: Positive = 480
    """Rendered pairs."""
    num_sequences: Positive = 40
    """Rendered drives."""
    strategy: Strategy = "conv"
    """Adapter; the reference's is lightweight."""
    num_epochs: Positive = 12
    """Training epochs."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers, channels of conv; default: the strategy's own."""
    seed: int = 0
    """Seed of everything."""


def flat(config: Config) -> dict[str, Any]:
    """A config as JSON values, for MLflow parameters and provenance."""
    return config.model_dump(mode="json")
