"""What a simulation found: one JSON object, and tables for people. Must not simulate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from router.policies import DEFAULT_POLICY
from tandem.sim.figures import Interval, interval, intervals
from tandem.sim.run import Run, Scenario
from tandem.sim.variants import Kind, Setting, Variant

_SCHEMA = "tandem.simulate/1"
_ORDER = list(Kind)


def result_of(runs: Sequence[Run], scenario: Scenario, workload: Mapping[str, object], wall_s: float) -> dict[str, object]:
    """The report: means over seeds, `ci95` their confidence intervals ([low, high], null of one seed)."""
    settings: list[Setting] = list({run.task.setting.name: run.task.setting for run in runs}.values())
    return {
        "schema": _SCHEMA,
        "default_policy": DEFAULT_POLICY,
        "workload": dict(workload),
        "scenario": {**asdict(scenario), "profile": scenario.profile.name},
        "wall_s": wall_s,
        "settings": [_setting(setting, [run for run in runs if run.task.setting == setting]) for setting in settings],
    }


def _setting(setting: Setting, runs: Sequence[Run]) -> dict[str, object]:
    variants: list[Variant] = list({run.task.variant.name: run.task.variant for run in runs}.values())
    return {
        "setting": setting.name,
        "local_tokens": setting.local_tokens,
        "store_tokens": setting.store_tokens,
        "ideal_hit_fraction": interval(run.ideal_hit_fraction for run in runs).mean,
        "policies": [_policy(variant, [run for run in runs if run.task.variant == variant]) for variant in variants],
    }


def _policy(variant: Variant, runs: Sequence[Run]) -> dict[str, object]:
    found: Mapping[str, Interval] = intervals([run.figures for run in runs])
    return {
        "policy": variant.name,
        "kind": variant.kind.value,
        **{name: one.mean for name, one in found.items()},
        "ci95": {name: None if one.low is None else [one.low, one.high] for name, one in found.items()},
        "rejected_requests": sum(run.rejected_requests for run in runs),
        "seeds": [run.task.seed for run in runs],
        "digests": [run.digest for run in runs],
        "stragglers": [[asdict(one) for one in run.stragglers] for run in runs],
        "trust_changes": [[asdict(one) for one in run.trust_changes] for run in runs],
    }


def result_tables(runs: Sequence[Run]) -> Iterator[Table]:
    """One table a setting: ours, peers from the quickest, ablations, bounds. Half widths of 95 % intervals after the means."""
    for setting in {run.task.setting.name: run.task.setting for run in runs}.values():
        mine = [run for run in runs if run.task.setting == setting]
        rows = []
        for variant in {run.task.variant.name: run.task.variant for run in mine}.values():
            found = intervals([run.figures for run in mine if run.task.variant == variant])
            rows.append((_ORDER.index(variant.kind), found["ttft_mean_s"].mean, variant, found))
        ideal = interval(run.ideal_hit_fraction for run in mine).mean
        table = Table("policy", "kind", title=f"{setting.name} (ideal hit {ideal:.1%})")
        for heading in ("TTFT mean ms", "TTFT p99 ms", "TPOT mean ms", "attainment %", "goodput /s", "hit %"):
            table.add_column(heading, justify="right")
        for _, _, variant, found in sorted(rows, key=lambda row: (row[0], row[1], row[2].name)):
            times = (_cell(found[name], 1000.0, 1) for name in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s"))
            rest = (_cell(found["slo_attainment"], 100.0, 2), _cell(found["goodput_rps"], 1.0, 2), _cell(found["hit_fraction"], 100.0, 2))
            table.add_row(variant.name, variant.kind.value, *times, *rest)
        yield table


def _cell(one: Interval, scale: float, digits: int) -> str:
    mean = f"{one.mean * scale:.{digits}f}"
    return mean if one.high is None else f"{mean} +-{(one.high - one.mean) * scale:.{digits}f}"
