"""Archives: our own format with every tensor entropy-coded, for transfer; our plug-in unpacks it while it loads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import Contents, contents_in
from llmcompress.exporters.manifest import METHOD, VERSION, ManifestExporter, packed_codes
from llmcompress.formats import archive
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.quant_linear import quantized_linears


@EXPORTERS.register("archive")
class ArchiveExporter(ManifestExporter):
    """Smallest to send and to keep; in memory the model is as large as it was: codes packed, ordinary weights dense.

    Plans count tensors as they are before the entropy coder, whose gain is not known beforehand.
    """

    limits: ClassVar[TargetLimits] = TargetLimits(rounded_embedding=True)
    fix: ClassVar[str] = 'exclude the experts with `exclude: "*.experts.*"`'

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Who can load it."""
        return ["tensors are entropy-coded for transfer; the model loads only after `import llmcompress`"]

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
