"""Whose key it is, and which tenants make sense. No message may hold a key."""

from dataclasses import replace

import pytest

from tandem.errors import AuthenticationError, ConfigError
from tandem.tenancy import MAX_KEYS, MAX_TENANTS, KeyRing, Tenant, TokenKind, hash_key, validate_tenants

ALICE = Tenant(name="alice", key_sha256=(hash_key("sk-alice-1"), hash_key("sk-alice-2")), prompt_tokens_per_minute=600)
BOB = Tenant(name="bob", key_sha256=(hash_key("sk-bob"),), output_tokens_per_minute=60, is_operator=True)
RING = KeyRing((ALICE, BOB))


def test_without_tenants_everybody_is_the_default_one_and_an_operator() -> None:
    for authorization in (None, "", "Bearer anything"):
        owner = KeyRing().owner(authorization)
        assert (owner.name, owner.is_operator, owner.max_running_requests) == ("default", True, None)


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        ("Bearer sk-alice-1", "alice"),
        ("Bearer sk-alice-2", "alice"),
        ("Bearer sk-bob", "bob"),
        ("bearer sk-bob", "bob"),
        ("BEARER  sk-bob ", "bob"),
    ],
)
def test_each_key_names_its_tenant(authorization: str, name: str) -> None:
    assert RING.owner(authorization).name == name


@pytest.mark.parametrize("authorization", [None, "", "sk-bob", "Basic sk-bob", "Bearer"])
def test_a_call_without_a_key_is_told_how_to_send_one(authorization: str | None) -> None:
    with pytest.raises(AuthenticationError, match="Authorization: Bearer KEY"):
        RING.owner(authorization)


@pytest.mark.parametrize("key", ["", " ", "sk-bo", "sk-bobb", "SK-BOB", "sk-b\udcffb", "ключ", hash_key("sk-bob")])
def test_a_wrong_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        RING.owner(f"Bearer {key}")
    assert caught.value.message == "the API key is not valid"


def test_a_representation_shows_no_hash() -> None:
    assert hash_key("sk-bob") not in repr(BOB)


def test_a_limit_a_minute_is_a_rate_a_second() -> None:
    assert (ALICE.tokens_per_s(TokenKind.PROMPT), ALICE.tokens_per_s(TokenKind.OUTPUT)) == (10.0, None)
    assert (BOB.tokens_per_s(TokenKind.PROMPT), BOB.tokens_per_s(TokenKind.OUTPUT)) == (None, 1.0)


@pytest.mark.parametrize(
    ("tenant", "words"),
    [
        (replace(BOB, name=""), "the name '' must have"),
        (replace(BOB, name="a b"), "the name 'a b' must have"),
        (replace(BOB, name=".a"), "begin with none of these"),
        (replace(BOB, key_sha256=()), "tenants.bob has no key"),
        (replace(BOB, key_sha256=("sk-plain",)), "tenants.bob.key_sha256 must have 64"),
        (replace(BOB, weight=0.0), "tenants.bob.weight must be a number above 0, got 0.0"),
        (replace(BOB, weight=float("nan")), "tenants.bob.weight must be a number above 0"),
        (replace(BOB, weight=float("inf")), "tenants.bob.weight must be a number above 0"),
        (replace(BOB, prompt_tokens_per_minute=0), "tenants.bob.prompt_tokens_per_minute must be at least 1, got 0"),
        (replace(BOB, output_tokens_per_minute=-1), "tenants.bob.output_tokens_per_minute must be at least 1"),
        (replace(BOB, max_running_requests=0), "tenants.bob.max_running_requests must be at least 1"),
    ],
)
def test_a_tenant_that_makes_no_sense_is_refused_by_name(tenant: Tenant, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_tenants((ALICE, tenant))
    assert words in caught.value.message
    assert "sk-plain" not in caught.value.message


def test_two_tenants_never_share_a_key() -> None:
    with pytest.raises(ConfigError, match=r"tenants\.carol has a key that tenants\.bob has"):
        validate_tenants((ALICE, BOB, replace(BOB, name="carol")))


def test_tenants_and_keys_have_a_bound() -> None:
    validate_tenants((ALICE, BOB))
    many = [replace(BOB, name=f"t{number}", key_sha256=(hash_key(str(number)),)) for number in range(MAX_TENANTS + 1)]
    validate_tenants(many[:-1])
    with pytest.raises(ConfigError, match=f"at most {MAX_TENANTS}, got {MAX_TENANTS + 1}"):
        validate_tenants(many)
    keys = tuple(hash_key(str(number)) for number in range(MAX_KEYS + 1))
    with pytest.raises(ConfigError, match=f"at most {MAX_KEYS} keys"):
        validate_tenants((replace(BOB, key_sha256=keys),))
