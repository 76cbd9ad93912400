"""Memory of a replica under odd requests.

    python -m benchmarks.serve.memory

The endpoint without Ray (a process of its own, the same code behind uvicorn) is sent seeded requests to `/v1`:
numbers, pictures and recordings, whole, damaged and too many. Once with as many malloc arenas as glibc makes, once
with two, as `ray-app serve` sets it: a leak would grow in both. Writes benchmarks/results/serve_memory.json.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.provenance import ROOT, require_commit, save

SERVER = (
    "import benchmarks, sys, pathlib, torch; torch.set_num_threads(1)\n"
    "from endpoints import local_server, make_checkpoint\n"
    "import logging, tempfile; logging.disable()\n"
    "with local_server(make_checkpoint(pathlib.Path(tempfile.mkdtemp()) / 'checkpoint')) as it:\n"
    "    print(it.port, flush=True); sys.stdin.read()\n"
)
WIDTH = 768
ENCODINGS = ("json", "base64", "png", "none such")
WANTED = ("aligned", "event_image", "aligned_image", "target_image", "none such")


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(rows: int, columns: int) -> str:
    out = io.BytesIO()
    pixels = np.random.default_rng(rows * columns).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return text_of(out.getvalue())


def recording(events: int) -> str:
    rng, out = np.random.default_rng(events), io.BytesIO()
    x, y = (rng.integers(0, size, events).astype(np.uint16) for size in (64, 48))
    t, p = np.sort(rng.integers(0, 10**6, events)), rng.integers(0, 2, events).astype(np.uint8)
    np.save(out, {"x": x, "y": y, "t": t, "p": p}, allow_pickle=True)  # type: ignore[arg-type]
    return text_of(out.getvalue())


PICTURES = [picture(*size) for size in ((16, 16), (480, 640), (1, 1), (1000, 1000))]
RECORDINGS = [recording(events) for events in (0, 10, 5_000, 50_000)]


def odd_input(rng: random.Random) -> Any:
    """Return something to send instead of features."""
    size = {"width": 64, "height": 48}
    pixels = {"data": text_of(bytes(range(1, 193)) * 4), "datatype": "UINT8", "shape": [1, WIDTH]}
    kind = rng.randrange(10)
    if kind == 0:
        return [[rng.random() for _ in range(WIDTH)] for _ in range(rng.choice([1, 4, 40]))]
    return [
        {"png": rng.choice(PICTURES)},
        {"png": rng.choice(PICTURES)[: rng.randrange(400)]},
        {"recording": rng.choice(RECORDINGS), **size},
        {"recording": rng.choice(RECORDINGS)[: rng.randrange(2000)], **size},
        pixels,
        [[1, 2]],
        "x" * rng.randrange(5000),
        None,
        {"a": [[[]]]},
    ][kind - 1]


def odd_request(rng: random.Random) -> dict[str, Any]:
    """Return a document for /v1/align or /v1/verify."""
    document = {"event": odd_input(rng)}
    if rng.random() < 0.5:
        document["target"] = odd_input(rng)
    if rng.random() < 0.5:
        document["return"] = rng.sample(WANTED, rng.randrange(1, 4))
    if rng.random() < 0.3:
        document["encoding"] = rng.choice(ENCODINGS)
    if rng.random() < 0.2:
        document["x" * rng.randrange(1000)] = 1
    return document


def memory(requests: int, arenas: int | None) -> dict[str, Any]:
    """Memory of one server while it answers so many."""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {"MALLOC_ARENA_MAX": str(arenas)} if arenas else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment, cwd=ROOT, **pipes)  # type: ignore[call-overload]
    connection = http.client.HTTPConnection("127.0.0.1", int(server.stdout.readline()), timeout=30)
    process, rng, codes, samples = psutil.Process(server.pid), random.Random(0), Counter[str](), []
    for number in range(requests + 1):
        if number % 250 == 0:
            mib = round(process.memory_info().rss / 2**20, 1)
            samples.append({"requests": number, "rss_mib": mib, "fds": process.num_fds()})
            print(arenas, samples[-1], file=sys.stderr, flush=True)
        route = rng.choice(["/v1/align", "/v1/verify"])
        connection.request("POST", route, json.dumps(odd_request(rng)), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        codes[str(answer.status)] += 1
    server.stdin.close()
    server.wait(30)
    return {"arenas": arenas or "glibc's own number", "codes": dict(sorted(codes.items())), "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    args = parser.parse_args()
    runs = [memory(args.requests, arenas) for arenas in (None, 2)]
    save("serve_memory", {"requests": args.requests, "runs": runs, "wanted": "flat with two arenas"})


if __name__ == "__main__":
    require_commit()
    main()
