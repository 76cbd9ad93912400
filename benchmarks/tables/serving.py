"""Tables of docs/results/serving.md."""

from collections.abc import Callable
from typing import Any

from benchmarks.results_tables import Table, facts, percent, read


def load(width: str) -> Table:
    """Every cell of the load matrix."""
    rows = [
        (
            str(cell["callers"]),
            str(cell["pairs_a_request"]),
            f"{cell['pairs_per_s']:,.0f}",
            *(f"{cell[f'{quantile}_ms']:.1f}" for quantile in ("p50", "p95", "p99")),
            percent(cell["share_outside_forward"]),
        )
        for cell in read(f"serve_load_matrix_{width}")["cells"]
    ]
    columns = ("callers", "pairs a request", "pairs/s", "p50 ms", "p95 ms", "p99 ms", "outside of forward passes")
    return Table(columns, rows, [f"serve_load_matrix_{width}"])


def rivals(width: str) -> Table:
    """Return the same loads on each server."""
    servers = read(f"serve_load_rivals_{width}")["servers"]
    names = {"ours": "ray-app", "bare": "bare uvicorn", "litserve": "LitServe", "mlflow": "mlflow"}
    rows = []
    for i, ours in enumerate(servers["ours"]):
        cells = {name: servers[name][i] for name in names if i < len(servers.get(name, ()))}
        speeds = [f"{cells[name]['pairs_per_s']:,.0f}" if name in cells else "–" for name in names]
        times = [
            f"{cells[name]['p99_ms']:.0f}" if name in cells and cells[name]["p99_ms"] else "–"
            for name in ("ours", "bare", "litserve")
        ]
        faster = f"{ours['pairs_per_s'] / cells['litserve']['pairs_per_s']:.1f}"
        rows.append((str(ours["callers"]), str(ours["pairs_a_request"]), *speeds, faster, *times))
    columns = ["callers", "pairs a request", *(f"{name}, pairs/s" for name in names.values()), "times LitServe"]
    columns += [f"{names[name]}, p99 ms" for name in ("ours", "bare", "litserve")]
    return Table(columns, rows, [f"serve_load_rivals_{width}"])


def overload() -> Table:
    rows = []
    for precision, name in (("bf16", "serve_overload"), ("fp32", "serve_overload_fp32")):
        result = read(name)
        codes = result["at_4_times_capacity"]["codes"]
        rows.append(
            (
                precision,
                f"{result['capacity_requests_per_s']:.0f}",
                f"{result['asked_per_s']:.0f}",
                f"{codes.get('200', 0):,}",
                f"{codes.get('429', 0):,}",
                f"{sum(codes.values()) - codes.get('200', 0) - codes.get('429', 0):,}",
                f"{result['at_capacity_48_callers']['p99_ms']:.0f}",
                f"{result['at_4_times_capacity']['p99_ms']:.0f}",
                f"{result['accepted_p99_over_capacity_p99']:.1f}",
                "yes" if result["counts_are_equal"] else "no",
            )
        )
    columns = ["precision", "capacity, requests/s", "sent, requests/s", "answered 200", "answered 429", "other"]
    columns += ["p99 ms at capacity", "p99 ms of the accepted", "ratio", "counts equal"]
    return Table(columns, rows, ["serve_overload", "serve_overload_fp32"])


def spread(samples: list[dict[str, Any]], pick: Callable[..., float]) -> float:
    return pick(sample["rss_mib"] for sample in samples)


