"""The predictor answers in seconds, per model, and learns."""

import pytest

from router.predict import Predictor
from tandem.domain import ModelId

MODEL, OTHER = ModelId("m"), ModelId("other")


def test_models_learn_apart() -> None:
    predictor = Predictor()
    before_s = predictor.prefill_s(OTHER, uncached_tokens=500, context_tokens=500)
    for _ in range(50):
        predictor.observe_prefill(MODEL, uncached_tokens=500, context_tokens=500, ahead_tokens=0, measured_s=2.0)
        predictor.observe_decode(MODEL, batch_requests=4, kv_tokens=2000, measured_s=0.5)
    assert predictor.prefill_s(MODEL, uncached_tokens=500, context_tokens=500) == pytest.approx(2.0, rel=0.05)
    assert predictor.tpot_s(MODEL, batch_requests=4, kv_tokens=2000) == pytest.approx(0.5, rel=0.05)
    assert predictor.prefill_s(OTHER, uncached_tokens=500, context_tokens=500) == before_s


def test_backlog_grows_with_the_tokens_ahead() -> None:
    predictor = Predictor()
    assert predictor.backlog_s(MODEL, 0) == 0.0
    assert predictor.backlog_s(MODEL, 2000) == pytest.approx(2 * predictor.backlog_s(MODEL, 1000))


def test_wait_is_the_queue_over_the_rate_of_free_slots() -> None:
    predictor = Predictor()
    for _ in range(400):
        predictor.observe_request(4.0)
    assert predictor.wait_s(0, 8) == 0.0
    assert predictor.wait_s(16, 8) == pytest.approx(8.0, rel=0.01)
    assert predictor.retry_after_s(16, 8) == pytest.approx(8.0, rel=0.01)


def test_a_refused_caller_is_never_told_to_come_back_at_once() -> None:
    assert Predictor().retry_after_s(0, 8) == 0.1
