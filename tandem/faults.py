"""Fault hooks: delay, drop or corrupt at named places. Off unless a process is started with `--faults`.

A specification is a comma-separated list of `site.action=value`; counts are whole numbers:
`kv_publish.delay_s=0.5` waits half a second at each pass, `kv_put.drop_every=10` hits every tenth pass.
"""

import itertools
import math
from collections.abc import Mapping

from tandem.errors import ConfigError

SITES: Mapping[str, str] = {
    "kv_publish.delay_s": "hold published blocks back before they reach the store",
    "kv_put.drop_every": "lose every Nth block instead of storing it",
    "prefill.fail_every": "fail every Nth prefill call",
}


class Faults:
    """The faults of one process. Counting is per site and starts at 1."""

    def __init__(self, rules: Mapping[str, float]) -> None:
        self._rules = dict(rules)
        self._passes = {site: itertools.count(1) for site in rules}

    @classmethod
    def parse(cls, specification: str) -> "Faults":
        """Reads a specification; raises ConfigError naming the valid sites."""
        rules: dict[str, float] = {}
        for part in filter(None, specification.split(",")):
            site, _, value = part.partition("=")
            if site not in SITES:
                raise ConfigError(f"--faults: no site {site!r}; valid are {', '.join(SITES)}")
            is_count = site.endswith("_every")
            try:
                rules[site] = int(value) if is_count else float(value)
            except ValueError:
                rules[site] = math.nan
            if not 0 < rules[site] < math.inf:
                raise ConfigError(f"--faults: {part!r}; {site} takes {'a whole number' if is_count else 'a number'} above 0")
        return cls(rules)

    def delay_s(self, site: str) -> float:
        """Seconds to wait at this site; 0 where no fault is set."""
        return self._rules.get(site, 0.0)

    def fires(self, site: str) -> bool:
        """Whether this pass of the site is hit."""
        return site in self._rules and next(self._passes[site]) % int(self._rules[site]) == 0
