"""The same adapter behind other servers, each as its own documents show it.

    python -m benchmarks.serve.rivals bare CHECKPOINT PORT
    python -m benchmarks.serve.rivals app CHECKPOINT PORT
    python -m benchmarks.serve.rivals mlflow CHECKPOINT FOLDER      # writes a model for `mlflow models serve`

`bare`: one uvicorn process, Starlette, raw pixels in and raw float32 out, a forward pass for each request in a
thread; no checks, no batches, no metrics. `app`: all of the endpoint but Ray and HAProxy, behind the same uvicorn:
what it lacks against the endpoint is what those two cost. `mlflow`: a pyfunc model from code, JSON tensors, as
`mlflow models serve` speaks. LitServe has a file of its own: it starts its workers by importing one.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.provenance import ROOT
from ray_app.core.adapters.base import Adapter
from ray_app.store.checkpoint import load_checkpoint

SCALE = 1 / 255


def forward(adapter: Adapter, pixels: np.ndarray) -> np.ndarray:
    """Aligned features (B, D), float32, of pixels (B, E)."""
    with torch.inference_mode():
        return adapter(torch.from_numpy(pixels).float() * SCALE).numpy()


def bare(checkpoint: Path, port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    adapter = load_checkpoint(checkpoint).adapter
    width = adapter.config.event_dim

    async def align(request: Request) -> Response:
        body = bytearray(await request.body())
        pixels = np.frombuffer(body, np.uint8).reshape(-1, width)
        return Response((await run_in_threadpool(forward, adapter, pixels)).tobytes())

    async def ready(_: Request) -> Response:
        return PlainTextResponse("ready")

    routes = [Route("/predict", align, methods=["POST"]), Route("/health", ready)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning")


def app(checkpoint: Path, port: int) -> None:
    import logging

    import uvicorn

    from ray_app.config.serve import EndpointConfig
    from serve.http.routes import build_api
    from serve.replica import ReplicaState, threads_for

    logging.getLogger("ray.serve").addHandler(logging.FileHandler(os.devnull))
    endpoint = ReplicaState(EndpointConfig(checkpoint=os.fspath(checkpoint), max_queue=2048, timeout_s=120), "app")
    torch.set_num_threads(threads_for(endpoint.model.parameters, os.cpu_count() or 1))

    async def everywhere(method: str) -> list[object]:
        telemetry, rows = endpoint.telemetry, endpoint.batcher.queued_rows
        return [telemetry.snapshot(rows) if method == "snapshot" else telemetry.exposition(rows).decode()]

    uvicorn.run(build_api(endpoint, everywhere), port=port, log_level="warning")


def mlflow_model(checkpoint: Path, folder: Path) -> None:
    """Return a pyfunc model from code: MLflow's way without pickle."""
    import mlflow

    code = folder.with_suffix(".py")
    code.write_text(
        f"import sys; sys.path.insert(0, {os.fspath(ROOT)!r})\n"
        "import mlflow, numpy as np\nfrom pathlib import Path\n"
        "from benchmarks.serve.rivals import forward\nfrom ray_app.store.checkpoint import load_checkpoint\n\n"
        "class Align(mlflow.pyfunc.PythonModel):\n"
        "    def load_context(self, context):\n"
        f"        self.adapter = load_checkpoint(Path({os.fspath(checkpoint.resolve())!r})).adapter\n\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return forward(self.adapter, np.asarray(model_input, np.uint8))\n\n"
        "mlflow.models.set_model(Align())\n"
    )
    mlflow.pyfunc.save_model(str(folder), python_model=str(code), pip_requirements=["mlflow"])


if __name__ == "__main__":
    kind, checkpoint, place = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if kind == "mlflow":
        mlflow_model(checkpoint, Path(place))
    else:
        {"bare": bare, "app": app}[kind](checkpoint, int(place))
