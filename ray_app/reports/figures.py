"""Figures as inline SVG: text stays text, and every colour is a variable of the page.

Each is drawn twice, for wide windows and for phones, and a page shows one of them. Points and bars have their values
as titles, which a browser shows where the pointer is. Colours are drawn as placeholders and then replaced by CSS
variables, so that one file is readable light and dark. The SVG names no other site, not even in a namespace: an HTML
page needs none.
"""

import html
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from ray_app.core.metrics import THETA, rate_key

CosineSeries = Mapping[str, NDArray[np.floating]]
"""Cosine of each pair by name; NaN where a baseline does not exist for a pair."""

INK, FAINT, PAGE = "#0a0b01", "#0a0b02", "#0a0b03"
PALETTE = tuple(f"#0a0b1{n}" for n in range(1, 10))
"""Placeholders of the nine colours of series."""
VARIABLES = {INK: "currentColor", FAINT: "var(--line)", PAGE: "var(--page)"} | {
    placeholder: f"var(--c{n})" for n, placeholder in enumerate(PALETTE, 1)
}
SERIES: dict[str, tuple[str, Any, str]] = {
    # name: (placeholder colour, line style, what the reader calls it)
    "adapter": (PALETTE[0], "-", "adapter"),
    "before": (PALETTE[1], "--", "before (raw event)"),
    "white": (PALETTE[2], ":", "white"),
    "mean_target": (PALETTE[3], "-.", "mean_target"),
    "shuffled": (PALETTE[4], (0, (1, 1.5)), "shuffled"),
    "previous_window": (PALETTE[5], (0, (6, 2, 1, 2, 1, 2)), "previous_window (context)"),
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of sequences and models are text, with $ too
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


WIDE, NARROW = 8.2, 4.4
"""Inches of a figure, and of the one for phones."""
NARROW_LINE, LINE_SPACING = 44, 1.5
"""Letters of a line of text in a narrow figure, and the space that it takes."""
VALUES_OF_A_LINE = 20
"""Points of a curve that show their values."""
MARK = 12.0
"""Side of the mark of a point, in pixels of a figure."""


def svg(
    name: str, draw: Callable[[Figure], None], size: tuple[float, float] = (WIDE, 3.9), narrow_height: float = 0.0
) -> str:
    """The figure that `draw` fills, as SVG, wide and narrow. `name` keeps the ids of a page's figures apart."""
    wide = (name, size, "wide")
    narrow = (f"{name}-narrow", (NARROW, narrow_height or size[1] + 0.8), "narrow")
    drawn = ""
    for salt, inches, kind in (wide, narrow):
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
            figure = Figure(figsize=inches, layout="constrained")
            draw(figure)
            drawn += to_svg(figure, kind)
    return drawn


def is_narrow(figure: Figure) -> bool:
    """Return True for the figure for phones."""
    return bool(figure.get_figwidth() < (WIDE + NARROW) / 2)


def legend_outside(figure: Figure, *named: Any, **look: Any) -> None:
    """Put a legend next to the axes; above them in a narrow figure. `named`: handles and labels."""
    labels = named[1] if named else [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    columns = 1 if max(map(len, labels), default=0) > NARROW_LINE // 3 else 2
    place = {"loc": "outside upper left", "ncols": columns} if is_narrow(figure) else {"loc": "outside right upper"}
    figure.legend(*named, frameon=False, **place, **look)


def wrap_words(figure: Figure) -> None:
    """Break titles and labels of x axes that are longer than a narrow figure."""
    for axes in figure.axes:
        grid = axes.get_gridspec()
        letters = NARROW_LINE // (grid.ncols if grid else 1)
        axes.set_xlabel(textwrap.fill(axes.get_xlabel(), letters), linespacing=LINE_SPACING)
        if title := axes.get_title(loc="left"):
            axes.set_title(textwrap.fill(title, letters), loc="left", fontsize=10, linespacing=LINE_SPACING)


def values_svg(figure: Figure) -> str:
    """Return invisible marks over points and bars, each with its values as a title."""
    marks = []
    for axes in figure.axes:
        for line in axes.lines:
            xy_P2 = np.asarray(line.get_xydata(), dtype=float)
            if line.get_transform() == axes.transData and len(xy_P2) != 2:  # two points are an interval
                step = max((len(xy_P2) - 1) // VALUES_OF_A_LINE, 1)
                marks += point_marks(axes, xy_P2[::step], str(line.get_label()))
        for points in axes.collections:
            if isinstance(points, PathCollection):
                marks += point_marks(axes, np.ma.getdata(points.get_offsets()), str(points.get_label()))
        for bars in axes.containers:
            if isinstance(bars, BarContainer):
                for bar in bars:
                    values = bar.get_gid() or bar_values(axes, bar, str(bars.get_label()), bars.orientation)
                    marks.append(rectangle_mark(figure, bar.get_window_extent(), values))
    return f'<g class="values">{"".join(marks)}</g>'


def point_marks(axes: Axes, xy_P2: NDArray[np.floating], label: str) -> list[str]:
    """Return a mark for each of these points that is inside the axes."""
    name, box, marks = "" if label.startswith("_") else f"{label}: ", axes.get_window_extent(), []
    for x, y in xy_P2[np.isfinite(xy_P2).all(axis=1)]:
        across, up = axes.transData.transform((x, y))
        if box.x0 - 1 <= across <= box.x1 + 1 and box.y0 - 1 <= up <= box.y1 + 1:
            around = Bbox.from_bounds(across - MARK / 2, up - MARK / 2, MARK, MARK)
            text = f"{name}{words_of(axes.xaxis, x)}, {words_of(axes.yaxis, y)}"
            marks.append(rectangle_mark(axes.get_figure(root=True), around, text))
    return marks


def rectangle_mark(figure: Any, box: Bbox, text: str) -> str:
    """Return an invisible rectangle with a title; SVG counts in points, downwards."""
    x, y, width, height = (round(float(number) * 72 / figure.dpi, 1) for number in box.bounds)
    top = round(figure.get_figheight() * 72 - y - height, 1)
    return f'<rect x="{x}" y="{top}" width="{width}" height="{height}"><title>{html.escape(text)}</title></rect>'


def words_of(axis: Any, value: float) -> str:
    """Return a value as its axis writes it: a number, or the name at the nearest tick."""
    if text := axis.get_major_formatter().format_data_short(value).strip():
        return str(text)
    names = {
        abs(place - value): label.get_text()
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
    }
    return str(names[min(names)]) if names else f"{value:g}"


def bar_values(axes: Axes, bar: Any, label: str, orientation: str | None) -> str:
    """Return a bar's span and length in words."""
    name = "" if label.startswith("_") else f"{label}, "
    if orientation == "horizontal":
        row = words_of(axes.yaxis, bar.get_y() + bar.get_height() / 2)
        return f"{name}{row}: {words_of(axes.xaxis, bar.get_width())}"
    low, high = (words_of(axes.xaxis, x) for x in (bar.get_x(), bar.get_x() + bar.get_width()))
    return f"{name}{low} to {high}: {bar.get_height():g}"


def log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, at least a decade wide around `values`, with ticks too few to touch.

    A value of 0, such as the parameters of an adapter that is solved, has no position on it.
    """
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    margin = max(10.0 / (high / low), (high / low) ** 0.3, 1.5) ** 0.5
    axes.set(xscale="log", xlim=(low / margin, high * margin))
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 50 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if high >= 1000 else "{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def acceptance_figure(cosines: CosineSeries) -> str:
    """cosine_accept_rate against theta, for the adapter and every baseline, as SVG."""
    theta = np.linspace(0.0, 1.0, 401)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lowest = 1.0
        for name in reversed(list(cosines)):
            cos = cosines[name][~np.isnan(cosines[name])]
            if cos.size == 0:
                continue
            accepted = 1.0 - np.searchsorted(np.sort(cos), theta, side="right") / cos.size
            colour, line, label = SERIES[name]
            width = 2.6 if name == "adapter" else 1.6
            axes.plot(theta, accepted, color=colour, linestyle=line, linewidth=width, label=label)
            lowest = min(lowest, float(np.quantile(cos, 0.01)))
        mark_theta(axes, labelled=True)
        axes.set_xlim(float(np.clip(np.floor(lowest * 10) / 10, 0.0, 0.7)), 1.0)
        axes.set_ylim(-0.02, 1.1)  # room for the label above 100 %
        axes.set_xlabel("θ (a pair is accepted when cos_sim > θ)")
        axes.set_ylabel("cosine_accept_rate")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        handles, labels = axes.get_legend_handles_labels()
        legend_outside(figure, handles[::-1], labels[::-1], handlelength=3.2)

    return svg("acceptance", draw)


def histogram_figure(name: str, other: NDArray[np.floating], after: NDArray[np.floating]) -> str:
    """Histograms of cos_sim of the baseline `name` and of the adapter on one axis, as SVG."""
    low = float(min(other.min(), after.min(), THETA - 0.05))
    bins = np.linspace(np.floor(low * 20) / 20, 1.0, 61)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, series, cos in ((upper, name, other), (lower, "adapter", after)):
            draw_histogram(axes, series, cos, bins)
            mark_theta(axes, labelled=axes is upper)
        lower.set_xlabel("cos_sim of one pair")

    return svg("histogram", draw)


def draw_histogram(axes: Axes, name: str, cos: NDArray[np.floating], bins: NDArray[np.floating]) -> None:
    """Draw one histogram with its mean and standard deviation."""
    axes.hist(cos, bins=bins.tolist(), color=SERIES[name][0])
    axes.set_ylabel("pairs")
    title = {"before": "before (raw event against target)", "adapter": "after (adapter)"}.get(name, name)
    axes.set_title(f"{title}: mean {cos.mean():.3f}, std {cos.std():.3f}", loc="left", fontsize=10)


def mark_theta(axes: Axes, *, labelled: bool) -> None:
    """Draw a line at θ 0.80."""
    axes.axvline(THETA, color=INK, linewidth=0.8)
    if labelled:
        top, offset = axes.get_xaxis_transform(), (4, -3)
        axes.annotate(f"θ {rate_key(THETA)}", (THETA, 1), offset, xycoords=top, textcoords="offset points", va="top")


def reliability_figure(reliability: Mapping[str, list[dict[str, Any]]]) -> str:
    """Share of matching positions against their mean cosine, a line for each kind of states, with the diagonal."""
    markers = "osD^vPX*"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.5, label="cosine = probability")
        for number, (name, bins) in enumerate(reliability.items()):
            mean_cos, match_rate = ([one[key] for one in bins] for key in ("mean_cos", "match_rate"))
            look: dict[str, Any] = {"marker": markers[number % len(markers)], "linewidth": 1.0, "label": name}
            alpha = 1.0 - 0.6 * number / max(len(reliability), 1)
            axes.plot(mean_cos, match_rate, color=INK, alpha=alpha, **look)
        axes.set(xlabel="mean cos_sim", ylabel="match rate", xlim=(0, 1), ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(frameon=False)

    return svg("reliability", draw, (6.4, 4.2))


def to_svg(figure: Figure, kind: str) -> str:
    """The bare <svg> element of class `kind`, colours as CSS variables, sized by its container."""
    if is_narrow(figure):
        wrap_words(figure)
    if engine := figure.get_layout_engine():  # once; then what is drawn has its place
        engine.execute(figure)
        figure.set_layout_engine("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)[ >].*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg([^>]*?)\swidth="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?)\sheight="[^"]*"', rf'<svg class="{kind}"\1 aria-hidden="true"', text, count=1)
    for placeholder, value in VARIABLES.items():
        text = text.replace(placeholder, value)
    return text.replace("</svg>", f"{values_svg(figure)}</svg>")
