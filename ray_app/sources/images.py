"""Image files and folders of them, read as RGB, with a sentence where that fails."""

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ray_app.errors import InputError

MAX_PIXELS = 2**27
"""Most pixels of an image: 134 million, 400 MB as RGB."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an image file as (H, W, 3) uint8 RGB. InputError: missing, empty, truncated, or no image."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} is no readable image: {error}") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return an image file's bytes as (H, W, 3) uint8 RGB. InputError: empty, truncated, no image, too large."""
    if not data:
        raise InputError(f"{where} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{where} has {image.width} x {image.height} pixels, the limit is {max_pixels:,}; make it smaller"
                )
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise InputError(f"{where} is no readable image: of no known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} is no readable image: {error}") from error


def resized(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear resize as Pillow does it; (H, W, 3) uint8 to (3, height, width) uint8."""
    assert image_HWC.dtype == np.uint8
    assert image_HWC.shape[2:] == (3,)
    image = Image.fromarray(np.ascontiguousarray(image_HWC)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, numbers in their names in numerical order."""
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=natural)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sorting key by which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
