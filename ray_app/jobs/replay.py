"""`ray-app replay`: token acceptance of drafters on recorded outputs, exactly, without a model or a GPU.

Ray Data runs one task for each file, fold and drafter. A file's rows are in order of time and its sequences are not
named, so folds are contiguous stretches, and rows within the gap of a stretch are not learnt from.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from ray_app import errors
from ray_app.config.draft import ReplayConfig
from ray_app.core.draft_cost import StepTimes, row_cost
from ray_app.core.draft_replay import DRAFTERS, RowReplay, contiguous_folds, replay_fold
from ray_app.core.draft_summary import ReplayedRow, details, match_rate_by_shift, summarise
from ray_app.core.state_drafters import AdapterDrafter
from ray_app.errors import CheckpointError, ConfigError, InputError
from ray_app.jobs.cluster import cluster
from ray_app.jobs.page import require_suffix, write_for_people
from ray_app.jobs.replay_page import replay_page
from ray_app.jobs.states import answers, answers_with_states, require_states
from ray_app.store.traces import Timing, Trace, TraceFile, read_timing, read_traces

BARS = ("positional", "previous_window")
"""Drafters that cost nothing: one that does not beat both has not earned its place."""
CONTROLS = ("constant", *BARS)
"""Replayed beside whatever is asked for."""
BLOCK_ROWS = 20
"""Neighbouring rows that the bootstrap draws together: sequences are not named."""
ACCEPTANCE = ("tokens per pass", "τ", "accepted", "match rate", "shuffled", "in a row (median)")
TIMES = ("one-shot", "slower", "continuous", "expected", "least α (measured)", "µs/token")
SHIFTS = (-2, -1, 0, 1, 2)
SHIFTED = 2.0
"""A shift that matches so many times better than none..."""
SHIFTED_LEAST = 0.1
"""...and at least this share of tokens is no accident: related texts match by chance at some shifts."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What is shown to people beside the `--json` object."""

    details: dict[str, dict[str, Any]]
    """For each drafter: acceptance by place, histogram, controls, time."""
    groups: dict[str, dict[str, float]]
    """For each duration, and question where there are several: tokens per target pass by drafter."""
    behind: tuple[str, ...]
    """Drafters that do not beat both of `BARS`."""
    notes: tuple[str, ...]
    """What to know about the input."""
    quarantined: tuple[str, ...]
    """Lines that were set aside, with their reasons."""
    page: Path | None
    """The page that was written."""


class ReplayResult(dict[str, Any]):
    """The `--json` object; `report` holds the rest."""

    report: ReplayReport


@dataclass(frozen=True, slots=True)
class Task:
    """One drafter on one stretch of one file."""

    file: int
    fold: int
    drafter: str


