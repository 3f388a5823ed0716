"""The tensors of a GGUF file: under ggml's names, in the order of rows and with the offsets that llama.cpp expects.

O = outputs, I = inputs, N = numbers of a vector.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.exporters.checkpoint import block_of, owner_of, repeated_tensors
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.gguf_architectures import Architecture, Config, architecture_of, head_size
from llmcompress.exporters.gguf_experts import bank_of, stacks_of
from llmcompress.exporters.gguf_package import gguf_package
from llmcompress.exporters.gguf_rope import FACTORS, rope_factors
from llmcompress.formats import gguf
from llmcompress.formats.gguf import BlockType
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression import Expression, Gather, Tied
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.numerics.quantized import QuantizedTensor

_ROTARY_ROWS = re.compile(r"blk\.\d+\.attn_[qk]\.")
_ROUTER = re.compile(r"\.ffn_gate_inp(_shexp)?\.weight")
DENSE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""What ordinary matrices are stored as; vectors are float32, in which every one of them is exact."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file; its numbers are made when they are asked for."""

    name: str
    """In the file."""
    type: str
    """As ggml calls it."""
    source: str
    """Parameter, or module that stands in the place of one, whose numbers it holds."""
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Its bytes, uint8: rows × bytes of a row."""
    codes: Callable[[], QuantizedTensor] | None = None
    """What is stored unchanged, rows in the file's order; None of ordinary weights."""
    values: Callable[[], Tensor] | None = None
    """What a reader must get, float32; None where weights are rounded a second time."""


@dataclass(frozen=True)
class Placement:
    """How a model's tensors become tensors of the file."""

    row: Architecture
    head_size: int
    names: Callable[[str], str | None]
    """Of the file, for names of modules."""
    dtype: torch.dtype
    """Of ordinary matrices."""
    rounded_to: str | None
    """A type of ggml to which modules are rounded that no type holds; None: they are stored as ordinary weights."""
    ternary: BlockType
    """Of ternary codes."""

    def name(self, source: str) -> str:
        """What a parameter is called in the file."""
        module, _, leaf = source.rpartition(".")
        found = self.names(module)
        assert found is not None, f"ggml has no name for {source}"
        return f"{found}.{leaf}"

    def of_block(self, module: str) -> str:
        """What the block of a module is called in the file."""
        return f"blk.{block_of(module).rstrip('.').rpartition('.')[2]}"

    def rows(self, name: str, outputs: int) -> Tensor:
        """The order of rows in the file."""
        if self.row.interleaves_rotary and _ROTARY_ROWS.match(name):
            return torch.arange(outputs).view(-1, 2, self.head_size // 2).transpose(1, 2).flatten()
        return torch.arange(outputs)


def file_tensors(
    model: PreTrainedModel, storage_dtype: torch.dtype, rounded_to: str | None, ternary: BlockType
) -> list[FileTensor]:
    """Every tensor of the file, in the order of the model; nothing is packed yet."""
    config = portable_config(model, storage_dtype)
    row = architecture_of(str(config["model_type"]))
    assert row is not None
    placement = Placement(row, head_size(config), tensor_names(config), storage_dtype, rounded_to, ternary)
    found = list(_in_order(model, contents_in(model, storage_dtype).modules, placement))
    factors = rope_factors(config, placement.head_size)
    return found if factors is None else [*found, _vector(FACTORS, "", factors)]


def tensor_names(config: Config) -> Callable[[str], str | None]:
    """Name of a module → ggml's, without the last part; None where ggml has none."""
    package, row = gguf_package(), architecture_of(str(config["model_type"]))
    assert row is not None
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == row.name)
    known = package.get_tensor_name_map(number, int(config["num_hidden_layers"]))

    def named(module: str) -> str | None:
        found: str | None = known.get_name(module)
        return found

    return named


def code_table(form: Expression) -> Quantized | None:
    """The codes of an expression that is nothing else, or a look-up among them."""
    inner = form.table if isinstance(form, Gather) else form
    return inner if isinstance(inner, Quantized) else None


def _in_order(
    model: PreTrainedModel, replaced: Mapping[str, CompressedModule], placement: Placement
) -> Iterator[FileTensor]:
    repeated, begun = repeated_tensors(model), set[str]()
    for name in model.state_dict():
        bank = bank_of(name)
        if bank is not None:
            if bank not in begun:
                begun.add(bank)
                yield from _experts(model, bank, placement)
            continue
        owner = owner_of(name, replaced)
        if owner is None and name not in repeated:
            yield _ordinary(model, name, placement)
        elif owner is not None and owner not in begun:
            begun.add(owner)
            yield from _replaced(owner, replaced[owner], placement)


