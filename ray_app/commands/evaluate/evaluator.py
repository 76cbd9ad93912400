"""Ray side of the evaluator: an adapter in an actor, pairs through Ray Data.

Shapes: B = pairs of a batch, N = pairs evaluated, E = event width, D = target width.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import Progress

from ray_app.cluster.connection import BUSY_HINT, unwrap_user_errors
from ray_app.commands.evaluate.latency import WARM_UP, latency_ms
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.core.evaluation import AlignmentEvaluation, AlignmentEvaluator
from ray_app.core.optimizer_step import decode
from ray_app.data.pairs_dataset import ordered_pairs, to_arrays
from ray_app.errors import ResourceError, StoreError
from ray_app.store.checkpoint import Checkpoint
from ray_app.store.pair_store import PairStore, previous_window
from ray_app.store.split import Rows
from ray_app.terminal import make_console

START_S = 300.0
"""Seconds that the actor may wait for CPUs or a GPU."""


class EvaluatorActor:
    """Ray actor: an adapter on a device that pairs are streamed through; each forward pass is timed."""

    def __init__(self, config: AdapterConfig, weights: dict[str, NDArray[Any]], device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        adapter = meta_adapter(config)
        with warnings.catch_warnings():  # read-only views of the object store: nothing here writes a weight
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        adapter.load_state_dict(tensors, assign=True)
        self.adapter = adapter.eval().to(self.device)
        self.forward_s: list[float] = []
        self.adapter.register_forward_pre_hook(self._begin)
        self.adapter.register_forward_hook(self._end)

    def evaluate(
        self, store: PairStore, rows: Rows, mean_target_D: torch.Tensor, batch_size: int, seed: int
    ) -> Iterator[int | AlignmentEvaluation]:
        """Yield the number of pairs done after each batch, and last the evaluation, in the order of `rows`."""
        evaluator = AlignmentEvaluator(
            self.adapter,
            mean_target_D,
            event_scale=store.feature("event").scale,
            target_scale=store.feature("target").scale,
            device=self.device,
            token_width=store.feature("target").token_width,
            images=store.feature("target").kind == "images",
        )
        seen = [np.zeros(0, np.int64)]
        done = 0
        with unwrap_user_errors():  # here, since a second pass through Ray loses the causes of an error
            for batch in ordered_pairs(store, rows).iter_batches(batch_size=batch_size, batch_format="pyarrow"):
                position_B, event_BE, target_BD = to_arrays(batch, store)
                evaluator.add(torch.tensor(event_BE), torch.tensor(target_BD))
                seen.append(position_B)
                done += len(position_B)
                yield done
        positions = np.concatenate(seen)
        assert np.array_equal(np.sort(positions), rows)
        sequences = store.index.sequence[positions].tolist()
        evaluation = evaluator.result(sequences, previous_window(store.index, positions), seed)
        yield selected(evaluation, np.argsort(positions))

    def warm_up(self, batch_size: int) -> None:
        """Run the slow first passes; timing starts again after them."""
        with torch.no_grad():
            for _ in range(WARM_UP):
                self.adapter(torch.zeros(batch_size, self.adapter.config.event_dim, device=self.device))
        self.forward_s.clear()

    def timing(self) -> dict[str, Any]:
        """Seconds of each forward pass since the warm-up, with the device and the threads."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return {"seconds": self.forward_s, "device": device, "threads": torch.get_num_threads()}

    def latency_ms(self) -> float:
        """Median milliseconds of one forward pass of one pair."""
        return latency_ms(self.adapter)

    def _begin(self, *_: Any) -> None:
        self._synchronize()
        self.forward_s.append(-time.perf_counter())

    def _end(self, *_: Any) -> None:
        self._synchronize()
        self.forward_s[-1] += time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def align(self, event_BE: NDArray[Any], scale: float) -> NDArray[np.float32]:
        """Aligned features of some stored event features, shape (B, D)."""
        with torch.no_grad():
            return self.adapter(decode(torch.tensor(event_BE), scale, self.device)).float().cpu().numpy()


class EvaluatorHandle:
    """Driver side of an EvaluatorActor: start it, evaluate parts of a store, `close` it.

    CPU: the actor takes all CPUs of one node but one, which is left for Ray Data to read with; it computes with
    as many threads as the node has CPUs. `use_gpu`: one GPU and one CPU. ResourceError if the cluster cannot start
    it within a few minutes.
    """

    def __init__(
        self, checkpoint: Checkpoint, store: PairStore, mean_target_D: torch.Tensor, *, use_gpu: bool
    ) -> None:
        checkpoint.require(store.manifest.features)
        self.store, self.mean_target_D = store, mean_target_D
        cpus = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        options = {"num_gpus": 1, "num_cpus": 1} if use_gpu else {"num_cpus": max(cpus - 1, 0)}
        weights = {name: tensor.numpy() for name, tensor in checkpoint.adapter.state_dict().items()}
        actor: Any = ray.remote(EvaluatorActor).options(**options)
        device = "cuda" if use_gpu else "cpu"
        self.worker = actor.remote(checkpoint.config, ray.put(weights), device, max(cpus, 1))
        ready, _ = ray.wait([self.worker.__ray_ready__.remote()], timeout=START_S)
        if not ready:
            self.close()
            raise ResourceError(
                f"The evaluator could not be started with {options} within {START_S:g} s. {BUSY_HINT}"
            )

    def warm_up(self, batch_size: int) -> None:
        """Run the adapter a few times and restart its timing."""
        ray.get(self.worker.warm_up.remote(batch_size))

    def evaluate(self, rows: Rows, batch_size: int, label: str, seed: int = 0) -> AlignmentEvaluation:
        """The evaluation of some pairs, in the order of `rows`; progress on standard error."""
        if not len(rows):
            raise StoreError(f"{self.store.folder} has too few pairs: there are none to evaluate; change the shares.")
        stream = self.worker.evaluate.options(num_returns="streaming").remote(
            self.store, rows, self.mean_target_D, batch_size, seed
        )
        console = make_console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            bar = progress.add_task(escape(label), total=len(rows))
            for item in stream:
                report = ray.get(item)
                if isinstance(report, AlignmentEvaluation):
                    return report
                progress.update(bar, completed=report)
        raise AssertionError("the last item of the stream is the evaluation")

    def align(self, event_BE: NDArray[Any]) -> NDArray[np.float32]:
        """Aligned features of some stored event features, shape (B, D)."""
        return ray.get(self.worker.align.remote(event_BE, self.store.feature("event").scale))

    def latency_ms(self) -> float:
        """Median milliseconds of one forward pass of one pair, on one core or the GPU."""
        return ray.get(self.worker.latency_ms.remote())

    def timing(self) -> dict[str, Any]:
        """Seconds of each forward pass since the warm-up, with the device and the threads."""
        return ray.get(self.worker.timing.remote())

    def close(self) -> None:
        """Give the actor's resources back."""
        ray.kill(self.worker)


def selected(evaluation: AlignmentEvaluation, places: NDArray[np.int64]) -> AlignmentEvaluation:
    """Some of the pairs, or all in another order. `retrieval` and `centered` stay those of all pairs."""
    return replace(
        evaluation,
        sequences=tuple(evaluation.sequences[place] for place in places),
        after=evaluation.after[places],
        baselines={name: cos[places] for name, cos in evaluation.baselines.items()},
        previous_window=evaluation.previous_window[places],
        light=tuple(evaluation.light[place] for place in places) if evaluation.light else (),
    )
