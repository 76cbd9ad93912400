"""The only reader of argv: `ray-app COMMAND …` runs a command of `command_table` and prints its result.

Ray, torch and MLflow are imported with the command's module, after its settings have been read.
"""

import importlib
import io
import json
import os
import select
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ray_app.cli_settings import COMMON, parse, suggestion
from ray_app.cluster.env_defaults import set_defaults
from ray_app.command_table import COMMANDS, Command
from ray_app.completion import completion_script
from ray_app.config.base import Config
from ray_app.config.submit import SubmitConfig
from ray_app.errors import ConfigError, RayAppError
from ray_app.preflight import refuse_early, refuse_job
from ray_app.terminal import make_console

EXIT_CLOSED_PIPE = 141
"""Exit code of a process that SIGPIPE ended."""


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exit code 0: done; 1: a bug, or a problem that `doctor` found; 2: an error of the user."""
    open_streams()
    try:
        try:
            code = run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (closed := [number for number in (1, 2) if reader_is_gone(number)]):
            raise
        for number in closed:  # what is left in buffers goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        code = EXIT_CLOSED_PIPE
    sys.exit(code)


def open_streams() -> None:
    """Open the null device for standard streams that are closed, and print what a terminal's encoding lacks as ?."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def reader_is_gone(number: int) -> bool:
    """Return True if a file descriptor is a pipe that nothing reads any more."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run(argv: list[str]) -> int:
    """Run `ray-app ARGV` and return its exit code."""
    stderr = make_console(stderr=True)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return 0
    if argv == ["--version"]:
        print(f"ray-app {own_version()}")
        return 0
    try:
        if argv[0] == "--completion":
            print(completion_script(" ".join(argv[1:]), COMMANDS), end="")
            return 0
        name, rest = find_command(argv)
        command = COMMANDS[name]
        rest, trailing, job = split_trailing(command, rest)
        as_json, config_file, rest = take_common(rest)
        settings = parse(name, command, config_file, rest, trailing)
        refuse_early(settings)
        if isinstance(settings, SubmitConfig):
            refuse_job(settings, job)
        set_defaults()
        module = importlib.import_module(f"ray_app.commands.{command.module}")
        if as_json:
            with stdout_to_stderr() as stdout:
                result = getattr(module, f"run_{command.function}")(settings)
            with stdout:
                print(json.dumps(result, allow_nan=False), file=stdout)
        else:
            result = getattr(module, f"run_{command.function}")(settings)
            getattr(module, f"render_{command.function}")(result, make_console())
    except RayAppError as error:
        stderr.print("error:", style="bold red", end=" ")
        stderr.print(str(error), soft_wrap=True)
        return error.exit_code
    except PermissionError as error:
        if error.filename is None:
            raise
        stderr.print("error:", style="bold red", end=" ")
        stderr.print(f"{error.filename}: permission denied; take a folder or file of your own", soft_wrap=True)
        return RayAppError.exit_code
    except KeyboardInterrupt:
        stderr.print("interrupted")
        return 130
    if command.exit_code:
        return int(result[command.exit_code])
    return 1 if command.failures and result[command.failures] else 0


def overview(commands: dict[str, Command]) -> str:
    """Return the list of these commands."""
    width = max(len(command.usage) for command in commands.values())
    lines = [f"  ray-app {command.usage:<{width}}  {command.help}" for command in commands.values()]
    return "\n".join(
        ["usage: ray-app COMMAND …", "", *lines, "", f"{COMMON}\n  ray-app --version | --completion bash"]
    )


def own_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("ray-app")
    except PackageNotFoundError:
        return "(not installed)"


def find_command(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command's name, of one word or two, and the words after it. ConfigError: no such command."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    family = {name: command for name, command in COMMANDS.items() if name.startswith(f"{argv[0]} ")}
    if not family:
        raise ConfigError(f"there is no command '{argv[0]}'{suggestion(argv[0], COMMANDS)}")
    if argv[1:2] in (["-h"], ["--help"]):
        print(overview(family))
        raise SystemExit(0)
    second = [name.split()[1] for name in family]
    if len(argv) > 1 and not argv[1].startswith("-"):
        raise ConfigError(f"there is no command '{argv[0]} {argv[1]}'{suggestion(argv[1], second)}")
    raise ConfigError(f"'{argv[0]}' needs one of: {', '.join(second)}; for instance: ray-app {argv[0]} {second[0]}")


def take_common(argv: list[str]) -> tuple[bool, Path | None, list[str]]:
    """Split off `--json` and `--config FILE`."""
    rest: list[str] = []
    as_json, config_file = False, None
    words = iter(argv)
    for word in words:
        if word == "--json":
            as_json = True
        elif word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] or next(words, "")
            if not value:
                raise ConfigError("--config needs a YAML file: --config settings.yaml")
            config_file = Path(value)
        else:
            rest.append(word)
    return as_json, config_file, rest


def split_trailing(command: Command, argv: list[str]) -> tuple[list[str], list[str], Config | None]:
    """Split off the words after `--`: another command, whose settings are checked here and returned."""
    if not command.trailing or "--" not in argv:
        return argv, [], None
    dashes = argv.index("--")
    own, trailing = argv[:dashes], argv[dashes + 1 :]
    job: Config | None = None
    if trailing and "--resume" not in trailing:  # the run that it resumes may be visible on the cluster alone
        name, rest = find_command(trailing)
        _, config_file, rest = take_common(rest)
        job = parse(name, COMMANDS[name], config_file, rest)
    return own, trailing, job


class stdout_to_stderr:
    """Send everything written to standard output, by child processes too, to standard error.

    Entering gives the real standard output as a text file.
    """

    def __enter__(self) -> Any:
        sys.stdout.flush()
        self._kept = os.dup(1)
        os.dup2(2, 1)
        self._replaced, sys.stdout = sys.stdout, sys.stderr
        self._stdout = os.fdopen(os.dup(self._kept), "w", encoding="utf-8")
        return self._stdout

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._replaced
        sys.stdout.flush()
        os.dup2(self._kept, 1)
        os.close(self._kept)
