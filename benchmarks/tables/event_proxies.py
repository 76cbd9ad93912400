"""Tables of proxies and of texts in docs/results/draft_training.md."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.results_tables import Table, read

PROXIES = {
    "cosine_accept_rate_0.80": "cosine above 0.80, share",
    "cosine_accept_rate_0.95": "cosine above 0.95, share",
    "cosine": "mean cosine",
    "centred_cosine": "centred cosine",
    "R@1": "R@1",
    "kl": "KL to the target",
    "acceptance": "acceptance, Σ min(p, q)",
}
"""Proxies of the event drafter's trials, with their words."""
TEXTS = {
    "answers, kl": "the target's answers, KL",
    "answers, cross_entropy": "the target's answers, cross-entropy",
    "captions, cross_entropy": "true captions, cross-entropy",
}
"""What drafters learnt from, with its words."""


def signed(number: float) -> str:
    """Return a number with its sign."""
    return f"{number:+.2f}".replace("-", "−")


def _interval(ends: Sequence[float], form: Callable[[float], str]) -> str:
    return f"[{form(ends[0])}, {form(ends[1])}]"


def event_proxies() -> Table:
    """Rank correlation of each proxy with tokens per target pass over the trials."""
    result = read("event_proxies")
    trials, spearman = result["trials"], result["spearman"]

    def cell(rho: float | None, interval95: Sequence[float]) -> str:
        return "all the same" if rho is None else f"{signed(rho)} {_interval(interval95, signed)}"

    rows: list[tuple[str, ...]] = []
    for proxy, words in PROXIES.items():
        cells = [cell(**spearman[some][proxy]) for some in ("all", "better half")]
        rows.append((words, *cells, *_spread([each[proxy] for each in trials])))
    rows.append(("tokens per target pass", "–", "–", *_spread([each["tokens_per_target_pass"] for each in trials])))
    columns = ["proxy", f"rank correlation, {len(trials)} trials", f"the better {(len(trials) + 1) // 2}"]
    return Table([*columns, "least", "median", "most"], rows, ["event_proxies"])


def _spread(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}".replace("-", "−") for value in (min(values), statistics.median(values), max(values))]


def event_texts() -> Table:
    """Drafters by the texts that they learnt from, and their differences."""
    result = read("event_texts")
    rows = []
    for name, each in result["tokens_per_target_pass"].items():
        mean = f"{each['mean']:.2f} {_interval(each['interval95'], '{:.2f}'.format)}"
        rows.append((TEXTS[name], mean, *(f"{seed:.2f}" for seed in each["by_seed"])))
    for name, each in result["differences"].items():
        words = " − ".join(TEXTS[side] for side in name.split(" − "))
        mean = f"{signed(each['mean'])} {_interval(each['interval95'], signed)}"
        rows.append((words, mean, *map(signed, each["by_seed"])))
    seeds = [f"seed {n}" for n in range(len(rows[0]) - 2)]
    return Table(["learnt from", "tokens per target pass", *seeds], rows, ["event_texts"])


TABLES: dict[str, Callable[[], Table]] = {"event-proxies": event_proxies, "event-texts": event_texts}
