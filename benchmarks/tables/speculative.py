"""Tables of docs/results/speculative.md and event_drafter.md."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.results_tables import Table, facts, percent, points, read
from ray_app.drafters.cost import StepTimes, row_cost
from ray_app.drafters.replay import RowReplay

LOW = ("none", "eventgpt", "prompt_lookup", "constant", "positional")
DRAFTERS = (*LOW, "retrieval", "previous_window", "ngram", "hybrid")
"""In order of tokens per target pass."""


def drafters() -> Table:
    replay = read("replay")
    rows = []
    for name in DRAFTERS:
        of_all = replay["by_gamma"]["8"][name]["all"]
        low, high = of_all["interval95"]["tokens_per_target_pass"]
        rows.append(
            (
                f"`{name}`",
                f"{of_all['tokens_per_target_pass']:.2f}",
                f"{low:.2f}",
                f"{high:.2f}",
                percent(of_all["match_rate"]),
                f"{of_all['accepted_prefix_mean']:.1f}",
                f"{of_all['one_shot_speedup']:.2f}",
                f"{of_all['continuous_speedup']:.2f}",
                percent(of_all["continuous_slower_share"]),
                f"{replay['overhead']['us_per_token'][name]:.1f}",
            )
        )
    columns = ["drafter", "tokens per target pass", "lowest", "highest", "match rate", "accepted in a row"]
    columns += ["one-shot speed-up", "continuous speed-up", "slower rows", "µs per token"]
    return Table(columns, rows, ["replay"])


def by_duration() -> Table:
    rows = [
        (
            f"`{name}`",
            *(
                f"{read('replay')['by_gamma']['8'][name][duration]['tokens_per_target_pass']:.2f}"
                for duration in ("1s", "2s", "4s", "5s")
            ),
        )
        for name in DRAFTERS
    ]
    return Table(("drafter", "1 s", "2 s", "4 s", "5 s"), rows, ["replay"], named=False)


def by_length() -> Table:
    by_gamma = read("replay")["by_gamma"]
    rows = [
        (f"`{name}`", *(f"{by_gamma[gamma][name]['all']['continuous_speedup']:.2f}" for gamma in by_gamma))
        for name in ("hybrid", "ngram", "previous_window", "positional")
    ]
    return Table(("drafter", *(f"γ = {gamma}" for gamma in by_gamma)), rows, ["replay"], named=False)


def speculative_facts() -> Table:
    cost, second, events = "verify_cost", "second_device", "hybrid_with_event_tokens/event_place/5s"
    return facts(
        (
            "`hybrid`, a pass costs 1.5 steps: speed-up",
            "replay",
            f"{cost}/hybrid/1.5/continuous_speedup",
            "{:.2f}",
            "",
        ),
        ("· 2 steps", "replay", f"{cost}/hybrid/2.0/continuous_speedup", "{:.2f}", ""),
        ("· a pass at which nothing is gained", "replay", f"{cost}/hybrid/break_even_steps", "{:.1f} steps", ""),
        ("`previous_window`, 1.5 steps", "replay", f"{cost}/previous_window/1.5/continuous_speedup", "{:.2f}", ""),
        ("· 2 steps", "replay", f"{cost}/previous_window/2.0/continuous_speedup", "{:.2f}", ""),
        (
            "· a pass at which nothing is gained",
            "replay",
            f"{cost}/previous_window/break_even_steps",
            "{:.1f} steps",
            "",
        ),
        ("EventGPT on a second device, one-shot", "replay", f"{second}/eventgpt/one_shot_speedup", "{:.2f}", ""),
        ("· continuous", "replay", f"{second}/eventgpt/continuous_speedup", "{:.2f}", ""),
        (
            "`retrieval` on a second device, continuous",
            "replay",
            f"{second}/retrieval/continuous_speedup",
            "{:.2f}",
            "",
        ),
        ("`hybrid` with EventGPT's tokens, 5 s rows: change", "replay", f"{events}/difference", "{:+.3f}", ""),
        ("· 95 %, highest", "replay", f"{events}/interval95/1", "{:+.3f}", ""),
        (
            "tokens verified a second by one core, `ngram`",
            "replay",
            "verified_tokens_per_s/ngram",
            "{:,.0f}",
            "200,000",
        ),
        ("a step of the target", "replay", lambda r: r["overhead"]["target_step_us"] / 1e3, "{:.1f} ms", ""),
    )


def trees() -> Table:
    by_size = read("trees")["tokens_per_target_pass"]
    rows = [
        (
            size,
            f"{each['chain']:.2f}",
            f"{each['tree']:.2f}",
            f"{100 * each['gain']:+.1f} % [{100 * each['interval95'][0]:+.1f}, {100 * each['interval95'][1]:+.1f}]",
        )
        for size, each in by_size.items()
    ]
    return Table(("drafted tokens", "in a row", "in a tree", "gain"), rows, ["trees"])


def decoded() -> Table:
    """Live decoding: every drafter in fp32 at a fixed γ, and in bf16 with γ chosen online."""
    live = read("decode")
    rows = []
    for part in ("fp32", "bf16", "worst"):
        for name, each in live[part]["drafters"].items():
            low, high = each["interval95"]["speedup"]
            rows.append(
                (
                    f"`{name}`" if part != "worst" else "always wrong",
                    {"float32": "fp32", "bfloat16": "bf16"}[live[part]["dtype"]],
                    f"{each['tokens_per_target_pass']:.2f}",
                    percent(each["draft_acceptance_rate"]),
                    f"{each['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                    f"{each['decode_speedup']:.2f}",
                    f"{each['texts_that_differ']} of {each['rows']}",
                    percent(each["loop_overhead"]),
                )
            )
    columns = ["drafter", "numbers", "tokens per target pass", "accepted", "speed-up", "without the prompt's pass"]
    return Table([*columns, "texts that differ", "loop"], rows, ["decode"])


def decode_limits() -> Table:
    limits, squares = "limits", "chi_square"
    return facts(
        ("texts that differ in fp32, all drafters", "decode", f"{limits}/texts_that_differ/found", "{}", "0"),
        (
            "100,000 draws of one position: chi-square tests that reject at 1 %",
            "decode",
            lambda r: f"{sum(each['rejected'] for each in r[squares].values())} of {len(r[squares])}",
            "{}",
            "0",
        ),
        ("loop over the models' own passes, most", "decode", f"{limits}/loop_overhead/found", percent, "≤ 5 %"),
        ("bf16 speed-up, `hybrid` or `ngram`", "decode", f"{limits}/bf16_speedup/found", "{:.2f}", "≥ 1.5"),
        ("always wrong, γ online", "decode", f"{limits}/worst_case/found", "{:.3f}", "≥ 0.97"),
        ("clock predicted by `replay`: largest error", "decode", f"{limits}/replay_error/found", percent, "≤ 5 %"),
        (
            "rows with another number of passes than predicted",
            "decode",
            lambda r: sum(each["rows_with_other_passes"] for each in r["replay"].values()),
            "{}",
            "0",
        ),
        ("rows after 5 kills", "decode", "kills/rows", "{:,}", "1,000"),
        ("· twice, or other than undisturbed", "decode", f"{limits}/rows_after_kills/found", "{}", "0"),
    )


EVENT_ARMS = (
    ("the frame itself", "the target's own picture"),
    ("eagle head", "the target's own last states: EAGLE head"),
    ("events, kl", "events: adapter by KL"),
    ("events, lk", "events: adapter by LK"),
    ("events, accepted length", "events: adapter by accepted length"),
    ("events, acceptance", "events: adapter by acceptance"),
    ("events, kl + cosine", "events: adapter by KL and cosine"),
    ("events, cosine", "events: adapter by cosine"),
    ("other drives' events", "baseline: adapter by KL, another drive's events"),
    ("best constant", "baseline: the best constant picture under KL"),
    ("mean", "baseline: the mean image tokens"),
    ("nothing", "baseline: no picture"),
    ("3-gram", "baseline: a 3-gram table of training answers"),
    ("hybrid", "baseline: `hybrid`"),
)
"""Arms of the event drafter's measurement, with their words."""


