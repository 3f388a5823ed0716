"""MoDeGPT: pairs of matrices are reduced jointly, in closed form. L = blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.attention import Attention, find_attentions
from llmcompress.model.map import BlockInfo, ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.numerics.modular import allocate
from llmcompress.numerics.statistics import Gram, Moments, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.decomposition.influence import block_influence
from llmcompress.passes.decomposition.modegpt_attention import shrink_attention
from llmcompress.passes.decomposition.modegpt_channels import shrink_channels
from llmcompress.passes.decomposition.modegpt_parts import Part, parts_of, reasons
from llmcompress.records.rows import SiteReport

MOST = 0.9
"""No part of a block loses a larger fraction than this."""


@PASSES.register("modegpt")
class ModularDecomposition(BlockPass):
    """Reduce FFN channels (Nyström), query and key rows (by importance), and value rows (SVD), all in closed form.

    Attention keeps its code and shapes, with linears that compute only some of their rows, so the result needs our
    manifest; with `attention: false` and `allocation: uniform` it is an ordinary smaller model. `fraction` counts the
    parameters of all linears of the blocks, including those that cannot be reduced.

    Source: Lin et al., arXiv 2408.09632. Differs: rotary pairs, heads and shared keys are found by experiment
    (`model/attention.py`); the output projection is fitted to all heads jointly; the fraction of parts that cannot be
    reduced (queries and keys behind a norm) is taken from the other parts.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill pruned weights: it refits the remaining ones",
        "pattern": "would fill pruned weights and shift the columns of N:M groups",
    }
    decides: ClassVar[bool] = True
    changes_sites: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"fraction", "attention", "allocation", "temperature", "ridge"})

    fraction: float = Field(0.25, ge=0, lt=1, description="fraction of the parameters of the blocks' linears to remove")
    attention: bool = Field(True, description="false: compress only FFNs, which a plain config can represent")
    allocation: Literal["influence", "uniform"] = Field(
        "influence", description="influence: blocks that change their input least lose most; uniform: all blocks alike"
    )
    temperature: float = Field(0.1, gt=0, description="allocation: influence; the lower, the more the blocks differ")
    ridge: float = Field(
        0.01, gt=0, le=1, description="ridge of channel scores and refit, as a fraction of the mean diagonal"
    )

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        """Where only some rows or columns are left of a site, the linear stands inside."""
        return (site, f"{site}.kept") if self.attention else (site,)

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """The fraction is one of parameters."""
        return 1 - self.fraction

    @override
    def uses_data(self) -> bool:
        return True

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing at once: attention and FFN are measured one after the other."""
        return ()

    @override
    def measures(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    @override
    def forwards(self) -> int:
        return 2

    @override
    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """How much of every part of every block stays, and what was found out about the attentions."""
        attentions = self._attentions(whole)
        parts = [parts_of(info, found, self.selects) for info, found in zip(whole.map.blocks, attentions, strict=True)]
        sizes = [_size(info) for info in whole.map.blocks]
        most = [MOST * sum(part.units * part.parameters for part in of_block) for of_block in parts]
        if self.fraction * sum(sizes) > sum(most):
            raise CompressError(
                "modegpt.too-much",
                f"cannot remove {self.fraction:.1%} of the parameters: the limit is {sum(most) / sum(sizes):.1%}",
                where="fraction",
                fix="lower `fraction`, or select more `sites`",
                exit_code=ExitCode.USAGE,
            )
        influence_L = torch.zeros(len(sizes), dtype=torch.float64)
        if self.allocation == "influence" and self.fraction > 0:
            influence_L = block_influence(whole)
        sizes_L = torch.tensor(sizes, dtype=torch.float64)
        most_L = torch.tensor(most, dtype=torch.float64) / sizes_L
        shares_L = allocate(influence_L, sizes_L, most_L, fraction=self.fraction, temperature=self.temperature)
        decisions = {"influence": influence_L}
        owed = 0.0
        for info, of_block, wanted in zip(whole.map.blocks, parts, (shares_L * sizes_L).tolist(), strict=True):
            kept, removed = plan(of_block, wanted + owed)
            # rounding is compensated in the next block, except if all blocks must be alike
            owed += wanted - removed if self.allocation == "influence" else 0.0
            for part, count in zip(of_block, kept, strict=True):
                decisions[f"{info.index}.{part.kind}.{part.number}"] = torch.tensor(count)
            for number, attention in enumerate(attentions[info.index]):
                decisions[f"{info.index}.attention.{number}"] = _packed(attention.to_json())
        return decisions

    @override
    def run(self, block: BlockWork) -> list[SiteReport]:
        return self.apply(block, [site for site in block.sites if self.selects(site.name)])

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Attention first; the FFN is then measured on what it gets from it."""
        info, decisions = block.info, block.decisions
        attentions = _attentions_in(decisions, info.index)
        fewer = {
            (part.kind, part.number): kept
            for part in parts_of(info, attentions, self.selects)
            if (kept := int(decisions[f"{info.index}.{part.kind}.{part.number}"])) < part.units
        }
        if not fewer:
            return []
        rows: list[SiteReport] = []
        for number, attention in enumerate(attentions):
            scores, values = fewer.get(("coupling", number)), fewer.get(("values", number))
            if scores is not None or values is not None:
                block.context.progress.substep(f"modegpt {attention.reader}")
                names = [*(name for name, _ in attention.taps), attention.reader]
                block.measure([block.site(name) for name in names], (Gram, Moments))
                rows += shrink_attention(block, attention, score_rows=scores, value_rows=values)
                block.forget()
        channels = {number: kept for (kind, number), kept in fewer.items() if kind == "channels"}
        if channels:
            block.context.progress.substep("modegpt channels")
            rows += shrink_channels(block, channels, ridge=self.ridge)
        return [*rows, self._block_row(block, info, attentions)]

    def _block_row(self, block: BlockWork, before: BlockInfo, attentions: Sequence[Attention]) -> SiteReport:
        after = sum(parameter.numel() for site in block.sites for parameter in site.module.parameters())
        return SiteReport(
            site=before.name,
            algorithm="modegpt",
            parameters=after,
            removed=_size(before) - after,
            score=float(block.decisions["influence"][before.index]) if self.allocation == "influence" else None,
            degraded="; ".join(reasons(before, attentions)) or None,
        )

    def _attentions(self, whole: WholeModel) -> list[list[Attention]]:
        """By block; blocks of one kind share the answer."""
        if not self.attention:
            return [[] for _ in whole.map.blocks]
        known: dict[int, list[Attention]] = {}
        for info in whole.map.blocks:
            if id(info.structure) not in known:
                known[id(info.structure)] = find_attentions(whole.model, info.index, info.structure)
        return [known[id(info.structure)] for info in whole.map.blocks]


def plan(parts: Sequence[Part], wanted: float) -> tuple[list[int], int]:
    """Kept units of every part, so that about `wanted` parameters are removed evenly; and how many are."""
    kept, removed = [], 0
    left = sum(part.units * part.parameters for part in parts)
    for part in parts:
        share = min(max((wanted - removed) / left, 0.0), MOST)
        kept.append(part.kept(share))
        removed += (part.units - kept[-1]) * part.parameters
        left -= part.units * part.parameters
    return kept, removed


def _size(info: BlockInfo) -> int:
    """Parameters of all its linears."""
    return sum(site.outputs * (site.inputs + site.has_bias) for site in info.structure.sites)


def _attentions_in(decisions: Mapping[str, Tensor], index: int) -> list[Attention]:
    found: list[Attention] = []
    while (packed := decisions.get(f"{index}.attention.{len(found)}")) is not None:
        found.append(Attention.from_json(bytes(packed.tolist()).decode()))
    return found


def _packed(text: str) -> Tensor:
    """Text among decisions, which are tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
