"""The engine's tensors as blocks of bytes, whatever their layout in memory."""

import math

import numpy as np
import pytest
import torch

from kv_transfer.copies import BlockRows
from kv_transfer.kv_tensors import KvTensors
from tests.kv_layers import (
    LAYERS,
    LAYOUTS,
    SHAPES,
    Layout,
    blocks_outermost,
    contiguous,
    gather,
    make_layers,
    one_storage,
    tokens_before_heads,
)

pytestmark = pytest.mark.integration


def put_row(rows: BlockRows, index: int, payload: bytes) -> None:
    """Fills one block, as a store does."""
    start = 0
    for view in rows.views:
        view[index] = np.frombuffer(payload[start : start + view.shape[1]], np.uint8)
        start += view.shape[1]


class TestKvTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks_come_back_from_their_rows(self, layout: Layout, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        source, target = make_layers(layout, shape, dtype, 1), make_layers(layout, shape, dtype, None)
        ours, theirs = KvTensors(source), KvTensors(target)
        assert ours.num_blocks == shape[0]
        assert ours.block_bytes == LAYERS * math.prod(shape[1:]) * dtype.itemsize
        rows = gather(ours, [2, 0])
        into, ids = theirs.to_load([1, 2])
        for index, row in enumerate(rows):
            put_row(into, int(ids[index]), row)
        theirs.loaded([1, 2], into)
        for name, layer in source.items():
            assert torch.equal(target[name][1], layer[2])
            assert torch.equal(target[name][2], layer[0])
            assert not target[name][0].any()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_row_is_in_logical_order_whatever_the_layout(self, layout: Layout) -> None:
        layers = make_layers(layout, (3, 2, 4, 8), torch.float32, 1)
        tensors = KvTensors(layers)
        (row,) = gather(tensors, [1])
        assert row == b"".join(layer[1].contiguous().numpy().tobytes() for layer in layers.values())

    def test_layers_are_in_the_order_of_their_numbers(self) -> None:
        layers = {f"model.layers.{number}.attn": torch.full((1, 1, 1, 1), number, dtype=torch.uint8) for number in (10, 9, 2)}
        assert gather(KvTensors(layers), [0]) == [bytes([2, 9, 10])]

    def test_nothing_is_copied_for_no_blocks(self) -> None:
        for layout in (contiguous, tokens_before_heads):
            tensors = KvTensors(make_layers(layout, SHAPES[0], torch.float32, 1))
            assert gather(tensors, []) == []
            tensors.loaded([], tensors.to_load([])[0])

    def test_blocks_that_lie_whole_in_memory_are_not_copied_before_the_store_does(self) -> None:
        for layout, is_whole in ((contiguous, True), (one_storage, True), (blocks_outermost, True), (tokens_before_heads, False)):
            layers = make_layers(layout, SHAPES[0], torch.float32, 1)
            rows, _ = KvTensors(layers).to_save([1])
            before = rows.views[0][0].tobytes()
            for layer in layers.values():
                layer.add_(1.0)
            assert (rows.views[0][0].tobytes() != before) == is_whole
