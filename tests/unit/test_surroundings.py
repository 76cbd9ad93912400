"""Where people run it: terminals, locales, proxies, temporary folders, closed streams, Ctrl-C."""

import ast
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from rich.table import Table

from ray_app.cluster.env_defaults import exclude_loopback_from_proxies, show_warnings, token_path
from ray_app.cluster.interrupts import interrupt_after
from ray_app.terminal import make_console

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for package in ("ray_app", "serve") for path in sorted((ROOT / package).rglob("*.py"))]
RUN = [sys.executable, "-m", "ray_app"]


@cache
def calls() -> list[tuple[Path, str, ast.Call]]:
    """Each call in the product, with its file and what is called."""
    return [
        (path, ast.unparse(node.func), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
    ]


# --- text ---


def test_what_is_printed_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["runs/[night]", "[/]", "[bold red]x", ":star:", r"\[x]", "[link=http://x]"]
    table = Table(*names)
    table.add_row(*names)
    console = make_console()
    console.width = 200
    console.print(table)
    console.print(*names, sep="\n")
    printed = capsys.readouterr().out
    assert all(printed.count(name) == 3 for name in names), printed


def test_there_is_one_kind_of_console() -> None:
    made = {path.name for path, name, _ in calls() if name.rpartition(".")[2] == "Console"}
    assert made == {"terminal.py"}


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    for path, name, call in calls():
        verb, given = name.rpartition(".")[2], {word.arg for word in call.keywords}
        text = verb in ("read_text", "write_text") or (
            (verb in ("fdopen", "open") and name not in NOT_FILES)
            and any(isinstance(arg, ast.Constant) and str(arg.value) in "rwax" for arg in call.args)
        )
        assert not text or "encoding" in given, f"{path}, line {call.lineno}: {ast.unparse(call)}"


NOT_FILES = {"os.open", "Image.open", "av.open"}


def test_help_is_printed_where_the_terminal_has_no_unicode() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*RUN, "train", "--help"], env=os.environ | locale, capture_output=True, check=True)
    assert b"--tracking-uri" in done.stdout


# --- streams ---


@pytest.mark.parametrize(
    ("closed", "words", "code", "printed"), [("2>&-", "nothing", 2, ""), ("<&- 2>&-", "--help", 0, "ray-app train")]
)
def test_a_closed_stream_changes_nothing_on_the_others(closed: str, words: str, code: int, printed: str) -> None:
    done = subprocess.run(["sh", "-c", f'"$@" {words} {closed}', "sh", *RUN], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (printed in done.stdout) if printed else not done.stdout
    assert not done.stderr


def test_a_pipe_that_is_closed_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, "train", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
    os.close(write)


def test_ctrl_c_while_ray_starts_is_held_back_until_it_has_started(capsys: pytest.CaptureFixture[str]) -> None:
    before, started = signal.getsignal(signal.SIGINT), []
    with suppress(KeyboardInterrupt):
        with interrupt_after():
            signal.raise_signal(signal.SIGINT)
            started.append(1)
        started.append(2)
    assert started == [1]
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped in a moment" in capsys.readouterr().err
    with interrupt_after():
        pass


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    program = (
        "import signal; from ray_app.cluster.interrupts import interrupt_after\n"
        "with interrupt_after():\n signal.raise_signal(2); signal.raise_signal(2); print('on')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")


# --- environment ---


def test_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    exclude_loopback_from_proxies()
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet, 127.0.0.1")
    monkeypatch.setenv("no_proxy", "intranet, 127.0.0.1")
    for _ in range(2):
        exclude_loopback_from_proxies()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet,127.0.0.1,localhost,::1"


def test_without_a_home_folder_there_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry
    assert not token_path().is_file()


def test_warnings_that_the_environment_makes_errors_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_warnings()
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)
    assert "PYTHONWARNINGS" not in os.environ
    assert capsys.readouterr().err.count("\n") == 1
