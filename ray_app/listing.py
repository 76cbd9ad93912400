"""Listings of folders as people have them: what macOS and Windows leave next to the files is no data."""

from pathlib import Path

LEFT_BY_SYSTEMS = {
    *(".ds_store", "__macosx", ".spotlight-v100", ".fseventsd", ".trashes", ".temporaryitems", ".apdisk", "icon\r"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", ".directory", ".ipynb_checkpoints"),
}
"""Names that systems, file managers and notebooks write into any folder, in small letters."""


def is_data(name: str) -> bool:
    """True unless the system left the file or folder: as `._NAME`, macOS's companion of NAME, or by a name above."""
    return not name.startswith("._") and name.lower() not in LEFT_BY_SYSTEMS


def data_in(folder: Path) -> list[Path]:
    """Return the files and folders of a folder that are data, sorted. OSError: as `Path.iterdir`."""
    return sorted(path for path in folder.iterdir() if is_data(path.name))
