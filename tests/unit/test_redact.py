"""Passwords and tokens in URLs: none is stored, logged or printed."""

import json
import shlex

import pytest

from ray_app.commands.train.context import persisted_config
from ray_app.config.train import TrainConfig
from ray_app.parsing.redact import redact
from ray_app.store.provenance import provenance

FORMS = {
    "http://alice:SECRET@host:5000/x": "http://***@host:5000/x",
    "https://SECRET@host": "https://***@host",
    "postgresql://alice:SEC/RET@host/db": "postgresql://***@host/db",
    "postgresql+pg8000://alice:SEC@RET@host/db": "postgresql+pg8000://***@host/db",
    "http://alice:SEC?RET#x@host/db": "http://***@host/db",
    "mysql://alice%40firm:SECRET%2F%3A@host/db": "mysql://***@host/db",
    "HTTP://alice:SECRET@HOST": "HTTP://***@HOST",
    "http://host:5000/?token=SECRET": "http://host:5000/?token=***",
    "http://host/x?a=SEC&b=RET;c=SECRET#top": "http://host/x?a=***&b=***#top",
    "http://host?SECRET": "http://host?***",
    "http://host/#access_token=SECRET": "http://host/#access_token=***",
    "http://alice:SECRET@[::1]:5000/?k=SECRET": "http://***@[::1]:5000/?k=***",
    "sqlite:////data/x.db?password=SECRET": "sqlite:////data/x.db?password=***",
    "s3://KEY:SECRET@bucket/a@b": "s3://***@b",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx;PWD%3DSECRET": "mssql+pyodbc:///?odbc_connect=***",
    "http://host/x;password=SECRET/y;z?a=SECRET": "http://host/x;password=***/y;z?a=***",
}
PLAIN = [
    "sqlite:////data/mlflow.db",
    "sqlite:////data/what%3F/%2541/mlflow.db",
    "http://127.0.0.1:5000/#/experiments/3",
    "s3://bucket/a@b",
    "file:///data/a@b",
    "models:/alignment-adapter@champion",
    "alice@host",
]


@pytest.mark.parametrize("url", FORMS)
def test_no_form_of_a_secret_is_left_in_a_url(url: str) -> None:
    assert redact(url) == FORMS[url]
    assert redact(f"cannot reach {url} now, nor {url}") == f"cannot reach {FORMS[url]} now, nor {FORMS[url]}"
    argv = provenance(["ray-app", "train", "--tracking-uri", url, f"--tracking-uri={url}"])["argv"]
    assert argv[3:] == [FORMS[url], f"--tracking-uri={FORMS[url]}"]
    assert "SEC" not in shlex.join(argv) + "".join(FORMS.values())
    recorded = persisted_config(TrainConfig(store="s", out="o", tracking_uri=url))
    assert recorded["tracking_uri"] is None
    assert "SEC" not in json.dumps(recorded)


@pytest.mark.parametrize("url", PLAIN)
def test_what_has_no_secret_stays_as_it_is(url: str) -> None:
    assert redact(url) == url
