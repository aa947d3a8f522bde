"""On which networks a store listens."""

from __future__ import annotations

import socket
import subprocess
import sys

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from ds_pso.distributed import tcp_store
from ds_pso.errors import ConfigError

EVERYWHERE = {"0.0.0.0", "::"}


def listens_at(store: TCPStore) -> str:
    """The address on which this process listens on the store's port."""
    (found,) = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == store.port
    }
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("given", [True, False])
def test_loopback_alone(given: bool) -> None:
    port = free_port() if given else 0
    store = tcp_store.host("127.0.0.1", port)
    assert port in (0, store.port)
    assert listens_at(store) == "127.0.0.1"
    store.set("key", "value")
    assert tcp_store.reach("127.0.0.1", store.port, timeout_s=5).get("key") == b"value"


def test_an_address_of_this_machine_alone() -> None:
    address = tcp_store.address_towards("192.0.2.1", 9)
    assert listens_at(tcp_store.host(address)) == address


@pytest.mark.parametrize("name", ["localhost", socket.gethostname()])
def test_a_name_may_stand_for_another_address_elsewhere(name: str) -> None:
    assert listens_at(tcp_store.host(name)) in EVERYWHERE


@pytest.mark.parametrize("other", ["127.0.0.1", "localhost", tcp_store.address_towards("192.0.2.1", 9)])
def test_a_second_one_on_a_port_of_this_process_is_the_first(other: str) -> None:
    """By whatever address; and what torch opens by itself finds what is there."""
    port = free_port()
    first = tcp_store.host("localhost", port)
    first.set("key", "value")
    assert tcp_store.host(other, port, timeout_s=5).get("key") == b"value"
    torchs = TCPStore(other, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    assert torchs.get("key") == b"value"


def test_a_port_of_another_process() -> None:
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        with pytest.raises((DistError, RuntimeError), match="EADDRINUSE"):
            tcp_store.host("127.0.0.1", int(other.stdout.readline()))
        other.communicate(b"\n")


def test_listening_at_an_address_or_not_at_all() -> None:
    assert listens_at(tcp_store.host_at("127.0.0.1")) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1: this machine cannot listen there"):
        tcp_store.host_at("192.0.2.1")
