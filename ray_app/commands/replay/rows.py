"""Every drafter on every recorded row, and what each row costs.

Ray Data runs one task for each file, fold and drafter. Folds are whole sequences where a file names several, else
contiguous stretches, and rows within the gap of a stretch are not learnt from.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from ray_app import errors
from ray_app.cluster.connection import allow_long_tasks, cluster
from ray_app.config.speculative import ReplayConfig
from ray_app.drafters.cost import StepTimes, row_cost
from ray_app.drafters.recorded_states import answers, answers_with_states, read_files
from ray_app.drafters.replay import DRAFTERS, Fold, RowReplay, folds_of, replay_fold
from ray_app.drafters.summary import ReplayedRow
from ray_app.errors import CheckpointError, InputError
from ray_app.store.traces import Timing, Trace, TraceFile


@dataclass(frozen=True, slots=True)
class Task:
    """One drafter on one fold of one file."""

    file: int
    fold: int
    drafter: str


def file_folds(cfg: ReplayConfig, file: TraceFile) -> list[Fold]:
    """ConfigError: too few rows."""
    return folds_of([trace.sequence for trace in file.traces], cfg.folds, cfg.fold_gap)


def fold_of_rows(folds: Sequence[Fold]) -> list[int]:
    """Return the number of the fold in which each row is replayed."""
    number = {row: n for n, fold in enumerate(folds) for row in fold.test}
    return [number[row] for row in range(len(number))]


def replay_files(cfg: ReplayConfig, files: Sequence[TraceFile], names: list[str]) -> dict[str, list[list[RowReplay]]]:
    """Rows in order, for each drafter and file."""
    folds = [file_folds(cfg, file) for file in files]
    tasks = [Task(n, fold, name) for name in names for n in range(len(files)) for fold in range(len(folds[n]))]
    gamma, vocabulary, adapter = cfg.num_speculative_tokens, cfg.vocabulary, cfg.adapter and cfg.adapter.absolute()
    files = [replace(file, path=file.path.absolute()) for file in files]  # workers have a folder of their own
    earlier = read_files([path.absolute() for path in cfg.learn_from], vocabulary, cfg.end_token)

    def replay(item: dict[str, Any]) -> dict[str, Any]:
        task = tasks[item["task"]]
        drafter, file, fold = DRAFTERS[task.drafter](), files[task.file], folds[task.file][task.fold]
        try:
            # States are large: each task reads those that it needs.
            rows, *others = [
                answers_with_states(each, adapter) if drafter.needs_states else answers(each)
                for each in (file, *earlier)
            ]
            done = replay_fold(
                drafter,
                [each for other in others for each in other] + [rows[n] for n in fold.train],
                [rows[n] for n in fold.test],
                gamma=gamma,
                vocabulary=vocabulary,
                clock=time.thread_time,
            )
        except (InputError, CheckpointError) as error:  # Ray Data would wrap it in an error of its own
            return {"task": item["task"], "kind": type(error).__name__, "error": str(error), "rows": ""}
        return {"task": item["task"], "kind": "", "error": "", "rows": json.dumps([asdict(row) for row in done])}

    found: dict[int, list[RowReplay]] = {}
    with cluster(cfg.address):
        workers = max(min(int(ray.cluster_resources().get("CPU", 1.0)), len(tasks)), 1)
        dataset = ray.data.from_items(
            [{"task": n} for n in range(len(tasks))], override_num_blocks=min(len(tasks), 4 * workers)
        ).map(replay, compute=ray.data.TaskPoolStrategy(size=workers))
        for done in allow_long_tasks(dataset).iter_rows():
            if done["error"]:
                raise getattr(errors, done["kind"])(done["error"])
            found[done["task"]] = [_read_row(row) for row in json.loads(done["rows"])]
    replayed: dict[str, list[dict[int, RowReplay]]] = {name: [{} for _ in files] for name in names}
    for number, task in enumerate(tasks):
        rows = zip(folds[task.file][task.fold].test, found[number], strict=True)
        replayed[task.drafter][task.file].update(rows)
    return {name: [[rows[n] for n in sorted(rows)] for rows in each] for name, each in replayed.items()}


def replayed_row(
    cfg: ReplayConfig, name: str, trace: Trace, replay: RowReplay, times: Timing | None, block: int, fold: int
) -> ReplayedRow:
    """Return a row with its cost; `block` is the same for rows that the bootstrap draws together."""
    needs_event = DRAFTERS[name].needs_event_tokens
    cost, step_ms, verify_ms, event_step_ms = None, 0.0, 0.0, 0.0
    if times is not None and not (needs_event and (times.draft_prefill is None or times.draft_per_token is None)):
        step_ms = times.target_per_token
        verify_ms = times.verify.get(cfg.num_speculative_tokens, step_ms)
        event_step_ms = (times.draft_per_token or 0.0) if needs_event else 0.0
        measured = StepTimes(
            target_prefill_ms=times.target_prefill,
            target_step_ms=step_ms,
            verify_ms=verify_ms,
            empty_ms=times.verify.get(0, step_ms),
            event_start_ms=times.draft_vision + (times.draft_prefill or 0.0) if needs_event else 0.0,
            event_step_ms=event_step_ms,
            own_ms=times.drafting.get(name),
        )
        cost = row_cost(
            replay,
            measured,
            gamma=cfg.num_speculative_tokens,
            num_event_tokens=len(trace.draft_tokens),
            device=cfg.draft_device,
        )
    return ReplayedRow(
        block=block,
        fold=fold,
        replay=replay,
        answer=tuple(trace.target_tokens),
        cost=cost,
        target_step_ms=step_ms,
        verify_ms=verify_ms,
        event_step_ms=event_step_ms,
    )


def _read_row(values: dict[str, Any]) -> RowReplay:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return RowReplay(**fields)