def _with_interval(each: dict[str, Any], form: str = "{:.2f}") -> str:
    low, high = (form.format(end) for end in each["interval95"])
    return f"{form.format(each['mean'])} [{low}, {high}]".replace("-", "−")


def rank_correlation(arms: dict[str, Any]) -> float:
    """Spearman's correlation of cosine with tokens per target pass over everything that stood for the own picture."""
    shown = [each for name, each in arms.items() if each["cosine"] and name != "the frame itself"]
    ranks = [np.argsort(np.argsort([each[key] for each in shown])) for key in ("cosine", "mean")]
    return float(np.corrcoef(ranks)[0, 1])


def event_drafter() -> Table:
    """One frozen drafter, shown one thing or another."""
    result = read("event_drafter")
    rows = []
    for name, words in EVENT_ARMS:
        whole = result["all_seeds"]["tokens_per_target_pass"][name]
        seeds = [each["tokens_per_target_pass"][name]["mean"] for each in result["by_seed"]]
        cosine = f"{whole['cosine']:.3f}" if whole["cosine"] else "–"
        rows.append((words, _with_interval(whole), *(f"{mean:.2f}" for mean in seeds), cosine))
    columns = [
        "shown to the drafter",
        "tokens per target pass",
        *(f"seed {n}" for n in range(len(result["by_seed"]))),
    ]
    return Table([*columns, "cosine"], rows, ["event_drafter"])


