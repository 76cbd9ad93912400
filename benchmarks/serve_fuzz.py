"""Whatever is sent to the endpoint: an answer in JSON, never 5xx, never silence, and it goes on.

    python benchmarks/serve_fuzz.py

Two ways. schemathesis draws requests from the endpoint's own OpenAPI document, such as fit it and such as do not, and
holds the answers against it. Seeded mutations spoil binary requests (`serve_mutations.py`); after each the endpoint
is asked whether it is ready. Writes benchmarks/results/serve_fuzz.json.
"""

import argparse
import base64
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from provenance import save
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_mutations import mutated, send
from serve_process import answers, checkpoint_of, endpoint, tree

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SHAPE, WIDTH = (3, 16, 16), 768
TIMEOUT_S = 20.0


def by_openapi(base: str, width: int, cases: int) -> dict[str, Any]:
    """`cases` requests for each operation, half of them such as its schema forbids; or all that there are.

    No schema makes features of the right width: in half of the allowed ones they are put there, so that the rest of
    the request comes to be answered.
    """
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    found: dict[str, Any] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        codes: Counter[str] = Counter()
        failures: list[str] = []
        for mode in GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                run_cases(base, strategy, cases // 2, codes, failures, width if mode.is_positive else 0)
            except Exception as error:  # an operation without anything to spoil has no such strategy
                if "Unsatisfiable" not in type(error).__name__ and "negative" not in str(error).lower():
                    raise
        found[operation.label] = {
            "cases": sum(codes.values()),
            "codes": dict(sorted(codes.items())),
            "failures": failures,
        }
    return found


def run_cases(base: str, strategy: Any, cases: int, codes: Counter[str], failures: list[str], width: int) -> None:
    """Sends what the strategy draws; a failure is noted and the next one sent."""
    turn = itertools.count()

    @given(case=strategy)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def once(case: Case) -> None:
        if width and isinstance(case.body, dict) and next(turn) % 2:
            feature = {"data": base64.b64encode(bytes(range(1, 193)) * (width // 192)).decode(), "datatype": "UINT8"}
            sides = [side for side in ("event", "target") if case.body.get(side) is not None]
            case.body |= {side: {**feature, "shape": [1, width]} for side in sides}
        try:
            response = case.call(timeout=TIMEOUT_S)
        except requests.Timeout:
            codes["hang"] += 1
            failures.append(f"no answer within {TIMEOUT_S} s: {case.as_curl_command()[:500]}")
            return
        codes[str(response.status_code)] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            if len(failures) < 50:
                words = "; ".join(str(error) for error in group.exceptions)
                failures.append(f"{words[:600]} | {case.as_curl_command()[:600]}")
        if response.status_code >= 500 and not answers(f"{base}/v2/health/ready"):
            failures.append("not ready afterwards")

    once()


def by_mutations(base: str, width: int, cases: int, seed: int) -> dict[str, Any]:
    """Spoiled binary requests: codes by mutation, and every finding."""
    parts = urlsplit(base)
    address = (str(parts.hostname), int(parts.port or 80))
    path = "/v2/models/alignment-adapter/infer"
    rng = random.Random(seed)
    codes: dict[str, Counter[str]] = {}
    findings: list[str] = []
    for number in range(cases):
        name, draft = mutated(width, rng)
        status, body = send(address, path, draft, TIMEOUT_S)
        codes.setdefault(name, Counter())[str(status)] += 1
        if flaw := wrong(status, body, draft.refuse, gone=draft.cut is not None):
            findings.append(f"{number} {name}: {flaw}")
        if not answers(f"{base}/v2/health/ready"):
            findings.append(f"{number} {name}: not ready afterwards")
    total = sum(codes.values(), Counter())
    return {
        "cases": cases,
        "seed": seed,
        "codes": dict(sorted(total.items())),
        "by_mutation": {name: dict(sorted(counts.items())) for name, counts in sorted(codes.items())},
        "findings": findings[:50],
        "num_findings": len(findings),
    }


def wrong(status: int, body: bytes, refuse: bool, gone: bool) -> str | None:
    """What an answer should not be. `gone`: the caller closed its side, so that none need come."""
    if status == -1:
        return "a hang"
    if status == 0:
        return None if gone else "no answer"
    if status >= 500 and status != 504:  # 504: the request asked for 1 ms
        return f"{status} {body[:300]!r}"
    if status == 400 and body.startswith(b"<html>"):
        return None  # no HTTP at all, refused by HAProxy before it came to us
    if status == 200:
        return "answered, though it should be refused" if refuse else None
    try:
        document = json.loads(body)
    except ValueError:
        return f"{status} is not in JSON: {body[:200]!r}"
    return None if isinstance(document.get("error"), str) else f"{status} has no 'error': {body[:200]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="requests for each operation")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(Path(folder) / "checkpoint", WIDTH, 8, shape=SHAPE)
        with endpoint(checkpoint) as (base, process):
            began, memory = time.monotonic(), sum(p.memory_info().rss for p in tree(process))
            operations = by_openapi(base, WIDTH, args.cases)
            mutations = by_mutations(base, WIDTH, args.mutations, args.seed)
            grown = sum(p.memory_info().rss for p in tree(process)) - memory
    codes = Counter[str]()
    for found in [*operations.values(), mutations]:
        codes.update(found["codes"])
    save(
        "serve_fuzz",
        {
            "seconds": round(time.monotonic() - began, 1),
            "cases": sum(codes.values()),
            "answers_5xx": sum(n for code, n in codes.items() if code.startswith("5") and code != "504"),
            "hangs": codes["hang"] + codes["-1"],
            "failures": sum(len(found["failures"]) for found in operations.values()) + mutations["num_findings"],
            "memory_grown_mib": round(grown / 2**20, 1),
            "operations": operations,
            "mutations": mutations,
        },
    )


if __name__ == "__main__":
    main()
