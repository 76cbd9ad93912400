"""JSON and YAML from outside: linear time, bounded memory and depth, and one exception for whatever is wrong."""

import ast
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ray_app.cli_settings import parse, read_yaml
from ray_app.command_table import COMMANDS
from ray_app.errors import ConfigError, InputError, StoreError
from ray_app.parsing.json_text import NestedTooDeep, parse_json, parse_object
from ray_app.parsing.yaml_text import MAX_CHARACTERS, MAX_VALUES, parse_yaml
from ray_app.runs.event_log import parse_line
from ray_app.runs.run_dir import run_metadata
from ray_app.sources.eventgpt.clips import listed_clips
from ray_app.store.filesystem import open_storage
from ray_app.store.traces import read_traces

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("text", ["{}", '{"a": "ä"}'])
def test_text_of_windows_is_read_and_other_encodings_are_named(text: str, tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + text.encode()
    for data in (marked, bytearray(marked), memoryview(marked)):
        assert parse_json(data) == json.loads(text)
    with pytest.raises(ValueError, match=r"it is no UTF-8 text \(byte 0xff at 0\); save it as UTF-8"):
        parse_json(text.encode("utf-16"))
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [2]\r\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": [2]}
    (tmp_path / "a.yaml").write_bytes("ä: 1".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"it is no UTF-8 text \(byte 0xe4 at 0\)"):
        read_yaml(tmp_path / "a.yaml")


def test_a_member_that_is_there_twice_is_an_error() -> None:
    for text in ('{"theta": 0.1, "theta": 0.9}', '[{"a": {"theta": 1, "b": 2, "theta": 1}}]'):
        with pytest.raises(ValueError, match="'theta' is there twice in one object"):
            parse_json(text)


@pytest.mark.parametrize("value", ["no", "~", "[a]", "{a: b}"])
def test_a_place_that_is_no_text_is_one_sentence(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"store: {value}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="store"):
        parse("train", COMMANDS["train"], tmp_path / "a.yaml", ["--out", "x"])


def test_json_is_what_the_standard_library_reads() -> None:
    rng = random.Random(0)

    def value(depth: int) -> Any:
        match rng.randrange(7 if depth else 5):
            case 0:
                return rng.choice((0, -1, 10**30, 2**63, 0.5, 1e308, -0.0, 5e-324))
            case 1:
                return "".join(rng.choice('a"\\\n💥é\u0000[{') for _ in range(5))
            case 2 | 3 | 4:
                return rng.choice((True, False, None))
            case 5:
                return [value(depth - 1) for _ in range(3)]
            case _:
                return {f"k{i}": value(depth - 1) for i in range(3)}

    for _ in range(300):
        tree = value(4)
        for ascii_only in (True, False):
            text = json.dumps(tree, ensure_ascii=ascii_only)
            assert repr(parse_json(text)) == repr(tree)
            assert repr(parse_json(memoryview(text.encode()))) == repr(tree)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 10**6, "nested deeper than 64"),
        (b'{"a":' * 10**5, "nested deeper than 64"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"1" * 5000, "4300 digits"),
        (b'"' + b'\\"' * 500_000, "Unterminated string"),
        (b"[" + b"[]," * 10**6 + b"1]", "too many small values"),
        (b"[" + b'{"":0},' * 10**6 + b"1]", "too many small values"),
        (b"\xff", "no UTF-8"),
        (b"\xff\xfe{\x00}\x00", "no UTF-8"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
    ],
)
def test_json_that_would_cost_too_much_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_the_depth_of_json_counts_brackets_of_values_only() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(json.dumps({"a": "[" * 100}), max_depth=1)
    with pytest.raises(NestedTooDeep):
        parse_json(b"[[]]", max_depth=1)
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        parse_json(b"[NaN]", nan=False)
    with pytest.raises(ValueError, match="a list, not an object"):
        parse_object(b"[]")


