"""The facts of a run that follow from its settings and its store, resolved once when the command starts."""

import hashlib
import json
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ray_app.commands.train.parallelism import Division, choose_division
from ray_app.config.base import TrackingFlags, changed_settings, flat
from ray_app.config.train import AnswerTrainConfig, DraftTrainConfig, TrainConfig
from ray_app.core.adapters.base import Adapter, InitRequirement
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.initialization import check_rank
from ray_app.core.adapters.registry import FOR_LANGUAGE_MODELS, STRATEGIES, meta_adapter, num_parameters
from ray_app.core.adapters.slices import FeatureSlice
from ray_app.core.adapters.token import TokenAdapter
from ray_app.core.advice import default_settings
from ray_app.core.augmentation import Augmentation
from ray_app.errors import ConfigError, StoreError
from ray_app.language_models.answer_objective import shape_of
from ray_app.language_models.draft_rows import layout_of, require_states
from ray_app.parsing.redact import redact
from ray_app.runs.run_dir import run_metadata
from ray_app.store.checkpoint import tensor_shapes
from ray_app.store.filesystem import absolute, open_storage
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs, test_fingerprint
from ray_app.tracking.uri import tracking_uri

INIT = "init"
"""Folder of a run with its initial statistics."""
NUMERICS_CHANGING = {"num_workers", "parallelism", "use_gpu", "cpus_per_worker", "shard_memory_gib"}
"""Settings that a resumed run may change at the price of byte-identity: another order of sums, or other kernels."""
RESUME_OVERRIDABLE = NUMERICS_CHANGING | {
    *("resume", "address", "tracking_uri", "model_name", "max_failures"),
    *("checkpoint_every", "val_every_steps", "elastic_check_interval_s"),
}
"""All settings that a resumed run may change."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """Settings, data and adapter of one run, passed to everything that works for it."""

    cfg: TrainConfig
    """The run's settings; paths are absolute."""
    store: PairStore = field(repr=False)
    """The opened store."""
    split: Split = field(repr=False)
    """Its parts; the validation part is empty with --train-on-val."""
    adapter: AdapterConfig
    """The adapter that fits the store."""
    augmentation: Augmentation | None
    """Changes to training pairs, if any are wanted."""
    requires: InitRequirement
    """Statistics of the training part that the first step needs."""
    parameters: int
    """Number of trained numbers."""
    buffer_bytes: int
    """Bytes that the adapter holds and does not train: means, bases, pairs."""
    division: Division
    """How workers divide the work."""
    recorded: dict[str, Any] = field(repr=False)
    """Settings as the run records them; a tracking URI with a password is left out."""

    @classmethod
    def of(cls, cfg: TrainConfig, store: PairStore, split: Split | None = None) -> Self:
        """Resolve the facts of these settings; `split` is the store's, if it is known already.

        ConfigError: settings and store do not fit.
        """
        split = split or training_split(cfg, store)
        cfg = with_default_strategy(cfg, store, len(split.train))
        adapter = _resolve_adapter_config(cfg, store, len(split.train))
        empty = meta_adapter(adapter)
        parameters = num_parameters(empty)
        return cls(
            cfg,
            store,
            split,
            adapter,
            _augmentation(cfg, store),
            _init_requirement(cfg),
            parameters,
            sum(buffer.nbytes for buffer in empty.buffers()),
            choose_division(cfg, type(empty), adapter, store, len(split.train), parameters),
            persisted_config(cfg),
        )

    @property
    def name(self) -> str:
        """Strategy and a hash of settings and data: Ray silently resumes an old run of the same name."""
        content = json.dumps([flat(self.cfg), self.store.fingerprint], sort_keys=True).encode()
        return f"{self.cfg.strategy}-{hashlib.sha256(content).hexdigest()[:10]}"

    @property
    def init_from(self) -> Path | None:
        """Statistics of another run; unused with --train-on-val, which trains on more pairs than that run."""
        return None if self.cfg.train_on_val else self.cfg.init_from

    @property
    def init_dir(self) -> Path:
        """Folder of this run's statistics."""
        return self.init_from or self.cfg.folder / INIT

    @property
    def starts_from(self) -> str:
        """Statistics that this run computes before its first step, in words; empty if none are missing."""
        names = {"nothing": "", "means": "means", "subspaces": "principal subspaces", "pairs": "the ridge solution"}
        return "" if self.init_from or self.init_dir.exists() else names[self.requires]

    def columns(self, part: FeatureSlice) -> tuple[slice, slice]:
        """Columns of event and target that a worker with this part of the features needs."""
        return _adapter_class(self.cfg).columns(self.adapter, part)

    def metadata(self, name: str, parent_key: str | None) -> dict[str, Any]:
        """Return what a new run records of itself, with a new key. `parent_key`: key of the sweep it belongs to."""
        identity = {"name": name, "key": uuid.uuid4().hex, "parent_key": parent_key}
        return {**identity, "store_fingerprint": self.store.fingerprint, "config": self.recorded}

    def start(self, metadata: Mapping[str, Any], tags: Mapping[str, str], started: float) -> dict[str, Any]:
        """Return the values of a `run_started` line: what the tracking server shows of the run."""
        return {
            **{key: metadata.get(key) for key in ("name", "key", "parent_key")},
            "experiment": self.cfg.experiment,
            "params": {**self.recorded, "parameters": self.parameters},
            "tags": {
                "dataset_fingerprint": self.store.fingerprint,
                "test_fingerprint": test_fingerprint(self.store.index, self.split.test),
                "split": self.split.label,
                "source": str(self.store.manifest.source.get("name")),
                "strategy": strategy_of(self.cfg),
                "features": self.store.feature("target").kind,
                **tags,
            },
            "workers": self.cfg.max_workers,
            "time": started,
        }

    def at(self, folder: Path) -> Self:
        """Return the same with the run in this folder: the copy that a process has of a run at a URI."""
        return replace(self, cfg=self.cfg.at(folder))


