"""Block hashes are the engine's own recipe, and a namespace covers what they do not."""

import pytest

from kv_transfer.blocks import block_hashes, make_namespace

TOKENS = tuple(range(1, 21))
PARTS: dict[str, str | int] = {"model": "m", "dtype": "float32", "block_size_tokens": 4, "layers": 2}


def test_hashes_are_those_of_the_engine() -> None:
    # vLLM 0.32: hash_block_tokens(sha256_cbor, parent, tokens, extra_keys), chained over (1, 2, 3, 4), (5, 6, 7, 8).
    assert [block_hash.hex() for block_hash in block_hashes(TOKENS[:8], 4, cache_salt="tenant")] == [
        "bad43dbd2bcbb1ecd06a96c90984418cf236a558165eec30d09d81875e9506f6",
        "ccc2cf529e34b64de52bf06828a2bf80b7586934bffb27dffc3990daa43a6fc7",
    ]
    assert block_hashes(TOKENS[:4], 4)[0].hex() == "58d0879dff3800f65f8c5fd449d73048c0f7699dd238a03b84b146b151d55111"


def test_a_block_is_chained_to_all_tokens_before_it() -> None:
    whole = block_hashes(TOKENS, 4)
    for changed in range(len(TOKENS)):
        tokens = [*TOKENS]
        tokens[changed] += 100
        same = [one == other for one, other in zip(whole, block_hashes(tokens, 4), strict=True)]
        assert same == [block < changed // 4 for block in range(5)]


def test_a_continued_chain_equals_the_whole_one() -> None:
    whole = block_hashes(TOKENS, 4, cache_salt="tenant")
    for blocks in range(1, 6):
        assert block_hashes(TOKENS[4 * blocks :], 4, parent=whole[blocks - 1]) == whole[blocks:]


def test_the_salt_enters_block_zero_only() -> None:
    plain, salted = block_hashes(TOKENS, 4), block_hashes(TOKENS, 4, cache_salt="tenant")
    assert not set(plain) & set(salted)
    assert block_hashes(TOKENS[4:], 4, cache_salt="tenant", parent=plain[0]) == plain[1:]


@pytest.mark.parametrize("tokens", range(9))
def test_a_partial_block_is_ignored(tokens: int) -> None:
    assert block_hashes(TOKENS[:tokens], 4) == block_hashes(TOKENS, 4)[: tokens // 4]


def test_a_block_size_is_part_of_the_chain() -> None:
    assert block_hashes(TOKENS, 10)[0] != block_hashes(TOKENS, 5)[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_namespace_changes_with_every_part(part: str) -> None:
    without = {name: value for name, value in PARTS.items() if name != part}
    assert len({make_namespace(PARTS), make_namespace({**PARTS, part: "other"}), make_namespace(without)}) == 3


def test_a_namespace_does_not_depend_on_the_order_of_its_parts() -> None:
    assert make_namespace(PARTS) == make_namespace(dict(reversed(PARTS.items())))


def test_a_namespace_is_32_hex_digits() -> None:
    namespace = make_namespace(PARTS)
    assert len(bytes.fromhex(namespace)) == 16
    assert make_namespace({"model": "m", "block_size_tokens": 32}) == "64fe8bd94e0f4fa1ea61e3bdeb522c4e"
