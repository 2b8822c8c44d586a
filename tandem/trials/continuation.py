"""What a loss costs on real engines: tokens computed again, the pause a client sees, a drain, cancels, and the session's own CPU time."""

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.health import Health
from tandem.chaos.signals import Held
from tandem.cleanup import processes_of
from tandem.client import AsyncClient
from tandem.demo import Prompts
from tandem.domain import Chunk, ReplicaState, Role
from tandem.errors import ConfigError
from tandem.hang import try_look
from tandem.session import CLIENT_RETRIES, Session
from tandem.trials.fleet import fleet

_OPTIONS = ("--kv-cache-bytes=134217728", "--dtype=float32", "--one-worker-max-tokens=0")
_PROMPT_TOKENS, _OUTPUT_TOKENS = 1000, 200
_KILLED_AT = (20, 45, 70, 95, 120, 145, 170)
_STOPPED_AT = (40, 100, 160)
_DRAINS, _DRAINED_STREAMS, _DRAINED_OUTPUT_TOKENS = 3, 32, 1000
_CANCELS, _CANCELLED_OUTPUT_TOKENS, _IN_FLIGHT, _LONGEST_S = 1000, 40, 24, 1.5
_CPU_REQUESTS, _CPU_IN_FLIGHT = 64, 8
_SESSIONS = 2  # that join each token: the router's and the client's
_RECOVERY_S = 90.0
_LOOK_S = 0.01
_COUNTED = ("replica", "engine_core", "router")
_TICKS_PER_S = 100  # of /proc/PID/stat, as Linux has it everywhere


