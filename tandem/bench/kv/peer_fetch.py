"""Blocks from another node's store, beside raw TCP: two store services on this machine stand for two nodes."""

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc.aio
import numpy as np

from kv_transfer.arena_store import ArenaStore
from kv_transfer.peer_client import copy_blocks
from tandem.bench.kv.rows import gbps, ratios, spread
from tandem.domain import BlockHash, Namespace
from tandem.rpc import open_channel

_NAMESPACE = Namespace("0f" * 16)
_BUFFER_BYTES = 4 << 20
_TIMEOUT_S = 30.0
_READY = re.compile(r"store ready address=(\S+)")
# Sends so many bytes for each byte it gets: out of as much memory as a fetch sends from, so that both read it from there.
_SENDER = """
import socket, sys
size, block = int(sys.argv[1]), int(sys.argv[2])
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
payload = memoryview(bytes(range(256)) * (size // 256))
while peer.recv(1):
    for start in range(0, size, block):
        peer.sendall(payload[start : start + block])
"""


def measure_peer_fetch(folder: Path, block_bytes: int, total_bytes: int, *, repetitions: int, seed: int) -> dict[str, object]:
    """One row: fetches of `total_bytes` in one call, raw TCP of as many bytes in turn; every block is verified where it came."""
    rng = np.random.default_rng(seed)
    blocks = total_bytes // block_bytes
    fetched, raw, errors = list[float](), list[float](), 0
    with ExitStack() as stack:
        addresses = [stack.enter_context(_service(folder / name, 4 * total_bytes)) for name in ("far", "near")]
        far, near = (stack.enter_context(closing(ArenaStore(folder / name, capacity_bytes=4 * total_bytes))) for name in ("far", "near"))
        stream = stack.enter_context(_raw_stream(total_bytes, block_bytes))
        runner = stack.enter_context(asyncio.Runner())
        channel = runner.run(_open(addresses[1]))
        stack.callback(lambda: runner.run(channel.close(None)))
        rows, found = (np.full((blocks, block_bytes), 1, np.uint8) for _ in range(2))
        for repetition in range(repetitions + 1):
            rows[:] = rng.integers(0, 256, rows.shape, np.uint8)
            hashes = [BlockHash(rng.bytes(32)) for _ in range(blocks)]
            far.put(_NAMESPACE, hashes, rows)
            begin_s = time.perf_counter()
            runner.run(copy_blocks(channel, _NAMESPACE, hashes, addresses[0], timeout_s=_TIMEOUT_S))
            took_s = time.perf_counter() - begin_s
            raw_s = _receive(stream, found)
            near.get_into(_NAMESPACE, hashes, found)
            errors += int((found != rows).any(axis=1).sum())
            for store in (far, near):
                store.drop(_NAMESPACE, hashes)
            if repetition:
                fetched.append(gbps(total_bytes, took_s))
                raw.append(gbps(total_bytes, raw_s))
    return {
        **{"kind": "ours", "block_bytes": block_bytes, "blocks": blocks, "errors": errors},
        **spread("fetch_gbps", fetched),
        **spread("raw_tcp_gbps", raw),
        **spread("fetch_to_raw_tcp", ratios(fetched, raw)),
    }


async def _open(address: str) -> grpc.aio.Channel:
    """In the loop that will use it."""
    return open_channel(address)


@contextmanager
def _service(folder: Path, capacity_bytes: int) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "kv_transfer", f"--store-dir={folder}", f"--capacity-bytes={capacity_bytes}", "--lifeline-fd=0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            ready = _READY.match(process.stdout.readline())
            if ready is None:
                raise RuntimeError("the store service did not start")
            yield ready[1]
        finally:
            process.stdin.close()
            process.wait()


@contextmanager
def _raw_stream(total_bytes: int, block_bytes: int) -> Iterator[socket.socket]:
    command = [sys.executable, "-c", _SENDER, str(total_bytes), str(block_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=_TIMEOUT_S) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            yield stream
        process.wait()


def _receive(stream: socket.socket, rows: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]") -> float:
    """Seconds to fill the rows, one after another, as a fetch does."""
    begin_s = time.perf_counter()
    stream.sendall(b"x")
    for row in rows:
        rest = row.data
        while rest:
            rest = rest[stream.recv_into(rest) :]
    return time.perf_counter() - begin_s
