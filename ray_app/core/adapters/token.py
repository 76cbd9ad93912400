"""Adapters of sequences of hidden states, as the reference's project defines them: every token W → W.

    token_bottleneck  one block W → 256 → W with a residual connection and a learned scale (2.1 M at W = 4,096)
    token_multilayer  three of them
    token_wide        W → 1,024 → W
    token_attention   one pre-norm attention layer, 8 heads, FFN 2,048; its output mixed into the input
    token_causal      the same, each position seeing those before it; trained with --next-position-weight too

None normalises its output: a target's length is its own, and at the start each is the identity. With `mean_start` the
residual connection is cut where it leaves: what a layer adds is added to the mean training target of the position, as
`conv` does, and training begins there. What is behind a sequence's end stays zero.

Shapes: B = pairs, T = positions, W = token width, D = T · W, H = hidden width, N = heads.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter, InitStats, NoisyDropout
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.sequences import mask_of
from ray_app.errors import ConfigError

SCALE = 0.1
"""Initial value of the learned scales."""
HEADS = 8
"""Heads of the attention layer."""
MAX_ATTENDED = 8192
"""Most tokens of a sequence that is attended to: memory grows with their square."""


class TokenAdapter(Adapter):
    """Cuts features into tokens, and sets positions without one to zero."""

    HIDDEN_DIM = 256
    SETTINGS = frozenset({"hidden_dim", "dropout"})
    PCA_REQUIRES = "means"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.limit, self.width = config.event_shape
        self.mean_target: Tensor
        if config.mean_start:
            self.register_buffer("mean_target", torch.zeros(self.limit, self.width))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        for side in ("event", "target"):
            if len(shape := getattr(config, f"{side}_shape")) != 2:
                raise ConfigError(
                    f"{config.strategy} works on sequences (tokens, width), but the {side} feature has shape "
                    f"{list(shape)}; use conv for images, bottleneck for plain vectors"
                )
        if config.event_shape != config.target_shape:
            raise ConfigError(
                f"{config.strategy} adds to its input: event {list(config.event_shape)} and target "
                f"{list(config.target_shape)} must have the same limit and width"
            )

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        if event_BE.shape[1] != self.limit * self.width:
            raise ConfigError(
                f"sequences of {event_BE.shape[1] / self.width:g} tokens of {self.width} were given, the adapter's "
                f"limit is {self.limit}: cut longer ones, and put zeros behind shorter ones, which are their mask"
            )
        x_BTW = event_BE.unflatten(1, (self.limit, self.width))
        mask_BT = mask_of(event_BE, self.width)
        aligned_BTW = self.tokens(x_BTW, mask_BT, noise)
        if self.config.mean_start:
            aligned_BTW = self.mean_target + (aligned_BTW - x_BTW)
        return (aligned_BTW * mask_BT[..., None]).flatten(1)

    @abstractmethod
    def tokens(self, x_BTW: Tensor, mask_BT: Tensor, noise: BatchNoise | None) -> Tensor:
        """Return tokens with the adapter's additions, (B, T, W); values at padding do not matter."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        if self.config.mean_start:
            nn.init.zeros_(self.mean_target)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            self.mean_target.copy_(stats["target_mean"].view_as(self.mean_target))


class TokenBlock(nn.Module):
    """x + scale · up(gelu(down(norm(x)))); up begins at zero."""

    def __init__(self, width: int, hidden: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden)
        self.dropout = NoisyDropout(dropout, layer)
        self.up = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    def forward(self, x_BTW: Tensor, noise: BatchNoise | None) -> Tensor:
        h_BTH = self.dropout(nn.functional.gelu(self.down(self.norm(x_BTW))), noise)
        return x_BTW + self.scale * self.up(h_BTH)

    def begin_as_identity(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.constant_(self.scale, SCALE)


class TokenBottleneck(TokenAdapter):
    """One block or several, token by token."""

    BLOCKS: ClassVar[int] = 1

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(
            TokenBlock(self.width, config.hidden_dim, config.dropout, layer) for layer in range(self.BLOCKS)
        )

    def tokens(self, x_BTW: Tensor, mask_BT: Tensor, noise: BatchNoise | None) -> Tensor:  # noqa: ARG002
        for block in self.blocks:
            x_BTW = block(x_BTW, noise)
        return x_BTW

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for block in self.blocks:
            assert isinstance(block, TokenBlock)
            block.begin_as_identity()


class TokenMultilayer(TokenBottleneck):
    """Three blocks."""

    BLOCKS = 3


class TokenWide(TokenBottleneck):
    """One wide block."""

    HIDDEN_DIM = 1024


class TokenAttention(TokenAdapter):
    """x + scale · (layer(x) − x), the layer being pre-norm attention and feed-forward (arXiv 2002.04745)."""

    HIDDEN_DIM = 2048
    CAUSAL: ClassVar[bool] = False

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        width = self.width
        self.attention_norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)
        self.block = TokenBlock(width, config.hidden_dim, config.dropout, layer=0)
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        super().check(config)
        if config.event_shape[1] % HEADS:
            raise ConfigError(f"the token width ({config.event_shape[1]}) must be a multiple of the {HEADS} heads")
        if config.event_shape[0] > MAX_ATTENDED:
            raise ConfigError(
                f"{config.strategy} attends to at most {MAX_ATTENDED:,} tokens, not {config.event_shape[0]:,}; use "
                "token_bottleneck, or shorter sequences"
            )

    def tokens(self, x_BTW: Tensor, mask_BT: Tensor, noise: BatchNoise | None) -> Tensor:
        return x_BTW + self.scale * (self.block(x_BTW + self.attention(x_BTW, mask_BT), noise) - x_BTW)

    def attention(self, x_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        """Attend from each position to the tokens that it may see; for `token_causal` none after it."""
        query, key, value = self.read(self.attention_norm(x_BTW)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        visible_BTT = mask_BT[:, None, :].expand(-1, self.limit, -1)
        if self.CAUSAL:
            visible_BTT = (
                visible_BTT & torch.ones(self.limit, self.limit, dtype=torch.bool, device=x_BTW.device).tril()
            )
        # A position that may see nothing, such as padding, sees itself: softmax over nothing is NaN.
        visible_BTT = visible_BTT | torch.eye(self.limit, dtype=torch.bool, device=x_BTW.device)
        read_BNTK = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible_BTT[:, None])
        return self.write(read_BNTK.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.block.begin_as_identity()
        for parameter in (self.write.weight, self.write.bias):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.scale, SCALE)


class TokenCausal(TokenAttention):
    """Each position sees itself and those before it."""

    CAUSAL = True
