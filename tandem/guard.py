"""The guard: waits for the end of `tandem up`, however it comes, then cleans up after it.

`up` holds the other end of its stdin. Started first, killed by nobody: it is in a session of its own.
"""

import argparse
import signal
import sys

from tandem.cleanup import clean_cluster


def main() -> None:
    """Waits for the end of stdin."""
    parser = argparse.ArgumentParser(prog="python -m tandem.guard")
    parser.add_argument("--cluster", required=True)
    cluster = parser.parse_args().cluster
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean_cluster(cluster)


if __name__ == "__main__":
    main()
