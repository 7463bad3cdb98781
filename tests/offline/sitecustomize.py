"""No network in tests: a connection, datagram or name lookup that leaves this machine raises an error naming the host.

conftest.py imports this, and by PYTHONPATH every Python that a test starts does so too. It sees what goes through
Python's sockets; loopback addresses and unix sockets are allowed.
"""

import ipaddress
import sys

CONNECTIONS = {"socket.connect", "socket.sendto", "socket.sendmsg"}  # audit events of (socket, address)
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}  # of (host, ...)


def is_here(host: str | bytes | None) -> bool:
    """Whether a host is this machine: a loopback address, the name localhost, or none."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:  # a name, which would have to be looked up
        return False


def forbid(event: str, arguments: tuple) -> None:
    """Raise for an audit event that leaves this machine; not an OSError, which code under test may catch."""
    if event in CONNECTIONS:
        address = arguments[1]  # of a unix socket a string, of a connected one None
        host = address[0] if isinstance(address, tuple) else None
    elif event in LOOKUPS:
        host = arguments[0]
    else:
        return
    if not is_here(host):
        raise RuntimeError(f"no network in tests, but {event} asks for {host}")


sys.addaudithook(forbid)