def event_differences() -> Table:
    """Paired differences, of all seeds and of each."""
    result = read("event_drafter")
    words = dict(EVENT_ARMS)
    rows = []
    for name, each in result["all_seeds"]["differences"].items():
        one, other = name.split(" − ")
        seeds = [_with_interval(by["differences"][name], "{:+.2f}") for by in result["by_seed"]]
        title = f"{words[one].removeprefix('baseline: ')} − {words[other].removeprefix('baseline: ')}"
        rows.append(
            (title, _with_interval(each, "{:+.2f}"), *seeds, f"{100 * each['share']:+.1f} %".replace("-", "−"))
        )
    gap = result["all_seeds"]["gap_closed"]
    seeds = [_with_interval(by["gap_closed"]) for by in result["by_seed"]]
    rows.append(("share of the gap from constant to own picture", _with_interval(gap), *seeds, "–"))
    every = [result["all_seeds"], *result["by_seed"]]
    correlations = [f"{rank_correlation(each['tokens_per_target_pass']):.2f}".replace("-", "−") for each in every]
    rows.append(("rank correlation of cosine with tokens per target pass", *correlations, "–"))
    columns = ["difference", "all seeds", *(f"seed {n}" for n in range(len(result["by_seed"])))]
    return Table([*columns, "of tokens"], rows, ["event_drafter"], named=False)


def demo_target() -> Table:
    """Sight of the demo's target: each kind of fact, what it needs its picture for, and how hard its language is."""
    result = read("demo_target")
    sight, kinds = result["sight"], result["sight"]["kinds"]
    rows = []
    for kind, each in kinds.items():
        low, high = each["interval95"]
        right = f"{percent(each['right'])} [{100 * low:.0f}, {100 * high:.0f}]"
        wanted = "≥ 85 %" if kind in ("place", "light") else "–"
        rows.append((f"right: {kind}", right, percent(each["majority"]), percent(each["probe"]), wanted))
    means = [percent(statistics.mean(each[key] for each in kinds.values())) for key in ("right", "majority", "probe")]
    rows.append(("mean of all kinds", *means, "–"))
    passes = {
        name: f"{each['tokens_per_target_pass']:.2f} [{each['interval95'][0]:.2f}, {each['interval95'][1]:.2f}]"
        for name, each in result["drafters"].items()
    }
    for what, measured, wanted in (
        ("· above the majority, points", points(sight["above_majority"]), "≥ 15"),
        ("loss of true answers with the own picture", f"{sight['loss']['own']:.3f}", "–"),
        ("· with another drive's picture, times that", f"{sight['loss_ratio_other']:.2f}", "≥ 2"),
        (
            "different texts to one question",
            f"{sight['distinct_texts']} of {sight['pictures']}",
            "≥ 60 of 100",
        ),
        ("tokens per target pass, γ = 8: table of 3-grams", passes["3-gram"], "≤ 4.5"),
        ("· `ngram`", passes["ngram"], "–"),
    ):
        rows.append((what, measured, "–", "–", wanted))
    return Table(("what", "measured", "majority", "linear probe", "wanted"), rows, ["demo_target"])


def event_hybrid() -> Table:
    """The hybrid with a drafter's distribution, by what the drafter is shown."""
    result = read("event_hybrid")
    rows = []
    for name, each in result["tokens_per_target_pass"].items():
        gain = result["over_hybrid"].get(name)
        rows.append(
            (
                name,
                _with_interval(each),
                *(f"{mean:.2f}" for mean in each["by_seed"]),
                _with_interval(gain, "{:+.2f}") if gain else "–",
            )
        )
    columns = ["drafts by", "tokens per target pass", *(f"seed {n}" for n in range(result["seeds"])), "over `hybrid`"]
    return Table(columns, rows, ["event_hybrid"])


