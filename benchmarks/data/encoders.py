"""Encoding a store with MobileNetV2, and reading the video tower of a checkpoint of 7 billion weights.

    ray-app demo fetch mobilenet_v2
    ray-app prepare scenes --num-pairs 1020 --num-sequences 60 --out stores/scenes
    python -m benchmarks.data.encoders --store stores/scenes

The first part encodes both sides of every pair in this process, with one thread, and counts its processor seconds.
The second does so on Ray with 1, 2 and 4 workers, and once while ten workers are killed, one with each finished file,
and compares the bytes. The third writes a checkpoint of Video-LLaVA's shapes and index with holes for weights, which
take no place on the disk, and loads the video tower in a process of its own. Writes benchmarks/results/encoders.json.
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import psutil

from benchmarks.provenance import require_commit, save
from ray_app.cluster.connection import cluster
from ray_app.commands.demo.command import cache_folder
from ray_app.commands.encode.command import run_encode
from ray_app.commands.encode.source import StoreSource
from ray_app.commands.prepare.encoding import FeatureEncoder, encoding_plan
from ray_app.commands.prepare.store_builder import build_task, claim_store, finish
from ray_app.config.prepare import EncodeConfig
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.registry import load_encoder
from ray_app.encoders.weights import INDEX, ModelWeights, update_digest
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import PIXELS, SCRATCH, Manifest

SHARD_BYTES = 5 * 10**9
BFLOAT16_BYTES = 2
NUM_KILLS = 10
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 224,
    "patch_size": 14,
}


def encoded(store: str, out: Path) -> dict[str, Any]:
    """Encode a store; processor seconds of all of it and of the forward passes, and the size of what comes out."""
    cfg, folder = settings(store, out), open_storage(store)
    source = StoreSource(folder, Manifest.read(folder))
    plan = encoding_plan(cfg, PIXELS)
    assert plan
    encoder = ForwardClock(FeatureEncoder(plan))
    claim_store(out, source, source.tasks(), plan.features)
    began, cpu_began = time.perf_counter(), time.process_time()
    built = [build_task(source, task, out, plan.features, encoder) for task in source.tasks()]
    cpu_s, wall_s = time.process_time() - cpu_began, time.perf_counter() - began
    manifest = finish(out, source, built, plan.features, 0.0)
    return {
        "pairs": manifest.pairs,
        "images": 2 * manifest.pairs,
        "feature": list(plan.features.event.shape),
        "cpu_seconds": round(cpu_s, 2),
        "forward_cpu_seconds": round(encoder.cpu_s, 2),
        "forward_fraction": round(encoder.cpu_s / cpu_s, 4),
        "wall_seconds": round(wall_s, 2),
        "store_mb": round(sum(file.bytes for file in manifest.files) / 1e6, 2),
        "pixels_mb": round(sum(file.bytes for file in source.manifest.files) / 1e6, 2),
    }


def settings(store: str, out: Path, num_workers: int = 0) -> EncodeConfig:
    model = cache_folder() / "mobilenet_v2"
    sides = {"event_encoder": model, "target_encoder": model, "pool": ("3x3",)}
    return EncodeConfig.model_validate({"store": store, "out": str(out), "num_workers": num_workers, **sides})


def same_bytes(store: str, scratch: Path) -> dict[str, Any]:
    """SHA-256 of all bytes of the store that each number of workers makes, and of one whose workers are killed."""
    digests: dict[str, str] = {}
    with cluster(None):
        for num_workers in (1, 2, 4):
            run_encode(settings(store, out := scratch / f"workers-{num_workers}", num_workers))
            digests[f"{num_workers} workers"] = digest_of(out)
        done, killed = threading.Event(), list[int]()
        out = scratch / "killed"
        killer = threading.Thread(target=kill_workers, args=(out, done, killed))
        killer.start()
        try:
            run_encode(settings(store, out, 2))
        finally:
            done.set()
            killer.join()
        digests[f"{len(killed)} kills"] = digest_of(out)
    return {"sha256": digests, "kills": len(killed), "equal": len(set(digests.values())) == 1}


def digest_of(store: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(store.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def kill_workers(out: Path, done: threading.Event, killed: list[int]) -> None:
    """Kill a worker with each file that is finished, ten in all."""
    while not done.is_set() and len(killed) < NUM_KILLS:
        finished = len(list((out / SCRATCH).glob("*.json"))) - 1  # one has the settings
        if finished > len(killed) and (workers := encoding_workers()):
            workers[0].kill()
            killed.append(workers[0].pid)
        done.wait(0.05)


def encoding_workers() -> list[psutil.Process]:
    """Ray's processes that encode now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EncodingWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class ForwardClock:
    """A `FeatureEncoder` that counts the processor seconds of its forward passes."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self.encoder, self.num_pairs, self.cpu_s = encoder, encoder.num_pairs, 0.0
        encoder([])
        for model in encoder.models:
            model.encode_pixels = self.timed(model.encode_pixels)  # type: ignore[method-assign]

    def timed(self, call: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.process_time()
            result = call(*args)
            self.cpu_s += time.process_time() - began
            return result

        return run

    def __call__(self, pairs: Any) -> Any:
        return self.encoder(pairs)


def write_checkpoint(folder: Path) -> int:
    """Write a Video-LLaVA of 7 B in shards with holes for weights; returns the bytes of the video tower."""
    keys: dict[str, tuple[int, ...]] = {}
    for tower in ("video_tower.vision_model", "image_tower.vision_model"):
        keys |= {f"{tower}.{name}": shape for name, shape in tower_shapes().items()}
    keys |= {"multi_modal_projector.linear_1.weight": (4096, 1024), "multi_modal_projector.linear_1.bias": (4096,)}
    keys |= {"multi_modal_projector.linear_2.weight": (4096, 4096), "multi_modal_projector.linear_2.bias": (4096,)}
    keys |= {
        "language_model.model.embed_tokens.weight": (32064, 4096),
        "language_model.lm_head.weight": (32064, 4096),
    }
    for layer in range(32):
        at = f"language_model.model.layers.{layer}"
        keys |= {f"{at}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        keys |= {f"{at}.mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        keys |= {f"{at}.mlp.down_proj.weight": (4096, 11008)}
        keys |= {f"{at}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for key, shape in sorted(keys.items()):
        if sum(size(each) for each in shards[-1].values()) + size(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = shape
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_holes(folder / name, shard)
    files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(map(size, keys.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    config = {"model_type": "video_llava", "vision_config": VISION, "vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "default"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "VideoLlavaImageProcessor"}))
    return sum(size(shape) for key, shape in keys.items() if key.startswith("video_tower."))


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of CLIP's ViT-L/14 at 224."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**{key: v for key, v in VISION.items() if key != "model_type"}))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def size(shape: tuple[int, ...]) -> int:
    count = BFLOAT16_BYTES
    for side in shape:
        count *= side
    return count


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of zeros that takes no place on the disk."""
    head, place = {}, 0
    for key, shape in shapes.items():
        head[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size(shape)]}
        place += size(shape)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)


