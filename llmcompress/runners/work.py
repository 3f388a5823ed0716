"""Counts what a model computes in a prefill and reads in a decode step, on the operations that really run.

So experts that are not chosen, blocks that are skipped and tables of which only rows are read count as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from typing_extensions import override


@dataclass(frozen=True)
class Work:
    """Of a prefill and of the one decode step after it, whole batch."""

    prefill_flops: int
    """Of matrix products, two per multiply-add; attention over the whole square, as torch counts it."""
    weight_bytes: int
    """Weights that the decode step reads, each counted once."""
    cache_bytes: int
    """Keys and values of the prompt."""


def flop_counter() -> FlopCounterMode:
    """That of torch, which does not know attention on a CPU and products with one matrix per group."""
    own = {"_scaled_dot_product_flash_attention_for_cpu": _attention_flops, "_grouped_mm": _grouped_flops}
    known = {packet: count for name, count in own.items() if (packet := getattr(torch.ops.aten, name, None))}
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _grouped_flops(rows: Any, matrices: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * rows[0] * matrices[-2] * matrices[-1])


class WeightsRead(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Notes which weights of a model the operations inside read.

    A weight that several operations read counts once; views read nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = (*model.parameters(), *model.buffers())
        self._storages = {each.untyped_storage().data_ptr() for each in held if each.numel()}
        self._whole: dict[tuple[int, int, int], int] = {}
        self._rows = 0

    @property
    def bytes(self) -> int:
        """Read so far."""
        return sum(self._whole.values()) + self._rows

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        weights = [each for each in _tensors((args, kwargs)) if self._is_weight(each)]
        if weights and not (isinstance(out, Tensor) and self._is_weight(out)):
            part = _PARTLY.get(func.overloadpacket.__name__)
            if part is not None:
                self._rows += part(out, *args, **(kwargs or {}))
            else:
                for each in weights:
                    place = (each.untyped_storage().data_ptr(), int(each.storage_offset()), each.nbytes)
                    self._whole[place] = min(each.nbytes, each.untyped_storage().nbytes())
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._storages


def _rows_read(out: Tensor, *args: Any, **kwargs: Any) -> int:
    return out.nbytes


def _groups_read(out: Tensor, rows: Tensor, matrices: Tensor, offs: Tensor | None = None, **kwargs: Any) -> int:
    """Matrices of the groups that have rows; `offs` says where each group ends."""
    if offs is None or matrices.ndim != 3:
        return matrices.nbytes
    ends = offs.tolist()
    used = sum(end > start for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return int(used * matrices[0].nbytes)


_PARTLY: Mapping[str, Callable[..., int]] = {
    "embedding": _rows_read,
    "index": _rows_read,
    "index_select": _rows_read,
    "gather": _rows_read,
    "_grouped_mm": _groups_read,
}
"""Operations that read some rows of a table."""


def cache_bytes(cache: Any) -> int:
    """Keys and values in a KV cache of transformers, as they are stored: of a quantized one its codes."""
    layers = getattr(cache, "layers", None)
    held = cache if layers is None else [(layer.keys, layer.values) for layer in layers]
    return sum(each.nbytes for each in _tensors(held))


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (each for each in tree_leaves(tree) if isinstance(each, Tensor))
