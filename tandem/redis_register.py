"""The register in Redis: leases, the leader's lock, its word to routers, manual targets, hints of changes.

Must not judge a lease by the clock of this machine: the server's clock alone decides. One small set of keys below `tandem:<cluster>:`.
"""

import asyncio
import json
import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TypeVar, cast

from tandem import redis_scripts as scripts
from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import ConfigError, InvalidRequestError, PreconditionError, ProtocolError, Reason, UnavailableError
from tandem.membership import LEASE_S, Member, ServedModel, Snapshot, member_from_json
from tandem.redis_coefficients import COEFFICIENTS_KEY
from tandem.redis_link import COALESCE_S, RedisLink

FENCE_S = 3600.0  # how long an older incarnation is refused after the last renewal: longer than any process hangs unseen
PAUSE_S = 0.25  # between two attempts to reach a lost server, or the poll interval where that is shorter

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RedisRegister:
    """`tandem.membership.Register` in one Redis database, which other clusters and other users may share.

    `timeout_s` bounds every call. `lease_s` is LEASE_S but in tests. Raises ConfigError where `url` or `cluster` is none.
    """

    def __init__(self, url: str, cluster: str, *, timeout_s: float = 1.0, lease_s: float = LEASE_S) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", cluster):
            raise ConfigError(f"the cluster id is {cluster!r}; expected 1 to 64 of letters, digits, '.', '_' and '-'")
        self._link = RedisLink(url, timeout_s=timeout_s)
        self._prefix = f"tandem:{cluster}:"
        self._lease_ms = round(lease_s * 1000)
        self._members: dict[str, Member] = {}  # of the last snapshot: reading 200 again at each poll would hold the loop for 2.5 ms
        self._is_unreadable_logged = False

    async def renew(self, member: Member) -> None:
        """Takes or extends the member's lease; raises PreconditionError (STALE_INCARNATION) where a newer incarnation was here."""
        name = _name(member)
        is_renewed = await self._link.run(
            scripts.RENEW,
            self._keys(f"lease:{name}", "members", f"fence:{name}", "generation"),
            [name, member.incarnation, member.to_json(), self._lease_ms, round(FENCE_S * 1000), _generation(), self._key("changes")],
        )
        if not is_renewed:
            raise PreconditionError(
                f"a newer incarnation of {name} is registered, {member.incarnation} is refused", reason=Reason.STALE_INCARNATION
            )

    async def leave(self, member: Member) -> None:
        """Gives the lease back; nothing where it is another incarnation's."""
        name = _name(member)
        keys = self._keys(f"lease:{name}", "members", f"fence:{name}")
        await self._link.run(scripts.LEAVE, keys, [name, member.incarnation, self._key("changes")])

    async def snapshot(self) -> Snapshot:
        """All leases that have not run out, by kind and id; one call to the server. What cannot be read is left out and logged once."""
        reply = await self._link.run(
            scripts.SNAPSHOT, self._keys("members", "generation", "published"), [self._key("lease:"), _generation()]
        )
        generation, published, texts = cast(tuple[str, str | None, list[str]], reply)
        read = ((text, self._members.get(text) or self._try_read(member_from_json, text)) for text in texts)
        self._members = {text: member for text, member in read if member is not None}
        models, targets = (published and self._try_read(_published_from_json, published)) or ((), ())
        return Snapshot(
            generation=generation,
            members=tuple(sorted(self._members.values(), key=lambda member: (member.kind, member.member_id))),
            models=models,
            targets=targets,
        )

    def snapshots(self, poll_s: float) -> AsyncGenerator[Snapshot, None]:
        """A snapshot now, soon after every change and at least each `poll_s`; nothing while the server is away."""
        return self._watch("changes", poll_s, self.snapshot)

    async def try_lead(self, candidate: str) -> int | None:
        """The leader's epoch where `candidate` is or becomes leader for the lease, else None. Each change of hands has a higher one."""
        epoch = await self._link.run(scripts.LEAD, self._keys("leader", "epoch"), [candidate, self._lease_ms])
        return None if epoch is None else int(cast(str, epoch))

    async def resign(self, candidate: str) -> None:
        """Gives leadership up at once; nothing where another one leads."""
        await self._link.run(scripts.RESIGN, self._keys("leader"), [candidate])

    async def publish(self, epoch: int, models: Sequence[ServedModel], targets: Sequence[ReplicaTarget]) -> None:
        """The leader's word to routers; raises PreconditionError (STALE_EPOCH) where there is a newer leader."""
        text = json.dumps({"models": [asdict(item) for item in models], "targets": [asdict(item) for item in targets]})
        if not await self._link.run(scripts.PUBLISH, self._keys("published", "epoch"), [epoch, text, self._key("changes")]):
            raise PreconditionError(f"there is a newer leader than that of epoch {epoch}", reason=Reason.STALE_EPOCH)

    async def set_manual_targets(self, targets: Sequence[ReplicaTarget]) -> None:
        """Replica counts set by hand, all at once, each until it expires (`expires_in_s` 0: until replaced); a negative count ends one.

        Raises InvalidRequestError where a time to expire is none.
        """
        arguments: list[str | int] = [self._key("nudges")]
        for target in targets:
            if not 0.0 <= target.expires_in_s < math.inf:
                raise InvalidRequestError("targets.expires_in_s", f"must be a number of seconds, 0 or more, got {target.expires_in_s}")
            arguments += [f"{target.role}:{target.model}", target.replicas, math.ceil(target.expires_in_s * 1000)]
        await self._link.run(scripts.SET_MANUAL_TARGETS, self._keys("manual"), arguments)

    async def manual_targets(self) -> tuple[ReplicaTarget, ...]:
        """Those that have not expired, with the time left; by model and role."""
        found = []
        for field, replicas, left_ms in cast(list[list[str]], await self._link.run(scripts.MANUAL_TARGETS, self._keys("manual"))):
            role, _, model = field.partition(":")
            left_s = int(left_ms) / 1000
            found.append(ReplicaTarget(model=ModelId(model), role=Role(role), replicas=int(replicas), expires_in_s=left_s))
        return tuple(sorted(found, key=lambda target: (target.model, target.role)))

    async def erase(self) -> None:
        """Removes everything of the cluster: before it starts and after it has ended, in a server that outlives it."""
        keys = self._keys("members", "generation", "published", "leader", "epoch", "manual", COEFFICIENTS_KEY)
        await self._link.run(scripts.ERASE, keys, [self._key("lease:"), self._key("fence:")])

    async def nudge(self) -> None:
        """Wakes the leader: there is demand."""
        await self._link.run(scripts.NUDGE, (), [self._key("nudges")])

    def nudges(self, poll_s: float) -> AsyncGenerator[None, None]:
        """An item now, soon after each nudge or change of manual targets (one for a burst), and at least each `poll_s`."""
        return self._watch("nudges", poll_s, self._link.ping)

    async def close(self) -> None:
        """Closes connections; leases run out by themselves."""
        await self._link.close()

    async def _watch(self, channel: str, poll_s: float, read: Callable[[], Awaitable[T]]) -> AsyncGenerator[T, None]:
        """What `read` gives now, soon after each hint, and at least each `poll_s`; nothing while the server is away."""
        is_lost = False
        while True:
            try:
                async with self._link.subscription(self._key(channel)) as hints:
                    while True:
                        value = await read()
                        if is_lost:
                            is_lost = False
                            logger.info("register_back channel=%s address=%s", channel, self._link.name)
                        yield value
                        await hints.wait(max(poll_s, COALESCE_S))
            except UnavailableError as error:
                if not is_lost:
                    is_lost = True
                    logger.warning("register_lost channel=%s address=%s error=%s", channel, self._link.name, error)
            await asyncio.sleep(max(min(poll_s, PAUSE_S), COALESCE_S))

    def _try_read(self, read: Callable[[str], T], text: str) -> T | None:
        """None for what only another version can have written: it must not blind this one to the rest."""
        try:
            return read(text)
        except ProtocolError as error:
            if not self._is_unreadable_logged:
                self._is_unreadable_logged = True
                logger.warning("register_entry_unreadable address=%s error=%s", self._link.name, error)
            return None

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _keys(self, *names: str) -> list[str]:
        return [self._key(name) for name in names]


def _name(member: Member) -> str:
    return f"{member.kind}:{member.member_id}"


def _generation() -> str:
    """Taken by the server where it has none, as after a restart without its data."""
    return secrets.token_hex(8)


def _published_from_json(text: str) -> tuple[tuple[ServedModel, ...], tuple[ReplicaTarget, ...]]:
    """Raises ProtocolError where a leader of ours did not write it. Keys of a newer version are passed over."""
    try:
        values = json.loads(text)
        models = [
            ServedModel(model=ModelId(item["model"]), is_held=bool(item["is_held"]), error=str(item.get("error", "")))
            for item in values["models"]
        ]
        targets = [
            ReplicaTarget(
                model=ModelId(item["model"]),
                role=Role(item["role"]),
                replicas=int(item["replicas"]),
                expires_in_s=float(item["expires_in_s"]),
            )
            for item in values["targets"]
        ]
        return tuple(models), tuple(targets)
    except (ValueError, TypeError, LookupError) as error:
        raise ProtocolError(f"the leader's word in the register cannot be read ({error})") from error
