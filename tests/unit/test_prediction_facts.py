"""What a router exports of its predictions."""

from prometheus_client import CollectorRegistry

from router.prediction_facts import prediction_facts
from tandem.domain import Receipt, ReplicaId, RequestId
from tandem.step_sample import StepSample
from tandem.telemetry import PredictionCollector
from tests.core_talk import make_core, only_dispatch, submit


def test_the_exported_error_is_the_error_of_the_log_of_outcomes() -> None:
    core = make_core()
    registry = CollectorRegistry()
    registry.register(PredictionCollector(lambda: prediction_facts(core.predictor)))
    log = []
    for number, ttft_s in enumerate((0.5, 0.02, 0.3)):
        plan = only_dispatch(submit(core, f"r{number}")).plan
        predicted = {term.name: term.predicted for term in plan.predicted}
        log.append((predicted["ttft_s"], predicted["ttft_q90_s"], ttft_s))
        receipt = Receipt(request_id=RequestId(f"r{number}"), prefill_s=ttft_s, ttft_s=ttft_s, e2e_s=1.0, output_tokens=5)
        core.finished(RequestId(f"r{number}"), 1, receipt, float(number))
    labels = {"kind": "ttft", "model": "m"}
    errors = [abs(mean - actual) / actual for mean, _, actual in log]
    covered = [actual <= q90 for _, q90, actual in log]
    assert registry.get_sample_value("tandem_router_prediction_error_fraction", labels) == sum(errors) / 3
    assert registry.get_sample_value("tandem_router_prediction_q90_coverage_fraction", labels) == sum(covered) / 3
    assert registry.get_sample_value("tandem_router_prediction_outcomes", labels) == 3.0
    assert registry.get_sample_value("tandem_router_predictions_are_trusted", {"model": "m"}) == 1.0


def test_step_times_are_exported_by_pool() -> None:
    core = make_core()
    step = StepSample(prefill_tokens=64, prefill_pairs=2048, decode_requests=0, kv_tokens=0, duration_s=0.01)
    core.steps(ReplicaId("prefill-0"), 1, [step] * 40, 0.0)
    facts = {(name, labels): value for name, labels, value in prediction_facts(core.predictor)}
    assert facts["straggler_replicas", ("m", "cpu", "prefill")] == 0.0
    assert facts["step_time_coefficient_seconds", ("m", "cpu", "prefill", "base")] >= 0.0
