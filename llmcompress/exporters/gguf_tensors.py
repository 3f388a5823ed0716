"""The tensors of a GGUF file: under ggml's names, in the order of rows and with the offsets that llama.cpp expects.

O = outputs, I = inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.gguf_architectures import Architecture, Config, architecture_of, head_size
from llmcompress.exporters.gguf_package import gguf_package
from llmcompress.exporters.gguf_rope import FACTORS, rope_factors
from llmcompress.exporters.checkpoint import repeated_tensors
from llmcompress.formats import gguf
from llmcompress.formats.gguf import BlockType
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression import Tied
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.numerics.quantized import QuantizedTensor

_ROTARY_ROWS = re.compile(r"blk\.\d+\.attn_[qk]\.")
_DENSE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""What ordinary matrices are stored as; vectors are float32, which is exact."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file; its bytes are made when they are asked for."""

    name: str
    """In the file."""
    type: str
    """As ggml calls it."""
    source: str
    """Parameter, or module of codes, that it holds."""
    shape: tuple[int, ...]
    """Of its numbers."""
    make: Callable[[], Tensor]
    """Its bytes: rows × bytes of a row, uint8."""
    codes: Callable[[], QuantizedTensor] | None = None
    """What is stored unchanged, its rows in the file's order; None of an ordinary tensor."""
    values: Callable[[], Tensor] | None = None
    """What the file must decode to, float32."""
    block: str = ""
    """Name of the model's block that it is read from; empty outside of blocks."""

    @property
    def row_bytes(self) -> int:
        """Of one row (of a vector, all of it)."""
        return gguf_package().GGML_QUANT_SIZES[self.kind][1] * self.shape[-1] // gguf_package().GGML_QUANT_SIZES[self.kind][0]

    @property
    def kind(self) -> int:
        """Number of its type in ggml."""
        return gguf_package().GGMLQuantizationType[self.type]


@dataclass(frozen=True)
class Placement:
    """How a model's tensors become tensors of the file."""

    row: Architecture
    head_size: int
    names: Callable[[str], str | None]
    """Of the file, for names of modules."""
    dtype: torch.dtype
    """Of ordinary matrices."""
    rounded_to: str | None = None
    """A type of ggml to which the package rounds modules that no type holds."""

    def name(self, source: str) -> str:
        """What a parameter is called in the file."""
        module, _, leaf = source.rpartition(".")
        found = self.names(module)
        assert found is not None, f"ggml has no name for {source}"
        return f"{found}.{leaf}"

    def rows(self, name: str, outputs: int) -> Tensor | None:
        """The order of rows in the file; None: as they are."""
        if not self.row.interleaves_rotary or not _ROTARY_ROWS.match(name):
            return None
        return torch.arange(outputs).view(-1, 2, self.head_size // 2).transpose(1, 2).flatten()


def file_tensors(model: PreTrainedModel, storage_dtype: torch.dtype, rounded_to: str | None) -> list[FileTensor]:
    """Every tensor of the file, in the order of the model; nothing is packed yet."""
    config = portable_config(model, storage_dtype)
    row = architecture_of(config["model_type"])
    assert row is not None
    placement = Placement(row, head_size(config), tensor_names(config), storage_dtype, rounded_to)
    replaced = contents_in(model, storage_dtype).modules
    found = list(_in_order(model, replaced, placement))
    factors = rope_factors(config, placement.head_size)
    return found if factors is None else [*found, _vector(FACTORS, "", factors)]


def tensor_names(config: Config) -> Callable[[str], str | None]:
    """Name of a module → ggml's, without the last part."""
    package, row = gguf_package(), architecture_of(str(config["model_type"]))
    assert row is not None
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == row.name)
    known = package.get_tensor_name_map(number, int(config["num_hidden_layers"]))
    return lambda module: known.get_name(module)


