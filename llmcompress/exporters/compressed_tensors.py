"""compressed-tensors checkpoints: they load in stock transformers and vLLM, without llmcompress.

How the loaders were found to behave: docs/decisions/0004-saved-formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.cache_scheme import stock_attention
from llmcompress.exporters.checkpoint import name_on_disk, write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import EXPERTS, CodedLinear, Contents, contents_in
from llmcompress.exporters.folder_read_back import read_folder_back
from llmcompress.exporters.loader import linears_of_loader
from llmcompress.exporters.quantization_config import NamedCodes, numbered, quantization_config
from llmcompress.formats import compressed_tensors, plain
from llmcompress.formats.compressed_tensors import Layout, ZeroPoints, can_name, layout_of
from llmcompress.formats.named import Kind
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.limits import TargetLimits, group_of
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.records.export_report import ReadBack

_MIXED = "transformers 5 supports one scheme for all experts, and these use several"
_MERGED = "transformers 5 loads no compressed-tensors model unless all experts are integers or fp8 of one scheme"


@EXPORTERS.register("compressed-tensors")
class CompressedTensorsExporter(Exporter):
    """Sites that the format cannot represent are dequantized; if no other is left, the folder is a plain one."""

    limits: ClassVar[TargetLimits] = TargetLimits(ragged_groups=False)
    fix: ClassVar[str] = "exclude these sites with `exclude`, or set `save.format: auto`"

    zero_points: ZeroPoints = "folded"
    """Of 2- and 4-bit asymmetric grids."""
    multiplies_out: bool = False
    """What it cannot hold becomes an ordinary weight, where that computes the same; otherwise it is refused."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid, its sizes, and the class that loaders build there."""
        if not can_name(site.scheme):
            return Refused(f"compressed-tensors cannot represent {site.scheme.name}")
        if self._layout(site).packs_floats and not site.packable:
            return self._instead(site, "transformers 5 cannot load packed codes into a subclass of nn.Linear")
        if not site.is_linear:
            return self._instead(site, "compressed-tensors supports only nn.Linear, and this is a Conv1D")
        why = self.limits.problem(site.scheme, site.inputs)
        return Exact(_doubt(site, storage_dtype)) if why is None else self._instead(site, why)

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """transformers 5 reads all experts with the scheme of the first, and only codes where it makes a bank."""
        found = super().answers(contents)
        named = [site for site in contents.sites if can_name(site.scheme)]
        experts = [site for site in named if EXPERTS in site.name]
        kinds = {(self._layout(each), group_of(each.scheme, each.inputs), each.scheme.activations) for each in experts}
        banked = {each.name for each in experts if len(kinds) == 1 and self._joins_a_bank(each, found[each.name])}
        all_banked = banked and banked == {name for name in contents.linears if EXPERTS in name}
        for site in named:
            if contents.merges_experts and not all_banked:
                found[site.name] = self._instead(site, _MERGED)
            elif len(kinds) > 1 and site in experts and isinstance(found[site.name], Exact):
                found[site.name] = self._instead(site, _MIXED)
        return found

    @override
    def problem(self, contents: Contents) -> str | None:
        """It can represent quantized linears of stock sizes, and quantized caches."""
        others = contents.more_than_quantized
        return f"it can represent quantized linears only, not {others[0]}" if others else None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Which sites are dequantized, and which codes are padded."""
        dense = [
            f"{name}: {answer.why}; saved as dequantized weights"
            for name, answer in answers.items()
            if isinstance(answer, Converted)
        ]
        coded = [site for site in contents.sites if isinstance(answers[site.name], Exact)]
        return dense + list(dict.fromkeys(note for site in coded if (note := _note(site, self._layout(site)))))

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Codes, scales, zero points and bias."""
        shape, layout = (site.outputs, site.inputs), self._layout(site)
        return compressed_tensors.tensors(shape, site.scheme, layout, storage_dtype, bias=site.has_bias)

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints; the files name attentions as the stock model does."""
        with stock_attention(model, writing.storage_dtype):
            return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """An ordinary Hugging Face folder whose quantized linears are codes and scales."""
        with stock_attention(model, writing.storage_dtype) as cache:
            return self._write(model, folder, writing, cache)

    def _write(self, model: PreTrainedModel, folder: Path, writing: Writing, cache: QuantizationArgs | None) -> Saved:
        contents, dtype = contents_in(model, writing.storage_dtype), writing.storage_dtype
        answers = self.answers(contents)
        coded = {site.name: site for site in contents.sites if isinstance(answers[site.name], Exact)}
        config = portable_config(model, dtype)
        if coded or cache:
            config["quantization_config"] = self._config(model, coded, writing, cache)
        turned = {name for name, kind in linears_of_loader(model).items() if issubclass(kind, Conv1D)}
        replaced: dict[str, Callable[[], dict[str, Tensor]]] = {
            name: partial(_coded_tensors, module, self._layout(coded[name]), dtype)
            if name in coded
            else partial(plain.pack, module, dtype, transposed=name in turned)
            for name, module in quantized_linears(model).items()
        }
        files, size = write_model(model, folder, config, replaced, writing)
        dense = {name: answer.why for name, answer in answers.items() if isinstance(answer, Converted)}
        return Saved(files, size, "compressed-tensors" if coded or cache else "plain", dense)

    def _config(
        self,
        model: PreTrainedModel,
        coded: Mapping[str, CodedLinear],
        writing: Writing,
        cache: QuantizationArgs | None,
    ) -> dict[str, Any]:
        flat: set[str] = set()
        if coded:
            with writing.weights_at.running(model, model.device):
                flat = _flat_inputs(model, [name for name, site in coded.items() if site.scheme.activations == "token"])
        # experts have other names on disk than as modules of transformers 5
        named = [
            NamedCodes(name_on_disk(model, name), site.scheme, self._layout(site), site.inputs)
            for name, site in coded.items()
        ]
        return quantization_config(named, {name_on_disk(model, name) for name in flat}, linears_of_loader(model), cache)

    def _layout(self, site: CodedLinear) -> Layout:
        return layout_of(site.scheme, packable=site.packable, zero_points=self.zero_points)

    def _instead(self, site: CodedLinear, why: str) -> Answer:
        """Quantized activations cannot be dequantized into weights."""
        if self.multiplies_out and site.scheme.activations is None:
            return Converted(why)
        return Refused(why, self.limits.nearest(site.scheme, site.inputs) if site.is_linear else None)

    def _joins_a_bank(self, site: CodedLinear, answer: Answer) -> bool:
        """Whether transformers 5 makes an expert part of a bank of codes."""
        whole = self._layout(site).format in ("pack-quantized", "float-quantized")
        return whole and site.scheme.activations is None and isinstance(answer, Exact)


def _doubt(site: CodedLinear, storage_dtype: torch.dtype | None) -> str | None:
    scheme = site.scheme
    if scheme.activations == "group" and scheme.measures_inputs:
        return f"transformers 4 and 5 quantize the activations of {scheme.name} differently"
    if scheme.weights.scales.bits is not None and storage_dtype not in (None, torch.bfloat16):
        kind = str(storage_dtype).removeprefix("torch.")
        return f"stock loaders dequantize {scheme.name} to bfloat16 only, and these weights are {kind}"
    return None


def _note(site: CodedLinear, layout: Layout) -> str | None:
    """What a user would be surprised by."""
    scheme = site.scheme
    if scheme.weights.scales.bits is not None:
        return f"{scheme.name}: stock loaders dequantize to bfloat16; any other `save.dtype` uses our manifest"
    if layout.packs_zero_points:
        return (
            f"{scheme.name}: zero points are packed; transformers 5 with compressed-tensors 0.18 to 0.20 loads them "
            "only with `quantization_config=CompressedTensorsConfig(dequantize=True)`"
        )
    if layout.bits_on_disk == scheme.weights.bits:
        return None
    field = f"{layout.bits_on_disk}-bit fields, the narrowest that all supported loaders read"
    note = f"{scheme.name}: codes are stored in {field}"
    if scheme.weights.symmetric or scheme.weights.bits == 3:
        return f"{note}; `save.format: llmcompress` stores them without padding"
    return f"{note} (see `save.zero_points`)"


def _coded_tensors(module: CompressedModule, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = module.expression()
    assert isinstance(codes, Quantized)
    return compressed_tensors.pack(codes, layout, dtype)


@torch.no_grad()
def _flat_inputs(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Linears whose inputs come as tokens × channels (experts, OPT), seen in one forward of four tokens.

    An expert that no token reached is taken to be like its siblings.
    """
    names = list(names)
    seen: set[str] = set()

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dim() == 2:
            seen.add(numbered(name))

    if not names:
        return set()
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(partial(note, name)).remove)
        model(input_ids=torch.tensor([[0, 1], [1, 0]], device=model.device), use_cache=False)
    return {name for name in names if numbered(name) in seen}
