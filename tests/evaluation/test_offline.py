# SPDX-License-Identifier: Apache-2.0
"""The guard that all tests of judges, measures and test sets run behind does refuse a connection."""

import socket
import urllib.request

import pytest
from offline import NetworkError


def test_connections_to_other_machines_are_refused():
    with pytest.raises(NetworkError, match=r"192\.0\.2\.1"), socket.socket() as one:
        one.connect(("192.0.2.1", 80))
    with pytest.raises(NetworkError, match=r"example\.org"):
        urllib.request.urlopen("http://example.org/")


def test_this_machine_may_be_asked():
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        one.listen()
        other.connect(one.getsockname())
    assert socket.getaddrinfo("localhost", 80)
