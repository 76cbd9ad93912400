"""Open 10,000 spoiled files of each kind: no process dies, memory and time stay within bounds, every refusal is ours.

    python -m benchmarks.data.fuzz_readers

The bounds: no more memory than four times the file and 64 MiB, no more than a second of CPU for a megabyte (or less).
Each kind is read in a process of its own; one that dies is a finding, and another continues behind the file.
Recordings and images are read as the endpoint's decoders do. Writes benchmarks/results/fuzz_readers.json.
"""

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.spoiled import MAKERS, json_text, spoil_bytes, spoil_tree, spoiled_pickle
from benchmarks.provenance import require_commit, save
from ray_app.cli_settings import parse, read_yaml
from ray_app.command_table import COMMANDS
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.errors import RayAppError
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries
from ray_app.runs.run_dir import RUN, run_metadata
from ray_app.sources.dsec.layout import read_rig
from ray_app.sources.eventgpt.clips import listed_clips
from ray_app.store.atomic import CHECKSUMS_FILE
from ray_app.store.checkpoint import load_checkpoint, replay_golden, save_checkpoint
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import MANIFEST, Features, FeatureSpec, Manifest
from ray_app.store.reference_checkpoint import read_reference_checkpoint
from ray_app.store.traces import read_timing, read_traces
from serve.decoding.decoder import decode
from serve.decoding.job import DecodeJob
from serve.model.evaluation_record import read_evaluation_record
from serve.model.loaded_model import require_provenance
from serve.protocol.errors import ApiError
from serve.protocol.inputs import parse_request
from serve.protocol.open_inference import Limits, parse_infer
from serve.protocol.schemas import AlignRequest

MIB = 2**20
MEMORY_FACTOR, MEMORY_ROOM = 4, 64 * MIB
SECONDS_PER_MB = 1.0
SPEC = FeatureSpec(dtype="float32", shape=(12,), scale=1.0)
LIMITS = Limits(Features(event=SPEC, target=SPEC), max_batch=32, max_json_bytes=16 * MIB)
REFUSALS = (RayAppError, ApiError)
"""Exceptions of a reader that say what is wrong; any other is a finding."""