def memory() -> dict[str, int]:
    """Return the most memory that this process has held, and the pages of files that it has read, in bytes."""
    status = Path("/proc/self/status").read_text()
    return {name: int(status.partition(f"{name}:")[2].split()[0]) * 1024 for name in ("VmHWM", "RssFile")}


def load_tower(folder: Path) -> None:
    """Load the video tower as it is stored, and print what that took."""
    import torch

    from ray_app.encoders.library import transformers

    torch.set_num_threads(1)
    transformers().CLIPVisionModel  # noqa: B018  # what an import costs is not counted
    before, began = memory(), time.process_time()
    tensors = ModelWeights.of_folder(folder).read("video_tower.")
    update_digest(hashlib.sha256(), tensors)
    read = memory()
    del tensors
    load_encoder(folder, EncoderSettings(num_images=8, dtype="bfloat16"))
    after = memory()
    print(
        json.dumps(
            {
                "bytes_read": read["RssFile"] - before["RssFile"],
                "peak_bytes": after["VmHWM"] - before["VmHWM"],
                "cpu_seconds": round(time.process_time() - began, 2),
            }
        )
    )


def tower() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = write_checkpoint(Path(scratch))
        whole = sum(path.stat().st_size for path in Path(scratch).glob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.data.encoders", "--load-tower", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "checkpoint_bytes": whole,
        "tower_bytes": wanted,
        **measured,
        "read_ratio": round(measured["bytes_read"] / wanted, 3),
        "peak_ratio": round(measured["peak_bytes"] / wanted, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store")
    parser.add_argument("--load-tower", type=Path)
    args = parser.parse_args()
    if args.load_tower:
        load_tower(args.load_tower)
        return
    require_commit()
    with tempfile.TemporaryDirectory() as scratch:
        mobilenet = encoded(args.store, Path(scratch) / "encoded")
        bytes_of_stores = same_bytes(args.store, Path(scratch))
    save("encoders", {"mobilenet_v2": mobilenet, "bytes": bytes_of_stores, "video_tower": tower()})


if __name__ == "__main__":
    main()
