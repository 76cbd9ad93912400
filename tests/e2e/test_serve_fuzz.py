"""A short run of benchmarks/serve/fuzz.py: whatever is sent, there is an answer in JSON, never 5xx, never silence."""

import random
from collections.abc import Iterator

import pytest
from endpoints import SHAPE, WIDTH, LocalServer, local_server, make_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(make_checkpoint(tmp_path_factory.mktemp("fuzz") / "checkpoint", shape=SHAPE)) as it:
        yield it


def test_no_mutation_of_a_binary_request_breaks_it(server: LocalServer) -> None:
    from benchmarks.serve.fuzz import by_mutations

    found = by_mutations(f"http://{server.url}", WIDTH, 400, seed=7)
    assert found["findings"] == []
    assert found["codes"]["200"] > 20
    assert len(found["by_mutation"]) > 15


def test_no_request_of_its_own_openapi_breaks_it(server: LocalServer) -> None:
    from benchmarks.serve.fuzz import by_openapi

    cases = 20
    found = by_openapi(f"http://{server.url}", WIDTH, cases)
    assert not [failure for operation in found.values() for failure in operation["failures"]]
    assert all(operation["cases"] >= cases for operation in found.values())
    infer, version = "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}"
    for answered in ("POST /v1/verify", f"POST {infer}", f"POST {version}/infer", f"GET {version}/ready"):
        assert found[answered]["codes"]["200"] >= 2, answered
    assert found["POST /v1/verify"]["codes"]["422"] >= 2


def test_a_good_draft_is_answered_and_a_mutation_is_the_same_for_a_seed(server: LocalServer) -> None:
    from benchmarks.serve.mutations import good, mutated, send

    for seed in range(20):
        assert (
            send(("127.0.0.1", server.port), "/v2/models/alignment-adapter/infer", good(WIDTH, random.Random(seed)))[
                0
            ]
            == 200
        )
        (one, a), (two, b) = (mutated(WIDTH, random.Random(seed)) for _ in range(2))
        assert (one, a.bytes()) == (two, b.bytes())
