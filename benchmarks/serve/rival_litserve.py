"""The same adapter behind LitServe, with its own batching: raw pixels in, raw float32 out.

python -m benchmarks.serve.rival_litserve CHECKPOINT PORT
"""

import sys
from pathlib import Path
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.serve.rivals import forward
from ray_app.store.checkpoint import load_checkpoint


class Align(litserve.LitAPI):
    """Batches of at most 32 requests, after at most 2 ms."""

    def __init__(self, checkpoint: Path, width: int) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.002)
        self.checkpoint, self.width = checkpoint, width

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.adapter = load_checkpoint(self.checkpoint).adapter

    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        return np.frombuffer(bytearray(request), np.uint8).reshape(-1, self.width)

    def batch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
        return np.concatenate(inputs), [len(rows) for rows in inputs]

    def predict(self, batch: tuple[np.ndarray, list[int]]) -> tuple[np.ndarray, list[int]]:
        return forward(self.adapter, batch[0]), batch[1]

    def unbatch(self, output: tuple[np.ndarray, list[int]]) -> list[np.ndarray]:
        return np.split(output[0], np.cumsum(output[1])[:-1])

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes())


if __name__ == "__main__":
    checkpoint, port = Path(sys.argv[1]), int(sys.argv[2])
    api = Align(checkpoint, load_checkpoint(checkpoint).config.event_dim)
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(port=port, log_level="warning", generate_client_file=False)
