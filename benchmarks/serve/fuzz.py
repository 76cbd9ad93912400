"""Send anything to the endpoint: it answers in JSON, never with 5xx or silence, and keeps answering.

    python -m benchmarks.serve.fuzz

Three ways. schemathesis draws requests from the endpoint's own OpenAPI document, such as fit it and such as do not,
and holds the answers against it; where an operation takes too little for that, request lines and headers are drawn.
Seeded mutations spoil binary requests (`serve_mutations.py`); after each the endpoint is asked whether it is ready.
Writes benchmarks/results/serve_fuzz.json.
"""

import argparse
import base64
import http.client
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.provenance import require_commit, save
from benchmarks.serve.mutations import good, mutated, send
from benchmarks.serve.process import answers, checkpoint_of, endpoint, tree

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODEL = "alignment-adapter"
SHAPE, WIDTH = (3, 16, 16), 768
TIMEOUT_S = 20.0
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "BREW", "get")
LINES: tuple[tuple[str, str], ...] = (
    ("accept", "text/html"), ("accept", "\t/;;"), ("accept-encoding", "gzip, br;q=x"), ("authorization", "Bearer "),
    ("authorization", "Basic Og=="), ("content-encoding", "gzip"), ("content-type", "text/plain"), ("cookie", "a"),
    ("expect", "nothing"), ("host", "evil.example"), ("host", ""), ("if-none-match", "*"), ("origin", "null"),
    ("inference-header-content-length", "-1"), ("range", "bytes=0-0"), ("sec-fetch-site", "cross-site"),
    ("traceparent", "00-zz"), ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("upgrade", "websocket"),
    ("x-forwarded-for", "::1"), ("x-http-method-override", "DELETE"), ("x-request-id", "e" * 60),
    ("x-request-id", "a" * 5000), ("x-request-timeout-ms", "-5"), ("x-request-timeout-ms", "nan"),
    ("x-request-timeout-ms", "0"), ("x-request-timeout-seconds", "1"),
)  # fmt: skip
"""Headers that somebody on the way, or we ourselves, read."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Add what no schema says, so that some drawn requests can be answered."""

    base: str
    """The endpoint's address."""
    width: int
    """Of its features."""
    version: str
    """Of the model in service."""


