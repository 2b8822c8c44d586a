"""Addresses to listen on and addresses to tell others.

Must not send anything.
"""

import ipaddress
import socket

_ELSEWHERE = "192.0.2.1"  # a documentation address: asking for the route there sends no packet


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def advertised_host(host: str) -> str:
    """What others should call a process that listens on `host`: the same, or this machine's own address where it listens on all."""
    try:
        if not ipaddress.ip_address(host).is_unspecified:
            return host
    except ValueError:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_ELSEWHERE, 9))
        except OSError:  # a machine without network
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
