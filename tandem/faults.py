"""Fault hooks: delay, drop or corrupt at named places. Off unless a process is started with `--faults`.

A specification is a comma-separated list of `site.action=value`:
`kv_publish.delay_s=0.5` waits half a second at each pass, `kv_put.drop_every=10` hits every tenth pass.
"""

import itertools
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
            try:
                rules[site] = float(value)
            except ValueError as error:
                raise ConfigError(f"--faults: {part!r} is not site.action=number") from error
            if site not in SITES or not rules[site] > 0:
                raise ConfigError(f"--faults: {part!r}; valid are {', '.join(SITES)} with a number above 0")
        return cls(rules)

    def delay_s(self, site: str) -> float:
        """Seconds to wait at this site; 0 where no fault is set."""
        return self._rules.get(site, 0.0)

    def fires(self, site: str) -> bool:
        """Whether this pass of the site is hit."""
        return site in self._rules and next(self._passes[site]) % int(self._rules[site]) == 0
