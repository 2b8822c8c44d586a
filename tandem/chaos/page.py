"""The HTML page of a chaos run: one file without anything from elsewhere, a timeline of faults and streams. Must not judge."""

import html
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

from tandem.chaos.verdict import Outcome, Seen

_WIDTH, _LEFT, _LANE = 1600, 220, 5
_ROW = 16
_LONG_GAP_S = 0.5
_COLOURS = {Outcome.COMPLETED: "#2f7d4f", Outcome.CANCELLED: "#8a8f98", Outcome.FAILED: "#c62828", None: "#8a8f98"}
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;color:#1c1f24}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:2px 10px;border-bottom:1px solid #ddd;text-align:left}.bad{color:#c62828}svg text{font:11px system-ui,sans-serif}"
)


def chaos_page(report: Mapping[str, object], seen: Sequence[Seen], started_s: float) -> str:
    """The page; `seen` and `started_s` are of the clock that the report's times count from. O(messages)."""
    names = ("failed", "token_mismatches", "leaked")
    figures = (*names, "requests", "recovery_p50_s", "recovery_p99_s", "pause_p50_s", "pause_max_s", "continued_requests", "http_retries")
    is_good = not any(report[name] for name in names) and bool(report["coverage_complete"])
    verdict = "all held" if is_good else "<span class='bad'>not all held</span>"
    rows = "".join(f"<tr><th>{name}</th><td>{_words(report[name])}</td></tr>" for name in figures)
    findings = [*cast(list[str], report["leaks"]), *(f"not covered: {pair}" for pair in cast(list[str], report["missed"]))]
    findings += [f"request {item['request']}: {item['what']}" for item in cast(list[dict[str, object]], report["mismatches"])]
    findings += [f"{reason}: {text}" for reason, text in cast(dict[str, str], report["error_examples"]).items()]
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>tandem chaos, seed {report['seed']}</title><style>{_STYLE}</style>"
        f"<h1>tandem chaos, seed {report['seed']}: {verdict}</h1>"
        f"<table>{rows}</table><ul>{''.join(f'<li class=bad>{_words(item)}</li>' for item in findings)}</ul>"
        f"{_timeline(cast(list[dict[str, object]], report['faults']), seen, started_s)}{_fault_rows(report)}"
        f"<h2>Conditions</h2><pre>{_words(json.dumps(report['conditions'], indent=1))}</pre></html>\n"
    )


def _timeline(faults: Sequence[Mapping[str, object]], seen: Sequence[Seen], started_s: float) -> str:
    """Faults by kind above, streams packed into lanes below; a long wait for the next token is pale."""
    last_s = max((one.ended_s - started_s for one in seen if one.ended_s is not None), default=1.0)
    kinds = sorted({str(fault["kind"]) for fault in faults})
    top = _ROW * (len(kinds) + 1)

    def x(at_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * max(0.0, min(at_s / last_s, 1.0))

    parts = []
    for number, kind in enumerate(kinds):
        parts.append(f"<text x='0' y='{_ROW * number + 12}'>{_words(kind)}</text>")
        for fault in (fault for fault in faults if fault["kind"] == kind):
            at_s, held_s, recovered_s = (_number(fault[name]) for name in ("at_s", "held_s", "recovered_s"))
            ends_s = at_s + held_s + recovered_s
            colour = "#c62828" if fault["recovered_s"] is None else "#e08a1e"
            title = f"<title>{_words(fault['target'])}: recovered {_words(fault['recovered_s'])} s, {_words(fault['missing'])}</title>"
            parts.append(_bar(x(at_s), _ROW * number + 3, max(2.0, x(ends_s) - x(at_s)), _ROW - 6, colour, title))
            parts.append(f"<line x1='{x(at_s):.1f}' x2='{x(at_s):.1f}' y1='0' y2='100%' stroke='#e08a1e' stroke-opacity='.25'/>")
    lanes: list[float] = []
    for one in sorted(seen, key=lambda one: one.started_s):
        ended_s = one.ended_s if one.ended_s is not None else started_s + last_s
        lane = next((number for number, free_s in enumerate(lanes) if free_s <= one.started_s), len(lanes))
        lanes[lane:] = [ended_s, *lanes[lane + 1 :]]
        y, colour = top + lane * _LANE, _COLOURS[one.outcome]
        title = f"<title>request {one.send.index}, {one.send.transport}, {len(one.token_ids)} tokens {_words(one.reason)}</title>"
        parts.append(_bar(x(one.started_s - started_s), y, x(ended_s - started_s) - x(one.started_s - started_s), _LANE - 1, colour, title))
        moments = [one.started_s, *one.times_s, ended_s]
        for earlier, later in pairwise(moments):
            if later - earlier > _LONG_GAP_S:
                wait = f"<title>{later - earlier:.2f} s without a token</title>"
                parts.append(_bar(x(earlier - started_s), y, x(later - started_s) - x(earlier - started_s), _LANE - 1, "#f0c9a0", wait))
    height = top + _LANE * len(lanes) + 24
    ticks = "".join(f"<text x='{x(last_s * tick / 10):.0f}' y='{height - 6}'>{last_s * tick / 10:.0f} s</text>" for tick in range(10))
    return f"<h2>Timeline</h2><svg width='{_WIDTH}' height='{height}'>{''.join(parts)}{ticks}</svg>"


def _bar(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0.5):.1f}' height='{height}' fill='{colour}'>{title}</rect>"


def _fault_rows(report: Mapping[str, object]) -> str:
    names = ("at_s", "kind", "target", "held_s", "recovered_s", "pause_s", "streams_in_flight", "streams_continued", "missing", "detail")
    rows = [[_words(fault[name]) for name in names] for fault in cast(list[dict[str, object]], report["faults"])]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>Faults</h2><table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{body}</table>"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _words(value: object) -> str:
    return html.escape(f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value))
