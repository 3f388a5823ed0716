"""bitsandbytes: 4-bit NF4 and LLM.int8(), in checkpoints that transformers loads by its own integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.bnb_linear import BLOCK, NESTED_BLOCK, BnbLinear, Kind
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport

_OUTPUTS = 32
"""By which outputs must divide for the 4-bit kernel of processors with AVX512-BF16."""


class BnbPass(BlockPass):
    """Both kinds: the package quantizes, without data, and its checkpoints load without llmcompress."""

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "factors": "supports only the model's own linears: transformers cannot load quantized low-rank factors",
    }
    kind: ClassVar[Kind]

    @override
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @override
    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """Of 16-bit weights, in bytes."""
        return self.bits_per_weight(info.inputs) / 16

    @classmethod
    def bits_per_weight(cls, inputs: int) -> float:
        """Stored bits per weight, scales included."""
        return 8 + 32 / inputs if cls.kind == "int8" else 4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCK

    @override
    def check_packages(self) -> None:
        """Raises: CompressError with the command that installs it."""
        if find_spec("bitsandbytes") is None:
            raise CompressError(
                "extra.missing",
                f"{PASSES.name_of(type(self))} needs the package bitsandbytes, which is not installed",
                fix='pip install "llmcompress[bnb]"',
                exit_code=ExitCode.REFUSED,
            )

    @override
    def check(self, model_map: ModelMap) -> None:
        """Raises: CompressError for a site whose codes not all loaders can read."""
        names = [
            (block.full(site.name), site)
            for block in model_map.blocks
            for site in block.structure.sites
            if self.selects(block.full(site.name))
        ]
        experts = [name for name, _ in names if ".experts." in name]
        if experts:
            raise _refusal("transformers 5 fuses experts into one tensor, which bitsandbytes cannot quantize", experts)
        odd = [name for name, site in names if site.inputs % BLOCK or site.outputs % _OUTPUTS]
        if odd and self.kind == "nf4":
            raise _refusal(
                f"the CPU kernel of bitsandbytes needs inputs divisible by {BLOCK} and outputs divisible by {_OUTPUTS}",
                odd,
            )

    @override
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Replace every site.

        Raises: CompressError for a site whose class transformers does not replace.
        """
        other = [site.name for site in sites if type(site.module) not in (nn.Linear, Conv1D)]
        if other:
            raise _refusal("transformers quantizes only nn.Linear and Conv1D with bitsandbytes", other)
        rows = []
        for site in sites:
            site.replace(BnbLinear.quantize(self.kind, site.weight_OI, site.bias_O, site.storage_dtype))
            bits = self.bits_per_weight(site.info.inputs)
            rows.append(SiteReport(site=site.name, algorithm=PASSES.name_of(type(self)), bits_per_weight=bits))
        return rows


@PASSES.register("bnb_nf4")
class BnbNF4(BnbPass):
    """4-bit NormalFloat in blocks of 64, with double quantization: 4.13 bits per weight.

    Source: Dettmers et al. (QLoRA), arXiv 2305.14314; the package does the rounding.
    """

    kind: ClassVar[Kind] = "nf4"


@PASSES.register("bnb_int8")
class BnbInt8(BnbPass):
    """8-bit rows; activations are quantized dynamically per token, outliers above 6 are multiplied in float16.

    Source: Dettmers et al. (LLM.int8()), arXiv 2208.07339; the package does the rounding.
    """

    kind: ClassVar[Kind] = "int8"


def _refusal(what: str, names: Sequence[str]) -> CompressError:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return CompressError(
        "bnb.site",
        what,
        where=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
        fix="exclude them with `exclude: [" + ", ".join(f'"*.{leaf}"' for leaf in leaves) + "]`",
        exit_code=ExitCode.USAGE,
    )
