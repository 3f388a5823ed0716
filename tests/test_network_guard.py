"""The guard that keeps tests off the network can fail."""

from __future__ import annotations

import socket

import pytest

from tests.conftest import GUARD


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_connecting_to_another_machine_is_refused_and_remembered(host):
    with pytest.raises(ConnectionRefusedError, match="must not touch the network"):
        socket.create_connection((host, 80), timeout=1)
    assert GUARD.attempts
    GUARD.attempts.clear()


def test_loopback_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