class Readers:
    """Makes an example of a kind and reads it, in a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "example"
        self.checkpoint = folder / "checkpoint"
        adapter = build_adapter(AdapterConfig("bottleneck", SPEC.width, SPEC.width, hidden_dim=4), 0)
        val = {"cosine_accept_rate": {"0.80": 0.5}, "percentiles": {"P5": 0.1, "P95": 0.9}}
        provenance = {"argv": ["ray-app"], "run": "drive", "dataset_fingerprint": "f" * 64}
        save_checkpoint(
            self.checkpoint, adapter, metrics={"val": val}, provenance=provenance, features=LIMITS.features
        )
        self.intact = {path.name: path.read_bytes() for path in self.checkpoint.iterdir()}
        out = io.BytesIO()
        torch.save({"config": {"event_dim": 4}, "model_state_dict": {"scale": torch.ones(1)}, "losses": [0.5]}, out)
        self.torch_file = out.getvalue()

    def prepare(self, kind: str, rng: random.Random) -> tuple[int, Callable[[], Any]]:
        """Return an example's size, and the function that reads it."""
        if kind in MAKERS:
            data = MAKERS[kind](rng)
            return len(data), self._reader_of_bytes(kind, data, rng)
        return self._checkpoint(rng) if kind == "checkpoints" else self._json(rng)

    def _reader_of_bytes(self, kind: str, data: bytes, rng: random.Random) -> Callable[[], Any]:
        if kind == "recordings":
            return lambda: decode(DecodeJob("recording", 224, 224), data)
        if kind == "images":
            return lambda: decode(DecodeJob("image", 224, 224), data)
        self.file.write_bytes(data)
        if kind == "yaml":
            readers: list[Callable[[], Any]] = [
                lambda: read_yaml(self.file),
                lambda: parse("tune", COMMANDS["tune"], self.file, []),
                lambda: read_rig(self.file),
            ]
            return rng.choice(readers)
        return lambda: read_traces(self.file, 32_000, 2)

    def _json(self, rng: random.Random) -> tuple[int, Callable[[], Any]]:
        """Requests of both protocols, and documents of folders."""
        rows = [[round(rng.random(), 3) for _ in range(12)] for _ in range(rng.choice((1, 8)))]
        inputs = [{"name": "event", "shape": [len(rows), 12], "datatype": "FP32", "data": rows}]
        clip = {"id": 1, "event_data": "drive/1.npy", "event_image": [f"drive/1_{i}.png" for i in range(5)]}
        kinds: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
            "v1": (
                {"event": rows, "theta": 0.5, "return": ["aligned"], "id": "a"},
                lambda data: parse_request(memoryview(data), AlignRequest),
            ),
            "v2": (
                {"inputs": inputs, "outputs": [{"name": "aligned"}], "parameters": {"theta": 0.5}},
                lambda data: parse_infer(memoryview(data), None, LIMITS),
            ),
            "clips": ([clip] * 3, lambda _: listed_clips(self.file, 5)),
            "run": ({"key": "a", "config": {"store": "s"}}, lambda _: run_metadata(open_storage(self.folder))),
            "manifest": (
                {"format": "ray_app pair store", "version": 1, "pairs": 1, "source": {"a": 1}, "checksum": ""},
                lambda _: Manifest.read(self.folder),
            ),
            "timing": ({"target_prefill": 1.0, "target_per_token": 2.0}, lambda _: read_timing(self.file)),
            "log": ({"kind": "step", "global_step": 1, "loss": 0.5}, self._read_log),
        }
        name = rng.choice(list(kinds))
        tree, read = kinds[name]
        data = json_text(spoil_tree(tree, rng), rng)
        (self.folder / {"run": RUN, "manifest": MANIFEST}.get(name, "example")).write_bytes(data)
        return len(data), lambda: read(data)

    def _read_log(self, data: bytes) -> Any:
        """Read a line whose checksum holds."""
        (self.folder / EVENT_LOG).unlink(missing_ok=True)
        with EventLog(self.folder) as log:
            log.write("run_started", time=0.0)
        body = data.replace(b"\n", b" ")
        (self.folder / EVENT_LOG).write_bytes(b'%s, "crc": "%08x"}\n' % (body[:-1], zlib.crc32(body[:-1] + b"}")))
        return entries(self.folder)

    def _checkpoint(self, rng: random.Random) -> tuple[int, Callable[[], Any]]:
        """Files of a checkpoint whose sums hold, and `.pt` files of the reference."""
        if rng.random() < 0.2:
            data = self._torch(rng)
            self.file.write_bytes(data)
            return len(data), lambda: read_reference_checkpoint(self.file)
        files = dict(self.intact)
        name = rng.choice(sorted(files))
        if name.endswith(".json"):
            files[name] = json_text(spoil_tree(json.loads(files[name]), rng), rng)
        elif name.endswith(".safetensors") and rng.random() < 0.6:
            size = int.from_bytes(files[name][:8], "little")
            header = json_text(spoil_tree(json.loads(files[name][8 : 8 + size]), rng), rng)
            files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + size :]
        else:
            files[name] = spoil_bytes(files[name], rng)
        if name != CHECKSUMS_FILE:
            sums = {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n != CHECKSUMS_FILE}
            files[CHECKSUMS_FILE] = "".join(f"{sums[n]}  {n}\n" for n in sorted(sums)).encode()
        for file, data in files.items():
            (self.checkpoint / file).write_bytes(data)
        return sum(map(len, files.values())), self._load

    def _torch(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return spoil_bytes(self.torch_file, rng)
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.torch_file)) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, spoiled_pickle(data, rng) if name.endswith("/data.pkl") else data)
        return out.getvalue()

    def _load(self) -> None:
        """Everything that happens before a checkpoint is served, but the preparation of its layers."""
        checkpoint = load_checkpoint(self.checkpoint)
        replay_golden(checkpoint)
        require_provenance(checkpoint)
        read_evaluation_record("it", None, checkpoint.metrics)


CHILD = ("-m", "benchmarks.data.fuzz_readers", "--child")
"""Arguments of Python for a process that reads."""
KINDS = (*MAKERS, "json", "checkpoints")


