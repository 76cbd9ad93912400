"""Mistakes that are found before a command's module is imported: no Ray, torch or MLflow, so within two seconds.

A command checks the same again, with everything else, when it runs.
"""

import shlex
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from ray_app.config.base import Config
from ray_app.config.evaluate import CompareConfig, PromoteConfig, ReportFlags
from ray_app.config.prepare import EncodeConfig, InspectConfig, PrepareArrays, PrepareCapture, PrepareFlags
from ray_app.config.serve import ServeConfig
from ray_app.config.train import TrainConfig
from ray_app.config.tune import ImportCheckpointConfig, TuneConfig
from ray_app.errors import CheckpointError, InputError, StoreError
from ray_app.reports.folder import COMPARISON_FILES, are_decoded, claim_report_folder
from ray_app.runs.run_dir import RUN, best_of_run, run_metadata
from ray_app.store.atomic import CHECKSUMS_FILE
from ray_app.store.filesystem import LocalDir, open_storage
from ray_app.store.manifest import CheckpointDocument, Manifest, require_claimable, require_same_features


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
    """CheckpointError if a checkpoint is missing or was trained on other features; StoreError: no such store.

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
        if manifest:
            require_same_features(document.features, manifest.features, str(folder))
