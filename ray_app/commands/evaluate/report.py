"""An evaluation for people: one sentence, one table, and report.html.

Rates are fractions in the result and percent on the page; a lift is given in percentage points.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text as TerminalText

from ray_app.core.advice import what_to_try
from ray_app.core.evaluation import BASELINES, DARK
from ray_app.core.metrics import THETA, rate_key
from ray_app.reports.figures import CosineSeries, acceptance_figure, histogram_figure
from ray_app.reports.html import (
    Cell,
    Facts,
    Figure,
    Group,
    Outcome,
    Pictures,
    Row,
    Section,
    Table,
    Text,
    flat_rows,
    page,
    picture,
)

KEY = rate_key(THETA)
MOST_ROWS = 8
"""Rows of a table that is not folded away."""
TOKEN_NOTE = (
    "Cosine acceptance is not token acceptance: it measures how close features are, not how many drafted tokens "
    "the target model would keep."
)


@dataclass(frozen=True, slots=True)
class PairPicture:
    """One test pair as three pictures of shape (H, W, 3) or (H, W), uint8."""

    sequence: str
    t_start_us: int
    t_end_us: int
    before: float | None
    """cos_sim of the raw event feature with the target, where widths agree."""
    after: float
    """cos_sim of the aligned output with the target."""
    event: NDArray[np.uint8]
    aligned: NDArray[np.uint8]
    target: NDArray[np.uint8]


def outcome(result: Mapping[str, Any]) -> Outcome:
    """`beats`, `unsure` (better, but the 95 % interval of the lift reaches 0) or `loses`."""
    if result["lift"] <= 0:
        return "loses"
    return "beats" if result["interval95"]["lift"][0] > 0 else "unsure"


def verdict_sentence(result: Mapping[str, Any]) -> str:
    """One short sentence: does the adapter beat the best baseline at θ 0.80, by how much, and is that certain."""
    baseline, points = f"the best baseline ({result['best_baseline']})", f"{abs(100 * result['lift']):.1f} points"
    worse = f"it is {points} worse" if result["lift"] else "both are equal"
    comparison = {
        "beats": f"beats {baseline} by {points} at θ {KEY}",
        "unsure": f"beats {baseline} by {points} at θ {KEY}; the 95 % interval includes zero",
        "loses": f"does not beat {baseline} at θ {KEY}: {worse}",
    }[outcome(result)]
    return f"The adapter {comparison}."


def report_warnings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines to read with the numbers of a test part, warnings first: `text` and `warning` (False: context)."""
    lines = []
    if (rate := flat_thetas(result).get(KEY)) is not None:
        lines.append(
            f"At θ {KEY} every row is {rate:.0%}, so acceptance and lift show nothing: read mean cos_sim, the "
            "centred cosine and R@1."
        )
    if result["previous_window_better"]:
        same = result["baselines"]["previous_window"]
        lines.append(
            f"previous_window is better: the preceding window's target is accepted for "
            f"{100 * same['cosine_accept_rate'][KEY]:.1f} % of the {same['pairs']} pairs that have one, the "
            f"adapter for {100 * same['adapter_cosine_accept_rate'][KEY]:.1f} % of the same pairs."
        )
    return [{"text": text, "warning": True} for text in lines] + data_warnings(result)


def data_warnings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Consequences of data and split for every number, warnings first: `text` and `warning`."""
    split, data = result["split"], result["data"]
    warnings: list[str] = []
    context: list[str] = []
    if split["test_pairs_trained_on"] is None:
        context.append("What this checkpoint was trained on is not recorded: it may have seen test pairs.")
    elif split["test_pairs_trained_on"]:
        warnings.append(
            f"This checkpoint was trained on {split['test_pairs_trained_on']} of the {split['test']} test pairs: "
            "evaluate it under the split that it was trained with."
        )
    if split["test_windows_overlapping_train"] > 0:
        warnings.append(
            f"This split leaks: {100 * split['test_windows_overlapping_train']:.0f} % of the test windows overlap "
            "a training window of the same sequence, so the test numbers are too high for new drives."
        )
    if split["by"] == "block":
        context.append(
            "One sequence only: the test part is a contiguous block, one window apart from the training part."
        )
    if data["source"] == "scenes":
        context.append("The pairs are rendered scenes, not recordings: both sides come from a simulation.")
    elif data["events"] == "simulated":
        context.append("The events are simulated from the video; no event camera recorded them.")
    context.append(TOKEN_NOTE)
    return [{"text": text, "warning": True} for text in warnings] + [
        {"text": text, "warning": False} for text in context
    ]


def print_warnings(lines: list[dict[str, Any]], console: Console) -> None:
    """Print each line, warnings in colour."""
    for line in lines:
        console.print(f"- {line['text']}", style="yellow" if line["warning"] else "dim")


def lines(result: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Name, kind and numbers of each line: the baselines, previous_window where it exists, the adapter."""
    named = {"before": "before (raw event)", "previous_window": "previous_window (context)"}
    baselines = [
        (named.get(name, name), "baseline" if name in BASELINES else "context", numbers)
        for name, numbers in result["baselines"].items()
    ]
    return [*baselines, ("adapter", "adapter", result)]


