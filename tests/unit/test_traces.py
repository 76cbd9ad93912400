"""Traces are read whole, bad lines are rejected with their number, and what would mislead is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_traces import TIMING, rows, write
from pydantic import ValidationError

from ray_app.errors import InputError
from ray_app.store.traces import MOST_BAD, Trace, read_timing, read_traces


def read(path: Path) -> Any:
    return read_traces(path, vocabulary=32_000, end_token=2)


def test_every_row_of_a_file_is_read(tmp_path: Path) -> None:
    made = rows(12)
    file = read(write(tmp_path / "a.jsonl", made))
    assert [trace.target_tokens for trace in file.traces] == [row["target_tokens"] for row in made]
    assert file.traces[3].timing_ms.target_prefill == TIMING["target_prefill"]
    assert (file.rejected, file.cut_off) == ((), 0)


def test_a_file_of_windows_loses_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    file = read(path)
    assert ([trace.row for trace in file.traces], file.rejected) == ([0, 1, 2], ())


def test_answers_without_an_end_token_are_counted(tmp_path: Path) -> None:
    made = rows(5)
    for row in made[:3]:
        row["target_tokens"] = row["target_tokens"][:-1]
    assert read(write(tmp_path / "a.jsonl", made)).cut_off == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_tokens": []}, "output is empty"),
        ({"target_tokens": [5, 32_000]}, "outside --vocabulary"),
        ({"draft_tokens": [5, 2, 7]}, "has tokens after the end token 2"),
        ({"draft_tokens": [1.5]}, "draft_tokens.0"),
        ({"target_tokens": [-1]}, "target_tokens.0"),
        ({"question": None}, "question"),
        ({"timing_ms": {"target_prefill": 1.0}}, "target_per_token"),
        ({"timing_ms": {**TIMING, "target_prefill": -1.0}}, "target_prefill"),
    ],
)
def test_a_row_that_cannot_be_used_costs_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    made = rows(6)
    made[3].update(change)
    file = read(write(tmp_path / "a.jsonl", made))
    assert [trace.row for trace in file.traces] == [0, 1, 2, 4, 5]
    assert file.rejected[0].line == 4
    assert words in file.rejected[0].reason


@pytest.mark.parametrize(
    "change",
    [
        {"target_tokens": ["x"] * 5000},
        {"draft_tokens": [[]] * 5000},
        {"timing_ms": {f"{n}": 1.0 for n in range(5000)}},
        {"timing_ms": {**TIMING, "verify": {f"x{n}": 1.0 for n in range(5000)}}},
    ],
)
def test_of_many_problems_the_first_alone_is_kept(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Trace.model_validate(rows(1)[0] | change)
    assert caught.value.error_count() == 1


def test_a_file_of_bad_lines_is_refused_soon(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(2))
    path.write_bytes(path.read_bytes() + b"{}\n" * (MOST_BAD + 1) + b"never read")
    with pytest.raises(InputError, match=r"more than 10,000 lines cannot be used; line 3: row: field required"):
        read(path)


def test_a_truncated_line_and_broken_text_are_set_aside_with_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(4))
    path.write_bytes(path.read_bytes() + b'{"row": 9, "question": "wh\n\xff\xfe\n[1, 2]\n')
    file = read(path)
    assert len(file.traces) == 4
    assert [bad.line for bad in file.rejected] == [5, 6, 7]


def test_an_empty_draft_is_an_output_too(tmp_path: Path) -> None:
    made = rows(3)
    made[1]["draft_tokens"] = []
    assert read(write(tmp_path / "a.jsonl", made)).traces[1].prompt.event_tokens == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": 1}, "line 3: row 1 is there twice"),
        ({"row": 0}, "line 3: row 0 comes behind row 1"),
        ({"temperature": 0.7}, "line 3: the target was sampled"),
        ({"do_sample": True}, "do_sample=False"),
    ],
)
def test_what_would_mislead_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    made = rows(4)
    made[2].update(change)
    with pytest.raises(InputError, match=words):
        read(write(tmp_path / "a.jsonl", made))


def test_two_tokenizers_are_seen_where_the_texts_allow(tmp_path: Path) -> None:
    made = rows(4)
    same = {"draft_text": "The car", "target_text": "The car", "target_tokens": [450, 1559, 2]}
    made[1].update(same, draft_tokens=[791, 1841, 2])
    with pytest.raises(InputError, match="same text in different tokens"):
        read(write(tmp_path / "a.jsonl", made))
    made[1].update(draft_tokens=[450, 1559, 2])
    assert len(read(write(tmp_path / "a.jsonl", made)).traces) == 4
    made[1].update(draft_text="The road", draft_tokens=[791, 5754, 2])
    with pytest.raises(InputError, match="'The' at the start is token 791 in the drafts and 450"):
        read(write(tmp_path / "a.jsonl", made))


def test_a_file_that_is_missing_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n{}\n")
    with pytest.raises(InputError, match=r"no row that can be replayed; line 2"):
        read(tmp_path / "empty.jsonl")


def test_measured_times_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "timing.json"
    path.write_text(json.dumps({**TIMING, "verify": {"8": 16.5}}))
    assert read_timing(path).verify == {8: 16.5}
    for wrong in ("{}", '{"target_prefill": 1, "target_per_token": NaN}', "nothing", '{"target_prefil": 1}'):
        path.write_text(wrong)
        with pytest.raises(InputError, match="in milliseconds"):
            read_timing(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TIMING).encode())
    assert read_timing(path).target_prefill == TIMING["target_prefill"]
    path.write_bytes(json.dumps(TIMING).encode("utf-16"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_timing(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_timing(tmp_path / "none.json")


def test_the_recorded_traces_are_whole(shared_data: Path) -> None:
    files = [read(path) for path in sorted((shared_data / "tokens").glob("*.jsonl"))]
    assert [len(file.traces) for file in files] == [700, 540, 260, 193]
    assert not any(file.rejected for file in files)
