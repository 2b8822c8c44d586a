"""Nodes on one machine: each an arena and a store service process of its own."""

import asyncio
import os
import re
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import numpy as np

from kv_transfer.arena_store import ArenaStore
from kv_transfer.blocks import BlockKey
from kv_transfer.peer_client import Copied, copy_blocks, prefetch_blocks
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.errors import UnavailableError
from tandem.launch import stop_process
from tandem.rpc import open_channel
from tests.arena_blocks import ArenaBlocks
from tests.dict_store import NAMESPACE, key
from tests.layers import ROOT
from tests.store_benches import as_rows, hashes_of, held

BLOCK_BYTES = 65_536
CAPACITY_BYTES = 256 << 20
WAIT_S = 20.0
READY = re.compile(r"store ready address=(127\.0\.0\.1:\d+) metrics=(127\.0\.0\.1:\d+)\n")


def payload_of(key: BlockKey) -> bytes:
    """Bytes that differ from block to block and within each."""
    return (key.block_hash * (BLOCK_BYTES // 32 + 1))[key.block_hash[-1] % 31 :][:BLOCK_BYTES]


class Node:
    """One node. `start` its service, `close` at the end; the folder is the caller's."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        capacity_bytes: int = CAPACITY_BYTES,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder / name
        self.capacity_bytes = capacity_bytes
        self.store = ArenaStore(self.folder, capacity_bytes=capacity_bytes)
        self.blocks = ArenaBlocks(self.folder)
        self._options = options
        self._environment = {**os.environ, **(environment or {})}
        self.address = ""
        self.metrics_address = ""
        self._log = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._channel: grpc.aio.Channel | None = None

    async def start(self) -> None:
        """Starts the service, on the port that it had before."""
        port = self.address.rpartition(":")[2] or "0"
        options = [f"--store-dir={self.folder}", f"--capacity-bytes={self.capacity_bytes}", f"--node={self.name}", f"--port={port}"]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kv_transfer", *options, *self._options, "--lifeline-fd=0"),  # it ends with this process
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=self._environment,
            )
        assert self._process.stdout is not None
        ready = READY.fullmatch((await self._process.stdout.readline()).decode())
        assert ready is not None, self._log.read_text()
        self.address, self.metrics_address = ready[1], ready[2]
        if self._channel is None:
            self._channel = open_channel(self.address)
        async with asyncio.timeout(WAIT_S):
            await self._channel.channel_ready()

    @property
    def channel(self) -> grpc.aio.Channel:
        """A channel to the service."""
        assert self._channel is not None
        return self._channel

    def signal(self, number: signal.Signals) -> None:
        """Sends the service a signal."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    async def wait(self) -> int:
        """Waits for the end of the service; its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def close(self) -> None:
        """Ends the service, a stopped one too."""
        if self._channel is not None:
            await self._channel.close(None)
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGCONT)
            await stop_process(self._process)
        self.blocks.close()
        self.store.close()

    def fill(self, keys: Sequence[BlockKey], *, is_told: bool = False) -> None:
        """Puts blocks into the arena, as a worker of the node does; `is_told`: its service hears of it at once."""
        for wanted in keys:
            outcomes = self.store.put(NAMESPACE, [wanted.block_hash], as_rows(payload_of(wanted)))
            assert outcomes[0] is not PutOutcome.NO_ROOM
        if is_told:
            self.store.announce()

    def held(self, keys: Sequence[BlockKey]) -> int:
        """How many of the blocks are here; each must be whole and its own."""
        present = [key for key, is_held in zip(keys, held(self.store, keys), strict=True) if is_held]
        rows = np.zeros((len(present), BLOCK_BYTES), np.uint8)
        assert set(self.store.get_into(NAMESPACE, hashes_of(present), rows)) <= {BlockOutcome.HIT}
        assert all(row.tobytes() == payload_of(key) for key, row in zip(present, rows, strict=True))
        return len(present)

    async def copy(self, keys: Sequence[BlockKey], from_address: str, *, timeout_s: float = WAIT_S, wait_s: float = 0.0) -> Copied:
        """Has this node's service copy the blocks."""
        return await copy_blocks(self.channel, NAMESPACE, hashes_of(keys), from_address, timeout_s=timeout_s, wait_s=wait_s)

    async def prefetch(self, keys: Sequence[BlockKey], *, timeout_s: float = WAIT_S) -> int:
        """Has this node's service bring the leading blocks; how many are here then."""
        return await prefetch_blocks(self.channel, NAMESPACE, hashes_of(keys), timeout_s=timeout_s)

    async def connect(self, far: "Node") -> None:
        """Has this node's service connect to another's: on a busy machine the first attempts may time out."""
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await self.copy([key(1 << 40)], far.address)
                    return
                except UnavailableError:
                    await asyncio.sleep(0.1)

    async def metric(self, name: str) -> float:
        """A value of the service's /metrics."""
        return await asyncio.to_thread(read_metric, self.metrics_address, f"tandem_store_{name}")


def read_metric(address: str, name: str) -> float:
    """The value of a metric without labels, or with the labels in `name`; 0 where it is not there yet."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as response:
        lines = [line.rpartition(" ") for line in response.read().decode().splitlines()]
    return next((float(value) for found, _, value in lines if found == name), 0.0)


async def until(is_so: Callable[[], bool]) -> None:
    """Waits until it is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110  # another process makes it so
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running_nodes(*nodes: Node) -> AsyncIterator[None]:
    """Their services run for as long as the context lasts."""
    try:
        await asyncio.gather(*(node.start() for node in nodes))
        yield
    finally:
        await asyncio.gather(*(node.close() for node in nodes))
