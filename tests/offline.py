# SPDX-License-Identifier: Apache-2.0
"""A machine without a network: whoever opens a connection to another machine fails its test, and says to where."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
"""How addresses of this machine begin: browsers that tests drive, and processes of one test, listen there."""


class NetworkError(AssertionError):
    """A test has asked another machine for something."""


def is_local(address: Any) -> bool:
    """Whether an address is of this machine: a path, or the loopback device."""
    host = address[0] if isinstance(address, tuple) else address
    return host is None or not isinstance(address, tuple) or str(host).startswith(LOCAL)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """No judge, measure or test set fetches anything: connections, and questions for a name's address, are refused."""

    def guarded(real: Any, address_of: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not is_local(address_of(args)):
                raise NetworkError(f"a test has asked the network for {address_of(args)}")
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), lambda args: args[1]))
        here = (None, socket.gethostname())
        resolved = guarded(socket.getaddrinfo, lambda args: ("localhost",) if args[0] in here else (args[0],))
        patch.setattr(socket, "getaddrinfo", resolved)
        yield
