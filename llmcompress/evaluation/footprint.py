"""The size of a model: bytes on disk, and theoretical minima. A zero counts like any other number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from compressed_tensors.utils import get_head_dim, get_num_kv_heads
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.evaluation.checkpoint_codes import StoredCodes, codes_in
from llmcompress.loading.config import read_config
from llmcompress.loading.files import read_index
from llmcompress.loading.match import empty_model
from llmcompress.loading.source import find_source
from llmcompress.loading.tensors import TensorHeader, Tensors
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.base import MODULES, CompressedModule
from llmcompress.numerics.entropy import entropy, huffman_code, mean_bits

TWICE = "stored twice"
CACHE_SCALES = (".k_scale", ".v_scale", ".key_scale", ".value_scale")
"""Ends of the names of what a quantized KV cache multiplies by."""


class Footprint(BaseModel):
    """Size of one saved model. Sparse weights stored densely are as large as dense ones, and are counted so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    format: str
    """`plain`, `compressed-tensors`, `bitsandbytes` or `llmcompress`."""
    parameters: int
    """Parameters of the model; quantized weights count as weights, a tied tensor counts once."""
    embedding: int
    head: int
    """0 if tied to the embedding."""
    blocks: int
    other: int
    nonzero: int
    """Parameters that are not exactly zero."""
    bytes_on_disk: int
    """Of the weight files."""
    stored_bytes: int
    """Of the tensors in them: without headers."""
    ideal_bytes: int
    """Codes, scales, zero points and everything else, without padding."""
    sparse_ideal_bytes: int
    """The same if every tensor stored its non-zeros and a bit for every place, where that is less. No file here is
    stored so, and no count above includes it."""
    codes: int
    """Quantized parameters."""
    entropy_bits_per_code: float | None
    """Entropy per code, the limit of lossless coding; None without quantized weights."""
    huffman_bits_per_code: float | None
    """Bits per code with Huffman coding, without tables. Theoretical, like the line above."""
    cache_bytes_per_token: int | None = None
    """Of all keys and values of one token in the caches of generation, where they are stored as codes: a folder with
    our manifest everywhere, a compressed-tensors one where the runtime does (transformers only rounds)."""

    @property
    def ideal_bits_per_weight(self) -> float:
        """Bits per weight of the scheme."""
        return 8 * self.ideal_bytes / self.parameters

    @property
    def stored_bits_per_weight(self) -> float:
        """Bits per weight in the files."""
        return 8 * self.bytes_on_disk / self.parameters


