"""The Lua scripts of the register: each one is one atomic step in the server, judged by the server's clock.

Must not know Python values: keys and arguments are listed at the top of each script. They run on Redis 5 and later and on Valkey.
Lists of members come from an index set; KEYS and SCAN would walk a server that others share.
"""

# Whole numbers are compared as text: a Lua number is exact to 53 bits, and an incarnation may be a time in nanoseconds.
_OLDER = """
local function older(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
"""

RENEW = f"""
-- KEYS lease, index, fence, generation; ARGV name, incarnation, member, lease ms, fence ms, generation if none, channel
-- returns 1, or 0 where a newer incarnation was here; the fence outlives the lease
{_OLDER}
local newest = redis.call('GET', KEYS[3])
if newest and older(ARGV[2], newest) then return 0 end
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[5])
redis.call('SET', KEYS[4], ARGV[6], 'NX')
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
if before ~= ARGV[3] then redis.call('PUBLISH', ARGV[7], 'member') end
return 1
"""

LEAVE = """
-- KEYS lease, index, fence; ARGV name, incarnation, channel
if redis.call('GET', KEYS[3]) ~= ARGV[2] then return 0 end
redis.call('SREM', KEYS[2], ARGV[1])
if redis.call('DEL', KEYS[1]) == 1 then redis.call('PUBLISH', ARGV[3], 'member') end
return 1
"""

SNAPSHOT = """
-- KEYS index, generation, published; ARGV prefix of leases, generation if none
-- returns generation, published or false, members; O(members), takes those that ran out from the index
redis.call('SET', KEYS[2], ARGV[2], 'NX')
local members = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local member = redis.call('GET', ARGV[1] .. name)
  if member then members[#members + 1] = member else redis.call('SREM', KEYS[1], name) end
end
return {redis.call('GET', KEYS[2]), redis.call('GET', KEYS[3]), members}
"""

LEAD = """
-- KEYS leader, epoch; ARGV candidate, lease ms
-- returns the epoch as text, or false where another one leads
-- a new epoch is at least the time: it also grows over a server that was restarted empty
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then return false end
local epoch = redis.call('GET', KEYS[2])
if not (leader and epoch) then
  local now = redis.call('TIME')
  local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
  epoch = string.format('%.0f', math.max(redis.call('INCR', KEYS[2]), now_ms))
  redis.call('SET', KEYS[2], epoch)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return epoch
"""

RESIGN = """
-- KEYS leader; ARGV candidate
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

PUBLISH = f"""
-- KEYS published, epoch; ARGV epoch, text, channel
-- returns 1, or 0 where there is a newer leader
{_OLDER}
local newest = redis.call('GET', KEYS[2])
if newest and older(ARGV[1], newest) then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
if redis.call('GET', KEYS[1]) ~= ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[2])
  redis.call('PUBLISH', ARGV[3], 'published')
end
return 1
"""

SET_MANUAL_TARGETS = """
-- KEYS manual targets; ARGV channel, then per target: field, replicas, ms until it expires (0: never)
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
for i = 2, #ARGV, 3 do
  local field, replicas, expires_in_ms = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  if replicas < 0 then
    redis.call('HDEL', KEYS[1], field)
  else
    local expires_ms = expires_in_ms > 0 and now_ms + expires_in_ms or 0
    redis.call('HSET', KEYS[1], field, string.format('%.0f %.0f', replicas, expires_ms))
  end
end
redis.call('PUBLISH', ARGV[1], 'manual')
return 1
"""

MANUAL_TARGETS = """
-- KEYS manual targets; returns per target: field, replicas, ms left (0: it stays), as text; drops those that expired
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local all, left = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  local replicas, expires_ms = string.match(all[i + 1], '^(%d+) (%d+)$')
  local stays = expires_ms == '0'
  local left_ms = stays and 0 or tonumber(expires_ms) - now_ms
  if left_ms <= 0 and not stays then
    redis.call('HDEL', KEYS[1], all[i])
  else
    left[#left + 1] = {all[i], replicas, string.format('%.0f', left_ms)}
  end
end
return left
"""

NUDGE = """
-- ARGV channel
return redis.call('PUBLISH', ARGV[1], 'nudge')
"""

# What a server that refuses to be written (a read-only copy, a user without rights) fails at once.
WRITE_CHECK = """
-- KEYS any key of ours
return redis.call('SET', KEYS[1], '1', 'PX', '1000')
"""

ERASE = """
-- KEYS index, generation, published, leader, epoch, manual targets, coefficients; ARGV prefix of leases, prefix of fences
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do redis.call('DEL', ARGV[1] .. name, ARGV[2] .. name) end
return redis.call('DEL', unpack(KEYS))
"""
