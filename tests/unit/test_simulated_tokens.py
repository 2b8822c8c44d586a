"""Which token follows which."""

from collections import Counter
from collections.abc import Set

from tandem.engine.simulated_tokens import TokenDraws

WORDS = tuple(range(3, 103))
EOS = 0


def drawn(token_ids: tuple[int, ...], count: int, *, seed: int = 0, eos_fraction: float = 0.0, banned: Set[int] = frozenset()) -> list[int]:
    draws = TokenDraws(token_ids, seed=seed, words=WORDS, eos_token_id=EOS, eos_fraction=eos_fraction)
    return [draws.draw(banned) for _ in range(count)]


def test_a_run_that_goes_on_anywhere_draws_the_same_tokens() -> None:
    whole = drawn((1, 2, 3), 50, eos_fraction=0.1)
    for cut in (1, 17, 49):
        assert drawn((1, 2, 3, *whole[:cut]), 50 - cut, eos_fraction=0.1) == whole[cut:]


def test_every_token_before_counts_and_the_seed_does() -> None:
    assert drawn((1, 2, 3), 10) != drawn((2, 1, 3), 10)
    assert drawn((1, 2, 3), 10) != drawn((1, 2, 3), 10, seed=1)
    assert drawn((1, 2, 3), 10, seed=-1) == drawn((1, 2, 3), 10, seed=-1)


def test_tokens_are_words_and_all_of_them_come() -> None:
    counts = Counter(drawn((1,), 10_000))
    assert counts.keys() == set(WORDS)
    assert max(counts.values()) < 200


def test_the_end_comes_as_often_as_is_asked_for() -> None:
    assert 850 < drawn((1,), 10_000, eos_fraction=0.1).count(EOS) < 1150
    assert EOS not in drawn((1,), 10_000)
    assert set(drawn((1,), 10, eos_fraction=1.0)) == {EOS}


def test_banned_tokens_do_not_come() -> None:
    banned = {EOS, *WORDS[2:]}
    assert set(drawn((1,), 1000, eos_fraction=0.5, banned=banned)) == set(WORDS[:2])


def test_without_an_end_of_sequence_there_is_none() -> None:
    draws = TokenDraws((1,), seed=0, words=WORDS, eos_token_id=None, eos_fraction=1.0)
    assert all(draws.draw() in WORDS for _ in range(100))
