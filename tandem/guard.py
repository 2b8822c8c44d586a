"""The guard: waits for the end of `tandem up`, however it comes, then cleans up after it.

`up` holds the other end of its stdin. Started first, killed by nobody: it is in a session of its own. What it needs is imported at the end:
it waits for days, in 10 MiB.
"""

import signal
import sys


def main(cluster: str) -> None:
    """Waits for the end of stdin."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    from tandem.cleanup import clean_cluster

    clean_cluster(cluster)


if __name__ == "__main__":
    main(sys.argv[1])
