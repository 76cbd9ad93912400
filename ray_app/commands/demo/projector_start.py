"""Start of the demo's projector, solved in closed form: a linear probe of the facts, then the words for them.

The first layer is a ridge regression from an image's features to the values of every kind of fact; the second maps
their scores to the language model's own embeddings of these values, one image token for each kind.

Shapes: N = pictures, E = width of a feature, V = values of all kinds, K = kinds, D = width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_app.scenes.captions import FACTS
from ray_app.scenes.facts import SceneFacts

PENALTY = 1.0
"""Ridge penalty, as a multiple of a feature vector's mean squared norm over the number of pictures."""
SHARPNESS = 2.0
"""Scores are this times a probability before GELU."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear probe of every kind of fact."""

    values: dict[str, tuple[str, ...]]
    """Values of each kind, in the order of the scores."""
    weight_VE: Tensor
    """Weights."""
    bias_V: Tensor
    """Biases."""

    def answers(self, features_NE: Tensor) -> dict[str, list[str]]:
        """Return the likeliest value of each kind for each picture."""
        scores = (features_NE.float() @ self.weight_VE.T + self.bias_V).split(
            [len(values) for values in self.values.values()], dim=1
        )
        return {
            kind: [values[i] for i in part.argmax(dim=1).tolist()]
            for (kind, values), part in zip(self.values.items(), scores, strict=True)
        }


def solve_probe(features_NE: Tensor, facts: Sequence[SceneFacts]) -> Probe:
    """Fit a probe to the facts of pictures, by ridge regression in its dual form."""
    values: dict[str, tuple[str, ...]] = {}
    wanted = []
    for kind, fact in FACTS.items():
        true = [fact.true(each) for each in facts]
        values[kind] = tuple(sorted(set(true)))
        wanted.append(torch.tensor([[value == each for each in values[kind]] for value in true], dtype=torch.float64))
    y_NV = torch.cat(wanted, dim=1)
    x_NE = features_NE.double()
    mean_E, scale_E = x_NE.mean(dim=0), x_NE.std(dim=0) + 1e-3
    x_NE = (x_NE - mean_E) / scale_E
    gram_NN = x_NE @ x_NE.T
    penalty = PENALTY * gram_NN.diagonal().mean()
    dual_NV = torch.linalg.solve(
        gram_NN + penalty * torch.eye(len(x_NE), dtype=torch.float64), y_NV - y_NV.mean(dim=0)
    )
    weight_VE = (x_NE.T @ dual_NV).T / scale_E
    return Probe(values, weight_VE.float(), (y_NV.mean(dim=0) - weight_VE @ mean_E).float())


def projector_start(
    probe: Probe, features_NE: Tensor, facts: Sequence[SceneFacts], words: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the projector's tensors. `words`: the language model's embedding (D,) of each value."""
    scores_NV = F.gelu(SHARPNESS * (features_NE.float() @ probe.weight_VE.T + probe.bias_V)).double()
    wanted_NKD = torch.stack(
        [torch.stack([words[fact.true(each)] for fact in FACTS.values()]) for each in facts]
    ).double()
    mean_V, y_NX = scores_NV.mean(dim=0), wanted_NKD.flatten(1)
    centred_NV = scores_NV - mean_V
    gram_VV = centred_NV.T @ centred_NV
    penalty = 1e-2 * gram_VV.diagonal().mean() * torch.eye(len(gram_VV), dtype=torch.float64)
    weight_VX = torch.linalg.solve(gram_VV + penalty, centred_NV.T @ (y_NX - y_NX.mean(dim=0)))
    return {
        "projector.0.weight": (SHARPNESS * probe.weight_VE).contiguous(),
        "projector.0.bias": SHARPNESS * probe.bias_V,
        "projector.2.weight": weight_VX.T.float().contiguous(),
        "projector.2.bias": (y_NX.mean(dim=0) - mean_V @ weight_VX).float(),
    }
