"""A model in service: a checkpoint that was verified, replayed, made ready for this hardware and warmed up.

Shapes: G = golden rows, N = pairs, E = event width, D = target width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import num_parameters
from ray_app.errors import CheckpointError
from ray_app.store.checkpoint import Checkpoint, load_checkpoint, replay_golden
from ray_app.store.golden import TOLERANCE, golden_answers, relative_errors
from ray_app.store.manifest import Features

from .evaluation_record import EvaluationRecord, read_evaluation_record

Precision = Literal["fp32", "bf16"]

LIMITS: dict[Precision, float] = {"fp32": TOLERANCE, "bf16": 0.1}
"""Largest error of one number, relative to the root mean square of its row: bfloat16 keeps 8 bits, and at full width
differs by 1.5e-2."""


BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""CPUs that multiply bfloat16, as Linux names what they can do."""
AMD = "AuthenticAMD"
"""Whose CPUs multiply float32 faster with oneDNN than with MKL, which PyTorch takes by itself."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which checkpoint this is, and where it comes from."""

    version: str
    """Number in the registry; of a folder the first twelve digits of its digest."""
    digest: str
    """SHA-256 of MANIFEST.sha256, so of every byte of the checkpoint."""
    source: str
    """As it was asked for."""
    run_id: str | None = None
    """MLflow run that holds it."""
    tags: Mapping[str, str] | None = None
    """What the registered version tells of itself."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything that answers a request, in one value: it is exchanged as a whole."""

    identity: Identity
    """Which checkpoint."""
    adapter: Adapter
    """In evaluation mode, on `device`, in `precision`."""
    config: AdapterConfig
    """What the adapter was built from."""
    features: Features
    """Type, shape and scale of both sides."""
    evaluation_record: EvaluationRecord
    """How it was judged before."""
    provenance: Mapping[str, Any]
    """provenance.json of the checkpoint."""
    parameters: int
    """Trained numbers."""
    precision: Precision
    """Of the weights and of products; sums and the residual connection stay float32."""
    device: torch.device
    """Where it computes."""
    loaded_at: datetime
    """When it was ready."""

    @property
    def version(self) -> str:
        """As in answers and metrics."""
        return self.identity.version

    def forward(self, event_NE: Tensor) -> Tensor:
        """Aligned features (N, D), float32, on `device`. Called without a gradient."""
        event_NE = event_NE.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.adapter(event_NE).float()


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN multiplies them: else each pass in bfloat16 lays them out anew.

    One pair at full width, on two cores, took 28 ms for 48 (Xeon with AMX, bfloat16). In float32 it is MKL that
    multiplies otherwise: faster on that Xeon (34 ms for 46), slower on an EPYC.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear` under autocast."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        return product


def load_served(folder: Path, identity: Identity, precision: str, use_gpu: bool, max_batch: int) -> ServedModel:
    """Verifies checksums and golden answers, then makes the adapter ready. CheckpointError: not served, and why."""
    checkpoint = load_checkpoint(folder)
    if checkpoint.sha256 != identity.digest:
        raise CheckpointError(
            f"{identity.source} is checkpoint {checkpoint.sha256[:12]}, registered was {identity.digest[:12]}: "
            "somebody changed its files after it was promoted. Promote it again."
        )
    replay_golden(checkpoint)
    device = torch.device("cuda" if use_gpu else "cpu")
    chosen = chosen_precision(precision, device)
    parameters = num_parameters(checkpoint.adapter)
    golden = golden_answers(checkpoint.adapter, checkpoint.features.event)
    model = ServedModel(
        identity=identity,
        adapter=optimise_for_device(checkpoint, chosen, device),
        config=checkpoint.config,
        features=checkpoint.features,
        evaluation_record=read_evaluation_record(
            identity.source, (identity.tags or {}).get("evaluation"), checkpoint.metrics
        ),
        provenance=checkpoint.provenance,
        parameters=parameters,
        precision=chosen,
        device=device,
        loaded_at=datetime.now(UTC),
    )
    with torch.inference_mode():
        require_close(model, golden)
        for rows in (1, max_batch):  # kernels and buffers are made at first use
            model.forward(torch.rand(rows, model.config.event_dim))
    return model


def optimise_for_device(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> Adapter:
    """The adapter on its device; in bf16 its matrices alone, so that norms and residuals stay float32."""
    adapter = checkpoint.adapter.to(device).requires_grad_(False)
    pack = device.type == "cpu" and use_packed_linear(precision)
    for module in list(adapter.modules()):
        for name, layer in module.named_children():
            if precision == "bf16" and isinstance(layer, nn.Linear):
                layer.bfloat16()
            if pack and type(layer) is nn.Linear:
                setattr(module, name, PackedLinear(layer))
    return adapter


def use_packed_linear(precision: Precision) -> bool:
    """Whether oneDNN is there, can, and is the faster on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "bf16":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return cpu().get("vendor_id") == AMD


def require_close(model: ServedModel, golden: Mapping[str, Tensor]) -> None:
    """CheckpointError where precision, layout or device change the answers by more than they should."""
    event_GE, limit = golden["event"].float() * model.features.event.scale, LIMITS[model.precision]
    aligned_GD = model.forward(event_GE).cpu()
    same_G = (aligned_GD == golden["aligned"]).all(dim=1)  # all zeros have no relative error
    worst = float(relative_errors(aligned_GD, golden["aligned"]).masked_fill(same_G, 0.0).max())
    if not worst <= limit:
        mend = "serve it with precision: fp32" if model.precision == "bf16" else "serve it on another machine"
        raise CheckpointError(
            f"{model.identity.source}: in {model.precision} it answers on {model.device} with a relative error of "
            f"{worst:.1e} (limit {limit:g}); {mend}."
        )


def chosen_precision(asked: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the hardware multiplies it: a GPU that says so, a CPU with AMX or AVX-512 BF16."""
    if asked == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "bf16" if BF16_FLAGS & set(cpu().get("flags", "").split()) else "fp32"
    return "bf16" if asked == "bf16" else "fp32"


def cpu() -> dict[str, str]:
    """What Linux says of this machine's first CPU; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
