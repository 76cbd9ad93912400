"""A sweep: what it is, its event log, and a run for each trial. This record is all that it is.

    sweep.json  events.jsonl  trials/trial_0007-1f3a…/  final/trial_0007-1f3a…/seed_0/  sweep.html

Kinds in the event log: `run_started` (one per driver), `trial_created` (a setting is tried), `trial_process_died`
(and is started again), `trial_ended` (its result), `final_seed` (one seed's numbers on the test part), `run_ended`. A
trial's own progress is in its own event log.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray_app.commands.tune.spec import Setting, SweepSpec
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import StoreError
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, is_locked
from ray_app.runs.mirror import InPlace, Mirror, scratch_dir
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir
from ray_app.store.atomic import disk_errors, write_file
from ray_app.store.filesystem import LocalDir, RemoteDir, open_storage

SWEEP, PAGE = "sweep.json", "sweep.html"
HANDOVER_S = 5.0
"""How long a driver waits for the one before it, which may have just been killed."""
RUNS = ("trials/*", "final/*/*")
"""Patterns of run folders in a sweep."""
RUN_OF_SWEEP = re.compile(r"(trials|final)/[A-Za-z0-9_-]+(/seed_\d+)?")
Status = Literal["waiting", "running", "finished", "stopped", "failed"]
"""`stopped`: the scheduler did, for others were better. `waiting` and `running` ones can still go on."""
TIE_BREAK = 1e-6
"""Weight of the mean cosine beside the objective where trials are compared under way: smaller than one pair of half a
million, so that it decides between equals alone."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial and how it stands."""

    index: int
    """Its number."""
    name: str
    """Its number and a hash of its setting: the same in every run of the sweep."""
    setting: Setting
    """What is tried."""
    parameters: int
    """Trained numbers of its adapter."""
    status: Status = "waiting"
    """How it stands."""
    objective: float | None = None
    """At its best checkpoint."""
    accept_rate: float | None = None
    """cosine_accept_rate_0.80 there."""
    lift: float | None = None
    """Over the best baseline, there."""
    epochs: int = 0
    """Finished epochs."""
    best_epoch: int = 0
    """The epoch of the best checkpoint."""
    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Time that a process worked for it."""
    latency_ms: float | None = None
    """Of one pair, where it was wanted."""
    reason: str | None = None
    """Why it failed."""
    ended_at: float | None = None
    """When it ended."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """Smaller is better: the objective, then fewer parameters, then the earlier trial."""
        assert self.objective is not None
        return -self.objective, self.parameters, self.index


@contextmanager
def open_sweep(where: str) -> Iterator["SweepDir"]:
    """Yield the sweep that a path or URI names, started or not; delete the scratch folder of one at a URI after."""
    storage = open_storage(where)
    if isinstance(storage, LocalDir):
        yield SweepDir(storage.path)
    else:
        with scratch_dir() as folder:
            yield SweepDir(folder, storage)


class SweepDir:
    """Folder of a sweep: `sweep.json`, the event log and the runs below `path`."""

    def __init__(self, path: Path, remote: RemoteDir | None = None) -> None:
        """`path`: the sweep's folder, or a scratch folder where the sweep is kept at `remote`."""
        self.path = path
        self.mirror = InPlace(path) if remote is None else Mirror(path, remote)

    def __str__(self) -> str:
        """Return the path or URI that `--resume` and `--watch` take."""
        return str(self.mirror)

    @property
    def name(self) -> str:
        """Last part of the path or URI."""
        return str(self.mirror.storage).rpartition("/")[2]

    @property
    def resume(self) -> str:
        """Command that resumes the sweep."""
        return f"ray-app tune --resume {shlex.quote(str(self))}"

    def shown(self, path: Path) -> str:
        """Return the path or URI of a file or folder of the sweep, valid on every machine."""
        return str(self) if path == self.path else self.mirror.storage.uri_of(str(path.relative_to(self.path)))

    def refresh(self) -> None:
        """Download the sweep so far. StoreError: there is none, or it names a run outside of it."""
        if not isinstance(self.mirror, Mirror):
            return
        try:
            self.mirror.download_file(SWEEP)
        except FileNotFoundError as error:
            raise StoreError(f"{self.mirror.storage} is not the folder of a sweep: it has no {SWEEP}") from error
        self.mirror.pull()
        if not (self.path / EVENT_LOG).is_file():
            return  # it is about to start
        lines = self.entries()
        ended = {line["name"] for line in lines if line["kind"] == "trial_ended"}
        for line in lines:
            if line["kind"] == "final_seed":
                self._run(line["run"]).refresh()
            elif line["kind"] == "trial_created":
                run = self.run(line["name"])
                if line["name"] not in ended or not (run.path / EVENT_LOG).is_file():
                    run.refresh()

    def download_artifacts(self) -> None:
        """Download the checkpoints of its final runs, for the tracking server."""
        for path in self.runs("final/*/*"):
            if (artifacts := entries(path)[-1].get("artifacts")) is not None:
                self._run(str(path.relative_to(self.path))).download(artifacts)

    def upload(self, folder: Path) -> None:
        """Upload files that were made in `path`."""
        self.mirror.upload_files(folder)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the sweep."""
        write_file(self.path / name, data)
        self.mirror.upload_files(self.path / name)

    def files(self) -> list[str]:
        """Return paths or URIs of its record and its page."""
        names = self.mirror.storage.listdir()
        return [self.shown(self.path / name) for name in (SWEEP, EVENT_LOG, PAGE) if name in names]

    def require_free(self) -> None:
        """Raise StoreError if anything is in the way of a new sweep."""
        try:
            names = self.mirror.storage.listdir()
        except FileNotFoundError:
            return
        except NotADirectoryError:
            names = {self.name}
        if SWEEP in names:
            raise StoreError(f"{self} holds a sweep already; resume it with `{self.resume}`, or name another `out`")
        if names:
            raise StoreError(f"{self} already holds something; name a new folder for the sweep")

    def create(self, metadata: Mapping[str, Any]) -> None:
        """Start a sweep here. StoreError if anything is in the way; nothing is deleted.

        Of several that start at one moment, the one that locks the event log first has the folder.
        """
        self.require_free()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with EventLog(self.path, patience_s=0.0):
            if (self.path / SWEEP).is_file():
                self.require_free()
            self.write(SWEEP, json.dumps(dict(metadata), indent=1).encode())

    @contextmanager
    def exclusive(self) -> Iterator[EventLog]:
        """Open the sweep's event log for its one driver. StoreError: another process drives the sweep."""
        with self.mirror.lease(), self.mirror.writing(), EventLog(self.path, HANDOVER_S) as log:
            yield log

    def has_driver(self) -> bool:
        """Return True if a driver holds the event log, or at a URI has renewed its lease."""
        driven = self.mirror.is_driven()
        return is_locked(self.path) if driven is None else driven

    def metadata(self) -> dict[str, Any]:
        """Return what it was started with: `name`, `key`, `created`, `spec`, `store_fingerprint`.

        StoreError: no sweep.
        """
        try:
            return json.loads((self.path / SWEEP).read_text())
        except (OSError, ValueError) as error:
            raise StoreError(f"{self} is not the folder of a sweep: {SWEEP} cannot be read ({error})") from error

    @property
    def spec(self) -> SweepSpec:
        """The sweep as it was started."""
        return SweepSpec.model_validate({**self.metadata()["spec"], "out": str(self)})

    def entries(self) -> list[dict[str, Any]]:
        """The sweep's event log. StoreError: it is gone, or a line is damaged."""
        if not (self.path / EVENT_LOG).is_file():
            raise StoreError(
                f"{self.shown(self.path / EVENT_LOG)} is missing: it is the record of what was tried, without which "
                "the search cannot go on. Bring it back from a copy, or start a new sweep."
            )
        return entries(self.path)

    def event_times(self) -> list[float]:
        """All moments that its event logs tell of, in order."""
        folders = (self.path, *self.runs("trials/*"))
        return sorted(line["time"] for folder in folders for line in entries(folder) if "time" in line)

    def runs(self, *places: str) -> list[Path]:
        """Its run folders that have an event log: of trials and of the last training, or of some places alone."""
        found = [path.parent for place in places or RUNS for path in self.path.glob(f"{place}/{EVENT_LOG}")]
        return sorted(found)

    def sessions(self) -> list[tuple[float, float]]:
        """From each start to the last that was heard before the next."""
        starts = [line["time"] for line in self.entries() if line["kind"] == "run_started"]
        heard = self.event_times()
        return [
            (begin_s, max(moment for moment in heard if begin_s <= moment < next_s))
            for begin_s, next_s in itertools.pairwise([*starts, float("inf")])
        ]

    def used_seconds(self) -> float:
        """Time of all starts but the newest: from each to the last that was heard before the next."""
        return sum(end_s - begin_s for begin_s, end_s in self.sessions()[:-1])

    def run(self, name: str) -> RunDir:
        """The run of a trial."""
        return self._run(f"trials/{name}")

    def final(self, name: str, seed: int) -> RunDir:
        """The run of one seed of the last training of a trial's setting."""
        return self._run(f"final/{name}/seed_{seed}")

    def _run(self, folder: str) -> RunDir:
        if not RUN_OF_SWEEP.fullmatch(folder):  # read from a file
            raise StoreError(f"{self} is damaged: its event log names {folder!r}, which is no run of a sweep")
        return RunDir(self.path / folder, self.mirror.child(folder))

    def trials(self) -> list[Trial]:
        """All trials by number: those that ended as they were told, the others as far as they have come."""
        spec = self.spec
        found: dict[str, Trial] = {}
        for line in self.entries():
            if line["kind"] == "trial_created":
                found[line["name"]] = Trial(*(line[key] for key in ("index", "name", "setting", "parameters")))
            elif line["kind"] == "trial_ended":
                found[line["name"]] = Trial(**{key: line[key] for key in Trial.__dataclass_fields__})
        return [
            trial if trial.ended_at else Trial(**asdict(trial) | self.trial_status(trial.name, spec))
            for trial in found.values()
        ]

    def trial_status(self, name: str, spec: SweepSpec) -> dict[str, Any]:
        """How far a trial has come, from its own event log; `status` is failed or finished only where it says so."""
        run = self.run(name)
        run.refresh()
        if not (run.path / EVENT_LOG).is_file():
            return {}
        lines = entries(run.path)
        reached = {"seconds": active_seconds(lines), "status": "running", **scores(lines, spec.objective)}
        reached["steps"] = max((line["global_step"] for line in lines if line["kind"] == "step"), default=0)
        reached["latency_ms"] = next((line["ms"] for line in lines if line["kind"] == "latency"), None)
        if lines and lines[-1]["kind"] == "run_ended":
            reached["ended_at"] = lines[-1]["time"]
            reached["status"] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[lines[-1]["status"]]
            reached["reason"] = next((line["error"] for line in lines[::-1] if line["kind"] == "failed"), None)
        return reached

    def curve(self, name: str, objective: str) -> list[tuple[int, float]]:
        """(epoch, what a scheduler compares) of a trial."""
        folder = self.run(name).path
        lines = entries(folder) if (folder / EVENT_LOG).is_file() else []
        ends = [n for n, line in enumerate(lines, 1) if line["kind"] == "epoch"]
        return [(lines[n - 1]["epoch"], scheduler_metric(lines[:n], objective)) for n in ends]

    def end_trial(self, log: EventLog, trial: Trial) -> None:
        """Tells how a trial ended, and lets go of what only going on would need."""
        log.write("trial_ended", **asdict(trial))
        run = self.run(trial.name)
        best = run.best_on_disk
        for kind in (STATES, CHECKPOINTS):
            run.delete_checkpoints(kind, best)

    def prune_checkpoints(self, trials: list[Trial], num: int) -> None:
        """Weights of the best `num` trials stay; of others that have ended they go. 0: all stay."""
        ranked = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: trial.rank)
        for trial in ranked[num:] if num else ():
            if trial.ended_at:
                self.run(trial.name).delete_checkpoints(CHECKPOINTS)


