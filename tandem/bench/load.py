"""The open loop: sends each request at its time, never held up by slow answers, and measures how late it is itself.

Must not know what an endpoint speaks, nor compute figures.
"""

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from tandem.bench.target import Call
from tandem.report import Outcome, RequestRecord
from tandem.workload import PlannedRequest

# Prompts made ready ahead of their time: about 40 MB of bodies.
_READY_TOKENS = 4_000_000
_LAG_PROBE_S = 0.01
_TICK_S = 0.5


@dataclass(slots=True, kw_only=True)
class Progress:
    """Counts while a load runs."""

    total: int
    in_flight: int = 0
    completed: int = 0
    failed: int = 0


class LoadRun:
    """One run of a workload. `prepare` makes a request ready; `on_tick` is called twice a second and must take no time.

    With `concurrency` at most so many requests are in flight: the loop is then no longer open, and `turn_s` to `sent_s` is the wait.
    """

    def __init__(
        self,
        requests: Sequence[PlannedRequest],
        prepare: Callable[[PlannedRequest], Call],
        *,
        concurrency: int | None = None,
        on_tick: Callable[[Progress], None] | None = None,
    ) -> None:
        self.records: list[RequestRecord] = []
        self.loop_lags_s = array("d")
        self.duration_s = 0.0
        self.is_stopped = False
        self.progress = Progress(total=len(requests))
        self._prepare = prepare
        self._on_tick = on_tick
        self._waiting = deque(requests)
        self._ready: deque[tuple[PlannedRequest, Call]] = deque()
        self._ready_tokens = 0
        self._places: AbstractAsyncContextManager[object] = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
        self._sending: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Sends all and waits for the answers, or until `stop`. Run it once; afterwards `records` and `duration_s` say what was."""
        self._fill()
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._probe_loop_lag(), name="bench-loop-lag"), group.create_task(self._tick(), name="bench-tick")]
            self._sending = group.create_task(self._send_all(started_s), name="bench-send")
            if self.is_stopped:
                self._sending.cancel()
            await asyncio.wait([self._sending])
            self.duration_s = time.perf_counter() - started_s
            for task in beside:
                task.cancel()

    def stop(self) -> None:
        """Cancels what is in flight and sends no more."""
        self.is_stopped = True
        if self._sending is not None:
            self._sending.cancel()

    async def _send_all(self, started_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            while self._ready:
                request, call = self._ready.popleft()
                self._ready_tokens -= request.prompt_tokens
                scheduled_s = started_s + request.send_at_s
                # A sleep of nothing still lets answers be read where the generator is behind.
                await asyncio.sleep(max(0.0, scheduled_s - time.perf_counter()))
                record = RequestRecord(
                    scheduled_s=scheduled_s,
                    prompt_tokens=request.prompt_tokens,
                    asked_tokens=request.output_tokens,
                    turn_s=time.perf_counter(),
                )
                self.records.append(record)
                group.create_task(self._send(record, call), name=f"bench-request-{request.index}")
                self._fill()

    async def _send(self, record: RequestRecord, call: Call) -> None:
        async with self._places:
            self.progress.in_flight += 1
            record.sent_s = time.perf_counter()
            try:
                await call(record)
                record.end()
            finally:
                self.progress.in_flight -= 1
                if record.outcome is None:
                    record.outcome = Outcome.CANCELLED
        self.progress.completed += record.outcome is Outcome.COMPLETED
        self.progress.failed += record.outcome is Outcome.FAILED

    def _fill(self) -> None:
        """Makes requests ready ahead of their time, so that sending one only sends it."""
        while self._waiting and (not self._ready or self._ready_tokens < _READY_TOKENS):
            request = self._waiting.popleft()
            self._ready.append((request, self._prepare(request)))
            self._ready_tokens += request.prompt_tokens

    async def _probe_loop_lag(self) -> None:
        """How late a timer fires is how late any message is read."""
        while True:
            due_s = time.perf_counter() + _LAG_PROBE_S
            await asyncio.sleep(_LAG_PROBE_S)
            self.loop_lags_s.append(max(0.0, time.perf_counter() - due_s))

    async def _tick(self) -> None:
        while self._on_tick is not None:
            self._on_tick(self.progress)
            await asyncio.sleep(_TICK_S)
