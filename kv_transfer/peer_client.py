"""The calling side of a store service: has it copy blocks from another one, or bring a prefix from wherever it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from kv_transfer.peer_wire import MAX_BLOCKS_PER_REQUEST
from tandem.domain import BlockHash, Namespace
from tandem.rpc import call
from tandem.v1 import store_pb2

MAX_BLOCKS_PER_CALL = MAX_BLOCKS_PER_REQUEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """How a copy ended: blocks that came, and how many leading ones of those named are there now."""

    copied_blocks: int
    held_blocks: int


async def copy_blocks(
    channel: grpc.aio.Channel,
    namespace: Namespace,
    block_hashes: Sequence[BlockHash],
    from_address: str,
    *,
    timeout_s: float,
    wait_s: float = 0.0,
) -> Copied:
    """Has the store service at `channel` fetch the leading blocks (at most 16,384) from the one at `from_address`.

    Waits up to `wait_s` for those that the other one does not hold yet. Raises TandemError.
    """
    request = store_pb2.CopyRequest(
        namespace=namespace, block_hashes=block_hashes[:MAX_BLOCKS_PER_CALL], from_address=from_address, wait_ms=int(1000 * wait_s)
    )
    answer = await call(channel, "tandem.v1.Store/Copy", request, store_pb2.CopyResponse, timeout_s=timeout_s)
    return Copied(copied_blocks=answer.copied_blocks, held_blocks=answer.held_blocks)


async def prefetch_blocks(channel: grpc.aio.Channel, namespace: Namespace, block_hashes: Sequence[BlockHash], *, timeout_s: float) -> int:
    """Has the store service at `channel` bring the leading blocks into its arena; how many are there then. Raises TandemError."""
    request = store_pb2.PrefetchRequest(namespace=namespace, block_hashes=block_hashes[:MAX_BLOCKS_PER_CALL])
    answer = await call(channel, "tandem.v1.Store/Prefetch", request, store_pb2.PrefetchResponse, timeout_s=timeout_s)
    return int(answer.held_blocks)
