"""The key-value stores through which ranks find each other: hosted, on which network, and reached.

torch's own listen on every network of the machine.
"""

from __future__ import annotations

import contextlib
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_pso.errors import ConfigError

_hosted: set[int] = set()  # ports on which this process has stores


def host(address: str, port: int = 0, *, timeout_s: float = 300.0) -> dist.TCPStore:
    """A store on this machine, which others reach at ``address``; port 0: the system picks one.

    It listens on that network alone. On all of them where ``address`` is a name, as others may know another of the
    machine's addresses by it; or is not the machine's own (behind NAT). A port of this process's own is shared.

    Raises:
        RuntimeError: another process listens there.
    """
    options: dict[str, Any] = {"multi_tenant": port != 0}
    with contextlib.suppress(OSError):
        if port not in _hosted:  # torch knows its stores by their ports alone
            listener = _listen(address, port, flags=socket.AI_NUMERICHOST)
            port = listener.getsockname()[1]
            options["master_listen_fd"] = listener.detach()
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False, **options)
    _hosted.add(store.port)
    return store


def reach(address: str, port: int, *, timeout_s: float) -> dist.TCPStore:
    """Connect to a TCPStore hosted elsewhere.

    Raises:
        RuntimeError: it is not there within ``timeout_s``.
    """
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def host_at(address: str) -> dist.TCPStore:
    """A store that listens at this address or not at all.

    Raises:
        ConfigError: this machine cannot listen there.
    """
    try:
        listener = _listen(address, 0)
    except OSError as error:
        raise ConfigError(
            f"--host {address}: this machine cannot listen there ({error.strerror or error}); "
            "give ds-pso launch one of its own addresses"
        ) from error
    port = listener.getsockname()[1]
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _listen(address: str, port: int, *, flags: int = 0) -> socket.socket:
    family, *_, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    return socket.create_server(found, family=family)


def address_towards(address: str, port: int) -> str:
    """This machine's address on the way to ``address``: the one its local ranks can reach, too."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a UDP socket sends nothing
        probe.connect(target)
        return str(probe.getsockname()[0])
