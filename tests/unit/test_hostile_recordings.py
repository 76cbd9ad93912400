"""Recordings are read without unpickling: in every form that NumPy writes, and in none that somebody made up."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy_format

from ray_app.errors import InputError
from ray_app.sources.npy import MAX_OPCODES, TYPES, events_of, parse_npy
from ray_app.sources.npz import INFLATED_BYTES, parse_recording

RNG = np.random.default_rng(3)
EVENTS: dict[str, Any] = {
    "x": RNG.integers(0, 640, 500).astype("u2"),
    "y": RNG.integers(0, 480, 500).astype("u2"),
    "t": np.sort(RNG.integers(0, 10**6, 500)),
    "p": RNG.integers(0, 2, 500).astype("u1"),
}


def npy(pickled: bytes) -> bytes:
    out = io.BytesIO()
    npy_format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    return out.getvalue() + pickled


def in_an_array(content: Any) -> Any:
    array = np.empty((), object)
    array[()] = content
    return array


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [in_an_array, dict], ids=["saved", "bare"])
def test_a_dictionary_of_arrays_is_read_in_every_protocol(protocol: int, wrap: Any) -> None:
    every_type = {code: np.arange(5).astype(code) for code in TYPES}
    content = EVENTS | every_type | {
        "big endian": np.arange(7, dtype=">u4"),
        "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "empty": np.zeros(0, "i4"),
        "large": np.arange(5000),
        "time_start": np.int64(51_000),
        "number": 3,
        "share": 0.5,
        "text": "interlaken",
        "none": None,
        "bytes": b"\xff\x00",
    }  # fmt: skip
    found = parse_npy(npy(pickle.dumps(wrap(content), protocol)), "it")
    assert list(found) == list(content)
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(bytes(found[name]) if name == "bytes" else found[name], value)


def test_names_of_numpy_1_and_python_2_are_read_too() -> None:
    saved = pickle.dumps(in_an_array(EVENTS), 2)
    old = saved.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != saved
    np.testing.assert_array_equal(parse_npy(npy(old), "it")["t"], EVENTS["t"])
    by_python_2 = (
        b"\x80\x02}U\x01xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x01\x00\xff\xfftbs."
    )
    assert parse_npy(npy(by_python_2), "it")["x"].tolist() == [1, 0xFFFF]


def array(data: bytes, shape: bytes = b"K\x08\x85", code: bytes = b"u1") -> bytes:
    """Opcodes of an array, written by hand."""
    return (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape
        + b"cnumpy\ndtype\n\x8c" + bytes([len(code)]) + code + b"\x89\x88\x87R"
        b"(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C" + bytes([len(data)]) + data + b"tb"
    )  # fmt: skip


def column(opcodes: bytes) -> bytes:
    return b"\x80\x04}\x8c\x01x" + opcodes + b"s."


FORGED = (
    b"cnumpy\ndtype\n\x8c\x02V8\x89\x88\x87R(K\x03\x8c\x01|N(\x8c\x02f0t}\x8c\x02f0"
    b"cnumpy\ndtype\n\x8c\x01O\x89\x88\x87RK\x00\x86sK\x08K\x01K\x01tb"
)
"""A type with a field of objects that says it has none."""
PLAIN_TYPE = b"cnumpy\ndtype\n\x8c\x02u1\x89\x88\x87R"
HOSTILE = {
    "forged type": (column(array(b"A" * 8).replace(PLAIN_TYPE, FORGED)), "type is none of"),
    "objects": (column(array(b"A" * 8, code=b"O8")), "type is none of"),
    "more than was sent": (column(array(b"A" * 8, b"J\xff\xff\xff\x7f\x85")), "has 8 bytes"),
    "more dimensions": (column(array(b"A", b"(" + b"K\x01" * 40 + b"t")), "has 1 bytes"),
    "negative shape": (column(array(b"A" * 8, b"J\xf8\xff\xff\xffJ\xff\xff\xff\xff\x86")), "not of whole numbers"),
    "tuple as a key": (b"\x80\x04}(" + b")" + b"\x85" * 20 + b"K\x01u.", "a key that is no text or number"),
    "deep tuple as a key": (b"\x80\x04}(" + b")" + b"\x85" * 1_500_000 + b"K\x01u.", "nested deeper"),
    "large number": (b"\x80\x04}(\x8b" + struct.pack("<i", 20000) + b"\x01" * 20000 + b"K\x01u.", "20000"),
    "place in a list of 16 GB": (b"\x80\x04Nr\xff\xff\xff\xff.", "holds a NoneType"),
    "text that doubles": (
        b"\x80\x04c_codecs\nencode\nq\x00" + b"h\x00" * 11 + b"X\x03\x00\x00\x00abcX\x03\x00\x00\x00hex\x86R.",
        "holds a Call",
    ),
    "a program": (b'cposix\nsystem\n(S"true"\ntR.', "asks for posix.system"),
    "a program on the stack": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "asks for posix.system"),
    "a name with dots": (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "asks for numpy.ndarray.dumps"),
    "an instance": (b'(S"true"\niposix\nsystem\n.', "opcode STRING"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "a persistent id": (b"Pabc\n.", "opcode PERSID"),
    "itself": (b"\x80\x04}q\x00X\x01\x00\x00\x00xh\x00s.", "no column y, t, p"),
    "deep lists": (column(b"]" * 10**6 + b"a" * (10**6 - 1)), "more values or levels"),
    "many opcodes": (b"\x80\x04" + b"N0" * MAX_OPCODES, "opcode POP"),
    "many marks": (b"\x80\x04" + b"(" * 10**6, "more values or levels"),
    "bytes to come": (b"\x80\x04B\xff\xff\xff\xff", "ends within a value"),
    "memo that is not there": (b"\x80\x04h\x09.", "is not there"),
    "nothing": (b"", "ends within a value"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_made_up_pickle_is_refused_in_a_sentence(name: str) -> None:
    pickled, message = HOSTILE[name]
    with pytest.raises(InputError, match=message) as refused:
        events_of(parse_npy(npy(pickled), "it"), 640, 480, "it")
    assert len(str(refused.value)) < 500


def test_none_of_them_costs_memory_or_a_process(tmp_path: Path) -> None:
    """One process reads all of them, with little room to do so."""
    for i, (pickled, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.npy").write_bytes(npy(pickled))
    code = """
