"""The engine's KV tensors as blocks of bytes: gather out of them, scatter into them.

A block's bytes are its layers in order, each `tensor[block]` in logical order (kv_heads, tokens, channels), so that the layout in memory
does not matter.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]


class KvTensors:
    """Blocks of all layers. `tensors` maps layer name to a tensor of shape (num_blocks, ...); all have the same number of blocks."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = [tensors[name] for name in sorted(tensors, key=_layer_order)]
        self._layer_bytes = [tensor[0].numel() * tensor.element_size() for tensor in self._tensors]
        self.block_bytes = sum(self._layer_bytes)
        self.num_blocks = min(tensor.shape[0] for tensor in self._tensors)
        self._is_host = all(tensor.device.type == "cpu" for tensor in self._tensors)
        self._host = self._host_views() if self._is_host else []

    def _host_views(self) -> list[Bytes]:
        """One byte view (num_blocks, ..., channel bytes) per layer, sharing the engine's memory."""
        return [tensor.view(torch.uint8).numpy() for tensor in self._tensors]

    def touch(self) -> None:
        """Clears host tensors, so that their pages are there: a load that meets fresh ones takes three times as long."""
        if self._is_host:
            for tensor in self._tensors:
                tensor.zero_()

    def gather(self, block_ids: Sequence[int], rows: Sequence[Bytes]) -> None:
        """Copies each block into its row of `block_bytes` bytes."""
        if not self._is_host:
            if block_ids:  # an index of nothing has no integer type
                self._gather_device(block_ids, rows)
            return
        start = 0
        for view, layer_bytes in zip(self._host, self._layer_bytes, strict=True):
            shape = view.shape[1:]
            for block_id, row in zip(block_ids, rows, strict=True):
                row[start : start + layer_bytes].reshape(shape)[...] = view[block_id]
            start += layer_bytes

    def scatter(self, block_ids: Sequence[int], rows: Sequence[Bytes]) -> None:
        """Copies each row into its block."""
        if not self._is_host:
            if block_ids:
                self._scatter_device(block_ids, rows)
            return
        start = 0
        for view, layer_bytes in zip(self._host, self._layer_bytes, strict=True):
            shape = view.shape[1:]
            for block_id, row in zip(block_ids, rows, strict=True):
                view[block_id] = row[start : start + layer_bytes].reshape(shape)
            start += layer_bytes

    # The device paths are untried on a GPU. One gather per layer, one copy to the host, and the stream is waited for: the blocks may be
    # reused by the next step.
    def _gather_device(self, block_ids: Sequence[int], rows: Sequence[Bytes]) -> None:
        index = torch.tensor(block_ids, device=self._tensors[0].device)
        layers = [tensor.index_select(0, index).contiguous().view(torch.uint8).flatten(1) for tensor in self._tensors]
        blocks = torch.cat(layers, dim=1).cpu().numpy()
        for row, block in zip(rows, blocks, strict=True):
            row[:] = block

    def _scatter_device(self, block_ids: Sequence[int], rows: Sequence[Bytes]) -> None:
        device = self._tensors[0].device
        index = torch.tensor(block_ids, device=device)
        blocks = torch.from_numpy(np.stack(list(rows))).to(device)
        for tensor, layer in zip(self._tensors, blocks.split(self._layer_bytes, dim=1), strict=True):
            tensor.index_copy_(0, index, layer.contiguous().view(tensor.dtype).view(len(block_ids), *tensor.shape[1:]))
        torch.cuda.current_stream(device).synchronize()


def _layer_order(name: str) -> tuple[int, str]:
    """Layers by number ("model.layers.10.attn" after ".9."), then by name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else 0, name)
