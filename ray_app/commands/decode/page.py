"""The page that `decode --html` writes: the table, where the time went, and each row with its pictures and texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ray_app.commands.decode.inputs import DecodeInput, RowPictures
from ray_app.commands.decode.summary import STAGES, Line
from ray_app.commands.decode.table import HEADS, cells, headline, notes
from ray_app.reports.figures import PALETTE, WIDE, legend_outside, svg
from ray_app.reports.html import Block, Figure, Group, Marked, Pictures, Row, Section, Table, Text, page, picture

MOST_ROWS = 24
"""Rows that are shown with pictures: a page must open."""
MOST_FRAMES = 2
"""Frames of a row that are shown: the first and the last."""
FASTER = "ray-app compare RUN RUN … sets this run against others on the same rows, with the baselines of drafting."
NOT_FASTER = "Try another --drafter: ray-app replay measures many of them on recorded answers, without a model."
BARS = "▁▂▃▄▅▆▇█"
"""The lowest is γ = 0: a space would not be drawn."""


def decode_page(data: DecodeInput, lines: Sequence[Line], result: Mapping[str, Any]) -> str:
    """Return the page as HTML; `result` is the `--json` object."""
    numbers = result["results"]
    table = Table(["drafter", *HEADS], [Row(name, cells(each)) for name, each in numbers.items()])
    best = max(each["speedup"] for each in numbers.values())
    shown = lines if len(lines) <= MOST_ROWS else [lines[n * len(lines) // MOST_ROWS] for n in range(MOST_ROWS)]
    words = notes(result)
    return page(
        "Speculative decoding",
        headline(result),
        words[0],
        [{"text": text, "warning": "DEFECT" in text or "rejected" in text} for text in words[1:]],
        [
            Section("Results", [table]),
            Section("Where the time went", [_stages_figure(result)]),
            Section("γ over time", [_gamma_figure(lines)]),
            Section(f"{len(shown)} of {len(lines)} rows", [block for line in shown for block in _row(data, line)]),
            Section("Next", [Text(FASTER if best > 1.0 else NOT_FASTER)]),
        ],
        "beats" if best > 1.0 else "loses",
    )


def _row(data: DecodeInput, line: Line) -> Iterator[Block]:
    row = next(each for each in data.rows if each.row == line["row"])
    (pictures,) = data.read([row])
    title = f"Row {line['row']}, {line['sequence'] or 'no sequence'}: {line['question']}"
    blocks: list[Block] = []
    if isinstance(pictures, RowPictures) and (shown := list(_pictures(pictures))):
        blocks.append(Pictures(shown, "", "", "four"))
    for name, way in line["drafters"].items():
        pieces: list[Any] = []
        for drafted, own in way["pieces"]:
            pieces += [(drafted, "good"), (own, "")]
        blocks.append(Text(f"{name}: {_times(line, way)}; γ {_sparkline([each[0] for each in way['passes']])}"))
        blocks.append(Marked([piece for piece in pieces if piece[0]]))
    yield Group(title, blocks, "group")


def _pictures(pictures: RowPictures) -> Iterator[dict[str, Any]]:
    for name, frames_THWC in (("frame", pictures.frames_THWC), ("events", pictures.events_THWC)):
        if frames_THWC is not None:
            for n in sorted({0, len(frames_THWC) - 1})[:MOST_FRAMES]:
                yield picture(f"{name} {n + 1}" if len(frames_THWC) > 1 else name, name, frames_THWC[n])


def _times(line: Line, way: Mapping[str, Any]) -> str:
    plain = line["plain"]["total_ms"]
    stages = ", ".join(f"{stage.removesuffix('_ms')} {way[stage]:,.0f}" for stage in STAGES)
    return f"{way['total_ms']:,.0f} ms instead of {plain:,.0f} ({plain / way['total_ms']:.2f}×): {stages}"


def _sparkline(gammas: Sequence[int]) -> str:
    most = max(gammas, default=0) or 1
    return "".join(BARS[gamma * (len(BARS) - 1) // most] for gamma in gammas) + f" (most {max(gammas, default=0)})"


def _stages_figure(result: Mapping[str, Any]) -> Figure:
    shares = {"plain": result["plain"]["stage_share"]} | {
        name: {stage: share / each["speedup"] for stage, share in each["stage_share"].items()}
        for name, each in result["results"].items()
    }

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for line, share in enumerate(shares.values()):
            left = 0.0
            for n, (stage, part) in enumerate(share.items()):
                label = stage if line == 0 else "_"
                axes.barh(line, part, left=left, color=PALETTE[n], label=label, height=0.6)
                left += part
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("time of plain decoding")
        legend_outside(figure)

    return Figure(
        svg("stages", draw, (WIDE, 1.2 + 0.4 * len(shares))),
        "Share of each stage in the time of every drafter, with plain decoding as 100 %",
        "Shorter is faster. Plain decoding is 100 %.",
    )


def _gamma_figure(lines: Sequence[Line]) -> Figure:
    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for number, name in enumerate(lines[0]["drafters"]):
            means = [float(np.mean([each[0] for each in line["drafters"][name]["passes"]])) for line in lines]
            axes.plot(
                range(len(means)), means, color=PALETTE[number % len(PALETTE)], label=name, linewidth=1.2, marker="."
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("row")
        axes.set_ylabel("mean γ")
        axes.set_ylim(bottom=0)
        legend_outside(figure)

    return Figure(
        svg("gamma", draw),
        "Mean number of tokens asked of each drafter, row by row",
        "Tokens asked of the drafter for each target pass, mean of a row; 0 is plain decoding.",
    )
