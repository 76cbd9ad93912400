"""The page that `inspect --html` writes: numbers, plots, and pictures of the worst leaks.

Shapes: N = pairs of the index.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from ray_app.commands.evaluate.report import flattened
from ray_app.commands.inspect.leaks import Example, LeakComparison, describe_pair
from ray_app.commands.inspect.scan import StoreScan
from ray_app.commands.inspect.statistics import NIGHT_BELOW, overlap_with_previous, positive_share
from ray_app.reports.figures import INK, PALETTE, log_scale, svg
from ray_app.reports.html import page, picture
from ray_app.store.pair_store import PairIndex

MOST_BARS = 100
"""Sequences that get a bar each; of more, a histogram is drawn."""
BINS = 40
BLUE, RED, TEAL, GREY = PALETTE[0], PALETTE[3], PALETTE[5], PALETTE[1]


def inspect_page(result: dict[str, Any], index: PairIndex, survey: StoreScan, leaks: Sequence[LeakComparison]) -> str:
    """The whole page as HTML; `result` as `run_inspect` gives it."""
    return page(
        "inspect.html.j2",
        r=result,
        headline=leaks_headline(result["leaks"]),
        outcome="plain" if not leaks else "loses" if any(each.leaks.any for each in leaks) else "beats",
        notes=[{"text": text, "warning": False} for text in result["warnings"]],
        statistics=list(statistics_lines(result["windows"])),
        leaks=[leak_line(leak) for leak in result["leaks"]],
        examples=[group for each in leaks for group in example_groups(each)],
        figures=list(figures(result, index, survey)),
        sequences=[sequence_line(line) for line in result["by_sequence"]],
        source=[*flattened(result["source"]), ("fingerprint", result["fingerprint"])],
    )


def statistics_lines(windows: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each summary that is known: median, and from which to which nine tenths lie."""
    for name, form, factor in (
        ("events_per_window", "{:,.0f}", 1),
        ("events_drawn", "{:,.0f}", 1),
        ("positive_share_of_events_drawn", "{:.1f} %", 100),
        ("active_share_of_drawn_image", "{:.1f} %", 100),
        ("positive_share_of_drawn_image", "{:.1f} %", 100),
        ("frame_minus_window_centre_ms", "{:+.3f} ms", 1),
        ("overlap_with_previous", "{:.0f} %", 100),
    ):
        if found := windows[name]:
            yield name.replace("_", " "), _spread(found, form, factor)


def leaks_headline(leaks: list[dict[str, Any]]) -> str:
    """Whether anything leaks, and where most."""
    if not leaks:
        return "No leaks were looked for: there is one part alone."
    worst = max(leaks, key=lambda leak: leak["any"] / leak["windows"])
    if not worst["any"]:
        return "No leaks: no identical features, no overlapping windows, no near-duplicates."
    return (
        f"LEAKS: {worst['any']:,} of {worst['windows']:,} windows of {worst['part']} are in {worst['against']} too."
    )