@dataclass(slots=True, kw_only=True)
class Seen:
    """One stream as its client saw it."""

    chunks: list[Chunk] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    recomputed_tokens: int = 0

    @property
    def token_ids(self) -> list[int]:
        """All that came."""
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def pause_s(self) -> float:
        """The longest wait between two messages."""
        return max((after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


async def continuation_trials() -> dict[str, object]:
    """Two prefill and two decode replicas of the bundled model; every prompt is handed off."""
    async with fleet(2, 2, 2, _OPTIONS) as running:
        health = Health(running.cluster)
        try:
            await health.begin()
            async with AsyncClient(",".join(running.routers), timeout_s=120.0) as client:
                return await Losses(running.cluster, health, client).all()
        finally:
            await health.close()


class Losses:
    """Breaks decode replicas of one cluster, one after another."""

    def __init__(self, cluster: ChaosCluster, health: Health, client: AsyncClient) -> None:
        self._cluster = cluster
        self._health = health
        self._client = client
        self._prompts = Prompts()
        self._rng = Random(5)

    async def all(self) -> dict[str, object]:
        """The report, by trial."""
        return {
            "session_cpu": await self.session_cpu(),
            "decode_killed": await self.decode_broken(_KILLED_AT, signal.SIGKILL),
            "decode_stopped": await self.decode_broken(_STOPPED_AT, signal.SIGSTOP),
            "drain": [await self.drained() for _ in range(_DRAINS)],
            "cancels": await self.cancelled(),
        }

    async def stream(
        self, prompt: Sequence[int], max_tokens: int, *, at: int = 0, act: Callable[[], Awaitable[None]] | None = None
    ) -> Seen:
        """One request to its end; `act` at its token number `at`."""
        seen, tokens = Seen(), 0
        async with self._client.stream(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True) as stream:
            async for chunk in stream:
                seen.chunks.append(chunk)
                seen.times_s.append(time.monotonic())
                before, tokens = tokens, tokens + len(chunk.token_ids)
                if act is not None and before < at <= tokens:
                    await act()
            if stream.receipt is not None:
                seen.recomputed_tokens = stream.receipt.decode_recomputed_tokens
        return seen

    async def decode_broken(self, at_tokens: Sequence[int], how: signal.Signals) -> dict[str, object]:
        """The decode replica of a request gets a signal in the midst of its output; the same prompt is asked again when all is whole."""
        recomputed, pauses_s, mismatches = list[int](), list[float](), 0
        for at in at_tokens:
            prompt = self._prompts.next(_PROMPT_TOKENS)
            with contextlib.ExitStack() as held:

                async def act(held: contextlib.ExitStack = held) -> None:
                    victim = self._held(await self._busy_decode())
                    held.callback(victim.close)
                    victim.send(how)

                seen = await self.stream(prompt, _OUTPUT_TOKENS, at=at, act=act)
            await self._whole_again()
            mismatches += seen.token_ids != (await self.stream(prompt, _OUTPUT_TOKENS)).token_ids
            recomputed.append(seen.recomputed_tokens)
            pauses_s.append(seen.pause_s)
        return {
            "signal": how.name,
            "at_tokens": list(at_tokens),
            "prompt_tokens": _PROMPT_TOKENS,
            "output_tokens": _OUTPUT_TOKENS,
            "recomputed_tokens": recomputed,
            "pauses_s": pauses_s,
            "median_pause_s": statistics.median(pauses_s),
            "token_mismatches": mismatches,
        }

    async def drained(self) -> dict[str, object]:
        """A decode replica with many streams is drained, `tandem drain`, when the other one takes work: until it runs nothing."""
        prompts = [self._prompts.next(64) for _ in range(_DRAINED_STREAMS)]
        decode = await self._decode()
        other = self._held(decode[1])
        other.send(signal.SIGKILL)  # so that all begin on the first
        other.close()
        await self._until(lambda: self._decode_are(decode[:1]))
        begun, running = asyncio.Event(), 0

        async def count() -> None:
            nonlocal running
            running += 1
            if running == len(prompts):
                begun.set()

        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(self.stream(prompt, _DRAINED_OUTPUT_TOKENS, at=2, act=count)) for prompt in prompts]
            await begun.wait()
            await self._until(lambda: self._decode_are(decode))
            on_it, began_s = await self._running(decode[0]), time.monotonic()
            await self._client.drain(decode[0])
            await self._until(lambda: self._is_idle(decode[0]))
            drained_s = time.monotonic() - began_s
        seen = [stream.result() for stream in streams]
        await self._whole_again()
        again = await asyncio.gather(*(self.stream(prompt, _DRAINED_OUTPUT_TOKENS) for prompt in prompts))
        return {
            "running_streams": on_it,
            "drained_s": drained_s,
            "largest_gap_s": max(one.pause_s for one in seen),
            "token_mismatches": sum(one.token_ids != other.token_ids for one, other in zip(seen, again, strict=True)),
        }

    async def cancelled(self) -> dict[str, object]:
        """Requests whose caller goes at a random moment, from before the first message to after the last."""
        before = await self._health.gauges()
        places = asyncio.Semaphore(_IN_FLIGHT)

        async def one() -> bool:
            prompt = self._prompts.next(self._rng.randint(8, 1500))
            async with places:
                task = asyncio.create_task(self.stream(prompt, _CANCELLED_OUTPUT_TOKENS))
                await asyncio.wait([task], timeout=self._rng.uniform(0.0, _LONGEST_S))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return task.cancelled()

        cancelled = sum(await asyncio.gather(*(one() for _ in range(_CANCELS))))
        ended_s = time.monotonic()
        held = await self._above(before)
        while held and time.monotonic() - ended_s < _RECOVERY_S:
            await asyncio.sleep(0.1)
            held = await self._above(before)
        return {"requests": _CANCELS, "cancelled_in_flight": cancelled, "gauges_back_s": time.monotonic() - ended_s, "still_held": held}

    async def _above(self, before: dict[str, float]) -> dict[str, float]:
        """Leases of blocks run out by themselves."""
        now = await self._health.gauges()
        return {name: value for name, value in now.items() if value > before.get(name, 0.0) and "leased" not in name}

    async def session_cpu(self) -> dict[str, float]:
        """CPU time of replicas, routers and this client a token, undisturbed; of that, what joining the same chunks takes twice."""
        places = asyncio.Semaphore(_CPU_IN_FLIGHT)

        async def one() -> Seen:
            async with places:
                return await self.stream(self._prompts.next(64), _OUTPUT_TOKENS)

        began_s, began_here_s = self._cpu_s(), time.process_time()
        seen = await asyncio.gather(*(one() for _ in range(_CPU_REQUESTS)))
        all_s = self._cpu_s() - began_s + time.process_time() - began_here_s
        tokens = sum(len(stream.token_ids) for stream in seen)
        began_here_s = time.process_time()
        for stream in seen:
            session = Session(CLIENT_RETRIES, self._rng)
            for chunk in stream.chunks:
                session.joiner.join(chunk)
            session.joiner.end()
        session_s = _SESSIONS * (time.process_time() - began_here_s)
        return {
            "tokens": tokens,
            "cpu_us_per_token": 1e6 * all_s / tokens,
            "session_us_per_token": 1e6 * session_s / tokens,
            "session_of_cpu": session_s / all_s,
        }

    def _cpu_s(self) -> float:
        looks = [try_look(process.pid) for process in processes_of(self._cluster.id) if process.kind in _COUNTED]
        return sum(look.cpu_ticks for look in looks if look is not None) / _TICKS_PER_S

    async def _decode(self) -> list[str]:
        """Decode replicas that take work, by name."""
        status = await self._client.status()
        decode = [one for one in status.replicas if one.lease.role is Role.DECODE and one.is_reachable]
        return sorted(one.lease.replica_id for one in decode if one.lease.state is ReplicaState.READY)

    async def _decode_are(self, names: Sequence[str]) -> bool:
        return await self._decode() == list(names)

    async def _busy_decode(self) -> str:
        """The decode replica that runs something, once it is known which."""
        async with asyncio.timeout(_RECOVERY_S):
            while True:
                status = await self._client.status()
                busy = [one.lease.replica_id for one in status.replicas if one.lease.role is Role.DECODE and one.load.running_requests]
                if busy:
                    return busy[0]
                await asyncio.sleep(_LOOK_S)

    async def _running(self, name: str) -> int:
        """Requests that a replica says it runs; none where it is gone."""
        status = await self._client.status()
        return sum(one.load.running_requests for one in status.replicas if one.lease.replica_id == name)

    async def _is_idle(self, name: str) -> bool:
        return not await self._running(name)

    async def _until(self, is_true: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(_RECOVERY_S):
            while True:
                if await is_true():
                    return
                await asyncio.sleep(_LOOK_S)

    def _held(self, name: str) -> Held:
        """The process of a replica, by the register's last look."""
        return Held(self._cluster.id, [member.pid for member in self._health.members if member.member_id == name])

    async def _whole_again(self) -> None:
        """Raises ConfigError where the platform has not recovered."""
        if missing := await self._health.whole_again((), _RECOVERY_S):
            raise ConfigError(f"the platform has not recovered from a trial: {missing} is missing")
