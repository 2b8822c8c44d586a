"""Ten thousand damaged blocks across the tiers, a byte each, wherever it lies: none is ever served."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from kv_transfer.store import BlockOutcome
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import BENCHES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SIZE_BYTES = 1024
BATCH = 50
TRIALS = {"arena": 4_000, "arena-numpy": 1_500, "disk": 2_500, "kv-redis": 2_000}


def payload_of(number: int) -> bytes:
    """The bytes of block `number`; no two blocks have the same."""
    return Random(number).randbytes(SIZE_BYTES)


def test_the_trials_are_ten_thousand() -> None:
    assert sum(TRIALS.values()) == 10_000


@pytest.mark.parametrize(("kind", "trials"), TRIALS.items())
def test_no_damaged_block_is_served(kind: str, trials: int, tmp_path: Path) -> None:
    bench, rng, corrupt = BENCHES[kind](tmp_path), Random(kind), 0
    try:
        store = bench.open()
        for first in range(0, trials, BATCH):
            numbers = range(first, first + BATCH)
            hashes = [block_hash(number) for number in numbers]
            store.put(NAMESPACE, hashes, np.stack([np.frombuffer(payload_of(number), np.uint8) for number in numbers]))
            for number in numbers:
                is_record = rng.random() < 0.2
                position = rng.randrange(bench.record_bytes if is_record else SIZE_BYTES)
                (bench.damage_record if is_record else bench.damage)(key(number), position)
            rows = np.zeros((BATCH, SIZE_BYTES), np.uint8)
            for number, row, outcome in zip(numbers, rows, store.get_into(NAMESPACE, hashes, rows), strict=True):
                assert outcome is not BlockOutcome.HIT or bytes(row) == payload_of(number)  # a byte that nobody reads may be any
                corrupt += outcome is BlockOutcome.CORRUPT
            store.drop(NAMESPACE, hashes)
        assert corrupt >= 0.75 * trials  # each damaged payload is seen as such
    finally:
        bench.close()
