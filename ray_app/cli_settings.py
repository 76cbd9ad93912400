"""Settings of one command from four sources, the later over the earlier: defaults, `--resume`, `--config`, flags.

Values of a run or a YAML file become typed defaults of tyro's parser, in groups of fields, so that nothing is written
as words and parsed again. The command's frozen pydantic model then checks the whole once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ray_app.command_table import GROUPS, Command
from ray_app.config.base import Config
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError
from ray_app.parsing.text import read_utf8
from ray_app.parsing.yaml_text import parse_yaml

COMMON = """\
Every command also takes
  --config FILE   settings from a YAML file; flags override it, an unknown key is an error
  --json          one JSON object on standard output, and nothing else there
  --help          its settings, with their defaults
"""


NAMES_RECORD: dict[type[Config], tuple[str, ...]] = {TrainConfig: ("--resume",), TuneConfig: ("--resume", "--watch")}
"""Flags that name a run or a sweep, whose own settings are then the defaults."""
TYPE_HINTS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
"""Values in `--help`, as tyro calls them where they may not be absent."""
MOST_CHOICES = 4
"""Choices that `--help` lists next to a flag; more are in its text."""


def parse(
    name: str, command: Command, config_file: Path | None, argv: Sequence[str], trailing: Sequence[str] = ()
) -> Config:
    """Return the command's settings. ConfigError: an unknown key or flag, or a value out of range.

    A flag that is missing or has a value of another type ends the process with code 2 and tyro's words.
    """
    if command.positional == "config" and argv and not argv[0].startswith("-"):
        if config_file:
            raise ConfigError(f"{argv[0]} and --config {config_file} are two files; name one")
        config_file, argv = Path(argv[0]), argv[1:]
    known = command.config.model_fields
    flags = {key: known[key] for key in command.flags}
    refuse_unknown_flags(name, flags, argv)
    given: dict[str, Any] = {}
    for flag in NAMES_RECORD.get(command.config, ()):
        if where := value_of(flag, argv):
            recorded = recorded_settings(command, where).items()
            given |= typed({key: value for key, value in recorded if value not in (None, [])}, known, where)
    if config_file:
        given |= typed(read_yaml(config_file), known, str(config_file))
    form = grouped_form(flags, given)
    parsed: Any = tyro.cli(
        form,
        prog=f"ray-app {name}",
        description=f"{command.config.__doc__}\n\nusage: ray-app {command.usage}\n\n{COMMON}",
        args=with_subject(command, argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    values = {key: value for key, value in given.items() if key not in flags}
    for group in fields(parsed):
        part = getattr(parsed, group.name)
        values |= {each.name: getattr(part, each.name) for each in fields(part)}
    if trailing:
        values[str(command.trailing)] = tuple(trailing)
    return validated(lambda: command.config.model_validate(values), lambda key: f"--{key.replace('_', '-')}")


def recorded_settings(command: Command, where: str) -> dict[str, Any]:
    """Return the settings that a run or a sweep was started with. StoreError: it is none."""
    if command.config is TrainConfig:
        from ray_app.runs.run_dir import settings_of_run

        return settings_of_run(where)
    from ray_app.commands.tune.sweep_dir import settings_of_sweep

    return settings_of_sweep(where)


def grouped_form(known: Mapping[str, FieldInfo], given: Mapping[str, Any]) -> type:
    """Return a dataclass of one dataclass for each group of fields, with `given` over the fields' own defaults."""
    groups: dict[str, list[Any]] = {}
    for key, info in known.items():
        title = next((title for title, names in GROUPS.items() if key in names), "")
        required = info.is_required() and key not in given
        value = None if required else given.get(key, info.get_default())
        help_text = tyro.conf.arg(
            help=" ".join((info.description or "").split()),
            metavar=type_hint(info.annotation),
            help_behavior_hint="" if not required and value in (None, (), "") else None,
        )
        annotation: Any = Annotated[info.annotation, help_text]
        default = field() if required else field(default=value)
        groups.setdefault(title, []).append((key, annotation, default))
    parts = []
    for title in ("", *GROUPS):
        if title in groups:
            parts.append((title or "command", make_dataclass(title or "command", groups[title], kw_only=True)))
    return make_dataclass("Settings", parts, kw_only=True)


def type_hint(annotation: Any) -> str | None:
    """Return a short name for the values of a setting that may be absent or one of many; None: tyro's own."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if type(None) not in get_args(annotation) or len(kinds) != 1:
        return None
    kind = get_args(kinds[0])[0] if get_origin(kinds[0]) is Annotated else kinds[0]
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return f"{{{','.join(names)}}}" if len(names) <= MOST_CHOICES else "NAME"
    return TYPE_HINTS.get(kind)


def refuse_unknown_flags(name: str, known: Mapping[str, FieldInfo], argv: Sequence[str]) -> None:
    """ConfigError names a flag that the command does not have, and those that are similar."""
    flags = {f"--{key.replace('_', '-')}" for key in known} | {"--help"}
    flags |= {f"--no-{key.replace('_', '-')}" for key, info in known.items() if info.annotation is bool}
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            near = suggestion(flag, flags, f"; ray-app {name} --help lists them")
            raise ConfigError(f"ray-app {name} has no flag {flag}{near}")


def with_subject(command: Command, argv: Sequence[str]) -> list[str]:
    """Name the field that leading words without a dash are for: `inspect STORE` is `inspect --store STORE`."""
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    if command.positional in (None, "config") or not count:
        return list(argv)
    return [f"--{command.positional.replace('_', '-')}", *argv]


def typed(settings: Mapping[str, Any], known: Mapping[str, FieldInfo], source: str) -> dict[str, Any]:
    """Return settings by field name, typed as their fields. ConfigError: an unknown key or a wrong value."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{source}: unknown key '{key}'{suggestion(name, known)}")
        info = known[name]
        if isinstance(value, dict) and get_origin(info.annotation) is not dict:
            raise ConfigError(f"{source}: '{name}' must be one value or a list, not a mapping")
        if get_origin(info.annotation) is tuple and not isinstance(value, list):
            value = [value]
        elif info.annotation in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # YAML reads `num_workers: 4` as a number where the setting is text
        kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        values[name] = validated(lambda: adapter.validate_python(value), lambda _: f"{source}: {name}")  # noqa: B023
    return values


def validated(validate: Callable[[], Any], label: Callable[[str], str]) -> Any:
    """Return what `validate` returns; its first ValidationError as a ConfigError with the label of the field."""
    try:
        return validate()
    except ValidationError as error:
        first = error.errors()[0]
        place = label(str(first["loc"][0]) if first["loc"] else "")  # an element of a list is named by its list
        words = first["msg"][:1].lower() + first["msg"][1:]
        raise ConfigError(f"{place} ({str(first['input'])[:200]}): {words}") from error


def suggestion(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return "; did you mean …?" with the nearest known words; where none is near, `otherwise` or all."""
    names = sorted(known)
    near = get_close_matches(word, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise or f"; known are: {', '.join(names)}"


def value_of(option: str, argv: Sequence[str]) -> str:
    """Return the value of a flag, before the command line is parsed; empty without it."""
    for place, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == option:
            return value or " ".join(argv[place + 1 : place + 2])
    return ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a file of `key: value` lines. ConfigError: it cannot be read, or holds something else."""
    try:
        settings = parse_yaml(read_utf8(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, such as `num_epochs: 3`")
    return settings
