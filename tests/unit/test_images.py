"""Image files as cameras, phones and editors write them become upright RGB of 8 bits, or are refused by name."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_app.errors import InputError
from ray_app.listing import data_in
from ray_app.sources.images import FILE_FORMATS, FORMATS, MAX_JPEG_SCANS, decode_image, images_in, read_image

CASES = Path(__file__).resolve().parents[1] / "data"
WHITE = [255, 255, 255]


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, "it", FILE_FORMATS))


def png(values: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit colours nor every transparency."""
    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def corners(image: np.ndarray) -> str:
    """The colours of the corners, row by row: one of R, G, B each, or - for black."""
    return "".join("RGB"[int(c.argmax())] if c.max() > 128 else "-" for c in image[[0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [(1, "RGB-"), (2, "GR-B"), (3, "-BGR"), (4, "B-RG"), (5, "RBG-"), (6, "BR-G"), (7, "-GBR"), (8, "G-RB")],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_all_eight_orientations_are_shown_as_a_viewer_shows_them(kind: str, orientation: int, seen: str) -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :16, 0], image[:16, 32:, 1], image[16:, :16, 2] = 255, 255, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(encoded(Image.fromarray(image), kind, exif=exif))
    assert found.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert corners(found) == seen


def test_the_picture_of_a_phone_is_upright() -> None:
    path = CASES / "exif6.jpg"
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
        right = np.rot90(np.asarray(image.convert("RGB")), -1)
    assert np.array_equal(read_image(path), right)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_data_turn_nothing(exif: bytes) -> None:
    assert decoded(encoded(Image.new("RGB", (16, 8), "red"), "JPEG", exif=exif)).shape == (8, 16, 3)


def test_sixteen_bits_become_eight_by_their_high_byte() -> None:
    values = np.array([[0, 255, 256, 32_768], [65_535, 0x1234, 511, 512]], np.uint16)
    right = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    big = values.astype(">u2")
    assert np.array_equal(decoded(png(big, 16, 0)), right)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decoded(encoded(Image.fromarray(values), kind)), right)
    assert np.array_equal(decoded(encoded(Image.fromarray(big), "TIFF")), right)  # I;16B
    colours = np.stack([big, big[::-1], big[:, ::-1]], axis=2).astype(">u2")
    assert np.array_equal(decoded(png(colours, 16, 2)), (colours >> 8).astype(np.uint8))
    found = read_image(CASES / "gray16.png")
    with Image.open(CASES / "gray16.png") as image:
        assert np.array_equal(found[..., 0], (np.asarray(image) >> 8).astype(np.uint8))
    assert len(np.unique(found)) > 2, "not clipped to white"


def test_a_tiff_of_12_bits_counts_to_4095() -> None:
    tiff = bytearray(encoded(Image.fromarray(np.array([[0, 0x0FFF]], np.uint16)), "TIFF"))
    bits = tiff.index(struct.pack("<HHI", 258, 3, 1)) + 8
    tiff[bits : bits + 2] = struct.pack("<H", 12)
    strip = tiff.index(struct.pack("<HH", 0, 0x0FFF))
    tiff[strip : strip + 3] = bytes([0x00, 0x0F, 0xFF])  # two values in three bytes
    assert decoded(bytes(tiff))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_no_negative(kind: Any) -> None:
    deep = np.iinfo(kind).max
    tiff = bytearray(encoded(Image.fromarray(np.array([[0, deep // 4, deep]], kind)), "TIFF"))
    photometric = tiff.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert tiff[photometric] == 1
    tiff[photometric] = 0
    assert decoded(bytes(tiff))[0, :, 0].tolist() == [255, 192, 0]


@pytest.mark.parametrize(("mode", "value", "kind"), [("F", 0.5, "floats"), ("I", 70_000, "whole numbers")])
def test_pixels_of_unknown_range_are_refused_by_name(mode: str, value: Any, kind: str) -> None:
    with pytest.raises(InputError, match=rf"it has pixels of 32 bits \({kind}\), whose range is not known"):
        decoded(encoded(Image.new(mode, (4, 2), value), "TIFF"))


def test_transparency_is_laid_over_white() -> None:
    half = decoded(encoded(Image.new("RGBA", (4, 2), (200, 100, 0, 128)), "PNG"))[0, 0]
    assert np.abs(half.astype(int) - (227, 177, 127)).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    clear = {
        "LA": encoded(Image.new("LA", (4, 2), (0, 0)), "PNG"),
        "WebP": encoded(Image.new("RGBA", (4, 2), (0, 0, 0, 0)), "WEBP", lossless=True),
        "palette": encoded(palette, "PNG", transparency=0),
        "palette of alphas": encoded(palette, "PNG", transparency=bytes([0, 255])),
        "one grey": encoded(Image.new("L", (4, 2), 7), "PNG", transparency=7),
        "one colour": encoded(Image.new("RGB", (4, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        "one grey of 16 bits": png(np.full((2, 4), 999, ">u2"), 16, 0, (b"tRNS", struct.pack(">H", 999))),
        "16 bits with alpha": png(np.zeros((2, 4, 2), ">u2"), 16, 4),
    }
    assert {name: decoded(data)[0, 0].tolist() for name, data in clear.items()} == dict.fromkeys(clear, WHITE)
    assert decoded(clear["palette"])[0, 1].tolist() == [40, 50, 60]


def test_other_modes_keep_their_colours() -> None:
    assert decoded(encoded(Image.new("1", (4, 2), 1), "PNG"))[0, 0].tolist() == WHITE
    assert decoded(encoded(Image.new("L", (4, 2), 77), "BMP"))[0, 0].tolist() == [77] * 3
    red = decoded(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))[0, 0]
    assert np.abs(red.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("kind", "how"), [("PNG", {}), ("PNG", {"default_image": True}), ("WEBP", {"lossless": True})]
)
def test_of_an_animation_the_first_picture_is_taken(kind: str, how: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]
    stereo = encoded(
        frames[0].resize((16, 16)), "MPO", save_all=True, append_images=[frames[1].resize((16, 16))]
    )  # what phones call .jpg
    assert np.asarray(decode_image(stereo, "it"))[0, 0, 0] > 250


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(secret) run\n",
        encoded(Image.new("RGB", (4, 2)), "GIF"),
        encoded(Image.new("RGB", (4, 2)), "PPM"),
        encoded(Image.new("RGB", (4, 2)), "PCX"),
        encoded(Image.new("RGB", (4, 2)), "PDF"),
        encoded(Image.new("RGB", (16, 16)), "ICO"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_no_other_format_reaches_a_decoder(data: bytes) -> None:
    for formats in (FORMATS, FILE_FORMATS):
        with pytest.raises(InputError, match="it is none of PNG, JPEG, WEBP"):
            decode_image(data, "it", formats)


def test_pictures_that_are_sent_are_png_jpeg_or_webp() -> None:
    image = Image.new("RGB", (4, 2), "red")
    for kind in FORMATS:
        assert np.asarray(decode_image(encoded(image, kind), "it")).shape == (2, 4, 3)
    for kind in ("BMP", "TIFF"):
        assert decoded(encoded(image, kind)).shape == (2, 4, 3)
        with pytest.raises(InputError, match="none of PNG, JPEG, WEBP"):
            decode_image(encoded(image, kind), "it")


def test_sizes_are_looked_at_before_anything_is_decoded() -> None:
    with pytest.raises(InputError, match=r"it has 3000 x 3000 pixels, the limit is 1,000,000"):
        decode_image(png(np.zeros((1, 1), np.uint8), 8, 0).replace(*_size(1, 1, 3000, 3000)), "it", max_pixels=10**6)
    with pytest.raises(InputError, match="no readable image"):
        decode_image(png(np.zeros((1, 1), np.uint8), 8, 0).replace(*_size(1, 1, 60_000, 60_000)), "it")
    scans = encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    assert decode_image(scans, "it").size == (16, 16)
    start = scans.rindex(b"\xff\xda")
    many = scans[:start] + scans[start:-2] * (MAX_JPEG_SCANS + 1) + scans[-2:]
    with pytest.raises(InputError, match=r"it has [56]\d scans, the limit is 50"):
        decode_image(many, "it")


def _size(*sizes: int) -> tuple[bytes, bytes]:
    """The header chunk of a 1 x 1 PNG, and one of another size with its true checksum."""
    chunks = []
    for width, height in (sizes[:2], sizes[2:]):
        data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        chunks.append(data + struct.pack(">I", zlib.crc32(data)))
    return chunks[0], chunks[1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_file_that_breaks_off_anywhere_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    data = encoded(image, kind)
    for size in range(0, len(data) * 3 // 4, 41):
        path = tmp_path / "cut.png"
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.png"):
            read_image(path)


def test_what_macos_and_windows_leave_in_a_folder_is_no_data(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2)).save(tmp_path / "frame_1.png")
    for name in ("._frame_1.png", ".DS_Store", "Thumbs.db", "desktop.ini", "._Thumbs.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    assert [path.name for path in images_in(tmp_path)] == ["frame_1.png"]
    assert [path.name for path in data_in(tmp_path)] == ["frame_1.png"]
