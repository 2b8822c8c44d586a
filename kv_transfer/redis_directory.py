"""Which nodes hold which blocks, in the control Redis: hints that expire by themselves, and are checked by asking the node.

Knows no store: `announcer.py` says what this node holds.
"""

from collections.abc import Sequence

from tandem.domain import BlockHash, Namespace
from tandem.redis_link import RedisLink

_KEYS_PER_CALL = 500  # about 1 ms of the server's time
_NAME_BYTES = 12  # of a hash: a hint may be wrong once in a while

_ANNOUNCE = """
for _, key in ipairs(KEYS) do redis.call('SADD', key, ARGV[1]); redis.call('PEXPIRE', key, ARGV[2]) end
"""
_WITHDRAW = """
for _, key in ipairs(KEYS) do redis.call('SREM', key, ARGV[1]) end
"""
_HOLDERS = """
local found = {}
for index, key in ipairs(KEYS) do found[index] = table.concat(redis.call('SMEMBERS', key), ' ') end
return found
"""


class RedisDirectory:
    """The directory of one cluster. Every call ends within `timeout_s`, with UnavailableError where Redis does not answer."""

    def __init__(self, url: str, cluster: str, *, timeout_s: float = 0.5) -> None:
        self._link = RedisLink(url, timeout_s=timeout_s)
        self._prefix = f"tandem:{cluster}:holders:"

    async def announce(self, namespace: Namespace, hashes: Sequence[BlockHash], address: str, ttl_s: float) -> None:
        """The store service at `address` holds these blocks; forgotten after `ttl_s`."""
        for part in _parts(hashes):
            await self._link.run(_ANNOUNCE, self._keys(namespace, part), [address, int(1000 * ttl_s)])

    async def withdraw(self, namespace: Namespace, hashes: Sequence[BlockHash], address: str) -> None:
        """It does not any more."""
        for part in _parts(hashes):
            await self._link.run(_WITHDRAW, self._keys(namespace, part), [address])

    async def holders(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> list[frozenset[str]]:
        """Addresses of the store services that hold each block; of the leading ones until one is held by nobody."""
        found: list[frozenset[str]] = []
        for part in _parts(hashes):
            reply = await self._link.run(_HOLDERS, self._keys(namespace, part))
            assert isinstance(reply, list)
            found += [frozenset(str(addresses).split()) for addresses in reply]
            if not found[-1]:
                break
        return found

    async def close(self) -> None:
        """Closes the connections."""
        await self._link.close()

    def _keys(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> list[str]:
        return [f"{self._prefix}{namespace}:{block_hash[:_NAME_BYTES].hex()}" for block_hash in hashes]


def _parts(hashes: Sequence[BlockHash]) -> list[Sequence[BlockHash]]:
    return [hashes[start : start + _KEYS_PER_CALL] for start in range(0, len(hashes), _KEYS_PER_CALL)]
