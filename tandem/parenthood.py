"""A process that must not outlive its parent."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that made it ends (prctl(2), PR_SET_PDEATHSIG); ends it now if that is so already.

    The parent must have made it on its main thread, which lives as long as the process.
    """
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0 and os.getppid() != parent:
        os._exit(1)
