"""`ray-app demo decode`: live speculative decoding with the small target that sees, from parts in this package."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from ray_app.commands.decode.command import render_decode, run_decode
from ray_app.commands.demo.answers import HELD_OUT, pictures
from ray_app.commands.demo.command import cache_folder, fetched
from ray_app.commands.demo.target import PROVENANCE, SEEN, SHIPPED, identity_of, read_parts, write_target
from ray_app.config.decode import DecodeConfig
from ray_app.config.demo import DemoDecodeConfig
from ray_app.errors import InputError, StoreError
from ray_app.language_models.joined import verify_joined
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import CHECKSUMS_FILE, make_folder, sha256_file, write_file

PER_DRIVE = 4
TARGET = "demo_target"
MAX_NEW_TOKENS = 128


def run_demo_decode(cfg: DemoDecodeConfig) -> dict[str, Any]:
    """Fetch, join, and decode live; return the --json object of `decode`.

    ResourceError: no package index. InputError: models other than those that the parts belong to.
    """
    target = shipped_target(cfg.cache)
    out = cfg.out.absolute()
    prompts = write_prompts(out / "pictures", cfg.num_pictures, cfg.seed)
    return run_decode(
        DecodeConfig(
            source=(prompts,),
            target=target,
            out=out / "results",
            drafter=cfg.drafter,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=cfg.dtype,
            watch=True,
            html=out / "decode.html",
        )
    )


def render_demo_decode(result: dict[str, Any], console: Console) -> None:
    """Print the table of `decode`."""
    render_decode(result, console)


def shipped_target(cache: Path | None) -> Path:
    """Return the target of the parts in this package, joined with the fetched models where it is not there yet."""
    encoder, language_model = fetched("mobilenet_v2", cache), fetched("smollm2", cache)
    folder = cache_folder(cache) / TARGET
    parts = sha256_file(SHIPPED / CHECKSUMS_FILE)
    if folder.exists():
        try:
            found = parse_object((folder / PROVENANCE).read_bytes()).get("parts")
        except (OSError, ValueError):
            found = None
        if found != parts:
            raise StoreError(f"{folder} was made from other parts; delete it, or name another --cache.")
        verify_joined(folder)
        return folder
    adapter, models = read_parts(SHIPPED)
    if models != identity_of(encoder, language_model):
        raise InputError(
            f"{encoder} and {language_model} are not the models that the parts in this package belong to."
        )
    origin, seen = (parse_object((SHIPPED / name).read_bytes()) for name in (PROVENANCE, SEEN))
    write_target(folder, adapter, encoder, language_model, seen, {**origin, "parts": parts})
    return folder


def write_prompts(folder: Path, number: int, seed: int) -> Path:
    """Write pictures of held-out drives and a file of prompts about them; return the file."""
    make_folder(folder)
    lines = []
    for each in list(pictures(seed, HELD_OUT, -(-number // PER_DRIVE), PER_DRIVE))[:number]:
        name = f"{each.sequence}_{each.t_us}.png"
        write_file(folder / name, png(each.image_HWC))
        lines.append({"id": name, "sequence": each.sequence, "frames": [name]})
    path = folder / "prompts.jsonl"
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Return a picture as a PNG file."""
    file = BytesIO()
    Image.fromarray(image_HWC).save(file, "png")
    return file.getvalue()
