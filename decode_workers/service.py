"""`Worker.Generate`: the first token from a prefill worker or from here, the rest from here, as one stream.

Holds no engine memory while a prefill worker computes; starts on prompt + first token, when that token has already left.
"""

import contextlib
import time
from dataclasses import dataclass, field, replace

from decode_workers.choice import Choice, first_output
from decode_workers.handoff import Channels, Prefilled, Prefilling, prefill_elsewhere
from decode_workers.remote_blocks import RemoteBlocks, RemoteHandoff
from kv_transfer.prefix_source import PrefixSource
from tandem.convert import chunk_to_pb, plan_from_pb, receipt_to_pb, request_from_worker_pb
from tandem.domain import Chunk, Plan, Receipt, Request, Usage
from tandem.engine.base import Engine, EngineRequest
from tandem.errors import EngineError, InvalidRequestError
from tandem.rpc import Deadline, ServerCall
from tandem.urgency import begun_priority, engine_priority
from tandem.v1 import worker_pb2
from tandem.worker_state import Run, WorkerState, tokens_to_compute


@dataclass(slots=True)
class _Stream:
    """One request on this worker: what was sent and when."""

    request: Request
    plan: Plan
    attempt: int
    call: ServerCall
    deadline: Deadline
    run: Run
    choices: list[Choice]
    started_s: float
    sent_s: list[float] = field(default_factory=list)  # the first two tokens' and the last one's
    prefilled: Prefilled | None = None
    published_s: float = 0.0
    has_engine_output: bool = False
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    kv_bytes: int = 0
    prefill_s: float = 0.0

    @property
    def output_tokens(self) -> int:
        """Output tokens of all choices, resumed ones included."""
        return sum(choice.position for choice in self.choices)

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)


