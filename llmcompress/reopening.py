"""Opens a saved folder for an export: every quantized linear holds its codes and scales again, bit for bit.

Stock loaders restore weights from compressed-tensors; here the codes are put back instead.
"""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.evaluation.checkpoint_codes import CodedSite, StoredCodes, codes_in
from llmcompress.exporting import Exportable
from llmcompress.loading.config import read_config
from llmcompress.loading.generation import read_generation_config
from llmcompress.loading.gguf_conversion import as_ordinary
from llmcompress.loading.load import load
from llmcompress.loading.match import empty_model
from llmcompress.loading.quiet import quiet_transformers
from llmcompress.loading.source import find_source
from llmcompress.loading.tensors import Tensors
from llmcompress.loading.tokenizer import read_tokenizer
from llmcompress.model.skeleton import put_module
from llmcompress.modules.quant_linear import QuantLinear, as_bits
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.quantized import QuantizedTensor, unfolded
from llmcompress.records.report import RECIPE, REPORT, read_report

_BESIDE = (RECIPE, REPORT)


def reopen(model: str) -> Exportable:
    """A folder that `compress` saved, a folder of compressed-tensors, or any dense model, in float32 on the CPU.

    Raises: CompressError when there is no such model, or it is stored in a format whose codes are not read.
    """
    source = find_source(model)
    config, _ = read_config(source.folder, may_be_quantized=True)
    generation_config, _ = read_generation_config(source.folder, config)
    stored = codes_in(source.folder)
    beside = {name: source.folder / name for name in _BESIDE if (source.folder / name).is_file()}
    return Exportable(
        model=_opened(stored, config),
        tokenizer=read_tokenizer(source.folder, config),
        name=read_report(beside[REPORT]).model if REPORT in beside else source.name,
        storage_dtype=_stored_dtype(config),
        generation_config=generation_config,
        source_folder=source.folder,
        beside={name: path.read_text(encoding="utf-8") for name, path in beside.items()},
    )


def _opened(stored: StoredCodes, config: PretrainedConfig) -> PreTrainedModel:
    if stored.format == "compressed-tensors":
        return _with_codes(stored, config)
    if stored.format not in ("plain", "llmcompress"):
        raise CompressError(
            "export.format",
            f"the codes of a {stored.format} folder are not read",
            where=str(stored.folder),
            fix="give the folder that `compress` saved, or compress the dense model with a pass such as gptq",
        )
    model = load(stored.folder, dtype=torch.float32).model
    as_ordinary(model)  # our quantizer only reads: what it built are modules of ours
    return model


@torch.no_grad()
def _with_codes(stored: StoredCodes, config: PretrainedConfig) -> PreTrainedModel:
    """The stock model, loaded from dequantized weights, and then with codes in their places."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    read, sites = Tensors(), [site for site in stored.coded if isinstance(site, CodedSite)]
    state = {tensor.name: read(tensor).float() for tensor in stored.dense}
    codes = {site.name: _codes(site, read) for site in sites}
    weights = {f"{name}.weight": linear.dense_weight() for name, linear in codes.items()}
    with quiet_transformers():
        kind = type(empty_model(plain))
        model: PreTrainedModel = kind.from_pretrained(
            None, config=plain, state_dict={**state, **weights}, dtype=torch.float32
        )
    for name, linear in codes.items():
        try:
            linear.bias = getattr(model.get_submodule(name), "bias", None)
        except AttributeError as problem:
            raise CompressError(
                "export.format",
                f"transformers has no module for the codes of {name}: experts are stored under other names",
                where=str(stored.folder),
                fix="export right after `compress`, with `.export(...)`",
            ) from problem
        put_module(model, name, linear)
    return model.eval()


def _codes(site: CodedSite, read: Tensors) -> QuantLinear:
    found = {name: read(tensor) for name, tensor in site.tensors.items()}
    tensor = site.unpack(site, {name: each for name, each in found.items() if not name.startswith("input_")})
    scheme = site.scheme or Scheme(tensor.grid)
    tensor = _on_grid(tensor, scheme)
    fixed = found.get("input_scale", found.get("input_global_scale"))
    if fixed is not None:
        fixed = as_bits(fixed) if scheme.activations == "group" else fixed.float()
    shared = None if tensor.shared_scale is None else as_bits(tensor.shared_scale)
    return QuantLinear(scheme, tensor.codes, tensor.scale.float(), tensor.zero_point, None, fixed, shared)


def _on_grid(tensor: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """On the grid that made it: files hold its codes in wider fields, or less their zero points."""
    grid = scheme.weights
    if grid.symmetric or not tensor.grid.symmetric:
        return QuantizedTensor(tensor.codes, tensor.scale, tensor.zero_point, tensor.shared_scale, grid)
    return unfolded(tensor, grid)


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    stated = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return stated if isinstance(stated, torch.dtype) else getattr(torch, str(stated))
