"""Write the figures of docs/images that are drawn from the files in benchmarks/results.

    python -m benchmarks.figures

An SVG has its own colours for light and dark, and its own background: a page's theme may differ from the browser's.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.provenance import ROOT
from benchmarks.results_tables import read
from benchmarks.tables.event_proxies import PROXIES, signed
from ray_app.reports.figures import PALETTE, STYLE, to_svg

FOLDER = ROOT / "docs" / "images"
THEMES = """<style>
svg {--line: #d0d7de; --c1: #0969da; --c2: #bc4c00; color: #1f2328; background: #fff; font-family: sans-serif}
@media (prefers-color-scheme: dark) {
svg {--line: #3d444d; --c1: #58a6ff; --c2: #f0883e; color: #e6edf3; background: #0d1117}}
.values {opacity: 0}
</style>"""
KINDS = (("trained through the drafter", PALETTE[0], "o"), ("trained on image tokens alone", PALETTE[1], "^"))
OF_TOKENS = {"cosine", "mse"}
"""Losses of image tokens themselves."""


def event_proxies(result: Mapping[str, Any]) -> Figure:
    """Draw tokens per target pass against each proxy, a point for each trial."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    panels = figure.subplots(2, (len(PROXIES) + 1) // 2, sharey=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("tokens per target pass")
    for axes, (proxy, words) in zip(panels.flat, PROXIES.items(), strict=False):
        for of_tokens, (label, colour, marker) in enumerate(KINDS):
            some = [each for each in result["trials"] if (set(each["losses"]) <= OF_TOKENS) == bool(of_tokens)]
            x, y = ([each[key] for each in some] for key in (proxy, "tokens_per_target_pass"))
            axes.scatter(x, y, s=22, color=colour, marker=marker, linewidths=0, label=label)
        rho = result["spearman"]["all"][proxy]["rho"]
        axes.set_title("all the same" if rho is None else f"rank correlation {signed(rho)}", fontsize=10)
        axes.set_xlabel(words)
        axes.margins(0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    for axes in panels.flat[len(PROXIES) :]:
        axes.remove()
    return figure


def svg_file(figure: Figure) -> str:
    """Return a figure as an SVG that is a file of its own."""
    text = to_svg(figure, "file").replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return text.replace(">", f">{THEMES}", 1)


def main() -> None:
    """Draw all."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "docs"}):
        (FOLDER / "event_proxies.svg").write_text(svg_file(event_proxies(read("event_proxies"))) + "\n")


if __name__ == "__main__":
    main()
