"""The page that `replay --html` writes: the table, and plots of where drafts are accepted and what that is worth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ray_app.reports.figures import INK, PALETTE, WIDE, is_narrow, legend_outside, svg
from ray_app.reports.html import Figure, Row, Section, Table, Text, page

LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
LINE = 0.36
"""Inches of a line of a figure."""
PLAIN_SPEED = 1.0
MOST_BINS = 60

EXPLANATION = (
    "Recorded greedy outputs, replayed exactly: the output is the target's own, whatever drafts. shuffled: drafts "
    "against other rows' answers. least α: the acceptance at which a drafter pays at its measured cost. Cosine "
    "acceptance of features plays no part here."
)
DrafterMetrics = Mapping[str, Mapping[str, Any]]
Groups = Mapping[str, DrafterMetrics]
"""`tokens_per_target_pass` and its `interval95` for each group and drafter."""


BEHIND = "Try more recorded answers of other drives to learn from: --learn-from."
AHEAD = "ray-app decode times the best of them with a live target, everything charged."


def replay_page(
    result: Mapping[str, Any],
    details: DrafterMetrics,
    groups: Groups,
    *,
    headline: str,
    behind: bool,
    tables: Sequence[Table],
    conditions: str,
    notes: Sequence[str],
) -> str:
    """Return the page as HTML: `result` is the `--json` object, `details` and `groups` those of a `ReplayReport`."""
    rows = [Row(group, [rate_cell(rate) for rate in rates.values()]) for group, rates in groups.items()]
    sections = [
        Section("Results", [*tables, Text(EXPLANATION)]),
        *(Section(title, [figure]) for title, figure in replay_figures(result["results"], details, groups)),
        Section("Tokens per target pass, by duration and question", [Table(["rows", *result["results"]], rows)]),
        Section("Next", [Text(BEHIND if behind else AHEAD)]),
    ]
    return page(
        "Replay of recorded outputs",
        headline,
        conditions,
        [{"text": text, "warning": text.startswith(("SHIFT", "BOS", "rejected"))} for text in notes],
        sections,
        "loses" if behind else "beats",
    )


def span(interval: Sequence[float] | None) -> str:
    """Return an interval behind its number."""
    return f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""


def rate_cell(rate: Mapping[str, Any]) -> str:
    """Return a group's tokens per target pass."""
    return f"{rate['tokens_per_target_pass']:.2f}{span(rate['interval95'])}"


def replay_figures(results: DrafterMetrics, details: DrafterMetrics, groups: Groups) -> Iterator[tuple[str, Figure]]:
    """Title and plot of everything that there is data for."""
    rates = ", ".join(f"{name} {numbers['tokens_per_target_pass']:.2f}" for name, numbers in results.items())
    yield (
        "Tokens per target pass",
        Figure(
            intervals_figure("passes", results, {"tokens_per_target_pass": "tokens per target pass"}, 1.0),
            f"Tokens per target pass of each drafter: {rates}",
            "Bars: 95 %. Without a drafter a pass gives one token.",
        ),
    )
    yield (
        "Acceptance by position",
        Figure(
            places_figure(details),
            "Share of passes in which the token at each position of the draft is accepted, for each drafter",
            "A position counts as accepted only with all before it, so every curve falls.",
        ),
    )
    yield (
        "Accepted in a row from the start of an answer",
        Figure(
            rows_figure(details),
            "Histograms of how many tokens of an answer are right before the first wrong one, for each drafter",
            "One-shot mode depends on this: the whole draft is verified once. All on one axis.",
        ),
    )
    yield (
        "By duration and question",
        Figure(
            groups_figure(groups),
            "Tokens per target pass of each drafter for each duration and question",
            "The table below has the same numbers.",
        ),
    )
    speedups = {"one_shot_speedup": "one-shot", "expected_speedup": "expected from α"}
    if any(numbers["one_shot_speedup"] is not None for numbers in results.values()):
        continuous = {name: more["interval95"]["continuous_speedup"] for name, more in details.items()}
        with_continuous = {
            name: {
                **numbers,
                "continuous_speedup": details[name]["continuous_speedup"],
                "interval95": {**numbers["interval95"], "continuous_speedup": continuous[name]},
            }
            for name, numbers in results.items()
        }
        names = {**speedups, "continuous_speedup": "continuous"}
        yield (
            "Speed-up",
            Figure(
                intervals_figure("speedup", with_continuous, names, PLAIN_SPEED),
                "One-shot, expected and continuous speed-up of each drafter",
                "From measured times; expected: decoding only. Bars: 95 %. Left of the line: slower.",
            ),
        )