def leak_line(leak: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of leaks: counts, and their shares of the windows."""
    counts = (*leak["identical"].values(), *leak["near"].values(), leak["overlapping"], leak["any"])
    cells = [f"{leak['windows']:,}", *(f"{n:,} ({n / leak['windows']:.1%})" if n else "0" for n in counts)]
    return {"name": f"{leak['part']} in {leak['against']}", "kind": "", "cells": cells}


def sequence_line(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of sequences."""
    seconds = f"{line['t_start_us'] / 1e6:,.2f} to {line['t_end_us'] / 1e6:,.2f}"
    cells = [f"{line['pairs']:,}", seconds, line["daytime"] or "–"]
    cells.append("–" if line["brightness"] is None else f"{line['brightness']:.0f}")
    cells.append("–" if line["events_drawn"] is None else f"{line['events_drawn']:,.0f}")
    cells.append("–" if line["active_share"] is None else f"{line['active_share']:.1%}")
    return {"name": line["sequence"], "kind": "", "cells": cells}


def example_groups(compared: LeakComparison) -> Iterator[dict[str, Any]]:
    """The worst pairs of windows of one comparison, with their pictures."""
    leaks = compared.leaks
    examples = [example_context(compared, example) for example in leaks.examples]
    if examples:
        yield {"title": f"{leaks.part} in {leaks.against}", "examples": examples}


def example_context(compared: LeakComparison, example: Example) -> dict[str, Any]:
    """The template's view of two windows."""
    what = {
        "identical": f"identical {example.side}",
        "near": f"{example.side} nearly the same, correlation {example.correlation or 0:.3f}",
        "overlapping": "windows overlap",
    }[example.kind]
    rows = {compared.leaks.part: example.row, compared.leaks.against: example.other}
    places = {name: _place(compared, row) for name, row in rows.items()}
    return {
        "what": what,
        "places": list(places.items()),
        "pictures": [
            picture(f"{name}, {side}", f"{side} picture of {places[name]}, {what}", pixels)
            for name, row in rows.items()
            for side, pixels in compared.pictures(row).items()
        ],
    }


def _place(compared: LeakComparison, row: int) -> str:
    window = describe_pair(compared.index, row)
    return f"{window['sequence']}, {window['t_start_us'] / 1e6:.3f} to {window['t_end_us'] / 1e6:.3f} s"


def figures(result: dict[str, Any], index: PairIndex, survey: StoreScan) -> Iterator[dict[str, str]]:
    """Every plot that there is data for: `title`, `svg`, `alt` and `caption`."""
    for values, name, title, caption in (
        (
            survey.num_events,
            "events_per_window",
            "Events per window",
            "Counted by the source, over the whole window.",
        ),
        (survey.num_drawn, "events_drawn", "Events drawn", "Counted by the source: what the event image is made of."),
    ):
        if found := result["windows"][name]:
            yield {
                "title": title,
                "svg": events_figure(values, name),
                "alt": f"{title}, histogram: {_spread(found, '{:,.0f}', 1)}",
                "caption": caption,
            }
    if found := result["windows"]["active_share_of_drawn_image"]:
        yield {
            "title": "Active pixels and polarity",
            "svg": drawn_figure(survey),
            "alt": f"Histograms of active pixels, {_spread(found, '{:.1f} %', 100)}, and of the positive share",
            "caption": "Of the drawn image: of a pixel with several events the last one counts.",
        }
    if any(line["brightness"] is not None for line in result["by_sequence"]):
        yield {
            "title": "Day and night",
            "svg": brightness_figure(survey.bright, result["by_sequence"]),
            "alt": "Brightness of the target pictures, by day and by night",
            "caption": f"By this rule: {result['night_rule']}.",
        }
    yield {
        "title": "Pairs of each sequence",
        "svg": sequences_figure(result["by_sequence"]),
        "alt": f"Pairs of each of {len(result['by_sequence'])} sequences",
        "caption": "The table of sequences below holds the same numbers.",
    }
    if found := result["windows"]["frame_minus_window_centre_ms"]:
        yield {
            "title": "Time between the frame and the window’s centre",
            "svg": offset_figure(survey.frame_offset_us / 1000),
            "alt": f"Histogram of the frame's time less the centre's: {_spread(found, '{:+.3f} ms', 1)}",
            "caption": "Positive: the frame was taken after the centre.",
        }
    if found := result["windows"]["overlap_with_previous"]:
        yield {
            "title": "Overlap",
            "svg": overlap_figure(overlap_with_previous(index)),
            "alt": f"Share of each window that the one before it covers: {_spread(found, '{:.0f} %', 100)}",
            "caption": "With the window before it of the same sequence and length; a random split leaks by it.",
        }


def events_figure(values: NDArray[np.float64], name: str) -> str:
    """Histogram over a logarithmic axis; windows without events are told in the title."""
    known = values[~np.isnan(values)]
    some = known[known > 0]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if some.size:
            low, high = some.min(), max(some.max(), some.min() * 1.1)
            axes.hist(some, bins=np.geomspace(low, high, BINS).tolist(), color=BLUE)
            log_scale(axes, [low, high])
        axes.set_title(f"{known.size - some.size:,} windows without events", loc="left", fontsize=10)
        axes.set_xlabel("events")
        axes.set_ylabel("windows")

    return svg(name, draw, (8.2, 3.0))


def drawn_figure(survey: StoreScan) -> str:
    """Active and positive share beside each other, the polarity of all events too where it is known."""
    of_events = positive_share(survey)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        histogram(left, survey.active, BLUE)
        left.set_xlabel("active pixels of the drawn image")
        histogram(right, survey.positive, RED, "pixels of the drawn image")
        if not np.isnan(of_events).all():
            counts, edges = np.histogram(of_events[~np.isnan(of_events)], bins=np.linspace(0, 1, BINS + 1))
            right.stairs(counts, edges, color=INK, linewidth=1.4, label="all events drawn")
            right.legend(frameon=False, fontsize=9, loc="upper left")
        right.set_xlim(-0.02, 1.02)
        right.set_xlabel("positive share")
        for axes in (left, right):
            axes.set_ylabel("windows")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))

    return svg("drawn", draw, (8.2, 3.2))


def histogram(axes: Axes, values: NDArray[np.float64], colour: str, label: str | None = None) -> None:
    """Of the known values of a share."""
    known = values[~np.isnan(values)]
    top = 1.0 if label else max(float(known.max()) * 1.05, 0.01)
    axes.hist(known, bins=np.linspace(0, top, BINS + 1).tolist(), color=colour, label=label)


def brightness_figure(bright: NDArray[np.float64], sequences: list[dict[str, Any]]) -> str:
    """Windows above, sequences below, on one axis of brightness."""

    def draw(figure: Figure) -> None:
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
    """A bar each, or a histogram where there are many."""
    counts = [line["pairs"] for line in sequences]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if len(counts) <= MOST_BARS:
            axes.bar(range(len(counts)), counts, color=TEAL)
            axes.set_xlabel("sequences, sorted by name")
            axes.set_ylabel("pairs")
            axes.set_xticks([])
        else:
            axes.hist(counts, bins=BINS, color=TEAL)
            axes.set_xlabel("pairs of a sequence")
            axes.set_ylabel("sequences")

    return svg("sequences", draw, (8.2, 2.6))


def offset_figure(offset_ms: NDArray[np.float64]) -> str:
    """Histogram with the centre marked."""
    known = offset_ms[~np.isnan(offset_ms)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        reach = max(float(np.abs(known).max()) * 1.05, 0.001)
        axes.hist(known, bins=np.linspace(-reach, reach, BINS + 2).tolist(), color=BLUE)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("frame's time less that of the window's centre, ms")
        axes.set_ylabel("windows")

    return svg("offset", draw, (8.2, 2.6))


def overlap_figure(overlap: NDArray[np.float64]) -> str:
    """Histogram of shares."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        histogram(axes, overlap, TEAL, "windows")
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("share of the window that the one before it covers")
        axes.set_ylabel("windows")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))

    return svg("overlap", draw, (8.2, 2.2))


def _spread(found: dict[str, Any], form: str, factor: float) -> str:
    middle, low, high = (form.format(factor * found[key]) for key in ("median", "p5", "p95"))
    return f"median {middle}, 5 to 95 %: {low} to {high}"