def by_openapi(base: str, width: int, cases: int) -> dict[str, Any]:
    """`cases` requests for each operation: half such as its schema allows, half such as it forbids.

    An operation that takes next to nothing has few of them; what is left is asked with any headers, query, method and
    body (`by_lines`).
    """
    about = requests.get(f"{base}/v2/models/{MODEL}", timeout=TIMEOUT_S).json()
    facts = Facts(base, width, about["versions"][0])
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    found: dict[str, Any] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        codes: Counter[str] = Counter()
        failures: list[str] = []
        for mode in GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                run_cases(strategy, cases // 2, codes, failures, facts, allowed=mode.is_positive)
            except Exception as error:  # an operation without anything to spoil has no such strategy
                if "Unsatisfiable" not in type(error).__name__ and "negative" not in str(error).lower():
                    raise
        by_schema = sum(codes.values())
        documented = {int(code) for code in operation.definition.raw["responses"]}
        rng = random.Random(operation.label)
        by_lines(facts, operation.method, operation.path, documented, cases - by_schema, rng, codes, failures)
        found[operation.label] = {
            "cases": sum(codes.values()),
            "cases_of_schema": by_schema,
            "codes": dict(sorted(codes.items())),
            "failures": failures,
        }
    return found


def run_cases(
    strategy: Any, cases: int, codes: Counter[str], failures: list[str], facts: Facts, allowed: bool
) -> None:
    """Send what the strategy draws; a failure is noted and the next one sent."""
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
        number = next(turn)
        if number % 2:
            make_true(case, facts)
            if allowed and number % 4 == 1:
                make_answerable(case, facts, random.Random(number))
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
        if response.status_code >= 500 and not answers(f"{facts.base}/v2/health/ready"):
            failures.append("not ready afterwards")

    once()


def make_true(case: Case, facts: Facts) -> None:
    """Return the model and the version that are in service."""
    for name, value in (("model", MODEL), ("version", facts.version)):
        if name in case.path_parameters:
            case.path_parameters[name] = value


def make_answerable(case: Case, facts: Facts, rng: random.Random) -> None:
    """Features of the right width, which no schema makes; the rest of the request stays."""
    width = facts.width
    if case.path.endswith("/infer"):
        if isinstance(case.body, dict):
            data = [round(rng.random(), 3) for _ in range(width)]
            item = {"shape": [1, width], "datatype": "FP32", "data": data}
            case.body["inputs"] = [{"name": name, **item} for name in ("event", "target")]
        else:
            headers, body = good(width, rng).bytes()
            case.headers = {**(case.headers or {}), **headers}
            case.body = body
    elif isinstance(case.body, dict):
        feature = {"data": base64.b64encode(bytes(range(1, 193)) * (width // 192)).decode(), "datatype": "UINT8"}
        sides = [side for side in ("event", "target") if case.body.get(side) is not None]
        case.body |= {side: {**feature, "shape": [1, width]} for side in sides}


def by_lines(
    facts: Facts,
    method: str,
    path: str,
    documented: set[int],
    cases: int,
    rng: random.Random,
    codes: Counter[str],
    failures: list[str],
) -> None:
    """Any headers, query, method and body at an operation's path; nine in ten with its own method."""
    for _ in range(cases):
        own = rng.random() < 0.9
        used = method.upper() if own else rng.choice(METHODS)
        names = (MODEL, facts.version) if rng.random() < 0.5 else (quote(text(rng)) or "-", quote(text(rng)) or "-")
        target = path.replace("{model}", names[0]).replace("{version}", names[1])
        if rng.random() < 0.5:
            target += f"?{urlencode([(text(rng), text(rng)) for _ in range(rng.randrange(5))])}"
        headers = [
            rng.choice(LINES) if rng.random() < 0.7 else (token(rng), text(rng)) for _ in range(rng.randrange(6))
        ]
        body = rng.randbytes(rng.randrange(2000)) if rng.random() < 0.3 else None
        status, answer = ask(facts.base, used, target, headers, body)
        codes[{-1: "hang"}.get(status, str(status))] += 1
        flaw = wrong(status, answer, refuse=False, gone=False) if used != "HEAD" or status < 1 else None
        if own and status not in documented | {400, 404, 405, 431}:
            flaw = flaw or f"{status} is not documented"
        if flaw and len(failures) < 50:
            failures.append(f"{flaw} | {used} {target[:200]} {headers}"[:1000])


def ask(base: str, method: str, target: str, headers: list[tuple[str, str]], body: bytes | None) -> tuple[int, bytes]:
    """(status, body) of the answer; status 0 where the connection ended without one, −1 where none came in time."""
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=TIMEOUT_S)
    try:
        connection.putrequest(method, target, skip_host="host" in dict(headers), skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value.encode("latin-1"))
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        return -1, b""
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def text(rng: random.Random) -> str:
    """Of what a header's value may hold."""
    kind = rng.choice((range(33, 127), range(48, 58), (*range(33, 127), 32, *range(160, 256))))
    return "".join(chr(rng.choice(kind)) for _ in range(rng.choice((0, 1, 3, 12, 200)))).strip()


def token(rng: random.Random) -> str:
    """Return a header's name."""
    return "x-" + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789-_") for _ in range(rng.randint(1, 40)))


def by_mutations(base: str, width: int, cases: int, seed: int) -> dict[str, Any]:
    """Spoiled binary requests: codes by mutation, and every finding."""
    parts = urlsplit(base)
    address = (str(parts.hostname), int(parts.port or 80))
    path = f"/v2/models/{MODEL}/infer"
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
    """Return what is wrong with an answer, if anything. `gone`: the caller closed its side, so none is needed."""
    if status == -1:
        return "a hang"
    if status == 0:
        return None if gone else "no answer"
    if status >= 500 and status != 504:  # 504: the request asked for 1 ms
        return f"{status} {body[:300]!r}"
    if status == 400 and body.startswith((b"<html>", b"Invalid HTTP request received.")):
        return None  # no HTTP at all, refused by HAProxy or the HTTP server before it came to us
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
    require_commit()
    main()