def footprint(model: str | Path) -> Footprint:
    """Size of a saved model: a Hub id, a folder or `builtin:...`. Weights are read one tensor at a time.

    Raises: CompressError when there is no such model, or its format is not understood.
    """
    source = find_source(str(model))
    found = codes_in(source.folder)
    config = read_config(source.folder, may_be_quantized=True)[0]
    parts = _parts(config)
    read = Tensors()
    sizes: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    nonzero = ideal_bits = sparse_bits = 0
    for tensor in found.dense:
        if (part := _part_of(tensor.name, parts)) == TWICE:
            continue
        bits = 8 * tensor.bytes
        ideal_bits += bits
        # indices of what was kept, and scales of the cache: needed, but no parameters
        if not tensor.dtype.is_floating_point or tensor.name.endswith(CACHE_SCALES):
            sparse_bits += bits
            continue
        count = prod(tensor.shape)
        there = int(torch.count_nonzero(read(tensor)))
        sizes[part] += count
        nonzero += there
        sparse_bits += min(bits, there * 8 * tensor.dtype.itemsize + count)
    for site in found.coded:
        fields_OI = site.codes(read)
        there = int(torch.count_nonzero(fields_OI))
        sizes[_part_of(site.name, parts)] += site.weights
        nonzero += there
        codes.update(_histogram(fields_OI))
        ideal_bits += site.ideal_bits
        of_zeros = int((site.weights - there) * site.code_bits)
        sparse_bits += min(site.ideal_bits, site.ideal_bits - of_zeros + site.weights)
    return Footprint(
        model=source.name,
        format=found.format,
        parameters=sizes.total(),
        embedding=sizes["embedding"],
        head=sizes["head"],
        blocks=sizes["blocks"],
        other=sizes["other"],
        nonzero=nonzero,
        bytes_on_disk=bytes_on_disk(source.folder),
        stored_bytes=_stored_bytes(found),
        ideal_bytes=-(-ideal_bits // 8),
        sparse_ideal_bytes=-(-sparse_bits // 8),
        codes=codes.total(),
        entropy_bits_per_code=entropy(codes) if codes else None,
        huffman_bits_per_code=mean_bits(huffman_code(codes), codes) if codes else None,
        cache_bytes_per_token=_cache_bytes(config, found),
    )


def ratios(model: Footprint, against: Footprint) -> dict[str, float]:
    """Each size of `model` ÷ that of the other."""
    names = ("parameters", "blocks", "nonzero", "bytes_on_disk", "ideal_bytes")
    return {name: getattr(model, name) / getattr(against, name) for name in names if getattr(against, name)}


def bytes_on_disk(folder: Path | str) -> int:
    """Bytes of the weight files that a loader reads: those of the index where there is one.

    Left-over files (a second format, shards of an older save) do not count. Files were checked: every shard is there.
    """
    folder = Path(folder)
    if folder.is_file():  # of a format that is one file
        return folder.stat().st_size
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sum((folder / name).stat().st_size for name in set(read_index(index).values()))
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def parameters(model: nn.Module) -> int:
    """Weights and biases of a live model, compressed or not; a tensor used twice (tied embeddings) counts once."""
    coded = sum(module.coded_weights() for module in model.modules() if isinstance(module, CompressedModule))
    return coded + sum(parameter.numel() for parameter in model.parameters())


def ideal_bytes(model: nn.Module) -> int:
    """Bytes of a live model without padding."""
    bits = sum(8 * parameter.numel() * parameter.element_size() for parameter in model.parameters())
    bits += sum(module.coded_bits() for module in model.modules() if isinstance(module, CompressedModule))
    return -(-bits // 8)


def _parts(config: PretrainedConfig) -> dict[str, str]:
    """Beginnings of tensor names → what they belong to; a checkpoint may leave the model's own prefix out.

    A tied head that is stored a second time belongs to nothing.
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    model = empty_model(config)
    names = {id(part): name for name, part in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {
        find_blocks(model)[0][0].rpartition(".")[0]: "blocks",
        names[id(embedding)]: "embedding",
        _name_on_disk(model, names[id(head)]): TWICE if head.weight is embedding.weight else "head",
    }
    prefix = f"{model.base_model_prefix}."
    return found | {name.removeprefix(prefix): part for name, part in found.items()}


def _cache_bytes(config: PretrainedConfig, found: StoredCodes) -> int | None:
    """Of one token, by the specs in the manifest or the scheme; None for a model whose caches hold ordinary numbers."""
    words = getattr(config, "quantization_config", None) or {}
    if scheme := words.get("kv_cache_scheme"):
        text = config.get_text_config(decoder=True)
        layers = sum(tensor.name.endswith(".k_scale") for tensor in found.dense)
        return int(layers * 2 * get_num_kv_heads(text) * get_head_dim(text) * scheme["num_bits"] // 8)
    specs = words.get("modules", {}).values()
    return sum(MODULES[spec["type"]].cache_bytes_per_token(spec) for spec in specs if "type" in spec) or None


def _name_on_disk(model: PreTrainedModel, module: str) -> str:
    """What a checkpoint calls a module's weight, without `.weight`: transformers 5 renames GPT-NeoX's head."""
    if TRANSFORMERS_MAJOR < 5:
        return module
    from transformers.core_model_loading import revert_weight_conversion

    renamed = revert_weight_conversion(model, {f"{module}.weight": torch.empty(0, device="meta")})
    return str(next(iter(renamed))).removesuffix(".weight")


def _part_of(tensor: str, parts: Mapping[str, str]) -> str:
    return next((part for name, part in parts.items() if f"{tensor}.".startswith(f"{name}.")), "other")


def _histogram(codes_OI: Tensor) -> dict[int, int]:
    symbols, counts = torch.unique(codes_OI, return_counts=True)
    return dict(zip(symbols.tolist(), counts.tolist(), strict=True))


def _stored_bytes(found: StoredCodes) -> int:
    coded: list[TensorHeader] = [tensor for site in found.coded for tensor in site.tensors.values()]
    return sum(tensor.bytes for tensor in (*found.dense, *coded))
