"""The platform that a chaos run breaks: a `tandem up` of its own, in a user folder of its own. Must not break it.

Its end is the run's end: `up` dies with this process, and `up`'s guard clears up after both.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem.cleanup import clean_cluster, processes_of
from tandem.endpoint import read_endpoint_file
from tandem.errors import ConfigError, Reason
from tandem.node_folder import NodeFacts, NodeFolder, cluster_folder, ray_folder, shm_folder
from tandem.parenthood import die_with_parent

_USER_FOLDER = "XDG_RUNTIME_DIR"
_OPTIONS = (f"--kv-cache-bytes={64 << 20}", "--dtype=float32", "--one-worker-max-tokens=0")
_START_S = 240.0
_STOP_S = 60.0
_LAST_LINES = 20
# Ray's helpers come and go, the guard never dies before `up`.
_UNCOUNTED = ("ray", "other", "guard", "ray_head")

Progress = Callable[[str], None]


class ChaosCluster:
    """One `tandem up`. `start` moves this process into the user folder, `stop` moves it back."""

    def __init__(self, *, prefill: int, decode: int, routers: int, model: str = "bundled", options: Sequence[str] = _OPTIONS) -> None:
        self.id = f"chaos-{secrets.token_hex(3)}"
        self.sizes = {"prefill": prefill, "decode": decode, "routers": routers}
        self.endpoints: dict[str, object] = {}
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._options = [f"--model={model}", *(f"--{name}={count}" for name, count in self.sizes.items()), *options]
        self._user: Path | None = None
        self._former_user: str | None = None
        self._up: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> None:
        """Returns when it is ready. Raises ConfigError with its own words where it does not come up."""
        self._user = Path(tempfile.mkdtemp(prefix="tc-"))  # short: sockets are in it
        self._former_user = os.environ.get(_USER_FOLDER)
        os.environ[_USER_FOLDER] = str(self._user)
        self._up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem", "up", f"--cluster={self.id}", "--port=0", "--http-port=0", *self._options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C is for this process alone
            preexec_fn=die_with_parent,
        )
        is_ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read(progress, is_ready), name="tandem up's words")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await is_ready.wait()
        self.endpoints = read_endpoint_file(self.id) or {}
        if "grpc" not in self.endpoints:
            words = self.last_lines[-1] if self.last_lines else "no word from it"
            raise ConfigError(f"the platform did not start: {words.removeprefix('tandem: error: ')}", reason=Reason.START_FAILED)

    async def _read(self, progress: Progress, is_ready: asyncio.Event) -> None:
        """To the end of its output, so that it never waits for a reader."""
        assert self._up is not None
        assert self._up.stdout is not None
        while line := (await self._up.stdout.readline()).decode(errors="replace"):
            self.last_lines.append(line.strip())
            if not is_ready.is_set():
                progress(f"tandem up: {line.strip()}")
            if line.startswith("ready in"):
                is_ready.set()
        is_ready.set()

    @property
    def routers(self) -> list[str]:
        """Their gRPC addresses, which outlive restarts."""
        return str(self.endpoints["grpc"]).split(",")

    @property
    def http_urls(self) -> list[str]:
        """Their HTTP endpoints."""
        urls = self.endpoints["http"]
        assert isinstance(urls, list)
        return [str(url) for url in urls]

    @property
    def redis_url(self) -> str:
        """The register's address."""
        return str(self.endpoints["redis_url"])

    @property
    def is_up(self) -> bool:
        """Whether `tandem up` itself lives."""
        return self._up is not None and self._up.returncode is None

    def node(self) -> tuple[NodeFolder, NodeFacts]:
        """Its only node. Raises ConfigError where it has said nothing of itself."""
        for path in cluster_folder(self.id).glob("*/node.json"):
            folder = NodeFolder(self.id, path.parent.name)
            if (facts := folder.try_read_facts()) is not None:
                return folder, facts
        raise ConfigError("the platform's node has no facts")

    def census(self) -> Counter[str]:
        """Its lasting processes by kind."""
        return Counter(process.kind for process in processes_of(self.id) if process.kind not in _UNCOUNTED)

    async def stop(self, logs: Path | None = None) -> list[str]:
        """Ctrl-C's signal; then what is left of it, which is nothing where all is well. What is left is cleared away, but for `logs`."""
        if self._user is None:
            return []
        try:
            if logs is not None:
                await asyncio.to_thread(self._keep_logs, logs)
            left = await self._stop()
            await asyncio.to_thread(clean_cluster, self.id)
            shutil.rmtree(self._user, ignore_errors=True)
        finally:
            os.environ.pop(_USER_FOLDER)
            if self._former_user is not None:
                os.environ[_USER_FOLDER] = self._former_user
        return left

    def _keep_logs(self, folder: Path) -> None:
        """As they are before the stop, which removes them."""
        here = cluster_folder(self.id)
        for log in here.rglob("*.log"):
            kept = folder / log.relative_to(here)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(log, kept)

    async def _stop(self) -> list[str]:
        left = []
        if self.is_up and self._up is not None:
            self._up.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(_STOP_S):
                    await self._up.wait()
            except TimeoutError:
                left.append(f"`tandem up` did not stop in {_STOP_S:.0f} s")
                self._up.kill()
                await self._up.wait()
        if self._reading is not None:
            await self._reading
        left += [f"process {process.pid} ({process.kind})" for process in await asyncio.to_thread(processes_of, self.id)]
        places = (shm_folder(self.id), ray_folder(self.id), cluster_folder(self.id))
        return left + [f"folder {place}" for place in places if place.exists()]
