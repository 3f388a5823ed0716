"""PEFT: a quantized model without adapters, as stock loaders read it, and beside it the adapters as PEFT reads them.

R = rank, O = outputs, I = inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Exporter, Refused, Saved, Writing
from llmcompress.exporters.bitsandbytes import BitsAndBytesExporter
from llmcompress.exporters.compressed_tensors import CompressedTensorsExporter
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.loader import linears_of_loader
from llmcompress.exporters.plain import PlainExporter
from llmcompress.model.skeleton import put_module
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.corrected import CorrectedLinear, branched
from llmcompress.records.export_report import ReadBack

FOLDER = "adapter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@EXPORTERS.register("peft")
class PeftExporter(Exporter):
    """LoRA adapters that were trained beside codes (`recover: {rank: …}`): the folder is the quantized model without
    them, `adapter/` is what PEFT loads on it."""

    runtime: ClassVar[str] = "peft"
    fix: ClassVar[str] = "set the option `base: plain`, which dequantizes"
    how_to_run: ClassVar[str] = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
as_weights = CompressedTensorsConfig(run_compressed=False)  # PEFT reads weights; None unless config.json names it
base = AutoModelForCausalLM.from_pretrained(".", dtype="auto", quantization_config=as_weights)
model = PeftModel.from_pretrained(base, "{FOLDER}")"""

    base: Literal["auto", "plain"] = "auto"
    """How the quantized model is stored. `auto`: bitsandbytes or compressed-tensors; `plain`: dequantized."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """As the format of the quantized model does."""
        return self._formats()[-1].check(site, storage_dtype)

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """The same, with the model as it is without adapters."""
        bare = without_adapters(contents)
        chosen = self._chosen(bare)
        found = {} if isinstance(chosen, str) else chosen.answers(bare)
        return {site.name: found[name] for site in contents.sites if (name := _bare(site.name, contents)) in found}

    @override
    def problem(self, contents: Contents) -> str | None:
        """There are no adapters, or they are codes themselves, or no stock format holds the model without them."""
        if not contents.modules:
            return None  # of a plan, or of a dense model
        adapters = _branches(contents.modules)
        if not adapters:
            return "it has no adapters beside codes: `recover: {rank: 16}` after a quantizer makes some"
        coded = [name for name, each in adapters.items() if not _is_dense(each)]
        if coded:
            return f"the branch of {coded[0]} is quantized, which PEFT has no adapter for"
        chosen = self._chosen(without_adapters(contents))
        return chosen if isinstance(chosen, str) else None

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """The folder of the model, and the adapter in a folder below it."""
        with _adapters_aside(model) as adapters:
            saved = self._format_of(model, writing).write(model, folder, writing)
        tensors = {
            f"base_model.model.{name}.{ours}.weight": part.detach().to(writing.storage_dtype).contiguous().clone()
            for name, pair in adapters.items()
            for ours, part in zip(("lora_A", "lora_B"), pair, strict=True)
        }
        kinds = linears_of_loader(model)
        turned = any(issubclass(kinds.get(name, nn.Linear), Conv1D) for name in adapters)
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
        settings = _config({name: len(right_RI) for name, (right_RI, _) in adapters.items()}, fan_in_fan_out=turned)
        (target / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        size = sum(each.numel() * each.element_size() for each in tensors.values())
        files = (*saved.weight_files, f"{FOLDER}/{_WEIGHTS}")
        return replace(saved, weight_files=files, tensor_bytes=saved.tensor_bytes + size, format="peft")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """The model through its format, the adapters through their names."""
        stored = load_file(folder / FOLDER / _WEIGHTS)
        with _adapters_aside(model) as adapters:
            rows = self._format_of(model, writing).read_back(model, folder, writing)
        for name, pair in adapters.items():
            for ours, part in zip(("lora_A", "lora_B"), pair, strict=True):
                key = f"base_model.model.{name}.{ours}.weight"
                differing = int((stored[key] != part.to(writing.storage_dtype)).sum())
                kind = str(writing.storage_dtype).removeprefix("torch.")
                rows.append(ReadBack(source=key, stored_as=kind, values=part.numel(), weights_differing=differing))
        return rows

    def _formats(self) -> tuple[Exporter, ...]:
        if self.base == "plain":
            return (PlainExporter(),)
        return BitsAndBytesExporter(), CompressedTensorsExporter()

    def _format_of(self, model: PreTrainedModel, writing: Writing) -> Exporter:
        chosen = self._chosen(contents_in(model, writing.storage_dtype))
        assert isinstance(chosen, Exporter), f"checked before: {chosen}"
        return chosen

    def _chosen(self, bare: Contents) -> Exporter | str:
        """The format of the model without adapters, or why none holds it."""
        why = ""
        for exporter in self._formats():
            refused = [each.why for each in exporter.answers(bare).values() if isinstance(each, Refused)]
            problem = exporter.problem(bare) or next(iter(refused), None)
            if problem is None:
                return exporter
            why = problem
        return f"PEFT's adapters need a model that stock loaders read, and without its adapters it is none: {why}"


def without_adapters(contents: Contents) -> Contents:
    """What is left when every branch is taken away."""
    branches = _branches(contents.modules)
    parts = {f"{name}.{part}" for name in branches for part in ("left", "right")}
    bare: dict[str, nn.Module] = {**contents.modules, **{name: each.base for name, each in branches.items()}}
    modules = {name: module for name, module in bare.items() if isinstance(module, CompressedModule)}
    specs = {
        name: spec["base"] if name in branches else spec
        for name, spec in contents.differences.modules.items()
        if name in modules
    }
    return replace(
        contents,
        sites=tuple(replace(site, name=_bare(site.name, contents)) for site in contents.sites),
        linears=tuple(dict.fromkeys(_bare(name, contents) for name in contents.linears if name not in parts)),
        differences=replace(contents.differences, modules=specs),
        modules=modules,
    )


def _bare(name: str, contents: Contents) -> str:
    """The name of a linear when its branch is gone."""
    owner, _, leaf = name.rpartition(".")
    return owner if leaf == "base" and owner in _branches(contents.modules) else name


def _branches(modules: Mapping[str, nn.Module]) -> dict[str, CorrectedLinear]:
    return {name: found for name, module in modules.items() if (found := branched(module)) is not None}


def _is_dense(module: CorrectedLinear) -> bool:
    return isinstance(module.left, nn.Linear) and isinstance(module.right, nn.Linear)


@contextmanager
def _adapters_aside(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While the context lasts the model has none; yields right (R×I) and left (O×R) factors by name."""
    before = _branches(dict(model.named_modules()))
    try:
        for name, module in before.items():
            put_module(model, name, module.base)
        yield {
            name: (module.right.get_parameter("weight"), module.left.get_parameter("weight"))
            for name, module in before.items()
        }
    finally:
        for name, module in before.items():
            put_module(model, name, module)


def _config(ranks: Mapping[str, int], *, fan_in_fan_out: bool) -> dict[str, object]:
    """What PEFT's `LoraConfig` is made from: its α is the rank, because our factors hold the scale already."""
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
    }
