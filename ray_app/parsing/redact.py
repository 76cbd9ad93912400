"""Passwords and tokens are taken out of URLs before a text is stored, logged or printed."""

import re

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(\S*)")
PATH_SCHEMES = {"s3", "gs", "gcs", "file", "hdfs", "viewfs"}
"""Schemes whose paths may hold an @ that no userinfo is before."""


def redact(text: str) -> str:
    """Return a text with `***` for the userinfo of each URL in it, and for each value of its query and fragment."""
    return URL.sub(lambda url: f"{url[1]}://{_redact_rest(url[1].lower(), url[2])}", text)


def _redact_rest(scheme: str, rest: str) -> str:
    """Return what is after `://`. A password may be written with / ? and #, which end userinfo for a parser."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in (authority if scheme in PATH_SCHEMES else rest):
        rest = f"***@{rest.rpartition('@')[2]}"
    place, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    values = re.sub(r"=[^&#]*", "=***", query)  # in one value ; divides settings, as of ODBC
    place = re.sub(r"(;[^=;/]*=)[^;/]*", r"\1***", place)
    return f"{place}{mark}{'***' if mark == '?' and query and values == query else values}"