def status_kib(name: str) -> int:
    """One of this process's sizes, such as VmRSS."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0])


def measured(read: Callable[[], Any], size: int) -> dict[str, Any]:
    """Read an example; returns outcome, seconds, bytes, and a finding where it broke a bound or raised else.

    What breaks a bound is read again and judged by that, since a first reading may pay for imports of any thread.
    """
    found = _measured(read, size)
    return _measured(read, size) if found["finding"] and found["outcome"] != "raised" else found


def _measured(read: Callable[[], Any], size: int) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = status_kib("VmRSS"), time.process_time()
    outcome, finding = "read", ""
    try:
        read()
    except REFUSALS:
        outcome = "refused"
    except Exception:
        outcome, finding = "raised", traceback.format_exc(limit=-4)
    seconds = time.process_time() - started
    grown = (status_kib("VmHWM") - before) * 1024
    if seconds > SECONDS_PER_MB * max(1.0, size / 1e6):
        finding = finding or f"{seconds:.2f} s for {size:,} bytes"
    if grown > MEMORY_FACTOR * size + MEMORY_ROOM:
        finding = finding or f"{grown / MIB:.0f} MiB for {size:,} bytes"
    return {"outcome": outcome, "seconds": seconds, "grown": grown, "size": size, "finding": finding}


def child(kind: str, first: int, last: int, seed: int) -> None:
    """Read examples one after the other; a line of JSON before and after each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        readers = Readers(Path(scratch))
        for number in range(first, last):
            print(json.dumps({"number": number}), flush=True)
            size, read = readers.prepare(kind, random.Random(f"{seed} {kind} {number}"))
            print(json.dumps(measured(read, size)), flush=True)


@dataclass
class Totals:
    """Results of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_s_per_mb: float = 0.0
    most_mib: float = 0.0
    deaths: int = 0

    def add(self, number: int, result: dict[str, Any]) -> None:
        self.outcomes[result["outcome"]] += 1
        self.seconds += result["seconds"]
        self.slowest_s_per_mb = max(self.slowest_s_per_mb, result["seconds"] / max(1.0, result["size"] / 1e6))
        self.most_mib = max(self.most_mib, (result["grown"] - MEMORY_FACTOR * result["size"]) / MIB)
        if result["finding"]:
            self.findings.append(f"example {number}: {result['finding']}")


def fuzz(kind: str, count: int, seed: int = 0) -> Totals:
    """Read `count` examples of a kind in processes of their own."""
    totals, number = Totals(), -1
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    while number + 1 < count:
        words = [kind, str(number + 1), str(count), str(seed)]
        command = [sys.executable, *CHILD, *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout
            for line in process.stdout:
                result = json.loads(line)
                if "number" in result:
                    number = result["number"]
                else:
                    totals.add(number, result)
                    if (number + 1) % 500 == 0:
                        print(f"{kind}: {number + 1} of {count}", file=sys.stderr, flush=True)
        if process.returncode:
            totals.deaths += 1
            totals.findings.append(f"example {number}: the process died with {process.returncode}")
            if totals.deaths > 20 or number < 0:
                break
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    if args.child:
        kind, first, last, seed = args.child
        child(kind, int(first), int(last), int(seed))
        return
    require_commit()
    found = {}
    with ThreadPoolExecutor(args.processes) as threads:
        all_totals = list(threads.map(lambda kind: fuzz(kind, args.count, args.seed), args.kinds))
    for kind, totals in zip(args.kinds, all_totals, strict=True):
        print(kind, totals.outcomes, totals.findings[:20], file=sys.stderr, flush=True)
        found[kind] = {
            "examples": sum(totals.outcomes.values()) + totals.deaths,
            "outcomes": dict(totals.outcomes),
            "deaths": totals.deaths,
            "findings": totals.findings[:20],
            "num_findings": len(totals.findings),
            "cpu_seconds": round(totals.seconds, 1),
            "most_seconds_for_a_megabyte": round(totals.slowest_s_per_mb, 3),
            "most_mib_beyond_four_times_the_file": round(totals.most_mib, 1),
        }
    save("fuzz_readers", {"seed": args.seed, "kinds": found})


if __name__ == "__main__":
    main()