def trial_name(index: int, setting: Setting) -> str:
    """Number and hash of the setting."""
    digest = hashlib.sha256(json.dumps([setting], sort_keys=True).encode()).hexdigest()
    return f"trial_{index:04d}-{digest[:8]}"


def scores(lines: list[dict[str, Any]], objective: str) -> dict[str, Any]:
    """What a trial's epochs say of it: its numbers at the best checkpoint, the one of the lowest validation loss."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        return {}
    best = best_epoch(epochs)
    rate, lift = best["val"]["cosine_accept_rate"][rate_key(THETA)], best["val"]["lift"]
    return {
        "objective": lift if objective == "lift" else rate,
        "accept_rate": rate,
        "lift": lift,
        "epochs": epochs[-1]["epoch"],
        "best_epoch": best["epoch"],
    }


def scheduler_metric(lines: list[dict[str, Any]], objective: str) -> float:
    """What a scheduler compares trials by: the objective, and of equals the mean cosine at the same checkpoint.

    The objective is a count of validation pairs, so that many trials have the same; a scheduler lets equals go on.
    """
    best = best_epoch([line for line in lines if line["kind"] == "epoch"])
    return scores(lines, objective)["objective"] + TIE_BREAK * best["val"]["cos_sim_mean"]


def best_epoch(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the best checkpoint."""
    return min(epochs, key=lambda line: line["val"]["loss"])


def active_seconds(lines: list[dict[str, Any]]) -> float:
    """Time from each attempt to the last that was heard of it."""
    total, begun, last = 0.0, None, 0.0
    for line in lines:
        if line["kind"] == "workers_started":
            total += last - begun if begun is not None else 0.0
            begun = last = line["time"]
        elif begun is not None and line["kind"] in ("step", "epoch", "failed", "run_ended"):
            last = line["time"]
    return total + (last - begun if begun is not None else 0.0)


def best_of(trials: list[Trial]) -> Trial | None:
    """The trial with the best objective; of equals that with fewer parameters, then the earlier one."""
    judged = [trial for trial in trials if trial.objective is not None and trial.status != "failed"]
    return min(judged, key=lambda trial: trial.rank, default=None)


def pareto_front(trials: list[Trial], second: str) -> list[Trial]:
    """The trials that no other beats in the objective without losing in the second one, best objective first."""
    judged = [
        t for t in trials if t.objective is not None and t.status != "failed" and getattr(t, second) is not None
    ]
    found: list[Trial] = []
    for trial in sorted(judged, key=lambda t: (t.rank[0], getattr(t, second))):
        if not found or getattr(trial, second) < getattr(found[-1], second):
            found.append(trial)
    return found