def open_run_context(cfg: TrainConfig) -> RunContext:
    """Open the store and resolve all facts of a run, before anything is started or written.

    ConfigError: a setting is wrong, or may not change on a resume. StoreError: the pairs are too few, or others than
    those that the resumed run was trained on.
    """
    paths = {"store": absolute(cfg.store), "out": absolute(cfg.out)}
    init_from = cfg.init_from and cfg.init_from.absolute()
    cfg = cfg.model_copy(update={**paths, "init_from": init_from})
    store = PairStore.open(cfg.store, cfg.durations)
    split = training_split(cfg, store)
    cfg = with_default_strategy(cfg, store, len(split.train))
    if _adapter_class(cfg).REQUIRES == "pairs":  # solved in one pass
        cfg = cfg.model_copy(update={"num_epochs": 1})
    recorded = run_metadata(open_storage(cfg.out)) if cfg.resume else {}
    changed = _require_resumable(cfg, store, recorded) if cfg.resume else set()
    require_pairs(store, split, ("train",) if cfg.train_on_val else ("train", "val"))
    context = RunContext.of(cfg, store, split)
    if cfg.resume and "parallelism" not in recorded["config"] and not context.division.by_features:
        changed.discard("parallelism")  # the run is from before workers could divide anything else
    _warn_of_other_bytes(changed)
    if context.requires == "subspaces":
        check_rank(cfg.rank, len(split.train))
    return context


def with_default_strategy(cfg: TrainConfig, store: PairStore, pairs: int) -> TrainConfig:
    """Return the settings with the strategy that is best known for a store's features, where none is named."""
    if cfg.strategy is not None:
        return cfg
    update = default_settings(store.feature("event").shape, store.feature("target").shape, pairs)
    if cfg.rank != TrainConfig.model_fields["rank"].default:
        update.pop("rank", None)
    return cfg.model_copy(update=update)


def strategy_of(cfg: TrainConfig) -> str:
    """Return the strategy of resolved settings."""
    assert cfg.strategy is not None, "with_default_strategy names one"
    return cfg.strategy


def _adapter_class(cfg: TrainConfig) -> type[Adapter]:
    return (STRATEGIES | FOR_LANGUAGE_MODELS)[strategy_of(cfg)]


def training_split(cfg: TrainConfig, store: PairStore) -> Split:
    """Split a store; with --train-on-val the validation part is empty and its pairs train."""
    split = split_pairs(store.index, cfg.split_config)
    return split.without_validation() if cfg.train_on_val else split


def require_pairs(store: PairStore, split: Split, parts: Iterable[str]) -> None:
    """StoreError if one of these parts is empty."""
    for part in parts:
        if not len(getattr(split, part)):
            raise StoreError(
                f"{store.folder} has too few pairs: its {part} part is empty; prepare more, or change the shares"
            )


def persisted_config(cfg: TrackingFlags) -> dict[str, Any]:
    """Return the settings that a run or a sweep records. ConfigError: the tracking URI cannot be used."""
    uri = tracking_uri(cfg)
    return {**flat(cfg), "tracking_uri": uri if uri == redact(uri) else None}


