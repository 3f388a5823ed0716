"""Two faults that only the weights show: NaN or Inf values, and an output head that contradicts its tying."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.loading.files import shortened_list
from llmcompress.loading.preflight import Preflight
from llmcompress.loading.tensors import TensorHeader


def refuse_not_finite(weights: Mapping[str, Tensor], found: Mapping[str, TensorHeader]) -> None:
    """One pass over every weight, tensor by tensor.

    Raises: CompressError naming each tensor with NaN or Inf and how many values are.
    """
    bad = []
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel() and not _all_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            file = f" in {found[name].file.name}" if name in found else ""
            bad.append(f"{name}{file}: {count} of {tensor.numel()} values")
    if bad:
        raise CompressError(
            "model.not-finite",
            f"{len(bad)} weights contain NaN or Inf",
            where=shortened_list(bad),
            fix="the checkpoint is damaged or its training diverged: download it again or use an earlier one",
        )


def refuse_contradicting_head(checked: Preflight) -> None:
    """config.json says one tensor, the checkpoint holds two: transformers 4 drops one silently, 5 drops the tying.

    Raises: CompressError when the two differ.
    """
    if checked.contents.stored_twice is None:
        return
    embedding, head = (_read(checked.headers[name]) for name in checked.contents.stored_twice)
    if not torch.equal(embedding, head):
        names = " and ".join(checked.contents.stored_twice)
        raise CompressError(
            "model.contradicting-head",
            "config.json ties the output head to the embedding, but the checkpoint contains two different tensors",
            where=names,
            fix='set "tie_word_embeddings": false in config.json to keep both, or remove the head from the checkpoint',
        )


def _all_finite(tensor: Tensor) -> bool:
    """Without a mask as large as the tensor: NaN and Inf both reach the extremes."""
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _read(header: TensorHeader) -> Tensor:
    with safe_open(header.file, framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(header.name)
        return found
