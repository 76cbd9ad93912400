"""Mistakes that are found before a command's module is imported: no Ray, torch or MLflow, so within two seconds.

A command checks the same again, with everything else, when it runs.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ray_app.cluster.working_dir import files_of
from ray_app.config.base import PLACE, Config, TrackingFlags
from ray_app.config.evaluate import CompareConfig, PromoteConfig, ReportFlags
from ray_app.config.prepare import EncodeConfig, InspectConfig, PrepareArrays, PrepareCapture, PrepareFlags
from ray_app.config.serve import ServeConfig
from ray_app.config.submit import SubmitConfig
from ray_app.config.train import TrainConfig
from ray_app.config.tune import ImportCheckpointConfig, TuneConfig
from ray_app.errors import CheckpointError, ConfigError, InputError, StoreError
from ray_app.reports.folder import COMPARISON_FILES, are_decoded, claim_report_folder
from ray_app.runs.run_dir import RUN, best_of_run, run_metadata
from ray_app.store.atomic import CHECKSUMS_FILE
from ray_app.store.filesystem import LocalDir, open_storage
from ray_app.store.manifest import (
    CheckpointDocument,
    Manifest,
    require_claimable,
    require_same_features,
    require_target_features,
)


def refuse_early(cfg: Config) -> None:
    """Raise the error of a command that cannot succeed; return if nothing speaks against it yet."""
    match cfg:
        case PrepareFlags():
            require_inputs(getattr(cfg, "files", ()) or [path for path in [getattr(cfg, "root", None)] if path])
            require_inputs(filter(None, (cfg.event_encoder, cfg.target_encoder)))
            if isinstance(cfg, EncodeConfig):
                Manifest.read(cfg.store)
            require_claimable(open_storage(cfg.out, cfg.storage_timeout_s))
        case PrepareArrays():
            require_inputs([cfg.file] if cfg.file else [])
            require_claimable(open_storage(cfg.out))
        case PrepareCapture():
            require_inputs([cfg.folder])
            require_claimable(open_storage(cfg.out))
        case InspectConfig():
            for store in filter(None, (cfg.store, cfg.against)):
                Manifest.read(store)
        case TrainConfig():
            refuse_training(cfg)
        case TuneConfig() if not cfg.resume and not cfg.watch:
            Manifest.read(cfg.store)
            out = open_storage(cfg.out)
            if isinstance(out, LocalDir) and out.exists() and (names := out.listdir()):
                if "sweep.json" in names:
                    resume = f"ray-app tune --resume {shlex.quote(cfg.out)}"
                    raise StoreError(f"{out} holds a sweep already; resume it with `{resume}`, or name another `out`")
                raise StoreError(f"{out} already holds something; name a new folder for the sweep")
        case ReportFlags():
            claim_report_folder(cfg.out)
            require_fit([cfg.checkpoint], cfg.store)
        case CompareConfig():
            claim_report_folder(cfg.out, COMPARISON_FILES)
            if not are_decoded(cfg.checkpoints):
                require_fit(cfg.checkpoints, cfg.needed_store)
        case PromoteConfig() if cfg.run:
            require_fit([cfg.run], cfg.store)
        case ServeConfig():
            require_fit([cfg.checkpoint], None)
        case ImportCheckpointConfig():
            require_inputs([cfg.file])
            if cfg.out.exists():
                raise CheckpointError(f"{cfg.out} already exists; nothing is overwritten.")


def require_inputs(paths: Iterable[Path]) -> None:
    """InputError names the first file or folder that does not exist."""
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; name a file or folder that does")


def refuse_training(cfg: TrainConfig) -> None:
    """Raise what is wrong with the store or the folder of a run."""
    manifest, out = Manifest.read(cfg.store), open_storage(cfg.out)
    if cfg.resume:
        recorded = run_metadata(out).get("store_fingerprint")
        if recorded != manifest.fingerprint:
            raise StoreError(
                f"{cfg.out} was trained on pairs of fingerprint {recorded}, {cfg.store} holds {manifest.fingerprint} "
                "now; it can continue only with the former."
            )
        return
    names = out.listdir() if out.exists() else set()
    own = {name for name in names if not name.startswith(".")} if isinstance(out, LocalDir) else names & {RUN}
    if own:
        resume = f", or continue it with: ray-app train --resume {shlex.quote(str(cfg.out))}" if RUN in own else ""
        raise StoreError(f"--out {out} already holds something; name a new folder, nothing is overwritten{resume}")


def require_fit(checkpoints: Iterable[str], store: str | None) -> None:
    """CheckpointError if a checkpoint is missing, aligns nothing, or is of other features; StoreError: no such store.

    A registered model is looked up by the command: MLflow takes seconds to import.
    """
    manifest = Manifest.read(store) if store else None
    for checkpoint in checkpoints:
        if checkpoint.startswith("models:"):
            continue
        folder = open_storage(best_of_run(checkpoint))
        try:
            document = CheckpointDocument.model_validate_json(folder.read("config.json"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is not a checkpoint: it has no {CHECKSUMS_FILE}.") from None
        except (OSError, ValidationError):  # damaged: the command says how
            continue
        require_target_features(document.adapter.get("strategy"), str(folder))
        if manifest:
            require_same_features(document.features, manifest.features, str(folder))


def refuse_job(cfg: SubmitConfig, job: Config | None) -> None:
    """Refuse a job whose data would not be where it runs; say where its tracking goes. ConfigError: a relative path.

    `job`: the settings of its command; None of one that resumes a run which the cluster alone may see.
    """
    sent = {str(parent) for file in files_of(cfg.working_dir) for parent in (file, *file.parents)}
    resumed = (("resume", word) for flag, word in pairwise(cfg.command) if flag == "--resume")
    for name, path in places_in(job) if job else resumed:
        if not (os.path.isabs(path) or "://" in path or path.startswith("models:") or os.path.normpath(path) in sent):
            last = Path(path).name
            raise ConfigError(
                f"--{name.replace('_', '-')} {path} is a relative path, and a job runs in a folder of its own on the "
                f"cluster, without this one's data; name a path that all its nodes see (/mnt/…/{last}) or a URI "
                f"(s3://BUCKET/{last})"
            )
    if not isinstance(job, TrackingFlags):
        return
    passed = os.environ.get("MLFLOW_TRACKING_URI") if "MLFLOW_TRACKING_URI" in cfg.env else None
    uri = job.tracking_uri or passed
    if uri is None:
        print(
            "MLflow: the job uses MLFLOW_TRACKING_URI of the cluster's nodes; where they have none, its records go "
            "with the job's own folder. --tracking-uri names a server",
            file=sys.stderr,
        )
    elif re.match(r"sqlite:///(?!/)", uri):
        raise ConfigError(
            f"the tracking server {uri} would be a file in the job's own folder, which goes with the job; name a "
            "server (http://HOST:5000), or a file on a disk that all nodes see (sqlite:////mnt/…/mlflow.db)"
        )


def places_in(settings: Config) -> Iterator[tuple[str, str]]:
    """Yield name and value of each setting that is a file, folder or URI, and is not the default."""
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value != info.default and (is_place(info) or name in ("checkpoint", "checkpoints", "run")):
            for path in value if isinstance(value, tuple) else (value,):
                yield name, str(path)


def is_place(info: FieldInfo) -> bool:
    """Return True if a setting is a path, or a folder that may be at a URI."""
    kinds: list[Any] = [info.annotation, *info.metadata]
    for kind in kinds:
        kinds += get_args(kind)
    return any(kind is Path or kind == PLACE for kind in kinds)
