"""Completion of commands and flags in bash and zsh, as a script: `ray-app --completion bash`."""

from collections.abc import Mapping

from ray_app.command_table import Command
from ray_app.errors import ConfigError

SHELLS = ("bash", "zsh")
SCRIPT = """\
{prelude}_ray_app() {{
  local here=${{COMP_WORDS[COMP_CWORD]}} two="${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}} " words=""
  if [ "$COMP_CWORD" = 1 ]; then words="{first}"; else
    case "$two" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$here"))
  [ -n "$COMPREPLY" ] || COMPREPLY=($(compgen -f -- "$here"))
}}
complete -o filenames -F _ray_app ray-app
"""


def completion_script(shell: str, commands: Mapping[str, Command]) -> str:
    """Return the script for a shell. ConfigError: there is none for it."""
    if shell not in SHELLS:
        raise ConfigError(f"--completion ({shell or 'nothing'}) is one of {', '.join(SHELLS)}")
    seconds: dict[str, list[str]] = {}
    cases = []
    for name, command in commands.items():
        flags = [f"--{key.replace('_', '-')}" for key in command.flags]
        cases.append(f'      "{name} "*) words="{" ".join([*flags, "--config", "--json", "--help"])}";;')
        if " " in name:
            first, second = name.split()
            seconds.setdefault(first, []).append(second)
    cases.sort(key=lambda case: -case.index('"*)'))  # `serve-token create` before `serve`
    cases += [f'      "{first} "*) words="{" ".join(names)}";;' for first, names in seconds.items()]
    firsts = dict.fromkeys([*(name.split()[0] for name in commands), "--help", "--version"])
    return SCRIPT.format(
        prelude="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        first=" ".join(firsts),
        cases="\n".join(cases),
    )
