"""Whole simulations with the live router's core: the same seed is the same run, everybody is served, disturbances disturb."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, Instruction
from tandem import cli
from tandem.errors import ConfigError
from tandem.sim.arrivals import arrivals_of, synthetic_rows
from tandem.sim.cluster import Cluster, ClusterPlan
from tandem.sim.run import Run, Scenario, Task, run_all, run_task
from tandem.sim.variants import SETTINGS, VARIANTS, chosen_settings, chosen_variants
from tests.event_logs import Recording


class Moving(RouterCore):
    """The core, and how often it had a request go on elsewhere."""

    moved = 0

    def tick(self, now_s: float) -> list[Instruction]:
        instructions = super().tick(now_s)
        self.moved += sum(isinstance(instruction, Abandon) for instruction in instructions)
        return instructions


ROWS = synthetic_rows(150, seed=0)
SMALL = Scenario(prefill_replicas=3, decode_replicas=2)


def run(variant: str = "predicted_ttft", setting: str = "local", scenario: Scenario = SMALL, seed: int = 0) -> Run:
    return run_task(ROWS, Task(scenario=scenario, setting=SETTINGS[setting], variant=VARIANTS[variant], seed=seed))


def test_the_same_seed_has_the_same_event_log_and_another_seed_another() -> None:
    assert run() == run()
    assert run().digest != run(seed=1).digest


def test_two_processes_answer_as_one_does() -> None:
    tasks = [Task(scenario=SMALL, setting=SETTINGS["global"], variant=VARIANTS["random"], seed=seed) for seed in (0, 1)]
    seen: list[Run] = []
    runs = run_all(ROWS, tasks, processes=2, on_done=seen.append)
    assert runs == run_all(ROWS, tasks, processes=1, on_done=lambda run: None)
    assert len(seen) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_serves_every_request_within_the_bounds(variant: str) -> None:
    found = run(variant, "global")
    assert found.rejected_requests == 0
    assert found.figures.hit_fraction <= found.ideal_hit_fraction + 1e-9
    assert found.figures.ttft_mean_s >= run("infinite_capacity").figures.ttft_mean_s * 0.97  # step noise


def test_a_store_finds_more_than_caches_of_one_replica_each() -> None:
    assert run("random", "global").figures.hit_fraction > 1.2 * run("random", "local").figures.hit_fraction


@pytest.mark.parametrize(
    "disturbed",
    [
        replace(SMALL, report_delay_s=0.5),
        replace(SMALL, predictor_noise=0.5),
        replace(SMALL, slow_replica=2.0),
        replace(SMALL, slow_fleet=2.0),
        replace(SMALL, load=0.4),
    ],
    ids=["late_reports", "noise", "slow_replica", "slow_fleet", "load"],
)
def test_a_disturbance_changes_the_run_and_loses_nobody(disturbed: Scenario) -> None:
    found = run(scenario=disturbed)
    assert found.digest != run().digest
    assert found.rejected_requests == 0


def test_a_slower_fleet_has_longer_times() -> None:
    assert run(scenario=replace(SMALL, slow_fleet=2.0)).figures.ttft_mean_s > run().figures.ttft_mean_s


def test_a_slow_replica_is_named_and_a_slow_fleet_is_not() -> None:
    rows = synthetic_rows(1500, seed=0)
    for scenario, names in ((replace(SMALL, slow_replica=2.0), {"prefill-0000"}), (replace(SMALL, slow_fleet=2.0), set())):
        found = run_task(rows, Task(scenario=scenario, setting=SETTINGS["local"], variant=VARIANTS["predicted_ttft"], seed=0))
        assert {one.replica_id for one in found.stragglers} == names
        assert all(0.0 < one.after_s < 30.0 for one in found.stragglers)


def test_a_store_that_is_reached_over_the_link_spares_prefill() -> None:
    known, blind = run("predicted_ttft", "global"), run("predicted_ttft_blind_to_store", "global")
    assert known.digest != blind.digest
    assert known.figures.hit_fraction >= 0.95 * known.ideal_hit_fraction


def test_requests_that_the_core_moves_go_on_elsewhere_with_what_they_have() -> None:
    plan = ClusterPlan(profile=SMALL.profile, prefill_replicas=2, decode_replicas=3, local_tokens=1 << 20, store_tokens=None)
    config = RouterConfig(rebalance_gap_fraction=1e-6, rebalance_after_s=0.0)
    arrivals = arrivals_of(ROWS, profile=SMALL.profile, prefill_replicas=2, load=2.0, seed=0)
    core = Moving(config, Random(0))
    cluster = Cluster(plan, core, arrivals, 0)
    cluster.run()
    assert core.moved > 0
    assert all(outcome.end_s is not None and not outcome.is_rejected for outcome in cluster.outcomes.values())
    assert core.running_requests == core.queued_requests == 0


@pytest.mark.parametrize("policy", ["predicted_ttft", "random", "power_of_two"])
def test_a_recorded_run_replays_to_the_same_decisions(policy: str, tmp_path: Path) -> None:
    """The richest stories there are: steps, caches, a store, thousands of events; a slow fleet costs the predictions their trust."""
    plan = ClusterPlan(
        profile=SMALL.profile, prefill_replicas=3, decode_replicas=2, local_tokens=50_000, store_tokens=200_000, slow_fleet=4.0
    )
    recording = Recording(RouterConfig(policy=policy, max_running_requests=10_000, max_queued_requests=10_000))
    arrivals = arrivals_of(ROWS, profile=plan.profile, prefill_replicas=3, load=0.9, seed=0)
    Cluster(plan, recording.core, arrivals, 0).run()
    found = recording.replayed(tmp_path)
    assert found.difference is None
    assert found.events == len(recording.kept.records) > 1000


def test_the_load_is_the_utilisation_that_random_routing_without_hits_would_have() -> None:
    found = arrivals_of(ROWS, profile=SMALL.profile, prefill_replicas=3, load=0.85, seed=0)
    work_s = sum(SMALL.profile.prefill_s(arrival.prompt_tokens) for arrival in found)
    assert work_s / (3 * found[-1].time_s) == pytest.approx(0.85, rel=0.05)


def test_unknown_names_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"--policy: there is no 'best'; there are: predicted_ttft, lmetric, .*infinite_capacity"):
        chosen_variants(["best"])
    with pytest.raises(ConfigError, match="--setting: there is no 'remote'; there are: local, global"):
        chosen_settings(["remote"])


def simulate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", "--processes", "1", *arguments])
    return int(ended.value.code or 0)


def test_the_command_prints_tables_and_writes_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    chosen = ("--policy", "predicted_ttft", "--policy", "join_shortest_work", "--policy", "predicted_ttft_blind_to_store")
    assert simulate("--seeds", "2", "--requests", "60", *chosen, "--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert (found["schema"], found["default_policy"]) == ("tandem.simulate/1", "predicted_ttft")
    assert [setting["setting"] for setting in found["settings"]] == ["local", "global"]
    assert [len(setting["policies"]) for setting in found["settings"]] == [2, 3]
    ours = found["settings"][0]["policies"][0]
    low, high = ours["ci95"]["ttft_mean_s"]
    assert ours["kind"] == "ours"
    assert low <= ours["ttft_mean_s"] <= high
    assert len(ours["stragglers"]) == len(ours["trust_changes"]) == 2  # of each seed
    assert "join_shortest_work" in capsys.readouterr().out


def test_tuning_names_every_point_of_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.json"
    assert simulate("--tune", "--seeds", "1", "--requests", "5", "--setting", "local", "--json", str(path)) == 0
    points = json.loads(path.read_text())["points"]
    assert {point["policy"] for point in points} == {"sglang_cache_aware", "dynamo_cost", "llmd_weighted", "preble_e2"}
    assert "window_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"timestamp": 0, "input_length": 5}', ":2: the field 'output_length' is missing"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 1}', ":2: input_length must not be negative, got -5"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', ":2: timestamp goes backwards, -1 after 0"),
        ("nothing", ":2: no request"),
    ],
)
def test_a_bad_trace_is_named_by_file_line_and_field(line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": 5, "output_length": 1}}\n{line}\n')
    assert simulate("--trace", str(path)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{path}{words}" in error


def test_a_trace_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", str(tmp_path / "none")) == 2
    assert "--trace: cannot read" in capsys.readouterr().err
