"""The table of a run, and what is to be read with it, for the terminal and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_app.commands.decode.files import RESULTS
from ray_app.store.capture_store import REJECTED_ROWS

HEADS = (
    *("tokens per pass", "accepted", "speed-up", "decoding alone", "other texts"),
    *("drafting", "verifying", "loop"),
)


def headline(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    name, best = max(result["results"].items(), key=lambda item: item[1]["speedup"])
    if best["speedup"] <= 1.0:
        return f"No drafter is faster than plain decoding; {name} comes nearest at {best['speedup']:.2f}×."
    return f"{name} is {best['speedup']:.2f}× as fast as plain decoding{span(best['interval95']['speedup'])}."


def cells(numbers: Mapping[str, Any]) -> list[str]:
    """Return a drafter's line below `HEADS`."""
    interval, share = numbers["interval95"], numbers["stage_share"]
    differ = numbers["texts_that_differ"]
    return [
        f"{numbers['tokens_per_target_pass']:.2f}{span(interval['tokens_per_target_pass'])}",
        f"{numbers['draft_acceptance_rate']:.1%}",
        f"{numbers['speedup']:.2f}×{span(interval['speedup'])}",
        f"{numbers['decode_speedup']:.2f}×",
        "sampled" if differ is None else f"{differ} of {numbers['rows']}",
        f"{share['draft'] + share['learn']:.1%}",
        f"{share['verify']:.1%}",
        f"{numbers['loop_overhead']:.1%}",
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what is to be read with the table."""
    plain = result["plain"]
    lines = [
        f"Rows: {result['rows']:,}, sequences: {result['sequences']:,}, {plain['step_ms']:.1f} ms for a plain step; "
        "in brackets 95 % over sequences. Every cost is charged: pictures, prompt, drafter, learning, loop."
    ]
    if result["without_end"]:
        lines.append(
            f"{result['without_end']:,} answers have no end token: they were cut at --max-new-tokens "
            f"({result['max_new_tokens']})."
        )
    if result["rejected"]:
        lines.append(f"{result['rejected']:,} rows were rejected (reasons in {REJECTED_ROWS}).")
    for name, numbers in result["results"].items():
        for each in numbers["differences"]:
            kind = "rounding" if each["rounding"] else "A DEFECT"
            first, second = each["plain_logits"]
            lines.append(
                f"{name}, row {each['row']}, token {each['place']}: {each['token']} instead of "
                f"{each['plain_token']}, logits {second:.4f} and {first:.4f}: {kind}"
            )
    return [*lines, f"results: {result['out']}/{RESULTS}"]


def span(interval: Sequence[float] | None) -> str:
    """Return an interval behind its number."""
    return f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
