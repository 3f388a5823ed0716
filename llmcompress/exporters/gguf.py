"""GGUF: one file with weights, tokenizer and chat template, which llama.cpp and everything built on it run.

Codes and scales are carried, never rounded again unless the option `instead` says so (docs/decisions/0033).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.gguf_architectures import Setting, config_problem, notes_of, settings_of
from llmcompress.exporters.gguf_experts import experts_problem
from llmcompress.exporters.gguf_file import read_back, write_file
from llmcompress.exporters.gguf_tensors import FileTensor, code_table, file_tensors, tensor_names
from llmcompress.exporters.gguf_tokenizer import tokenizer_settings
from llmcompress.exporters.gguf_widths import widths_by_block, widths_problem
from llmcompress.formats import gguf, plain
from llmcompress.formats.gguf import BlockType
from llmcompress.formats.named import Kind
from llmcompress.modules.expression import Tied
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import Grid
from llmcompress.records.export_report import ReadBack

FILE = "model.gguf"
_MOST_STEPS = 1 / 16
"""Float16 scales may move a weight by this share of a step; more is refused. Rounding itself moves it by up to 1/2."""
_BLOCK = 32
_MINIMA = "minima are rounded to float16, which moves a weight by about 1/250 of a step at most"


@EXPORTERS.register("gguf")
class GgufExporter(Exporter):
    """Integers of 2 to 8 bits and MXFP4 in blocks of 32, ternary codes and K-quants in blocks of 256; ordinary weights
    in BF16, F16 or F32.
    """

    limits: ClassVar[TargetLimits] = TargetLimits(
        group_multiple=_BLOCK,
        rounded_inputs=False,
        rounded_embedding=True,
        super_blocks=True,
        scale_dtypes=frozenset({torch.bfloat16, torch.float16}),
    )
    runtime: ClassVar[str] = "llama_cpp"
    fix: ClassVar[str] = "set the option `instead` (`dense`, or a type of ggml to which it is rounded a second time)"

    language: ClassVar[str] = "sh"
    how_to_run: ClassVar[str] = f"""llama-cli -m {FILE} -p "The"        # any build of llama.cpp
