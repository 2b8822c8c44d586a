"""Output lengths are predicted from the finest level that was seen often enough, calibrated, capped and bounded."""

from random import Random

import pytest

from router.output_length import LengthKey, OutputLengthConfig, OutputLengths, prompt_bin
from tandem.errors import ConfigError


def _key(session_id: str = "", prompt_tokens: int = 1000, tenant: str = "t", model: str = "m") -> LengthKey:
    return LengthKey(model, tenant, session_id, prompt_tokens)


def _length(rng: Random, prompt_tokens: int) -> int:
    """Long prompts have short answers; log-normal, as chats are."""
    return max(1, int(rng.lognormvariate(6.0 if prompt_tokens < 1000 else 4.5, 0.6)))


def _learnt(count: int, **config: float) -> OutputLengths:
    lengths, rng = OutputLengths(OutputLengthConfig(**config)), Random(1)  # type: ignore[arg-type]
    for _ in range(count):
        prompt_tokens = rng.choice((300, 5000))
        lengths.observe(_key(prompt_tokens=prompt_tokens), _length(rng, prompt_tokens))
    return lengths


def test_before_anything_is_seen_there_is_a_guess() -> None:
    estimate = OutputLengths().estimate(_key())
    assert estimate.p50_tokens == pytest.approx(128, rel=0.2)
    assert estimate.mean_tokens == pytest.approx(128, rel=0.2)


def test_nine_in_ten_outputs_are_no_longer_than_p90() -> None:
    lengths, rng, covered, count = OutputLengths(), Random(2), 0, 0
    for index in range(6000):
        prompt_tokens = rng.choice((300, 700, 5000, 20_000))
        session_id = rng.choice(("", f"s{rng.randrange(300)}"))
        actual = _length(rng, prompt_tokens)
        if index >= 500:
            covered += actual <= lengths.estimate(_key(session_id, prompt_tokens)).p90_tokens
            count += 1
        lengths.observe(_key(session_id, prompt_tokens), actual)
    assert 0.88 <= covered / count <= 0.92


def test_nine_in_ten_rests_are_no_longer_than_p90() -> None:
    lengths, rng, covered, count = _learnt(3000), Random(3), 0, 0
    for _ in range(4000):
        produced, actual = rng.randint(1, 500), _length(rng, 300)
        if actual > produced:
            covered += actual - produced <= lengths.estimate(_key(prompt_tokens=300), produced_tokens=produced).p90_tokens
            count += 1
    assert 0.87 <= covered / count <= 0.93


def test_a_model_says_nothing_of_another() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe(_key(), 2000)
    assert lengths.estimate(_key(model="other")) == OutputLengths().estimate(_key())
    assert lengths.estimate(_key(tenant="other")).mean_tokens == pytest.approx(2000, rel=0.1)


def test_sums_of_means_are_right() -> None:
    lengths, rng = _learnt(3000), Random(4)
    actual = [_length(rng, 300) for _ in range(3000)]
    assert lengths.estimate(_key(prompt_tokens=300)).mean_tokens == pytest.approx(sum(actual) / len(actual), rel=0.05)


def test_prompts_of_another_length_have_another_estimate() -> None:
    lengths = _learnt(500)
    assert lengths.estimate(_key(prompt_tokens=300)).p50_tokens > 2 * lengths.estimate(_key(prompt_tokens=5000)).p50_tokens


def test_a_new_tenant_starts_from_all_tenants() -> None:
    lengths = _learnt(2000)
    everybody = lengths.estimate(_key(tenant="new", prompt_tokens=100_000))
    assert everybody.mean_tokens == pytest.approx(lengths.estimate(_key(tenant="newer")).mean_tokens, rel=0.1)


def test_a_session_that_differs_from_its_tenant_is_learnt() -> None:
    lengths = _learnt(1000)
    before = lengths.estimate(_key("s", 300)).p50_tokens
    for _ in range(30):
        lengths.observe(_key("s", 300), 9)
    assert before > 200
    assert lengths.estimate(_key("s", 300)).p50_tokens == 9
    assert lengths.estimate(_key("", 300)).p50_tokens > 100


