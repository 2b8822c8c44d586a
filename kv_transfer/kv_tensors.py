"""The engine's KV tensors as blocks of bytes.

A block's bytes are its layers in order, each `tensor[block]` in logical order (kv_heads, tokens, channels), so that the layout in memory
does not matter. Where that is the layout in memory too, the store copies straight from and to the tensors.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.copies import BlockRows
from kv_transfer.store import Bytes

BlockIds = npt.NDArray[np.int64]


class KvTensors:
    """Blocks of all layers. `tensors` maps layer name to a tensor of shape (num_blocks, ...); all have the same number of blocks."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = [tensors[name] for name in sorted(tensors, key=_layer_order)]
        self._layer_bytes = [tensor[0].numel() * tensor.element_size() for tensor in self._tensors]
        self.block_bytes = sum(self._layer_bytes)
        self.num_blocks = min(tensor.shape[0] for tensor in self._tensors)
        self._is_host = all(tensor.device.type == "cpu" for tensor in self._tensors)
        self._rows: BlockRows | None = None
        if self._is_host and all(tensor[0].is_contiguous() for tensor in self._tensors):
            self._rows = BlockRows(tuple(_block_view(tensor) for tensor in self._tensors))

    def touch(self) -> None:
        """Clears host tensors, so that their pages are there: a load that meets fresh ones takes three times as long."""
        if self._is_host:
            for tensor in self._tensors:
                tensor.zero_()

    def to_save(self, block_ids: Sequence[int]) -> tuple[BlockRows, BlockIds]:
        """Where the store finds these blocks: in the engine's memory, or in a copy of them on the host."""
        if self._rows is not None:
            return self._rows, np.array(block_ids, np.int64)
        rows = self._gather(block_ids) if block_ids else np.empty((0, self.block_bytes), np.uint8)
        return BlockRows((rows,)), np.arange(len(block_ids))

    def to_load(self, block_ids: Sequence[int]) -> tuple[BlockRows, BlockIds]:
        """Where the store is to put these blocks; `loaded` brings them into the engine."""
        if self._rows is not None:
            return self._rows, np.array(block_ids, np.int64)
        return BlockRows((np.empty((len(block_ids), self.block_bytes), np.uint8),)), np.arange(len(block_ids))

    def loaded(self, block_ids: Sequence[int], rows: BlockRows) -> None:
        """The first rows of `rows` hold these blocks now."""
        if self._rows is None and block_ids:
            self._scatter(block_ids, rows.views[0][: len(block_ids)])

    # Layouts that are not block by block, and devices: one gather a layer, one copy to the host, and the stream is waited for, as the
    # blocks may be reused by the next step. Untried on a GPU.
    def _gather(self, block_ids: Sequence[int]) -> Bytes:
        index = torch.tensor(block_ids, device=self._tensors[0].device)
        layers = [tensor.index_select(0, index).contiguous().view(torch.uint8).flatten(1) for tensor in self._tensors]
        blocks: Bytes = torch.cat(layers, dim=1).cpu().numpy()
        return blocks

    def _scatter(self, block_ids: Sequence[int], rows: Bytes) -> None:
        device = self._tensors[0].device
        index = torch.tensor(block_ids, device=device)
        blocks = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        for tensor, layer in zip(self._tensors, blocks.split(self._layer_bytes, dim=1), strict=True):
            tensor.index_copy_(0, index, layer.contiguous().view(tensor.dtype).view(len(block_ids), *tensor.shape[1:]))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _block_view(tensor: torch.Tensor) -> Bytes:
    """Bytes (num_blocks, bytes of a block) in the tensor's own memory."""
    block_bytes = tensor[0].numel() * tensor.element_size()
    stride_bytes = tensor.stride(0) * tensor.element_size()
    flat: Bytes = torch.as_strided(
        tensor.view(torch.uint8), (tensor.shape[0], block_bytes), (stride_bytes, 1), tensor.storage_offset() * tensor.element_size()
    ).numpy()
    return flat


def _layer_order(name: str) -> tuple[int, str]:
    """Layers by number ("model.layers.10.attn" after ".9."), then by name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else 0, name)
