"""Whatever happens to a recorded core, a fresh one answers the same events with the same instructions."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from router.config import RouterConfig
from router.core import RouterCore
from tandem.domain import ModelId, ReplicaId
from tandem.step_sample import StepSample
from tests.event_logs import Recording
from tests.property.test_router_core_events import REPLICAS, M, N, RouterEvents


class RecordedEvents(RouterEvents):
    def make_core(self, config: RouterConfig) -> RouterCore:
        self.recording = Recording(config)
        return self.recording.core

    def predictions_are_wrong(self) -> None:
        """Not by the core's events, so not in a log."""

    @rule(replica=st.sampled_from(REPLICAS), tokens=st.integers(0, 500), requests=st.integers(0, 9), seconds=st.floats(1e-4, 0.5))
    def steps(self, replica: tuple[str, object], tokens: int, requests: int, seconds: float) -> None:
        name = replica[0]
        sample = StepSample(
            prefill_tokens=tokens, prefill_pairs=tokens * tokens // 2, decode_requests=requests, kv_tokens=requests * 50, duration_s=seconds
        )
        self.core.steps(ReplicaId(name), self.up.get(name, 1), [sample] * 20, self.now_s)

    @rule(model=st.sampled_from((M, N, ModelId("x"), None)))
    def asked(self, model: ModelId | None) -> None:
        self.core.retry_after_s(model, self.now_s)
        self.core.replicas(self.now_s)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        super().teardown()
        with tempfile.TemporaryDirectory() as folder:
            found = self.recording.replayed(Path(folder))
        assert found.difference is None
        assert found.events == len(self.recording.kept.records)


RecordedEvents.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestRecordedEvents = RecordedEvents.TestCase
