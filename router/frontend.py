"""The path of one request that gRPC and HTTP share: model, tokens, admission, relay, receipt, metrics.

Must not know how the client is connected: a `Call` takes the output, errors leave as TandemError.
"""

import asyncio
from typing import Protocol

from kv_transfer.manifest import hash_in_slices
from router.choices import Choices
from router.relay import Relay, TokenSink
from router.request_reader import read_request
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem.deadline import Deadline
from tandem.domain import Lease, ModelId, Receipt, Request
from tandem.errors import DeadlineError, Reason, TandemError
from tandem.v1 import inference_pb2

_UNKNOWN_MODEL = "unknown"  # a label must not be what a client made up


class Call(Protocol):
    """One client's call, whatever it came by. When the client goes, the task that serves it is cancelled."""

    tenant: str  # by the caller's key

    def time_remaining_s(self) -> float | None:
        """Seconds until the client's deadline; None where it gave none."""

    async def accept(self, request: Request, lease: Lease) -> None:
        """The request is valid and is for the model of `lease`; its output follows. Raises TandemError to end it."""

    async def write(self, payload: bytes, /) -> None:
        """Takes one serialised GenerateResponse; raises CancelledRequestError where the client has gone."""


class Frontend:
    """Serves requests of any protocol on one shell."""

    def __init__(self, shell: RouterShell, workers: Workers, tokenizers: Tokenizers) -> None:
        self._shell = shell
        self._workers = workers
        self._tokenizers = tokenizers

    async def generate(self, message: inference_pb2.GenerateRequest, call: Call) -> Receipt:
        """Streams one request's tokens to the call; answers its receipt. Raises TandemError."""
        arrived_s = self._shell.clock()
        deadline = Deadline(call.time_remaining_s())
        model, outcome, choices = _UNKNOWN_MODEL, str(Reason.BUG), None
        metrics = self._shell.metrics
        try:
            with self._shell.call(message.model):
                deadline.remaining_s("arrival")
                lease = await self._shell.lease_for(message.model, deadline)
                model = lease.model
                request = await read_request(message, lease, self._tokenizers, call.tenant)
                block_hashes = await hash_in_slices(request.prompt_token_ids, lease.engine.block_size_tokens, request.cache_salt)
                await call.accept(request, lease)
                metrics.prompt_tokens.labels(model).inc(len(request.prompt_token_ids))
                metrics.tenant_prompt_tokens.labels(call.tenant).inc(len(request.prompt_token_ids))

                def make_relay(sink: TokenSink, request: Request) -> Relay:
                    return Relay(self._shell, self._workers, sink, request, lease.engine, arrived_s=arrived_s)

                choices = Choices(call, request, make_relay)
                receipt = await choices.run(block_hashes, deadline)
            self._observe(lease.model, receipt)
            outcome = "ok"
            return receipt
        except TandemError as error:
            outcome = error.reason
            raise
        except asyncio.CancelledError:
            outcome = Reason.DEADLINE if _is_over(deadline) else Reason.CLIENT_CANCELLED  # a transport too ends a call at its deadline
            raise
        finally:
            metrics.requests.labels(model, outcome).inc()
            metrics.tenant_requests.labels(call.tenant, outcome).inc()
            if choices is not None:
                metrics.output_tokens.labels(model).inc(choices.sent_tokens)
                metrics.tenant_output_tokens.labels(call.tenant).inc(choices.sent_tokens)

    def _observe(self, model: ModelId, receipt: Receipt) -> None:
        metrics = self._shell.metrics
        metrics.queue.labels(model).observe(receipt.queue_s)
        metrics.ttft.labels(model).observe(receipt.ttft_s)
        metrics.e2e.labels(model).observe(receipt.e2e_s)
        for term in receipt.predicted:
            if term.name == "ttft_s" and term.actual is not None:
                metrics.ttft_error.labels(model).observe(abs(term.predicted - term.actual))


def _is_over(deadline: Deadline) -> bool:
    try:
        deadline.remaining_s("end")
    except DeadlineError:
        return True
    return False