import resource, sys
from pathlib import Path
from ray_app.errors import InputError
from ray_app.sources.npy import events_of, read_npy
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        events_of(read_npy(path), 640, 480, "it")
    except InputError:
        print(path.name)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stdout.split())) == (0, len(HOSTILE)), done.stderr


def test_columns_may_come_as_npz(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **EVENTS, note=np.array("not read"))
        found = parse_recording((tmp_path / "a.npz").read_bytes(), "it")
        assert set(found) == set("xytp")
        for name, values in EVENTS.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)


def test_as_many_events_as_fit_are_read_from_an_npz() -> None:
    count = INFLATED_BYTES // 13 - 100
    out = io.BytesIO()
    columns = {"x": "u2", "y": "u2", "t": "i8", "p": "u1"}
    np.savez_compressed(out, **{name: np.zeros(count, code) for name, code in columns.items()})
    assert len(events_of(parse_recording(out.getvalue(), "it"), 640, 480, "it")) == count


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = "x.npy") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def member(header: dict[str, Any], data: bytes = b"") -> bytes:
    out = io.BytesIO()
    npy_format.write_array_header_1_0(out, header)
    return out.getvalue() + data


def empty_entries(count: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(count):
            archive.writestr(str(number), b"")
    return out.getvalue()


PLAIN = {"descr": "|u1", "fortran_order": False, "shape": (2**60,)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(member(PLAIN)), "has 0 bytes"),
        (zipped(member(PLAIN | {"shape": (INFLATED_BYTES + 1,)}, bytes(INFLATED_BYTES + 1))), "32 MiB"),
        (zipped(member(PLAIN | {"shape": (INFLATED_BYTES // 2,)}, bytes(INFLATED_BYTES // 2))), "32 MiB"),
        (zipped(member(PLAIN | {"descr": "|O", "shape": ()}, pickle.dumps(1))), "is of type O"),
        (zipped(member(PLAIN | {"descr": [("a", "<u1")], "shape": (1,)}, b"a")), "one plain type"),
        (zipped(b"no array"), "begins with"),
        (zipped(b"a", zipfile.ZIP_LZMA), "only deflate"),
        (empty_entries(30_000), "directory has"),
        (zipped(member(PLAIN | {"shape": (9,)}, bytes(9)))[:-30], "no .npz file"),
        (b"PK\3\4", "no .npz file"),
        (zipped(b"", name="other.npy"), "no column x; the archive has other.npy, and needs x, y, t, p"),
    ],
    ids=["claims", "bomb", "narrow bomb", "objects", "fields", "noise", "lzma", "entries", "cut", "magic", "none"],
)
def test_an_npz_that_claims_or_inflates_too_much_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        events_of(parse_recording(data, "it"), 640, 480, "it")
