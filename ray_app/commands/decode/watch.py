"""`decode --watch`: each answer on the terminal as it grows, accepted draft tokens in colour."""

from typing import Any

from rich.console import Console
from rich.text import Text

from ray_app.core.speculative.decoding import Pass


class Watch:
    """Shows one line of text for each way of decoding, then its time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._way = ""
        console.print(
            Text.assemble("accepted draft tokens in ", ("green", "green"), "; times include showing the text")
        )

    def on_pass(self, name: str, drafted: str, own: str, _: Pass) -> None:
        """Print what a pass adds to the text."""
        if name != self._way:
            self._way = name
            self._console.print(Text(f"\n{name:>16}  ", style="bold"), end="")
        self._console.print(Text.assemble((drafted, "green"), own), end="", soft_wrap=True)

    def on_row(self, line: dict[str, Any]) -> None:
        """Print the times of a row."""
        self._way = ""
        plain = line["plain"]["total_ms"]
        ways = [
            f"{name} {way['total_ms']:,.0f} ms ({plain / way['total_ms']:.2f}×)"
            for name, way in line["drafters"].items()
        ]
        head = f"\n\nrow {line['row']}, {line['sequence'] or 'no sequence'}: plain {plain:,.0f} ms, "
        self._console.print(head + ", ".join(ways))