def _require_resumable(cfg: TrainConfig, store: PairStore, metadata: Mapping[str, Any]) -> set[str]:
    """Return the settings that a resumed run changes. ConfigError if one would make it another run."""
    old = type(cfg).model_validate({"parallelism": "data", **metadata["config"], "out": str(cfg.out)})
    changed = changed_settings(str(cfg.out), old, cfg, RESUME_OVERRIDABLE)
    if store.fingerprint != metadata["store_fingerprint"]:
        raise StoreError(
            f"{cfg.out} was trained on pairs of fingerprint {metadata['store_fingerprint']}, {cfg.store} holds "
            f"{store.fingerprint} now; it can continue only with the former."
        )
    return changed


def _warn_of_other_bytes(changed: set[str]) -> None:
    """Warn if a changed setting means that weights will not be byte-identical."""
    if numerics := ", ".join(sorted(changed & NUMERICS_CHANGING)):
        print(
            f"{numerics} changed: the run continues, but its weights will not be byte-identical to those of a run "
            "without the change: sums are taken in another order",
            file=sys.stderr,
        )


def _init_requirement(cfg: TrainConfig) -> InitRequirement:
    """Decide which statistics a run needs. ConfigError: --init pca for a strategy that has no layers for it."""
    strategy = _adapter_class(cfg)
    if cfg.init == "pca" and strategy.REQUIRES != "subspaces":
        if strategy.PCA_REQUIRES == "nothing":
            able = [name for name, kind in STRATEGIES.items() if "subspaces" in (kind.PCA_REQUIRES, kind.REQUIRES)]
            raise ConfigError(
                f"--init pca sets full-width layers, and {cfg.strategy} has none to set; leave it out, or use "
                f"one of: {', '.join(able)}"
            )
        return strategy.PCA_REQUIRES
    return "means" if strategy.REQUIRES == "nothing" and cfg.centred_weight else strategy.REQUIRES


def _resolve_adapter_config(cfg: TrainConfig, store: PairStore, num_train_pairs: int) -> AdapterConfig:
    """Choose the adapter that fits a store. ConfigError: the adapter or a loss does not work on such features."""
    event, target = store.feature("event"), store.feature("target")
    ragged = event.is_ragged or target.is_ragged
    if cfg.next_position_weight and not target.token_width:
        raise ConfigError("--next-position-weight is for sequences (tokens, width); leave it out")
    if ragged and cfg.centred_weight:
        raise ConfigError("--centred-weight compares whole features, and sequences differ in length; leave it out")
    strategy = _adapter_class(cfg)
    if ragged and not issubclass(strategy, TokenAdapter):
        raise ConfigError(
            f"{cfg.strategy} takes whole features, and these are sequences of different lengths, whose mask "
            "the token adapters alone keep; use one of: "
            + ", ".join(name for name, kind in STRATEGIES.items() if issubclass(kind, TokenAdapter))
        )
    return AdapterConfig(
        strategy_of(cfg),
        event.width,
        target.width,
        cfg.hidden_dim or strategy.HIDDEN_DIM,
        cfg.dropout,
        event_shape=event.shape,
        target_shape=target.shape,
        depth=cfg.depth or strategy.DEPTH,
        patch=cfg.patch,
        rank=num_train_pairs if strategy.REQUIRES == "pairs" else cfg.rank,
        mean_start=cfg.init == "pca" and strategy.PCA_REQUIRES == "means",
        **_for_language_model(cfg, store),
    )


def _for_language_model(cfg: TrainConfig, store: PairStore) -> dict[str, Any]:
    """Return the settings of an adapter that a language model trains. ConfigError: the store is of another kind."""
    if isinstance(cfg, AnswerTrainConfig):
        return {"image_tokens": cfg.image_tokens, "language_model": tuple(shape_of(cfg.language_model))}
    if isinstance(cfg, DraftTrainConfig):
        layout = layout_of(store.manifest.source, cfg.store)
        shape = shape_of(cfg.language_model)._replace(layers=cfg.exit_layers)
        if cfg.strategy == "eagle_head":
            require_states(layout, cfg.store)
        directions = tensor_shapes(cfg.projector_start).get("map.event_basis", [0, cfg.rank])[1]
        if cfg.rank > directions:
            raise ConfigError(f"--rank ({cfg.rank}) is above the {directions} directions of {cfg.projector_start}")
        return {
            "image_tokens": layout.image_tokens,
            "language_model": tuple(shape),
            "vocabulary": layout.vocabulary if cfg.drafter is None else (),
        }
    return {}


def _augmentation(cfg: TrainConfig, store: PairStore) -> Augmentation | None:
    """Build the augmentation of the training pairs. ConfigError: the features are no images."""
    changes = {name: getattr(cfg, name) for name in ("flip", "shift", "event_dropout", "event_noise")}
    if not any(changes.values()):
        return None
    return Augmentation(store.feature("event").shape, store.feature("target").shape, **changes)
