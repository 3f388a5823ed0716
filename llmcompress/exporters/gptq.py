"""GPTQ checkpoints: a Hugging Face folder that vLLM, GPTQModel, SGLang and transformers (through GPTQModel) load.

All linears of a file share a group size where their own are multiples of it: scales are repeated, and loaders that
merge q, k and v find the same layout in each (docs/decisions/0039).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import EXPERTS, CodedLinear, Contents, contents_in
from llmcompress.exporters.folder_read_back import read_folder_back
from llmcompress.exporters.loader import linears_of_loader
from llmcompress.exporters.quantization_config import name_patterns
from llmcompress.formats import gptq, plain
from llmcompress.formats.gptq import Layout, Version
from llmcompress.formats.named import Kind
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.limits import TargetLimits, group_of
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.quantized import error_in_steps
from llmcompress.records.export_report import ReadBack

_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""That GPTQModel accepts."""
_MULTIPLE = 32
"""Of inputs and outputs: what fills whole words at every width."""
_MOST_STEPS = 1 / 16
"""Float16 scales may move a weight by this share of a step; more is refused. Rounding itself moves it by up to 1/2."""


@EXPORTERS.register("gptq")
class GptqExporter(Exporter):
    """Integers of 2 to 8 bits in fields of 2, 3, 4 or 8, with zero points where the grid has them."""

    limits: ClassVar[TargetLimits] = TargetLimits(
        groups=frozenset(_GROUPS), ragged_groups=False, integers_only=True, rounded_inputs=False
    )
    runtime: ClassVar[str] = "gptqmodel"
    fix: ClassVar[str] = "export it to `compressed-tensors`, which vLLM and transformers load too"
    how_to_run: ClassVar[
        str
    ] = """# pip install vllm    (or `gptqmodel`: transformers then loads the folder as well, on CPUs too)
from vllm import LLM, SamplingParams
model = LLM(".")
print(model.generate("The", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text)"""

    version: Literal["auto", 1, 2] = "auto"
    """Of the checkpoint format. 1 stores zero points less one, which GPTQModel reads from other tools only where they
    are all equal; `auto` takes 2 for grids with zero points."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid and its sizes; what scales and zero points are is only known of a live model."""
        why = self._problem(site)
        if why is None:
            return Exact()
        grid = site.scheme.weights
        integers = site.scheme if grid.number is None else Scheme(Grid(grid.bits, True, grid.group))
        return Refused(why, self.limits.nearest(integers, site.inputs))

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """With the groups of all linears, and the scales and zero points of a live model."""
        tables = {site.name: Refused("its loaders read no embedding in codes") for site in contents.tables}
        found = super().answers(contents) | tables
        layouts = self._layouts(contents)
        for site in contents.sites:
            if isinstance(found[site.name], Refused):
                continue
            if layouts[site.name].group == 1:
                groups = sorted({group_of(each.scheme, each.inputs) or each.inputs for each in contents.sites})
                found[site.name] = Refused(f"groups of {', '.join(map(str, groups))} have no common group in GPTQ")
            elif site.name in contents.modules:
                found[site.name] = _live_answer(contents.modules[site.name], layouts[site.name])
        return found

    @override
    def problem(self, contents: Contents) -> str | None:
        """It can represent quantized linears of stock sizes."""
        others = contents.more_than_quantized
        if others:
            return f"it can represent quantized linears only, not {others[0]}"
        experts = next((site.name for site in contents.sites if EXPERTS in site.name), None)
        return None if experts is None else f"its loaders disagree about experts ({experts})"

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Which scales are rounded, repeated scales, and wider fields."""
        rounded = [f"{name}: {answer.why}" for name, answer in answers.items() if isinstance(answer, Converted)]
        layouts, found = self._layouts(contents), list[str]()
        for site in contents.sites:
            layout = layouts[site.name]
            if layout.bits != site.scheme.weights.bits:
                found.append(f"{site.scheme.name}: codes are stored in {layout.bits}-bit fields")
            if layout.group != group_of(site.scheme, site.inputs):
                found.append(f"{site.scheme.name}: scales are repeated for groups of {layout.group}")
        return [*rounded, *dict.fromkeys(found)]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Codes, zero points, scales, the group of every input, and a bias."""
        layout = self._layouts(Contents((site,)))[site.name]
        return gptq.tensors((site.outputs, site.inputs), site.scheme, layout, storage_dtype, bias=site.has_bias)

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints."""
        return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """An ordinary Hugging Face folder whose quantized linears are codes and scales."""
        contents, dtype = contents_in(model, writing.storage_dtype), writing.storage_dtype
        layouts, config = self._layouts(contents), portable_config(model, dtype)
        config["quantization_config"] = quantization_config(layouts, set(linears_of_loader(model)))
        replaced: dict[str, Callable[[], dict[str, Tensor]]] = {
            name: partial(_tensors, module, layouts[name], dtype)
            if name in layouts
            else partial(plain.pack, module, dtype)
            for name, module in contents.modules.items()
        }
        files, size = write_model(model, folder, config, replaced, writing)
        return Saved(files, size, "gptq")

    def _problem(self, site: CodedLinear) -> str | None:
        if not site.is_linear:
            return "GPTQ supports only nn.Linear, and this is a Conv1D"
        if gptq.width_of(site.scheme.weights) is None:
            return f"it supports only integers, and {site.scheme.name} uses floats"
        for size, what in ((site.inputs, "inputs"), (site.outputs, "outputs")):
            if size % _MULTIPLE:
                return f"{size} {what} are no multiple of {_MULTIPLE}"
        if group_of(site.scheme, site.inputs) is not None and _common_group([site]) == 1:
            return f"it does not support groups of {site.scheme.weights.group}, only multiples of {min(_GROUPS)}"
        return "it does not support quantized activations" if site.scheme.activations else None

    def _layouts(self, contents: Contents) -> dict[str, Layout]:
        """Of every linear: one group size for all, which divides their own; 1 where none does."""
        sites = [site for site in contents.sites if gptq.width_of(site.scheme.weights) is not None]
        common = None if all(group_of(site.scheme, site.inputs) is None for site in sites) else _common_group(sites)
        any_zero = any(not site.scheme.weights.symmetric for site in sites)
        return {site.name: self._layout(site, common, any_zero=any_zero) for site in sites}

    def _layout(self, site: CodedLinear, group: int | None, *, any_zero: bool) -> Layout:
        bits, symmetric = gptq.width_of(site.scheme.weights), site.scheme.weights.symmetric
        assert bits is not None
        version: Version = (2 if any_zero else 1) if self.version == "auto" else self.version
        return Layout(bits, group, symmetric, version)


def _common_group(sites: Sequence[CodedLinear]) -> int:
    """The longest group of the format that divides every group, and rows that are one group or end in a shorter one."""
    whole = 0
    for site in sites:
        group = group_of(site.scheme, site.inputs) or site.inputs
        whole = gcd(whole, group, site.inputs if site.inputs % group else 0)
    return max((group for group in _GROUPS if whole % group == 0), default=1)


def quantization_config(layouts: Mapping[str, Layout], linears: set[str]) -> dict[str, Any]:
    """JSON data for config.json: what most linears have, and what is different elsewhere by patterns of names.

    `linears` are all linears that loaders build.
    """
    usual = Counter(layouts.values()).most_common(1)[0][0]
    everything, dynamic = linears | set(layouts), dict[str, dict[str, Any]]()
    for layout in dict.fromkeys(layouts.values()):
        if replace(layout, bits=usual.bits, symmetric=usual.symmetric) == layout:
            continue
        names = [name for name, other in layouts.items() if other == layout]
        changes = {"bits": layout.bits, "sym": layout.symmetric}
        dynamic |= {f"+:{_pattern(each)}": changes for each in name_patterns(names, everything)}
    dense = sorted(name for name in linears - set(layouts) if _in_block(name))
    dynamic |= {f"-:{_pattern(each)}": {} for each in name_patterns(dense, everything)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if usual.version == 1 else "gptq_v2",
        "bits": usual.bits,
        "group_size": usual.group or -1,
        "sym": usual.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _pattern(target: str) -> str:
    """A name, or what `name_patterns` marks as an expression, as an expression."""
    name = target.removeprefix("re:")
    return name if name != target else name.replace(".", r"\.") + "$"


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _live_answer(module: CompressedModule, layout: Layout) -> Answer:
    form = module.expression()
    assert isinstance(form, Quantized)
    zero_OG, lowest = form.tensor.zero_point, -(1 << (layout.bits - 1))
    if layout.version == 1 and zero_OG is not None and bool((zero_OG == lowest).any()):
        return Refused("version 1 of GPTQ cannot store the lowest zero point; set `version` to 2")
    steps = error_in_steps(form.tensor, gptq.SCALES)
    if steps > _MOST_STEPS:
        why = f"float16 scales would move its weights by {steps:.2g} steps"
        return Refused(f"{why}; set `save.dtype: bfloat16` or `float16` and compress again")
    if steps:
        why = f"scales are rounded to float16, which moves a weight by at most {steps:.2g} of a step"
        return Converted(why, keeps_codes=True)
    return Exact()


def _tensors(module: CompressedModule, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    form = module.expression()
    assert isinstance(form, Quantized)
    return gptq.pack(form, layout, dtype)