def intervals_figure(name: str, results: DrafterMetrics, metrics: Mapping[str, str], mark: float) -> str:
    """Each drafter's metrics as points with their intervals, one line a drafter; `mark` is where nothing changes."""

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        offsets = (np.arange(len(metrics)) - (len(metrics) - 1) / 2) * 0.22
        for number, (metric, label) in enumerate(metrics.items()):
            for line, numbers in enumerate(results.values()):
                if numbers[metric] is None:
                    continue
                y = line + offsets[number]
                if (bounds := numbers["interval95"].get(metric)) is not None:
                    axes.plot(bounds, [y, y], color=PALETTE[number], linewidth=2)
                shown = label if line == 0 else "_"
                axes.plot(
                    numbers[metric],
                    y,
                    MARKERS[number],
                    color=PALETTE[number],
                    markersize=6,
                    linestyle="",
                    label=shown,
                )
        drafters(axes, list(results))
        axes.axvline(mark, color=INK, linewidth=0.8)
        axes.set_xlim(left=0)
        if len(metrics) > 1:
            legend_outside(figure)
        else:
            axes.set_xlabel(next(iter(metrics.values())))

    return svg(name, draw, (WIDE, 1.0 + LINE * len(results) * (1 if len(metrics) == 1 else 1.4)))


def places_figure(details: DrafterMetrics) -> str:
    """Draw acceptance at each place of a draft, a curve for each drafter."""

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for number, (name, more) in enumerate(details.items()):
            rates = more["acceptance_by_place"]
            colour, line = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
            axes.plot(
                range(1, len(rates) + 1), rates, color=colour, linestyle=line, linewidth=2, marker=".", label=name
            )
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("place in the draft")
        axes.set_ylabel("accepted")
        legend_outside(figure, handlelength=3.2)

    return svg("places", draw)


def rows_figure(details: DrafterMetrics) -> str:
    """Rows by how many tokens were accepted in a row at the start, a small histogram for each drafter."""
    longest = max(len(more["rows_by_prefix"]) for more in details.values())
    width = -(-longest // MOST_BINS)
    edges = np.arange(0, longest + width, width) - 0.5

    def draw(figure: Canvas) -> None:
        columns = 2 if is_narrow(figure) else 3
        axes_LC = figure.subplots(-(-len(details) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes in axes_LC.flat[len(details) :]:
            axes.set_axis_off()
        for number, (axes, (name, more)) in enumerate(zip(axes_LC.flat, details.items(), strict=False)):
            counts = more["rows_by_prefix"]
            axes.hist(range(len(counts)), bins=edges.tolist(), weights=counts, color=PALETTE[number % len(PALETTE)])
            axes.set_title(name, loc="left", fontsize=10)
            axes.tick_params(labelbottom=number + columns >= len(details))
        figure.supxlabel("tokens accepted in a row", fontsize=10)
        figure.supylabel("rows", fontsize=10)

    wide, narrow = (0.8 + 1.4 * -(-len(details) // columns) for columns in (3, 2))
    return svg("rows", draw, (WIDE, wide), narrow)


def groups_figure(groups: Groups) -> str:
    """Tokens per pass: a line for each drafter, a point for each group."""
    names = list(next(iter(groups.values())))

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for number, (group, rates) in enumerate(groups.items()):
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            label = group if len(group) <= 24 else f"{group[:22]}…"
            values = [rate["tokens_per_target_pass"] for rate in rates.values()]
            axes.plot(values, range(len(names)), marker, color=colour, linestyle="", label=label)
        drafters(axes, names)
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens per target pass")
        legend_outside(figure)

    return svg("groups", draw, (WIDE, 1.0 + max(LINE * len(names), 0.25 * len(groups))))


def drafters(axes: Axes, names: Sequence[str]) -> None:
    """One line each, the first above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
