"""The command line: YAML below flags, errors that name the fix, one JSON object and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_app import cli
from ray_app.command_table import GROUPS
from ray_app.config.base import Config
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError


def parse(name: str, *argv: str) -> Config:
    _, config_file, rest = cli.take_common(list(argv))
    return cli.parse(name, cli.COMMANDS[name], config_file, rest)


def test_a_flag_overrides_the_file_and_the_file_overrides_the_default(tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("store: S\nout: R\nnum_epochs: 7\nhidden-dim: 64\nuse_gpu: true\ndurations: [1s, 2s]\n")
    cfg = parse("train", "--config", str(settings), "--num-epochs", "3")
    assert isinstance(cfg, TrainConfig)
    assert (cfg.num_epochs, cfg.hidden_dim, cfg.batch_size) == (3, 64, 32)
    assert cfg.use_gpu
    assert cfg.durations == ("1s", "2s")


def test_the_flags_of_the_reference_are_understood() -> None:
    argv = ["--store", "S", "--out", "R", "--strategy", "lightweight", "--durations", "1s"]
    argv += ["--num_epochs", "20", "--batch_size", "32"]
    cfg = parse("train", *argv, "--learning_rate", "1e-3")
    assert isinstance(cfg, TrainConfig)
    assert (cfg.num_epochs, cfg.batch_size, cfg.learning_rate, cfg.durations) == (20, 32, 1e-3, ("1s",))


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("num_epoch: 7\n")
    with pytest.raises(ConfigError, match=r"unknown key 'num_epoch'; did you mean num_epochs"):
        parse("train", "--config", str(settings))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("num_epochs: 0", r"train.yaml: num_epochs \(0\): "),
        ("split: {by: window}", "'split' must be one value or a list"),
    ],
)
def test_a_wrong_value_in_a_file_is_named_with_its_key(line: str, words: str, tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text(f"store: S\nout: R\n{line}\n")
    with pytest.raises(ConfigError, match=words):
        parse("train", "--config", str(settings))


def test_every_value_that_a_file_can_hold_has_the_type_of_its_field(tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("store: 5\nout: R\nlearning_rate: 1e-3\ndurations: 1s\nhidden_dim: null\ninit_from: runs/a\n")
    cfg = parse("train", "--config", str(settings))
    assert cfg == TrainConfig(store="5", out="R", learning_rate=1e-3, durations=("1s",), init_from=Path("runs/a"))


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("- 1\n")
    with pytest.raises(ConfigError, match="key: value"):
        parse("train", "--config", str(settings))


@pytest.mark.parametrize("workers", ["0", "3:2", "0:2", "1:", ":2", "1:2:3", "many", "-1", "1.5"])
def test_a_number_of_workers_that_is_not_one_is_refused_with_the_form(workers: str) -> None:
    with pytest.raises(ConfigError, match="a number from 1 on, or MIN:MAX with 1 ≤ MIN ≤ MAX"):
        parse("train", "--store", "S", "--out", "R", f"--num-workers={workers}")


def test_workers_may_not_be_more_than_pairs_of_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"1:64.*take at most 32"):
        parse("train", "--store", "S", "--out", "R", "--num-workers", "1:64")


@pytest.mark.parametrize(("text", "fewest", "most"), [("1:8", 1, 8), ("4", 4, 4), ("'2:3'", 2, 3), ("1:59", 1, 59)])
def test_workers_in_a_file_are_those_of_the_flag_and_not_a_number_in_base_60(
    text: str, fewest: int, most: int, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"store: S\nout: R\nbatch_size: 64\nnum_workers: {text}\n")
    cfg = parse("train", "--config", str(settings))
    assert isinstance(cfg, TrainConfig)
    assert (cfg.min_workers, cfg.max_workers, cfg.elastic) == (fewest, most, ":" in text)


def test_leading_words_are_the_commands_subject() -> None:
    cfg = parse("prepare video", "a.mp4", "b.mp4", "--out", "S")
    assert cfg.model_dump()["files"] == (Path("a.mp4"), Path("b.mp4"))
    assert parse("inspect", "S") == parse("inspect", "--store", "S")


def test_words_after_two_dashes_are_a_command_of_their_own() -> None:
    argv = ["--env", "A", "--", "train", "--store", "S", "--out", "R"]
    own, trailing, job = cli.split_trailing(cli.COMMANDS["submit"], argv)
    assert (job and job.model_dump()["store"]) == "S"
    cfg = cli.parse("submit", cli.COMMANDS["submit"], None, own, trailing)
    assert (cfg.model_dump()["command"], cfg.model_dump()["env"]) == (tuple(argv[3:]), ("A",))
    with pytest.raises(ConfigError, match="train has no flag --stor"):
        cli.split_trailing(cli.COMMANDS["submit"], ["--", "train", "--stor", "S"])


def test_help_and_mistakes_import_neither_ray_nor_torch_nor_mlflow() -> None:
    code = (
        "import sys\nfrom ray_app import cli\n"
        "for words in ('--help', '--version', 'nonsense', 'prepare --help', 'train --help', 'train --x'):\n"
        "    try:\n        cli.run(words.split())\n    except SystemExit:\n        pass\n"
        "sys.exit(', '.join({'ray', 'torch', 'mlflow'} & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_a_help_group_is_a_setting_of_a_command() -> None:
    known = {name for command in cli.COMMANDS.values() for name in command.config.model_fields}
    names = [name for group in GROUPS.values() for name in group]
    assert set(names) <= known
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], ["error: there is no command 'nonsense'", "train"]),
        (["trian"], ["error: there is no command 'trian'; did you mean train?"]),
        (["prepare", "vidoe"], ["there is no command 'prepare vidoe'; did you mean video?"]),
        (["train", "--num-epoch", "3"], ["train has no flag --num-epoch; did you mean --num-epochs"]),
        (["train", "--store", "S", "--out", "R", "--num-epochs", "0"], ["error: --num-epochs (0): ", "equal to 1"]),
        (["prepare"], ["needs one of: scenes, video, eventgpt"]),
        (["inspect", "/does/not/exist"], ["/does/not/exist"]),
        (["train", "--config", "/does/not/exist.yaml"], ["cannot be read as YAML"]),
    ],
)
def test_what_the_user_can_fix_is_one_sentence_and_code_2(
    argv: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(argv) == 2
    out, err = capfd.readouterr()
    assert not out
    assert "Traceback" not in err
    for word in words:
        assert word in err.replace("\n", " ")


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom ray_app.cli import stdout_to_stderr\n"
        "with stdout_to_stderr() as out:\n"
        "    print('noise'); os.system('echo child noise')\n"
        "print('{\"a\": 1}', file=out, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {"a": 1}
    assert "noise" in done.stderr
    assert "child noise" in done.stderr


def test_every_command_teaches_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ray-app ")
    assert cli.run(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert command.usage in overview
        with pytest.raises(SystemExit, match="0"):
            cli.run([*name.split(), "--help"])
        text = capsys.readouterr().out
        assert "--config" in text
        assert not [empty for empty in ("None", "(default: )") if empty in text]
