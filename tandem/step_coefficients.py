"""Step-time coefficients of each pool as routers publish them for the autoscaler, and as text in the register.

Must not learn or fetch them: `router/coefficients.py` writes them, `redis_coefficients.py` keeps them.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from tandem.domain import ModelId, Role
from tandem.step_cost import StepCost

_VERSION = 1  # of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCoefficients:
    """What a router has learnt of one pool's engine steps."""

    model: ModelId
    hardware: str
    role: Role
    cost: StepCost
    p90_ratio: float  # a step takes longer than so many times its predicted seconds in one case of ten
    samples: int  # steps learnt from

    @property
    def pool(self) -> tuple[ModelId, str, Role]:
        """Whose steps they are."""
        return self.model, self.hardware, self.role


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What all routers have published: of each pool what was learnt from most steps, by pool; `dropped` entries could not be."""

    pools: tuple[PoolCoefficients, ...]
    dropped: int


def coefficients_to_json(pools: Iterable[PoolCoefficients]) -> str:
    """One router's, in one line."""
    return json.dumps({"version": _VERSION, "pools": [asdict(one) for one in pools]}, separators=(",", ":"))


def coefficients_from_json(texts: Iterable[str]) -> Coefficients:
    """All routers'. A text that cannot be read, or of another version, counts as one dropped entry. Ties go to the earlier text."""
    best: dict[tuple[ModelId, str, Role], PoolCoefficients] = {}
    dropped = 0
    for text in texts:
        for one in _entries(text):
            if one is None:
                dropped += 1
            elif one.pool not in best or one.samples > best[one.pool].samples:
                best[one.pool] = one
    return Coefficients(pools=tuple(best[pool] for pool in sorted(best)), dropped=dropped)


def _entries(text: str) -> list[PoolCoefficients | None]:
    """None for each that is none; a single None where the text is none."""
    try:
        values = json.loads(text)
        return [_try_read(item) for item in values["pools"]] if values["version"] == _VERSION else [None]
    except (ValueError, TypeError, LookupError):
        return [None]


def _try_read(item: object) -> PoolCoefficients | None:
    """None where it is no entry, or says what no steps can be like. Keys of a newer router are passed over."""
    try:
        if not isinstance(item, dict) or not isinstance(item["cost"], dict):
            return None
        cost = StepCost(**{field.name: _number(item["cost"][field.name]) for field in fields(StepCost)})
        model, hardware, p90_ratio, samples = item["model"], item["hardware"], _number(item["p90_ratio"]), item["samples"]
        is_possible = isinstance(model, str) and isinstance(hardware, str) and type(samples) is int and samples > 0 and p90_ratio > 0
        if not is_possible or not any(asdict(cost).values()):
            return None
        return PoolCoefficients(
            model=ModelId(model), hardware=hardware, role=Role(item["role"]), cost=cost, p90_ratio=p90_ratio, samples=samples
        )
    except (ValueError, LookupError, OverflowError):
        return None


def _number(value: object) -> float:
    """Raises ValueError where it is no finite number of at least 0, OverflowError where it is too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number of at least 0")
    return float(value)
