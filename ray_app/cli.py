"""The only reader of argv: `ray-app COMMAND …`, one frozen config a command, YAML below flags.

A value is looked for among the flags, then in the YAML file of `--config`, then in the config's defaults.
The YAML file is turned into flags that stand before the user's own, so both pass the same parser and the
later one wins.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml
from rich.console import Console

from ray_app.cluster.env_defaults import set_defaults
from ray_app.command_table import COMMANDS, Command
from ray_app.config.base import Config
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError, RayAppError

EVERYWHERE = """\
Every command also takes
  --config FILE   settings from a YAML file; flags override it, an unknown key is an error
  --json          one JSON object on standard output, and nothing else there
  --help          its settings, with their defaults
"""


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exit code 0: done; 1: a defect of ours, or a problem that `doctor` found; 2: something
    that the user can mend."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """The exit code of `ray-app ARGV`."""
    stderr = Console(stderr=True)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    try:
        name, rest = find_command(argv)
        command = COMMANDS[name]
        rest, trailing = split_trailing(command, rest)
        as_json, config_file, rest = take_common(rest)
        settings = parse(name, command, config_file, rest, trailing)
        set_defaults()
        module = importlib.import_module(f"ray_app.commands.{command.module}")
        if as_json:
            with stdout_to_stderr() as stdout:
                result = getattr(module, f"run_{command.function}")(settings)
            with stdout:
                print(json.dumps(result, allow_nan=False), file=stdout)
        else:
            result = getattr(module, f"run_{command.function}")(settings)
            getattr(module, f"render_{command.function}")(result, Console())
    except RayAppError as error:
        stderr.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        stderr.print("interrupted")
        return 130
    if command.exit_code:
        return int(result[command.exit_code])
    return 1 if command.failures and result[command.failures] else 0


def overview() -> str:
    """The list of commands."""
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"  ray-app {command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    return "\n".join(["usage: ray-app COMMAND …", "", *lines, "", EVERYWHERE])


def find_command(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what stands behind it."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    second = [name.split()[1] for name in COMMANDS if name.split()[0] == argv[0] and " " in name]
    if second and argv[1:2] in (["-h"], ["--help"]):
        print(overview())
        raise SystemExit(0)
    if second:
        raise ConfigError(
            f"'{argv[0]}' needs one of: {', '.join(second)}; for instance: ray-app {argv[0]} {second[0]}"
        )
    raise ConfigError(f"there is no command '{argv[0]}'; there are: {', '.join(COMMANDS)}")


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


def split_trailing(command: Command, argv: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and those after `--`, which are checked as the command that they are."""
    if not command.trailing or "--" not in argv:
        return argv, []
    at = argv.index("--")
    own, trailing = argv[:at], argv[at + 1 :]
    if trailing and "--resume" not in trailing:  # which would read the run, and that lies on the cluster
        name, rest = find_command(trailing)
        _, config_file, rest = take_common(rest)
        parse(name, COMMANDS[name], config_file, rest)
    return own, trailing


def parse(
    name: str, command: Command, config_file: Path | None, argv: list[str], trailing: Sequence[str] = ()
) -> Config:
    """The command's config from YAML and flags. A wrong flag ends the process with code 2 and a hint."""
    if trailing:
        return parse(name, command, config_file, [*argv, f"--{command.trailing}", "-"]).model_copy(
            update={str(command.trailing): tuple(trailing)}
        )
    leading: list[str] = []
    if command.positional:
        while len(leading) < len(argv) and not argv[len(leading)].startswith("-"):
            leading.append(argv[len(leading)])
        argv = argv[len(leading) :]
        if leading:
            leading = [f"--{command.positional.replace('_', '-')}", *leading]
    from_yaml = yaml_flags(config_file, command.config) if config_file else []
    from_yaml = resumed_flags(argv) + from_yaml if command.config is TrainConfig else from_yaml
    description = f"{command.config.__doc__}\n\nusage: ray-app {command.usage}\n\n{EVERYWHERE}"
    return tyro.cli(
        command.config, prog=f"ray-app {name}", description=description, args=[*from_yaml, *leading, *argv]
    )


class SettingsLoader(yaml.SafeLoader):
    """YAML in which 1:8 is text, not 68: YAML 1.1 reads it in base 60."""


SettingsLoader.yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers | {
    digit: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *yaml.SafeLoader.yaml_implicit_resolvers[digit]]
    for digit in "0123456789"
}


def yaml_flags(path: Path, config: type[Config]) -> list[str]:
    """The YAML file as flags. Unknown keys and nested values raise `ConfigError`."""
    try:
        settings = yaml.load(path.read_text(), SettingsLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, such as `num_epochs: 3`")
    known = config.model_fields
    flags: list[str] = []
    for key, value in settings.items():
        field = str(key).replace("-", "_")
        if field not in known:
            raise ConfigError(f"{path}: unknown key '{key}'; known are: {', '.join(sorted(known))}")
        flags += flag(field, value, path)
    return flags


def resumed_flags(argv: list[str]) -> list[str]:
    """The settings of the run that `--resume RUN` names, as flags; none without it. StoreError: not a run."""
    words = [word.partition("=") for word in argv]
    at = next((i for i, (name, _, _) in enumerate(words) if name == "--resume"), None)
    value = words[at][2] or " ".join(argv[at + 1 : at + 2]) if at is not None else ""
    if not value:
        return []
    from ray_app.runs.remote_run import settings_of_run

    settings = settings_of_run(value)
    return [word for key, given in settings.items() if given not in (None, []) for word in flag(key, given, value)]


def flag(field: str, value: Any, path: Path | str) -> list[str]:
    """One YAML value as flag words."""
    option = field.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, list):
        return [f"--{option}", *(str(item) for item in value)]
    if isinstance(value, dict):
        raise ConfigError(f"{path}: '{field}' must be one value or a list, not a mapping")
    return [f"--{option}", str(value)]


class stdout_to_stderr:
    """Everything that is written to standard output, by child processes too, goes to standard error.

    Entered, it gives the real standard output as a text file.
    """

    def __enter__(self) -> Any:
        sys.stdout.flush()
        self._kept = os.dup(1)
        os.dup2(2, 1)
        self._stdout = os.fdopen(os.dup(self._kept), "w")
        return self._stdout

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._kept, 1)
        os.close(self._kept)
