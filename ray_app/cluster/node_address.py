"""Workers on several machines find each other: each listens where its cluster knows its node.

Without a word gloo takes the address that the machine's own name stands for, which in the hosts file of many systems
is one of loopback: nobody else reaches it there. NCCL looks for an interface by itself. The hook is Ray Train's own,
not its public one; Ray is pinned.
"""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeAddressTorchConfig(TorchConfig):
    """Ray Train's process group, with each worker at its node's address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group up and ends it."""
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before the workers meet."""
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Tells gloo, in this process, of the interface that bears its node's address; a choice of the user's stays."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Of this machine; None where none bears the address, as where addresses are translated."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, borne in interfaces if any(one.address == address for one in borne)), None)
