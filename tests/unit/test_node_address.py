"""Where training workers listen for each other."""

import os
import socket
import struct
from fcntl import ioctl

import pytest

from ray_app.cluster.node_address import INTERFACE, choose_interface, interface_of

SIOCGIFADDR = 0x8915


def test_an_interface_is_found_by_each_address_that_the_kernel_gives_it() -> None:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                output = ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[socket.inet_ntoa(output[20:24])] = name
    assert found["127.0.0.1"] == "lo"
    assert {address: interface_of(address) for address in found} == found


def test_an_address_that_no_interface_bears_chooses_none() -> None:
    assert interface_of("203.0.113.7") is None


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "mine")
    choose_interface()
    assert os.environ[INTERFACE] == "mine"
