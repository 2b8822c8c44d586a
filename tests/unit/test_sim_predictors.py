"""A predictor that errs, and one that knows."""

from random import Random
from statistics import fmean, median

import pytest

from router.pool_times import PoolKey
from router.predict import EngineWork, LoadPredictor
from tandem.domain import Role
from tandem.sim.engine_profile import H200_LLAMA_8B_FP8
from tandem.sim.predictors import NoisyPredictor, TrueModel

PREFILL, DECODE = PoolKey("m", "gpu", Role.PREFILL), PoolKey("m", "gpu", Role.DECODE)
WORK = EngineWork(chunk_tokens=8192)


def prefill_s(predictor: LoadPredictor) -> float:
    return predictor.prefill_s(PREFILL, "r", WORK, uncached_tokens=12_000, cached_tokens=3_000)


def tpot_s(predictor: LoadPredictor) -> float:
    return predictor.tpot_s(DECODE, "r", WORK._replace(decode_requests=10, kv_tokens=100_000), output_tokens=1)


def test_the_true_model_says_what_the_engine_does() -> None:
    model = TrueModel(H200_LLAMA_8B_FP8)
    assert prefill_s(model) == pytest.approx(H200_LLAMA_8B_FP8.prefill_s(12_000, 3_000))
    assert tpot_s(model) == pytest.approx(H200_LLAMA_8B_FP8.decode_s(1, 10, 100_000))
    assert model.pools.bias(PREFILL, "r") == 1.0


def test_noise_is_drawn_anew_each_time_with_the_learnt_value_as_its_median() -> None:
    noisy, learnt = NoisyPredictor(0.5, Random(0)), LoadPredictor()
    for predict_s in (prefill_s, tpot_s):
        factors = [predict_s(noisy) / predict_s(learnt) for _ in range(2000)]
        assert median(factors) == pytest.approx(1.0, rel=0.05)
        assert fmean(factor > 1.65 for factor in factors) == pytest.approx(0.16, abs=0.03)  # exp(0.5): one sigma
