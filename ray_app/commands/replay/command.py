"""`ray-app replay`: token acceptance of drafters on recorded outputs, exactly, without a model or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as TerminalTable

from ray_app.commands.replay.page import rate_cell, replay_page, span
from ray_app.commands.replay.rows import file_folds, fold_of_rows, replay_files, replayed_row
from ray_app.config.speculative import ReplayConfig
from ray_app.drafters.hidden_states import AdapterDrafter
from ray_app.drafters.recorded_states import bootstrap_blocks, damaged_lines, read_files, require_states
from ray_app.drafters.replay import DRAFTERS, are_named
from ray_app.drafters.summary import ReplayedRow, details, match_rate_by_shift, rate_of_group, summarise
from ray_app.errors import ConfigError
from ray_app.reports.html import Row, Table, require_suffix, write_output
from ray_app.store.traces import Timing, TraceFile, read_timing

BARS = ("positional", "previous_window")
"""Drafters that cost nothing: one that does not beat both has not earned its place."""
BASELINE_DRAFTERS = ("constant", *BARS)
"""Drafters that are replayed with every choice."""
BLOCK_ROWS = 20
"""Neighbouring rows that the bootstrap draws together where sequences are not named."""
ACCEPTANCE = ("tokens per pass", "τ", "accepted", "match rate", "shuffled", "in a row (median)")
TIMES = ("one-shot", "slower", "continuous", "slower", "expected", "least α (measured)", "µs/token")
EXPECTED = "expected: (1 − α^(γ+1)) / ((1 − α)(γc + 1)), without prefill and with a pass as long as a step."
SHIFTS = (-2, -1, 0, 1, 2)
SHIFTED = 2.0
"""A shift that matches so many times better than none..."""
SHIFTED_LEAST = 0.1
"""...and at least this share of tokens is no accident: related texts match by chance at some shifts."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Results that people see in addition to the `--json` object."""

    details: dict[str, dict[str, Any]]
    """Acceptance by place, histogram, baselines and time of each drafter."""
    groups: dict[str, dict[str, dict[str, Any]]]
    """Tokens per target pass by drafter, with interval, for each duration, and question where there are several."""
    behind: tuple[str, ...]
    """Drafters that do not beat both of `BARS`."""
    notes: tuple[str, ...]
    """Warnings about the input."""
    rejected: tuple[str, ...]
    """Lines that were rejected, with their reasons."""
    folds_by: str
    """Composition of a fold."""
    html: Path | None
    """The page that was written."""


class ReplayResult(dict[str, Any]):
    """The `--json` object; `report` holds the rest."""

    report: ReplayReport


def run_replay(cfg: ReplayConfig) -> ReplayResult:
    """Replays every drafter that is asked for, and the baselines.

    ConfigError: a drafter that does not exist, too few rows. InputError: traces that cannot be replayed.
    """
    require_suffix("--html", cfg.html, ".html")
    unknown = [name for name in cfg.drafter if name not in DRAFTERS]
    if unknown:
        raise ConfigError(f"there is no drafter '{unknown[0]}'; there are: {', '.join(DRAFTERS)}.")
    if cfg.learn_from and cfg.folds > 1:
        raise ConfigError(f"--learn-from takes the place of folds; add --folds 1 (now {cfg.folds}).")
    files = read_files(cfg.traces, cfg.vocabulary, cfg.end_token)
    for name in cfg.drafter:
        _require_what_it_needs(cfg, files, name)
    timing = read_timing(cfg.timing) if cfg.timing else None
    names = list(dict.fromkeys((*BASELINE_DRAFTERS, *cfg.drafter)))
    folds = [file_folds(cfg, file) for file in files]
    replayed = replay_files(cfg, files, names)
    block_of, fold_of = bootstrap_blocks(files, BLOCK_ROWS), [fold_of_rows(each) for each in folds]
    most_folds = max(len(each) for each in folds)
    results, details_of, groups = {}, {}, {}
    for number, name in enumerate(names):
        rows = [
            replayed_row(
                cfg,
                name,
                trace,
                replay,
                timing or trace.timing_ms,
                block=block_of[file][place],
                fold=file * most_folds + fold_of[file][place],
            )
            for file, traces in enumerate(files)
            for place, (trace, replay) in enumerate(zip(traces.traces, replayed[name][file], strict=True))
        ]
        results[name] = summarise(rows, cfg.num_speculative_tokens, np.random.default_rng(0))
        details_of[name] = details(rows, cfg.num_speculative_tokens, np.random.default_rng(number))
        groups[name] = _groups(files, rows)
    result = ReplayResult(
        results=results,
        folds=most_folds,
        fold_gap=cfg.fold_gap,
        num_speculative_tokens=cfg.num_speculative_tokens,
        rows=sum(len(file.traces) for file in files),
    )
    result.report = ReplayReport(
        details=details_of,
        groups={group: {name: groups[name][group] for name in names} for group in groups[names[0]]},
        behind=_behind(results),
        notes=tuple(_notes(cfg, files, timing)),
        rejected=tuple(damaged_lines(files)),
        folds_by=_folds_by(cfg, files),
        html=cfg.html,
    )
    if cfg.html:
        _write_page(result, cfg.html)
    return result


