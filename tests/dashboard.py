"""The Grafana dashboard as tests read it: its panels, their queries, the metrics and labels in them.

Must not know which metrics there are: the tests compare with what processes expose.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.layers import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "tandem.json"

_METRIC = re.compile(r"\b((?:tandem_|vllm:|process_)\w+|up)(?=[{\[])")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_REPLACED = re.compile(r'label_replace\(vector\(0\), "(\w+)"')
_LEGEND = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of a panel. `text` is PromQL with Grafana's variables in it."""

    panel: str
    text: str
    legend: str

    @property
    def metrics(self) -> set[str]:
        """The series' names in it."""
        return set(_METRIC.findall(self.text))

    @property
    def labels(self) -> set[str]:
        """The labels that its result has."""
        return {label.strip() for group in _GROUPED.findall(self.text) for label in group.split(",")} | set(_REPLACED.findall(self.text))

    @property
    def legend_labels(self) -> set[str]:
        """The labels that its legend names."""
        return set(_LEGEND.findall(self.legend))

    def fill(self, variables: Mapping[str, str]) -> str:
        """PromQL as Grafana sends it: `$name` by its value, the longest name first."""
        text = self.text
        for name in sorted(variables, key=len, reverse=True):
            text = text.replace(f"${name}", variables[name])
        assert "$" not in text, f"{self.panel}: a variable of Grafana is left in {text}"
        return text


def dashboard() -> dict[str, Any]:
    """All of it."""
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return parsed


def panels() -> list[dict[str, Any]]:
    """The panels that show something: rows are left out."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """All queries of all panels, in order."""
    return [
        Query(panel=panel["title"], text=target["expr"], legend=target["legendFormat"]) for panel in panels() for target in panel["targets"]
    ]
