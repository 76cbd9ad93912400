"""Requests of strangers who want an endpoint to stop: connections that hold, and bodies that cost."""

import base64
import gzip
import io
import json
import pickle
import re
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
from endpoints import INFER, WIDTH, Server, binary_request
from numpy.lib import format as npy_format
from PIL import Image

MIB = 2**20
GOOD, GOOD_HEADERS = binary_request(np.full((1, WIDTH), 0.5))
EMPTY_MEMBER = gzip.compress(b"")


def head(*lines: str, method: str = "POST", path: str = INFER) -> bytes:
    """Head of a request as it is written."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def answered(server: Server, data: bytes, wait_s: float = 12.0) -> list[int]:
    """Send bytes on a connection; the status codes of all that comes back until it is closed or silent."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", server.port), wait_s) as connection, suppress(OSError):
        connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@contextmanager
def held(server: Server, number: int, data: bytes) -> Iterator[list[socket.socket]]:
    """So many connections that have sent this and nothing else."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30)) for _ in range(number)]
        for connection in made:
            connection.sendall(data)
        yield made


def npy(content: bytes) -> bytes:
    """An `.npy` file of one object with this pickle."""
    out = io.BytesIO()
    npy_format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    return out.getvalue() + content


def forged_dtype() -> bytes:
    """An array whose type says that its bytes are pointers to objects."""
    plain = b"cnumpy\ndtype\nq\x010h\x01X\x02\x00\x00\x00V8\x89\x88\x87Rq\x02"
    fields = b"(K\x03X\x01\x00\x00\x00|N(X\x02\x00\x00\x00f0t}X\x02\x00\x00\x00f0h\x01X\x01\x00\x00\x00O\x89\x88\x87R"
    state = b"K\x00\x86sK\x08K\x01K\x01tb0"
    array = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85h\x02\x89C\x08"
    )
    return plain + fields + state + array + b"C\x08AAAAAAAAtb"


COLUMN = b"X\x01\x00\x00\x00"
RECORDINGS = {
    "nested tuples as a key": b"\x80\x04}(" + b")" + b"\x85" * 1_500_000 + b"K\x01u.",
    "nested tuples as a key, 180 kB": b"\x80\x04}(" + b")" + b"\x85" * 180_000 + b"K\x01u.",
    "a list of depth 10^6": b"\x80\x04}" + COLUMN + b"x" + b"]" * 1_000_000 + b"a" * 999_999 + b"s.",
    "a memo of 2^27 places": b"\x80\x04Nr" + struct.pack("<I", 2**27) + b".",
    "a number of 20,000 bytes as a key": b"\x80\x04}(\x8b" + struct.pack("<i", 20_000) + b"\1" * 20_000 + b"K\x01u.",
    "a forged type": b"\x80\x04}(" + COLUMN + b"x" + forged_dtype() + COLUMN + b"yh\x02" + COLUMN + b"tNu.",
    "hexadecimal of hexadecimal": b"\x80\x04c_codecs\nencode\nq\x000" + b"h\x00" * 11 + b"B" + struct.pack("<I", MIB)
    + b"A" * MIB + b"X\x03\x00\x00\x00hex\x86R" * 11 + b".",
    "a call of the system": b"cposix\nsystem\n(S'true'\ntR.",
    "keys that are no text": pickle.dumps({1: 2, None: 3, (4, "x"): 5}),
    "itself": b"\x80\x04}q\x00" + COLUMN + b"xh\x00s.",
}  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces so many pixels and has one row."""
    data = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    """A small image in a format that no camera of ours writes."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, kind)
    return out.getvalue()


PICTURES = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/f { f } def f\n%%EOF\n",
    "a page description that was saved": encoded("EPS"),
    "10^9 pixels": png_header(31_000, 31_000),
    "pixels beyond 2^31": png_header(2**31 - 1, 2**31 - 1),
    "an animation of no frames": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00" * 30,
    "nothing": b"\x89PNG\r\n\x1a\n",
}


def posted(server: Server, path: str, bodies: Iterable[bytes], **headers: str) -> list[int]:
    """Status codes of bodies, sent one after the other."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return [server.ask("POST", path, body, sent, timeout=120)[0] for body in bodies]


def compressed(server: Server, bodies: Iterable[bytes]) -> list[int]:
    return posted(server, INFER, bodies, content_encoding="gzip", **GOOD_HEADERS)


def in_json(server: Server, name: str, files: Iterable[bytes]) -> list[int]:
    """Files as base64 in JSON."""
    documents = (json.dumps({"event": {name: base64.b64encode(data).decode()}}).encode() for data in files)
    return posted(server, "/v1/align", documents, content_type="application/json")


