"""The page that `inspect --html` writes: numbers, plots, and pictures of the worst leaks.

Shapes: N = pairs of the index.
"""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from ray_app.commands.inspect.leaks import Example, LeakComparison, describe_pair
from ray_app.commands.inspect.scan import StoreScan
from ray_app.commands.inspect.statistics import NIGHT_BELOW, overlap_with_previous, positive_share
from ray_app.reports.figures import INK, PALETTE, is_narrow, log_scale, svg
from ray_app.reports.html import Facts, Figure, Group, Pictures, Row, Section, Table, Text, flat_rows, page, picture
from ray_app.store.pair_store import PairIndex

MOST_BARS = 100
"""Sequences that get a bar each; of more, a histogram is drawn."""
HISTOGRAM_BINS = 40
LEAK_HEADS = ["compared", "windows", "same event", "same target", "near event", "near target", "overlap", "any"]
SEQUENCE_HEADS = [
    "sequence",
    "pairs",
    "seconds",
    "daytime",
    "brightness",
    "events drawn (median)",
    "active pixels (median)",
]
LEAKING = "Divide by whole sequences (--split sequence, the default), or leave the pairs out that are shared."
BLUE, RED, TEAL, GREY = PALETTE[0], PALETTE[3], PALETTE[5], PALETTE[1]


def inspect_page(result: dict[str, Any], index: PairIndex, scan: StoreScan, leaks: Sequence[LeakComparison]) -> str:
    """The page as HTML; `result` as `run_inspect` gives it."""
    split, rule = result["split"], result["leak_rule"]
    parts = f"train {split['train']:,}, val {split['val']:,}, test {split['test']:,}"
    text = Text(f"Split: {split['label']}; {parts}. {rule[0].upper()}{rule[1:]}")
    other = result["against"]
    lead = (
        f"{result['pairs']:,} pairs of {result['sequences']} sequences in {result['store']} · source "
        f"{result['source']['name']}, events {result['source']['events']} · all checksums match"
    )
    leaking = any(comparison.leaks.any for comparison in leaks)
    sequences = Table(SEQUENCE_HEADS, [sequence_row(line) for line in result["by_sequence"]], day_rule(result))
    sections = [
        Section(
            "Leaks",
            [
                *([leaks_block(result["leaks"])] if leaks else []),
                text,
                *(examples(each) for each in leaks if each.leaks.examples),
            ],
        ),
        Section("Windows", [Facts(list(statistics_lines(result["windows"])))]),
        *(Section(title, [figure]) for title, figure in store_figures(result, index, scan)),
        Section("Sequences", [Group(f"{len(result['by_sequence']):,} sequences, one by one", [sequences], "fold")]),
        Section("Source", [Facts([*flat_rows(result["source"]), ("fingerprint", result["fingerprint"])])]),
        Section("Next", [Text(LEAKING if leaking else f"ray-app train --store {shlex.quote(result['store'])}")]),
    ]
    return page(
        f"Pair store: {result['store']}",
        leaks_headline(result["leaks"]),
        lead + (f" · compared with {other['pairs']:,} pairs in {other['store']}" if other else ""),
        [{"text": text, "warning": False} for text in result["warnings"]],
        sections,
        "plain" if not leaks else "loses" if leaking else "beats",
    )


def day_rule(result: dict[str, Any]) -> str:
    """Caption that states the rule for day and night."""
    return f"Day and night by a rule: {result['night_rule']}."


