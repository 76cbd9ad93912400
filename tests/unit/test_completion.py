"""Completion in a real bash."""

import shutil
import subprocess

import pytest

from ray_app import cli


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash on this machine")
    from ray_app.completion import completion_script

    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{completion_script('bash', cli.COMMANDS)}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n_ray_app\n"
    )
    done = subprocess.run(
        [bash, "--norc", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ray-app", "tra"), ["train"]),
        (("ray-app", "prepare", "ar"), ["arrays"]),
        (("ray-app", "jobs", ""), ["list", "logs", "fetch", "stop"]),
        (("ray-app", "train", "--num-ep"), ["--num-epochs"]),
        (("ray-app", "prepare", "arrays", "--tar"), ["--target"]),
        (("ray-app", "serve-token", "create", "--tok"), ["--token-file"]),
        (("ray-app", "train", "--store", "--js"), ["--json"]),
    ],
)
def test_bash_offers_commands_and_their_flags(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_the_command_line_prints_the_script_and_refuses_other_shells(capfd: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh"):
        assert cli.run(["--completion", shell]) == 0
        assert "complete -o filenames -F _ray_app ray-app" in capfd.readouterr().out
    assert cli.run(["--completion", "fish"]) == 2
    assert "--completion (fish) is one of bash, zsh" in capfd.readouterr().err
