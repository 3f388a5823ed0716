"""Saves codes of bitsandbytes as transformers itself would; stock transformers loads the folder without us."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.export.base import Saved
from llmcompress.export.checkpoint import linears_of_loader, write_model
from llmcompress.export.config import portable_config
from llmcompress.modules.bnb_linear import OUTLIER, BnbLinear, Kind

METHOD = "bitsandbytes"


def bnb_sites(model: nn.Module) -> dict[str, BnbLinear]:
    """Full name → module of everything that holds such codes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BnbLinear)}


def save_bitsandbytes(
    model: PreTrainedModel, folder: Path, *, storage_dtype: torch.dtype, max_shard_size: str
) -> Saved:
    """Write a folder in transformers' own words; linears that hold no codes are named as skipped.

    Raises: CompressError when both kinds are in one model: the format has words for one.
    """
    sites = bnb_sites(model)
    kinds = {site.kind for site in sites.values()}
    if len(kinds) > 1:
        raise CompressError(
            "save.format",
            "a folder of bitsandbytes holds nf4 or int8, not both",
            where=", ".join(sorted(kinds)),
            fix="use one of bnb_nf4 and bnb_int8",
            saved="all finished work",
        )
    config = portable_config(model, storage_dtype)
    dense = sorted(linears_of_loader(model).keys() - sites.keys())
    config["quantization_config"] = _config(kinds.pop(), dense, storage_dtype)
    files, size = write_model(
        model,
        folder,
        config,
        {name: partial(_tensors, site, storage_dtype) for name, site in sites.items()},
        storage_dtype=storage_dtype,
        max_shard_size=max_shard_size,
    )
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