class DecodeService:
    """Serves generation on one replica. `channels` gives a channel to another worker by address.

    `publish_wait_s` bounds how long decode waits for a prefill worker's blocks after its token; `remote_blocks` gets those of other nodes.
    """

    def __init__(
        self,
        engine: Engine,
        state: WorkerState,
        channels: Channels,
        *,
        publish_wait_s: float,
        remote_blocks: RemoteBlocks | None = None,
        prefixes: PrefixSource | None = None,
    ) -> None:
        self._engine = engine
        self._state = state
        self._channels = channels
        self._publish_wait_s = publish_wait_s
        self._remote_blocks = remote_blocks
        self._prefixes = prefixes

    async def generate(self, message: worker_pb2.WorkerGenerateRequest, call: ServerCall) -> None:
        """Writes the request's tokens from its first position on; the receipt comes as trailing metadata. Raises TandemError."""
        request, plan = request_from_worker_pb(message), plan_from_pb(message.plan)
        self._state.check(message.model, message.incarnation)
        self._state.check(message.model, plan.decode.incarnation, plan.decode.replica_id)
        plan.validate()
        request.validate(self._engine.info)
        is_handoff = bool(plan.prefill) and request.sampling.one_worker_reason() is None
        booking = self._state.accept(
            plan.router_id,
            request.request_id,
            message.attempt,
            prefill_tokens=0 if is_handoff else tokens_to_compute(plan.prefill_tokens, request),
            kv_tokens=request.total_tokens,
        )
        with booking as run:
            stream = _Stream(
                request=request,
                plan=plan,
                attempt=message.attempt,
                call=call,
                deadline=Deadline(call.time_remaining_s()),
                run=run,
                choices=[self._make_choice(request, index) for index in range(request.sampling.n)],
                started_s=time.monotonic(),
            )
            if is_handoff:
                await self._first_token(stream)
            if not stream.is_finished:
                await self._decode(stream)
            call.set_receipt(receipt_to_pb(self._receipt(stream)))

    def _make_choice(self, request: Request, index: int) -> Choice:
        text = self._engine.output_text(request.prompt_token_ids, request.sampling)
        stop_string = text.add(request.resume_token_ids, is_stop_token=False)
        if stop_string is not None:
            raise InvalidRequestError("resume_token_ids", "hold a stop string already: the output has ended there")
        text.take(is_finished=False)  # the client has this text from the worker before
        return Choice(index, text, position=len(request.resume_token_ids), max_output_tokens=request.max_output_tokens(self._engine.info))

    async def _first_token(self, stream: _Stream) -> None:
        """Has a prefill worker compute the first token and passes it on at once; leaves all to this engine where none can."""
        handoff = prefill_elsewhere(
            stream.request,
            stream.plan,
            stream.attempt,
            stream.deadline,
            self._channels,
            namespace=self._state.lease.namespace,
            publish_wait_s=self._publish_wait_s,
        )
        remote: RemoteHandoff | None = None
        published_blocks: int | None = None
        async with contextlib.AsyncExitStack() as stack:
            async for event in await stack.enter_async_context(contextlib.aclosing(handoff)):
                if isinstance(event, Prefilling):
                    if remote is not None:  # of a worker that was lost
                        await remote.aclose()
                    remote = self._remote_blocks.start(stream.request, event.worker, stream.deadline) if self._remote_blocks else None
                    if remote is not None:
                        await stack.enter_async_context(contextlib.aclosing(remote))
                elif isinstance(event, Prefilled):
                    stream.prefilled = event
                    stream.cached_tokens = event.cached_tokens
                    stream.prefill_s = event.prefill_s
                    await self._send(stream, stream.choices[0].add(first_output(event.output)))
                    if stream.is_finished:
                        return
                else:
                    published_blocks = event.blocks
                    stream.published_s = time.monotonic()
            if remote is not None and stream.prefilled is not None:
                await remote.finish(published_blocks)
                stream.published_s = time.monotonic()
        if stream.prefilled is None:
            self._state.must_prefill(stream.run, stream.request.total_tokens)

    async def _decode(self, stream: _Stream) -> None:
        """Runs this engine from the tokens there are to the end."""
        request, choice = stream.request, stream.choices[0]
        first = () if stream.prefilled is None else stream.prefilled.output.token_ids
        token_ids = (*request.prompt_token_ids, *request.resume_token_ids, *first)
        run_id = f"{request.request_id}.{stream.attempt}.{stream.run.number}"
        if self._prefixes is not None and stream.prefilled is None:
            await self._prefixes.bring(token_ids, request.cache_salt, stream.deadline.remaining_s("prefetch"))
        engine_request = EngineRequest(
            run_id=run_id,
            token_ids=token_ids,
            sampling=replace(request.sampling, min_tokens=max(0, request.sampling.min_tokens - choice.position)),
            max_new_tokens=request.max_output_tokens(self._engine.info) - choice.position,
            resumed_tokens=len(token_ids) - len(request.prompt_token_ids),
            cache_salt=request.cache_salt,
            priority=self._priority(stream),
            counts_use=stream.prefilled is None,
        )
        try:
            async with contextlib.aclosing(self._engine.generate(engine_request)) as outputs:
                async for output in outputs:
                    target = stream.choices[output.choice_index]
                    if target.finish_reason is not None or not (output.token_ids or output.finish_reason):
                        continue
                    if not stream.has_engine_output:
                        stream.has_engine_output = True
                        self._note_start(stream, run_id, len(token_ids), output.cached_tokens)
                    await self._send(stream, target.add(output))
                    if stream.is_finished:
                        return
            raise EngineError("the engine ended its stream early")
        finally:
            self._engine.forget(run_id)

    def _priority(self, stream: _Stream) -> int:
        """Of this engine's run: tokens that somebody reads already go first."""
        request = stream.request
        if stream.prefilled is not None or request.resume_token_ids:
            return begun_priority(request.priority)
        return engine_priority(request.priority, stream.plan.slack_s, time.monotonic())

    def _note_start(self, stream: _Stream, run_id: str, total_tokens: int, cached_tokens: int) -> None:
        """Books what the first step of this engine took from caches and what it computed."""
        loaded = self._engine.take_loaded(run_id)
        if loaded is not None:
            cached_tokens = loaded.local_tokens + loaded.blocks * self._engine.info.block_size_tokens
            stream.kv_bytes = loaded.payload_bytes
        stream.recomputed_tokens = total_tokens - cached_tokens
        if stream.prefilled is None:
            stream.cached_tokens = cached_tokens
            stream.prefill_s = time.monotonic() - stream.started_s
            self._state.prefilled(stream.run)

    async def _send(self, stream: _Stream, chunk: Chunk) -> None:
        if chunk.finish_reason is not None:
            usage = Usage(
                prompt_tokens=len(stream.request.prompt_token_ids),
                output_tokens=stream.output_tokens,
                cached_tokens=min(stream.cached_tokens, len(stream.request.prompt_token_ids)),
            )
            chunk = replace(chunk, usage=usage)
        await stream.call.write(chunk_to_pb(chunk))
        del stream.sent_s[2:]
        stream.sent_s.append(time.monotonic())
        self._state.generated(stream.run, len(chunk.token_ids))

    def _receipt(self, stream: _Stream) -> Receipt:
        request, prefilled, sent_s = stream.request, stream.prefilled, stream.sent_s
        is_handed_off = prefilled is not None and len(sent_s) > 1
        reason = request.sampling.one_worker_reason() or stream.plan.one_worker_reason
        return Receipt(
            request_id=request.request_id,
            prefill_s=stream.prefill_s,
            handoff_gap_s=sent_s[1] - sent_s[0] if is_handed_off else 0.0,
            transfer_s=max(0.0, stream.published_s - sent_s[0]) if is_handed_off else 0.0,
            decode_s=sent_s[-1] - sent_s[0],
            e2e_s=sent_s[-1] - stream.started_s,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=stream.output_tokens,
            cached_tokens=stream.cached_tokens,
            decode_recomputed_tokens=stream.recomputed_tokens,
            kv_bytes_shipped=stream.kv_bytes,
            prefill_replica_id=self._state.lease.replica_id if prefilled is None else prefilled.worker.replica_id,
            decode_replica_id=self._state.lease.replica_id,
            handed_off=is_handed_off,
            one_worker_reason="" if prefilled is not None else reason or ("prefill_lost" if stream.plan.prefill else ""),
        )
