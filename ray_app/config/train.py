"""Settings of `train`, which are also what a sweep varies."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Positive, SplitFlags, StorePlace, Strategy, TrackingFlags, Workers
from ray_app.errors import ConfigError


class TrainConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Train an adapter with Ray Train."""

    LOSSES: ClassVar[tuple[str, ...]] = ("mse", "cosine", "contrastive", "accept", "centred", "next_position")
    """Losses that have a weight."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: StorePlace
    """Folder of the run, or a URI such as s3://bucket/run; must be new or empty."""
    resume: StorePlace | None = None
    """Resume the run in this folder, or at this URI. It gives --store, --out and all other settings; of these, only
    where and how it runs may be changed, such as --num-workers."""
    strategy: Strategy | None = None
    """Adapter; default: the best known for the store's features (images: conv, vectors: lowrank, sequences:
    token_bottleneck with --init pca). The reference's: lightweight (its diagram), lightweight_reference (its code).
    Between principal subspaces: lowrank. Plain: linear, bottleneck. Solved: ridge.
    For sequences of hidden states: token_bottleneck, token_multilayer, token_wide, token_attention, token_causal."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers, channels of conv; default: the strategy's own (lightweight 512, conv 64, lowrank
    256)."""
    depth: Positive | None = None
    """Blocks of conv (default 3) and lowrank (1); hidden layers of lightweight_reference, bottleneck (1) and, after
    their first, of lightweight (1)."""
    patch: Positive = 16
    """Side of a patch of conv, in pixels."""
    rank: Positive = 64
    """Dimensions of the principal subspaces of lowrank and --init pca."""
    init: Literal["random", "pca"] = "random"
    """pca: full-width layers start at the mean training target and the principal subspaces; for sequences each
    position starts at its own mean training target. conv and lowrank start there anyway."""
    init_from: Path | None = None
    """Means and subspaces that another run computed from the same training pairs, RUN/init; default: computed
    here."""
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
    """Weight of the symmetric contrastive loss; negatives are the other pairs of the batch, those of all workers."""
    mse_space: Literal["raw", "unit"] = "raw"
    """Take the squared error on features, or on unit vectors as the reference did."""
    accept_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the soft rejection, sigmoid((θ − cosine) / temperature)."""
    accept_thetas: tuple[Annotated[float, Field(ge=-1.0, le=1.0)], ...] = (0.8,)
    """Each θ of the soft rejection; their losses are averaged."""
    accept_temperature: float = Field(default=0.05, gt=0.0)
    """Temperature of the soft rejection."""
    centred_weight: float = Field(default=0.0, ge=0.0)
    """Weight of 1 − centred cosine: the mean training target taken off both sides."""
    next_position_weight: float = Field(default=0.0, ge=0.0)
    """For sequences: weight of 1 − cosine of each aligned token with the target's next one; made for token_causal."""
    flip: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: probability that both images of a pair are mirrored."""
    shift: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Augmentation: both images are moved by up to this share of their sides."""
    event_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: up to this share of an image's event pixels is removed."""
    event_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: up to this share of an image's pixels becomes red or blue."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """Learning rate: halved when validation stops improving, or a half cosine over --num-epochs, epoch by epoch."""
    train_on_val: bool = False
    """The validation part trains too, for a last run of settings that are chosen already. Nothing stops early then,
    the learning rate follows the training loss, and the last epoch's checkpoint is the result."""
    plateau_patience: int = Field(default=2, ge=0)
    """Epochs without a better validation loss before the learning rate is halved."""
    early_stop_patience: int = Field(default=5, ge=1)
    """Epochs without a better validation loss before training ends."""
    val_every_steps: int = Field(default=0, ge=0)
    """Also validate before the first step and, within each epoch, after every so many steps, for a finer curve; the
    best checkpoint is still that of an epoch's end. 0: only there."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    num_workers: Workers = "1"
    """Workers: a number, or MIN:MAX such as 1:8. Then as many train as the cluster has room for: fewer
    train when nodes go, more when nodes come, with the same global batches; a lost node costs the steps since the
    last save (see --checkpoint-every)."""
    parallelism: Literal["auto", "data", "feature", "mesh"] = "auto"
    """Workers divide the pairs of a batch (data) or the columns of its features (feature), for wide adapters: each
    then holds a slice of the first and the last layer. auto: whichever of these sends fewer bytes a step. mesh: the
    features inside each node, the pairs over nodes."""
    elastic_check_interval_s: float = Field(default=60.0, gt=0.0)
    """With MIN:MAX: seconds between two checks for room for more workers; each change restarts all workers."""
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
        if self.max_workers > self.batch_size and self.parallelism != "feature":
            raise ConfigError(
                f"--num-workers ({self.num_workers}) asks for more workers than a batch has pairs "
                f"({self.batch_size}); take at most {self.batch_size}, or a larger --batch-size."
            )
        if not any(getattr(self, f"{name}_weight") for name in self.LOSSES):
            flags = ", ".join(f"--{name}-weight".replace("_", "-") for name in self.LOSSES)
            raise ConfigError(f"{flags} are all 0; give one a weight.")
        if self.accept_weight and not self.accept_thetas:
            raise ConfigError("--accept-weight needs a θ: --accept-thetas 0.8")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the run, if `out` is on a disk."""
        return Path(self.out)

    def at(self, folder: Path) -> Self:
        """Return the settings with the run in this folder: the copy that a process has of a run at a URI."""
        return self.model_copy(update={"out": str(folder)})

    @property
    def min_workers(self) -> int:
        """Smallest number of workers."""
        return int(self.num_workers.partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Largest number of workers."""
        return int(self.num_workers.rpartition(":")[2])

    @property
    def elastic(self) -> bool:
        """True if the number of workers follows the cluster."""
        return ":" in self.num_workers


class LanguageModelTrainConfig(TrainConfig):
    """Train what a language model reads, or changes of it, by the same loop."""

    language_model: Path
    """Folder of the frozen language model."""
    projector_start: Path
    """File of the tensors that training starts from; the others are drawn."""


class AnswerTrainConfig(LanguageModelTrainConfig):
    """Train image tokens and LoRA factors of a language model on answers."""

    strategy: Literal["image_tokens"] = "image_tokens"  # type: ignore[assignment]
    """Adapter."""
    image_tokens: Positive
    """Tokens of a picture."""


class DraftTrainConfig(LanguageModelTrainConfig):
    """Train a drafter, or the image tokens that it is shown, on a target's own answers and distributions."""

    LOSSES: ClassVar[tuple[str, ...]] = (
        "kl",
        "reverse_kl",
        "acceptance",
        "lk",
        "accepted_length",
        "cross_entropy",
        "cosine",
        "mse",
    )

    strategy: Literal["early_exit", "eagle_head", "event_tokens", "constant_tokens"]  # type: ignore[assignment]
    """Adapter: a drafter, image tokens of events for a drafter that is frozen, or the best constant ones."""
    exit_layers: Positive = 2
    """Layers of the target that an early exit has."""
    draft_steps: int = Field(default=5, ge=1, le=8)
    """Tokens in a row that an eagle_head learns to draft from its own states."""
    drafter: Path | None = None
    """Checkpoint of the frozen drafter; for a drafter none."""
    kl_weight: float = Field(default=0.0, ge=0.0)
    """Weight of KL(target ‖ drafter)."""
    reverse_kl_weight: float = Field(default=0.0, ge=0.0)
    """Weight of KL(drafter ‖ target)."""
    acceptance_weight: float = Field(default=0.0, ge=0.0)
    """Weight of 1 − Σ min(p, q), the chance that a drawn token is rejected."""
    lk_weight: float = Field(default=0.0, ge=0.0)
    """Weight of KL that gives way to acceptance (arXiv 2602.23881)."""
    accepted_length_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the expected share of a draft of eight tokens that is not accepted."""
    cross_entropy_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the cross-entropy of the target's own tokens."""
    mse_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the mean squared error of image tokens; of an eagle_head, of the states that it predicts."""
    cosine_weight: float = Field(default=0.0, ge=0.0)
    """Weight of 1 − cosine of the same."""

    @model_validator(mode="after")
    def _has_a_drafter(self) -> Self:
        if (self.strategy in ("early_exit", "eagle_head")) != (self.drafter is None):
            raise ConfigError(
                f"--strategy {self.strategy} and --drafter {self.drafter or 'none'} do not go together: an early "
                "exit is a drafter itself, as an eagle_head is, and image tokens are trained through one."
            )
        return self


DRAFTING: tuple[str, ...] = get_args(DraftTrainConfig.model_fields["strategy"].annotation)
"""Strategies of `DraftTrainConfig`."""


def settings_of(strategy: Any) -> type[TrainConfig]:
    """Return the settings that a strategy is trained with; those of `ray-app train` for any other value."""
    return DraftTrainConfig if strategy in DRAFTING else TrainConfig
