"""The report: one file, self-contained, accessible, and honest in words as well as in numbers."""

import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pages import Elements, assert_has_words, assert_light_and_dark, assert_opens, assert_self_contained
from rich.console import Console

from ray_app.commands.evaluate.report import (
    PairPicture,
    outcome,
    report_page,
    report_warnings,
    results_table,
    verdict_sentence,
)
from ray_app.core.metrics import THETAS, AlignmentCounts, rate_key
from ray_app.reports.figures import log_scale

CENTRES = {
    "adapter": 0.85,
    "before": 0.64,
    "white": 0.75,
    "mean_target": 0.80,
    "shuffled": 0.70,
    "previous_window": 0.9,
}


def part_of(pairs: int, lift: float, interval: list[float] | None) -> dict[str, Any]:
    measured = {"pairs": pairs, "cos_sim_mean": 0.81, "cosine_accept_rate_0.80": 0.5, "lift": lift}
    return {**measured, "lift_interval95": interval, "unit": "block", "units": 10}


def made_up(**changes: Any) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """A result as `judgement` gives it, and its cosines."""
    rng = np.random.default_rng(0)
    cosines = {name: np.clip(rng.normal(centre, 0.05, 200), -1, 1) for name, centre in CENTRES.items()}
    cosines["previous_window"][::10] = np.nan
    means = {name: AlignmentCounts.of(cos[~np.isnan(cos)]).means() for name, cos in cosines.items()}
    adapter = means.pop("adapter")
    means["previous_window"]["adapter_cosine_accept_rate"] = adapter["cosine_accept_rate"]
    lifts = {
        rate_key(theta): adapter["cosine_accept_rate"][rate_key(theta)]
        - max(means[name]["cosine_accept_rate"][rate_key(theta)] for name in ("before", "white", "mean_target"))
        for theta in THETAS
    }
    result = {
        **adapter,
        "baselines": means,
        "best_baseline": "mean_target",
        "lift": lifts["0.80"],
        "lift_by_theta": lifts,
        "previous_window_better": False,
        "centered_cos_sim_mean": 0.31,
        "centered_cos_sim_mean_before": 0.05,
        "retrieval": {"R@1": 0.1, "R@5": 0.3, "R@10": 0.4, "chance_R@1": 0.005},
        "interval95": {
            "lift": [0.2, 0.4],
            "lift_by_theta": {"0.80": [0.2, 0.4], "0.90": [0.05, 0.15]},
            "cos_sim_mean": [0.8, 0.9],
            "unit": "sequence",
            "resamples": 2000,
        },
        "by_sequence": {"drive_1": part_of(150, 0.25, [0.1, 0.375]), "drive_2": part_of(50, -0.125, [-0.5, 0.25])},
        "by_lighting": {"day": part_of(199, 0.25, [0.125, 0.375]), "night": part_of(1, -0.125, None)},
        "dataset": "1s",
        "checkpoint": "runs/<b>one</b>",
        "split": {
            "by": "sequence",
            "label": "whole sequences",
            "seed": 42,
            "train": 800,
            "val": 100,
            "test": 200,
            "test_windows_overlapping_train": 0.0,
            "test_pairs_trained_on": 0,
        },
        "data": {
            "source": "npy",
            "events": "recorded",
            "features": {"event": "images", "target": "images"},
            "encoders": {},
        },
        "fingerprint": "f" * 64,
        "test_fingerprint": "7" * 64,
        "checkpoint_sha256": "c" * 64,
        "provenance": {"argv": ["ray-app", "evaluate"], "versions": {"ray": "2.60.0"}, "git": None},
        **changes,
    }
    result["verdict"] = verdict_sentence(result)
    return result, cosines


def picture(sequence: str = "drive") -> PairPicture:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PairPicture(sequence, 500_000, 1_500_000, 0.6, 0.9, pixels, pixels, pixels)


@pytest.fixture(scope="module")
def page() -> str:
    result, cosines = made_up()
    return report_page(result, cosines, [picture()], [picture("<script>alert(1)</script>")])


def test_a_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert_self_contained(page)


def test_a_report_links_to_the_page_about_tokens() -> None:
    result, cosines = made_up()
    with_link = report_page(result, cosines, token_report="../tokens%20of%20today/page.html")
    links = [attributes["href"] for tag, attributes in Elements(with_link).found if tag == "a"]
    assert links == ["../tokens%20of%20today/page.html"]
    assert "What cosine acceptance predicted about tokens" in with_link
    assert "<a " not in report_page(result, cosines)


