"""How large a model is: what lies on disk, and what its numbers would take at best. A zero counts like any number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from llmcompress.modules.quant_linear import QuantLinear


@dataclass(frozen=True)
class Footprint:
    """Size of one model. Sparse weights stored densely are as large as dense ones, and are counted so."""

    parameters: int
    """Weights that the model computes with; codes count as the weights they stand for."""
    ideal_bytes: int
    """Codes at their own width, scales, zero points and everything else, without padding or headers."""
    stored_bytes: int
    """Bytes of the weight files."""

    @property
    def ideal_bits_per_weight(self) -> float:
        """What the scheme promises."""
        return 8 * self.ideal_bytes / self.parameters

    @property
    def stored_bits_per_weight(self) -> float:
        """What the format keeps of that promise."""
        return 8 * self.stored_bytes / self.parameters


def footprint(model: nn.Module, folder: Path | str) -> Footprint:
    """Size of `model`, saved in `folder`."""
    return Footprint(parameters(model), ideal_bytes(model), bytes_on_disk(folder))


def bytes_on_disk(folder: Path | str) -> int:
    """Bytes of the weight files that a loader reads: those of the index where there is one.

    Left-over files (a second format, shards of an older save) do not count.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sum((folder / name).stat().st_size for name in names)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def parameters(model: nn.Module) -> int:
    """Weights and biases; a tensor used twice (tied embeddings) counts once."""
    coded = sum(module.codes_OI.numel() for module in model.modules() if isinstance(module, QuantLinear))
    return coded + sum(parameter.numel() for parameter in model.parameters())


def ideal_bytes(model: nn.Module) -> int:
    """What the model's numbers take when nothing is wasted."""
    bits = sum(8 * parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantLinear):
            scale_bits = 8 * module.scale_OG.element_size()
            weights = module.codes_OI.numel()
            bits += round(weights * module.scheme.bits_per_weight(module.out_features, module.in_features, scale_bits))
            if module.input_scale is not None:
                bits += 8 * module.input_scale.numel() * module.input_scale.element_size()
    return -(-bits // 8)