def statistics_lines(windows: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each summary that is known: median and middle nine tenths."""
    for name, form, factor in (
        ("events_per_window", "{:,.0f}", 1),
        ("events_drawn", "{:,.0f}", 1),
        ("positive_share_of_events_drawn", "{:.1f} %", 100),
        ("active_share_of_drawn_image", "{:.1f} %", 100),
        ("positive_share_of_drawn_image", "{:.1f} %", 100),
        ("frame_minus_window_centre_ms", "{:+.3f} ms", 1),
        ("overlap_with_previous", "{:.0f} %", 100),
    ):
        if summary := windows[name]:
            yield name.replace("_", " "), _spread(summary, form, factor)


def leaks_headline(leaks: list[dict[str, Any]]) -> str:
    """One sentence: does anything leak, and where most."""
    if not leaks:
        return "No leaks were looked for: there is only one part."
    worst = max(leaks, key=lambda leak: leak["any"] / leak["windows"])
    if not worst["any"]:
        return "No leaks: no identical features, no overlapping windows, no near-duplicates."
    return (
        f"LEAKS: {worst['any']:,} of {worst['windows']:,} windows of {worst['part']} are in {worst['against']} too."
    )


def leaks_block(leaks: list[dict[str, Any]]) -> Table:
    """Windows of each part that another one has too: counts and shares."""
    rows = []
    for leak in leaks:
        counts = (*leak["identical"].values(), *leak["near"].values(), leak["overlapping"], leak["any"])
        cells = [f"{leak['windows']:,}", *(f"{n:,} ({n / leak['windows']:.1%})" if n else "0" for n in counts)]
        rows.append(Row(f"{leak['part']} in {leak['against']}", cells))
    return Table(LEAK_HEADS, rows)


def sequence_row(line: dict[str, Any]) -> Row:
    """One row of the table of sequences."""
    seconds = f"{line['t_start_us'] / 1e6:,.2f} to {line['t_end_us'] / 1e6:,.2f}"
    cells = [f"{line['pairs']:,}", seconds, line["daytime"] or "–"]
    cells.append("–" if line["brightness"] is None else f"{line['brightness']:.0f}")
    cells.append("–" if line["events_drawn"] is None else f"{line['events_drawn']:,.0f}")
    cells.append("–" if line["active_share"] is None else f"{line['active_share']:.1%}")
    return Row(line["sequence"], cells)


def examples(comparison: LeakComparison) -> Group:
    """The worst pairs of windows of one comparison, with their pictures."""
    leaks = comparison.leaks
    pictures = [example_pictures(comparison, example) for example in leaks.examples]
    return Group(f"{leaks.part} in {leaks.against}", pictures)


def example_pictures(comparison: LeakComparison, example: Example) -> Pictures:
    """Two windows side by side."""
    shared = {
        "identical": f"identical {example.side}",
        "near": f"{example.side} nearly the same, correlation {example.correlation or 0:.3f}",
        "overlapping": "windows overlap",
    }[example.kind]
    rows = {comparison.leaks.part: example.row, comparison.leaks.against: example.other}
    windows = {name: _window(comparison, row) for name, row in rows.items()}
    return Pictures(
        [
            picture(f"{name}, {side}", f"{side} picture of {windows[name]}, {shared}", pixels)
            for name, row in rows.items()
            for side, pixels in comparison.pictures(row).items()
        ],
        ": " + "; ".join(f"{window} ({name})" for name, window in windows.items()),
        strong=shared,
        columns="four",
    )


def _window(comparison: LeakComparison, row: int) -> str:
    window = describe_pair(comparison.index, row)
    return f"{window['sequence']}, {window['t_start_us'] / 1e6:.3f} to {window['t_end_us'] / 1e6:.3f} s"


def store_figures(result: dict[str, Any], index: PairIndex, scan: StoreScan) -> Iterator[tuple[str, Figure]]:
    """Title and plot of everything that there is data for."""
    windows = result["windows"]
    for values, name, title, caption in (
        (scan.num_events, "events_per_window", "Events per window", "Counted by the source, over the whole window."),
        (scan.num_drawn, "events_drawn", "Events drawn", "Counted by the source: the events of the event image."),
    ):
        if summary := windows[name]:
            alt = f"{title}, histogram: {_spread(summary, '{:,.0f}', 1)}"
            yield title, Figure(events_figure(values, name), alt, caption)
    if summary := windows["active_share_of_drawn_image"]:
        yield (
            "Active pixels and polarity",
            Figure(
                drawn_figure(scan),
                f"Histograms of active pixels, {_spread(summary, '{:.1f} %', 100)}, and of the positive share",
                "Of the drawn image: of a pixel with several events the last one counts.",
            ),
        )
    if any(line["brightness"] is not None for line in result["by_sequence"]):
        yield (
            "Day and night",
            Figure(
                brightness_figure(scan.bright, result["by_sequence"]),
                "Brightness of the target pictures, by day and by night",
                day_rule(result),
            ),
        )
    yield (
        "Pairs of each sequence",
        Figure(
            sequences_figure(result["by_sequence"]),
            f"Pairs of each of {len(result['by_sequence'])} sequences",
            "The table of sequences below has the same numbers.",
        ),
    )
    if summary := windows["frame_minus_window_centre_ms"]:
        yield (
            "Time between the frame and the window’s centre",
            Figure(
                offset_figure(scan.frame_offset_us / 1000),
                f"Histogram of the frame's time minus the centre's: {_spread(summary, '{:+.3f} ms', 1)}",
                "Positive: the frame was taken after the centre.",
            ),
        )
    if summary := windows["overlap_with_previous"]:
        yield (
            "Overlap",
            Figure(
                overlap_figure(overlap_with_previous(index)),
                f"Share of each window that the one before it covers: {_spread(summary, '{:.0f} %', 100)}",
                "With the window before it of the same sequence and length; a random split leaks by it.",
            ),
        )


def events_figure(values: NDArray[np.float64], name: str) -> str:
    """Histogram over a logarithmic axis; the title counts windows without events."""
    known = values[~np.isnan(values)]
    some = known[known > 0]

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        if some.size:
            low, high = some.min(), max(some.max(), some.min() * 1.1)
            axes.hist(some, bins=np.geomspace(low, high, HISTOGRAM_BINS).tolist(), color=BLUE)
            log_scale(axes, [low, high])
        axes.set_title(f"{known.size - some.size:,} windows without events", loc="left", fontsize=10)
        axes.set_xlabel("events")
        axes.set_ylabel("windows")

    return svg(name, draw, (8.2, 3.0))


def drawn_figure(scan: StoreScan) -> str:
    """Active and positive share side by side, with the polarity of all events where it is known."""
    of_events = positive_share(scan)

    def draw(figure: Canvas) -> None:
        left, right = figure.subplots(*((2, 1) if is_narrow(figure) else (1, 2)))
        histogram(left, scan.active, BLUE)
        left.set_xlabel("active pixels of the drawn image")
        histogram(right, scan.positive, RED, "pixels of the drawn image")
        if not np.isnan(of_events).all():
            counts, edges = np.histogram(of_events[~np.isnan(of_events)], bins=np.linspace(0, 1, HISTOGRAM_BINS + 1))
            right.stairs(counts, edges, color=INK, linewidth=1.4, label="all events drawn")
            right.legend(frameon=False, fontsize=9, loc="upper left")
        right.set_xlim(-0.02, 1.02)
        right.set_xlabel("positive share")
        for axes in (left, right):
            axes.set_ylabel("windows")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))

    return svg("drawn", draw, (8.2, 3.2), 5.6)


def histogram(axes: Axes, values: NDArray[np.float64], colour: str, label: str | None = None) -> None:
    """Histogram of the known values of a share."""
    known = values[~np.isnan(values)]
    top = 1.0 if label else max(float(known.max()) * 1.05, 0.01)
    axes.hist(known, bins=np.linspace(0, top, HISTOGRAM_BINS + 1).tolist(), color=colour, label=label)


def brightness_figure(bright: NDArray[np.float64], sequences: list[dict[str, Any]]) -> str:
    """Histograms over one axis of brightness: windows above, sequences below."""

    def draw(figure: Canvas) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        upper.hist(bright[~np.isnan(bright)], bins=np.linspace(0, 255, 52).tolist(), color=GREY)
        upper.set_ylabel("windows")
        for name, colour in (("day", PALETTE[2]), ("night", BLUE)):
            values = [line["brightness"] for line in sequences if line["daytime"] == name]
            bins = np.linspace(0, 255, 52).tolist()
            lower.hist(values, bins=bins, color=colour, label=f"{name}: {len(values)} sequences")
        lower.set_ylabel("sequences")
        lower.legend(frameon=False, fontsize=9)
        lower.set_xlabel("brightness that a tenth of the target picture’s cells reach (median of a sequence below)")
        for axes in (upper, lower):
            axes.axvline(NIGHT_BELOW, color=INK, linewidth=0.8)

    return svg("brightness", draw)


def sequences_figure(sequences: list[dict[str, Any]]) -> str:
    """A bar for each sequence, or a histogram where there are many."""
    counts = [line["pairs"] for line in sequences]

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        if len(counts) <= MOST_BARS:
            for bar, line in zip(axes.bar(range(len(counts)), counts, color=TEAL), sequences, strict=True):
                bar.set_gid(f"{line['sequence']}: {line['pairs']:,} pairs")
            axes.set_xlabel("sequences, sorted by name")
            axes.set_ylabel("pairs")
            axes.set_xticks([])
        else:
            axes.hist(counts, bins=HISTOGRAM_BINS, color=TEAL)
            axes.set_xlabel("pairs of a sequence")
            axes.set_ylabel("sequences")

    return svg("sequences", draw, (8.2, 2.6))


def offset_figure(offset_ms: NDArray[np.float64]) -> str:
    """Histogram with the centre marked."""
    known = offset_ms[~np.isnan(offset_ms)]

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        reach = max(float(np.abs(known).max()) * 1.05, 0.001)
        axes.hist(known, bins=np.linspace(-reach, reach, HISTOGRAM_BINS + 2).tolist(), color=BLUE)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("frame's time minus that of the window's centre, ms")
        axes.set_ylabel("windows")

    return svg("offset", draw, (8.2, 2.6))


def overlap_figure(overlap: NDArray[np.float64]) -> str:
    """Histogram of shares."""

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        histogram(axes, overlap, TEAL, "windows")
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("share of the window that the one before it covers")
        axes.set_ylabel("windows")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))

    return svg("overlap", draw, (8.2, 2.2))


def _spread(summary: dict[str, Any], form: str, factor: float) -> str:
    middle, low, high = (form.format(factor * summary[key]) for key in ("median", "p5", "p95"))
    return f"median {middle}, 5 to 95 %: {low} to {high}"
