"""A Tandem router under load, through the public SDK. Must not look behind it."""

import time
from collections.abc import Sequence

from tandem.bench.target import Call, ServedModel
from tandem.client import AsyncClient
from tandem.errors import TandemError
from tandem.report import RequestRecord
from tandem.workload import PlannedRequest


class TandemTarget:
    """All requests go over one channel, as those of one client process do."""

    kind = "grpc"

    def __init__(self, endpoint: str | None, *, timeout_s: float, api_key: str | None = None) -> None:
        self._client = AsyncClient(endpoint, timeout_s=timeout_s, api_key=api_key)
        self.address = self._client.endpoint

    async def models(self) -> Sequence[ServedModel]:
        """The router's models."""
        cards = await self._client.models()
        return [ServedModel(id=card.id, context_tokens=card.context_tokens, engine=card.engine or None) for card in cards]

    def prepare(self, request: PlannedRequest, token_ids: Sequence[int], model: str) -> Call:
        """The message is built here; the call starts when the stream is read."""
        stream = self._client.stream(token_ids, model=model, max_tokens=request.output_tokens, ignore_eos=True, temperature=0.0)

        async def call(record: RequestRecord) -> None:
            try:
                async with stream:
                    async for chunk in stream:
                        if chunk.token_ids:
                            record.take_tokens(time.perf_counter(), len(chunk.token_ids))
            except TandemError as error:
                record.fail(error.reason.value, error.message)

        return call

    async def close(self) -> None:
        """Closes the channel."""
        await self._client.close()
