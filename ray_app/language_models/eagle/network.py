"""One decoder layer on the target's last states, as in EAGLE (arXiv 2401.15077), with a head for some ids.

Behind token t the layer reads the embedding of t and a state: the input of the target's head that chose t, or, once
it drafts, what it predicted of that. Of the answer it sees the positions up to t, and of the prompt the last state.

Shapes: B = rows, L = positions of an answer, D = width, I = ids of the head, K = positions that are seen, H = heads,
W = width of a head.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_app.core.adapters.drafting import EagleHead
from ray_app.encoders.library import transformers
from ray_app.language_models.loading import read_weights


@dataclass(slots=True)
class Seen:
    """Keys and values of what was read, part by part, each (B, H, L, W)."""

    keys: list[Tensor] = field(default_factory=list)
    """Keys."""
    values: list[Tensor] = field(default_factory=list)
    """Values."""


class EagleNetwork:
    """The layer of an `EagleHead`, with the target's own embeddings and rotations."""

    def __init__(self, model: Any, head: EagleHead) -> None:
        """`model`: the target's language model, of Llama's kind; the head gets its device and number format."""
        body = model.get_decoder()
        self._embed, self._rotary, self._eps = body.get_input_embeddings(), body.rotary_emb, body.config.rms_norm_eps
        self._head_width = body.layers[0].self_attn.head_dim
        self._rotate = transformers().models.llama.modeling_llama.apply_rotary_pos_emb
        self.head = head.to(model.device, model.dtype)

    def read(self, tokens_BL: Tensor, states_BLD: Tensor, places_L: Tensor, seen: Seen, sees_LK: Tensor) -> Tensor:
        """Read tokens with states; return the predicted input of the target's head behind them, (B, L, D).

        What is read is added to `seen`; `sees_LK` is True for what each position sees of all that.
        """
        maps = self.head.maps
        x_BLD = F.linear(torch.cat([self._embed(tokens_BL), states_BLD], dim=2), maps["fc"])
        inner_BLD = self._norm(x_BLD, "input_layernorm")
        query_BHLW, key_BHLW, value_BHLW = (
            F.linear(inner_BLD, maps[name]).unflatten(2, (-1, self._head_width)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos_1LW, sin_1LW = self._rotary(inner_BLD, places_L[None])
        query_BHLW, key_BHLW = self._rotate(query_BHLW, key_BHLW, cos_1LW, sin_1LW)
        seen.keys.append(key_BHLW)
        seen.values.append(value_BHLW)
        mixed_BHLW = F.scaled_dot_product_attention(
            query_BHLW,
            torch.cat(seen.keys, dim=2),
            torch.cat(seen.values, dim=2),
            attn_mask=sees_LK,
            enable_gqa=True,
        )
        x_BLD = x_BLD + F.linear(mixed_BHLW.transpose(1, 2).flatten(2), maps["o_proj"])
        inner_BLD = self._norm(x_BLD, "post_attention_layernorm")
        gate_BLM = F.silu(F.linear(inner_BLD, maps["gate_proj"]))
        x_BLD = x_BLD + F.linear(gate_BLM * F.linear(inner_BLD, maps["up_proj"]), maps["down_proj"])
        return self._norm(x_BLD, "norm")

    def logits(self, states_BLD: Tensor) -> Tensor:
        """Return the logits of the ids, (B, L, I), from predicted states."""
        return F.linear(states_BLD, self.head.maps["head"])

    def unrolled(self, states_BLD: Tensor, ids_BL: Tensor, num_steps: int) -> list[Tensor]:
        """Draft from every position at once, along the answer; return the predicted states of each step.

        Step s at position t is what a draft that begins behind token t says of token t + 1 + s, if its own tokens
        before that are the answer's. Positions past an answer's end mean nothing.
        """
        length = ids_BL.shape[1]
        places_L = torch.arange(length, device=ids_BL.device)
        own_LL = torch.eye(length, dtype=torch.bool, device=ids_BL.device)
        seen, sees_LK = Seen(), own_LL[:, :0]
        steps = []
        for step in range(num_steps):
            sees_LK = torch.cat([sees_LK, own_LL if step else own_LL.cumsum(dim=1).T.bool()], dim=1)
            tokens_BL = F.pad(ids_BL[:, step:], (0, min(step, length)))
            states_BLD = self.read(tokens_BL, states_BLD, places_L + step, seen, sees_LK)
            steps.append(states_BLD)
        return steps

    def _norm(self, x_BLD: Tensor, name: str) -> Tensor:
        return F.rms_norm(x_BLD, x_BLD.shape[2:], self.head.norms[name], self._eps)


def frozen_model(folder: Path, device: torch.device) -> Any:
    """Return the language model in a folder, which a head is trained on."""
    model = read_weights(folder, transformers().AutoModelForCausalLM, "float32", str(device))
    return model.requires_grad_(False)


def eagle_start(model: Any, head_ID: Tensor) -> dict[str, Tensor]:
    """Return the tensors that an `eagle_head` starts from: the target's first layer, which reads embeddings only."""
    body = model.get_decoder()
    layer, width = body.layers[0], head_ID.shape[1]
    start = {
        f"maps.{name}": getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    start |= {f"maps.{name}": getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    start |= {
        f"norms.{name}": getattr(layer, name).weight for name in ("input_layernorm", "post_attention_layernorm")
    }
    fc_DE = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)
    return start | {"maps.fc": fc_DE, "norms.norm": body.norm.weight, "maps.head": head_ID}
