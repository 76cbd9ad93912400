"""The wheel is whole: built with pip, installed into an environment of its own, away from the checkout.

Its dependencies are those of the environment that runs the tests, read from there: the package itself is not.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest
from endpoints import make_checkpoint
from mlflow_process import free_port

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = """
import importlib, sys
from importlib.resources import files
from ray_app import cli
from ray_app.command_table import COMMANDS

assert sys.prefix in cli.__file__, cli.__file__
for name, command in COMMANDS.items():
    module = importlib.import_module(f"ray_app.commands.{command.module}")
    assert hasattr(module, f"run_{command.function}") and hasattr(module, f"render_{command.function}"), name
    try:
        cli.run([*name.split(), "--help"])
    except SystemExit as end:
        assert not end.code, name
assert (files("ray_app") / "py.typed").is_file()
assert (files("ray_app.reports") / "templates" / "page.html.j2").is_file()
assert (files("serve") / "config.yaml").is_file()
for name in ("golden.json", "parts/MANIFEST.sha256", "parts/adapter.safetensors"):
    assert (files("ray_app.commands.demo") / name).is_file(), name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what is packaged."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for package in ("ray_app", "serve"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(folder)], check=True)
    (built,) = folder.glob("ray_app-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel alone, that finds the dependencies of this one after it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], env=environment(), check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return python


def environment() -> dict[str, str]:
    """Return the variables of this process, without the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_it_says_what_it_is_and_what_its_extras_are(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        assert not [
            name
            for name in archive.namelist()
            if name.split("/")[0] not in ("ray_app", "serve", metadata.split("/")[0])
        ]
    assert {"davis", "models", "demo", "cluster", "traces"} <= {
        line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")
    }
    for classifier in (
        "Programming Language :: Python :: 3.11",
        "Typing :: Typed",
        "Operating System :: POSIX :: Linux",
    ):
        assert f"Classifier: {classifier}" in lines


def test_every_command_is_in_it(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(python), "-c", EVERYTHING], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version = subprocess.run(
        [str(python.with_name("ray-app")), "--version"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert version.stdout.startswith("ray-app ")
    assert "not installed" not in version.stdout


def test_it_serves(python: Path, tmp_path: Path) -> None:
    checkpoint, port = make_checkpoint(tmp_path / "checkpoint"), free_port()
    command = [str(python.with_name("ray-app")), "serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving "):
                break
        assert process.poll() is None, "".join(said)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        for path, words in (("/v2/health/ready", '{"ready":true}'), ("/", "<!doctypehtml>")):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
                assert words in answer.read().decode().replace(" ", "").lower()
    finally:
        process.terminate()
    assert process.wait(400) == 0