def serving_facts() -> Table:
    def rss(run: int, pick: Callable[..., float]) -> Callable[[dict[str, Any]], float]:
        return lambda result: spread(result["runs"][run]["samples"], pick)

    return facts(
        ("new champions, bad ones", "serve_champions", lambda r: f"{r['good']}, {r['bad']}", "{}", ""),
        ("· taken or refused rightly", "serve_champions", "taken_or_refused_rightly", "{}", "25"),
        ("· answers other than 200", "serve_champions", "answers_other_than_200", "{}", "0"),
        ("· p99 against the same load without reloads", "serve_champions", "p99_over_idle_p99", "{:.1f} times", ""),
        ("replicas killed", "serve_kills", "kills", "{}", ""),
        (
            "· requests through the client, failed",
            "serve_kills",
            lambda r: f"{r['requests']:,}; {r['failures']}",
            "{}",
            "0",
        ),
        ("· slowest answer", "serve_kills", lambda r: r["latency"]["max_ms"] / 1e3, "{:.1f} s", ""),
        ("nodes killed under the endpoint", "node_kills_serve", "nodes_killed", "{}", ""),
        (
            "· requests through the client, failed",
            "node_kills_serve",
            lambda r: f"{r['requests']:,}; {r['failed_through_the_client']}",
            "{}",
            "0",
        ),
        ("· slowest answer", "node_kills_serve", "slowest_answer_s", "{:.1f} s", ""),
        ("soak, minutes", "serve_soak", "minutes", "{:.0f}", ""),
        (
            "· memory of a replica, of all processes grows by",
            "serve_soak",
            lambda r: ", ".join(f"{r[f'{who}_mib_per_hour']:.1f} MiB/h" for who in ("replica", "all")),
            "{}",
            "",
        ),
        (
            "3,000 odd requests, two malloc arenas: first, most",
            "serve_memory",
            lambda r: ", ".join(f"{rss(1, pick)(r):.0f} MiB" for pick in (lambda s: next(iter(s)), max)),
            "{}",
            "",
        ),
        ("· glibc's own number of arenas: most", "serve_memory", rss(0, max), "{:.0f} MiB", ""),
        (
            "damaged binary requests, findings",
            "serve_fuzz",
            lambda r: f"{r['mutations']['cases']:,}; {r['mutations']['num_findings']}",
            "{}",
            "0",
        ),
        ("memory grown during the fuzz", "serve_fuzz", "memory_grown_mib", "{:.0f} MiB", ""),
    )


def precision() -> Table:
    """Return the model of a replica in each precision."""
    rows = [
        (
            name,
            *(f"{each['p50_ms'][batch]:.1f}" for batch in ("1", "32")),
            *(f"{each[key]:,}" for key in ("weights_mib", "mib_loaded", "mib_most")),
        )
        for name, each in read("serve_precision")["precisions"].items()
    ]
    columns = ["weights", "1 pair, p50 ms", "32 pairs, p50 ms", "weights, MiB", "replica, MiB", "· while it loads"]
    return Table(columns, rows, ["serve_precision"])


def fuzz() -> Table:
    """Return a row for each operation; those without a body are one."""
    operations = read("serve_fuzz")["operations"]
    gets = [operation for name, operation in operations.items() if name.startswith("GET ")]
    groups = {name: [operation] for name, operation in operations.items() if not name.startswith("GET ")}

    def count(group: list[dict[str, Any]], code: str) -> int:
        return sum(n for each in group for key, n in each["codes"].items() if key.startswith(code))

    rows = [
        (
            name if name.startswith("the ") else f"`{name}`",
            *(f"{sum(each[key] for each in group):,}" for key in ("cases", "cases_of_schema")),
            *(f"{count(group, code):,}" for code in ("200", "4", "5")),
        )
        for name, group in {f"the {len(gets)} of `GET`": gets, **groups}.items()
    ]
    columns = ("operation", "requests", "drawn from its schema", "answered 200", "4xx", "5xx")
    return Table(columns, rows, ["serve_fuzz"])


TABLES: dict[str, Callable[[], Table]] = {
    "load-4096": lambda: load("4096"),
    "load-150528": lambda: load("150528"),
    "load-gpu": lambda: load("150528_gpu"),
    "rivals-4096": lambda: rivals("4096"),
    "rivals-150528": lambda: rivals("150528"),
    "overload": overload,
    "precision": precision,
    "serving": serving_facts,
    "fuzz": fuzz,
}
