"""`conv`: an event image in patches, a few wide-kernel blocks, an image out, on top of the mean training target.

Shapes: B = pairs, E, D = widths of event and target feature, G, K = rows and columns of the grid of patches,
C = channels.
"""

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter, InitStats
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

KERNEL = 7
"""Side of a depthwise kernel, in patches: half of a 14 × 14 grid is within one."""
EXPANSION = 2
"""Width of a block's inner layer, in channels."""
SMALL = 0.1
"""Initial gain of a block, relative to its input (in the manner of arXiv 2201.03545)."""
MAX_PATCH = 256
"""Largest patch that is suggested."""


class ConvBlock(nn.Module):
    """A depthwise 7 × 7 convolution, the mean over the whole image added to every place, and two dense layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.context = nn.Linear(channels, channels)
        self.up = nn.Linear(channels, EXPANSION * channels)
        self.down = nn.Linear(EXPANSION * channels, channels)
        self.gain = nn.Parameter(torch.full((channels,), SMALL))

    def forward(self, x_BGKC: Tensor) -> Tensor:
        near_BGKC = self.norm(self.depthwise(x_BGKC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        near_BGKC = near_BGKC + self.context(near_BGKC.mean(dim=(1, 2), keepdim=True))
        return x_BGKC + self.gain * self.down(nn.functional.gelu(self.up(near_BGKC)))


class Conv(Adapter):
    """Mean target + image of a small network, whose last layer starts at zero: training starts at the mean target.

    184,320 parameters for 3 × 224 × 224 pixels at C = 64, 3 blocks and patches of 16. The mean target is a buffer.
    """

    HIDDEN_DIM = 64
    DEPTH = 3
    SETTINGS = frozenset({"hidden_dim", "depth", "patch"})
    REQUIRES = "means"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        channels, patch = config.hidden_dim, config.patch
        self.event_shape, self.target_shape = config.event_shape, config.target_shape
        self.grid = (self.event_shape[1] // patch, self.event_shape[2] // patch)
        self.input = nn.Linear(self.event_shape[0] * patch * patch, channels)
        self.input_norm = nn.LayerNorm(channels)
        self.place = nn.Parameter(torch.zeros(*self.grid, channels))
        self.blocks = nn.ModuleList(ConvBlock(channels) for _ in range(config.depth))
        self.output_norm = nn.LayerNorm(channels)
        self.output = nn.Linear(channels, config.target_dim // (self.grid[0] * self.grid[1]))
        self.mean_target: Tensor
        self.register_buffer("mean_target", torch.zeros(config.target_dim))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        for side in ("event", "target"):
            shape = getattr(config, f"{side}_shape")
            if len(shape) != 3:
                raise ConfigError(
                    f"conv works on images (channels, height, width), but the {side} feature has shape "
                    f"{list(shape)}; use lowrank, ridge or bottleneck for plain vectors"
                )
        rows, columns = (side // config.patch for side in config.event_shape[1:])
        fits = all(side % config.patch == 0 for side in config.event_shape[1:])
        if not fits or config.target_shape[1] % rows or config.target_shape[2] % columns:
            sides = [*config.event_shape[1:], *config.target_shape[1:]]
            tries = [n for n in range(2, min(*sides, MAX_PATCH) + 1) if not any(side % n for side in sides)]
            raise ConfigError(
                f"--patch ({config.patch}) must divide the sides of the event image {list(config.event_shape[1:])} "
                f"and give a grid that divides the target's {list(config.target_shape[1:])}; "
                f"try {', '.join(map(str, tries)) or 'images with sides that have a common divisor'}"
            )

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        h_BGKC = self.input_norm(self.input(self.patches(event_BE))) + self.place
        for block in self.blocks:
            h_BGKC = block(h_BGKC)
        return self.mean_target + self.image(self.output(self.output_norm(h_BGKC)))

    def patches(self, event_BE: Tensor) -> Tensor:
        """Cut images into patches, (B, G, K, numbers of a patch), with white as zero: no events."""
        (rows, columns), (channels, height, width) = self.grid, self.event_shape
        x = (1.0 - event_BE).view(len(event_BE), channels, rows, height // rows, columns, width // columns)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def image(self, out_BGKP: Tensor) -> Tensor:
        """Join patches to target images, (B, D)."""
        (rows, columns), (channels, height, width) = self.grid, self.target_shape
        x = out_BGKP.view(len(out_BGKP), rows, columns, channels, height // rows, width // columns)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for parameter in (self.place, self.output.weight, self.output.bias, self.mean_target):
            nn.init.zeros_(parameter)
        for block in self.blocks:
            assert isinstance(block, ConvBlock)
            nn.init.constant_(block.gain, SMALL)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:  # noqa: ARG002
        self.mean_target.copy_(stats["target_mean"])
