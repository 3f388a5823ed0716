"""AOTInductor: the model compiled ahead of time for this kind of processor, and its tensors beside it.

PyTorch follows the model once (`torch.export`), Inductor writes C++ and the compiler of this computer makes a library
of it (docs/decisions/0048). Codes stay codes in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.offloading import InMemory
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.aot_inductor_file import DESCRIPTION, PROGRAM, TENSORS, read_back, write_tensors
from llmcompress.exporters.aot_inductor_graph import compile_program, field_bits, packed_linears
from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exporter, Refused, Saved, Writing
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits
from llmcompress.numerics.packing import packed_bytes
from llmcompress.records.export_report import ReadBack

MODEL_TYPES = frozenset({"gemma", "llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Families whose compiled logits were compared with PyTorch's."""
_EXPANDED = "the file holds codes, and the compiled program expands them to float32 wherever it multiplies"


@EXPORTERS.register("aot_inductor")
class AotInductorExporter(Exporter):
    """Integers of 2 to 8 bits with their scales, low-rank factors, pruned shapes; computed in float32."""

    # a shorter last group, filled with zeros to be expanded, becomes NaN when it is compiled (torch 2.13)
    limits: ClassVar[TargetLimits] = TargetLimits(integers_only=True, rounded_embedding=True, ragged_groups=False)
    runtime: ClassVar[str] = "aot_inductor"
    fix: ClassVar[str] = "use a scheme of integers with equal groups"
    how_to_run: ClassVar[str] = """import json, torch; from safetensors.torch import load_file
run, cache = torch._inductor.aoti_load_package("model.pt2"), json.load(open("aot_inductor.json"))["cache"]
run.load_constants(tensors := load_file("model.safetensors"), check_full_update=False, user_managed=True)
logits, cache = run(torch.tensor([[1, 2, 3]]), [torch.zeros(1, heads, 0, size) for heads, size in cache])
logits, cache = run(logits[:, -1:].argmax(-1), cache)  # the next token"""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Any grid of integers."""
        why = self.limits.problem(site.scheme, site.inputs)
        if why is not None:
            return Refused(why, self.limits.nearest(site.scheme, site.inputs))
        return Converted(_EXPANDED, keeps_codes=True)

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """Tables of codes too."""
        tables = {site.name: self.check(site, contents.storage_dtype) for site in contents.tables}
        return {**super().answers(contents), **tables}

    @override
    def problem(self, contents: Contents) -> str | None:
        """A family that was compared, and modules that compute the same for every input."""
        kind = contents.config.get("model_type")
        if kind is not None and kind not in MODEL_TYPES:
            return f"families that were compiled and compared are {', '.join(sorted(MODEL_TYPES))}; `{kind}` is not"
        if contents.banks:
            return f"{contents.banks[0]} is one of the experts of a bank, which is not compiled"
        wrapped = [name for name, module in contents.modules.items() if module.wraps_original]
        return f"{wrapped[0]} runs code around an ordinary module, which is not compiled" if wrapped else None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What is wider than its codes, and where the library runs."""
        wide = {
            f"{site.scheme.name}: codes of {site.scheme.weights.bits} bits are stored in {field_bits(site.scheme)}"
            for site in contents.sites
            if field_bits(site.scheme) != site.scheme.weights.bits
        }
        return [
            *dict.fromkeys(each.why for each in answers.values() if isinstance(each, Converted)),
            *sorted(wide),
            "the library runs on processors with the vector instructions of this one, with the same version of torch",
        ]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Its fields; everything dense is float32."""
        grid, bits = site.scheme.weights, field_bits(site.scheme)
        scales = grid.scale_shape(site.outputs, site.inputs)
        codes: Kind = (torch.uint8, (site.outputs, packed_bytes(site.inputs, bits)))
        zeros: dict[str, Kind] = {} if grid.symmetric else {"zero_OG": (torch.int8, scales)}
        bias: dict[str, Kind] = {"bias": (torch.float32, (site.outputs,))} if site.has_bias else {}
        return {"codes": codes, "scale_OG": (torch.float32, scales), **zeros, **bias}

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """`model.pt2`, its tensors in `model.safetensors`, and the config."""
        if not isinstance(writing.weights_at, InMemory):
            raise CompressError(
                "export.memory",
                "a model is compiled in memory, and its weights are on disk",
                fix="set `offload: never`, or export the finished folder",
                exit_code=ExitCode.REFUSED,
            )
        folder.mkdir(parents=True, exist_ok=True)
        with packed_linears(model):
            program = compile_program(model, folder / PROGRAM)
            size = write_tensors(program, folder)
        (folder / DESCRIPTION).write_text(json.dumps({"cache": program.cache}) + "\n", encoding="utf-8")
        config = portable_config(model, writing.storage_dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return Saved((PROGRAM, TENSORS), size, "aot_inductor")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Every tensor that the library asks for, under its name."""
        with packed_linears(model):
            return read_back(model, folder)