def flat_thetas(result: Mapping[str, Any]) -> dict[str, float]:
    """Return each θ at which all answers have one rate, 0 or 1: it shows no difference."""
    rates = [numbers["cosine_accept_rate"] for _, _, numbers in lines(result)]
    common = {theta: {rate[theta] for rate in rates} for theta in rates[0]}
    return {theta: values.pop() for theta, values in common.items() if values in ({0.0}, {1.0})}


def flat_note(result: Mapping[str, Any]) -> str:
    """Return a sentence about each θ that shows no difference; empty if there is none."""
    flat = flat_thetas(result)
    groups = [
        f"at θ {', '.join(theta for theta in flat if flat[theta] == rate)} every row is {rate:.0%}"
        for rate in (1.0, 0.0)
        if rate in flat.values()
    ]
    return f"{', '.join(groups).capitalize()}: acceptance shows nothing there." if groups else ""


def shown_thetas(result: Mapping[str, Any]) -> list[str]:
    """Return up to four θ for a narrow table: the usual ones, or others that show a difference; θ 0.80 always."""
    flat, usual = flat_thetas(result), ["0.70", KEY, "0.90", "0.95"]
    telling = [theta for theta in result["cosine_accept_rate"] if theta not in flat]
    wanted = [theta for theta in usual if theta in telling] + [theta for theta in telling[::-1] if theta not in usual]
    return sorted({KEY, *wanted[:4]}) if telling else usual


def retrieval_line(result: Mapping[str, Any]) -> str:
    """Return retrieval and the centred cosine in one line; empty where they were not measured."""
    if not result.get("retrieval"):
        return ""
    rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in result["retrieval"].items() if name[:2] == "R@")
    return (
        f"{rates} (chance of R@1: {100 * result['retrieval']['chance_R@1']:.1f} %); centred cosine "
        f"{result['centered_cos_sim_mean']:.3f}"
    )


def results_table(result: Mapping[str, Any], title: str) -> TerminalTable:
    """Terminal table: every baseline, the adapter, lift; below it retrieval, and each θ that shows no difference."""
    notes = [note for note in (retrieval_line(result), flat_note(result)) if note]
    table = TerminalTable(
        title=title, title_justify="left", header_style="bold", caption="\n".join(notes), caption_justify="left"
    )
    table.add_column("answer")
    table.add_column("mean cos_sim", justify="right")
    thetas = shown_thetas(result)
    for theta in thetas:
        table.add_column(f"θ {theta}", justify="right")
    for name, kind, numbers in lines(result):
        rates = [f"{100 * numbers['cosine_accept_rate'][theta]:.1f} %" for theta in thetas]
        style = {"adapter": "bold", "context": "dim"}.get(kind)
        table.add_row(name.removesuffix(" (context)"), f"{numbers['cos_sim_mean']:.4f}", *rates, style=style)
    table.add_section()
    lifts = [result["lift_by_theta"][theta] for theta in thetas]
    table.add_row(
        "lift (points)",
        "",
        *(TerminalText(f"{100 * lift:+.1f}", style="green" if lift > 0 else "red") for lift in lifts),
    )
    if "interval95" in result:
        table.add_row("95 % interval", "", *interval_cells(result, thetas), style="dim")
    return table


def interval_cells(result: Mapping[str, Any], thetas: Sequence[str]) -> list[str]:
    """Return the interval of the lift at each θ, in percentage points."""
    intervals = result["interval95"]["lift_by_theta"]
    return [" to ".join(f"{100 * bound:+.1f}" for bound in intervals.get(theta, ())) for theta in thetas]


