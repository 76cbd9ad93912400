"""The dashboard asks for metrics that the endpoint has, by labels that they bear."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import INFER, WIDTH, binary_request, local_server, make_checkpoint
from numpy import full

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "deploy/grafana/alignment.json").read_text())
QUERIES: list[str] = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
QUERIES += [note["expr"] for note in DASHBOARD["annotations"]["list"]]


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_server(make_checkpoint(tmp_path_factory.mktemp("grafana") / "checkpoint")) as server:
        body, headers = binary_request(full((1, WIDTH), 0.5))
        assert server.ask("POST", INFER, body, headers)[0] == 200
        assert server.json("POST", "/v1/verify", {"event": [[0.5] * WIDTH], "target": [[0.5] * WIDTH]})[0] == 200
        assert server.ask("POST", INFER, b"{}")[0] == 400
        server.ask("POST", "/v1/reload", b"")
        yield server.ask("GET", "/metrics")[2].decode()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_finds_its_metrics_and_labels(exposition: str, query: str) -> None:
    series = re.findall(r"(align_\w+)(?:\{(.*?)\})?(?=[\[)\s*]|$)", query.replace("{model}", "MODEL"))
    assert series
    for name, matchers in series:
        (sample,) = re.findall(rf"^{name}(?:\{{(.*)\}})? \S+$", exposition, re.MULTILINE)[:1] or [None]
        assert sample is not None, f"{name} is not in /metrics"
        for label in re.findall(r"(\w+)[=!]~?\"", matchers):
            assert f'{label}="' in sample
    for by in re.findall(r"by \((.*?)\)", query):
        for label in by.split(", "):
            assert f'{label}="' in exposition


def test_every_panel_says_what_it_shows_and_where_it_is() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) >= 12
    cells = {
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    }
    assert len(cells) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in panels)  # none over another
    assert all(panel["targets"] for panel in panels)
