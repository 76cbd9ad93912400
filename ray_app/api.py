"""The Python API: `import ray_app`, then `ray_app.load`, `write_store`, `open_store`, `train`.

Ray starts only in `train`. Shapes: B = pairs, E, D = widths of event and target, T = tokens, W = token width.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_app.cluster.env_defaults import set_defaults
from ray_app.config.base import TrackingFlags
from ray_app.core.adapters.registry import num_parameters
from ray_app.core.evaluation import AlignmentEvaluation, AlignmentEvaluator
from ray_app.data import array_store
from ray_app.data.open_store import Part, Store, open_store
from ray_app.errors import ConfigError, InputError
from ray_app.reference_module import LightweightAlignmentModule
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.manifest import FeatureSpec
from ray_app.store.pair_store import previous_window

__all__ = [
    "AlignmentModel",
    "LightweightAlignmentModule",
    "Part",
    "Report",
    "Store",
    "load",
    "open_store",
    "train",
    "write_store",
]
BATCH_PAIRS = 32


@dataclass(frozen=True, slots=True, repr=False)
class AlignmentModel:
    """A loaded checkpoint: aligns features, and is evaluated next to every baseline. No Ray."""

    name: str
    """Path, URI or registered model that it was loaded by."""
    checkpoint: Checkpoint
    """Adapter, features, provenance."""

    def align(self, events: Any) -> Any:
        """Return aligned features, float32, in the form of the input.

        `events`: one array for a batch. Of a model of pixels: images (B, C, H, W) or flat rows (B, E), uint8 of 0 to
        255 or float of 0 to 1. Of a model of encoder features: (B, E), or sequences (B, T, W), float. A list of
        arrays (T, W) of different lengths gives a list of the same lengths.

        InputError: another shape or type, a number that is not finite, a row of zeros, or values out of the range of
        the model's features.
        """
        spec, target = self.checkpoint.features.event, self.checkpoint.features.target
        if isinstance(events, list | tuple) and spec.token_width:
            padded, lengths = pad(events, spec)
            aligned = self._forward(padded, spec).reshape(-1, *target.shape)
            return [tokens[:length] for tokens, length in zip(aligned, lengths, strict=True)]
        array = np.asarray(array_store.as_numpy(events, "events"))
        shaped = array.ndim == 1 + len(spec.shape) and array.ndim > 2
        if shaped and spec.token_width and array.shape[1] < spec.shape[0] and array.shape[2] == spec.shape[1]:
            padded, _ = pad(list(array), spec)
            return self._forward(padded, spec).reshape(-1, *target.shape)[:, : array.shape[1]]
        aligned = self._forward(array, spec)
        return aligned.reshape(-1, *target.shape) if shaped else aligned

    def evaluate(self, pairs: Part) -> dict[str, Any]:
        """Return the metrics of `ray-app evaluate` for a part of a store, as JSON values.

        `cosine_accept_rate` by θ, `baselines` (the same of each rule without learning), `lift` over the best of them,
        `interval95`, `retrieval`, `verdict`, `warnings` and more. The mean target is that of the store's train part.
        CheckpointError: the model was trained on other features.
        """
        return self._result(pairs)[0]

    def report(self, pairs: Part | None = None) -> "Report":
        """Evaluate and return a page. Without `pairs`: the test part of the store that the model was trained on.

        ConfigError: what it was trained on is not recorded.
        """
        from ray_app.commands.evaluate.report import report_page

        result, evaluation = self._result(self._test_part() if pairs is None else pairs)
        curves = {"adapter": evaluation.after, **evaluation.baselines, "previous_window": evaluation.previous_window}
        return Report(result, report_page(result, curves))

    @property
    def facts(self) -> dict[str, str]:
        """Strategy, sizes, features and origin of the model, in words."""
        checkpoint, origin = self.checkpoint, self.checkpoint.provenance
        return {
            "model": self.name,
            "strategy": checkpoint.config.strategy,
            "parameters": f"{num_parameters(checkpoint.adapter):,}",
            "event": f"{checkpoint.features.event.kind}, {checkpoint.features.event}",
            "target": f"{checkpoint.features.target.kind}, {checkpoint.features.target}",
            "trained on": str((origin.get("config") or {}).get("store", "not recorded")),
            "checkpoint": checkpoint.sha256[:12],
        }

    def __repr__(self) -> str:
        return f"AlignmentModel({', '.join(f'{name}: {value}' for name, value in self.facts.items())})"

    def _repr_html_(self) -> str:
        return facts_table(self.facts)

    def _forward(self, array: NDArray[Any], spec: FeatureSpec) -> NDArray[np.float32]:
        rows_BE = torch.from_numpy(np.array(checked(array, spec), copy=None))
        aligned = []
        with torch.no_grad():
            for batch in rows_BE.split(BATCH_PAIRS):
                values = batch.float() * spec.scale if batch.dtype == torch.uint8 else batch.float()
                aligned.append(self.checkpoint.adapter(values).float())
        return torch.cat(aligned).numpy()

    def _result(self, pairs: Part) -> tuple[dict[str, Any], AlignmentEvaluation]:
        from ray_app.commands.evaluate.context import EvaluationContext

        store = pairs.store
        self.checkpoint.require(store.features)
        event, target = store.features.event, store.features.target
        evaluator = AlignmentEvaluator(
            self.checkpoint.adapter,
            store.part("train").mean_target(),
            event.scale,
            target.scale,
            images=target.kind == "images",
            token_width=target.token_width,
        )
        for event_BE, target_BD in pairs.batches(BATCH_PAIRS):
            evaluator.add(torch.from_numpy(event_BE), torch.from_numpy(target_BD))
        evaluation = evaluator.result(pairs.sequences.tolist(), previous_window(store.pairs.index, pairs.rows))
        context = EvaluationContext(store.pairs, store.split_config, store.split, BATCH_PAIRS, use_gpu=False)
        result = {**context.result(evaluation, self.checkpoint), "checkpoint": self.name}
        return {**result, "provenance": {"checkpoint": self.checkpoint.provenance}}, evaluation

    def _test_part(self) -> Part:
        from ray_app.commands.evaluate.context import training_config

        config = training_config(self.checkpoint)
        if config is None:
            raise ConfigError(f"{self.name} does not record the store it was trained on; give a part: report(pairs)")
        flags = {
            name: getattr(config, name) for name in ("split", "split_seed", "test_share", "val_share", "durations")
        }
        return open_store(config.store, **flags).part("test")


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """An evaluation as a page; a notebook shows its table."""

    result: dict[str, Any]
    """Metrics, as of `AlignmentModel.evaluate`."""
    page: str = field(repr=False)
    """The page, one HTML file without links to others."""

    def save(self, path: str | Path) -> None:
        """Write the page to a file; an existing one is replaced."""
        write_file(Path(path), self.page.encode())

    def __repr__(self) -> str:
        return f"Report({self.result['verdict']})"

    def _repr_html_(self) -> str:
        answers = {**self.result["baselines"], "adapter": self.result}
        rates = {name: f"{100 * of['cosine_accept_rate']['0.80']:.1f} % at θ 0.80" for name, of in answers.items()}
        return f"<p>{html.escape(self.result['verdict'])}</p>{facts_table(rates)}"


def load(where: str | Path, *, tracking_uri: str | None = None) -> AlignmentModel:
    """Load a model: a run (its best checkpoint), a checkpoint folder, their URIs, or `models:/NAME@ALIAS`.

    Every file is verified against its checksum, and nothing is unpickled. `tracking_uri`: MLflow server of a
    registered model; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder.

    CheckpointError: there is none, or it is damaged. RegistryError: no such model, version or alias.
    """
    name = str(where)
    with ExitStack() as stack:
        if name.startswith("models:"):
            set_defaults()  # read by MLflow when it is imported
            from ray_app.tracking.model_registry import checkpoint_folder

            folder = stack.enter_context(checkpoint_folder(name, TrackingFlags(tracking_uri=tracking_uri)))
        else:
            from ray_app.runs.run_dir import best_of_run
            from ray_app.store.checkpoint_transfer import local_folder

            folder = stack.enter_context(local_folder(best_of_run(name)))
        return AlignmentModel(name, load_checkpoint(folder))


def write_store(
    where: str | Path,
    pairs: Iterable[Mapping[str, Any]] | None = None,
    *,
    event: Any = None,
    target: Any = None,
    sequence: Sequence[Any] | NDArray[Any] | str = "all",
    t_start_us: Sequence[int] | NDArray[Any] | None = None,
    t_end_us: Sequence[int] | NDArray[Any] | None = None,
    duration: str = "1s",
    source: Mapping[str, Any] | None = None,
    max_rejected_fraction: float = 0.0,
) -> Store:
    """Write a pair store from arrays, or from a generator of pairs, and open it."""
    array_store.write_store(
        where,
        pairs,
        event=event,
        target=target,
        sequence=sequence,
        t_start_us=t_start_us,
        t_end_us=t_end_us,
        duration=duration,
        source=source,
        max_rejected_fraction=max_rejected_fraction,
    )
    return open_store(where)


write_store.__doc__ = f"{write_store.__doc__}\n\n{array_store.write_store.__doc__}"


def train(store: str | Path, out: str | Path, **settings: Any) -> AlignmentModel:
    """Train an adapter as `ray-app train` does and return its best checkpoint; `settings`: its flags by name.

    Starts Ray on this machine unless it runs. ConfigError: no such setting, or a value out of range.
    """
    from pydantic import ValidationError

    from ray_app.config.train import TrainConfig

    try:
        cfg = TrainConfig(store=str(store), out=str(out), **settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} ({first['input']!r}): {first['msg']}") from error
    set_defaults()
    from ray_app.commands.train.command import run_train

    return load(run_train(cfg)["run"])


def checked(array: NDArray[Any], spec: FeatureSpec) -> NDArray[Any]:
    """Return rows (B, E) of features. InputError: they cannot be features of such a model."""
    if array.ndim < 2 or array[:1].size != spec.width or array.shape[1:] not in (spec.shape, (spec.width,)):
        flat = f"(B, {', '.join(map(str, spec.shape))})" + (f" or (B, {spec.width})" if len(spec.shape) > 1 else "")
        raise InputError(f"events have the shape {list(array.shape)}; this model takes a batch of {flat}")
    if array.dtype == np.uint8:
        if spec.dtype != "uint8":
            raise InputError(
                f"events are uint8, pixels; this model takes {spec.kind} of an encoder's features: give float32"
            )
    elif array.dtype.kind != "f":
        raise InputError(f"events are {array.dtype}; give uint8 pixels or float32 features")
    rows_BE = array.reshape(len(array), -1)
    norms = np.linalg.norm(rows_BE.astype(np.float32, copy=False), axis=1)
    for wrong, what in ((~np.isfinite(norms), "a number that is not finite"), (norms == 0, "only zeros")):
        if wrong.any():
            raise InputError(
                f"event row {int(np.argmax(wrong))} holds {what}; leave it out ({int(wrong.sum())} in all)"
            )
    if array.dtype.kind == "f" and spec.dtype == "uint8":
        low, high, limit = float(rows_BE.min()), float(rows_BE.max()), 255 * spec.scale
        if low < -0.01 * limit or high > 1.01 * limit:
            raise InputError(
                f"event values go from {low:g} to {high:g}; as floats this model's pixels are 0 to {limit:g}: divide "
                "by 255, or give uint8"
            )
    return rows_BE


def pad(sequences: Sequence[Any], spec: FeatureSpec) -> tuple[NDArray[Any], list[int]]:
    """Return sequences as (B, T, W) with zeros behind their ends, and their lengths. InputError: one does not fit."""
    limit, width = spec.shape
    rows = [np.asarray(array_store.as_numpy(tokens, "events")) for tokens in sequences]
    for number, tokens in enumerate(rows):
        if tokens.ndim != 2 or tokens.shape[1] != width or not 0 < len(tokens) <= limit:
            raise InputError(
                f"sequence {number} has the shape {list(tokens.shape)}; this model takes 1 to {limit} tokens of "
                f"{width}"
            )
    if not rows:
        raise InputError("there is no sequence to align")
    padded = np.zeros((len(rows), limit, width), np.result_type(*rows))
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded, [len(tokens) for tokens in rows]


def facts_table(facts: Mapping[str, str]) -> str:
    """Return names and values as an HTML table."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"
