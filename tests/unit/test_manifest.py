"""Hashing a prompt in slices gives what hashing it at once gives."""

import asyncio

import pytest

from kv_transfer.blocks import block_hashes
from kv_transfer.manifest import hash_in_slices


@pytest.mark.parametrize("tokens", [0, 3, 4, 255, 256, 257, 512, 1003])
@pytest.mark.parametrize("salt", ["", "tenant"])
async def test_slices_make_one_chain(tokens: int, salt: str) -> None:
    assert await hash_in_slices(range(tokens), 4, salt) == block_hashes(range(tokens), 4, salt)


@pytest.mark.parametrize(
    ("tokens", "block_size_tokens", "slices"), [(2560, 4, 10), (131_072, 32, 128), (131_072, 128, 128), (9000, 3000, 3)]
)
async def test_the_loop_turns_between_slices(tokens: int, block_size_tokens: int, slices: int) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await hash_in_slices(range(tokens), block_size_tokens, "")
    counting.cancel()
    assert turns == slices
