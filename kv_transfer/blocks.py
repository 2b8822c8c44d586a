"""Content addresses: the engine's own chained block hash, and the namespace that covers what the hash does not.

Must stay equal to vLLM's `sha256_cbor` recipe (vllm/v1/core/kv_cache_utils.py, `hash_block_tokens`); an integration test compares them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cbor2

from tandem.domain import BlockHash, Namespace

# vLLM derives the hash of "no parent" from this seed unless PYTHONHASHSEED is set.
_NO_PARENT_SEED = "vllm-none-hash"


def _digest(value: object) -> BlockHash:
    return BlockHash(hashlib.sha256(cbor2.dumps(value, canonical=True)).digest())


NO_PARENT = _digest(_NO_PARENT_SEED)


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Where one block's bytes live in any store: namespace and 32-byte hash."""

    namespace: Namespace
    block_hash: BlockHash


def block_hashes(
    token_ids: Sequence[int], block_size_tokens: int, cache_salt: str = "", parent: BlockHash | None = None
) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`, each chained to the one before; O(n), about 4 us a block of 32 tokens.

    `parent` continues a chain: `token_ids` then starts where that block ended, and the salt (which enters block 0 only) is not used.
    """
    hashes: list[BlockHash] = []
    extra: tuple[tuple[str, str], ...] | None = (("cache_salt", cache_salt),) if cache_salt and parent is None else None
    previous = NO_PARENT if parent is None else parent
    for start in range(0, len(token_ids) - block_size_tokens + 1, block_size_tokens):
        previous = _digest((previous, tuple(token_ids[start : start + block_size_tokens]), extra))
        extra = None
        hashes.append(previous)
    return hashes


def make_namespace(parts: Mapping[str, str | int]) -> Namespace:
    """Digest (32 hex digits) of all that decides a block's bytes besides its tokens.

    Model files, dtype, KV dtype, block size, layers, KV heads, head size, layout, tensor-parallel rank and size, engine version.
    """
    return Namespace(hashlib.sha256(cbor2.dumps(dict(parts), canonical=True)).hexdigest()[:32])
