"""Our own format, for what no other format can represent: a config with our manifest, read by our plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Exact, Exporter, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.folder_read_back import read_folder_back
from llmcompress.formats import packed
from llmcompress.formats.named import Kind
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.records.export_report import ReadBack

METHOD = "llmcompress"
VERSION = 1


@EXPORTERS.register(METHOD)
class ManifestExporter(Exporter):
    """Codes without padding; `from_pretrained` loads the folder after `import llmcompress` and refuses it otherwise."""

    limits: ClassVar[TargetLimits] = TargetLimits(rounded_embedding=True, super_blocks=True)
    fix: ClassVar[str] = 'exclude the experts with `exclude: "*.experts.*"`, or use integer or fp8 schemes for them'

    how_to_run: ClassVar[str] = f"import llmcompress\n{Exporter.how_to_run}"

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Every grid that there is."""
        return Exact()

    @override
    def problem(self, contents: Contents) -> str | None:
        """The plug-in builds no experts."""
        where = f" ({contents.banks[0]})" if contents.banks else ""
        reason = "transformers 5 loads compressed experts only from plain and compressed-tensors folders"
        return reason + where if contents.banks else None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Who can load it."""
        return ["codes are stored without padding, and the model loads only after `import llmcompress`"]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Codes, scales, zero points and bias."""
        return packed.tensors((site.outputs, site.inputs), site.scheme, storage_dtype, bias=site.has_bias)

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints."""
        return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """A folder whose config says how the model differs from the stock model."""
        dtype, found = writing.storage_dtype, contents_in(model, writing.storage_dtype).differences
        config = portable_config(model, dtype)
        config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, **found.to_json()}
        replaced = {name: partial(packed_codes, site, dtype) for name, site in quantized_linears(model).items()}
        files, size = write_model(model, folder, config, replaced, writing)
        return Saved(files, size, METHOD)


def packed_codes(site: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantized linear in our own format."""
    (codes,) = (node for node in site.expression().nodes() if isinstance(node, Quantized))
    return packed.pack(codes, dtype)
