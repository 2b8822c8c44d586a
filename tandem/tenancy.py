"""Who tenants are: their keys (hashes of them only), shares and limits, and whose key a caller gave.

Must not hold a key, or put one into a message. The words that routers and the quota server exchange stand here too.
"""

import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tandem.domain import DEFAULT_TENANT
from tandem.errors import AuthenticationError, ConfigError

MAX_TENANTS = 256  # each is a metric's label
MAX_KEYS = 512  # of all tenants: each call is compared with every one of them, in about 0.1 ms
BURST_S = 10.0  # seconds of its limit that a tenant may use at once, after as long without any use

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SCHEME = "bearer "


class TokenKind(StrEnum):
    """What a quota counts."""

    PROMPT = "prompt"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceAsk:
    """A router's wish for part of a quota; negative `tokens` are given back. `tokens_per_s` is the quota of all routers together."""

    tenant: str
    kind: TokenKind
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant. None is no limit; all limits are for all routers together."""

    name: str
    key_sha256: tuple[str, ...] = field(repr=False)  # in hexadecimal
    weight: float = 1.0  # of its fair share, while others want the same replicas
    prompt_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    max_running_requests: int | None = None  # admitted and not ended, each of several choices by itself
    is_operator: bool = False  # may scale and drain

    def tokens_per_s(self, kind: TokenKind) -> float | None:
        """Its limit of one kind of token."""
        per_minute = self.prompt_tokens_per_minute if kind is TokenKind.PROMPT else self.output_tokens_per_minute
        return None if per_minute is None else per_minute / 60.0

    def validate(self) -> None:
        """Raises ConfigError naming the key."""
        where = f"tenants.{self.name}"
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"tenants: the name {self.name!r} must have 1 to 64 letters, digits or . _ - and begin with none of these")
        if not self.key_sha256:
            raise ConfigError(f"{where} has no key: give keys, key_env or key_sha256")
        if not all(_HASH.fullmatch(digest) for digest in self.key_sha256):
            raise ConfigError(f"{where}.key_sha256 must have 64 small hexadecimal digits each")
        if not 0.0 < self.weight < math.inf:
            raise ConfigError(f"{where}.weight must be a number above 0, got {self.weight}")
        for key in ("prompt_tokens_per_minute", "output_tokens_per_minute", "max_running_requests"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{where}.{key} must be at least 1, got {value}; without it there is no limit")


def validate_tenants(tenants: Sequence[Tenant]) -> None:
    """Raises ConfigError where one is wrong, there are too many, or two share a key."""
    if len(tenants) > MAX_TENANTS:
        raise ConfigError(f"tenants: at most {MAX_TENANTS}, got {len(tenants)}")
    owners: dict[str, str] = {}
    for tenant in tenants:
        tenant.validate()
        for digest in tenant.key_sha256:
            if digest in owners:
                raise ConfigError(f"tenants.{tenant.name} has a key that tenants.{owners[digest]} has: each key names one tenant")
            owners[digest] = tenant.name
    if len(owners) > MAX_KEYS:
        raise ConfigError(f"tenants: at most {MAX_KEYS} keys in all, got {len(owners)}")


def hash_key(key: str) -> str:
    """What is kept of a key. Keys are long and random, so that a hash without salt tells nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """Whose key it is. Without tenants everybody is DEFAULT_TENANT, who may do everything."""

    def __init__(self, tenants: Sequence[Tenant] = ()) -> None:
        self._everybody = None if tenants else Tenant(name=DEFAULT_TENANT, key_sha256=(), is_operator=True)
        self._owners = [(digest, tenant) for tenant in tenants for digest in tenant.key_sha256]

    def owner(self, authorization: str | None) -> Tenant:
        """The tenant of "Bearer KEY"; raises AuthenticationError. Takes as long whichever key it is; O(keys)."""
        if self._everybody is not None:
            return self._everybody
        if not authorization or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise AuthenticationError("an API key is needed: send it as 'Authorization: Bearer KEY'")
        given, found = hash_key(authorization[len(_SCHEME) :].strip()), None
        for digest, tenant in self._owners:
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise AuthenticationError("the API key is not valid")
        return found
