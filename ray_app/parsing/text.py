"""Text files of people: UTF-8, with the byte order mark that Windows puts in front, or without it."""

from pathlib import Path


def read_utf8(path: Path) -> str:
    """Return a file's text. OSError: it cannot be read; ValueError: no UTF-8."""
    return decode_text(path.read_bytes())


def decode_text(data: bytes | bytearray | memoryview) -> str:
    """Return UTF-8 as text, without a byte order mark. ValueError: another encoding."""
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); save it as UTF-8"
        ) from error


def printable(text: str) -> str:
    """Return a text that can be written as UTF-8, with \\udcXX for each byte of a file name that is none."""
    return text.encode("utf-8", "backslashreplace").decode()
