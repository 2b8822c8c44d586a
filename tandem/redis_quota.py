"""Quotas that several routers share, in Redis: one bucket per tenant and kind of token, from which routers lease slices.

Must not judge time by the clock of this machine: the server's fills the buckets. A bucket expires an hour after it has filled up unused.
"""

from collections.abc import Sequence
from typing import cast

from tandem.redis_link import RedisLink
from tandem.tenancy import BURST_S, SliceAsk

# A bucket that is not there begins with one second of its limit: nobody has seen its tenant idle, and a server that lost its memory is
# not to give everybody a burst. While less than half is left, one router gets at most its part of the rest: whoever asks first must not
# leave nothing for the others. What nobody takes stays and adds up, so that a router with all the traffic gets all of the limit.
LEASE = """
-- KEYS bucket ...; ARGV routers, then per bucket: tokens wanted (below 0: given back), tokens per s, burst (s)
-- returns tokens granted, per bucket; what is given back is answered as it was sent
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local routers, granted = tonumber(ARGV[1]), {}
for i, key in ipairs(KEYS) do
  local wanted, rate, burst_s = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  local room = math.max(1, rate * burst_s)
  local level = math.min(room, math.max(1, rate))
  local stored = redis.call('GET', key)
  if stored then
    local before, at_ms = string.match(stored, '^(%S+) (%S+)$')
    level = math.min(room, before + rate * math.max(0, now_ms - at_ms) / 1000)
  end
  local given = wanted
  if wanted > 0 then
    given = math.min(wanted, math.floor(level >= room / 2 and level or level / routers))
  end
  level = math.min(room, level - given)
  redis.call('SET', key, string.format('%.6f %.0f', level, now_ms), 'PX', math.ceil((room - level) / rate * 1000) + 3600000)
  granted[i] = given
end
return granted
"""


class RedisQuota:
    """The buckets of one cluster. `timeout_s` bounds each call; `burst_s` is BURST_S but in tests. Raises ConfigError for a bad URL."""

    def __init__(self, url: str, cluster: str, *, timeout_s: float = 1.0, burst_s: float = BURST_S) -> None:
        self._link = RedisLink(url, timeout_s=timeout_s)
        self._prefix = f"tandem:{cluster}:quota:"
        self._burst_s = burst_s

    async def lease(self, asks: Sequence[SliceAsk], routers: int) -> list[int]:
        """What is granted of each ask, in one step, while `routers` share the limits. Raises UnavailableError."""
        if not asks:
            await self._link.ping()
            return []
        keys = [f"{self._prefix}{ask.tenant}:{ask.kind}" for ask in asks]
        arguments: list[str | int] = [routers]
        for ask in asks:
            arguments += [ask.tokens, repr(ask.tokens_per_s), repr(self._burst_s)]
        return [int(tokens) for tokens in cast("list[int]", await self._link.run(LEASE, keys, arguments))]

    async def close(self) -> None:
        """Closes connections."""
        await self._link.close()
