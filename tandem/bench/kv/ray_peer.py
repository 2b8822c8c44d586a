"""Ray's object store as two sides in one: `python -m tandem.bench.kv.ray_peer`, a driver with a writer and a reader actor.

Commands carry a `role`. Objects have no keys of the caller's choice: the driver hands the writer's references to the reader.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.bench.kv.processes import SideProcess
from tandem.bench.kv.side import Calls, Side, prefaulted, run_side
from tandem.bench.kv.span import Span
from tandem.ray_environment import set_ray_environment


class RayAdapter:
    """ray.put of each row; ray.get of a batch, with a copy of each view into the buffer."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer = prefaulted(buffer_bytes)
        self.references: list[Any] = []  # of the last put, or of those to get

    def open(self, store: str, settings: dict[str, Any]) -> None:
        """Nothing: there is one."""

    def puts(self, span: Span) -> Calls:
        """One call a batch."""
        import ray

        return [partial(lambda rows: [ray.put(row) for row in rows], self._rows(span, batch)) for batch in span.batches()]

    def bad_puts(self, outcomes: Sequence[list[Any]], span: Span) -> int:
        """None: ray.put raises. Keeps the references."""
        self.references = [reference for batch in outcomes for reference in batch]
        return 0

    def gets(self, span: Span) -> Calls:
        """One call a batch, of the references given."""
        return [
            partial(self._get, self.references[numbers.start - span.first : numbers.stop - span.first], self._rows(span, (numbers, start)))
            for numbers, start in span.batches()
        ]

    def _get(self, references: list[Any], rows: NDArray[np.uint8]) -> None:
        import ray

        for row, found in zip(rows, ray.get(references), strict=True):
            row[:] = found

    def bad_gets(self, outcomes: Sequence[Any], span: Span) -> int:
        """None: ray.get raises."""
        return 0

    def lookup(self, numbers: Sequence[int], store: str) -> Callable[[], list[bool]]:
        """Ray has no keys to look up."""
        raise NotImplementedError

    def drop(self, span: Span) -> None:
        """Lets the references go, and with them the objects."""
        self.references = []

    def shut(self, store: str) -> None:
        """Nothing: Ray ends."""

    def _rows(self, span: Span, batch: tuple[range, int]) -> NDArray[np.uint8]:
        numbers, start = batch
        return self.buffer[start : start + len(numbers) * span.block_bytes].reshape(len(numbers), span.block_bytes)


class RaySide:
    """What runs in an actor."""

    def __init__(self, buffer_bytes: int, seed: int) -> None:
        self._adapter = RayAdapter(buffer_bytes)
        self._side = Side(self._adapter, seed)

    def answer(self, command: dict[str, Any], references: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """Carries out one command; returns the references it holds then."""
        if command["do"] == "get":
            self._adapter.references = references
        found = self._side.answer(command)
        kept, self._adapter.references = self._adapter.references, []
        return found, kept if command["do"] == "put" else []


class _Driver:
    """Passes commands on to the actors."""

    def __init__(self, config: dict[str, Any]) -> None:
        set_ray_environment(os.environ, "127.0.0.1")
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=config["object_store_bytes"],
            _node_ip_address="127.0.0.1",
            _temp_dir=config["folder"],
        )
        actor = ray.remote(RaySide)
        self._get = ray.get
        self._references: list[Any] = []
        self._actors = {role: actor.remote(config["buffer_bytes"], config["seed"]) for role in ("writer", "reader")}
        self.version = str(ray.__version__)

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer of the actor that the command names."""
        references = self._references if command["do"] == "get" else []
        found, kept = self._get(self._actors[command.pop("role")].answer.remote(command, references))
        if command["do"] == "put":
            self._references = kept
        elif command["do"] == "drop":
            self._references = []
        answer: dict[str, Any] = found
        return answer


class RaySides:
    """The bench's end: one process for both roles."""

    def __init__(self, process: SideProcess) -> None:
        self._process = process

    def call(self, role: str, **command: Any) -> dict[str, Any]:
        """One command and its answer."""
        return self._process.call(role=role, **command)


def _make(config: dict[str, Any]) -> tuple[_Driver, dict[str, Any]]:
    driver = _Driver(config)
    return driver, {"version": driver.version}


if __name__ == "__main__":
    run_side(_make)
