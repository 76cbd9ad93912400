"""The container file: linted, and its steps replayed as far as they go without a container engine and a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "Containerfile"
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
INSTRUCTION = re.compile(r"^([A-Z]+) ((?:[^\\\n]|\\\n|\\.)*)", re.MULTILINE)
TEXT = re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.MULTILINE)
STEPS = [(name, rest.replace("\\\n", " ").strip()) for name, rest in INSTRUCTION.findall(TEXT)]
COPIED = [source for name, rest in STEPS if name == "COPY" for source in rest.split()[:-1]]


def test_its_instructions_keep_the_rules_of_the_trade() -> None:
    """Rules of a linter that apply here.

    Known instructions, exec form, absolute folders, commands that sh can read, packages without what they recommend,
    and no caches left in the image.
    """
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD", "ENTRYPOINT", "EXPOSE", "LABEL", "SHELL"}
    assert {name for name, _ in STEPS} <= known
    assert "".join(f"{name} {rest}\n" for name, rest in INSTRUCTION.findall(TEXT)) == re.sub(r"\n+", "\n", TEXT)
    for name, rest in STEPS:
        if name in ("CMD", "ENTRYPOINT"):
            assert isinstance(json.loads(rest), list), rest
        elif name == "WORKDIR":
            assert rest.startswith("/"), rest
        elif name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0, rest
            assert not re.search(r"\b(sudo|ssh|curl [^|]*\| *(ba)?sh)\b ", rest), rest
            if "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "--yes" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
            if "pip install" in rest:
                assert "--no-cache-dir" in rest
                assert "--constraint constraints.txt" in rest


def test_it_copies_what_is_here_and_ends_without_powers() -> None:
    kept = [line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")]
    assert COPIED
    for source in COPIED:
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is kept from the builder by .containerignore"
    names = [name for name, _ in STEPS]
    assert "ADD" not in names
    assert names.index("USER") > max(i for i, (name, _) in enumerate(STEPS) if name in ("RUN", "COPY"))
    assert dict(STEPS)["USER"] == "1000"
    assert f"{next(line for line in CONSTRAINTS if line.startswith('torch=='))} " in TEXT
    assert not re.search(r"(?i)(password|secret|token|key)\s*=", TEXT)
    assert re.fullmatch(r"docker\.io/library/python:\$\{PYTHON\}-slim-bookworm", dict(STEPS)["FROM"])


def test_it_has_every_extra_that_it_names() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"'\.\[([a-z,]+)\]'", TEXT)
    assert named
    for extra in (extra for group in named for extra in group.split(",")):
        for package in extras[extra]:
            assert any(line.startswith(f"{package}==") for line in CONSTRAINTS), package


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image's /opt/ray-app holds, and in `wheels/` what its second RUN makes of it, dependencies apart."""
    folder = tmp_path_factory.mktemp("image")
    for name, rest in STEPS:
        *sources, target = rest.split()
        for source in sources if name == "COPY" else ():
            into = folder / (source if target == "./" else target)
            hidden = shutil.ignore_patterns("__pycache__")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, ignore=hidden)
            else:
                shutil.copy(ROOT / source, into)
        if name == "RUN" and "pip install" in rest:
            words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir=wheels", "."]
            subprocess.run([sys.executable, "-m", "pip", *words], cwd=folder, check=True)
    return folder


def test_what_it_installs_is_whole(image: Path) -> None:
    (wheel,) = (image / "wheels").glob("ray_app-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ray_app/")}
    assert packed == {str(path.relative_to(image)) for path in (image / "ray_app").rglob("*") if path.is_file()}


def test_the_command_and_the_endpoint_start_from_what_it_holds(image: Path) -> None:
    settings = dict(re.findall(r"(\w+)=(\S+)", dict(STEPS)["ENV"]))
    assert settings["PYTHONPATH"] == dict(STEPS)["WORKDIR"] == "/opt/ray-app"
    environment = {**os.environ, **settings, "PYTHONPATH": str(image), "PYTHONSAFEPATH": "1"}
    for words in (
        ["-m", "ray_app", "--help"],
        ["-c", "import serve.app, ray_app; print(serve.app.__file__, ray_app)"],
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=image.parent, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
        assert "submit" in done.stdout if "--help" in words else done.stdout.count(str(image)) == 2
