"""How the demonstration asks: one greedy request through the router or straight at a replica, timed chunk by chunk; its prompts."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

import tandem
from tandem.completion import assemble
from tandem.convert import chunk_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.domain import Chunk, Lease, ModelId, Plan, PlannedWorker, Receipt, ReplicaId, Request, RequestId, Sampling
from tandem.engine.model_files import bundled_model_path
from tandem.launch import ReplicaProcess
from tandem.rpc import open_channel, open_stream
from tandem.v1 import common_pb2, inference_pb2

MAX_TOKENS = 48


@dataclass(slots=True)
class Run:
    """One streamed answer: tokens, text, when each message came (s after sending), and the receipt."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    receipt: Receipt | None = None

    def take(self, chunk: Chunk, started_s: float) -> None:
        """Adds a chunk."""
        if chunk.token_ids:
            self.times_s.append(time.monotonic() - started_s)
        self.token_ids += chunk.token_ids
        self.text += chunk.text

    @property
    def itl_s(self) -> list[float]:
        """Gaps between messages after the second token: decode alone, without the hand-off."""
        return [later - earlier for earlier, later in zip(self.times_s[1:], self.times_s[2:], strict=False)]


async def run_through_sdk(client: tandem.AsyncClient, token_ids: Sequence[int], max_tokens: int) -> Run:
    """One greedy request through the router."""
    run, started_s = Run(), time.monotonic()
    async with client.stream(list(token_ids), max_tokens=max_tokens, temperature=0.0) as stream:
        async for chunk in stream:
            run.take(chunk, started_s)
        run.receipt = stream.receipt
    return run


class DirectCaller:
    """Calls one replica over one gRPC hop, without a router: what everything else is compared with."""

    def __init__(self, replica: ReplicaProcess | Lease, prefill: Sequence[ReplicaProcess | Lease] = ()) -> None:
        self._plan = Plan(plan_id="direct", decode=_planned(replica), prefill=tuple(map(_planned, prefill)))
        self._channel = open_channel(self._plan.decode.address)
        self._number = 0

    async def run(self, token_ids: Sequence[int], max_tokens: int) -> Run:
        """One greedy request."""
        run, started_s = Run(), time.monotonic()
        async for chunk, receipt in self._stream(token_ids, Sampling(temperature=0.0, max_tokens=max_tokens)):
            if chunk is not None:
                run.take(chunk, started_s)
            run.receipt = receipt
        return run

    async def complete(self, token_ids: Sequence[int], sampling: Sampling) -> tandem.Completion:
        """One request with any sampling."""
        chunks: list[Chunk] = []
        final: Receipt | None = None
        async for chunk, receipt in self._stream(token_ids, sampling):
            if chunk is not None:
                chunks.append(chunk)
            final = receipt
        return assemble(chunks, num_choices=sampling.n, receipt=final)

    async def _stream(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncIterator[tuple[Chunk | None, Receipt | None]]:
        """The chunks, each with no receipt, then the receipt."""
        self._number += 1
        request = Request(
            request_id=RequestId(f"direct-{id(self)}-{self._number}"),
            model=ModelId("bundled"),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
        )
        message = request_to_worker_pb(request, self._plan, 0, self._plan.decode.incarnation)
        async with open_stream(self._channel, "tandem.v1.Worker/Generate", message, timeout_s=60.0) as stream:
            async for payload in stream:
                yield chunk_from_pb(inference_pb2.GenerateResponse.FromString(payload)), None
            receipt = await stream.receipt()
        yield None, None if receipt is None else receipt_from_pb(common_pb2.Receipt.FromString(receipt))

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)


def _planned(replica: ReplicaProcess | Lease) -> PlannedWorker:
    who = replica.config if isinstance(replica, ReplicaProcess) else replica
    return PlannedWorker(
        replica_id=ReplicaId(who.replica_id),
        incarnation=who.incarnation,
        address=replica.address,
        node=who.node,
        store_address=who.store_address,
    )


class Prompts:
    """Prompts of exact lengths cut from the model's own field; no two share a prefix."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(bundled_model_path() / "tokenizer.json"))
        self._ids = self._tokenizer.encode((bundled_model_path() / "sample.txt").read_text()).ids
        self._offset = 0

    def next(self, length: int) -> list[int]:
        """The next `length` tokens of the sample text, round and round."""
        self._offset = (self._offset + 37) % len(self._ids)
        doubled = self._ids[self._offset :] + self._ids[: self._offset]
        return (doubled * (1 + length // len(doubled)))[:length]

    def text(self, token_ids: Sequence[int]) -> str:
        """For people."""
        return str(self._tokenizer.decode(list(token_ids)))


async def interleave(
    client: tandem.AsyncClient, plain: DirectCaller, cases: Sequence[Sequence[int]], max_tokens: int
) -> tuple[list[Run], list[Run]]:
    """Each prompt through the platform and on the plain replica, one at a time, in turn."""
    ours, plains = [], []
    for number, token_ids in enumerate(cases):
        if number % 2:
            plains.append(await plain.run(token_ids, max_tokens))
        ours.append(await run_through_sdk(client, token_ids, max_tokens))
        if not number % 2:
            plains.append(await plain.run(token_ids, max_tokens))
    return ours, plains