def _replaced(name: str, module: CompressedModule, placement: Placement) -> Iterator[FileTensor]:
    form = module.expression()
    if isinstance(form, Tied):  # readers take the embedding's table where there is no head
        return
    in_file = placement.name(f"{name}.weight")
    rows_O, codes = placement.rows(in_file, form.shape[0]), code_table(form)
    kind = None if codes is None else gguf.block_type(codes.tensor.grid, form.shape[1], placement.ternary)
    if codes is not None and kind is not None:
        yield _codes(in_file, name, codes.tensor, kind, rows_O)
    else:
        yield _matrix(in_file, name, form.shape, lambda: module.dense_weight().detach()[rows_O], placement)
    bias_O = module.dense_bias()
    if bias_O is not None:
        yield _vector(placement.name(f"{name}.bias"), name, bias_O[rows_O])


def _experts(model: PreTrainedModel, bank: str, placement: Placement) -> Iterator[FileTensor]:
    """Three tensors for all experts of a block."""
    for stack in stacks_of(model.get_submodule(bank)):
        in_file = f"{placement.of_block(bank)}.ffn_{stack.kind}_exps.weight"
        codes = stack.codes
        kind = None if codes is None else gguf.block_type(codes.grid, stack.shape[-1], placement.ternary)
        if codes is not None and kind is not None:
            rows_O = torch.arange(len(codes.codes))
            yield replace(_codes(in_file, f"{bank}.*.{stack.kind}", codes, kind, rows_O), shape=stack.shape)
        else:
            yield _matrix(in_file, f"{bank}.*.{stack.kind}", stack.shape, stack.dense, placement)


def _codes(name: str, source: str, tensor: QuantizedTensor, kind: BlockType, rows_O: Tensor) -> FileTensor:
    def ordered() -> QuantizedTensor:
        return tensor.rows(rows_O)

    def make() -> Tensor:
        return gguf.pack(ordered(), kind)

    return FileTensor(name, kind.name, source, tensor.shape, make, ordered, lambda: gguf.unpack(make(), kind).dense())


def _ordinary(model: PreTrainedModel, name: str, placement: Placement) -> FileTensor:
    """A parameter, rounded to the stored dtype like everything that stays dense."""
    parameter, in_file = model.get_parameter(name), placement.name(name)
    rows_O = placement.rows(in_file, len(parameter))

    def values() -> Tensor:
        stored: Tensor = model.get_parameter(name).detach().to(placement.dtype)
        return stored[rows_O]

    if _ROUTER.search(in_file):  # in 16 bits near-ties would choose other experts
        return _dense(in_file, name, tuple(parameter.shape), lambda: values().float(), torch.float32)
    if parameter.dim() == 1:
        offset = placement.row.norm_offset if in_file.endswith("norm.weight") else 0.0
        return _vector(in_file, name, values().float() + offset)
    return _dense(in_file, name, tuple(parameter.shape), values, placement.dtype)


def _matrix(
    name: str, source: str, shape: tuple[int, ...], values: Callable[[], Tensor], placement: Placement
) -> FileTensor:
    """A module that no type holds, as the exporter's option says."""
    kind = placement.rounded_to
    if kind is None:
        return _dense(name, source, shape, values, placement.dtype)
    package = gguf_package()

    def make() -> Tensor:
        return torch.from_numpy(package.quantize(values().float().numpy(), package.GGMLQuantizationType[kind]))

    return FileTensor(name, kind, source, shape, make)


def _dense(
    name: str, source: str, shape: tuple[int, ...], values: Callable[[], Tensor], dtype: torch.dtype
) -> FileTensor:
    def make() -> Tensor:
        return values().to(dtype).contiguous().view(torch.uint8)

    return FileTensor(name, DENSE[dtype], source, shape, make, values=lambda: values().to(dtype).float())


def _vector(name: str, source: str, values_N: Tensor) -> FileTensor:
    stored_N = values_N.detach().float().contiguous()
    return FileTensor(
        name, "F32", source, tuple(stored_N.shape), lambda: stored_N.view(torch.uint8), values=lambda: stored_N
    )
