"""The one opener of images: any file becomes upright RGB of 8 bits as a viewer shows it, or a sentence why not.

EXIF orientation is applied, transparency is laid over white, 16 bits are brought to 8 by their high byte.
"""

import io
import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ray_app.errors import InputError
from ray_app.listing import data_in

MAX_PIXELS = 2**26
"""Most pixels of an image: 67 million, 200 MB as RGB."""
MAX_JPEG_SCANS = 50
"""Each scan of a progressive JPEG goes over all of its pixels, and may take a few bytes only; encoders write 10."""
FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of pictures that are sent: no other decoder sees them."""
FILE_FORMATS = (*FORMATS, "BMP", "TIFF")
"""Formats of files."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError),
    *(struct.error, Image.DecompressionBombError, Warning),
)
"""Errors of Pillow where a file is damaged; its warnings can be made errors."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an image file as (H, W, 3) uint8 RGB. InputError: missing, empty, truncated, or no image."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} is no readable image: {error}") from error
    try:
        return np.asarray(decode_image(data, str(path), FILE_FORMATS))
    except MemoryError as error:
        raise InputError(f"{path} takes more memory than there is; make it smaller") from error


def decode_image(
    data: bytes, where: str, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image in some bytes, as RGB.

    InputError: empty, truncated, of no such format, too large, or with pixels of an unknown range. Formats and sizes
    are looked at before anything is decoded. MemoryError: it takes more than there is.
    """
    if not data:
        raise InputError(f"{where} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{where} has {image.width} x {image.height} pixels, the limit is {max_pixels:,}; make it smaller"
                )
            if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
                raise InputError(f"{where} has {scans} scans, the limit is {MAX_JPEG_SCANS}; save it again")
            depth, inverted = _depth(image), _is_inverted(image)
            return _rgb(_upright(image), depth, inverted, where)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{where} is no readable image: it is none of {', '.join(formats)}, or damaged at its beginning"
        ) from error
    except DAMAGE as error:
        raise InputError(f"{where} is no readable image: {error}") from error


def resized(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear resize as Pillow does it; (H, W, 3) uint8 to (3, height, width) uint8."""
    assert image_HWC.dtype == np.uint8
    assert image_HWC.shape[2:] == (3,)
    return resized_image(Image.fromarray(np.ascontiguousarray(image_HWC)), height, width)


def resized_image(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize an RGB image in the same way."""
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, numbers in their names in numerical order."""
    return sorted(
        (path for path in data_in(folder) if path.suffix.lower() in SUFFIXES), key=lambda path: natural(path.name)
    )


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key by which 2 comes before 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _depth(image: Image.Image) -> int:
    """Bits of a grey value that is stored in 16: a TIFF may have fewer."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    return int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])


def _is_inverted(image: Image.Image) -> bool:
    """True for a TIFF whose 0 is white; of more than 8 bits Pillow does not turn its values round."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    return tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation says; damaged EXIF data say nothing."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return image
    if orientation == 1:
        return image
    image.info = {name: value for name, value in image.info.items() if name == "transparency"}  # EXIF is not kept
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, depth: int, inverted: bool, where: str) -> Image.Image:
    """Return an image of any mode as RGB. InputError: its values have no known range."""
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise InputError(
            f"{where} has pixels of 32 bits ({kind}), whose range is not known; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> (depth - 8)).astype(np.uint8) ^ np.uint8(255 if inverted else 0)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