def render_replay(result: ReplayResult, console: Console) -> None:
    """Print the result for people; the table's first line says which drafters are behind."""
    report = result.report
    for title, heads, cells in (
        (_headline(report.behind), ACCEPTANCE, acceptance_cells),
        ("", TIMES, times_cells),
    ):
        table = _table(title, *heads)
        for name in result["results"]:
            table.add_row(_label(name), *cells(result, name))
        console.print(table)
    console.print(_conditions(result))
    for name, more in report.details.items():
        places = " ".join(f"{rate:.2f}" for rate in more["acceptance_by_place"])
        console.print(f"{name}: accepted at place 1…{result['num_speculative_tokens']}: {places}")
        histogram = " ".join(str(n) for n in more["passes_by_accepted"])
        console.print(f"{name}: passes with 0…{result['num_speculative_tokens']} accepted: {histogram}")
    for group, rates in report.groups.items():
        line = ", ".join(f"{name} {rate_cell(rate)}" for name, rate in rates.items())
        console.print(f"{group}: tokens per pass: {line}")
    for note in report.notes:
        console.print(note)
    if report.html:
        console.print(str(report.html), soft_wrap=True)


def acceptance_cells(result: ReplayResult, name: str) -> list[str]:
    """Return a drafter's line below `ACCEPTANCE`."""
    numbers, more = result["results"][name], result.report.details[name]
    return [
        f"{numbers['tokens_per_target_pass']:.2f}{span(numbers['interval95']['tokens_per_target_pass'])}",
        f"{numbers['mean_acceptance_length']:.2f}",
        f"{numbers['draft_acceptance_rate']:.1%}",
        f"{numbers['match_rate']:.1%}",
        f"{more['shuffled_match_rate']:.1%}",
        f"{numbers['accepted_prefix_mean']:.1f} ({numbers['accepted_prefix_median']:.0f})",
    ]


def times_cells(result: ReplayResult, name: str) -> list[str]:
    """Return a drafter's line below `TIMES`."""
    numbers, more = result["results"][name], result.report.details[name]
    return [
        _times(numbers["one_shot_speedup"]),
        _share(more["one_shot_slower_share"]),
        _times(more["continuous_speedup"]) + span(more["interval95"]["continuous_speedup"]),
        _share(more["continuous_slower_share"]),
        _times(numbers["expected_speedup"]),
        _break_even(more),
        f"{more['overhead_us_per_token']:.1f}",
    ]


def _write_page(result: ReplayResult, path: Path) -> None:
    report = result.report
    tables = [
        Table(["drafter", *heads], [Row(_label(name), cells(result, name)) for name in result["results"]])
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
        notes=[*report.notes, *(f"rejected: {line}" for line in report.rejected)],
    )
    write_output("--html", path, html.encode())


def _label(name: str) -> str:
    return name + ("*" if DRAFTERS[name].learns_online else "")


def _conditions(result: ReplayResult) -> str:
    return (
        f"{result['rows']:,} rows, γ = {result['num_speculative_tokens']}, {result['folds']} folds "
        f"({result.report.folds_by}), in brackets 95 % over sequences, or over blocks of "
        "neighbouring rows where they are not named; * learns from "
        f"accepted answers. {EXPECTED}"
    )


