"""Workers on several machines find each other: each listens where its cluster knows its node.

Left alone, gloo takes the address of the machine's own name, which the hosts file of many systems sets to loopback:
other machines cannot reach it there. NCCL finds an interface by itself.
"""

import os
from typing import Any

import psutil
import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeAddressTorchConfig(TorchConfig):
    """Ray Train's process group, with each worker at its node's address."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Class that sets the group up and ends it."""
        return NodeAddressBackend


class NodeAddressBackend(Backend):
    """Ray Train's own backend of torch, after `choose_interface` on every worker."""

    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._torch = TorchConfig().backend_cls()

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Choose the interface before the workers connect to each other."""
        worker_group.execute(choose_interface)
        self._torch.on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        self._torch.on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        self._torch.on_shutdown(worker_group, backend_config)


def choose_interface() -> None:
    """Set gloo's interface in this process to the one with its node's address; a choice of the user's stays."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Name of this machine's interface with an address; None without one, as behind address translation."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(one.address == address for one in addresses)), None)
