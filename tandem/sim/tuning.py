"""What tuning found: every point of the grid with its figures, best first. Must not run anything."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from router.policies import PolicyParameters
from tandem.sim.figures import interval
from tandem.sim.run import Run

_SCHEMA = "tandem.simulate.tune/1"
# Which field of the parameters is a policy's own.
_OWN = {"sglang_cache_aware": "sglang", "dynamo_cost": "dynamo", "llmd_weighted": "llmd", "preble_e2": "preble"}


def tuning_report(runs: Sequence[Run], workload: Mapping[str, object]) -> dict[str, object]:
    """One entry a point: setting, policy, parameters, means over seeds."""
    return {"schema": _SCHEMA, "workload": dict(workload), "points": _points(runs)}


def tuning_table(runs: Sequence[Run]) -> Table:
    """The same; within a policy the least mean TTFT first."""
    table = Table("setting", "policy", "TTFT mean ms", "attainment %", "hit %", "parameters", title="tuning")
    for point in _points(runs):
        times = (f"{point['ttft_mean_s'] * 1000:.1f}", f"{point['slo_attainment'] * 100:.2f}", f"{point['hit_fraction'] * 100:.2f}")  # type: ignore[operator]
        table.add_row(str(point["setting"]), str(point["policy"]), *times, str(point["parameters"]))
    return table


def _points(runs: Sequence[Run]) -> list[dict[str, object]]:
    groups: dict[tuple[str, str, PolicyParameters], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task.setting.name, run.task.variant.name, run.task.parameters), []).append(run)
    points = []
    for (setting, policy, parameters), group in groups.items():
        ttft_mean_s = interval(run.figures.ttft_mean_s for run in group).mean
        point: dict[str, object] = {
            "setting": setting,
            "policy": policy,
            "parameters": asdict(parameters)[_OWN[policy]],
            "ttft_mean_s": ttft_mean_s,
            "slo_attainment": interval(run.figures.slo_attainment for run in group).mean,
            "hit_fraction": interval(run.figures.hit_fraction for run in group).mean,
        }
        points.append((setting, policy, ttft_mean_s, str(parameters), point))
    return [point for *_, point in sorted(points, key=lambda entry: entry[:4])]
