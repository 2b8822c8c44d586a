"""The load: requests sent at their times, whatever is broken, and what each client saw. Must not judge it.

HTTP clients try again where a router was broken meanwhile, as the table of promises says; nothing else is tried again here.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from enum import StrEnum

import aiohttp

from tandem.bench.event_stream import EventStream
from tandem.chaos.cases import Case, Send, Transport
from tandem.chaos.clients import Clients
from tandem.chaos.verdict import Outcome, Seen
from tandem.errors import ProtocolError, Reason, TandemError, UnavailableError

_MAX_IN_FLIGHT = 48
_SILENCE_S = 20.0  # an HTTP client's patience between two reads
_RETRY_S = 0.5
_POLL_S = 0.05
_DEADLINE_S = 120.0
_DROPPED_MESSAGE, _REPEATED_MESSAGE = 3, 2
_BUG_EVERY = 4  # streams


class SeededBug(StrEnum):
    """Faults of the platform that the harness plants to prove that it would see them. The first two change what it sees of a stream,
    behind the SDK's own check of positions, which would refuse them; the third takes a real lease in the real arena.
    """

    DROPPED_CHUNK = "dropped_chunk"
    REPEATED_TOKEN = "repeated_token"
    LEAKED_LEASE = "leaked_lease"


class Load:
    """Sends until told to stop; `seen` has every request. `was_router_broken(since_s)` says whether HTTP clients may try again."""

    def __init__(
        self,
        *,
        cases: Sequence[Case],
        prompts: Sequence[Sequence[int]],
        clients: Clients,
        http_urls: Sequence[str],
        model: str,
        was_router_broken: Callable[[float], bool],
        bug: SeededBug | None = None,
    ) -> None:
        self.seen: list[Seen] = []
        self.skipped = 0  # too many in flight
        self._cases = cases
        self._prompts = prompts
        self._clients = clients
        self._http_urls = http_urls
        self._model = model
        self._was_router_broken = was_router_broken
        self._bug = bug
        self._is_over = False
        self._hurried = 0
        self._hurried_transport: Transport | None = None
        self._is_hurried = asyncio.Event()
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._http: aiohttp.ClientSession | None = None

    @property
    def in_flight(self) -> int:
        """Requests that run now."""
        return sum(one.ended_s is None for one in self.seen)

    def hurry(self, count: int, transport: Transport | None = None) -> None:
        """The next requests are sent at once, so that a fault meets streams; all by that transport, where one is given."""
        if transport is Transport.PROXIED:
            self._clients.renew_proxied()
        self._hurried, self._hurried_transport = count, transport
        self._is_hurried.set()

    @property
    def longest_case(self) -> int:
        """The case with the longest answer of those that no stop string ends."""
        return max((case for case in self._cases if not case.stop), key=lambda case: case.max_tokens).number

    @asynccontextmanager
    async def paused(self, limit_s: float) -> AsyncIterator[None]:
        """Nothing of the load's own runs meanwhile; after `limit_s` it is not waited for what still does."""
        self._may_send.clear()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    while self.in_flight:  # noqa: ASYNC110 - the records are plain values
                        await asyncio.sleep(_POLL_S)
            yield
        finally:
            self._may_send.set()

    def stop(self) -> None:
        """Sends no more; `run` returns once the last answer is complete."""
        self._is_over = True

    async def run(self, sends: Iterator[Send], at_least: int) -> None:
        """Until `stop`, and for that many requests at least."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as self._http, asyncio.TaskGroup() as group:
            while len(self.seen) < at_least or not self._is_over:
                send = next(sends)
                if await self._waited(send.gap_s) and self._hurried_transport is not None:
                    send = replace(send, transport=self._hurried_transport)
                await self._may_send.wait()
                if self.in_flight >= _MAX_IN_FLIGHT:
                    self.skipped += 1
                    continue
                self.start(send, group)

    async def _waited(self, gap_s: float) -> bool:
        """Waits for the next request's time; whether it was hurried."""
        with suppress(TimeoutError):
            async with asyncio.timeout(gap_s):
                await self._is_hurried.wait()
        was_hurried = self._hurried > 0
        self._hurried = max(0, self._hurried - 1)
        if not self._hurried:
            self._is_hurried.clear()
        return was_hurried

    def start(self, send: Send, group: asyncio.TaskGroup) -> Seen:
        """Sends one request; its record fills while it runs."""
        seen = Seen(send=send, started_s=time.monotonic())
        self.seen.append(seen)
        group.create_task(self._send(seen), name=f"chaos request {send.index}")
        return seen

    async def _send(self, seen: Seen) -> None:
        try:
            async with asyncio.timeout(_DEADLINE_S + _SILENCE_S):  # the SDK's own deadline should come first
                await (self._by_http(seen) if seen.send.transport is Transport.HTTP else self._by_sdk(seen))
        except TandemError as error:
            seen.outcome, seen.reason, seen.message = Outcome.FAILED, error.reason.value, error.message
        except TimeoutError:
            seen.outcome, seen.reason, seen.message = Outcome.FAILED, "no_end", "the request outlived its deadline"
        except Exception as error:  # the task's root: an untyped error of the SDK is a finding, and must not end the run
            seen.outcome, seen.reason, seen.message = Outcome.FAILED, "untyped_error", repr(error)
        finally:
            seen.ended_s = time.monotonic()

    async def _by_sdk(self, seen: Seen) -> None:
        client, case = self._clients.choose(seen.send.transport, seen.send.first_router), self._cases[seen.send.case]
        asked = client.stream(
            self._prompts[case.number],
            max_tokens=case.max_tokens,
            temperature=0.0,
            stop=case.stop,
            logprobs=case.logprobs,
            timeout_s=_DEADLINE_S,
        )
        seen.logprob_token_ids = None if case.logprobs is None else []
        async with asked as stream:
            async for chunk in stream:
                self._take(seen, chunk.token_ids, chunk.text)
                if seen.logprob_token_ids is not None:
                    seen.logprob_token_ids += [entry.sampled.token_id for entry in chunk.logprobs]
                seen.finish_reason = chunk.finish_reason.value if chunk.finish_reason is not None else seen.finish_reason
                if self._goes_away(seen):
                    return
            receipt = stream.receipt
        seen.outcome = Outcome.COMPLETED
        if receipt is not None:
            seen.attempts, seen.recomputed_tokens = receipt.attempts, receipt.decode_recomputed_tokens

    async def _by_http(self, seen: Seen) -> None:
        first = int(seen.send.first_router * len(self._http_urls))
        for attempt in range(1_000):
            attempt_s = time.monotonic()
            try:
                await self._http_once(seen, self._http_urls[(first + attempt) % len(self._http_urls)])
                return
            except (aiohttp.ClientError, OSError, TandemError) as error:  # TimeoutError too
                if not self._was_router_broken(attempt_s):
                    seen.outcome, seen.reason, seen.message = Outcome.FAILED, "http_broken", repr(error)
                    return
            seen.begin_again()
            await asyncio.sleep(_RETRY_S)

    async def _http_once(self, seen: Seen, url: str) -> None:
        assert self._http is not None
        case = self._cases[seen.send.case]
        body = {
            **{"model": self._model, "prompt": self._prompts[case.number], "max_tokens": case.max_tokens},
            **{"temperature": 0, "stream": True, "return_token_ids": True, "stop": list(case.stop) or None},
        }
        async with self._http.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                text = (await response.text())[:300]
                raise UnavailableError(f"HTTP status {response.status}: {text}", reason=Reason.NO_REPLICA)
            events = EventStream()
            async for payload in response.content.iter_any():
                for data in events.feed(payload):
                    if data == b"[DONE]":
                        seen.outcome = Outcome.COMPLETED
                    elif self._take_event(seen, json.loads(data)):
                        return
        if seen.outcome is None:
            raise ProtocolError("the stream ended before its end")

    def _take_event(self, seen: Seen, event: Mapping[str, object]) -> bool:
        """One event of an HTTP stream; whether its client goes away now. Raises ProtocolError for an error in the stream."""
        if "error" in event:
            raise ProtocolError(json.dumps(event["error"]))
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            self._take(seen, choice.get("token_ids") or (), choice.get("text") or "")
            seen.finish_reason = choice.get("finish_reason") or seen.finish_reason
        return self._goes_away(seen)

    def _take(self, seen: Seen, token_ids: Sequence[int], text: str) -> None:
        if token_ids:
            seen.times_s.append(time.monotonic())
            messages = len(seen.times_s)
            if self._bug is SeededBug.DROPPED_CHUNK and seen.send.index % _BUG_EVERY == 0 and messages == _DROPPED_MESSAGE:
                return
            if self._bug is SeededBug.REPEATED_TOKEN and seen.send.index % _BUG_EVERY == 0 and messages == _REPEATED_MESSAGE:
                token_ids = (token_ids[0], *token_ids)
        seen.token_ids += token_ids
        seen.text += text

    def _goes_away(self, seen: Seen) -> bool:
        after = seen.send.cancel_after_tokens
        if after is None or len(seen.token_ids) < after or seen.finish_reason:
            return False
        seen.outcome = Outcome.CANCELLED
        return True
