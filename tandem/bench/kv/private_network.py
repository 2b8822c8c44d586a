"""A network of a process's own, loopback only, where the kernel lets this user make one. Standard library only.

Mooncake's daemon opens two ports on every address and has no setting for it; in here nobody outside reaches them.
"""

import ctypes
import fcntl
import os
import socket
import struct

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


def enter_private_network() -> bool:
    """Moves this process, which must have one thread, into a new network with loopback up; False where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))
    return True


def join_network_of(pid: int) -> None:
    """Moves this process, which must have one thread, into the network of `pid`; raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("user", "net"):
        descriptor = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
        try:
            if libc.setns(descriptor, 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot join the {name} namespace of process {pid}")
        finally:
            os.close(descriptor)
