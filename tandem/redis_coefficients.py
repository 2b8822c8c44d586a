"""Step-time coefficients in Redis: one entry per router, which runs out by itself.

Must not judge time by the clock of this machine: the server's ends the entries. One key below `tandem:<cluster>:`.
"""

from collections.abc import Sequence
from typing import cast

from tandem.redis_link import RedisLink
from tandem.step_coefficients import Coefficients, PoolCoefficients, coefficients_from_json, coefficients_to_json

COEFFICIENTS_KEY = "coefficients"
EXPIRY_S = 30.0  # a router writes again within a third of it

_PUBLISH = """
-- KEYS coefficients; ARGV router, ms until it expires, text
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', now_ms + ARGV[2]) .. ARGV[3])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""

_READ = """
-- KEYS coefficients; returns router and text of each that has not expired, by turns; drops the others
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local all, left = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  local expires_ms, text = string.match(all[i + 1], '^(%d+) (.*)$')
  if expires_ms and tonumber(expires_ms) <= now_ms then
    redis.call('HDEL', KEYS[1], all[i])
  else
    left[#left + 1] = all[i]
    left[#left + 1] = text or ''
  end
end
return left
"""


class RedisCoefficients:
    """Of one cluster. `timeout_s` bounds each call; `expiry_s` is EXPIRY_S but in tests. Raises ConfigError for a bad URL."""

    def __init__(self, url: str, cluster: str, *, timeout_s: float = 1.0, expiry_s: float = EXPIRY_S) -> None:
        self._link = RedisLink(url, timeout_s=timeout_s)
        self._key = f"tandem:{cluster}:{COEFFICIENTS_KEY}"
        self._expiry_ms = round(expiry_s * 1000)

    async def publish(self, router_id: str, pools: Sequence[PoolCoefficients]) -> None:
        """What that router has learnt, in place of what it published before. Raises UnavailableError."""
        await self._link.run(_PUBLISH, [self._key], [router_id, self._expiry_ms, coefficients_to_json(pools)])

    async def read_coefficients(self) -> Coefficients:
        """What all routers have learnt, entries that cannot be left out and counted. Raises UnavailableError."""
        reply = cast("list[str]", await self._link.run(_READ, [self._key]))
        texts = dict(zip(reply[::2], reply[1::2], strict=True))
        return coefficients_from_json(texts[router_id] for router_id in sorted(texts))

    async def close(self) -> None:
        """Closes connections."""
        await self._link.close()
