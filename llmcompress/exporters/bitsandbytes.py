"""bitsandbytes checkpoints as transformers itself saves them; stock transformers loads them without llmcompress."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Exporter, Refused, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.loader import linears_of_loader
from llmcompress.modules.base import MODULES
from llmcompress.modules.bnb_linear import OUTLIER, BnbLinear, Kind, bnb_linears

METHOD = "bitsandbytes"


@EXPORTERS.register(METHOD)
class BitsAndBytesExporter(Exporter):
    """For models whose replaced linears all use bitsandbytes, of one kind; the others are listed as skipped."""

    fix: ClassVar[str] = "use one of bnb_nf4 and bnb_int8"

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Only the package makes its codes."""
        return Refused(f"bitsandbytes cannot store {site.scheme.name}, only its own formats")

    @override
    def problem(self, contents: Contents) -> str | None:
        """There is anything else, or there are both kinds."""
        found = contents.differences
        others = [name for name, spec in found.modules.items() if spec["type"] != MODULES.name_of(BnbLinear)]
        others += [*found.shapes, *found.attributes]
        if others or not found.modules:
            return (
                f"{others[0]} is not a plain linear quantized with bitsandbytes"
                if others
                else "no linear is quantized with bitsandbytes"
            )
        kinds = {spec["kind"] for spec in found.modules.values()}
        return f"one checkpoint can use {' or '.join(sorted(kinds))}, not both" if len(kinds) > 1 else None

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """A folder in transformers' own words."""
        dtype, sites = writing.storage_dtype, bnb_linears(model)
        kind = next(site.kind for site in sites.values())
        config = portable_config(model, dtype)
        config["quantization_config"] = _config(kind, sorted(linears_of_loader(model).keys() - sites.keys()), dtype)
        replaced = {name: partial(_tensors, site, dtype) for name, site in sites.items()}
        files, size = write_model(model, folder, config, replaced, writing)
        return Saved(files, size, METHOD)


def _tensors(site: BnbLinear, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    bias = {} if site.bias is None else {"bias": site.bias.detach().to(storage_dtype)}
    return {**site.tensors_on_disk(), **bias}


def _config(kind: Kind, skipped: list[str], storage_dtype: torch.dtype) -> dict[str, Any]:
    """What `BitsAndBytesConfig.to_dict` gives, with what the linears were made with."""
    four = kind == "nf4"
    return {
        "quant_method": METHOD,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": str(storage_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": OUTLIER,
    }
