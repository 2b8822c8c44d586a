"""How figures are formed: rates, medians with their range, ratios of the same repetition, percentiles of calls. Pure.

A ratio is formed inside each repetition, where the two things took turns within a second, and the median is taken of the ratios: a machine
that slows down half way changes both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

GB = 1e9


@dataclass(slots=True, kw_only=True)
class Samples:
    """What one system did with one block size: GB/s (1e9 bytes) by repetition, and blocks that were not as they must be."""

    put_gbps: list[float] = field(default_factory=list)
    get_gbps: list[float] = field(default_factory=list)
    errors: int = 0


def gbps(moved_bytes: int, seconds: float) -> float:
    """Rate in 1e9 bytes a second; 0 where no time was measured."""
    return moved_bytes / seconds / GB if seconds > 0 else 0.0


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """`name`: the median; `name`_min and `name`_max beside it; None where there is no value."""
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs by repetition; a repetition that one of them did not finish, or measured nothing in, is left out."""
    return [mine / other for mine, other in zip(ours, theirs, strict=False) if other > 0]


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else None


def calls_us(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`name`_p50_us and `name`_p99_us of the calls' seconds."""
    return {
        f"{name}_{label}_us": None if found is None else found * 1e6
        for label, fraction in (("p50", 0.5), ("p99", 0.99))
        for found in [percentile(seconds, fraction)]
    }


def rates_row(samples: Samples, memcpy_gbps: Sequence[float]) -> dict[str, object]:
    """One system's rates, memcpy's in the same repetitions, and the ratios."""
    return {
        **spread("memcpy_gbps", memcpy_gbps),
        **spread("put_gbps", samples.put_gbps),
        **spread("get_gbps", samples.get_gbps),
        **spread("put_to_memcpy", ratios(samples.put_gbps, memcpy_gbps)),
        **spread("get_to_memcpy", ratios(samples.get_gbps, memcpy_gbps)),
        "errors": samples.errors,
    }


def peer_ratios(name: str, ours: Samples, peer: Samples | None) -> dict[str, float | None]:
    """Ours over a peer's, put and get; all None where the peer was not there."""
    return {
        **spread(f"put_to_{name}", ratios(ours.put_gbps, peer.put_gbps) if peer else ()),
        **spread(f"get_to_{name}", ratios(ours.get_gbps, peer.get_gbps) if peer else ()),
    }


def error_count(report: object) -> int:
    """The sum of every `errors` number anywhere in a report, those of peers left out; O(its size)."""
    if isinstance(report, Mapping):
        if report.get("kind") == "peer":
            return 0
        own = report.get("errors")
        return (own if isinstance(own, int) else 0) + sum(error_count(value) for value in report.values())
    if isinstance(report, list | tuple):
        return sum(error_count(value) for value in report)
    return 0