def run_replay(cfg: ReplayConfig) -> ReplayResult:
    """Replays every drafter that is asked for, and the controls.

    ConfigError: a drafter that does not exist, too few rows. InputError: traces that cannot be replayed.
    """
    require_suffix("--page", cfg.page, ".html")
    unknown = [name for name in cfg.drafter if name not in DRAFTERS]
    if unknown:
        raise ConfigError(f"there is no drafter '{unknown[0]}'; there are: {', '.join(DRAFTERS)}.")
    files = [read_traces(path, cfg.vocabulary, cfg.end_token) for path in cfg.traces]
    for name in cfg.drafter:
        _require_what_it_needs(cfg, files, name)
    timing = read_timing(cfg.timing) if cfg.timing else None
    names = list(dict.fromkeys((*CONTROLS, *cfg.drafter)))
    replayed = _replay(cfg, files, names)

    blocks = np.cumsum([0, *(-(-len(file.traces) // BLOCK_ROWS) for file in files)]).tolist()
    place_fold = [fold_of_rows(cfg, file) for file in files]
    results, told, groups = {}, {}, {}
    for number, name in enumerate(names):
        rows = [
            replayed_row(
                cfg,
                name,
                trace,
                replay,
                timing or trace.timing_ms,
                block=blocks[file] + place // BLOCK_ROWS,
                fold=file * cfg.folds + place_fold[file][place],
            )
            for file, traces in enumerate(files)
            for place, (trace, replay) in enumerate(zip(traces.traces, replayed[name][file], strict=True))
        ]
        results[name] = summarise(rows, cfg.gamma, np.random.default_rng(0))
        told[name] = details(rows, cfg.gamma, np.random.default_rng(number))
        groups[name] = _groups(files, rows)
    result = ReplayResult(
        results=results,
        folds=cfg.folds,
        gap=cfg.gap,
        gamma=cfg.gamma,
        rows=sum(len(file.traces) for file in files),
    )
    result.report = ReplayReport(
        details=told,
        groups={group: {name: groups[name][group] for name in names} for group in groups[names[0]]},
        behind=_behind(results),
        notes=tuple(_notes(cfg, files, timing)),
        quarantined=tuple(f"{bad.file}, line {bad.line}: {bad.reason}" for file in files for bad in file.quarantined),
        page=cfg.page,
    )
    if cfg.page:
        _write_page(result, cfg.page)
    return result


def render_replay(result: ReplayResult, console: Console) -> None:
    """Prints the result for people; the table's first line says which drafters are behind."""
    report = result.report
    for title, heads, cells in (
        (_headline(report.behind), ACCEPTANCE, acceptance_cells),
        ("", TIMES, times_cells),
    ):
        table = _table(title, *heads)
        for name in result["results"]:
            table.add_row(_label(name), *cells(result, name))
        console.print(table)
    console.print(_conditions(result), highlight=False)
    for name, more in report.details.items():
        places = " ".join(f"{rate:.2f}" for rate in more["acceptance_by_place"])
        console.print(f"{name}: accepted at place 1…{result['gamma']}: {places}", highlight=False)
        histogram = " ".join(str(n) for n in more["passes_by_accepted"])
        console.print(f"{name}: passes with 0…{result['gamma']} accepted: {histogram}", highlight=False)
    for group, rates in report.groups.items():
        line = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        console.print(f"{group}: tokens per pass: {line}", highlight=False)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    for line in report.quarantined:
        console.print(f"set aside: {line}", markup=False, highlight=False)
    if report.page:
        console.print(str(report.page), markup=False, highlight=False, soft_wrap=True)


def acceptance_cells(result: ReplayResult, name: str) -> list[str]:
    """A drafter's line below `ACCEPTANCE`."""
    numbers, more = result["results"][name], result.report.details[name]
    interval = numbers["interval95"]["tokens_per_target_pass"]
    span = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return [
        f"{numbers['tokens_per_target_pass']:.2f}{span}",
        f"{numbers['mean_acceptance_length']:.2f}",
        f"{numbers['draft_acceptance_rate']:.1%}",
        f"{numbers['match_rate']:.1%}",
        f"{more['shuffled_match_rate']:.1%}",
        f"{numbers['accepted_prefix_mean']:.1f} ({numbers['accepted_prefix_median']:.0f})",
    ]


def times_cells(result: ReplayResult, name: str) -> list[str]:
    """A drafter's line below `TIMES`."""
    numbers, more = result["results"][name], result.report.details[name]
    return [
        _times(numbers["one_shot_speedup"]),
        "–" if more["one_shot_slower_share"] is None else f"{more['one_shot_slower_share']:.0%}",
        _times(more["continuous_speedup"]),
        _times(numbers["expected_speedup"]),
        _break_even(more),
        f"{more['overhead_us_per_token']:.1f}",
    ]


def _write_page(result: ReplayResult, path: Path) -> None:
    report = result.report
    tables = [
        (heads, [{"name": _label(name), "kind": "", "cells": cells(result, name)} for name in result["results"]])
        for heads, cells in ((ACCEPTANCE, acceptance_cells), (TIMES, times_cells))
    ]
    html = replay_page(
        result,
        report.details,
        report.groups,
        headline=_headline(report.behind),
        behind=bool(report.behind),
        tables=tables,
        conditions=_conditions(result),
        notes=[*report.notes, *(f"set aside: {line}" for line in report.quarantined)],
    )
    write_for_people("--page", path, html.encode())


def _label(name: str) -> str:
    return name + ("*" if DRAFTERS[name].learns_online else "")


def _conditions(result: ReplayResult) -> str:
    return (
        f"{result['rows']:,} rows, γ = {result['gamma']}, {result['folds']} contiguous folds, gap {result['gap']} "
        "rows; in brackets 95 % over blocks of neighbouring rows; * learns from accepted answers"
    )


def _replay(cfg: ReplayConfig, files: Sequence[TraceFile], names: list[str]) -> dict[str, list[list[RowReplay]]]:
    """For each drafter and file, the rows in order."""
    folds = [contiguous_folds(len(file.traces), cfg.folds, cfg.gap) for file in files]
    tasks = [Task(file, fold, name) for name in names for file in range(len(files)) for fold in range(cfg.folds)]
    gamma, vocabulary, adapter = cfg.gamma, cfg.vocabulary, cfg.adapter and cfg.adapter.absolute()
    files = [replace(file, path=file.path.absolute()) for file in files]  # workers have a folder of their own

    def replay(item: dict[str, Any]) -> dict[str, Any]:
        task = tasks[item["task"]]
        drafter, file, fold = DRAFTERS[task.drafter](), files[task.file], folds[task.file][task.fold]
        try:
            # States are large: each task reads those that it needs.
            rows = answers_with_states(file, adapter) if drafter.needs_states else answers(file)
            done = replay_fold(
                drafter,
                [rows[n] for n in fold.train],
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
        for done in dataset.iter_rows():
            if done["error"]:
                raise getattr(errors, done["kind"])(done["error"])
            found[done["task"]] = [_read_row(row) for row in json.loads(done["rows"])]
    replayed: dict[str, list[list[RowReplay]]] = {name: [[] for _ in files] for name in names}
    for number, task in enumerate(tasks):
        replayed[task.drafter][task.file] += found[number]
    return replayed


def _require_what_it_needs(cfg: ReplayConfig, files: Sequence[TraceFile], name: str) -> None:
    """ConfigError: a drafter without its adapter. InputError: one that drafts from states, and rows without them."""
    drafter = DRAFTERS[name]
    if drafter is AdapterDrafter and cfg.adapter is None:
        raise ConfigError("drafter 'adapter' needs --adapter CKPT, the checkpoint that carries the states over.")
    if drafter.needs_states:
        for file in files:
            require_states(file, f"drafter '{name}'")


def fold_of_rows(cfg: ReplayConfig, file: TraceFile) -> list[int]:
    """For each row of a file, the number of the fold that it is replayed in."""
    folds = contiguous_folds(len(file.traces), cfg.folds, cfg.gap)
    return [number for number, fold in enumerate(folds) for _ in fold.test]


def _read_row(values: dict[str, Any]) -> RowReplay:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return RowReplay(**fields)


def replayed_row(
    cfg: ReplayConfig, name: str, trace: Trace, replay: RowReplay, times: Timing | None, block: int, fold: int
) -> ReplayedRow:
    """A row with its cost; `block` is the same for rows that the bootstrap draws together."""
    needs_event = DRAFTERS[name].needs_event_tokens
    cost, step_ms, event_step_ms = None, 0.0, 0.0
    if times is not None and not (needs_event and (times.draft_prefill is None or times.draft_per_token is None)):
        step_ms = times.target_per_token
        event_step_ms = (times.draft_per_token or 0.0) if needs_event else 0.0
        measured = StepTimes(
            target_prefill_ms=times.target_prefill,
            target_step_ms=step_ms,
            verify_ms=times.verify.get(cfg.gamma, step_ms),
            event_start_ms=times.draft_vision + (times.draft_prefill or 0.0) if needs_event else 0.0,
            event_step_ms=event_step_ms,
        )
        cost = row_cost(
            replay, measured, gamma=cfg.gamma, num_event_tokens=len(trace.draft_tokens), device=cfg.draft_device
        )
    return ReplayedRow(
        block=block,
        fold=fold,
        replay=replay,
        answer=tuple(trace.target_tokens),
        cost=cost,
        target_step_ms=step_ms,
        event_step_ms=event_step_ms,
    )


def _groups(files: Sequence[TraceFile], rows: Sequence[ReplayedRow]) -> dict[str, float]:
    """Tokens per target pass of each duration, and of each question where there are several."""
    traces = [trace for file in files for trace in file.traces]
    found: dict[str, list[float]] = {}
    several = len({trace.question for trace in traces}) > 1
    for trace, row in zip(traces, rows, strict=True):
        rate = row.replay.length / len(row.replay.drafted)
        found.setdefault(trace.duration or "unknown duration", []).append(rate)
        if several:
            found.setdefault(f"“{trace.question}”", []).append(rate)
    return {group: float(np.mean(rates)) for group, rates in sorted(found.items())}


def _behind(results: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    bar = max(results[name]["tokens_per_target_pass"] for name in BARS)
    return tuple(
        name for name, numbers in results.items() if name not in CONTROLS and numbers["tokens_per_target_pass"] <= bar
    )


def _headline(behind: tuple[str, ...]) -> str:
    if not behind:
        return f"Every drafter that was asked for beats {' and '.join(BARS)} in tokens per pass."
    return f"NOT better than {' and '.join(BARS)}, which cost nothing: {', '.join(behind)}"


def _notes(cfg: ReplayConfig, files: Sequence[TraceFile], timing: Timing | None) -> list[str]:
    traces = [trace for file in files for trace in file.traces]
    notes = [f"{path.path}: {len(path.traces):,} rows, {len(path.quarantined)} set aside" for path in files]
    if cut_off := sum(file.cut_off for file in files):
        notes.append(
            f"{cut_off:,} answers have no end token {cfg.end_token}: they were recorded up to a length limit."
        )
    rates = match_rate_by_shift([(trace.draft_tokens, trace.target_tokens) for trace in traces], SHIFTS)
    best = max(rates, key=rates.__getitem__)
    starts = [
        {tokens[0] for tokens in side if tokens}
        for side in ([t.draft_tokens for t in traces], [t.target_tokens for t in traces])
    ]
    told = ", ".join(f"{shift:+d}: {rate:.1%}" for shift, rate in rates.items())
    if best and rates[best] >= max(SHIFTED * rates[0], SHIFTED_LEAST):
        notes.append(f"SHIFT: EventGPT's tokens match best when moved by {best:+d} ({told}).")
    else:
        notes.append(f"self-test: EventGPT's match rate when moved by {told}; no shift is needed.")
    if (cfg.start_token in starts[0]) != (cfg.start_token in starts[1]):
        side = "drafts" if cfg.start_token in starts[0] else "targets"
        notes.append(f"BOS: only the {side} begin with the start token {cfg.start_token}; drop it there.")
    own = [timing or trace.timing_ms for trace in traces]
    if not any(own):
        notes.append("no times were measured for these rows: no speed-ups; give --timing FILE.")
    elif unmeasured := sum(times is not None and cfg.gamma not in times.verify for times in own):
        notes.append(
            f"verify({cfg.gamma}) was not measured in {unmeasured:,} of {len(traces):,} rows and is taken there as "
            "one plain step, the least it can cost: speed-ups are upper bounds; give `verify` in --timing FILE."
        )
    notes.append(
        "EventGPT runs on a device of its own, while the target prefills."
        if cfg.draft_device == "second"
        else "EventGPT runs on the target's device, before its prefill."
    )
    return notes


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    table.add_column("drafter")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _break_even(more: dict[str, Any]) -> str:
    """The least α that pays, and the α that was measured."""
    if not more["timed_rows"]:
        return "–"
    least = "none" if more["break_even_alpha"] is None else f"{more['break_even_alpha']:.2f}"
    return f"{least} ({more['alpha']:.2f})"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