def _in_order(
    model: PreTrainedModel, replaced: Mapping[str, CompressedModule], placement: Placement
) -> Iterator[FileTensor]:
    repeated, begun = repeated_tensors(model), set[str]()
    for name in model.state_dict():
        owner = next((each for each in replaced if name.startswith(f"{each}.")), None)
        if owner is None and name not in repeated:
            yield _ordinary(model, name, placement)
        elif owner is not None and owner not in begun:
            begun.add(owner)
            yield from _replaced(owner, replaced[owner], placement)


def _replaced(name: str, module: CompressedModule, placement: Placement) -> Iterator[FileTensor]:
    form = module.expression()
    if isinstance(form, Tied):  # the reader takes the embedding's table where there is no head
        return
    in_file = placement.name(f"{name}.weight")
    outputs, inputs = form.shape
    rows = placement.rows(in_file, outputs)
    leaf = next((node for node in form.nodes() if isinstance(node, Quantized)), None)
    kind = None if leaf is None or form.dense_weight is None else gguf.block_type(leaf.tensor.grid, inputs)
    if leaf is not None and kind is not None and leaf.shape == form.shape:
        yield _codes(in_file, name, leaf.tensor, kind, rows)
    else:
        yield _matrix(in_file, name, partial(_dense, module, rows), (outputs, inputs), placement)
    bias_O = module.dense_bias()
    if bias_O is not None:
        yield _vector(placement.name(f"{name}.bias"), name, bias_O if rows is None else bias_O[rows])


def _codes(name: str, source: str, tensor: QuantizedTensor, kind: BlockType, rows: Tensor | None) -> FileTensor:
    def ordered() -> QuantizedTensor:
        return tensor if rows is None else tensor.rows(rows)

    return FileTensor(
        name,
        kind.name,
        source,
        tensor.shape,
        lambda: gguf.pack(ordered(), kind),
        ordered,
        lambda: gguf.unpack(gguf.pack(ordered(), kind), kind).dense(),
    )


def _ordinary(model: PreTrainedModel, name: str, placement: Placement) -> FileTensor:
    """A parameter as it is, rounded to the stored dtype as everywhere."""
    parameter = model.get_parameter(name)
    in_file = placement.name(name)
    rows = placement.rows(in_file, len(parameter))

    def values() -> Tensor:
        value = model.get_parameter(name).detach().to(placement.dtype)
        return value if rows is None else value[rows]

    if parameter.dim() == 1:
        offset = placement.row.norm_offset if in_file.endswith("norm.weight") else 0.0
        return _vector(in_file, name, values().float() + offset)
    return _matrix(in_file, name, values, tuple(parameter.shape), placement, rounded=False)


def _matrix(
    name: str,
    source: str,
    values: Callable[[], Tensor],
    shape: tuple[int, ...],
    placement: Placement,
    *,
    rounded: bool = True,
) -> FileTensor:
    if rounded and placement.rounded_to is not None:
        return _rounded_again(name, source, values, shape, placement.rounded_to)
    dtype = placement.dtype
    return FileTensor(
        name,
        _DENSE[dtype],
        source,
        shape,
        lambda: values().to(dtype).contiguous().view(torch.uint8),
        values=lambda: values().to(dtype).float(),
    )


def _rounded_again(
    name: str, source: str, values: Callable[[], Tensor], shape: tuple[int, ...], kind: str
) -> FileTensor:
    package = gguf_package()
    number = package.GGMLQuantizationType[kind]

    def make() -> Tensor:
        return torch.from_numpy(package.quantize(values().float().numpy(), number))

    return FileTensor(name, kind, source, shape, make)


def _vector(name: str, source: str, values_N: Tensor) -> FileTensor:
    values_N = values_N.detach().float().contiguous()
    return FileTensor(name, "F32", source, tuple(values_N.shape), lambda: values_N.view(torch.uint8)[None], values=lambda: values_N)


def _dense(module: CompressedModule, rows: Tensor | None) -> Tensor:
    weight_OI = module.dense_weight().detach()
    return weight_OI if rows is None else weight_OI[rows]
