"""A model in service: a checkpoint that is verified, replayed, optimised for this hardware and warmed up.

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
from ray_app.store.manifest import Features, require_target_features

from .evaluation_record import EvaluationRecord, read_evaluation_record

Precision = Literal["fp32", "bf16"]

LIMITS: dict[Precision, float] = {"fp32": TOLERANCE, "bf16": 0.1}
"""Largest error of one number, relative to the root mean square of its row; bfloat16 keeps 8 bits, and at full width
differs by 1.5e-2."""
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Linux's names for the ability to multiply bfloat16."""
AMD = "AuthenticAMD"
"""Vendor whose CPUs multiply float32 faster with oneDNN than with MKL, PyTorch's default."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a checkpoint and its origin."""

    version: str
    """Number in the registry; for a folder the first twelve digits of its digest."""
    digest: str
    """SHA-256 of MANIFEST.sha256, which covers every byte of the checkpoint."""
    source: str
    """Checkpoint as named in the configuration."""
    run_id: str | None = None
    """MLflow run of its files."""
    tags: Mapping[str, str] | None = None
    """Tags of the registered version."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything needed to answer a request, swapped as one value."""

    identity: Identity
    """Identity of the checkpoint."""
    adapter: Adapter
    """Adapter in evaluation mode, on `device`, in `precision`."""
    config: AdapterConfig
    """Configuration of the adapter."""
    features: Features
    """Type, shape and scale of event and target features."""
    evaluation_record: EvaluationRecord
    """Evaluation before it was served."""
    provenance: Mapping[str, Any]
    """Content of provenance.json."""
    parameters: int
    """Number of trained parameters."""
    precision: Precision
    """Precision of weights and products; sums and the residual connection stay float32."""
    device: torch.device
    """Device of the forward pass."""
    loaded_at: datetime
    """Time when it was ready."""

    @property
    def version(self) -> str:
        """Version as shown in answers and metrics."""
        return self.identity.version

    def forward(self, event_NE: Tensor) -> Tensor:
        """Return aligned features (N, D), float32, on `device`. Call it without gradients."""
        event_NE = event_NE.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.adapter(event_NE).float()


class PackedLinear(nn.Module):
    """Linear layer with weights in oneDNN's own layout; otherwise each bfloat16 pass converts them again.

    One pair at full width, on two cores, took 28 ms for 48 (Xeon with AMX, bfloat16). In float32 it is MKL that
    multiplies by default: faster on that Xeon (34 ms for 46), slower on an EPYC.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute as `nn.Linear` under autocast."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        return product


def load_served(folder: Path, identity: Identity, precision: str, use_gpu: bool, max_batch: int) -> ServedModel:
    """Verify checksums and golden answers, then prepare the adapter. CheckpointError: it must not be served."""
    checkpoint = load_checkpoint(folder)
    if checkpoint.sha256 != identity.digest:
        raise CheckpointError(
            f"{identity.source} is checkpoint {checkpoint.sha256[:12]}, registered was {identity.digest[:12]}: its "
            "files were changed after promotion. Promote it again."
        )
    require_target_features(checkpoint.config.strategy, str(folder))
    replay_golden(checkpoint)
    require_provenance(checkpoint)
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
        for rows in (1, max_batch):  # kernels and buffers are created at first use
            model.forward(torch.rand(rows, model.config.event_dim))
    return model


def require_provenance(checkpoint: Checkpoint) -> None:
    """CheckpointError unless what `/v1/model` shows of provenance.json is text or missing."""
    for key in ("run", "dataset_fingerprint"):
        value = checkpoint.provenance.get(key)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise CheckpointError(f"{checkpoint.folder / 'provenance.json'} cannot be used: '{key}' is no text.")


def optimise_for_device(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> Adapter:
    """Move the adapter to its device; bf16 applies to matrices only, norms and residuals stay float32."""
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
    """True if oneDNN is available and faster on this CPU."""
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
        remedy = "serve it with precision: fp32" if model.precision == "bf16" else "serve it on another machine"
        raise CheckpointError(
            f"{model.identity.source}: in {model.precision} on {model.device} its answers have a relative error of "
            f"{worst:.1e} (limit {limit:g}); {remedy}."
        )


def chosen_precision(asked: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on a GPU that reports it, or a CPU with AMX or AVX-512 BF16."""
    if asked == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "bf16" if BF16_FLAGS & set(cpu().get("flags", "").split()) else "fp32"
    return "bf16" if asked == "bf16" else "fp32"


def cpu() -> dict[str, str]:
    """Fields of the first CPU in /proc/cpuinfo; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