def _folds_by(cfg: ReplayConfig, files: Sequence[TraceFile]) -> str:
    if cfg.folds == 1:
        return "all rows in order"
    named = {are_named([trace.sequence for trace in file.traces]) for file in files}
    whole, contiguous = "whole sequences", "contiguous, with a gap"
    if len(named) > 1:
        return f"{whole} in files that name several, {contiguous} in the others"
    return whole if named.pop() else contiguous


def _require_what_it_needs(cfg: ReplayConfig, files: Sequence[TraceFile], name: str) -> None:
    """ConfigError: a drafter without its adapter. InputError: one that drafts from states, and rows without them."""
    drafter = DRAFTERS[name]
    if drafter is AdapterDrafter and cfg.adapter is None:
        raise ConfigError("drafter 'adapter' needs --adapter CKPT, the checkpoint that carries the states over.")
    if drafter.needs_states:
        for file in (*files, *read_files(cfg.learn_from, cfg.vocabulary, cfg.end_token)):
            require_states(file, f"drafter '{name}'")


def _groups(files: Sequence[TraceFile], rows: Sequence[ReplayedRow]) -> dict[str, dict[str, Any]]:
    """Tokens per target pass of each duration, and of each question where there are several."""
    traces = [trace for file in files for trace in file.traces]
    found: dict[str, list[ReplayedRow]] = {}
    several = len({trace.question for trace in traces}) > 1
    for trace, row in zip(traces, rows, strict=True):
        found.setdefault(trace.duration or "unknown duration", []).append(row)
        if several:
            found.setdefault(f"“{trace.question}”", []).append(row)
    return {group: rate_of_group(found[group], np.random.default_rng(0)) for group in sorted(found)}


def _behind(results: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    bar = max(results[name]["tokens_per_target_pass"] for name in BARS)
    return tuple(
        name
        for name, numbers in results.items()
        if name not in BASELINE_DRAFTERS and numbers["tokens_per_target_pass"] <= bar
    )


def _headline(behind: tuple[str, ...]) -> str:
    if not behind:
        return f"Every drafter that was asked for beats {' and '.join(BARS)} in tokens per pass."
    return f"NOT better than {' and '.join(BARS)}, which cost nothing: {', '.join(behind)}"


def _notes(cfg: ReplayConfig, files: Sequence[TraceFile], timing: Timing | None) -> list[str]:
    traces = [trace for file in files for trace in file.traces]
    notes = [f"{path.path}: {len(path.traces):,} rows, {len(path.rejected)} rejected" for path in files]
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
    shifts = ", ".join(f"{shift:+d}: {rate:.1%}" for shift, rate in rates.items())
    if best and rates[best] >= max(SHIFTED * rates[0], SHIFTED_LEAST):
        notes.append(f"SHIFT: EventGPT's tokens match best when moved by {best:+d} ({shifts}).")
    else:
        notes.append(f"self-test: EventGPT's match rate when moved by {shifts}; no shift is needed.")
    if (cfg.start_token in starts[0]) != (cfg.start_token in starts[1]):
        side = "drafts" if cfg.start_token in starts[0] else "targets"
        notes.append(f"BOS: only the {side} begin with the start token {cfg.start_token}; drop it there.")
    own = [timing or trace.timing_ms for trace in traces]
    if not any(own):
        notes.append("no times were measured for these rows: no speed-ups; give --timing FILE.")
    elif unmeasured := sum(times is not None and cfg.num_speculative_tokens not in times.verify for times in own):
        notes.append(
            f"verify({cfg.num_speculative_tokens}) was not measured in {unmeasured:,} of {len(traces):,} rows; "
            "these count it as one plain step, the least it can cost: speed-ups are "
            "upper bounds; give `verify` in --timing FILE."
        )
    notes.append(
        "EventGPT runs on a device of its own, while the target prefills."
        if cfg.draft_device == "separate"
        else "EventGPT runs on the target's device, before its prefill."
    )
    return notes


def _table(title: str, *headings: str) -> TerminalTable:
    table = TerminalTable(title=title or None, title_justify="left")
    table.add_column("drafter")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _break_even(more: dict[str, Any]) -> str:
    """Return the least α that pays, and the α that was measured."""
    if not more["timed_rows"]:
        return "–"
    least = "none" if more["break_even_alpha"] is None else f"{more['break_even_alpha']:.2f}"
    return f"{least} ({more['alpha']:.2f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
