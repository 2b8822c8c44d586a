"""Step times are learnt from measurements, stay positive, and follow a change."""

from random import Random

import pytest

from tandem.steptime import DecodeTime, LeastSquares, PrefillTime


def test_prediction_starts_at_the_prior() -> None:
    fit = LeastSquares((1.0, 0.5))
    assert fit.coefficients == (1.0, 0.5)
    assert fit.predict((1.0, 4.0)) == pytest.approx(3.0)


def test_exact_measurements_are_recovered() -> None:
    rng = Random(1)
    fit = LeastSquares((1e-2, 1e-4))
    for _ in range(400):
        tokens = rng.randint(1, 4000)
        fit.observe((1.0, tokens), 3e-3 + 2e-5 * tokens)
    for tokens in (10, 500, 4000):
        assert fit.predict((1.0, tokens)) == pytest.approx(3e-3 + 2e-5 * tokens, rel=0.02)


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_a_prior_that_is_far_off_is_left_behind_within_tens_of_measurements(factor: float) -> None:
    rng = Random(2)
    fit = LeastSquares((1e-2 * factor, 1e-4 * factor))
    for _ in range(60):
        tokens = rng.randint(100, 4000)
        fit.observe((1.0, tokens), 1e-2 + 1e-4 * tokens)
    assert fit.predict((1.0, 2000)) == pytest.approx(1e-2 + 1e-4 * 2000, rel=0.1)


def test_coefficients_never_go_below_zero() -> None:
    fit = LeastSquares((1e-2, 1e-4))
    for tokens in (100, 1000, 100, 1000, 100, 1000):
        fit.observe((1.0, tokens), 1.0 / tokens)  # falls with the tokens
        assert min(fit.coefficients) >= 0.0
        assert fit.predict((1.0, 5000)) >= 0.0


def test_a_change_is_followed() -> None:
    rng = Random(3)
    fit = LeastSquares((1e-2, 1e-4))
    for slope in (1e-4, 3e-4):
        for _ in range(300):
            tokens = rng.randint(100, 2000)
            fit.observe((1.0, tokens), slope * tokens * rng.uniform(0.95, 1.05))
    assert fit.predict((1.0, 1000)) == pytest.approx(0.3, rel=0.05)


def test_a_time_of_zero_does_not_break_the_fit() -> None:
    fit = LeastSquares((1e-2,))
    fit.observe((1.0,), 0.0)
    assert 0.0 <= fit.predict((1.0,)) < 1e-2


def test_prefill_time_is_learnt_from_prompts_that_waited() -> None:
    rng = Random(4)
    prefill = PrefillTime()
    for _ in range(400):
        tokens, ahead = rng.randint(1, 2000), rng.choice((0, 0, 500, 3000))
        prefill.observe(tokens, tokens, ahead, 0.01 + 3e-5 * (tokens + ahead))
    assert prefill.predict_s(1000, 1000) == pytest.approx(0.04, rel=0.1)
    assert prefill.backlog_s(2000) == pytest.approx(0.06, rel=0.1)
    assert prefill.backlog_s(0) == 0.0


def test_decode_time_grows_with_batch_and_kv() -> None:
    rng = Random(5)
    decode = DecodeTime()
    for _ in range(400):
        batch, kv_tokens = rng.randint(1, 64), rng.randint(100, 60_000)
        decode.observe(batch, kv_tokens, 0.002 + 1e-4 * batch + 5e-8 * kv_tokens)
    assert decode.predict_s(32, 30_000) == pytest.approx(0.0067, rel=0.05)
    assert decode.predict_s(64, 30_000) > decode.predict_s(1, 30_000)