def test_one_outcome_does_not_decide_alone() -> None:
    lengths = _learnt(1000)
    lengths.observe(_key("s", 300), 9)
    assert lengths.estimate(_key("s", 300)).p50_tokens > 200


def test_models_and_tenants_learn_apart() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(_key(model="a"), 10)
        lengths.observe(_key(model="b"), 1000)
    assert lengths.estimate(_key(model="a")).p50_tokens == 10
    assert lengths.estimate(_key(model="b")).p50_tokens == pytest.approx(1000, rel=0.2)


def test_what_is_produced_is_taken_off() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(_key(), 100)
    rest = lengths.estimate(_key(), produced_tokens=50)
    assert rest.p50_tokens == pytest.approx(50, abs=10)


def test_an_output_longer_than_any_seen_goes_on_for_a_while() -> None:
    lengths = OutputLengths(OutputLengthConfig(first_guess_tokens=10))
    rest = lengths.estimate(_key(), produced_tokens=5000)
    assert 0 < rest.mean_tokens < rest.p90_tokens < 5000


def test_max_tokens_caps_everything() -> None:
    estimate = _learnt(1000).estimate(_key(prompt_tokens=300), max_tokens=20, produced_tokens=5)
    assert 0 < estimate.mean_tokens <= 15
    assert estimate.p50_tokens == estimate.p90_tokens == 15


def test_nothing_comes_after_max_tokens() -> None:
    lengths = _learnt(1000)
    assert lengths.estimate(_key(), max_tokens=20, produced_tokens=20) == (0.0, 0.0, 0.0)
    assert lengths.estimate(_key(), max_tokens=20, produced_tokens=25, expected_tokens=90) == (0.0, 0.0, 0.0)


def test_a_hint_is_believed_until_it_is_outlived() -> None:
    lengths = _learnt(1000)
    assert lengths.estimate(_key(prompt_tokens=300), expected_tokens=40) == (40.0, 40.0, 60.0)
    assert lengths.estimate(_key(prompt_tokens=300), expected_tokens=40, produced_tokens=30) == (10.0, 10.0, 30.0)
    assert lengths.estimate(_key(prompt_tokens=300), expected_tokens=40, max_tokens=50).p90_tokens == 50.0
    assert lengths.estimate(_key(prompt_tokens=300), expected_tokens=40, produced_tokens=40).p50_tokens > 100


def test_how_far_hints_are_exceeded_is_learnt() -> None:
    lengths = OutputLengths()
    for _ in range(50):
        lengths.observe(_key(), 300, expected_tokens=100)
    assert lengths.estimate(_key(), expected_tokens=100).p90_tokens == pytest.approx(300)


def test_keys_are_bounded() -> None:
    lengths = OutputLengths(OutputLengthConfig(max_sessions=5, max_bins=6, max_tenants=7))
    for index in range(200):
        lengths.observe(_key(f"s{index}", 2 ** (index % 20), tenant=f"t{index}"), 10)
    assert lengths.keys == 5 + 6 + 7 + 1


def test_bins_are_half_octaves() -> None:
    bins = [prompt_bin(tokens) for tokens in (0, 1, 2, 3, 4, 6, 8, 11, 12, 16, 1024, 1449)]
    assert bins == sorted(bins)
    assert prompt_bin(1025) == prompt_bin(1440) != prompt_bin(1460) == prompt_bin(2047)
    assert prompt_bin(2**30) > prompt_bin(2**29)


@pytest.mark.parametrize(
    "wrong",
    [
        OutputLengthConfig(max_sessions=0),
        OutputLengthConfig(buckets=4),
        OutputLengthConfig(max_output_tokens=100),
        OutputLengthConfig(decay=0.0),
        OutputLengthConfig(shrinkage_requests=0.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: OutputLengthConfig) -> None:
    with pytest.raises(ConfigError):
        wrong.validate()


def test_the_defaults_are_valid() -> None:
    OutputLengthConfig().validate()
