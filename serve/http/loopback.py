"""Ports of a replica that Ray opens by itself."""

from typing import Any

import grpc.aio
import ray

ALL_INTERFACES, LOOPBACK = "[::]:", "127.0.0.1:"


def bind_grpc_to_loopback() -> None:
    """Bind gRPC servers of this process to 127.0.0.1 if that is the address of Ray's node, as under `ray-app serve`.

    Ray Serve opens a replica's own gRPC port to all interfaces, whatever the node's address.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    for kind in grpc.aio.Server.__subclasses__():
        kind.add_insecure_port = on_loopback(kind.add_insecure_port)


def on_loopback(bind: Any) -> Any:
    """Wrap `add_insecure_port`."""
    return lambda server, address: bind(server, address.replace(ALL_INTERFACES, LOOPBACK))
