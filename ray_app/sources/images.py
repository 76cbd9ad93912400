"""Image files and folders of them, read as RGB, with a sentence where that fails."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ray_app.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB. InputError: missing, empty, truncated, or no image."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes)")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable image: {error}") from error


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, numbers in their names in numerical order."""
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=natural)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sorting key by which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
