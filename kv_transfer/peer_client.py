"""The calling side of a store service: the two calls that move blocks.

Must not touch a store: what comes is checked and stored by `copier.py`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from kv_transfer.blocks import BlockKey
from tandem.domain import BlockHash, Namespace
from tandem.rpc import ResponseStream, call, open_stream
from tandem.v1 import store_pb2

# Of one call: the blocks of a prompt of half a million tokens, and half a megabyte of hashes.
MAX_BLOCKS_PER_CALL = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """How a copy ended: blocks that came, and how many leading ones of those named are there now."""

    copied_blocks: int
    held_blocks: int


async def copy_blocks(
    channel: grpc.aio.Channel, namespace: Namespace, block_hashes: Sequence[BlockHash], from_address: str, *, timeout_s: float
) -> Copied:
    """Has the store service at `channel` fetch the leading blocks (at most 16,384) from the one at `from_address`. Raises TandemError."""
    request = store_pb2.CopyRequest(namespace=namespace, block_hashes=block_hashes[:MAX_BLOCKS_PER_CALL], from_address=from_address)
    answer = await call(channel, "tandem.v1.Store/Copy", request, store_pb2.CopyResponse, timeout_s=timeout_s)
    return Copied(copied_blocks=answer.copied_blocks, held_blocks=answer.held_blocks)


@asynccontextmanager
async def fetching(channel: grpc.aio.Channel, keys: Sequence[BlockKey], *, timeout_s: float) -> AsyncIterator[ResponseStream]:
    """The held ones of `keys` (of one namespace, at least one) as messages of FetchResponse; ended on every way out."""
    request = store_pb2.FetchRequest(namespace=keys[0].namespace, block_hashes=[key.block_hash for key in keys])
    async with open_stream(channel, "tandem.v1.Store/Fetch", request, timeout_s=timeout_s) as stream:
        yield stream