def event_clock() -> Table:
    """Live decoding with the drafter that sees events, and with an EAGLE head."""
    rows = []
    for result in ("event_clock", "eagle_clock"):
        live = read(result)
        for part in ("float32", "bfloat16"):
            for name, each in live[part]["drafters"].items():
                low, high = each["interval95"]["speedup"]
                gain = live[part]["over_hybrid"].get(name)
                rows.append(
                    (
                        _clocked(name) + " (again)" * (result == "eagle_clock" and name == "hybrid"),
                        {"float32": "fp32, γ = 8", "bfloat16": "bf16, γ online"}[part],
                        f"{each['tokens_per_target_pass']:.2f}",
                        f"{each['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                        _with_interval(gain) if gain else "–",
                        f"{each['texts_that_differ']} of {each['rows']}",
                    )
                )
    columns = ["drafter", "numbers", "tokens per target pass", "speed-up", "over `hybrid`", "texts that differ"]
    return Table(columns, rows, ["event_clock", "eagle_clock"])


def _clocked(name: str) -> str:
    """Return a drafter's name in words."""
    if name == EAGLE_FOLDER:
        return "EAGLE head"
    shown = name.replace("hybrid+", "`hybrid` × ").replace("drafter-", "drafter, shown: ")
    return shown if "drafter" in name else f"`{name}`"


EAGLE_FOLDER = "demo-head"
"""Name of the folder that an EAGLE head was measured from."""
PROMPT_MS, STEP_MS, VISION_MS = 322.0, 14.7, 7.7
"""Medians of 993 recorded rows in 4 bits on an RTX 4090: Video-LLaVA 7B's, and EventGPT's image encoder."""
SHARE = 2 / 32
"""Part of a step and of the prompt that the first two layers take."""


def event_cost() -> Table:
    """Arithmetic: tokens per target pass of the small target with the times of one of 7 billion parameters."""
    alone, mixed, clock = read("event_drafter"), read("event_hybrid"), read("event_clock")
    each_of = alone["all_seeds"]["tokens_per_target_pass"]
    product = mixed["tokens_per_target_pass"]["hybrid with the drafter, events"]["mean"]
    live = clock["float32"]["drafters"]["hybrid"]
    answer_ms = 1e3 * clock["float32"]["plain"]["tokens"] / clock["float32"]["plain"]["tokens_per_s"] / live["rows"]
    own_ms = answer_ms / live["speedup"] * (live["stage_share"]["draft"] + live["stage_share"]["learn"])
    number, gamma = alone["pictures"], alone["gamma"]
    length = round(number * alone["tokens_mean"])
    counted = clock["counted"]["hybrid+drafter-events"]
    asked = counted["tokens_asked"] / counted["passes_counted"]
    drafters = [
        ("drafter, shown: events", each_of["events, kl"]["mean"], gamma, VISION_MS, 0.0),
        ("· best constant", each_of["best constant"]["mean"], gamma, 0.0, 0.0),
        ("· nothing", each_of["nothing"]["mean"], gamma, 0.0, 0.0),
        ("`hybrid`", each_of["hybrid"]["mean"], 0.0, 0.0, own_ms),
        ("`hybrid` × drafter, shown: events", product, gamma, VISION_MS, own_ms),
        ("· asked where `hybrid` is not sure", product, asked, VISION_MS, own_ms),
    ]
    rows = []
    for name, tokens, asked, vision_ms, own in drafters:
        passes = round(length / tokens)
        answers = RowReplay(length, (gamma,) * passes, (), (), 0, 0, 0.0)
        speedups = []
        for steps in (1.0, 1.5):
            times = StepTimes(
                target_prefill_ms=number * PROMPT_MS,
                target_step_ms=STEP_MS,
                verify_ms=steps * STEP_MS,
                empty_ms=STEP_MS,
                event_start_ms=number * (vision_ms + SHARE * PROMPT_MS) if asked else 0.0,
                event_step_ms=SHARE * STEP_MS,
                own_ms=number * own,
            )
            cost = row_cost(answers, times, gamma=gamma, num_event_tokens=round(passes * asked), device="same")
            speedups.append(f"{cost.plain_ms / cost.continuous_ms:.2f}")
        rows.append((name, f"{tokens:.2f}", f"{asked:.1f}", *speedups))
    columns = [
        "drafts by",
        "tokens per target pass",
        "asked of the drafter, per pass",
        "speed-up",
        "a pass is 1.5 steps",
    ]
    return Table(columns, rows, ["event_drafter", "event_hybrid", "event_clock"], named=False)


TABLES: dict[str, Callable[[], Table]] = {
    "drafters": drafters,
    "drafters-duration": by_duration,
    "drafters-length": by_length,
    "speculative": speculative_facts,
    "trees": trees,
    "decode": decoded,
    "decode-limits": decode_limits,
    "event-drafter": event_drafter,
    "event-differences": event_differences,
    "event-hybrid": event_hybrid,
    "event-clock": event_clock,
    "event-cost": event_cost,
    "demo-target": demo_target,
}
