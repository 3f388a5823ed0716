"""MoDeGPT: pairs of matrices made thinner together, in closed form. L = blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.report import SiteReport
from llmcompress.model.attention import Attention, find_attentions
from llmcompress.model.map import BlockInfo
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import HIDDEN_KEYWORD
from llmcompress.numerics.modular import allocate, nystrom_channels
from llmcompress.numerics.refit import refit_columns
from llmcompress.numerics.statistics import Gram, Moments, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.decomposition.modegpt_attention import shrink_attention
from llmcompress.passes.decomposition.modegpt_parts import Part, can_couple, can_move, MIXED, SINKS, parts_of
from llmcompress.passes.pruning.units import groups_of

MOST = 0.9
"""No part of a block loses more than this."""


@PASSES.register("modegpt")
class ModularDecomposition(BlockPass):
    """Thinner FFNs (Nyström), queries and keys (the rows that count) and values (SVD), all fitted to the data.

    Source: Lin et al., arXiv 2408.09632.
    """

    makes: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    spoils: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill pruned weights again: what reads the rest is fitted anew",
        "pattern": "would fill pruned weights again, and shift the columns that N:M groups are counted in",
    }
    decides: ClassVar[bool] = True
    changes_sites: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"ratio", "attention", "allocation", "temperature", "ridge"})

    ratio: float = Field(0.25, ge=0, lt=1, description="share of the parameters of all linears in the blocks to remove")
    attention: bool = Field(True, description="false: only FFNs get thinner, which plain configs can say")
    allocation: Literal["influence", "uniform"] = Field(
        "influence", description="influence: blocks that change their input least lose most; uniform: all the same"
    )
    temperature: float = Field(0.1, gt=0, description="influence: how far blocks may differ; high: all the same")
    ridge: float = Field(0.01, gt=0, le=1, description="of the leverage scores, as a share of the mean diagonal")

    def names_after(self, site: str) -> tuple[str, ...]:
        """The linear inside, where only some rows or columns are left of a site."""
        return (site, f"{site}.kept") if self.attention else (site,)

    @override
    def uses_data(self) -> bool:
        return True

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing at once: attention and FFN are measured one after the other."""
        return ()

    @override
    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        attentions = self._attentions(whole)
        parts = [parts_of(info, attentions[info.index], self.selects) for info in whole.map.blocks]
        sizes = [sum(_parameters(site) for site in info.structure.sites) for info in whole.map.blocks]
        reach = [sum(part.units * part.parameters for part in of_block) for of_block in parts]
        most_L = MOST * torch.tensor(reach) / torch.tensor(sizes)
        reachable = float((most_L * torch.tensor(sizes)).sum()) / sum(sizes)
        if self.ratio > reachable:
            raise CompressError(
                "modegpt.too-much",
                f"of the linears' parameters {100 * self.ratio:.0f} % cannot be removed: {100 * reachable:.0f} % can",
                where="ratio",
                fix="lower `ratio`, or let it work on more `sites`",
                exit_code=ExitCode.USAGE,
            )
        influence_L = torch.zeros(len(sizes), dtype=torch.float64)
        if self.allocation == "influence" and self.ratio > 0:
            influence_L = block_influence(whole)
        shares_L = allocate(influence_L, torch.tensor(sizes), most_L, ratio=self.ratio, temperature=self.temperature)
        decisions = {"influence": influence_L}
        owed = 0.0
        for info, of_block, size, share in zip(whole.map.blocks, parts, sizes, shares_L.tolist(), strict=True):
            wanted = share * size + owed
            kept, removed = _plan(of_block, wanted)
            if self.allocation == "influence":
                owed = wanted - removed
            decisions |= {f"{info.index}.{p.kind}.{p.number}": torch.tensor(n) for p, n in zip(of_block, kept, strict=True)}
            for number, attention in enumerate(attentions[info.index]):
                decisions[f"{info.index}.attention.{number}"] = _packed(attention.to_json())
        return decisions

    def _attentions(self, whole: WholeModel) -> list[list[Attention]]:
        """By block; blocks of one kind share the answer."""
        if not self.attention:
            return [[] for _ in whole.map.blocks]
        known: dict[int, list[Attention]] = {}
        found = []
        for info in whole.map.blocks:
            kind = id(info.structure)
            if kind not in known:
                known[kind] = find_attentions(whole.model, info.index, info.structure)
            found.append(known[kind])
        return found

    @override
    def run(self, block: BlockWork) -> list[SiteReport]:
        return self.apply(block, [site for site in block.sites if self.selects(site.name)])

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Attention first; the FFN is then measured on what it gets from it."""
        index, decisions = block.info.index, block.decisions
        attentions = []
        while f"{index}.attention.{len(attentions)}" in decisions:
            attentions.append(Attention.from_json(_unpacked(decisions[f"{index}.attention.{len(attentions)}"])))
        before = sum(_parameters(site) for site in block.info.structure.sites)
        rows: list[SiteReport] = []
        parts = parts_of(block.info, attentions, self.selects)
        keep = {(p.kind, p.number): int(decisions[f"{index}.{p.kind}.{p.number}"]) for p in parts}
        fewer = {key: n for key, n in keep.items() if n < next(p.units for p in parts if (p.kind, p.number) == key)}
        for number, attention in enumerate(attentions):
            scores, values = fewer.get(("coupling", number)), fewer.get(("values", number))
            if scores is not None or values is not None:
                taps = [block.site(name) for name, _ in attention.taps] + [block.site(attention.reader)]
                block.measure(taps, (Gram, Moments))
                rows += shrink_attention(block, attention, score_rows=scores, value_rows=values)
                block.forget()
        channels = {number: n for (kind, number), n in fewer.items() if kind == "channels"}
        if channels:
            rows += shrink_channels(block, channels, ridge=self.ridge)
        return rows


def shrink_channels(block: BlockWork, keep: Mapping[int, int], *, ridge: float) -> list[SiteReport]:
    """Keep so many channels of these width groups: those the others explain worst; what reads them is refitted."""
    groups = [group for group in groups_of(block.info) if group.index in keep]
    readers = {name: group for group in groups for name in group.readers}
    block.measure([site for site in block.sites if site.name in readers], (Gram,))
    chosen: dict[int, Tensor] = {}
    rows = []
    for site in block.sites:
        if site.name not in readers:
            continue
        group, gram = readers[site.name], site.statistic(Gram)
        owner_I = group.unit_of_column(gram.sum_II.device)
        if group.index not in chosen:
            order_U = owner_I.argsort(stable=True)[int((owner_I < 0).sum()) :]
            chosen[group.index] = nystrom_channels(gram.sum_II[order_U][:, order_U], keep[group.index], ridge=ridge)
        kept_I = (owner_I < 0) | chosen[group.index][owner_I.clamp_min(0)]
        new = refit_columns(site.weight_OI, gram.sum_II, kept_I, damping=ridge)
        site.write(new.weight_OI)
        rows.append(
            SiteReport(
                site=site.name,
                algorithm="modegpt",
                error=new.error,
                error_before=new.error_deleted,
                tokens=gram.tokens,
                parameters=site.info.outputs * int(kept_I.sum()),
                removed=group.units - keep[group.index],
                degraded=new.degraded,
            )
        )
    block.forget()
    block.shrink({index: kept_U.nonzero().flatten().tolist() for index, kept_U in chosen.items()})
    return rows


@torch.no_grad()
def block_influence(whole: WholeModel) -> Tensor:
    """One minus the mean cosine of what enters a block and what leaves it, over all tokens.

    Source: Men et al., arXiv 2403.03853 (ShortGPT).
    """
    cosines: list[list[Tensor]] = []
    with ExitStack() as hooks:
        for block in whole.stream():
            cosines.append(hooks.enter_context(_cosines(block.module)))
            if len(cosines) == len(whole.map.blocks):
                block.outputs()  # the stream itself runs all but the last one
            whole.progress.note(f"influence: block {len(cosines)} of {len(whole.map.blocks)}")
    return torch.stack([1 - torch.cat(of_block).double().mean() for of_block in cosines])


@contextmanager
def _cosines(block: nn.Module) -> Iterator[list[Tensor]]:
    """One number per token for every forward of the block."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs[HIDDEN_KEYWORD]
        after = output if isinstance(output, Tensor) else output[0]
        found.append(functional.cosine_similarity(before, after, dim=-1).flatten().cpu())

    handle = block.register_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _plan(parts: Sequence[Part], wanted: float) -> tuple[list[int], int]:
    """Units kept of every part so that about that many parameters go, the same share of each; and how many go."""
    kept, removed = [], 0
    left = float(sum(part.units * part.parameters for part in parts))
    for part in parts:
        share = min(max((wanted - removed) / left, 0.0), MOST) if left else 0.0
        kept.append(min(part.units, part.kept(share)))
        removed += (part.units - kept[-1]) * part.parameters
        left -= part.units * part.parameters
    return kept, removed


def _parameters(site: Any) -> int:
    return int(site.outputs * (site.inputs + site.has_bias))


def _packed(text: str) -> Tensor:
    """Text among decisions, which are tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> str:
    return bytes(packed.tolist()).decode()