def test_a_report_names_the_encoders_of_its_features(page: str) -> None:
    assert "encoder" not in page
    by = "MobileNetV2Model, layer -1, pool 3x3, SHA-256 bb1446597501…"
    features = {"event": "sequences", "target": "sequences"}
    data = {"source": "scenes", "events": "simulated", "features": features, "encoders": {"event": by, "target": by}}
    assert report_page(*made_up(data=data)).count(by) == 2


def test_what_the_data_says_is_never_markup(page: str) -> None:
    assert "<b>one</b>" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_first_line_is_the_verdict(page: str) -> None:
    body = html.unescape(re.sub(r"<[^>]+>", "\n", page[page.index("<body>") :]))
    first = next(line.strip() for line in body.splitlines() if line.strip())
    assert first == made_up()[0]["verdict"]


def test_each_lift_of_lighting_and_sequence_has_its_interval(page: str) -> None:
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    ends = [line[-2:] for line in cells if len(line) > 2]
    assert ["+25.0", "+10.0 to +37.5 (10 blocks)"] in ends
    assert ["-12.5", "-50.0 to +25.0 (10 blocks)"] in ends
    assert ["-12.5", "–"] in ends


def test_pictures_and_figures_have_words_and_tables_have_headers(page: str) -> None:
    elements = Elements(page).found
    pictures = [attributes for tag, attributes in elements if tag == "img"]
    assert len(pictures) == 6
    assert_has_words(page)
    assert len({attributes["alt"] for attributes in pictures}) == 6
    figures = [attributes for tag, attributes in elements if tag == "figure" and attributes.get("role") == "img"]
    assert len(figures) == 2
    assert ("html", {"lang": "en"}) in elements


def test_every_colour_is_a_variable_with_a_light_and_a_dark_value(page: str) -> None:
    assert_light_and_dark(page)


@pytest.mark.parametrize(
    ("lift", "interval", "kind", "words"),
    [
        (0.12, [0.05, 0.2], "beats", "beats the best baseline (mean_target) by 12.0 points at θ 0.80"),
        (0.12, [-0.05, 0.2], "unsure", "the 95 % interval includes zero"),
        (
            -0.03,
            [-0.1, 0.02],
            "loses",
            "does not beat the best baseline (mean_target) at θ 0.80: it is 3.0 points worse",
        ),
        (0.0, [0.0, 0.0], "loses", "both are equal"),
    ],
)
def test_the_sentence_says_who_is_ahead_by_how_much_and_how_surely(
    lift: float, interval: list[float], kind: str, words: str
) -> None:
    bounds = {"lift": interval, "lift_by_theta": {"0.80": interval}, "unit": "sequence", "resamples": 2000}
    result, _ = made_up(lift=lift, interval95=bounds)
    assert outcome(result) == kind
    assert words in result["verdict"]
    assert len(result["verdict"].split()) <= 20
    out = io.StringIO()
    Console(width=140, file=out).print(results_table(result, "test part"))
    assert f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" in out.getvalue(), "the numbers are in the table"


@pytest.mark.parametrize(
    ("changes", "words", "warning"),
    [
        ({"split": {"test_windows_overlapping_train": 0.95}}, "This split leaks: 95 %", True),
        ({"split": {"test_pairs_trained_on": 7}}, "trained on 7 of the 200 test pairs", True),
        ({"split": {"test_pairs_trained_on": None}}, "is not recorded", False),
        ({"split": {"by": "block"}}, "One sequence only", False),
        ({"previous_window_better": True}, "previous_window is better", True),
        ({"data": {"source": "scenes", "events": "simulated"}}, "rendered scenes", False),
        ({"data": {"source": "video", "events": "simulated"}}, "events are simulated", False),
        ({}, "not token acceptance", False),
    ],
)
def test_what_a_reader_must_know_is_said(changes: dict[str, Any], words: str, warning: bool) -> None:
    base, cosines = made_up()
    merged = {key: {**base[key], **changes.pop(key, {})} for key in ("split", "data")}
    result = {**base, **changes, **merged}
    assert [note["warning"] for note in report_warnings(result) if words in note["text"]] == [warning]
    assert words in report_page(result, cosines)


def test_recorded_events_under_a_clean_split_need_no_warning() -> None:
    result, _ = made_up()
    assert [note["text"].split(":")[0] for note in report_warnings(result)] == [
        "Cosine acceptance is not token acceptance"
    ]


