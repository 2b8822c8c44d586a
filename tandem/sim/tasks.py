"""Which runs a command needs, in order. Must not run them."""

from collections.abc import Sequence

from router.policies import POLICIES
from tandem.sim.grid import GRID
from tandem.sim.run import Scenario, Task
from tandem.sim.variants import VARIANTS, Setting, Variant

# Parameters are chosen on other seeds than those that compare.
FIRST_TUNING_SEED = 1_000


def comparison(scenario: Scenario, settings: Sequence[Setting], variants: Sequence[Variant], seeds: int) -> list[Task]:
    """Every variant in every setting with every seed; what a store changes only where there is one."""
    return [
        Task(scenario=scenario, setting=setting, variant=variant, seed=seed)
        for seed in range(seeds)
        for setting in settings
        for variant in variants
        if variant.knows_store or setting.store_tokens is not None
    ]


def tuning(scenario: Scenario, settings: Sequence[Setting], seeds: int) -> list[Task]:
    """Every point of the grid."""
    return [
        Task(scenario=scenario, setting=setting, variant=VARIANTS[policy], seed=FIRST_TUNING_SEED + seed, parameters=parameters)
        for policy in POLICIES
        for parameters in GRID.get(policy, ())
        for setting in settings
        for seed in range(seeds)
    ]