def report_page(
    result: Mapping[str, Any],
    cosines: CosineSeries,
    best: Sequence[PairPicture] = (),
    worst: Sequence[PairPicture] = (),
    token_report: str | None = None,
) -> str:
    """report.html; `token_report` is a relative link to the page of `ray-app correlate`."""
    groups = [
        Group(title, [pair_pictures(pair, f"{word} pair {n}") for n, pair in enumerate(pairs, 1)])
        for title, word, pairs in (("Highest cosine after", "best", best), ("Lowest cosine after", "worst", worst))
        if pairs
    ]
    link = Text("What cosine acceptance predicted about tokens, measured on recorded outputs", token_report or "")
    sections = [
        Section("Results", [rates_table(result), *([link] if token_report else [])]),
        Section("Acceptance against θ", [acceptance_block(result, cosines)]),
        Section("Cosine of each pair", [histogram_block(result, cosines)]),
        *([Section("Best and worst pairs", groups, columns=True)] if groups else []),
        *(group_section(result, key) for key in ("by_lighting", "by_sequence") if len(result[key]) > 1),
        Section(
            "Details",
            [
                Group("Further measures", [Facts(list(measures(result)))], "fold"),
                Group("Split", [Facts(list(split_lines(result)))], "fold"),
                Group("Provenance", provenance_blocks(result["provenance"]), "fold"),
            ],
        ),
        next_section(result),
    ]
    return page(
        f"Alignment report: {result['checkpoint']}",
        result["verdict"],
        f"{result['pairs']:,} test pairs of {result['dataset']} · split by {result['split']['by']} · checkpoint "
        f"{result['checkpoint']}",
        report_warnings(result),
        sections,
        outcome(result),
    )


def next_section(result: Mapping[str, Any]) -> Section:
    """Section with the next step: register the checkpoint, or what to try instead."""
    register = (
        f"ray-app promote {shlex.quote(result['checkpoint'])} makes it champion, if it beats the present one too"
    )
    return Section("Next", [Text(what_to_try(result) or register)])


def provenance_blocks(provenance: Mapping[str, Any]) -> list[Facts | Group]:
    """Facts about both commands; the settings of the training are folded away."""
    checkpoint = dict(provenance.get("checkpoint") or {})
    config = checkpoint.pop("config", None)
    facts = Facts(flat_rows({**provenance, **({"checkpoint": checkpoint} if checkpoint else {})}))
    return [facts, *([Group("Settings of the training", [Facts(flat_rows(config))], "fold")] if config else [])]


def rates_table(result: Mapping[str, Any]) -> Table:
    """Acceptance at every θ: the baselines, the adapter, the lift."""
    thetas = list(result["cosine_accept_rate"])
    rows = [
        Row(
            name,
            [
                str(numbers["pairs"]),
                f"{numbers['cos_sim_mean']:.4f} ± {numbers['cos_sim_std']:.4f}",
                *(f"{100 * numbers['cosine_accept_rate'][theta]:.1f}" for theta in thetas),
            ],
            kind,
        )
        for name, kind, numbers in lines(result)
    ]
    lifts = [lift_cell(result["lift_by_theta"][theta]) for theta in thetas]
    return Table(
        ["answer", "pairs", "mean cos_sim", *(f"θ {theta}" for theta in thetas)],
        [
            *rows,
            Row("lift", ["", "", *lifts], "lift"),
            Row("95 % interval", ["", "", *interval_cells(result, thetas)], "interval"),
        ],
        "cosine_accept_rate: share of test pairs with cos_sim > θ, in percent. Lift: adapter minus the best of "
        f"{', '.join(name for name in result['baselines'] if name in BASELINES)} at that θ, in percentage points. "
        f"Retrieval by centred cosine: {retrieval_line(result)}. {flat_note(result)}".rstrip(),
        key=f"θ {KEY}",
    )


def lift_cell(lift: float) -> Cell:
    """A lift in percentage points, coloured by its sign."""
    return Cell(f"{100 * lift:+.1f}", "good" if lift > 0 else "bad" if lift < 0 else "")


def acceptance_block(result: Mapping[str, Any], cosines: CosineSeries) -> Figure:
    """Curves of acceptance against θ."""
    named = [f"{name} {100 * numbers['cosine_accept_rate'][KEY]:.1f} percent" for name, _, numbers in lines(result)]
    return Figure(
        acceptance_figure(cosines),
        f"Curves of cosine_accept_rate against theta. At theta {KEY}: {', '.join(named)}.",
        "The adapter is worth something where its solid line is above every baseline. The table above has the same "
        "numbers.",
    )


def histogram_block(result: Mapping[str, Any], cosines: CosineSeries) -> Figure:
    """Histograms of the cosine of each pair, before and after."""
    name = "before" if "before" in result["baselines"] else "shuffled"
    other = result["baselines"][name]
    return Figure(
        histogram_figure(name, cosines[name], cosines["adapter"]),
        f"Two histograms of the cosine of each pair. {name}: mean {other['cos_sim_mean']:.3f}, standard deviation "
        f"{other['cos_sim_std']:.3f}. After: mean {result['cos_sim_mean']:.3f}, standard deviation "
        f"{result['cos_sim_std']:.3f}.",
        "Pixels are all positive, so their cosine is high by construction: compare with the baselines, not with 0."
        if result["data"]["features"]["target"] == "images"
        else "Cosines of an encoder's features depend on its mean feature: compare with the baselines, not with 0.",
    )


