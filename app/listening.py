"""Where the page listens: at which port, for whom, and under which names it may be asked for."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from app.gate import Reach
from lora_core.errors import ConfigError

OTHER_PORTS = 20  # tried above ours before any free one is taken


def is_local(host: str) -> bool:
    """Whether only this computer can reach a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, token: str) -> None:
    """Raises ConfigError where others could come in without being asked for anything."""
    if not is_local(host) and not token.strip():
        raise ConfigError(
            f"--host {host} lets every computer of the network in, and there is no --token. Add --token with a "
            "long word that only you know, or leave --host out to be reached from this computer alone."
        )


def reach(host: str, port: int) -> Reach:
    """A machine open to the network is asked for by its own name too; by any other only to deceive it."""
    local = is_local(host)
    names = {"127.0.0.1", "localhost", f"[{host}]" if ":" in host else host}
    names |= set() if local else {socket.gethostname().lower(), socket.getfqdn().lower(), "[::1]"}
    with_port = {f"{name}:{port}" for name in names}
    return Reach(frozenset(with_port | (names if port == 80 else set())), port, not local)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at `port`, or at another one if that is taken. Raises ConfigError for a bad address."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is not a port: use 1 to 65535, such as 7860.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port, *range(port + 1, min(port + OTHER_PORTS, 65536)), 0):
        ours = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Elsewhere it skips the wait after a stop; on Windows it would let two servers share a port.
            if os.name != "nt":
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ours.bind((host, candidate))
            ours.listen(128)
        except (OSError, UnicodeError) as problem:
            ours.close()
            if isinstance(problem, OSError) and _is_taken(problem):
                continue
            raise ConfigError(
                f"--host {host} --port {candidate} cannot be listened on ({problem}). Use an address of this "
                "computer, such as 127.0.0.1, and a port above 1023."
            ) from problem
        else:
            return ours
    raise ConfigError(f"No port is free at {host}. Close other programs, or choose another --host.")


def _is_taken(problem: OSError) -> bool:
    return problem.errno in {errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)}
