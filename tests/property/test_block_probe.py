"""The compiled look-up of blocks finds the same cells as the one in numpy, whatever was put in and evicted."""

import importlib.util
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import block_probe_library
from router.block_probe_library import load_probe
from router.block_table import BlockTable
from tandem.short_hash import ShortHashes


def chosen(rng: Random, known: Sequence[int], count: int) -> ShortHashes:
    """Different keys, about half of them known."""
    fresh = [rng.getrandbits(64) for _ in range(count)]
    return np.unique(np.array([rng.choice(known) if known and rng.random() < 0.5 else key for key in fresh], np.uint64))


@given(seed=st.integers(0, 2**32), bound=st.integers(1, 2000), counts=st.lists(st.integers(1, 150), max_size=12))
def test_both_find_and_evict_the_same(seed: int, bound: int, counts: list[int]) -> None:
    bind_probe, rng, known = load_probe(), Random(seed), list[int]()
    assert bind_probe is not None, "router/block_probe.c was not compiled"
    compiled, plain = BlockTable(bound, bind_probe), BlockTable(bound)
    for count in counts:
        keys = chosen(rng, known, count)
        known += keys.tolist()
        (cells, evicted), (plain_cells, plain_evicted) = compiled.claim(keys), plain.claim(keys)
        assert cells.tolist() == plain_cells.tolist()
        assert evicted.tolist() == plain_evicted.tolist()
        numbers = np.array([rng.randrange(5) for _ in cells], np.uint32)
        for table in (compiled, plain):
            table.set_numbers(cells, numbers)
        asked = chosen(rng, known, 64)[::2]
        assert compiled.look_up(asked).tolist() == plain.look_up(asked).tolist()
        assert compiled.find(asked).tolist() == plain.find(asked).tolist()
    none = np.zeros(0, np.uint64)
    assert compiled.look_up(none).tolist() == compiled.find(none).tolist() == []


def test_without_the_compiled_part_numpy_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("router.block_probe")
    for spec in (None, ModuleSpec("router.block_probe", None, origin="block_probe.py")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert load_probe() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(block_probe_library, "_ABI", -1)
    assert load_probe() is None
