"""Plain checkpoints: every replaced module is converted to ordinary weights, which any loader
reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exporter, Refused, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.folder_read_back import read_folder_back
from llmcompress.exporters.loader import linears_of_loader
from llmcompress.formats import plain
from llmcompress.modules.limits import TargetLimits
from llmcompress.records.export_report import ReadBack


@EXPORTERS.register("plain")
class PlainExporter(Exporter):
    """Weights are rounded to the stored dtype exactly as the model itself does when it is cast to that dtype.

    A loader that uses this dtype therefore gets the same logits bit for bit; in float32, products of codes and scales
    are exact.
    """

    limits: ClassVar[TargetLimits] = TargetLimits(rounded_inputs=False, super_blocks=True)
    fix: ClassVar[str] = "set `save.format: auto`"

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Any grid is dequantized."""
        why = self.limits.problem(site.scheme, site.inputs)
        return Converted("plain format") if why is None else Refused(why, self.limits.nearest(site.scheme, site.inputs))

    @override
    def problem(self, contents: Contents) -> str | None:
        """Ordinary weights cannot represent other sizes, wrapped modules, or dynamic inference."""
        if contents.rearranged:
            return f"no config of this model family can represent {', '.join(contents.rearranged[:3])}"
        sites = {site.name for site in contents.sites}
        others = {name: module for name, module in contents.modules.items() if name not in sites}
        rounding = [name for name, module in others.items() if not module.expression().is_linear]
        return f"{rounding[0]} quantizes activations or depends on them (dynamic inference)" if rounding else None

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints."""
        return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """An ordinary folder."""
        dtype, modules = writing.storage_dtype, contents_in(model, writing.storage_dtype).modules
        turned = {name for name, kind in linears_of_loader(model).items() if issubclass(kind, Conv1D)}
        replaced = {
            name: partial(plain.pack, module, dtype, transposed=name in turned) for name, module in modules.items()
        }
        files, size = write_model(model, folder, portable_config(model, dtype), replaced, writing)
        return Saved(files, size, "plain", dict.fromkeys(modules, "plain format"))
