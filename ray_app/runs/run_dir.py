"""Folder of a training run: its checkpoints, which of them is best, and where to resume.

A checkpoint is named by its finished epochs, and within an epoch by the optimizer step too: `epoch_0002`
< `epoch_0002_step_00000300` < `epoch_0003`. Its weights and its training state are folders of that name.
"""

import fcntl
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_app.errors import CheckpointError, StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.runs.event_log import POLL_S, EventLog, entries, require_latest_driver
from ray_app.runs.mirror import DRIVER_LEASE, Mirror
from ray_app.store.atomic import disk_errors, make_folder, partial_file, write_file
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir, absolute, open_storage
from ray_app.store.manifest import Features
from ray_app.store.scratch import scratch_dir

if TYPE_CHECKING:  # torch takes seconds to import, and a run's records are read without it
    from ray_app.core.adapters.base import Adapter
    from ray_app.store.checkpoint import StreamedTensor, Tensors

RUN, BEST, STOP, RESIZE = "run.json", "best.json", "stop", "resize"
CHECKPOINTS, STATES = "checkpoints", "training_state"
NUM_CHECKPOINTS_KEPT = 2
"""Newest checkpoints of which everything is kept while a run lasts: one may turn out damaged."""
STOP_S = 30.0
"""Longest time that workers at a URI get to stop before their event log is taken over."""


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """Return the name of a checkpoint after so many whole epochs, or at an optimizer step within the next."""
    return f"epoch_{epoch:04d}" if step is None else f"epoch_{epoch:04d}_step_{step:08d}"


@contextmanager
def open_run(where: str) -> Iterator["RunDir"]:
    """Yield the run that a path or URI names, started or not; delete the scratch folder of one at a URI after."""
    storage = open_storage(where)
    if isinstance(storage, LocalDir):
        yield RunDir(storage.path)
    else:
        with scratch_dir() as folder:
            yield RunDir(folder, storage)


def settings_of_run(where: str) -> dict[str, Any]:
    """Return the settings of `train` that a run was started with. StoreError: not a run."""
    return {**run_metadata(open_storage(where))["config"], "out": absolute(where)}