@pytest.mark.parametrize(
    "unit", ['\\"', "[", "]", "{", "[],", '"",', "0.5,", "1", '{"a":', "\\u0000", "💥", '"a":1,', " ", "\\", '["']
)
def test_eight_times_the_json_takes_no_more_than_sixteen_times_as_long(unit: str) -> None:
    """A quadratic step takes 64 times as long."""
    for start in ('{"event": [', '{"event": ["', ""):
        short, long = (start + unit * (n * 2**17 // len(unit.encode())) for n in (1, 8))
        assert min(map(seconds_to_parse, [long] * 3)) < 16 * max(min(map(seconds_to_parse, [short] * 3)), 0.005)


def seconds_to_parse(text: str) -> float:
    """CPU seconds of this thread."""
    started = time.thread_time()
    with suppress(ValueError):
        parse_json(text, max_depth=16, nan=False)
    return time.thread_time() - started


def laughs(levels: int, form: str) -> str:
    """Anchors, each of which repeats the one before nine times."""
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{i}: &a{i} {form % ', '.join([f'*a{i - 1}'] * 9)}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(30, "[%s]"), f"the limit is {MAX_VALUES:,}"),
        (laughs(30, "{<<: [%s]}"), f"the limit is {MAX_VALUES:,}"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 5000, "nested too deep"),
        ("- " * 5000, "nested too deep"),
        ("a" * (MAX_CHARACTERS + 1), "the limit is 65,536"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("a: !!timestamp 2001-01-01", "could not determine a constructor"),
        ("a: !!binary aGFsbG8=", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("num_epochs: 3\nout: a\nnum_epochs: 5", "'num_epochs' is there twice, in the mapping of line 1"),
        ("a:\n  b: 1\n  'b': 2", "'b' is there twice, in the mapping of line 2"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable"),
        ("a: b: c", "mapping values"),
        ("\0", "special characters"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_yaml_that_would_cost_too_much_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_yaml_reads_settings_with_anchors_and_times_as_text() -> None:
    assert parse_yaml("a: &x {k: [1, 2]}\nb: {<<: *x, n: 0x1f}\nratio: 1:8\nwhen: 2001-01-01\n")["b"] == {
        "k": [1, 2],
        "n": 31,
    }
    for text in (
        "1:8",
        "1:30.5",
        "2001-01-31",
        "2001-99-99",
        "010",
        "2024_01",
        "2001-01-01T00:00:00Z",
        "0x" + "f" * 60,
    ):
        assert parse_yaml(f"a: {text}") == {"a": text}, "as it was written"
    assert parse_yaml("[10, -3, 0, 0.5, 1e3, 1.5e+3, 0x1f]") == [10, -3, 0, 0.5, "1e3", 1500.0, 31]
    assert parse_yaml("") is None


READERS: list[tuple[Callable[[Path], Any], type[Exception], bytes]] = [
    (read_yaml, ConfigError, laughs(30, "[%s]").encode()),
    (read_yaml, ConfigError, b"a: " + b"9" * 5000),
    (lambda path: parse("tune", COMMANDS["tune"], path, []), ConfigError, b"[" * 5000),
    (lambda path: listed_clips(path, 5), InputError, b"[" * 10**6),
    (lambda path: listed_clips(path, 5), InputError, b"[" + b'"",' * 10**5 + b"1]"),
    (lambda path: listed_clips(path, 5), InputError, b"[" + b"1" * 5000 + b"]"),
    (lambda path: read_traces(path, 9, 2), InputError, b'{"row":' + b"[" * 10**5),
    (lambda path: read_traces(path, 9, 2), InputError, b'{"row":' + b"1" * 5000 + b"}"),
    (lambda path: run_metadata(open_storage(path.parent)), StoreError, b"[" * 10**5),
    (lambda path: run_metadata(open_storage(path.parent)), StoreError, b"[]"),
    (lambda _: parse_line(b"[" * 10**5, "it"), StoreError, b""),
]


@pytest.mark.parametrize(("read", "error", "data"), READERS)
def test_every_reader_takes_it_as_damage(
    read: Callable[[Path], Any], error: type[Exception], data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(error):
        read(path)


OWN_MESSAGES = {
    "ray_app/commands/correlate/command.py",
    "ray_app/commands/doctor.py",
    "ray_app/commands/replay/rows.py",
    "ray_app/commands/tune/searchers.py",
    "ray_app/sources/davis/aedat4.py",
    "serve/decoding/job.py",
}
"""Files that read what another process of this program has just written to them."""
UNBOUNDED = {"json.loads", "json.load", "yaml.load", "yaml.safe_load", "np.load", "torch.load", "Unpickler"}


def test_no_other_code_reads_files_and_bodies_without_these_bounds() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for folder in ("ray_app", "serve")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        if ast.unparse(node) in UNBOUNDED or node.attr in ("Unpickler", "get_unsafe_globals_in_checkpoint")
        or ast.unparse(node).startswith(("pickle.", "marshal.", "shelve."))
    }  # fmt: skip
    allowed = {f"{path}: json.loads" for path in OWN_MESSAGES} | {"ray_app/parsing/json_text.py: json.loads"}
    allowed |= {"ray_app/commands/demo/conversion.py: torch.load"}  # one file, known by its SHA-256; tensors only
    allowed |= {"ray_app/sources/array_files.py: np.load"}  # features of the caller's own, without pickle
    assert found <= allowed
