"""Redis over a Unix socket, pipelined, as a side: `python -m tandem.bench.kv.redis_peer`. And its server."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tandem.bench.kv.processes import SideError
from tandem.bench.kv.side import Calls, Side, prefaulted, run_side
from tandem.bench.kv.span import Span
from tandem.errors import ConfigError
from tandem.redis_server import find_redis_server, redis_arguments

_PIPELINE_BYTES = 8 << 20  # more at once only fills the server's buffers (reference: stores, section 2)
_START_S = 10.0


@contextmanager
def running_redis_server(folder: Path) -> Iterator[Path]:
    """The socket of a server of our own, which takes connections; killed at the end. Raises SideError where there is no such program."""
    socket_path = folder / "redis.sock"
    try:
        command = [str(find_redis_server()), *redis_arguments(socket_path, folder)]
    except ConfigError as error:
        raise SideError(error.message, is_missing=True) from error
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline_s = time.monotonic() + _START_S
        while not socket_path.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SideError(f"the Redis server did not start (exit status {process.poll()})")
            time.sleep(0.02)
        yield socket_path
    finally:
        process.kill()
        process.wait()


class RedisAdapter:
    """One connection. A get includes the copy out of the client's bytes into the buffer."""

    def __init__(self, socket_path: str, buffer_bytes: int) -> None:
        import redis

        self.buffer = prefaulted(buffer_bytes)
        self._redis = redis.Redis(unix_socket_path=socket_path)
        self._redis.ping()

    def open(self, store: str, settings: dict[str, Any]) -> None:
        """Nothing: there is one."""

    def puts(self, span: Span) -> Calls:
        """A pipeline of SET."""
        return [partial(self._put, batch) for batch in self._batches(span)]

    def _put(self, batch: Sequence[tuple[int, memoryview]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for number, row in batch:
            pipeline.set(str(number), row)
        return list(pipeline.execute())

    def bad_puts(self, outcomes: Sequence[list[Any]], span: Span) -> int:
        """All but OK."""
        return sum(outcome is not True for batch in outcomes for outcome in batch)

    def gets(self, span: Span) -> Calls:
        """A pipeline of GET, then a copy each."""
        return [partial(self._get, batch) for batch in self._batches(span)]

    def _get(self, batch: Sequence[tuple[int, memoryview]]) -> int:
        pipeline = self._redis.pipeline(transaction=False)
        for number, _ in batch:
            pipeline.get(str(number))
        bad = 0
        for (_, row), found in zip(batch, pipeline.execute(), strict=True):
            if found is not None and len(found) == len(row):
                row[:] = found
            else:
                bad += 1
        return bad

    def bad_gets(self, outcomes: Sequence[int], span: Span) -> int:
        """Absent, or of another size."""
        return sum(outcomes)

    def lookup(self, numbers: Sequence[int], store: str) -> Callable[[], list[bool]]:
        """A pipeline of EXISTS."""

        def call() -> list[bool]:
            pipeline = self._redis.pipeline(transaction=False)
            for number in numbers:
                pipeline.exists(str(number))
            return [found == 1 for found in pipeline.execute()]

        return call

    def drop(self, span: Span) -> None:
        """All there is."""
        self._redis.flushall()

    def shut(self, store: str) -> None:
        """Nothing: the server ends."""

    def _batches(self, span: Span) -> Iterator[list[tuple[int, memoryview]]]:
        at_most = max(1, _PIPELINE_BYTES // span.block_bytes)
        for numbers, start in span.batches():
            rows = [
                (number, self.buffer.data[start + index * span.block_bytes : start + (index + 1) * span.block_bytes])
                for index, number in enumerate(numbers)
            ]
            yield from (rows[first : first + at_most] for first in range(0, len(rows), at_most))


def _make(config: dict[str, Any]) -> tuple[Side, dict[str, Any]]:
    adapter = RedisAdapter(config["socket_path"], config["buffer_bytes"])
    import redis

    parser = "hiredis" if find_spec("hiredis") else "python"  # redis-py takes it where it is there
    return Side(adapter, config["seed"]), {"version": redis.__version__, "parser": parser}


if __name__ == "__main__":
    run_side(_make)
