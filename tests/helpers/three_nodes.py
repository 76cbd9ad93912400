"""Three raylets on this machine: a head without CPUs, and two workers that can be killed and replaced."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

STORE_BYTES = 80_000_000


class Nodes:
    """The cluster, whose nodes have these variables in their environment. Only the main thread may add one."""

    def __init__(self, num_workers: int = 2, cpus: float = 1.0, environment: Mapping[str, str] | None = None) -> None:
        self.cpus, self.environment = cpus, dict(environment or {})
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        with variables(self.environment):
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []
        for _ in range(num_workers):
            self.add()

    @property
    def address(self) -> str:
        """HOST:PORT for RAY_ADDRESS."""
        return str(self.cluster.address)

    def add(self) -> None:
        """One more worker; it is there when this returns."""
        with variables(self.environment):
            self.workers.append(self.cluster.add_node(num_cpus=self.cpus, object_store_memory=STORE_BYTES))

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to all processes of one worker's raylet; its tasks' processes notice it by themselves."""
        self.cluster.remove_node(self.workers.pop(rng.randrange(len(self.workers))), allow_graceful=False)


@contextmanager
def variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Set them in this process meanwhile; what it starts keeps them."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def three_nodes(environment: Mapping[str, str] | None = None, cpus: float = 1.0) -> Iterator[Nodes]:
    """Three raylets with these variables in their environment; ended with all their processes."""
    nodes = Nodes(cpus=cpus, environment=environment)
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
