"""`Worker.Prefill`: one token of a request at once, then word that the prompt's KV blocks are published."""

import contextlib
import time
from dataclasses import replace

from kv_transfer.prefix_source import PrefixSource
from tandem.convert import finish_reason_to_pb, logprobs_to_pb, request_from_prefill_pb
from tandem.domain import FinishReason, Request, check_slack
from tandem.engine.base import Engine, EngineOutput, EngineRequest
from tandem.errors import EngineError, InvalidRequestError
from tandem.faults import Faults
from tandem.rpc import ServerCall
from tandem.urgency import engine_priority
from tandem.v1 import worker_pb2
from tandem.worker_state import Run, WorkerState, tokens_to_compute


class PrefillService:
    """Serves prefill on one replica."""

    def __init__(
        self, engine: Engine, state: WorkerState, *, publish_wait_s: float, faults: Faults, prefixes: PrefixSource | None = None
    ) -> None:
        self._engine = engine
        self._state = state
        self._publish_wait_s = publish_wait_s
        self._faults = faults
        self._prefixes = prefixes

    async def prefill(self, message: worker_pb2.PrefillRequest, call: ServerCall) -> None:
        """Writes FirstToken as soon as there is one, then Published. Raises TandemError."""
        self._state.check(message.model, message.incarnation, message.replica_id, message.namespace)
        check_slack("slack_s", message.slack_s)
        request = request_from_prefill_pb(message)
        request.validate(self._engine.info)
        if request.sampling.n > 1:
            raise InvalidRequestError("sampling.n", f"must be 1 for a prefill, got {request.sampling.n}")
        if self._faults.fires("prefill.fail_every"):
            raise EngineError("prefill failed by the fault hook prefill.fail_every")
        booking = self._state.accept(
            message.router_id,
            request.request_id,
            message.attempt,
            prefill_tokens=tokens_to_compute(message.prefill_tokens, request),
            kv_tokens=request.total_tokens,
        )
        with booking as run:
            engine_request = _to_engine_request(request, f"{request.request_id}.{message.attempt}.{run.number}", message.slack_s)
            try:
                await self._run(engine_request, run, call)
            finally:
                self._engine.forget(engine_request.run_id)

    async def _run(self, request: EngineRequest, run: Run, call: ServerCall) -> None:
        started_s = time.monotonic()
        if self._prefixes is not None:
            await self._prefixes.bring(request.token_ids, request.cache_salt, call.time_remaining_s())
        output = await self._first_output(request)
        first_token = _first_token(output, time.monotonic() - started_s)
        await call.write(worker_pb2.PrefillResponse(first_token=first_token))
        self._state.prefilled(run)
        self._state.generated(run, 1)
        remaining_s = call.time_remaining_s()
        wait_s = self._publish_wait_s if remaining_s is None else min(self._publish_wait_s, remaining_s)
        blocks = await self._engine.published(request.run_id, wait_s)
        published = worker_pb2.Published(published_blocks=blocks, published_bytes=blocks * self._engine.info.kv_block_bytes)
        await call.write(worker_pb2.PrefillResponse(published=published))

    async def _first_output(self, request: EngineRequest) -> EngineOutput:
        async with contextlib.aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                if output.token_ids:
                    return output
        raise EngineError("the engine ended the prefill without a token")


def _to_engine_request(request: Request, run_id: str, slack_s: float) -> EngineRequest:
    resumed_tokens = len(request.resume_token_ids)
    return EngineRequest(
        run_id=run_id,
        token_ids=(*request.prompt_token_ids, *request.resume_token_ids),
        sampling=replace(request.sampling, min_tokens=max(0, request.sampling.min_tokens - resumed_tokens)),
        max_new_tokens=1,
        resumed_tokens=resumed_tokens,
        cache_salt=request.cache_salt,
        priority=engine_priority(request.priority, slack_s, time.monotonic()),
    )


def _first_token(output: EngineOutput, prefill_s: float) -> worker_pb2.FirstToken:
    stopped = output.finish_reason is FinishReason.STOP
    return worker_pb2.FirstToken(
        token_id=output.token_ids[0],
        logprobs=logprobs_to_pb(output.logprobs[0]) if output.logprobs else None,
        finish_reason=finish_reason_to_pb(FinishReason.STOP if stopped else None),
        stop_reason=output.stop_reason or "",
        cached_tokens=output.cached_tokens,
        prefill_s=prefill_s,
    )
