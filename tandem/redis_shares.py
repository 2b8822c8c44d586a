"""What each router served its tenants, told to the others through Redis. One hash per cluster, a field per router's life.

Must not judge time by the clock of this machine: the server's says who has fallen silent.
"""

import json
from collections.abc import Mapping
from typing import cast

from tandem.redis_link import RedisLink

EXCHANGE = """
-- KEYS hash; ARGV name, text, milliseconds after which a router counts as gone
-- returns name, text of every other router that has told in time
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %s', now_ms, ARGV[2]))
redis.call('PEXPIRE', KEYS[1], 60000)
local found, answer = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #found, 2 do
  local at_ms, text = string.match(found[i + 1], '^(%d+) (.*)$')
  if not at_ms or now_ms - at_ms > tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[1], found[i])
  elseif found[i] ~= ARGV[1] then
    table.insert(answer, found[i])
    table.insert(answer, text)
  end
end
return answer
"""


class RedisShares:
    """The exchange of one cluster's routers; `name` is of one life of one router. Raises ConfigError for a bad URL."""

    def __init__(self, url: str, cluster: str, name: str, *, silence_s: float, timeout_s: float = 1.0) -> None:
        self._link = RedisLink(url, timeout_s=timeout_s)
        self._key = f"tandem:{cluster}:shares"
        self._name = name
        self._silence_ms = round(silence_s * 1000)

    async def exchange(self, told: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
        """Tells, and answers what the others told last, by name; what is no JSON object is left out. Raises UnavailableError."""
        arguments: list[str | int] = [self._name, json.dumps(told), self._silence_ms]
        flat = cast("list[str]", await self._link.run(EXCHANGE, [self._key], arguments))
        found: dict[str, Mapping[str, object]] = {}
        for name, text in zip(flat[::2], flat[1::2], strict=True):
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if isinstance(value, dict):
                found[name] = value
        return found

    async def close(self) -> None:
        """Closes connections."""
        await self._link.close()
