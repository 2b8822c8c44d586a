"""Tenants as configuration has them: tables of a file with their keys, JSON with hashes alone for other processes.

Must not keep or print a key: each is hashed where it is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tandem.config_section import read_section
from tandem.errors import ConfigError
from tandem.tenancy import Tenant, hash_key, validate_tenants

TENANTS_VARIABLE = "TANDEM_TENANTS"  # in a router's environment: a command line would show it to all users
_MAX_KEY_CHARS = 512
_LISTS = ("keys", "key_sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """`[tenants.NAME]`. What it shares with `Tenant` goes by the same names."""

    keys: list[str] = field(default_factory=list, repr=False)
    key_env: str = field(default="", repr=False)  # the variable that holds a key
    key_sha256: list[str] = field(default_factory=list, repr=False)
    weight: float = 1.0
    prompt_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    max_running_requests: int | None = None
    is_operator: bool = False


def read_tenants(tables: object, where: str, environ: Mapping[str, str]) -> tuple[Tenant, ...]:
    """The tenants of `[tenants.NAME]` tables, by name. Raises ConfigError, whose words never hold a key."""
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{where}tenants must be tables: [tenants.NAME]")
    return tuple(_read_tenant(name, table, where, environ) for name, table in sorted(tables.items()))


def tenants_to_tables(tenants: Sequence[Tenant]) -> dict[str, dict[str, Any]]:
    """What `read_tenants` reads, with hashes of keys only."""
    tables = {tenant.name: asdict(tenant) for tenant in tenants}
    for table in tables.values():
        del table["name"]
        table["key_sha256"] = list(table["key_sha256"])
    return tables


def tenants_to_json(tenants: Sequence[Tenant]) -> str:
    """For a router's TENANTS_VARIABLE; "" for no tenants."""
    return json.dumps(tenants_to_tables(tenants)) if tenants else ""


def tenants_from_json(text: str) -> tuple[Tenant, ...]:
    """The tenants that `tenants_to_json` wrote. Raises ConfigError."""
    if not text:
        return ()
    try:
        tables = json.loads(text)
    except ValueError:  # its words may hold a key
        raise ConfigError(f"{TENANTS_VARIABLE} is not JSON") from None
    tenants = read_tenants(tables, f"{TENANTS_VARIABLE}: ", {})
    validate_tenants(tenants)
    return tenants


def _read_tenant(name: str, values: Mapping[str, Any], where: str, environ: Mapping[str, str]) -> Tenant:
    where = f"{where}tenants.{name}."
    for key in _LISTS:
        given = values.get(key, [])
        if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
            raise ConfigError(f"{where}{key} must be a list of texts")
    if not isinstance(values.get("key_env", ""), str):
        raise ConfigError(f"{where}key_env must be the name of a variable")
    table = read_section(_Table, values, where)
    digests = [*table.key_sha256, *(_hashed(key, f"{where}keys") for key in table.keys)]
    if table.key_env:
        if table.key_env not in environ:
            raise ConfigError(f"{where}key_env names a variable that the environment does not have")
        digests.append(_hashed(environ[table.key_env], f"{where}key_env"))
    shared = {item.name for item in fields(Tenant)} - {"name", "key_sha256"}
    return Tenant(name=name, key_sha256=tuple(dict.fromkeys(digests)), **{key: getattr(table, key) for key in shared})


def _hashed(key: str, where: str) -> str:
    """Raises ConfigError where the key could not travel in a header."""
    if not 0 < len(key) <= _MAX_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key has 1 to {_MAX_KEY_CHARS} printable ASCII characters and no space")
    return hash_key(key)
