"""`tandem up` as a user starts it, for tests: a user of their own, ready when it says so, everything ended at the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tandem
from tandem.cleanup import ClusterProcess, processes_of
from tandem.cluster_view import ClusterStatus

TANDEM = [str(Path(sys.executable).with_name("tandem"))]
SMALL = ("--kv-cache-bytes=67108864",)
WAIT_S = 60.0
_LOOK_S = 0.1  # what is looked at takes a core some milliseconds: all of /proc, a router's status


class Run:
    """One `tandem up`. `user` is its XDG_RUNTIME_DIR: short, for sockets are in it."""

    def __init__(self, user: Path, *arguments: str, environment: dict[str, str] | None = None, log: Path | None = None) -> None:
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(user), "HOME": str(user), **(environment or {})}
        self._user = user
        self._log = log or user / f"up-{time.monotonic_ns()}.log"
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [*TANDEM, "up", "--one-worker-max-tokens=0", *arguments], stdout=file, stderr=subprocess.STDOUT, env=self.environment
            )
        self.cluster = ""

    @property
    def words(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def wait_ready(self, timeout_s: float = 150.0) -> "Run":
        """Until it is ready; raises AssertionError with its words where it is not."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: "ready in" in self.words or self.process.poll() is not None, timeout_s)
        assert "ready in" in self.words, self.words
        self.cluster = self.words.partition("cluster ")[2].split()[0]
        return self

    def endpoints(self) -> dict[str, object]:
        """Its endpoint file."""
        found: dict[str, object] = json.loads((self._user / "tandem" / f"{self.cluster}.json").read_text())
        return found

    def client(self, timeout_s: float = 30.0) -> tandem.Client:
        """A client of its routers."""
        return tandem.Client(str(self.endpoints()["grpc"]), timeout_s=timeout_s)

    def http(self, number: int = 0) -> str:
        """A router's HTTP endpoint."""
        urls = self.endpoints()["http"]
        assert isinstance(urls, list)
        return str(urls[number])

    def processes(self, kind: str | None = None) -> list[ClusterProcess]:
        """Its processes, of one kind or all."""
        return [process for process in processes_of(self.cluster) if kind in (None, process.kind)]

    def counts(self) -> Counter[str]:
        """How many of each kind; Ray's own come and go."""
        return Counter(process.kind for process in self.processes() if process.kind not in ("ray", "other"))

    def cli(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`tandem ...` by the same user."""
        return subprocess.run([*TANDEM, *arguments], capture_output=True, text=True, env=self.environment, timeout=timeout_s)

    def stop(self, number: int = signal.SIGINT, timeout_s: float = 60.0) -> int:
        """Sends the signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)

    def end(self) -> None:
        """Whatever a test has left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop(timeout_s=40.0)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.cluster:
            self.cli("down", "--cluster", self.cluster)


def wait_for(is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
    """Seconds until it is so; raises AssertionError after `timeout_s`."""
    started_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - started_s < timeout_s, "it did not come to be so"
        time.sleep(_LOOK_S)
    return time.monotonic() - started_s


def ready(status: ClusterStatus) -> list[str]:
    """Replicas that serve, by id."""
    return [replica.lease.replica_id for replica in status.replicas if replica.is_reachable and replica.lease.state == "ready"]