def documents() -> Iterator[bytes]:
    """JSON that costs more than it is long."""
    yield b'{"a":"' + b'\\"' * 30_000
    yield b"[[[[[[[[[[[[[[[[[[" + b'"a' * 30_000
    yield b'{"event":[' + b"[]," * 300_000 + b"[]]}"
    yield b'{"event":[[' + b'"",' * 300_000 + b'""]]}'
    yield b'{"event":' + b"[" * 500_000
    yield json.dumps(dict.fromkeys(map(str, range(60_000)))).encode()
    yield b'{"event":[[1' + b"0" * 400_000 + b"]]}"
    yield b'{"event":[[0.' + b"1" * 900_000 + b"e-9999999999]]}"
    yield b'{"id":"' + b"\\ud800" * 100_000 + b'","event":[[0]]}'


def framings() -> Iterator[bytes]:
    """Heads that say two things about the length of a body, or nothing that can be read."""
    for lines in (
        ["Content-Length: 3", "Content-Length: 4"],
        ["Content-Length: 3, 4"],
        ["Content-Length: -1"],
        ["Content-Length: 0x3"],
        ["Content-Length: 99999999999999999999999999"],
        ["Content-Length: 3", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: gzip"],
    ):
        yield head(*lines, "Connection: close") + b"0\r\n\r\n"
    yield head("Transfer-Encoding: chunked", "Connection: close") + b"ffffffffffffffffff\r\nx"
    yield head("Transfer-Encoding: chunked", "Connection: close") + b"nonsense\r\n\r\n"
    yield b"POST " + INFER.encode() + b" HTTP/9.9\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)  # a client of TLS


def headers() -> Iterator[bytes]:
    yield head(*(f"X-{number}: 1" for number in range(2_000)), "Connection: close", method="GET", path="/v2")
    yield head("X: " + "a" * 200_000, "Connection: close", method="GET", path="/v2")
    yield head("X: " + "a" * 2_000_000, "Connection: close", method="GET", path="/v2")
    yield head("X-Request-Id: " + "é\U0001f600" * 99, "Connection: close", method="GET", path="/v2")
    yield head("Connection: close", method="GET", path="/v2?" + "&".join(f"a{n}=1" for n in range(20_000)))
    yield head("Connection: close", "Content-Type: image/png", "Content-Length: 0",
               path="/v1/align?" + "&".join(f"a{n}=1" for n in range(20_000)))  # fmt: skip


def paths() -> Iterator[bytes]:
    """Paths out of the folder of the console, and methods that no route takes."""
    for path in (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/console/index.html", "//etc/passwd", "/..;/v1/model",
        "/index.html", "/v2/models/..%2f..%2fetc", "/v2/models/" + "a" * 9_000, "/v2/models/%ff%00%0d%0aX:1/infer",
    ):  # fmt: skip
        yield head("Connection: close", method="GET", path=path)
    for method in ("OPTIONS", "TRACE", "DELETE", "PUT", "BREW", "post"):
        yield head("Connection: close", "Content-Length: 0", method=method, path="/v1/align")


def endless(server: Server) -> list[int]:
    """Chunks without an end, for as long as the request may take."""
    ends = head("Transfer-Encoding: chunked", "X-Request-Timeout-Ms: 1000", "Connection: close")
    return answered(server, ends + b"1\r\nx\r\n" * 100_000)


def pipelined(server: Server) -> list[int]:
    """Fifty requests at once, the last of which closes."""
    lines = [f"{name}: {value}" for name, value in GOOD_HEADERS.items()] + [f"Content-Length: {len(GOOD)}"]
    return answered(server, (head(*lines) + GOOD) * 49 + head(*lines, "Connection: close") + GOOD)


def over(attack: Callable[[], Iterable[bytes]]) -> Callable[[Server], list[int]]:
    """An attack of bytes as they are written, one connection each; none is answered but by an error, or closed."""
    return lambda server: [code for data in attack() for code in answered(server, data)]


ATTACKS: dict[str, Callable[[Server], list[int]]] = {
    "framing": over(framings),
    "headers": over(headers),
    "paths": over(paths),
    "endless": endless,
    "json v1": lambda server: posted(server, "/v1/align", documents(), content_type="application/json"),
    "json v2": lambda server: posted(server, INFER, documents()),
    "gzip": lambda server: compressed(
        server,
        [gzip.compress(bytes(40 * MIB)), EMPTY_MEMBER * 50_000, gzip.compress(GOOD) + b"x" * 10_000, GOOD],
    ),
    "recordings": lambda server: in_json(server, "recording", map(npy, RECORDINGS.values())),
    "pictures": lambda server: in_json(server, "png", PICTURES.values()),
    "pictures as bodies": lambda server: posted(server, "/v1/align", PICTURES.values(), content_type="image/png"),
}
"""Each returns the status codes of its answers; fewer than requests where connections were closed without one."""
