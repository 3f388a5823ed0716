"""Archives: our own format with every tensor entropy-coded, for transfer; our plug-in unpacks it while it loads."""

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
from llmcompress.exporters.manifest import METHOD, VERSION, packed_codes
from llmcompress.formats import archive, packed
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.records.export_report import ReadBack


@EXPORTERS.register("archive")
class ArchiveExporter(Exporter):
    """Smallest to send and to keep; in memory the model is as large as it was: codes packed, ordinary weights dense."""

    limits: ClassVar[TargetLimits] = TargetLimits(rounded_embedding=True)
    fix: ClassVar[str] = 'exclude the experts with `exclude: "*.experts.*"`'
    how_to_run: ClassVar[str] = f"import llmcompress\n{Exporter.how_to_run}"

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Every grid that there is."""
        return Exact()

    @override
    def problem(self, contents: Contents) -> str | None:
        """The plug-in builds no experts."""
        where = f" ({contents.banks[0]})" if contents.banks else ""
        return f"transformers 5 loads experts only from plain and compressed-tensors folders{where}" if where else None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Who can load it."""
        return ["tensors are entropy-coded for transfer; the model loads only after `import llmcompress`"]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """As they are before the entropy coder, whose gain is not known beforehand."""
        return packed.tensors((site.outputs, site.inputs), site.scheme, storage_dtype, bias=site.has_bias)

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints, which unpack."""
        return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """A folder whose config says how the model differs from the stock model, and how long every tensor is."""
        dtype, found = writing.storage_dtype, contents_in(model, writing.storage_dtype).differences
        config, sizes, unpacked = portable_config(model, dtype), dict[str, int](), list[int]()
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            **found.to_json(),
            "archive": sizes,  # filled while tensors are written; the config is written last
        }

        def encode(name: str, tensor: Tensor) -> Tensor:
            made = archive.pack(tensor)
            sizes[name] = made.numel()
            unpacked.append(tensor.nbytes)
            return made

        replaced = {name: partial(packed_codes, site, dtype) for name, site in quantized_linears(model).items()}
        files, size = write_model(model, folder, config, replaced, writing, encode=encode)
        return Saved(files, size, METHOD, unpacked_bytes=sum(unpacked))