llama-server -m {FILE}               # an OpenAI-compatible server and a chat page
pip install llmcompress[llamacpp]       # or from Python, without building anything
llmcompress evaluate . --runner llama_cpp"""
    found_at_root: ClassVar[tuple[str, ...]] = ("*.gguf",)

    instead: Literal["refuse", "dense", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] = "refuse"
    """What happens to a linear that no type of GGUF holds. `dense`: it is dequantized to ordinary weights; a type: it
    is rounded a second time, to that type, by the `gguf` package."""

    ternary: Literal["TQ2_0", "TQ1_0"] = "TQ2_0"
    """The type of ternary codes in groups of 256: two bits each, or 1.69 with the scale, which decodes more slowly."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid and its sizes; what scales and minima are is only known of a live model."""
        why = self._problem(site.scheme, site.inputs)
        if why is None:
            rounds = not site.scheme.weights.symmetric and site.scheme.weights.scales.super_block is None
            return Converted(_MINIMA, keeps_codes=True) if rounds else Exact()
        if self.instead == "refuse" or site.scheme.activations:
            return Refused(why, nearest(site.scheme, site.inputs))
        return Converted(f"{why}; {self._instead()}")

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """With the scales of a live model: float16 may not hold them."""
        found = super().answers(contents)
        for site in contents.sites:
            module = contents.modules.get(site.name)
            table = None if module is None else code_table(module.expression())
            kind = self._type(site)
            if table is None or kind is None or isinstance(found[site.name], Refused):
                continue
            steps, found[site.name] = gguf.error_in_steps(table.tensor, kind), Exact()
            if steps > _MOST_STEPS:
                why = f"float16 scales would move its weights by {steps:.2g} steps"
                found[site.name] = Refused(f"{why}; set `save.dtype: bfloat16` or `float16` and compress again")
            elif steps:
                what = "scales and minima" if kind.has_minimum else "scales"
                why = f"{what} are rounded to float16, which moves a weight by at most {steps:.2g} of a step"
                found[site.name] = Converted(why, keeps_codes=True)
        return found

    @override
    def problem(self, contents: Contents) -> str | None:
        """It has a graph for the family, of stock sizes, and codes or ordinary weights to put there."""
        why = config_problem(contents.config)
        if why is not None:
            return why
        why = widths_problem(contents) or experts_problem(contents)
        if why is not None:
            return why
        for name, module in contents.modules.items():
            form = module.expression()
            if not form.is_linear:
                return f"{name} quantizes activations or depends on them (dynamic inference)"
            if not isinstance(form, Tied) and code_table(form) is None and self.instead == "refuse":
                return f"{name} is no matrix of codes ({type(form).__name__}), and GGUF has no other compressed form"
        return None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What is not carried as it is, and wider fields."""
        changed = [f"{name}: {answer.why}" for name, answer in answers.items() if isinstance(answer, Converted)]
        wider = [note for site in contents.sites if (note := self._wider(site)) is not None]
        return [*changed, *dict.fromkeys(wider), *notes_of(contents.config)]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Its blocks, or an ordinary weight."""
        kind, shape = self._type(site), (site.outputs, site.inputs)
        if kind is None:
            return plain.tensors(shape, storage_dtype, bias=site.has_bias)
        return gguf.tensors(shape, site.scheme, kind, bias=site.has_bias)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """`model.gguf`, and the model's config, for readers that want it as transformers spells it."""
        config, tensors = portable_config(model, writing.storage_dtype), self._tensors(model, writing)
        by_block = widths_by_block(model, config, tensor_names(config))
        settings = {**_general(writing), **settings_of(config, by_block)}
        if writing.tokenizer is not None:
            settings |= tokenizer_settings(writing.tokenizer, int(config["vocab_size"]))
        folder.mkdir(parents=True, exist_ok=True)
        size = write_file(folder / FILE, settings, tensors, model, writing.weights_at)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return Saved((FILE,), size, "gguf")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """By our layouts and by the package's own."""
        return read_back(folder / FILE, self._tensors(model, writing))

    def _tensors(self, model: PreTrainedModel, writing: Writing) -> list[FileTensor]:
        rounded_to = None if self.instead in ("refuse", "dense") else self.instead
        return file_tensors(model, writing.storage_dtype, rounded_to, self._ternary)

    def _type(self, site: CodedLinear) -> BlockType | None:
        return gguf.block_type(site.scheme.weights, site.inputs, self._ternary)

    @property
    def _ternary(self) -> BlockType:
        return next(kind for kind in gguf.TERNARY if kind.name == self.ternary)

    def _wider(self, site: CodedLinear) -> str | None:
        """What a user would be surprised by."""
        kind, bits = self._type(site), site.scheme.weights.bits
        if kind is None or bits == kind.bits or kind in gguf.TERNARY:
            return None
        what = f"{kind.name}, {kind.bits_per_weight:.1f} bits per weight with scales"
        return f"{site.scheme.name}: codes are stored as {what}"

    def _instead(self) -> str:
        if self.instead == "dense":
            return "it is dequantized to ordinary weights"
        return f"it is rounded a second time, to {self.instead}"

    def _problem(self, scheme: Scheme, inputs: int) -> str | None:
        if gguf.block_type(scheme.weights, inputs) is not None and scheme.activations is None:
            return None
        grid = scheme.weights
        if grid.scales.super_block is not None:
            return self.limits.problem(scheme, inputs)
        if grid.number is not None:
            return f"no type of GGUF holds {scheme.name}"
        if not grid.symmetric and grid.bits > 5:
            return f"no type of GGUF holds {grid.bits}-bit codes with zero points"
        return self.limits.problem(scheme, inputs)


def nearest(scheme: Scheme, inputs: int) -> Scheme | None:
    """Integers of the same width in whole blocks, zero points given up last; None where rows are no whole blocks.

    Of K-quants what llama.cpp takes in their place.
    """
    grid = scheme.weights
    if grid.scales.super_block is not None:
        other = scheme.without_super_blocks()
        assert other is not None
        return other if gguf.block_type(other.weights, inputs) is not None else nearest(other, inputs)
    wanted = grid.group or inputs
    multiples = range(_BLOCK, inputs, _BLOCK)
    groups = sorted(multiples, key=lambda group: (inputs % group != 0, abs(group - wanted)))
    sizes = [None, *groups] if grid.group is None else [*groups, None]
    tried = (
        Scheme(Grid(grid.bits, symmetric, group))
        for symmetric in dict.fromkeys((grid.symmetric, True))
        for group in sizes
    )
    return next((each for each in tried if gguf.block_type(each.weights, inputs) is not None), None)


def _general(writing: Writing) -> dict[str, Setting]:
    return {
        "general.type": "model",
        "general.name": Path(writing.model_name.partition("@")[0]).name.removeprefix("builtin:"),
        "general.quantized_by": "llmcompress",
    }