def test_table_and_page_show_the_same_rates(page: str) -> None:
    result, _ = made_up()
    out = io.StringIO()
    Console(width=140, file=out).print(results_table(result, "test part"))
    printed = out.getvalue()
    for numbers in (result, *result["baselines"].values()):
        rate = f"{100 * numbers['cosine_accept_rate']['0.80']:.1f}"
        assert f"{rate} %" in printed
        assert f'<td data-head="θ 0.80" class="key">{rate}</td>' in page
    assert f"{100 * result['lift']:+.1f}" in printed


@pytest.mark.parametrize(("values", "inside"), [([0, 12_608, 2.0e6], [12_608, 2.0e6]), ([0], [1.0]), ([], [1.0])])
def test_a_logarithmic_axis_leaves_out_what_has_no_place_there(values: list[float], inside: list[float]) -> None:
    axes = Figure().subplots()
    log_scale(axes, values)
    low, high = axes.get_xlim()
    assert 0 < low < min(inside) <= max(inside) < high
    assert high / low >= 9.9


def test_features_that_are_no_images_leave_the_pictures_out() -> None:
    result, cosines = made_up()
    assert "Best and worst" not in report_page(result, cosines)


def of_an_encoder() -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """A result of vectors of two widths: no baseline of pixels, none of the raw event."""
    result, cosines = made_up()
    features = {"event": "vectors", "target": "vectors"}
    result |= {
        "baselines": {name: of for name, of in result["baselines"].items() if name not in ("before", "white")},
        "centered_cos_sim_mean_before": None,
        "by_lighting": {},
        "data": {"source": "arrays", "events": "unknown", "features": features, "encoders": {}},
    }
    return result, {name: cos for name, cos in cosines.items() if name not in ("before", "white")}


def test_a_report_of_encoder_features_says_nothing_of_pixels() -> None:
    result, cosines = of_an_encoder()
    page = report_page(result, cosines)
    words = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).lower()
    for word in ("pixel", "white", "before", "image", "picture"):
        assert not re.search(rf"\b{word}", words), word
    assert_self_contained(page)
    out = io.StringIO()
    Console(width=140, file=out).print(results_table(result, "test part"))
    assert "before" not in out.getvalue()


def test_retrieval_is_with_the_results_of_the_first_screen() -> None:
    result, cosines = of_an_encoder()
    out = io.StringIO()
    Console(width=140, file=out).print(results_table(result, "test part"))
    page = report_page(result, cosines)
    for text in (" ".join(out.getvalue().split()), page[: page.index("Acceptance against")]):
        assert "R@1 10.0 %, R@5 30.0 %, R@10 40.0 %" in text


def test_a_theta_that_shows_nothing_is_pointed_out() -> None:
    result, cosines = of_an_encoder()
    for numbers in (result, *result["baselines"].values()):
        numbers["cosine_accept_rate"] = {
            **dict.fromkeys(("0.50", "0.60"), 1.0),
            **{theta: rate for theta, rate in numbers["cosine_accept_rate"].items() if theta > "0.60"},
            **dict.fromkeys(("0.80", "0.85", "0.90", "0.95"), 0.0),
        }
    out = io.StringIO()
    Console(width=140, file=out).print(results_table(result, "test part"))
    note = "At θ 0.50, 0.60 every row is 100%, at θ 0.80, 0.85, 0.90, 0.95 every row is 0%: acceptance"
    assert note in " ".join(out.getvalue().split())
    assert note in html.unescape(report_page(result, cosines))
    warnings = [line["text"] for line in report_warnings(result) if line["warning"]]
    assert any("At θ 0.80 every row is 0%, so acceptance and lift show nothing" in text for text in warnings)
    heads = out.getvalue().splitlines()[2]
    assert "θ 0.70" in heads
    assert "θ 0.95" not in heads


def test_the_last_words_of_a_page_say_what_to_do_next(page: str) -> None:
    last = html.unescape(page).rpartition("<h2>")[2]
    assert "ray-app promote 'runs/<b>one</b>'" in last
    result, cosines = made_up(lift=-0.1, strategy="lightweight")
    assert "try next: ray-app train --strategy conv" in report_page(result, cosines).rpartition("<h2>")[2]


def test_points_and_bars_show_their_values_where_the_pointer_is(page: str) -> None:
    titles = re.findall(r"<rect [^>]*><title>([^<]+)</title>", page)
    result, _ = made_up()
    rate = 100 * result["cosine_accept_rate"]["0.80"]
    assert any(re.match(rf"adapter: 0\.80*, {rate:.0f}", title) for title in titles), titles[:5]
    assert any(re.match(r"0\.\d+ to 0\.\d+: \d+$", title) for title in titles)


def test_on_a_phone_a_report_is_no_longer_than_a_few_screens(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    assert_opens(tmp_path / "report.html", most_height=6000)
