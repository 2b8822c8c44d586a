"""Layers of an engine's KV cache in the memory layouts that engines use."""

from collections.abc import Callable, Sequence

import torch

from kv_transfer.kv_tensors import KvTensors

LAYERS = 3


def contiguous(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return [torch.zeros(blocks, heads, tokens, channels, dtype=torch.float64) for _ in range(LAYERS)]


def tokens_before_heads(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return [torch.zeros(blocks, tokens, heads, channels, dtype=torch.float64).permute(0, 2, 1, 3) for _ in range(LAYERS)]


def one_storage(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return list(torch.zeros(LAYERS, blocks, heads, tokens, channels, dtype=torch.float64))


def blocks_outermost(blocks: int, heads: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return list(torch.zeros(blocks, LAYERS, heads, tokens, channels, dtype=torch.float64).transpose(0, 1))


Layout = Callable[[int, int, int, int], list[torch.Tensor]]
LAYOUTS = (contiguous, tokens_before_heads, one_storage, blocks_outermost)
SHAPES = ((5, 2, 4, 8), (4, 1, 1, 2), (3, 4, 32, 6))


def make_layers(layout: Layout, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int | None) -> dict[str, torch.Tensor]:
    """Named layers in this memory layout, zero or random."""
    layers = {}
    for number, made in enumerate(layout(*shape)):
        layer = made.to(dtype)  # keeps the strides
        assert layer.stride() == made.stride() or dtype is not torch.float64
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + number)
            layer.copy_(torch.randint(0, 200, shape, generator=generator).to(dtype))
        layers[f"model.layers.{number}.attn"] = layer
    return layers


def gather(tensors: KvTensors, block_ids: Sequence[int]) -> list[bytes]:
    """The bytes of these blocks, as a store is given them."""
    rows, ids = tensors.to_save(block_ids)
    return [b"".join(view[index].tobytes() for view in rows.views) for index in ids.tolist()]