def measures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of every measure that is not in the results table."""
    interval = result["interval95"]
    for name, bounds in interval.items():
        if isinstance(bounds, list):
            yield f"95 % interval of {name}", f"{bounds[0]:.4f} to {bounds[1]:.4f}"
    for theta, (low, high) in interval["lift_by_theta"].items():
        if theta != KEY:
            yield f"95 % interval of lift at θ {theta}", f"{low:.4f} to {high:.4f}"
    yield "bootstrap", f"{interval['resamples']} resamples of whole {interval['unit']}s"
    yield (
        "centred cosine",
        (
            f"{result['centered_cos_sim_mean']:.4f}"
            + (f" (before: {raw:.4f})" if (raw := result["centered_cos_sim_mean_before"]) is not None else "")
            + "; the mean training target is subtracted from both sides"
        ),
    )
    for name, value in result["retrieval"].items():
        yield f"retrieval {name}", f"{value:.4f}"
    yield "percentiles after", ", ".join(f"{name} {value:.4f}" for name, value in result["percentiles"].items())
    yield "lowest and highest cos_sim", f"{result['cos_sim_min']:.4f} and {result['cos_sim_max']:.4f}"


def group_section(result: Mapping[str, Any], key: str) -> Section:
    """Table of parts of the test pairs: by lighting or by sequence."""
    rows = [
        Row(
            name,
            [
                f"{part['pairs']:,}",
                f"{part['cos_sim_mean']:.4f}",
                f"{100 * part[f'cosine_accept_rate_{KEY}']:.1f} %",
                f"{100 * part['lift']:+.1f}",
                interval_words(part),
            ],
        )
        for name, part in result[key].items()
    ]
    title, head = {"by_lighting": ("By day and night", "lighting"), "by_sequence": ("By sequence", "sequence")}[key]
    caption = f"Lift over {result['best_baseline']}, the best baseline on all test pairs, in percentage points."
    if key == "by_lighting":
        caption += f" Night: a target less than {DARK:g} times as bright as the mean training target."
    heads = [head, "pairs", "mean cos_sim", f"θ {KEY}", "lift", "95 % interval (bootstrap over)"]
    table = Table(heads, rows, caption)
    return Section(
        title, [table if len(rows) <= MOST_ROWS else Group(f"{len(rows):,} {head}s, one by one", [table], "fold")]
    )


def interval_words(part: Mapping[str, Any]) -> str:
    """The interval of a part's lift, with the number of units that were resampled."""
    if part["lift_interval95"] is None:
        return "–"
    low, high = (100 * bound for bound in part["lift_interval95"])
    return f"{low:+.1f} to {high:+.1f} ({part['units']} {part['unit']}s)"


def split_lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of everything about the split and the data."""
    split, data = result["split"], result["data"]
    trained_on = split["test_pairs_trained_on"]
    yield "divided by", f"{split['by']} ({split['label']}), seed {split['seed']}"
    yield "pairs", f"train {split['train']:,}, validation {split['val']:,}, test {split['test']:,}"
    yield (
        "test windows that overlap a training window",
        f"{100 * split['test_windows_overlapping_train']:.1f} %",
    )
    yield "test pairs that the checkpoint was trained on", "not recorded" if trained_on is None else f"{trained_on:,}"
    yield "source of the pairs", f"{data['source']}, events {data['events']}"
    for side, encoder in data["encoders"].items():
        yield f"{side} encoder", encoder
    yield "fingerprint of the store", result["fingerprint"]
    yield "fingerprint of the test pairs", result["test_fingerprint"]
    yield "SHA-256 of the checkpoint", result["checkpoint_sha256"]


def pair_pictures(pair: PairPicture, name: str) -> Pictures:
    """One pair: event image, aligned output and target."""
    sides = (("event image", pair.event), ("aligned output", pair.aligned), ("target", pair.target))
    start_s, end_s = pair.t_start_us / 1e6, pair.t_end_us / 1e6
    return Pictures(
        [
            picture(side, f"{side} of the {name}, {pair.sequence} at {start_s:.3f} s", pixels)
            for side, pixels in sides
        ],
        ": cos_sim "
        + ("" if pair.before is None else f"{pair.before:.3f} before, ")
        + f"{pair.after:.3f} after; aligned values are clipped to 0…1",
        strong=f"{pair.sequence}, {start_s:.3f} s to {end_s:.3f} s",
    )
