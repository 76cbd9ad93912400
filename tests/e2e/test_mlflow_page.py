"""A promoted checkpoint in MLflow: served by `mlflow models serve`, and shown on MLflow's own page in a browser."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow_process import MlflowServer, free_port
from pages import CHROMIUM
from small_runs import make_run

import ray_app
from ray_app.config.base import TrackingFlags
from ray_app.tracking.artifacts import MODEL_ARTIFACTS, log_dataset, upload_artifacts
from ray_app.tracking.evaluation_log import log_evaluation

START_S = 400.0
PAGE_MS = 120_000


@dataclass(frozen=True)
class Registered:
    """A run with its model, data set and evaluation, and its version with the alias champion."""

    server: MlflowServer
    client: MlflowClient
    experiment: str
    run: str
    folder: Path
    store: Path


@pytest.fixture(scope="module")
def registered(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    folder = tmp_path_factory.mktemp("page")
    run = make_run(small_store, folder / "run", steps=20, run_key="k1")
    server = MlflowServer(folder)
    server.start()
    try:
        client = MlflowClient(server.uri)
        experiment = client.create_experiment("alignment")
        run_id = client.create_run(experiment, tags={"run_key": "k1"}, run_name="bottleneck-1").info.run_id
        upload_artifacts(client, run_id, run / "checkpoints" / "epoch_0001")
        store = ray_app.open_store(small_store)
        facts = {"store": str(small_store), "dataset_fingerprint": store.pairs.fingerprint, "features": "images"}
        log_dataset(client, run_id, facts)
        report = ray_app.load(run).report(store.part("test"))
        report.save(folder / "report.html")
        flags = TrackingFlags(tracking_uri=server.uri)
        assert log_evaluation(flags, "k1", report.result, [folder / "report.html"]) == run_id
        client.create_registered_model("alignment-adapter")
        version = client.create_model_version("alignment-adapter", f"runs:/{run_id}/{MODEL_ARTIFACTS}", run_id)
        client.set_registered_model_alias("alignment-adapter", "champion", version.version)
        yield Registered(server, client, experiment, run_id, run, small_store)
    finally:
        server.kill()


def test_mlflow_serves_what_align_answers(registered: Registered, tmp_path: Path) -> None:
    port = free_port()
    words = ["models", "serve", "-m", "models:/alignment-adapter@champion", "--env-manager", "local"]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": registered.server.uri,
                "PATH": os.pathsep.join(
                    [str(Path(sys.executable).parent), os.environ["PATH"]]
                ),  # MLflow runs uvicorn
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/ping", process)
        rows = ray_app.open_store(registered.store).part("test").numpy()[0].reshape(12, -1)[:3]
        body = json.dumps({"inputs": rows.tolist()}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            predictions = np.array(json.loads(answer.read())["predictions"], np.float32)
        np.testing.assert_allclose(predictions, ray_app.load(registered.folder).align(rows), atol=1e-4)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_answer(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.2)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_mlflow_s_page_shows_the_model_its_data_and_the_numbers_of_evaluate(registered: Registered) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    run_page = f"{registered.server.uri}/#/experiments/{registered.experiment}/runs/{registered.run}"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PAGE_MS)
        page.goto(run_page)
        for text in ("test/lift", registered.store.name, "alignment-adapter"):
            page.get_by_text(text).first.wait_for()
        page.goto(f"{run_page}/artifacts")
        page.get_by_text("model", exact=True).first.click()
        for text in ("MLmodel", "alignment_model.py", "checkpoint"):
            page.get_by_text(text).first.wait_for()
        page.goto(f"{registered.server.uri}/#/models/alignment-adapter")
        page.get_by_text("champion").first.wait_for()
        browser.close()
