"""The fit learns from measurements, stays positive, and follows a change."""

from random import Random

import pytest

from tandem.least_squares import LeastSquares, solve_non_negative


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


def test_a_load_that_never_changes_does_not_wash_out_what_was_learnt() -> None:
    rng = Random(5)
    fit = LeastSquares((1e-2, 1e-4))
    for _ in range(100):
        tokens = rng.randint(1, 4000)
        fit.observe((1.0, tokens), 3e-3 + 2e-5 * tokens)
    for _ in range(5000):
        fit.observe((1.0, 500), 13e-3 * rng.uniform(0.97, 1.03))
    assert fit.predict((1.0, 4000)) == pytest.approx(3e-3 + 2e-5 * 4000, rel=0.1)


def test_the_solver_leaves_at_zero_what_would_be_negative() -> None:
    # Unbounded: x = (1.5, -0.5).
    assert solve_non_negative([[2.0, 1.0], [1.0, 2.0]], [2.5, 0.5], [0.0, 0.0], 1e-9) == pytest.approx([1.25, 0.0])


def test_the_solver_takes_back_a_variable_that_it_put_to_zero_too_soon() -> None:
    gram = [[10.0, 9.0, 1.0], [9.0, 10.0, 8.0], [1.0, 8.0, 10.0]]
    moment = [1.0, 4.0, 8.0]
    found = solve_non_negative(gram, moment, [0.0] * 3, 1e-9)
    gradient = [m - sum(g * x for g, x in zip(row, found, strict=True)) for row, m in zip(gram, moment, strict=True)]
    assert all(x >= 0.0 and slope <= 1e-6 and abs(x * slope) <= 1e-6 for x, slope in zip(found, gradient, strict=True))


def test_what_no_data_determines_stays() -> None:
    assert solve_non_negative([[4.0, 0.0], [0.0, 0.0]], [8.0, 0.0], [1.0, 7.0], 1e-9) == pytest.approx([2.0, 7.0])
