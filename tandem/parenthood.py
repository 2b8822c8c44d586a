"""What a process says of itself to the kernel: that it must not outlive its parent, what it is called."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
REPLICA_NAME = "tandem-replica"  # the kernel keeps 15 characters


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that made it ends (prctl(2), PR_SET_PDEATHSIG); ends it now if that is so already.

    The parent must have made it on its main thread, which lives as long as the process.
    """
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0 and os.getppid() != parent:
        os._exit(1)


def set_process_name(name: str) -> None:
    """What `ps` and /proc/PID/comm call this process (prctl(2), PR_SET_NAME)."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
