"""Blocks on which options are tried: what a body cut away, and inputs that are measured once for all options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import Fold
from llmcompress.model.site import LinearSite
from llmcompress.model.slices import cuts
from llmcompress.numerics.statistics import Statistic

Known = dict[str, dict[type[Statistic], Statistic]]
"""Site, relative to its block → statistics of its input; sites that share an input share these objects."""


class BodyWork(BlockWork):
    """A block that becomes narrower; it notes which outputs of every linear stay."""

    rows: dict[str, Tensor]
    """Site → the outputs that are left, in the numbering of the dense block; of sites that keep all, none."""

    def begin(self) -> None:
        """Nothing was cut yet."""
        self.rows = {}

    @override
    def shrink(self, keep: Mapping[int, Sequence[int]]) -> None:
        gone = cuts(self.info.structure, keep)
        sizes = {site.name: site.outputs for site in self.info.structure.sites}
        super().shrink(keep)
        for name, cut in gone.items():
            if cut.rows:
                stays = torch.ones(sizes[name], dtype=torch.bool)
                stays[list(cut.rows)] = False
                old = self.rows.get(name, torch.arange(sizes[name]))
                self.rows[name] = old[stays]


class Inputs:
    """Statistics of the inputs of a block that stays as it is; each is measured when it is first asked for."""

    def __init__(self, block: BlockWork, known: Known) -> None:
        self._block, self._known = block, known

    def statistics(self, names: Sequence[str], kinds: Sequence[type[Statistic]]) -> Known:
        """All of these kinds, of these sites' inputs."""
        missing = {name for name in names if any(kind not in self._known.get(name, {}) for kind in kinds)}
        # sites that share an input get the same objects, whichever of them is asked for
        groups = [group for group in self._block.input_groups() if missing & {site.info.name for site in group}]
        sites = [site for group in groups for site in group]
        if sites:
            lacking = tuple(
                dict.fromkeys(
                    kind for kind in kinds for site in sites if kind not in self._known.get(site.info.name, {})
                )
            )
            self._block.measure(sites, lacking)
            for site in sites:
                found = self._known.setdefault(site.info.name, {})
                found |= {kind: site.statistic(kind) for kind in lacking}
            self._block.forget()
        return {name: {kind: self._known[name][kind] for kind in kinds} for name in names}

    def before(self, changed: frozenset[str]) -> Known:
        """What holds also where these sites have other weights: statistics of inputs that come before their outputs."""
        found: Known = {}
        for group in self._block.input_groups():
            names = [site.info.name for site in group]
            found |= {name: dict(self._known[name]) for name in names if name in self._known}
            if changed.intersection(names):
                break
        return found


class OptionWork(BlockWork):
    """A block on which one option for linears is tried: inputs are those of the block before, and nothing but its
    linears may change."""

    measured: Inputs

    @override
    def measure(self, sites: Sequence[LinearSite], kinds: Sequence[type[Statistic]]) -> None:
        found = self.measured.statistics([site.info.name for site in sites], kinds)
        for site in sites:
            site.set_statistics(found[site.info.name])

    @override
    def fold(self, fold: Fold, divide_P: Tensor) -> None:
        not_local(self.info.full(fold.producer))

    @override
    def replace_module(self, module: nn.Module, outputs: list[Tensor] | None = None) -> None:
        not_local(self.info.name)


def not_local(where: str) -> NoReturn:
    """An option for linears changed something else."""
    raise CompressError(
        "search.not-local",
        "an option of `sites` changes more than its own linears, so it cannot be combined with other options",
        where=where,
        fix="put passes that fold factors into norms or other linears into `before`, or leave them out",
        exit_code=ExitCode.USAGE,
    )
