"""Spoiled files of every kind that is opened, seeded: what chance, a defect or bad intent makes of them.

An example is a valid file with one structure, or a few bytes, changed; some grow to a megabyte. It is a function of
kind and seed.
"""

import copy
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

BIG = 2**20
"""Size to which an example may grow."""
LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**20, 2**24, 2**27, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 255, 2**15, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64, 10**12, 10**30, 10**400, 0.5, -0.0, 1e308,
    1e-320, float("nan"), float("inf"), True,
)  # fmt: skip
WORDS: tuple[Any, ...] = (
    *NUMBERS, None, False, "", "a", "x" * 5000, "\u0000", "💥", "\ud800", [], {}, [[]], [1, 2, 3],
    [-1, -1],
    [2**40] * 3, {"a": {"b": {}}}, [[[[[[]]]]]], [1] * 1000, {"x": 1}, "1" * 5000, "[" * 500,
    "../../etc", "models:/x",
)  # fmt: skip
"""Put in the place of any value."""


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert a few bytes anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(8):
            case 0 | 1:
                if at < len(out):
                    out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 1] = rng.randbytes(rng.choice((1, 2, 8)))
            case 3:
                size = rng.choice((2, 4, 8))
                value = rng.choice(LENGTHS) % 256**size
                out[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
            case 4:
                del out[at : at + rng.choice((1, 2, 9, 100))]
            case 5:
                out = out[:at]
            case 6:
                part = bytes(out[at : at + rng.choice((1, 3, 20, 200))])
                out[at:at] = part * rng.choice((1, 2, 10, 1 + BIG // max(len(part), 1) // 4))
            case _:
                out[at:at] = rng.choice(
                    (b"\0", b"\xff", b"(", b"[", b"{", b'"', b"\\", b"9", b" ", b"\n")
                ) * rng.choice((1, 10, 1000, BIG // 2))
    return bytes(out[: 2 * BIG])


def spoil_tree(tree: Any, rng: random.Random) -> Any:
    """Change one value, key or branch of a JSON tree."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2))):
        holder, keys = tree, []
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and rng.random() < 0.75:
                holder = holder[key]
                continue
            match rng.randrange(6):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[rng.choice(("", "a", "x" * 300, "__proto__", key + "s"))] = holder.pop(key)
                case 2:
                    holder[key] = [holder[key]] * rng.choice((1, 2, 1000))
                case 3:
                    holder[key] = nested(rng.choice((3, 20, 70, 300)), holder[key])
                case _:
                    holder[key] = copy.deepcopy(rng.choice(WORDS))
            break
    return rng.choice(WORDS) if rng.random() < 0.03 else tree


def nested(depth: int, value: Any) -> Any:
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def json_text(tree: Any, rng: random.Random) -> bytes:
    """A tree as JSON, with digits that json.dumps would refuse, sometimes spoiled as bytes too, or grown."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    match rng.randrange(12):
        case 0 | 1:
            return spoil_bytes(text, rng)
        case 2:
            unit = rng.choice(
                (
                    b"[],",
                    b"{},",
                    b"0.5,",
                    b"300,",
                    b'"",',
                    b'\\"',
                    b"[",
                    b'{"a":',
                    b"1",
                    b'"a":1,',
                    b"\xf0\x9f\x92\xa5",
                )
            )
            at = rng.randrange(len(text) + 1)
            return text[:at] + unit * (rng.choice((100, BIG // 4, BIG)) // len(unit)) + text[at:]
        case _:
            return text


def recording(rng: random.Random, n: int | None = None) -> dict[str, Any]:
    """Columns of a true recording."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    n = rng.choice((5, 50, 2000)) if n is None else n
    return {
        "x": numbers.integers(0, 640, n).astype("u2"),
        "y": numbers.integers(0, 480, n).astype("u2"),
        "t": np.sort(numbers.integers(0, 10**6, n)).astype(rng.choice(("i8", "i8", "u4", "u2"))),
        "p": numbers.integers(0, 2, n).astype("u1"),
    }


def npy_of(pickled: bytes) -> bytes:
    """An `.npy` file around a pickle."""
    out = io.BytesIO()
    npy_format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    return out.getvalue() + pickled


OPCODES = (
    b")", b"\x85", b"\x86", b"\x87", b"]", b"}", b"(", b"t", b"R", b"b", b"u", b"s", b"a", b"e", b"N", b"\x88", b"0",
    b".", b"K\x01", b"\x8a\x08" + b"\xff" * 8, b"\x8b" + struct.pack("<i", 20000) + b"\x01" * 20000, b"\x94",
    b"r\xff\xff\xff\x7f", b"j\x00\x00\x00\x00", b"h\x00", b"cposix\nsystem\n", b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n", b"Pabc\n", b"\x82\x01", b"cnumpy.core.multiarray\n_reconstruct\n", b"\x8c\x01O",
    b"X\x01\x00\x00\x00x", b"C\x08AAAAAAAA", b"\x81", b"\x93", b"Q", b"B\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8,
    b"\x96" + b"\xff" * 7 + b"\x7f", b"c_codecs\nencode\n", b"I1\n", b"L9L\n",
)  # fmt: skip
"""Opcodes of a pickle, with arguments."""


def spoiled_pickle(data: bytes, rng: random.Random) -> bytes:
    """Opcodes put in the place of others, or a thousand of them."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(2, len(out))
        size = rng.choice((0, 0, 1, 2))
        opcode, times = rng.choice(OPCODES), rng.choice((1, 1, 1, 2, 40, 1000, 100_000))
        out[at : at + size] = opcode * min(times, 1 + BIG // len(opcode))
    return bytes(out[: 2 * BIG])


def spoiled_recording(rng: random.Random) -> bytes:
    columns = recording(rng)
    if rng.random() < 0.25:
        return spoiled_npz(columns, rng)
    name = rng.choice(list(columns))
    if rng.random() < 0.3:
        n = len(columns["x"])
        columns[name] = rng.choice((
            np.full(n, 2**63, "u8"), np.full(n, -(2**63)), np.zeros((n, 2), "u1"), np.zeros(0), np.float16(1), n, "x",
            None, np.full(n, np.nan), np.zeros(n, "M8[us]"), np.zeros(n, "S3"), np.array([{}] * n), [1] * n, (),
            {name: name}, np.zeros(n, [("a", "u1")]), 10**300,
            columns[name][::-1], columns[name][: n // 2], np.zeros(n, ">u2"),
        ))  # fmt: skip
    array = np.empty((), object)
    array[()] = columns
    pickled = pickle.dumps(array if rng.random() < 0.7 else columns, rng.choice((2, 3, 4, 5)))
    match rng.randrange(4):
        case 0:
            return spoil_bytes(npy_of(pickled), rng)
        case 1 | 2:
            return npy_of(spoiled_pickle(pickled, rng))
        case _:
            return npy_of(pickled)


def spoiled_npz(columns: Mapping[str, Any], rng: random.Random) -> bytes:
    out = io.BytesIO()
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, column in columns.items():
            member = io.BytesIO()
            header = npy_format.header_data_from_array_1_0(np.asarray(column))
            if rng.random() < 0.3:
                shape = (rng.choice(LENGTHS), *([rng.choice(LENGTHS)] * rng.choice((0, 0, 1, 40))))
                header |= {"shape": shape, "descr": rng.choice(("<i8", "|O", "|V8", "<U100000", "u1", "<f2"))}
            npy_format.write_array_header_2_0(member, header)
            bomb = rng.choice((0, 0, 0, 0, 0, 0, 0, 2**20, 2**20, 2**25)) if method != zipfile.ZIP_STORED else 0
            content = member.getvalue() + np.asarray(column).tobytes() + bytes(bomb)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, method)
        for extra in range(rng.choice((0, 0, 0, 3, 5000))):
            archive.writestr(zipfile.ZipInfo(str(extra)), b"")
    return spoil_bytes(out.getvalue(), rng) if rng.random() < 0.6 else out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, rng: random.Random) -> bytes:
    """A PNG that claims this size, with as many pixels as fit, or fewer; its checksums hold."""
    colour, channels = rng.choice(((0, 1), (2, 3), (3, 1), (4, 2), (6, 4)))
    depth = rng.choice((8, 8, 16)) if colour != 3 else 8
    rows = min(height, 64 * BIG // max(width * channels * depth // 8 + 1, 1))
    pixels = zlib.compress(bytes((width * channels * depth // 8 + 1) * rows), 9)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 0, 1)))
    parts = [
        png_chunk(b"IHDR", head),
        png_chunk(b"PLTE", bytes(768)),
        png_chunk(b"tRNS", bytes(2)),
        png_chunk(b"IDAT", pixels),
    ]
    if colour != 3:
        del parts[1:3]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def spoiled_image(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        sizes = (1, 100, 2048, 2049, 4096, 65535, 2**31 - 1)
        return png_of_size(rng.choice(sizes), rng.choice(sizes), rng)
    mode = rng.choice(("RGB", "RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F", "I"))
    form = rng.choice(("PNG", "PNG", "JPEG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"))
    size = (rng.choice((1, 17, 64)), rng.choice((1, 16, 48)))
    picture = Image.frombytes("RGB", size, random.Random(rng.random()).randbytes(size[0] * size[1] * 3))
    out = io.BytesIO()
    try:
        picture.convert(mode).save(
            out, form, **({"progressive": True} if form == "JPEG" and rng.random() < 0.5 else {})
        )
    except (OSError, ValueError):  # this format has no such mode
        picture.save(out, form)
    return spoil_bytes(out.getvalue(), rng)


YAML_LINES = (
    "store: s", "out: o", "num_epochs: 3", "batch_size: [8, 16]", "a: &a [1, 2]", "b: *a", "c: {<<: *a}", "space:",
    "  rank: [1, 2]", "- 1", "? [a]", "!!python/object:os.system {}", "!!binary x", "!!timestamp 2001-99-99",
    "n: 1:1:1:1", "n: 0x1f", "e: 1e400", "d: 2001-99-99", "n: " + "9" * 5000, "'", '"\\x', "|", "%YAML 9.9", "---",
    "...", "\t", "s: &s {s: *s}", "\u0000", "💥", "intrinsics:",
    "  camRect0: {camera_matrix: [1, 2, 3, 4], resolution: [640, 480]}",
)  # fmt: skip


def spoiled_yaml(rng: random.Random) -> bytes:
    lines = [rng.choice(YAML_LINES) for _ in range(rng.choice((1, 3, 8, 20)))]
    match rng.randrange(8):
        case 0:
            fan, depth = rng.choice((2, 9)), rng.choice((3, 8, 30, 300))
            lines += [
                f"a{i}: &a{i} {rng.choice(('', '{<<: '))}[{', '.join([f'*a{i - 1}'] * fan)}]" for i in range(1, depth)
            ]
            lines = ["a0: &a0 [x]", *(line + "}" * line.count("{<<") for line in lines)]
        case 1:
            unit = rng.choice(
                ("[", "{", "- ", "? ", "a: {", "[],", "a,", "'',", "&a ", "!!x ", "1:1", "a: b\n", "\n", "#")
            )
            lines.append(unit * (rng.choice((100, 2**15, 2**16 - 100, BIG)) // len(unit)))
        case 2 | 3:
            return spoil_bytes("\n".join(lines).encode(), rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def trace(row: int, rng: random.Random) -> dict[str, Any]:
    tokens = [rng.randrange(32000) for _ in range(rng.choice((1, 20, 60)))]
    timing = {"target_prefill": 20.0, "target_per_token": 14.5, "verify": {"4": 15.0}}
    texts = {"draft_text": "A car", "target_text": "A car"}
    return {
        "row": row,
        "question": "What?",
        "draft_tokens": tokens,
        "target_tokens": [*tokens[:1], 2],
        **texts,
        "timing_ms": timing,
    }


def spoiled_traces(rng: random.Random) -> bytes:
    rows = [json.dumps(trace(row, rng)).encode() for row in range(rng.choice((1, 3, 20)))]
    at = rng.randrange(len(rows))
    rows[at] = json_text(spoil_tree(trace(at, rng), rng), rng)
    whole = b"\n".join(rows)
    return spoil_bytes(whole, rng) if rng.random() < 0.3 else whole


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "recordings": spoiled_recording,
    "images": spoiled_image,
    "yaml": spoiled_yaml,
    "traces": spoiled_traces,
}
"""Examples that are the bytes of one file."""