class RunDir:
    """Folder of a run: `checkpoints/epoch_NNNN`, `training_state/epoch_NNNN` and the event log below `path`."""

    def __init__(self, path: Path, remote: RemoteDir | None = None) -> None:
        """`path`: the run's folder, or a scratch folder where the run is kept at `remote`."""
        self.path = path
        self.mirror = Mirror(path, remote)

    def __str__(self) -> str:
        """Return the path or URI that `--resume` and `sync` take."""
        return str(self.mirror)

    def shown(self, path: Path) -> str:
        """Return the path or URI of a file or folder of the run, valid on every machine."""
        return str(self) if path == self.path else self.mirror.storage.uri_of(str(path.relative_to(self.path)))

    @contextmanager
    def event_log(self, started: float | None = None) -> Iterator[EventLog]:
        """Open the event log for the one process that writes it now.

        `started`: when this process's driver started. StoreError: another driver has started since; a process that
        has been taken over so takes nothing from the one that continues.
        """
        if started is not None:
            self.mirror.pull()
            require_latest_driver(self.path, started)
        with self.mirror.writing(STOP, RESIZE), EventLog(self.path) as log:
            if started is not None:
                require_latest_driver(self.path, started)
            yield log

    def synced(self) -> AbstractContextManager[None]:
        """Download what workers log, and upload signals to them, in the background."""
        return self.mirror.syncing(STOP, RESIZE)

    @contextmanager
    def released(self, log: EventLog) -> Iterator[None]:
        """Let another process write the event log that this one has open."""
        with self.mirror.released(), log.released():
            yield

    @property
    def resume(self) -> str:
        """Command that resumes the run."""
        return f"ray-app train --resume {shlex.quote(str(self))}"

    def refresh(self) -> None:
        """Download the event log so far."""
        self.mirror.pull()

    def download(self, *folders: str) -> None:
        """Download folders of the run, those that exist."""
        for folder in folders:
            self.mirror.download(validate_relative_path(folder))

    def upload(self, folder: str) -> None:
        """Upload a folder that was made in `path`."""
        self.mirror.upload(folder)

    def create(self, metadata: Mapping[str, Any]) -> None:
        """Start a run here. StoreError if anything is in the way; nothing is deleted.

        The partial file of a process that was killed at this point is not in the way. Of several that start at one
        moment in one folder, one has it; at a URI that needs `exclusive`.
        """
        document = json.dumps(dict(metadata), indent=1).encode()
        try:
            names = self.mirror.storage.listdir()
        except FileNotFoundError:
            names = set()
        except NotADirectoryError:
            names = {RUN}
        try:
            if any(name != partial_file(Path(RUN)).name and not name.startswith(DRIVER_LEASE) for name in names):
                raise FileExistsError
            if self.mirror.remote:
                self.mirror.remote.write(RUN, document)
            else:
                with disk_errors(self.path):
                    make_folder(self.path)
                write_file(self.path / RUN, document, new=True)
        except FileExistsError:
            raise StoreError(
                f"--out {self.mirror.storage} already holds something; name a new folder, nothing is overwritten"
            ) from None

    @property
    def claimed(self) -> bool:
        """True if a run was started here."""
        try:
            return RUN in self.mirror.storage.listdir()
        except (FileNotFoundError, NotADirectoryError):
            return False

    @contextmanager
    def exclusive(self, created: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Drive the run alone; start it first with the metadata `created`. StoreError: another process drives it."""
        with self.mirror.lease():
            if created is not None:
                self.create(created)
            self.mirror.download_file(RUN)
            with (self.path / RUN).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise StoreError(
                        f"{self.path} is driven by another process; wait for its end, or stop it"
                    ) from error
                self.clear_signals()
                yield

    def metadata(self) -> dict[str, Any]:
        """Return what it was started with: `name`, `key`, `config`, `store_fingerprint`. StoreError: not a run."""
        return run_metadata(self.mirror.storage)

    @property
    def stop_file(self) -> Path:
        """File that asks the workers to save and end."""
        return self.path / STOP

    @property
    def resize_file(self) -> Path:
        """File that asks the workers to save and end, so that another number of workers takes over."""
        return self.path / RESIZE

    def clear_signals(self) -> None:
        """Delete both signal files."""
        self.stop_file.unlink(missing_ok=True)
        self.resize_file.unlink(missing_ok=True)
        self.mirror.push_signals(STOP, RESIZE)

    def request_stop(self) -> None:
        """Ask the workers to save and end; those at a URI get `STOP_S` to do so."""
        self.stop_file.touch()
        self.mirror.push_signals(STOP, RESIZE)
        deadline = time.monotonic() + (STOP_S if self.mirror.remote else 0.0)
        while time.monotonic() < deadline:
            self.refresh()
            if entries(self.path)[-1]["kind"] in ("stopped", "run_ended"):
                return
            time.sleep(POLL_S)

    def stop_requested(self) -> bool:
        """Return True if a stop or a resize was requested."""
        return self.stop_file.exists() or self.resize_file.exists()

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a checkpoint's weights."""
        return self.path / CHECKPOINTS / name

    def state(self, name: str) -> Path:
        """Return the folder of what resuming needs in addition."""
        return self.path / STATES / name

    def save(
        self,
        name: str,
        adapter: "Adapter",
        *,
        features: Features,
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tensors: "Tensors",
        meta: Mapping[str, Any],
        best_epoch: int,
        weights: "Mapping[str, StreamedTensor] | None" = None,
    ) -> None:
        """Save state, then weights, then prune. If interrupted at any point, the checkpoint before is still whole.

        `weights`: those of the whole adapter, where `adapter` holds a part of them.
        """
        from ray_app.store.checkpoint import save_checkpoint, save_training_state

        self.mirror.push()  # a checkpoint never holds more steps than the event log
        with disk_errors(self.path):
            if self.state(name).exists():  # of a save that ended between the two
                shutil.rmtree(self.state(name))
            if self.checkpoint(name).exists():  # its state was damaged and is in quarantine
                self.mirror.quarantine(f"{CHECKPOINTS}/{name}")
        save_training_state(self.state(name), tensors, meta)
        about = {"metrics": metrics, "provenance": provenance}
        save_checkpoint(self.checkpoint(name), adapter, **about, features=features, weights=weights)
        for kind in (STATES, CHECKPOINTS):
            self.mirror.upload(f"{kind}/{name}")
        self.prune_checkpoints(name, best_epoch)

    def prune_checkpoints(self, newest: str, best_epoch: int, num_kept: int = NUM_CHECKPOINTS_KEPT) -> None:
        """Name the best checkpoint, then delete older ones.

        The newest `num_kept` stay whole, and so do the weights that were the best at each of them. A second call
        changes nothing.
        """
        if best_epoch:
            best = {"checkpoint": f"{CHECKPOINTS}/{checkpoint_name(best_epoch)}", "epoch": best_epoch}
            self.mirror.storage.write(BEST, json.dumps(best).encode())
        states = sorted(name for name in self.places(STATES) if name < newest)
        keep = {newest, *states[len(states) - (num_kept - 1) :]}
        best_of_each = {best_epoch, *(self._best_epoch_at(name) for name in keep - {newest})}
        keep_weights = keep | {checkpoint_name(epoch) for epoch in best_of_each if epoch}
        for kind, kept in ((CHECKPOINTS, keep_weights), (STATES, keep)):
            for old in sorted(self.places(kind) - kept):
                self.mirror.delete(f"{kind}/{old}")

    def keep_last(self, best_epoch: int) -> None:
        """Keep the last state and the best weights alone, at the end of a run."""
        self.prune_checkpoints(max(self.places(STATES)), best_epoch, num_kept=1)

    def places(self, kind: str) -> set[str]:
        """Return names of the checkpoints that have weights (`CHECKPOINTS`) or state (`STATES`)."""
        try:
            return {name for name in self.mirror.storage.listdir(kind) if name.startswith("epoch_")}
        except FileNotFoundError:
            return set()

    def delete_checkpoints(self, kind: str, kept: str | None = None) -> None:
        """Delete weights, or states, of all checkpoints but `kept`, a folder in the run."""
        for name in self.places(kind):
            if f"{kind}/{name}" != kept:
                self.mirror.delete(f"{kind}/{name}")

    def _best_epoch_at(self, name: str) -> int:
        """Return the epoch that was the best when a checkpoint was saved; 0 if that is unknown."""
        try:
            return parse_object(self.mirror.storage.read(f"{STATES}/{name}/training_state.json"))["counters"][
                "best_epoch"
            ]
        except (OSError, ValueError, KeyError):  # damaged: nothing resumes from it
            return 0

    def latest_resumable(self) -> str | None:
        """Return the name of the newest checkpoint whose state and weights verify, or None.

        A newer one that does not verify goes to quarantine, with a line on standard error: one process calls this.
        """
        for name in sorted(self.places(STATES) & self.places(CHECKPOINTS), reverse=True):  # else a save cut off
            if all(self._verify(f"{kind}/{name}") for kind in (CHECKPOINTS, STATES)):
                return name
        return None

    def _verify(self, folder: str) -> bool:
        try:
            self.mirror.verify(folder)
        except CheckpointError as error:
            print(f"not resumed from: {error}", file=sys.stderr)
            self.mirror.quarantine(folder)
            return False
        return True

    def best(self) -> Path | None:
        """Return the best checkpoint so far, None before the first epoch. CheckpointError: its name is damaged."""
        name = best_name(self.mirror.storage)
        if name is None:
            return None
        self.mirror.download(name)
        if not (self.path / name).is_dir():
            raise CheckpointError(f"{self.shown(self.path / name)} is missing, though {BEST} names it.")
        return self.path / name

    @property
    def best_on_disk(self) -> str | None:
        """Folder in the run of the best checkpoint so far, None if it was deleted."""
        name = best_name(self.mirror.storage)
        return name if name and Path(name).name in self.places(CHECKPOINTS) else None


def validate_relative_path(folder: str) -> str:
    """Return the name of a folder in a run, read from a file. StoreError: it leads out of the run."""
    if not isinstance(folder, str) or not re.fullmatch(r"[a-z_]+(/[a-z0-9_]+)?", folder):
        raise StoreError(f"{folder!r} is no folder of a run")
    return folder


def run_metadata(storage: StorageDir) -> dict[str, Any]:
    """Return what a run was started with. StoreError: not a run."""
    try:
        return parse_object(storage.read(RUN))
    except (OSError, ValueError) as error:
        raise StoreError(f"{storage} is not the folder of a run: {RUN} cannot be read ({error})") from error


def best_name(storage: StorageDir) -> str | None:
    """Return the folder of a run's best checkpoint, None before the first epoch. CheckpointError: it is damaged."""
    try:
        document = storage.read(BEST)
    except FileNotFoundError:
        return None
    try:
        return validate_relative_path(parse_object(document)["checkpoint"])
    except (StoreError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{storage.file(BEST)} is damaged: it names no checkpoint ({error}).") from error


def best_of_run(where: str) -> str:
    """Path of a run's best checkpoint; any other path unchanged. CheckpointError: there is no such folder."""
    storage = open_storage(where)
    try:
        names = storage.listdir()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{storage} is not a folder; name a checkpoint, or the folder of a run.") from error
    if RUN not in names:
        return where
    best = best_name(storage)
    if best is None:
        raise CheckpointError(f"{storage} is a run without a finished epoch: it has no checkpoint yet.")
    return storage.uri_of(best)
